"""Public data sets, fetched only when asked: where they lie, under what licence, and a download that can be resumed.

Addresses and checksums of the Medical Segmentation Decathlon are those of MONAI's `DecathlonDataset` (Amazon's open
data; Antonelli et al., Nature Communications 13:4128, 2022), that of IXI tiny is TorchIO's. Sizes are rounded.
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from kanseg.data.convert import new_folder
from kanseg.errors import UsageError, UserError, did_you_mean
from kanseg.training.files import make_folder

BLOCK = 1 << 20
TIMEOUT = 30  # seconds without an answer
MSD = "https://msd-for-monai.s3-us-west-2.amazonaws.com/{}.tar"
CC_BY_SA_4 = "CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/"


@dataclass(frozen=True)
class Source:
    """A data set that can be fetched.

    Attributes:
        what: images and classes in a few words.
        size: of the archive, rounded.
        md5: of the archive.
        cite: the paper that its makers ask to be cited.
    """

    name: str
    what: str
    url: str
    size: str
    md5: str
    licence: str
    cite: str


def _msd(name: str, what: str, size: str, md5: str) -> Source:
    cite = "Antonelli et al., Nature Communications 13:4128 (2022); Simpson et al., arXiv:1902.09063"
    return Source(name, what, MSD.format(name), size, md5, CC_BY_SA_4, cite)


SOURCES = {
    source.name: source
    for source in (
        _msd(
            "Task01_BrainTumour",
            "MRI, 4 channels: edema and tumour",
            "7.1 GB",
            "240a19d752f0d9e9101544901065d872",
        ),
        _msd("Task02_Heart", "MRI: left atrium", "0.4 GB", "06ee59366e1e5124267b774dbd654057"),
        _msd("Task03_Liver", "CT: liver and tumour", "27 GB", "a90ec6c4aa7f6a3d087205e23d4e6397"),
        _msd("Task04_Hippocampus", "MRI: front and back", "27 MB", "9d24dba78a72977dbd1d2e110310f31b"),
        _msd("Task05_Prostate", "MRI, 2 channels: two zones", "0.2 GB", "35138f08b1efaef89d7424d2bcc928db"),
        _msd("Task06_Lung", "CT: tumour", "8.5 GB", "8afd997733c7fc0432f71255ba4e52dc"),
        _msd("Task07_Pancreas", "CT: pancreas and tumour", "11 GB", "4f7080cfca169fa8066d17ce6eb061e4"),
        _msd("Task08_HepaticVessel", "CT: vessels and tumour", "8.7 GB", "641d79e80ec66453921d997fbf12a29c"),
        _msd("Task09_Spleen", "CT: spleen", "1.5 GB", "410d4a301da4e5b2f6f86ec3ddba524e"),
        _msd("Task10_Colon", "CT: tumour", "5.8 GB", "bad7a188931dc2f6acf72b08eb6202d0"),
        Source(
            "ixi_tiny",
            "MRI, small: grey, white matter, fluid",
            "https://www.dropbox.com/s/ogxjwjxdv5mieah/ixi_tiny.zip?dl=1",
            "180 MB",
            "bfb60f4074283d78622760230bfa1f98",
            "CC BY-SA 3.0, https://creativecommons.org/licenses/by-sa/3.0/",
            "IXI, brain-development.org; Perez-Garcia et al., Comput Methods Programs Biomed 208 (2021)",
        ),
    )
}


def find_source(name: str) -> Source:
    """The data set of that name, with or without its task number, in any case.

    >>> find_source("hippocampus").name
    'Task04_Hippocampus'
    """
    short = {key.partition("_")[2].lower() if key.startswith("Task") else key: key for key in SOURCES}
    key = {**{k.lower(): k for k in SOURCES}, **short}.get(name.lower())
    if key is None:
        raise UsageError(f"Unknown data set '{name}'.{did_you_mean(name, [*SOURCES, *short])}")
    return SOURCES[key]


def download(source: Source, out: Path | str, console: Console | None = None) -> dict[str, Any]:
    """Fetch, check and unpack a data set to OUT/NAME; an archive that lies in `out` already is not fetched again.

    Returns:
        {"name", "folder", "licence", "cite"}.

    Raises:
        UserError: no connection, a wrong checksum, or a folder of that name; what was fetched stays for the next call.
    """
    console, out = console or Console(stderr=True), Path(out)
    console.print(f"{source.name}: {source.what}, about {source.size}", highlight=False)
    console.print(f"Licence: {source.licence}", highlight=False, soft_wrap=True)
    console.print(f"Cite: {source.cite}", highlight=False, soft_wrap=True)
    folder, archive = make_folder(out) / source.name, out / _archive_name(source)
    if folder.exists():
        raise UserError(f"{folder} is there already. Delete it to fetch the data anew.")
    if not archive.exists():
        _fetch(source, archive, console)
    _check(source, archive)
    with new_folder(folder) as part:
        _unpack(archive, part)
        _lift(part)
    archive.unlink()
    console.print(f"{folder}. Next: kanseg plan {folder} -o RUN", highlight=False, soft_wrap=True)
    return {"name": source.name, "folder": str(folder), "licence": source.licence, "cite": source.cite}


def _archive_name(source: Source) -> str:
    return source.name + (".zip" if ".zip" in source.url else ".tar")


def _fetch(source: Source, archive: Path, console: Console) -> None:
    """Bring the archive; a part of it that is there is gone on from, where the server can."""
    part = archive.with_name(f"{archive.name}.part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(source.url, headers={"Range": f"bytes={start}-"} if start else {})
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            resumed = answer.status == 206
            length = answer.headers.get("Content-Length")
            total = int(length) + start * resumed if length else None
            with (
                part.open("ab" if resumed else "wb") as file,
                Progress(*columns, console=console, disable=not console.is_terminal) as progress,
            ):
                task = progress.add_task(source.name, total=total, completed=start * resumed)
                for block in _blocks(answer):
                    file.write(block)
                    progress.advance(task, len(block))
        if total is not None and part.stat().st_size != total:
            raise ConnectionError("the connection broke off")
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # the part is the whole already
            part.rename(archive)
            return
        raise UserError(
            f"{source.name} cannot be fetched: {source.url} answers {error.code} {error.reason}."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{source.name} cannot be fetched from {source.url}: {reason}. Is there a network? Call again to go on, or "
            f"put the archive to {archive} by other means."
        ) from error
    part.rename(archive)


def _blocks(stream: Any) -> Iterator[bytes]:
    read: Callable[[], bytes] = lambda: stream.read(BLOCK)  # noqa: E731
    return iter(read, b"")


def _check(source: Source, archive: Path) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with archive.open("rb") as file:
        for block in _blocks(file):
            digest.update(block)
    if digest.hexdigest() != source.md5:
        archive.unlink()
        raise UserError(
            f"The archive of {source.name} has the checksum {digest.hexdigest()}, not {source.md5}: it was damaged, or "
            "replaced at its source. It was deleted; call again."
        )


def _unpack(archive: Path, folder: Path) -> None:
    """Both formats by ways that let no member leave the folder."""
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)
        else:
            with tarfile.open(archive) as file:
                file.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}).") from error


def _lift(folder: Path) -> None:
    """Where the archive holds one folder, its content goes up into `folder`."""
    inside = [path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX"))]
    if len(inside) == 1 and inside[0].is_dir():
        kept = inside[0].rename(folder / ".inside")
        for path in kept.iterdir():
            shutil.move(path, folder / path.name)
        kept.rmdir()

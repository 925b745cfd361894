"""Public data sets, fetched only when asked: where they lie, under what licence, and a download that can be resumed.

Addresses and checksums of the Medical Segmentation Decathlon are those of MONAI's `DecathlonDataset` (Amazon's open
data; Antonelli et al., Nature Communications 13:4128, 2022), that of IXI tiny is TorchIO's, those of MNIST are
torchvision's, of CIFAR, MedMNIST and TotalSegmentator their makers'. Sizes are rounded.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from kanseg.data.convert import new_folder
from kanseg.data.masks import join_masks
from kanseg.errors import UsageError, UserError, did_you_mean
from kanseg.files import make_folder
from kanseg.progress import say

BLOCK = 1 << 20
PLAIN = (".npz", ".gz")
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
        files: url and md5 of each further file of the data set; `url` is then the first.
        masks: it has a file a class, which are joined (see `kanseg.data.masks`).
    """

    name: str
    what: str
    url: str
    size: str
    md5: str
    licence: str
    cite: str
    files: tuple[tuple[str, str], ...] = ()
    masks: bool = False

    @property
    def parts(self) -> list[Source]:
        """Each file as a source of its own."""
        return [self, *(replace(self, url=url, md5=md5, files=()) for url, md5 in self.files)]


def _msd(name: str, what: str, size: str, md5: str) -> Source:
    cite = "Antonelli et al., Nature Communications 13:4128 (2022); Simpson et al., arXiv:1902.09063"
    return Source(name, what, MSD.format(name), size, md5, CC_BY_SA_4, cite)


def _totalsegmentator(suffix: str, what: str, record: int, size: str, md5: str) -> Source:
    url = f"https://zenodo.org/records/{record}/files/Totalsegmentator_dataset{suffix}_v201.zip?download=1"
    licence = "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/"
    cite = "Wasserthal et al., Radiology: Artificial Intelligence 5:e230024 (2023)"
    return Source(f"totalsegmentator{suffix}", what, url, size, md5, licence, cite, masks=True)


# MedMNIST's 28-pixel files, with the checksums that its makers publish.
MEDMNIST = {
    "chestmnist": ("chest X-ray, 14 findings, any number an image", "02c8a6516a18b556561a56cbdd36c4a8"),
    "pathmnist": ("colon pathology, 9 classes", "a8b06965200029087d5bd730944a56c1"),
    "dermamnist": ("skin lesions, 7 classes", "0744692d530f8e62ec473284d019b0c7"),
    "octmnist": ("retinal OCT, 4 classes", "c68d92d5b585d8d81f7112f81e2d0842"),
    "pneumoniamnist": ("chest X-ray, 2 classes", "28209eda62fecd6e6a2d98b1501bb15f"),
    "retinamnist": ("fundus, 5 grades", "bd4c0672f1bba3e3a89f0e4e876791e4"),
    "breastmnist": ("breast ultrasound, 2 classes", "750601b1f35ba3300ea97c75c52ff8f6"),
    "bloodmnist": ("blood cells, 8 classes", "7053d0359d879ad8a5505303e11de1dc"),
    "tissuemnist": ("kidney cortex cells, 8 classes", "ebe78ee8b05294063de985d821c1c34b"),
    "organamnist": ("abdominal CT, axial, 11 classes", "68e3f8846a6bd62f0c9bf841c0d9eacc"),
    "organcmnist": ("abdominal CT, coronal, 11 classes", "b9ceb9546e10131b32923c5bbeaea2b1"),
    "organsmnist": ("abdominal CT, sagittal, 11 classes", "9ab87b696fb54e2a387ebe992d6ed5f1"),
    "organmnist3d": ("abdominal CT, 3D, 11 classes", "a0c5a1ff56af4f155c46d46fbb45a2fe"),
    "nodulemnist3d": ("lung nodules, 3D, 2 classes", "8755a7e9e05a4d9ce80a24c3e7a256f3"),
    "adrenalmnist3d": ("adrenal shapes, 3D, 2 classes", "bbd3c5a5576322bc4cdfea780653b1ce"),
    "fracturemnist3d": ("rib fractures, 3D, 3 classes", "6aa7b0143a6b42da40027a9dda61302f"),
    "vesselmnist3d": ("brain vessels, 3D, 2 classes", "b41fd4f7e7e2feedddb201585ecafa1b"),
    "synapsemnist3d": ("synapses, 3D, 2 classes", "1235b78a3cd6280881dd7850a78eadb6"),
}


def _medmnist(name: str, what: str, md5: str) -> Source:
    url = f"https://zenodo.org/records/10519652/files/{name}.npz?download=1"
    kind = "BY-NC" if name == "dermamnist" else "BY"
    licence = f"CC {kind} 4.0, https://creativecommons.org/licenses/{kind.lower()}/4.0/"
    cite = "Yang et al., Scientific Data 10:41 (2023), and the data's own source (medmnist.com)"
    return Source(name, what, url, "0.3 GB or less", md5, licence, cite)


def _mnist(name: str, what: str, root: str, licence: str, cite: str, md5s: Sequence[str]) -> Source:
    """Four files in the idx format, at one address."""
    names = [
        f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    ]
    first, *rest = ((f"{root}{file}", md5) for file, md5 in zip(names, md5s, strict=True))
    return Source(name, what, first[0], "12 to 30 MB", first[1], licence, cite, tuple(rest))


def _cifar(classes: int, md5: str) -> Source:
    url = f"https://www.cs.toronto.edu/~kriz/cifar-{classes}-binary.tar.gz"
    cite = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009)"
    licence = "none is stated"
    return Source(f"cifar{classes}", f"photographs, {classes} classes", url, "0.2 GB", md5, licence, cite)


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
        _totalsegmentator(
            "", "CT: 117 structures, 1228 cases", 10047292, "24 GB", "fe250e5718e0a3b5df4c4ea9d58a62fe"
        ),
        _totalsegmentator(
            "_small", "CT: 117 structures, 102 cases", 10047263, "3.2 GB", "6b5524af4b15e6ba06ef2d700c0c73e0"
        ),
        _mnist(
            "mnist",
            "handwritten digits, 10 classes",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "CC BY-SA 3.0, https://creativecommons.org/licenses/by-sa/3.0/",
            "LeCun et al., Proceedings of the IEEE 86:2278 (1998)",
            (
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "d53e105ee54ea40749a09fcbcd1e9432",
                "9fb629c4189551a2d022fa330f9573f3",
                "ec29112dd5afa0611ce80d1b7f02629c",
            ),
        ),
        _mnist(
            "fashion_mnist",
            "clothes, 10 classes",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "MIT, https://github.com/zalandoresearch/fashion-mnist",
            "Xiao et al., arXiv:1708.07747",
            (
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "25c81989df183df01b3e8a0aad5dffbe",
                "bef4ecab320f06d8554ea6380940ec79",
                "bb300cfdad3c16e7a12a480ee83cd310",
            ),
        ),
        _cifar(10, "c32a1d4ab5d03f1284b67883e8d87530"),
        _cifar(100, "03b5dce01913d631647c71ecec9e9cb8"),
        Source(
            "tiny_imagenet",
            "photographs of 64 pixels, 200 classes",
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            "0.25 GB",
            "90528d7ca1a48142e341f4ef8d21d0de",
            "none is stated; ImageNet's terms are for research, not for commerce",
            "Le and Yang, Tiny ImageNet Visual Recognition Challenge (2015)",
        ),
        *(_medmnist(name, what, md5) for name, (what, md5) in MEDMNIST.items()),
    )
}

# Data sets that kanseg reads and does not fetch, and how to get them.
BY_HAND = {
    "amos": "AMOS (abdominal CT and MRI, 15 organs; CC BY 4.0): https://zenodo.org/records/7262581, amos22.zip, 23 GB. "
    "It has a dataset.json with a list of files; make one of CT and one of MRI (numbers above 500), then run "
    "kanseg plan FOLDER.",
    "chaos": "CHAOS (abdominal CT and MRI; CC BY-NC-SA 4.0): https://zenodo.org/records/3431873, CHAOS_Train_Sets.zip, "
    "0.9 GB. DICOM slices with a PNG mask each: convert them to NIfTI, then run kanseg plan FOLDER.",
    "ham10000": "Fetch HAM10000_metadata and HAM10000_images_part_1.zip and _2.zip from "
    "https://doi.org/10.7910/DVN/DBW86T (CC BY-NC 4.0; Tschandl et al., Scientific Data 5:180161, 2018), unpack them "
    "into one folder and run kanseg plan FOLDER. No checksum of its publisher is known.",
    "imagenet": "Get leave at https://image-net.org/download.php (for research alone), unpack the training and "
    "validation images into FOLDER/train/CLASS and FOLDER/val/CLASS and run kanseg plan FOLDER.",
}


def find_source(name: str) -> Source:
    """The data set of that name, with or without its task number, in any case.

    >>> find_source("hippocampus").name
    'Task04_Hippocampus'
    """
    short = {key.partition("_")[2].lower() if key.startswith("Task") else key: key for key in SOURCES}
    key = {**{k.lower(): k for k in SOURCES}, **short}.get(name.lower())
    if (how := BY_HAND.get(name.lower())) is not None:
        raise UsageError(f"{name} is not fetched by kanseg. {how}")
    if key is None:
        names = sorted({*SOURCES, *short, *BY_HAND})
        nearest = next((known for known in names if known.lower().startswith(_task(name))), name.lower())
        raise UsageError(f"Unknown data set '{name}'.{did_you_mean(nearest, names)}")
    return SOURCES[key]


def _task(name: str) -> str:
    """task4 -> task04_: tasks of the Decathlon have two digits."""
    number = re.fullmatch(r"task_?(\d+)", name.lower())
    return f"task{int(number[1]):02d}_" if number else name.lower()


def download(source: Source, out: Path | str, console: Console | None = None) -> dict[str, Any]:
    """Fetch, check and unpack a data set to OUT/NAME; an archive that lies in `out` already is not fetched again.

    Returns:
        {"name", "folder", "licence", "cite"}.

    Raises:
        UserError: no connection, a wrong checksum, or a folder of that name; what was fetched stays for the next call.
    """
    console, out = console or Console(stderr=True), Path(out)
    console.print(f"{source.name}: {source.what}, about {source.size}", highlight=False)
    say(console, f"Licence: {source.licence}")
    say(console, f"Cite: {source.cite}")
    for part in source.parts:
        say(console, f"From: {part.url}, MD5 {part.md5}")
    folder = make_folder(out) / source.name
    archives = {part: out / _archive_name(part) for part in source.parts}
    if folder.exists():
        raise UserError(f"{folder} is there already. Delete it to fetch the data anew.")
    for part, archive in archives.items():
        if not archive.exists():
            _fetch(part, archive, console)
        _check(part, archive)
    with new_folder(folder) as made:
        for part, archive in archives.items():
            _unpack(part, archive, made)
        _lift(made)
        if source.masks:
            join_masks(made, source.name)
    for archive in archives.values():
        archive.unlink()
    say(console, f"{folder}. Next: kanseg plan {folder} -o RUN")
    return {"name": source.name, "folder": str(folder), "licence": source.licence, "cite": source.cite}


def _archive_name(source: Source) -> str:
    if plain := _plain_name(source):
        return f"{source.name}.{plain}"
    return source.name + (".zip" if ".zip" in source.url else ".tar")


def _plain_name(source: Source) -> str | None:
    """The name of a file that is kept as it is."""
    name = source.url.rpartition("/")[2].partition("?")[0]
    return name if name.endswith(PLAIN) and not name.endswith(".tar.gz") else None


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


def _unpack(source: Source, archive: Path, folder: Path) -> None:
    """Both formats by ways that let no member leave the folder; other files are copied."""
    try:
        if plain := _plain_name(source):
            shutil.copyfile(archive, folder / plain)
        elif archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)
        elif not hasattr(tarfile, "data_filter"):
            raise tarfile.TarError("only Python 3.11.4 and newer do it safely; update it and call again")
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

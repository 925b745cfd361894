"""Fetching data from a server on this machine: checked, resumed, unpacked, and never half there."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from kanseg.cli import app
from kanseg.data.download import BY_HAND, SOURCES, Source, download, find_source
from kanseg.data.formats import read_dataset
from kanseg.data.images import read_image
from kanseg.errors import UsageError, UserError


class Server(SimpleHTTPRequestHandler):
    """Files of a folder; it knows ranges, notes what was asked for, and can break off."""

    asked: list[str | None] = []  # noqa: RUF012
    break_after: int | None = None

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        wanted = self.headers.get("Range")
        Server.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: Server.break_after])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "server").mkdir()
    Server.asked, Server.break_after = [], None
    handler = functools.partial(Server, directory=str(tmp_path / "server"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def source(blobs: Path, tmp_path: Path, server: str, suffix: str = ".tar") -> Source:
    """The blobs as an archive on the server."""
    path = tmp_path / "server" / f"blobs{suffix}"
    if suffix == ".tar":
        with tarfile.open(path, "w") as file:
            file.add(blobs, "Task99_Blobs")
    else:
        with zipfile.ZipFile(path, "w") as packed:
            for found in blobs.rglob("*"):
                packed.write(found, Path("Task99_Blobs") / found.relative_to(blobs))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    return replace(SOURCES["Task04_Hippocampus"], name="Task99_Blobs", url=f"{server}/blobs{suffix}", md5=md5)


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_a_data_set_comes_whole_with_its_licence_first(
    blobs: Path, tmp_path: Path, server: str, suffix: str
) -> None:
    said = io.StringIO()
    wanted = source(blobs, tmp_path, server, suffix)
    made = download(wanted, tmp_path / "out", Console(file=said, width=200))
    assert "CC BY-SA 4.0" in said.getvalue().splitlines()[1]
    assert f"From: {wanted.url}, MD5 {wanted.md5}" in said.getvalue().splitlines()
    assert len(read_dataset(made["folder"]).cases) == 6
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["Task99_Blobs"]
    with pytest.raises(UserError, match="is there already"):
        download(source(blobs, tmp_path, server, suffix), tmp_path / "out")


def test_a_download_that_broke_off_goes_on(blobs: Path, tmp_path: Path, server: str) -> None:
    wanted = source(blobs, tmp_path, server)
    Server.break_after = 1000
    with pytest.raises(UserError, match="cannot be fetched .* Call again to go on"):
        download(wanted, tmp_path / "out")
    Server.break_after = None
    download(wanted, tmp_path / "out")
    assert Server.asked == [None, "bytes=1000-"]
    assert len(read_dataset(tmp_path / "out" / "Task99_Blobs").cases) == 6


def test_a_wrong_checksum_leaves_nothing(blobs: Path, tmp_path: Path, server: str) -> None:
    with pytest.raises(UserError, match="has the checksum"):
        download(replace(source(blobs, tmp_path, server), md5="0" * 32), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_offline_is_one_sentence_and_an_archive_from_elsewhere_is_taken(
    blobs: Path, tmp_path: Path, server: str
) -> None:
    there = source(blobs, tmp_path, server)
    gone = replace(there, url="http://127.0.0.1:9/blobs.tar")
    with pytest.raises(UserError, match="Is there a network") as caught:
        download(gone, tmp_path / "out")
    assert "\n" not in str(caught.value)
    (tmp_path / "server" / "blobs.tar").rename(tmp_path / "out" / "Task99_Blobs.tar")
    download(gone, tmp_path / "out")
    assert (tmp_path / "out" / "Task99_Blobs" / "dataset.json").exists()


@pytest.mark.parametrize("old", [False, True])
def test_no_member_leaves_the_folder(
    tmp_path: Path, server: str, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python before 3.11.4 cannot see to that."""
    if old:
        monkeypatch.delattr(tarfile, "data_filter")
    path = tmp_path / "server" / "bad.tar"
    with tarfile.open(path, "w") as file:
        member = tarfile.TarInfo("../escaped.txt")
        member.size = 1
        file.addfile(member, io.BytesIO(b"x"))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    bad = replace(SOURCES["Task04_Hippocampus"], name="bad", url=f"{server}/bad.tar", md5=md5)
    with pytest.raises(
        UserError, match=r"cannot be unpacked \(only Python 3\.11\.4" if old else "cannot be unpacked"
    ):
        download(bad, tmp_path / "out")
    assert not list(tmp_path.rglob("escaped.txt"))


def test_masks_of_single_classes_become_one_label_map(tmp_path: Path, server: str) -> None:
    """As TotalSegmentator's archive lies: a folder a case, a file a class, a table that knows who is for testing."""
    affine = np.diag([-1.5, 1.5, 1.5, 1.0])
    grid = np.indices((12, 10, 8))
    masks = {"kidney_left": grid[0] < 4, "kidney_right": grid[0] > 7, "aorta": (grid[0] == 6) & (grid[1] > 5)}
    path = tmp_path / "server" / "total.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("meta.csv", "\ufeffimage_id;age;split\ns0000;60;train\ns0001;70;val\ns0002;50;test\n")
        for case in ("s0000", "s0001", "s0002"):
            arrays = {"ct": grid.sum(0).astype(np.int16), **masks}
            for name, array in arrays.items():
                folder = f"{case}/" if name == "ct" else f"{case}/segmentations/"
                kind = np.int16 if name == "ct" else np.uint8
                written = nib.Nifti1Image(array.astype(kind), affine).to_bytes()
                packed.writestr(f"{folder}{name}.nii.gz", gzip.compress(written))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    wanted = replace(SOURCES["totalsegmentator_small"], url=f"{server}/total.zip", md5=md5)
    dataset = read_dataset(download(wanted, tmp_path / "out")["folder"])
    assert [case.id for case in dataset.cases] == ["s0000", "s0001"]
    assert [case.id for case in dataset.test_cases] == ["s0002"]
    assert dataset.label_names == ("background", "aorta", "kidney_left", "kidney_right")
    label = read_image(dataset.cases[1].label)
    for number, name in enumerate(("aorta", "kidney_left", "kidney_right"), start=1):
        np.testing.assert_array_equal(label.array[0] == number, masks[name])
    np.testing.assert_allclose(label.affine, affine)


def test_what_is_fetched_by_hand_is_said_with_its_address() -> None:
    for name in ("AMOS", "chaos"):
        with pytest.raises(UserError, match=r"is not fetched by kanseg. .*https://zenodo.org/records/"):
            find_source(name)


def test_names_are_known_by_their_short_forms() -> None:
    assert find_source("task09_spleen").name == find_source("Spleen").name == "Task09_Spleen"
    with pytest.raises(UserError, match="Did you mean"):
        find_source("Task04_Hipocampus")
    for name in BY_HAND:
        with pytest.raises(
            UsageError, match=f"{name} is not fetched by kanseg.*https://.* run kanseg plan FOLDER"
        ):
            find_source(name)


def test_the_list_has_every_address_checksum_size_and_licence() -> None:
    shown = CliRunner().invoke(app, ["download"], env={"COLUMNS": "100"}).output
    assert all(f"{s.name}: {p.url}, MD5 {p.md5}\n" in shown for s in SOURCES.values() for p in s.parts)
    assert all(re.search(rf"{s.name} .*{s.size}", shown) for s in SOURCES.values())


def test_the_table_is_that_of_monai() -> None:
    datasets = pytest.importorskip("monai.apps").DecathlonDataset
    assert {name: s.url for name, s in SOURCES.items() if name.startswith("Task")} == datasets.resource
    assert {name: s.md5 for name, s in SOURCES.items() if name.startswith("Task")} == datasets.md5


def test_several_plain_files_are_one_data_set(tmp_path: Path, server: str) -> None:
    contents = {"train-images-idx3-ubyte.gz": b"images", "train-labels-idx1-ubyte.gz": b"labels"}
    for name, content in contents.items():
        (tmp_path / "server" / name).write_bytes(content)
    (first, md5), *rest = ((f"{server}/{n}", hashlib.md5(c).hexdigest()) for n, c in contents.items())
    wanted = replace(SOURCES["mnist"], url=first, md5=md5, files=tuple(rest))
    made = Path(download(wanted, tmp_path / "out")["folder"])
    assert {path.name: path.read_bytes() for path in made.iterdir()} == contents
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mnist"]


def test_the_checksums_of_mnist_are_those_of_torchvision() -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    for name, known in (("mnist", datasets.MNIST), ("fashion_mnist", datasets.FashionMNIST)):
        parts = {(part.url.rpartition("/")[2], part.md5) for part in SOURCES[name].parts}
        assert parts == set(known.resources)

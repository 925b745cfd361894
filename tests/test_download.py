"""Fetching data from a server on this machine: checked, resumed, unpacked, and never half there."""

from __future__ import annotations

import functools
import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from kanseg.data.download import BY_HAND, SOURCES, Source, download, find_source
from kanseg.data.formats import read_dataset
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
    made = download(source(blobs, tmp_path, server, suffix), tmp_path / "out", Console(file=said, width=200))
    assert "CC BY-SA 4.0" in said.getvalue().splitlines()[1]
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


def test_no_member_leaves_the_folder(tmp_path: Path, server: str) -> None:
    path = tmp_path / "server" / "bad.tar"
    with tarfile.open(path, "w") as file:
        member = tarfile.TarInfo("../escaped.txt")
        member.size = 1
        file.addfile(member, io.BytesIO(b"x"))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    bad = replace(SOURCES["Task04_Hippocampus"], name="bad", url=f"{server}/bad.tar", md5=md5)
    with pytest.raises(UserError, match="cannot be unpacked"):
        download(bad, tmp_path / "out")
    assert not list(tmp_path.rglob("escaped.txt"))


def test_names_are_known_by_their_short_forms() -> None:
    assert find_source("task09_spleen").name == find_source("Spleen").name == "Task09_Spleen"
    with pytest.raises(UserError, match="Did you mean"):
        find_source("Task04_Hipocampus")
    for name in BY_HAND:
        with pytest.raises(
            UsageError, match=f"{name} is not fetched by kanseg.*https://.* run kanseg plan FOLDER"
        ):
            find_source(name)


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

"""Files of a run: several processes may write one at once, and one training holds a folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from kanseg import files
from kanseg.config import read_config
from kanseg.data.fingerprint import load_fingerprint
from kanseg.data.formats import read_dataset
from kanseg.data.images import Image, write_label
from kanseg.data.plan import Plan
from kanseg.errors import UserError
from kanseg.evaluation.compare import load_scores
from kanseg.files import (
    STALE,
    _drop,
    _refuse_if_alive,
    _take,
    locked,
    part_of,
    read_json,
    temporary_folder,
    write_bytes,
    write_json,
)
from kanseg.inference.postprocess import load_rules
from kanseg.training.run_folder import read_splits


def write_often(path: Path, number: int, failed: multiprocessing.Queue) -> None:
    for _ in range(100):
        try:
            write_json(path, {"number": number, "rest": [number] * 2000})
        except UserError as error:
            failed.put(str(error))


def test_several_writers_of_one_file_never_tear_it(tmp_path: Path) -> None:
    path, context = tmp_path / "config.json", multiprocessing.get_context("fork")
    failed = context.Queue()
    writers = [context.Process(target=write_often, args=(path, n, failed)) for n in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            values = read_json(path)
            assert values is not None
            assert set(values["rest"]) == {values["number"]}
    for writer in writers:
        writer.join()
    assert failed.empty()
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_what_a_dead_writer_left_is_removed(tmp_path: Path) -> None:
    dead = multiprocessing.get_context("fork").Process(target=int)
    dead.start()
    dead.join()
    here, age = os.uname().nodename, time.time() - 2 * STALE
    writers = [f"{here}-{dead.pid}", f"{here}-{os.getpid()}", f"another-{dead.pid}"]
    parts = [tmp_path / f".a.json.{writer}-0.part" for writer in writers]
    for part in parts:
        part.write_text("{")
        os.utime(part, (age, age))
    write_bytes(tmp_path / "a.json", b"{}")
    assert [part.exists() for part in parts] == [False, True, True]


def test_names_that_a_file_system_just_takes_are_written(tmp_path: Path) -> None:
    for name in ("x" * 240, "\u6f22" * 80, "\U0001f9e0" * 60):  # signs of one, three and four bytes
        path = write_bytes(tmp_path / f"{name}.json", b"{}")
        assert path.read_bytes() == b"{}"


def test_a_lock_that_another_took_meanwhile_is_left(tmp_path: Path) -> None:
    """Two processes find a dead lock; one takes it over while the other still looks at the old one."""
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"pid": 2**22 + 1, "host": os.uname().nodename, "started": "1"}))
    seen = _refuse_if_alive(lock)
    with locked(tmp_path):
        held = lock.read_text()
        _drop(lock, seen)
        assert lock.read_text() == held
        with pytest.raises(UserError, match="A training runs"):
            _take(lock)
    assert not lock.exists()


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".png"])
def test_what_a_killed_prediction_left_is_removed_by_the_next(tmp_path: Path, suffix: str) -> None:
    dims = 2 if suffix == ".png" else 3
    like = Image(np.zeros((1, *[4] * dims), np.float32), np.eye(4), tmp_path / f"scan{suffix}", dims)
    dead = multiprocessing.get_context("fork").Process(target=int)
    dead.start()
    dead.join()
    left = part_of(tmp_path / f"a{suffix}", suffix)
    left.write_bytes(b"half")
    left = left.rename(left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")))
    os.utime(left, (time.time() - 2 * STALE,) * 2)
    files._swept.clear()  # as in another process
    write_label(tmp_path / f"b{suffix}", np.zeros([4] * dims, np.int32), like)
    assert [path.name for path in tmp_path.iterdir()] == [f"b{suffix}"]


def hold_a_folder(place: Path, held: multiprocessing.Queue) -> None:
    folder = temporary_folder(str(place))
    Path(folder.name, "prepared.npy").write_bytes(b"large")
    held.put(folder.name)
    time.sleep(60)


def test_temporary_folders_of_killed_processes_are_removed_by_the_next(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Queue()
    both = [context.Process(target=hold_a_folder, args=(tmp_path, held), daemon=True) for _ in range(2)]
    for process in both:
        process.start()
    names = {held.get() for _ in both}
    assert set(map(str, tmp_path.iterdir())) == names
    both[0].kill()
    both[0].join()
    own = temporary_folder(str(tmp_path))
    left = {str(folder) for folder in tmp_path.iterdir()} - {own.name}
    assert len(left) == 1
    assert left < names
    both[1].kill()
    own.cleanup()
    assert set(map(str, tmp_path.iterdir())) == left


READERS = {  # of files that hands may have written or changed, by the name of the file
    "plan.json": Plan.load,
    "config.json": read_config,
    "fingerprint.json": lambda file: load_fingerprint(file.parent),
    "splits.json": lambda file: read_splits(file.parent),
    "postprocessing.json": lambda file: load_rules(file.parent),
    "summary.json": lambda file: load_scores(file.parent),
    "dataset.json": lambda file: read_dataset(file.parent),
}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[" * 100_000], ids=["empty", "cut", "bytes", "deep"]
)
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_no_json_is_named_with_what_to_do(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} cannot be read as .+ \(.+\)\. [A-Z].+\.$"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_written_by_another_editor_is_read(encoding, tmp_path):
    (tmp_path / "splits.json").write_text('[{"train": ["Müller"], "val": []}]', encoding=encoding)
    assert read_splits(tmp_path) == [{"train": ["Müller"], "val": []}]

"""kanseg.training.checkpoint and files: whole files or none, and clear words about broken ones."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kanseg import files
from kanseg.data.plans import load_plan
from kanseg.errors import UserError
from kanseg.files import locked, read_json
from kanseg.inference.members import facts_of_model
from kanseg.training.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    load_description,
    load_model,
    load_weights,
    named,
    pack,
    part,
    read_info,
    restore_rng,
    rng_state,
    save_checkpoint,
    shipped,
    unpack,
)
from kanseg.training.optimizers import OPTIMIZERS
from kanseg.training.stop import sigterm_by

TENSORS = {"model.weight": torch.arange(6.0).reshape(2, 3), "rng.torch": torch.get_rng_state()}
INFO = {"model": {"name": "ukanet"}, "labels": {"background": 0, "Länge": 1}}


@pytest.fixture
def saved(tmp_path):
    return save_checkpoint(tmp_path / "last.safetensors", TENSORS, INFO)


def test_tensors_and_json_come_back(saved):
    tensors, info = load_checkpoint(saved)
    assert info == INFO
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_tensors_that_share_memory_are_saved(tmp_path):
    weight = torch.ones(3)
    path = save_checkpoint(tmp_path / "x.safetensors", {"model.a": weight, "model.b": weight}, {})
    assert load_checkpoint(path)[0].keys() == {"model.a", "model.b"}


REPLACE = """
import itertools, os, sys
target, part, *kinds = sys.argv[1:]
print("begun", flush=True)
for kind in itertools.cycle(kinds):
    os.link(kind, part)
    os.replace(part, target)
"""


def test_a_checkpoint_that_a_training_replaces_meanwhile_is_read_whole(tmp_path):
    """Either the old or the new one: what opens the file twice meets both, and fails or mixes them."""
    path, kinds = tmp_path / "last.safetensors", []
    for k in (1, 40):  # names and sizes differ, so that the header of one file does not fit the other
        tensors = {f"model.{'x' * k}.{i}": torch.full((8 * k,), k) for i in range(k)}
        kinds.append(save_checkpoint(tmp_path / str(k), tensors, {"k": k}))
    command = [sys.executable, "-c", REPLACE, path, tmp_path / "part", *kinds]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as training:
        try:
            assert training.stdout is not None
            assert training.stdout.readline() == "begun\n"
            while not path.exists():
                assert training.poll() is None
            for _ in range(2000):
                tensors, info = load_checkpoint(path)
                assert len(tensors) == info["k"]
                assert all((tensor == info["k"]).all() for tensor in tensors.values())
                assert read_info(path)["k"] in (1, 40)
                assert load_description(path)["k"] in (1, 40)
        finally:
            training.kill()


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_checkpoint_that_is_cut_short_is_refused(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    for read in (load_checkpoint, load_description):
        with pytest.raises(UserError, match="cut short"):
            read(saved)


def test_a_description_is_read_without_the_tensors(tmp_path):
    """Of a file of eight gigabytes of which the disk holds the header alone."""
    size, path = 2**33, tmp_path / "large.safetensors"
    tensor = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"kanseg": json.dumps(INFO)}, "model.weight": tensor}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)
    assert load_description(path) == INFO
    os.truncate(path, 8 + len(header) + size - 1)
    with pytest.raises(UserError, match=f"{path.stat().st_size} bytes, not {path.stat().st_size + 1}"):
        load_description(path)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"weight": torch.ones(1)}, path)
    with pytest.raises(UserError, match="no safetensors file"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="There is no checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_a_safetensors_file_of_others_is_refused(tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not written by kanseg"):
        load_checkpoint(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ((), [1]),
        (("model",), "word"),
        (("model", "name"), []),
        (("model", "in_channels"), 10**12),
        (("model", "out_channels"), 10**30),
        (("model", "options"), None),
        (("model", "options", "features_per_stage"), [10**12] * 4),
        (("plan",), None),
        (("plan", "slices"), 10**30),
        (("plan", "channel_names"), "MRI"),
        (("plan", "label_dtype"), "float99"),
        (("plan", "version"), 2),
        (("plan", "normalization"), [{"scheme": ["ct"]}]),
    ],
)
def test_a_description_that_cannot_be_is_refused_by_its_file(tmp_path, place, value):
    tensors, info = load_checkpoint(shipped()["hippocampus"])
    info["versions"]["kanseg"] = "99.0"
    part = info
    for key in place[:-1]:
        part = part[key]
    if place:
        part[place[-1]] = value
    path = save_checkpoint(tmp_path / "model.safetensors", tensors, info if place else value)
    with pytest.raises(UserError, match="model.safetensors (does not|cannot|describes)"):
        load_model(path)
    if place[:1] == ("plan",):
        with pytest.raises(UserError, match="model.safetensors (does not|cannot)"):
            facts_of_model(path)
    if place == ("plan", "version"):
        with pytest.raises(UserError, match=r"kanseg 99.0 wrote it, and this is"):
            load_model(path)


def test_json_that_is_nested_without_end_is_refused(saved, tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    save_file({"weight": torch.ones(1)}, saved, {"kanseg": deep})
    with pytest.raises(UserError, match="not written by kanseg"):
        load_checkpoint(saved)
    assert read_info(saved) == {}
    (tmp_path / "plan.json").write_text(deep)
    with pytest.raises(UserError, match="cannot be read as a plan"):
        load_plan(tmp_path / "plan.json")
    assert read_json(tmp_path / "plan.json") is None


def test_foreign_tensors_in_a_checkpoint_are_named(saved):
    tensors = {**load_file(saved), **{f"stranger.{i}": torch.ones(1) for i in range(9)}}
    save_file(tensors, saved, {"kanseg": json.dumps(INFO)})
    with pytest.raises(UserError, match=r"stranger\.0.*and 5 more"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("bias"), "missing keys: bias"),
        (lambda w: w.update(extra=torch.ones(1)), "foreign keys: extra"),
        (lambda w: w.update(bias=torch.ones(9)), r"bias \[9\] instead of \[2\]"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_none_is_loaded(change, message):
    model = torch.nn.Linear(3, 2)
    before = model.weight.clone()
    weights = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    change(weights)
    with pytest.raises(UserError, match=message):
        load_weights(model, weights, "some.safetensors")
    assert torch.equal(model.weight, before)


def test_parts_are_the_inverse_of_names():
    tensors = {"a.b": torch.ones(1), "c": torch.zeros(1)}
    assert part({**named("model", tensors), **named("rng", tensors)}, "model") == tensors


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_an_optimizer_goes_on_as_if_nothing_had_been(name):
    def closure(model, optimizer):
        optimizer.zero_grad()
        loss = (model(torch.ones(1, 3)) - 1).pow(4).sum()
        loss.backward()
        return loss

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.step(partial(closure, model, optimizer))

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = OPTIMIZERS.create(name, model.parameters(), lr=0.01, weight_decay=0.0)
    train(model, optimizer, 3)
    twin = torch.nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    other = OPTIMIZERS.create(name, twin.parameters(), lr=0.01, weight_decay=0.0)
    tensors, tree = pack(optimizer.state_dict())
    copies = {key: value.clone() for key, value in tensors.items()}
    other.load_state_dict(unpack(copies, json.loads(json.dumps(tree))))
    train(model, optimizer, 2)
    train(twin, other, 2)
    assert torch.equal(model.weight, twin.weight)


def test_random_numbers_go_on_as_if_nothing_had_been(tmp_path):
    def draw():
        return (
            torch.rand(2).tolist(),
            random.random(),
            np.random.rand(),
            np.random.randn(),
            random.gauss(0, 1),
        )

    draw()  # leaves half a pair of normal numbers in the generators
    tensors, info = rng_state()
    path = save_checkpoint(tmp_path / "last.safetensors", named("rng", tensors), {"rng": info})
    expected = draw()
    draw()
    loaded, loaded_info = load_checkpoint(path)
    restore_rng(part(loaded, "rng"), loaded_info["rng"])
    assert draw() == expected


def test_a_full_disk_leaves_the_last_checkpoint_and_no_temporary_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*unharmed"):
        save_checkpoint(saved, TENSORS, {})
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def save_within_10_kb(path):
    """A process of its own needs no limit taken back."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    save_checkpoint(path, {"model.big": torch.ones(100_000)}, {})


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are POSIX")
def test_a_write_that_the_system_refuses_leaves_the_last_checkpoint(saved, apart):
    before = saved.read_bytes()
    with pytest.raises(UserError, match="cannot be written"):
        apart(save_within_10_kb, saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_folder_that_is_a_file_is_one_clear_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "x.safetensors", TENSORS, INFO)
    with pytest.raises(UserError, match="cannot be made"):
        files.make_folder(tmp_path / "file" / "run")


def test_the_best_checkpoint_is_found_from_the_run_folder(tmp_path):
    fold = tmp_path / "fold_0"
    fold.mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    last = save_checkpoint(fold / "last.safetensors", TENSORS, INFO)
    assert find_checkpoint(tmp_path) == find_checkpoint(fold) == find_checkpoint(last) == last
    best = save_checkpoint(fold / "best.safetensors", TENSORS, INFO)
    assert find_checkpoint(tmp_path) == find_checkpoint(fold) == best
    with pytest.raises(UserError, match="does not exist"):
        find_checkpoint(tmp_path / "elsewhere")


def test_a_lock_is_held_by_one_and_freed_after(tmp_path):
    with locked(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()}"), locked(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1}'])
def test_a_lock_that_was_cut_short_is_taken_over(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with locked(tmp_path):
        pass


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owner = {"pid": dead.pid, "host": files.socket.gethostname(), "started": "1"}
    (tmp_path / ".lock").write_text(json.dumps(owner))
    with locked(tmp_path):
        pass


def test_the_lock_of_another_machine_is_taken_over_when_that_gives_no_sign_of_life(tmp_path, monkeypatch):
    """As when a batch system starts a job on another machine, or a container again after a kill."""
    monkeypatch.setattr(files, "SIGN", 0.1)
    monkeypatch.setattr(files, "SILENCE", 1.0)
    here = files.socket.gethostname()
    monkeypatch.setattr(files.socket, "gethostname", lambda: "another")
    with locked(tmp_path):
        kept = (tmp_path / ".lock").read_text()
        monkeypatch.setattr(files.socket, "gethostname", lambda: here)
        time.sleep(1.5)  # longer than a dead one is waited for
        with pytest.raises(UserError, match="on another"), locked(tmp_path):
            pass
    (tmp_path / ".lock").write_text(kept)
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() != kept


def test_a_process_that_lost_its_lock_while_it_was_suspended_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SIGN", 0.05)
    ended = threading.Event()
    with sigterm_by(lambda *_: ended.set()), locked(tmp_path):
        (tmp_path / ".lock").write_text("of another")
        assert ended.wait(5)
    assert (tmp_path / ".lock").read_text() == "of another"


def test_the_lock_of_another_machine_is_respected(tmp_path):
    """An earlier version gives no signs of life."""
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": "another", "started": "1"}))
    with pytest.raises(UserError, match="on another"), locked(tmp_path):
        pass

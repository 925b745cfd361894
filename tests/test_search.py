"""kanseg search: Ray and Optuna find what is better, a stopped search goes on, and mistakes are told at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from kanseg.errors import UsageError
from kanseg.training.planning import plan_data
from kanseg.training.search import _ends_by_ctrl_c, parse_space, search
from kanseg.training.stop import TERMINATED

FIXED = ["training.max_epochs=2", "training.steps_per_epoch=2", "data.workers=0", "data.folds=3"]


@pytest.fixture
def planned(balls, tmp_path):
    _, plan = balls
    plan.save(tmp_path / "plan.json")
    return tmp_path


def test_spaces_are_parted_from_what_is_fixed():
    fixed, space = parse_space(
        ["data.folds=3", "model.options.basis=choice(gram,null,2)", "a.b=uniform(0,1.5)"]
    )
    assert fixed == ["data.folds=3"]
    assert space == {"model.options.basis": ("choice", ["gram", None, 2]), "a.b": ("uniform", [0, 1.5])}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.lr=0.1"], "nothing to search"),
        (["training.lr=loguniforn(1,2)"], "Did you mean 'loguniform'"),
        (["training.lr=uniform(2,1)"], "two rising numbers"),
        (["training.lt=uniform(1,2)"], "Did you mean 'lr'"),
        (["model.options.basis=choice(grma,gram)"], "Did you mean 'gram'"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_it_starts(planned, words, message):
    with pytest.raises(UsageError, match=message):
        search(planned, [*FIXED, *words])
    assert not (planned / "search" / "trials").exists()


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_ends_a_search_as_ctrl_c_does_with_a_code_of_its_own(ctrl_c):
    """Also in a job of the background, to which Ctrl-C does not go."""
    before, own = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, ctrl_c)
    try:
        with pytest.raises(SystemExit) as left, _ends_by_ctrl_c():
            signal.raise_signal(signal.SIGTERM)
        assert left.value.code == TERMINATED
        if ctrl_c != signal.SIG_IGN:
            with pytest.raises(KeyboardInterrupt), _ends_by_ctrl_c():
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, own)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_search_says_so_by_its_code_and_goes_on(planned, number):
    pytest.importorskip("ray")
    words = [*FIXED, "training.lr=choice(0.01,0.001)"]
    command = [sys.executable, "-m", "kanseg", "search", str(planned), *words, "--trials", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(planned.glob("search/trials/*/fold_0/log.jsonl")):
            time.sleep(0.1)
        process.send_signal(number)
        try:
            _, told = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert told.splitlines()[-1].endswith("Go on with --resume.")
    assert "Traceback" not in told
    assert len(search(planned, words, trials=2, resume=True, console=Console(quiet=True))["trials"]) == 2


@pytest.mark.slow
def test_four_trials_on_a_local_ray_find_the_better_rate_and_a_resumed_search_makes_no_more(planned):
    pytest.importorskip("ray")
    words = [*FIXED, "training.lr=choice(0.01,1e-9)", "training.ema_decay=null"]
    how = {"trials": 4, "concurrent": 2, "prune": True, "console": Console(quiet=True)}
    found = search(planned, words, **how)
    assert len(found["trials"]) == 4
    assert {row["training.lr"] for row in found["trials"]} <= {0.01, 1e-9}
    scores = [row["dice"] for row in found["trials"]]
    assert scores == sorted(scores, reverse=True)
    assert found["best"] == json.loads((planned / "search" / "best.json").read_text())
    assert f"training.lr={found['best']['training.lr']}" in found["best"]["overrides"]
    assert len((planned / "search" / "trials.csv").read_text().splitlines()) == 5
    with pytest.raises(UsageError, match="--resume"):
        search(planned, words, **how)
    again = search(planned, words, resume=True, **how)
    assert {row["trial"] for row in again["trials"]} == {row["trial"] for row in found["trials"]}


@pytest.mark.slow
def test_options_of_a_classifier_are_searched_by_its_accuracy(tmp_path):
    pytest.importorskip("ray")
    for number in range(12):
        shade = np.random.default_rng(number).integers(0, 40, (16, 16, 3), np.uint8) + 200 * (number % 2)
        Image.fromarray(shade.astype(np.uint8)).save(tmp_path / f"{number}.png")
    rows = [f"{number}.png,{'ab'[number % 2]}" for number in range(12)]
    (tmp_path / "cases.csv").write_text("\n".join(["image,class", *rows]))
    run = tmp_path / "run"
    plan_data(tmp_path, run, console=Console(quiet=True))
    words = [*FIXED, "training.lr=choice(0.01,0.001)"]
    found = search(run, words, trials=2, console=Console(quiet=True))
    assert [row["accuracy"] for row in found["trials"]] == sorted(
        (row["accuracy"] for row in found["trials"]), reverse=True
    )
    assert 0 <= found["best"]["accuracy"] <= 1
    assert json.loads((run / "search" / "best.json").read_text()) == found["best"]

"""The benchmarks run, on shapes that take seconds; what they measure is not judged here."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "pipelines" / "benchmarks"
SMALL = {
    "networks": "--dims 3 --rounds 1 --patch 16 --volume 16 --features 4 --networks kagn",
    "layers": "--cases '2d 32 -> 32, 128^2' --families kagn --rounds 1",
}


@pytest.mark.parametrize("name", ["layers", pytest.param("networks", marks=pytest.mark.slow)])
def test_a_benchmark_writes_numbers_and_their_table(name: str, tmp_path: Path) -> None:
    out = tmp_path / f"{name}.json"
    command = [sys.executable, str(FOLDER / f"{name}.py"), *shlex.split(SMALL[name]), "-o", str(out)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    numbers, table = json.loads(out.read_text()), out.with_suffix(".md").read_text()
    if name == "layers":
        assert [row["family"] for row in numbers["layers"]] == ["kagn"]
        assert 0 < numbers["layers"][0]["training_range"][0] <= numbers["layers"][0]["training"]
        assert "| 2d 32 -> 32, 128^2 | kagn | plain |" in table
        return
    networks = {row["network"]: row for row in numbers["networks"]}
    assert list(networks) == ["kagn", "twin of kagn"]
    assert (
        networks["kagn"]["spec"]["features_per_stage"]
        == networks["twin of kagn"]["spec"]["features_per_stage"]
    )
    assert all(
        row[job]["seconds"] > 0 < row[job]["mb"]
        for row in networks.values()
        for job in ("training", "inference")
    )
    assert "kagn / twin of kagn, 3D" in table


def test_the_stored_results_are_drawn(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "pictures.py"), "-o", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    for name in ("cost", "accuracy"):
        drawn = plt.imread(tmp_path / f"{name}.png")
        stored = plt.imread(FOLDER / "results" / f"{name}.png")
        assert drawn.shape == stored.shape, "the pictures are older than the results: run pictures.py"
        assert drawn.std() > 0.05

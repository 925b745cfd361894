"""Every network of `kanseg models` for a few steps on real data, and one prediction: does all of it run?

    python pipelines/every_network.py DATA -o runs/every_network

DATA is any data set that kanseg reads, in 2D or 3D. A table at the end names parameters, seconds and the last loss.

Last runs with training.batch_size=1 and --steps 1, one thread on a core of its own: hippocampus (3D), 12 networks in
146 s; GlaS (2D), 13 networks in 77 s. All trained and predicted.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kanseg import Segmenter
from kanseg.data.cases import Case
from kanseg.data.formats import read_dataset
from kanseg.data.planner import make_plan
from kanseg.errors import UserError
from kanseg.files import make_folder
from kanseg.inference.predict import predict_case
from kanseg.models.table import table_of_models

OVERRIDES = ["training.max_epochs=1", "training.validate_every=1000", "training.final_validation=false"]


def main() -> None:
    """Train and predict by each network; the exit code is 1 where one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="a data set in any layout")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("runs/every_network"), help="folder of the runs"
    )
    parser.add_argument("--steps", type=int, default=3, help="training steps of each network")
    parser.add_argument("--models", nargs="*", help="names; default all of the data's dimension")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. training.batch_size=1")
    given = parser.parse_intermixed_args()
    overrides = [*OVERRIDES, f"training.steps_per_epoch={given.steps}", *given.overrides]
    console = Console()
    dataset = read_dataset(given.data)
    plan = make_plan(dataset)
    count = f"parameters_{plan.spatial_dims}d"
    there = [row["name"] for row in table_of_models() if row["kind"] == "network" and row[count]]
    rows = []
    for name in given.models or there:
        begun = time.monotonic()
        try:
            plan.save(make_folder(given.out / name) / "plan.json")
            row = run(name, given.data, given.out / name, dataset.cases[0], overrides)
        except (UserError, RuntimeError) as error:
            row = {"parameters": 0, "loss": float("nan"), "remark": str(error)}
        rows.append({"name": name, "seconds": time.monotonic() - begun, **row})
    table = Table("network", "parameters", "seconds", "loss", "remark")
    for row in rows:
        numbers = f"{row['parameters'] / 1e6:.2f} M", f"{row['seconds']:.0f}", f"{row['loss']:.3f}"
        table.add_row(row["name"], *numbers, row["remark"])
    console.print(table)
    raise SystemExit(any(row["remark"] for row in rows))


def run(name: str, data: Path, folder: Path, case: Case, overrides: list[str]) -> dict[str, Any]:
    """Train one network, predict one image, and say how it went."""
    segmenter = Segmenter(name)
    segmenter.fit(data, run=folder, overrides=overrides, trial=False, console=Console(quiet=True))
    network: Any = segmenter.network
    predict_case(network, case, segmenter.plan)
    log = (folder / "fold_0" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"parameters": parameters, "loss": json.loads(log[-1])["loss"], "remark": ""}


if __name__ == "__main__":
    main()

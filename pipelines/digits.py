"""Handwritten digits of 8 x 8 pixels: a KAN classifier beside its plain twin, over seeds, from files that are at hand.

Data: the 1797 test digits of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, UCI, CC BY 4.0), which
ship with scikit-learn (`pip install scikit-learn`). They carry no writer, so the split is by chance: 1200 train, 247
choose the epoch, 350 test.

    python pipelines/digits.py -o runs/digits

RESULT
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kanseg.config import load_config
from kanseg.data.class_plan import plan_classes
from kanseg.data.image_classes import read_classes
from kanseg.training.fit import fit

PARTS = {"train": (0, 1200), "val": (1200, 1447), "test": (1447, 1797)}
LAYERS = "model.options.encoder_options={layers:[16,32,64,128]}"
NETWORKS = {
    "Gram": ["model.options.basis=kagn", LAYERS],
    "plain": ["model.options.basis=null", LAYERS],
    "plain, twice as wide": ["model.options.basis=null", LAYERS.replace("16,32,64,128", "32,64,128,256")],
}
OVERRIDES = [
    "model=classifier",
    "model.options.encoder=plainkanet4",
    "model.options.bottleneck=false",
    "training.max_epochs=20",
    "training.steps_per_epoch=20",
    "training.batch_size=64",
    "training.ema_decay=0.99",
    "data.workers=0",
]


def main() -> None:
    """Train each network with each seed, and print accuracy on the test digits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/digits"), help="folder of data and runs")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. training.max_epochs=5")
    given = parser.parse_intermixed_args()
    data = write_digits(given.out)
    rows = {
        (name, seed): run(
            data,
            given.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}",
            seed,
            options,
            given.overrides,
        )
        for seed in range(given.seeds)
        for name, options in NETWORKS.items()
    }
    table = Table("network", "parameters", "accuracy by seed", "mean", "AUC", "minutes")
    for name in NETWORKS:
        found = [rows[name, seed] for seed in range(given.seeds)]
        accuracy = [one["accuracy"] for one in found]
        auc, minutes = (np.mean([one[key] for one in found]) for key in ("auc", "minutes"))
        by_seed = ", ".join(f"{value:.4f}" for value in accuracy)
        numbers = f"{np.mean(accuracy):.4f} +- {np.std(accuracy):.4f}", f"{auc:.4f}", f"{minutes:.2f}"
        table.add_row(name, str(found[0]["parameters"]), by_seed, *numbers)
    Console().print(table)


def write_digits(folder: Path) -> Path:
    """The digits as arrays in one file, shuffled once for all."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = (digits.images * (255 / 16)).astype(np.uint8)[order], digits.target[order]
    arrays = {}
    for part, (start, stop) in PARTS.items():
        arrays |= {f"{part}_images": images[start:stop], f"{part}_labels": labels[start:stop, None]}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "digits.npz", **arrays)
    return folder / "digits.npz"


def run(data: Path, folder: Path, seed: int, options: list[str], overrides: list[str]) -> dict[str, Any]:
    """The summary of one training; one that is finished already is read."""
    config = load_config(overrides=[*OVERRIDES, *options, f"data.seed={seed}", *overrides])
    dataset = read_classes(data)
    plan = plan_classes(dataset, folder)
    return fit(config, plan, dataset, folder, resume=True, console=Console(quiet=True))


if __name__ == "__main__":
    main()

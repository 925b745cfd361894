"""Draw the stored results: what a layer costs, and the accuracy of every network on every set, with intervals.

Reads results/*.json beside this file and writes results/cost.png and results/accuracy.png, which the README shows.

    python pipelines/benchmarks/pictures.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
CASES = {
    "3d 32 -> 32, 48^3": "3D, 32 to 32 channels, 48³",
    "2d 64 -> 64, 128^2": "2D, 64 to 64 channels, 128²",
}
SETS = {
    "hippocampus": "Hippocampus",
    "glas": "GlaS",
    "busi": "BUSI",
    "drive": "DRIVE",
    "chase_db1": "CHASE_DB1",
}
KAN, PLAIN, RIVAL = "tab:blue", "0.45", "tab:orange"
COLOURS = {KAN: "with KAN layers", PLAIN: "the same networks with plain layers", RIVAL: "DynUNet, smp's Unet"}
NAMES = {  # rows and families as the README names them; others stay as they are
    "ukanet": "UKANet as planned",
    "plain twin": "UKANet's plain twin",
    "plain, as many parameters": "plain, as many parameters as UKANet",
    "dynunet": "DynUNet, 32 to 256 channels",
    "dynunet, a quarter of its parameters": "DynUNet, 16 to 128 channels",
    "shared functions": "UKANet, shared functions, all stages",
    "shared functions, coarse stages": "UKANet, shared functions, coarse stages",
    "half resolution first": "UKANet, half resolution first",
    "half resolution first, plain": "plain twin, half resolution first",
    "all but full resolution": "UKANet, KAN in all but the finest stage",
    "smp unet resnet34": "smp's Unet, ResNet34",
    "smp unet, pretrained encoder": "smp's Unet, pretrained encoder",
    "ukan, rational functions": "ukan with rational functions",
    "ukan, rational functions from the identity": "ukan, rational from the identity",
    "rational functions": "UKANet, rational functions",
    "ukan, plain": "ukan with plain layers",
    "shared gram": "gram, shared_by=8",
}
RIVALS = ("dynunet", "smp")  # first words of the names of rows
WIDTH = 9.0  # inches


def main() -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("-o", "--out", type=Path, help="folder of the pictures; default that of the results")
    given = parser.parse_args()
    out = given.out or given.results
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in {"cost": cost(given.results), "accuracy": accuracy(given.results)}.items():
        figure.savefig(out / f"{name}.png", dpi=110)
        print(out / f"{name}.png")


def cost(results: Path) -> Figure:
    """Time of a training step of each family over that of a plain convolution: median, lowest and highest round."""
    layers = read(results / "layers.json")["layers"]
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    for axis, (case, title) in zip(figure.subplots(1, 2, sharey=True), CASES.items(), strict=True):
        here = sorted(
            (layer for layer in layers if layer["case"] == case), key=lambda layer: -layer["training"]
        )
        names = [name_of(layer["family"]) for layer in here]
        for name, layer in zip(names, here, strict=True):
            axis.plot(layer["training_range"], [name] * 2, color=KAN, linewidth=2, alpha=0.4)
        axis.plot([layer["training"] for layer in here], names, "o", color=KAN, markersize=5)
        axis.axvline(1, color=PLAIN, linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("training step / that of a plain convolution (left is faster)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", color="0.9")
    figure.suptitle("Dot: median of the rounds. Bar: lowest to highest round. Line at 1: plain.", fontsize=8)
    return figure


def accuracy(results: Path) -> Figure:
    """Mean Dice of unseen cases by network, set and class, with its interval."""
    tables = {title: read(results / "accuracy" / name / "table.json") for name, title in SETS.items()}
    heights = [len(table) for table in tables.values()]
    figure = Figure(figsize=(WIDTH, 0.27 * sum(heights) + 0.55 * len(heights) + 0.8), layout="constrained")
    axes = figure.subplots(len(tables), 1, height_ratios=[height + 1 for height in heights])
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        classes = [name for name in table[0]["dice"] if name != "IoU"]
        shift = {name: 0.3 * (i - (len(classes) - 1) / 2) for i, name in enumerate(classes)}
        for place, row in enumerate(table):
            for marker, name in zip("os^Dv", classes, strict=False):
                colour, mean, interval = colour_of(row["row"]), row["dice"][name], row["ci95"][name]
                axis.plot(interval, [place + shift[name]] * 2, color=colour, linewidth=2, alpha=0.4)
                axis.plot(mean, place + shift[name], marker, color=colour, markersize=4)
        axis.set_yticks(
            range(len(table)), [f"{name_of(row['row'])} ({row['cases']})" for row in table], fontsize=8
        )
        axis.invert_yaxis()
        named = f": {classes[0]} (circles), {classes[1]} (squares)" if len(classes) == 2 else ""
        axis.set_title(f"{title}{named}", fontsize=9, loc="left")
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", color="0.9")
    axes[-1].set_xlabel(
        "Dice of unseen cases (their number in brackets): mean and 95 % interval by patient; right is better",
        fontsize=8,
    )
    handles = [axes[0].plot([], [], "o", color=colour, label=name)[0] for colour, name in COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def name_of(row: str) -> str:
    """A row of results or a family as the README names it."""
    return NAMES.get(row, row)


def colour_of(row: str) -> str:
    """Colour of a network by its kind."""
    if row.replace(",", "").split()[0] in RIVALS:
        return RIVAL
    return PLAIN if "plain" in row else KAN


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

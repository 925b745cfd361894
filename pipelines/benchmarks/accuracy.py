"""Accuracy under one protocol: KAN networks, their plain twins and the field's networks in the same pipeline.

    python pipelines/benchmarks/accuracy.py DATA --set hippocampus -o runs/accuracy
    python pipelines/benchmarks/accuracy.py DATA --set hippocampus --table
    python pipelines/benchmarks/accuracy.py DATA --set glas --protocol u-kan

DATA is the folder of the set. Rules, the same for every row of the table:

- Folds by patient; each case is scored once, by a network that never saw its patient. No epoch is chosen: the average
  of weights (EMA) at the end of the budget is scored, on the image's own grid, one Dice per case.
- A budget is processor time of one thread: what a step of each network takes is measured first, all in turns in one
  process, and each trains as many steps as fit (`--minutes`), in later folds as many as in its finished ones. Patches,
  augmentation, loss, optimizer and its schedule are the same; `RECIPES` says which. `--steps` gives every row the same
  number of steps instead.
- Means with 95 % bootstrap intervals that draw patients; differences to the first row by Wilcoxon's signed-rank test
  over patients, corrected by Holm's method over the classes (`kanseg.evaluation.compare`).
- Parameters, and operations of a forward pass over one patch by `kanseg.models.table.count_flops`.

A finished fold is a summary.json of its own beside this file, in results/accuracy/SET/ROW/fold_K; what is there is not
trained again, and an interrupted training goes on where it stopped.

`--protocol u-kan` is that of U-KAN's code (Li et al., arXiv 2406.02918): a random split by image, the best epoch chosen
on the very images that are scored, IoU pooled over batches of 8. Its numbers are flattering, and are labelled as such.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from layers import machine, take_turns
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "accuracy"
MEMORY = 8 * 2**30  # that plans are made for, so that they are the same on every machine
NEVER = 10**6
BATCH_OF_UKAN = 8
Rows = Mapping[str, dict[str, Any]]


@dataclass
class Recipe:
    """What a set is trained and scored by.

    Attributes:
        rows: network by name, {"name", "options", "match"}: of `create_model`, over those of plan and config; where
            `match` names another row, the widths are scaled until both have as many parameters. The first row is what
            the others are compared with.
        config: of kanseg, whose options of training all rows share.
        minutes: processor time of one thread, a fold.
        size: preset of the plan.
        id_pattern: that finds the patient in the names of the files.
        plan: keys of the plan that are set.
    """

    rows: Rows
    minutes: float
    config: str = "default"
    size: str = "small"
    id_pattern: str | None = None
    folds: int = 5
    plan: dict[str, Any] = field(default_factory=dict)


def dynunet(features: Sequence[int], dims: int) -> dict[str, Any]:
    """nnU-Net's network as MONAI has it."""
    strides = [1] + [2] * (len(features) - 1)
    arguments = {"kernel_size": [3] * len(features), "strides": strides, "upsample_kernel_size": strides[1:]}
    arguments |= {"filters": list(features), "deep_supervision": True, "deep_supr_num": len(features) - 2}
    return {"name": "monai", "options": {"network": "DynUNet", "arguments": arguments}}


KAN: dict[str, Any] = {"name": "ukanet", "options": {}}
TWIN: dict[str, Any] = {"name": "ukanet", "options": {"basis": None}}
PLAIN: Rows = {"plain twin": TWIN, "plain, as many parameters": {**TWIN, "match": "ukanet"}}
# One sum of Gram polynomials for each of eight groups of channels instead of weights an edge.
SHARED_LAYERS: dict[str, Any] = {"bottleneck": False, "layer_options": {"shared_by": 8, "base": False}}
SHARED: Rows = {
    f"shared functions{where}": {"name": "ukanet", "options": {"kan_stages": stages, **SHARED_LAYERS}}
    for where, stages in {"": "all", ", coarse stages": "coarse"}.items()
}
# Each convolution takes a learned rational function of its input, SiLU at the start, in place of the activation before.
GRKAN: dict[str, Any] = {"basis": "grkan", "bottleneck": False, "layer_options": {"act": None}}
LEARNED: Rows = {"rational functions": {"name": "ukanet", "options": {"kan_stages": "deep", **GRKAN}}}
DEEP: Rows = {"all but full resolution": {"name": "ukanet", "options": {"kan_stages": "deep"}}}
# The first stage at half resolution, as encoders for photographs have it; chosen on fold 2 of busi.
HALF = {"strides": [2] * 5, "kernel_sizes": [3] * 5, "features_per_stage": [32, 64, 128, 256, 256]}
# An encoder trained on photographs, and what stands in the decoder behind it.
STARTED: dict[str, Any] = {
    "encoder": "timm/tf_efficientnet_lite0",
    "encoder_weights": "tf_efficientnet_lite0.safetensors",
}
RATIONAL = {"basis": "rational", "bottleneck": False, "layer_options": {"start": "identity"}}
SMP_STARTED = {**STARTED, "network": "Unet", "encoder": "tu-tf_efficientnet_lite0"}
PRETRAINED: Rows = {
    "pretrained encoder": {"name": "ukanet", "options": {**STARTED, "kan_stages": "all"}},
    "pretrained encoder, rational functions": {
        "name": "ukanet",
        "options": {**STARTED, "kan_stages": "all", **RATIONAL},
    },
    "pretrained encoder, plain": {"name": "ukanet", "options": {**STARTED, "basis": None}},
    "smp unet, pretrained encoder": {"name": "smp", "options": SMP_STARTED},
}
PICTURES: Rows = {
    "ukanet": KAN,
    "half resolution first": {"name": "ukanet", "options": HALF},
    "half resolution first, plain": {"name": "ukanet", "options": {**HALF, "basis": None}},
    **DEEP,
    **SHARED,
    **LEARNED,
    **PLAIN,
    "smp unet resnet34": {"name": "smp", "options": {"network": "Unet", "encoder": "resnet34"}},
    "ukan": {"name": "ukan", "options": {}},
    "ukan, rational functions": {"name": "ukan", "options": {"basis": "rational"}},
    "ukan, rational functions from the identity": {
        "name": "ukan",
        "options": {"basis": "rational", "layer_options": {"start": "identity"}},
    },
    "ukan, plain": {"name": "ukan", "options": {"basis": None}},
    **PRETRAINED,
}
# What a processor can train on in minutes: hundreds of steps over parts of images, not tens over whole ones.
PARTS = {"patch_size": [192, 192], "batch_size": 4}
# Where KAN layers stand, and which: what the network of "hippocampus" was chosen from.
PLACES: Rows = {
    "all stages": {"name": "ukanet", "options": {"kan_stages": "all"}},
    **DEEP,
    **SHARED,
    **LEARNED,
    "coarsest alone": {"name": "ukanet", "options": {"kan_stages": [3]}},
    **{
        f"{basis} basis": {"name": "ukanet", "options": {"basis": basis}}
        for basis in ("legendre", "bspline", "rbf")
    },
}
RECIPES = {
    "hippocampus": Recipe(
        {
            "ukanet": KAN,
            **PLAIN,
            "dynunet": dynunet((32, 64, 128, 256), 3),
            "dynunet, a quarter of its parameters": dynunet((16, 32, 64, 128), 3),
            **PLACES,
        },
        minutes=10,
        config="hippocampus",
    ),
    "glas": Recipe(PICTURES, minutes=10, plan=PARTS),
    "busi": Recipe(PICTURES, minutes=10, plan=PARTS),
    "drive": Recipe(PICTURES, minutes=10, plan=PARTS),
    "chase_db1": Recipe(PICTURES, minutes=10, id_pattern=r"Image_(\d+)", plan=PARTS),
    "brats_small": Recipe({"ukanet": KAN, "plain twin": TWIN}, minutes=5, folds=2),
}


def main() -> None:
    """Train what is missing, fold by fold, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder of the set")
    parser.add_argument("--set", required=True, choices=RECIPES, help="whose recipe to use")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/accuracy"), help="folder of the runs")
    parser.add_argument("--rows", nargs="*", help="names; default all that need no file of weights")
    parser.add_argument("--folds", nargs="*", type=int, help="numbers; default all")
    parser.add_argument("--minutes", type=float, help="processor time of a fold's training, one thread")
    parser.add_argument("--steps", type=int, help="the same number of steps for every row instead")
    parser.add_argument("--protocol", default="honest", choices=("honest", "u-kan"))
    parser.add_argument("--table", action="store_true", help="only the table of what is there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the finished folds")
    parser.add_argument(
        "--weights", type=Path, help="folder of pretrained.py's file, for the rows that start from it"
    )
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # one row and fold
    parser.add_argument("overrides", nargs="*", help="key=value for every row, e.g. training.lr=1e-3")
    given = parser.parse_intermixed_args()
    recipe = RECIPES[given.set]
    if unknown := set(given.rows or []) - set(recipe.rows):
        parser.error(f"unknown rows {sorted(unknown)}, known: {', '.join(recipe.rows)}")

    import torch

    from kanseg.memory import give_back
    from kanseg.training.devices import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    name = given.set if given.protocol == "honest" else f"{given.set} {given.protocol}"
    places = (given.data, given.out / name, given.results / name)
    bench = Bench(recipe, *places, given.protocol, given.overrides, given.weights or Path())
    if given.alone:
        return bench.train(*json.loads(given.alone), given.minutes, given.steps)
    if not given.table:
        needing = [row for row, network in recipe.rows.items() if "encoder_weights" in network["options"]]
        if not given.weights and (wanted := set(given.rows or []) & set(needing)):
            parser.error(
                f"{', '.join(sorted(wanted))}: say by --weights where pretrained.py has written its file"
            )
        rows = given.rows or [row for row in recipe.rows if given.weights or row not in needing]
        missing = bench.missing(rows, given.folds)
        if not given.steps and not all(bench.steps_of_finished(row) for row, _ in missing):
            bench.step_seconds()
            give_back()
        for pair in missing:  # each in a process of its own
            subprocess.run([sys.executable, *sys.argv, "--alone", json.dumps(pair)], check=True)
            bench.conclude()
    bench.conclude()


class Bench:
    """One set under one protocol: runs in `out`, finished folds in `results`, what encoders start from in `weights`."""

    def __init__(
        self,
        recipe: Recipe,
        data: Path,
        out: Path,
        results: Path,
        protocol: str,
        overrides: Sequence[str],
        weights: Path = Path(),
    ) -> None:
        from kanseg.data.fingerprint import fingerprint, load_fingerprint, save_fingerprint
        from kanseg.data.formats import read_dataset
        from kanseg.data.plan import Plan
        from kanseg.data.planner import make_plan

        self.recipe, self.out, self.results, self.weights = recipe, out, results, weights
        self.flattering = protocol == "u-kan"
        watch = "training.validate_every=" + ("1" if self.flattering else str(NEVER))
        self.overrides = [watch, "data.workers=0", f"data.folds={recipe.folds}", *overrides]
        self.dataset = read_dataset(data, id_pattern=recipe.id_pattern)
        if self.flattering:  # every image for itself
            alone = tuple(replace(case, group=case.id) for case in self.dataset.cases)
            self.dataset = replace(self.dataset, cases=alone)
        out.mkdir(parents=True, exist_ok=True)
        stored = out / "plan.json"
        if not stored.exists():
            seen = fingerprint(self.dataset)
            plan = make_plan(self.dataset, memory=MEMORY, size=recipe.size, seen=seen)
            for key, value in recipe.plan.items():
                setattr(plan, key, value)
            save_fingerprint({**seen, "same": [] if self.flattering else seen["same"]}, out)
            plan.save(stored)
        self.plan, self.seen = Plan.load(stored), load_fingerprint(out)
        self.groups = {case.id: case.group for case in self.dataset.cases}

    def network(self, row: str) -> dict[str, Any]:
        """{"name", "options"} of a row, its widths fitted where it must have as many parameters as another."""
        described = dict(self.recipe.rows[row])
        other = described.pop("match", None)
        if other is None:
            return described
        wanted, planned = self.parameters(self.network(other)), self.plan.features_per_stage

        def scaled(factor: float) -> dict[str, Any]:
            """Widths in steps of the first one, which the compiled kernels like, and the first as it is."""
            step = planned[0]
            features = [step, *(step * max(1, round(factor * width / step)) for width in planned[1:])]
            return {**described, "options": {**described["options"], "features_per_stage": features}}

        candidates = [scaled(factor) for factor in np.arange(0.5, 8, 0.05)]  # ever more parameters
        place = bisect_left(candidates, wanted, key=self.parameters)
        nearest = candidates[max(place - 1, 0) : place + 1]
        return min(nearest, key=lambda network: abs(self.parameters(network) - wanted))

    def config(self, overrides: Sequence[str], network: dict[str, Any]) -> Any:
        """Options of a training of a network."""
        from kanseg.config import load_config

        config = load_config(self.recipe.config, overrides)
        options = {**(config.model.options if network["name"] == "ukanet" else {}), **network["options"]}
        model = config.model.model_copy(update={"name": network["name"], "options": options})
        return config.model_copy(update={"model": model})

    def make(self, network: dict[str, Any]) -> Any:
        """The network that plan, config and row describe."""
        from kanseg.training.checkpoint import build_model, model_spec, unstarted

        return build_model(unstarted(model_spec(self.config([], network), self.plan)))

    def parameters(self, network: dict[str, Any]) -> int:
        from kanseg.models.table import count_parameters

        return count_parameters(partial(self.make, network))

    # ---------------------------------------------------------------------------------------------- training

    def missing(self, rows: Sequence[str], folds: Sequence[int] | None) -> list[tuple[str, int]]:
        """Rows and folds that have no result yet, all rows of a fold before the next fold."""
        numbers = range(self.recipe.folds) if folds is None else folds
        pairs = [(row, fold) for fold in numbers for row in rows]
        return [pair for pair in pairs if not (self.kept(*pair) / "summary.json").exists()]

    def kept(self, row: str, fold: int) -> Path:
        """Where the result of a fold is."""
        return self.results / row / f"fold_{fold}"

    def steps_of_finished(self, row: str) -> int | None:
        """Steps of the latest finished fold of a row: a budget is turned into steps once."""
        folds = sorted((self.results / row).glob("fold_*/summary.json"))
        return json.loads(folds[-1].read_text())["steps"] if folds else None

    def train(self, row: str, fold: int, minutes: float | None, steps: int | None) -> None:
        """Train one fold of a row and keep its result."""
        from kanseg.data.fingerprint import save_fingerprint
        from kanseg.training.fit import fit
        from kanseg.training.monitor import LOG, read_log

        steps = steps or self.steps_of_finished(row)
        steps = steps or max(1, round(60 * (minutes or self.recipe.minutes) / self.step_seconds()[row]))
        epochs = max(1, round(steps / 100))
        length = [f"training.max_epochs={epochs}", f"training.steps_per_epoch={round(steps / epochs)}"]
        network = self.network(row)
        if file := network["options"].get("encoder_weights"):
            network["options"] = {**network["options"], "encoder_weights": str(self.weights / file)}
        config = self.config([*self.overrides, *length], network)
        run = self.out / row
        run.mkdir(parents=True, exist_ok=True)
        self.plan.save(run / "plan.json")
        save_fingerprint(self.seen, run)
        print(f"{row}, fold {fold}: {steps} steps", flush=True)
        stopped = read_log(run / f"fold_{fold}" / LOG)  # an earlier try, whose clock goes on
        begun = time.process_time() - (stopped[-1]["total_seconds"] if stopped else 0)
        summary = fit(config, self.plan, self.dataset, run, fold=fold, resume=True)
        self.keep(self.kept(row, fold), run / f"fold_{fold}", summary, steps=steps, begun=begun)

    def step_seconds(self) -> dict[str, float]:
        """Seconds of a training step of each row: the fastest of turns in one process, measured once a folder.

        Rows that came later are measured beside the first one, and counted in its seconds of the first time.
        """
        import torch

        from kanseg.training.losses import create_loss
        from kanseg.training.optimizers import create_optimizer

        path = self.out / "step_seconds.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        later = [row for row in self.recipe.rows if row not in known]
        if not later:
            return known
        first = next(iter(self.recipe.rows))
        batch, patch = self.plan.batch_size, self.plan.patch_size
        x = torch.randn(batch, self.plan.in_channels, *patch)
        label = torch.randint(len(self.plan.label_names), (batch, 1, *patch)).float()

        def step(model: Any, optimizer: Any, loss: Any) -> None:
            optimizer.zero_grad()
            loss(model(x), label).backward()
            optimizer.step()

        calls = {}
        training = self.config(self.overrides, KAN).training
        for row in dict.fromkeys([first, *later]):
            model = self.make(self.network(row)).train()
            loss = create_loss(training.loss, **training.loss_options)
            calls[row] = partial(step, model, create_optimizer(model, training), loss)
        found = {row: min(times) for row, times in take_turns(calls, 5, clock=time.thread_time).items()}
        scale = known.get(first, found[first]) / found[first]
        known = {**{row: seconds * scale for row, seconds in found.items()}, **known}
        path.write_text(json.dumps(known, indent=1) + "\n")
        return known

    def keep(self, kept: Path, folder: Path, summary: dict[str, Any], *, steps: int, begun: float) -> None:
        """Write what the table needs of a finished fold, and its curve."""
        from kanseg.training.monitor import LOG, read_log

        log = read_log(folder / LOG)
        facts = {
            **machine(),
            "steps": steps,
            "processor_seconds": round(time.process_time() - begun),
            "peak_memory_mb": max(record["peak_memory_mb"] for record in log),
            "overrides": self.overrides,
            "loss": [round(record["loss"], 4) for record in log],
        }
        if self.flattering:
            facts["pooled_iou"] = pooled_iou(list(self.masks(folder)))
        kept.mkdir(parents=True, exist_ok=True)
        keys = ("fold", "parameters", "cases", "dice", "ci95")
        cases = {case: {n: round(v, 5) for n, v in found.items()} for case, found in summary["cases"].items()}
        text = json.dumps({**{key: summary[key] for key in keys}, **facts, "cases": cases})
        (kept / "summary.json").write_text(text.replace("}, ", "},\n ") + "\n")

    def masks(self, folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Foreground of prediction and reference of each validation case of a fold."""
        from kanseg.data.cases import label_path
        from kanseg.data.images import read_label

        cases = {case.id: case for case in self.dataset.cases}
        for path in sorted((folder / "validation").glob("*.png")):
            yield read_label(path) > 0, read_label(label_path(cases[path.stem]), self.plan.image_dims) > 0

    # ---------------------------------------------------------------------------------------------- the table

    def conclude(self) -> None:
        """Print the table of the finished folds and write it as table.md and table.json."""
        rows = [
            self.row(name)
            for name in self.recipe.rows
            if list(self.results.glob(f"{name}/fold_*/summary.json"))
        ]
        if not rows:
            print(f"No finished fold in {self.results}.")
            return
        (self.results / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
        heads = list(rows[0]["shown"])
        lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        lines += ["| " + " | ".join(row["shown"][head] for head in heads) + " |" for row in rows]
        (self.results / "table.md").write_text("\n".join(lines) + "\n")
        table = Table(*heads, title=f"{self.plan.dataset_name}: {self.results.name}")
        for row in rows:
            table.add_row(*row["shown"].values())
        Console(width=200).print(table, markup=False)

    def row(self, name: str) -> dict[str, Any]:
        """Numbers of a row over its finished folds, and as text under the table's headings."""
        from kanseg.evaluation.compare import compare
        from kanseg.evaluation.metrics import bootstrap_interval
        from kanseg.models.table import count_flops

        folds = [
            json.loads(path.read_text()) for path in sorted((self.results / name).glob("fold_*/summary.json"))
        ]
        cases = {case: scores for fold in folds for case, scores in fold["cases"].items()}
        names = list(next(iter(cases.values())))
        values = {label: np.array([scores[label] for scores in cases.values()]) for label in names}
        if self.plan.spatial_dims == 2 and len(names) == 1:
            values["IoU"] = values[names[0]] / (2 - values[names[0]])
        groups = [self.groups[case] for case in cases]
        means = {label: float(scores.mean()) for label, scores in values.items()}
        intervals = {label: bootstrap_interval(scores, groups, 0) for label, scores in values.items()}
        network = self.network(name)
        size = (1, self.plan.in_channels, *self.plan.patch_size)
        numbers: dict[str, Any] = {
            "row": name,
            "folds": [fold["fold"] for fold in folds],
            "cases": len(cases),
            "patients": len(set(groups)),
            "parameters": self.parameters(network),
            "gflops": count_flops(partial(self.make, network), size) / 1e9,
            "steps": [fold["steps"] for fold in folds],
            "processor_minutes": float(np.mean([fold["processor_seconds"] for fold in folds])) / 60,
            "peak_memory_mb": max(fold["peak_memory_mb"] for fold in folds),
            "dice": means,
            "ci95": intervals,
        }
        shown = {"network": name, "parameters": f"{numbers['parameters'] / 1e6:.2f} M"}
        shown |= {"GFLOPs": f"{numbers['gflops']:.1f}", "steps": f"{np.mean(numbers['steps']):.0f}"}
        shown |= {"minutes": f"{numbers['processor_minutes']:.1f}", "MB": f"{numbers['peak_memory_mb']:.0f}"}
        shown |= {"cases": f"{len(cases)}"}
        for label, (low, high) in intervals.items():
            shown[label] = f"{means[label]:.4f} [{low:.4f}, {high:.4f}]"
        if self.flattering:
            numbers["pooled_iou"] = [fold["pooled_iou"] for fold in folds]
            shown["pooled IoU, best epoch on test"] = f"{np.mean(numbers['pooled_iou']):.4f}"
        first = next(iter(self.recipe.rows))
        shown["first row less this one"] = ""
        if name != first and (self.results / first).exists():
            result = compare(self.results / first, self.results / name, groups=self.groups)
            numbers["first row less this one"] = result["rows"]
            rows = [row for row in result["rows"] if row["class"] == "mean"] or result["rows"]
            low, high = rows[0]["ci95"]
            shown["first row less this one"] = (
                f"{rows[0]['difference']:+.4f} [{low:+.4f}, {high:+.4f}], "
                + ", ".join(
                    f"p {row['class']} {row['p_holm']:.2g}"
                    for row in result["rows"]
                    if row["class"] != "mean"
                )
            )
        return {**numbers, "shown": shown}


def pooled_iou(masks: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """IoU of the pixels of each batch of images together, averaged over the batches: the number of U-KAN's code."""
    scores = []
    for first in range(0, len(masks), BATCH_OF_UKAN):
        batch = masks[first : first + BATCH_OF_UKAN]
        both = sum(int((one & other).sum()) for one, other in batch)
        scores.append(both / max(1, sum(int((one | other).sum()) for one, other in batch)))
    return float(np.mean(scores))


if __name__ == "__main__":
    main()

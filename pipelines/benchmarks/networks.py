"""Time and memory of whole networks: UKANets against their plain twins, MONAI's DynUNet and, in 2D, smp's Unet.

A training step (cross entropy, SGD with momentum, float32) and a sliding window over a volume of 192^3, which 2D
networks see slice by slice. The rivals take turns within each round, so that whatever else the machine does meets them
alike; a ratio is the median of the rounds' ratios, with the lowest and the highest. Peak memory is that of a fresh
process for each, above what the program takes before there is a network.

Every network has the parameters of the first UKANet (3D) or of smp's Unet with a ResNet34 (2D) within 5 %: widths are
scaled until they do, in steps of 16 channels where that is fine enough, else of 8, 4, 2, 1. A UKANet's "twin" is the
plain network (`basis=None`) of the same widths, which has fewer parameters.

    python pipelines/benchmarks/networks.py --dims 3 -o pipelines/benchmarks/results/networks_3d.json
    python pipelines/benchmarks/networks.py --dims 3 --rounds 3 --volume 96 --networks kagn
    python pipelines/benchmarks/networks.py --device cuda --dtype bfloat16 --dims 3 --features 32 --patch 128 --batch 2
    python pipelines/benchmarks/networks.py --dims 3 --to-dice ../data/Task04_Hippocampus --minutes 30

With `-o FILE.json` the tables are also written as FILE.md. The last command trains each network on the first fold of a
data set until the mean validation Dice is .85, and says after how many seconds. It takes hours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from layers import cast, finish, machine, ratio, take_turns, write

UKANETS = {
    "kagn": {"basis": "kagn"},
    "bottleneck kagn": {"basis": "kagn", "bottleneck": True},
    "kan": {"basis": "kan"},
}
PLAIN, DYNUNET, SMP = "plain", "dynunet", "smp unet resnet34"
CLOSE = 0.05  # of the parameters
STEPS = (16, 8, 4, 2, 1)  # channels
STAGES = 4
PATCH, BATCH = {2: 192, 3: 64}, {2: 2, 3: 1}
CLASSES = 3
WINDOWS = 2  # at once
TARGET = 0.85  # Dice
JOBS = ("training", "inference")
Spec = dict[str, Any]  # of `create_model`


def main() -> None:
    """Measure, print tables and write the numbers."""
    names = [*UKANETS, PLAIN, DYNUNET, SMP]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--dims", nargs="*", type=int, default=[3, 2], choices=(2, 3))
    parser.add_argument(
        "--networks", nargs="*", default=names, choices=names, help="UKANets bring their twins"
    )
    parser.add_argument("--features", type=int, default=16, help="of the first stage of UKANet-KAGN in 3D")
    parser.add_argument("--patch", type=int, help="voxels an axis; default 64 in 3D, 192 in 2D")
    parser.add_argument("--batch", type=int, help="patches a step; default 1 in 3D, 2 in 2D")
    parser.add_argument("--volume", type=int, default=192, help="voxels an axis of the whole image")
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="by autocast")
    parser.add_argument(
        "--to-dice", type=Path, metavar="DATA", help="seconds to a Dice of .85 on this data set"
    )
    parser.add_argument("--minutes", type=float, default=30, help="of each training at most")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # one network, in a process of its own
    given = parser.parse_args()
    given.patch = {dims: given.patch or size for dims, size in PATCH.items()}
    given.batch = {dims: given.batch or size for dims, size in BATCH.items()}

    import torch

    from kanseg.training.devices import keep_freed_memory

    torch.set_num_threads(given.threads)
    torch.backends.cudnn.benchmark = True
    keep_freed_memory()
    if given.alone:
        print(json.dumps(peak(given, **json.loads(given.alone))))
        return
    results: dict[str, Any] = {
        **machine(),
        "patch": {dims: given.patch[dims] for dims in given.dims},
        "volume": given.volume,
        "overlap": given.overlap,
        "rounds": given.rounds,
        "dtype": given.dtype,
        "batch": {dims: given.batch[dims] for dims in given.dims},
        "device": torch.cuda.get_device_name() if given.device == "cuda" else given.device,
    }
    print(json.dumps(results))
    for dims in given.dims:
        specs = matched(dims, given.features, given.networks)
        for key, found in (
            ("networks", measured(given, dims, specs)),
            ("to dice", raced(given, specs) if given.to_dice and dims == 3 else []),
        ):
            results.setdefault(key, []).extend(found)
        if given.out:
            write(given.out, results, markdown(results))


def markdown(results: dict[str, Any]) -> str:
    """A table a dimension, and the UKANets against their rivals."""
    lines = [", ".join(f"{key} {value}" for key, value in results.items() if not isinstance(value, list)), ""]
    lines += ["| network | parameters | training s | MB | inference s | MB |", "|---" * 6 + "|"]
    for row in results["networks"]:
        cells = [f"{row['network']}, {row['spatial_dims']}D", f"{row['parameters'] / 1e6:.2f} M"]
        for job in JOBS:
            cells += [f"{row[job]['seconds']:.2f}", f"{row[job]['mb']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| pair | training: time | memory | inference: time | memory |", "|---" * 5 + "|"]
    for pair, found in against(results["networks"]):
        cells = [pair]
        for job in JOBS:
            ratios = found[job]
            cells += [
                f"{ratios['time']:.2f} ({ratios['from']:.2f} to {ratios['to']:.2f}) x",
                f"{ratios['mb']:.2f} x",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [""] if results["to dice"] else []
    lines += [
        f"- {row['network']}: {reached(row['seconds'])} to a Dice of {row['dice']}"
        for row in results["to dice"]
    ]
    return "\n".join(lines) + "\n"


def against(rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and ratios of each UKANet with its twin and with the other networks."""
    for row in rows:
        if row["network"] not in UKANETS:
            continue
        for rival, found in row["against"].items():
            if rival in (f"twin of {row['network']}", PLAIN, DYNUNET, SMP):
                yield f"{row['network']} / {rival}, {row['spatial_dims']}D", found


# ------------------------------------------------------------------------------------------------ the networks


def spec(name: str, dims: int, features: list[int]) -> Spec:
    """A network of these widths."""
    about: Spec = {"spatial_dims": dims, "in_channels": 1, "out_channels": CLASSES}
    strides = [1] + [2] * (len(features) - 1)
    if name == SMP:
        return {"name": SMP}
    if name == DYNUNET:
        shape = {"kernel_size": [3] * len(features), "strides": strides, "upsample_kernel_size": strides[1:]}
        arguments = {**shape, "filters": features, "res_block": True}
        return {"name": "monai", **about, "network": "DynUNet", "arguments": arguments}
    options = UKANETS.get(name, {"basis": None})
    return {"name": "ukanet", **about, "features_per_stage": features, **options}


def make(described: Spec) -> Any:
    """The network of a spec."""
    from kanseg import create_model

    if described["name"] == SMP:
        import segmentation_models_pytorch as smp

        return smp.Unet("resnet34", encoder_weights=None, in_channels=1, classes=CLASSES)
    return create_model(**described)


def parameters(described: Spec) -> int:
    from kanseg.models.table import count_parameters

    return count_parameters(lambda: make(described))


def matched(dims: int, features: int, names: list[str]) -> dict[str, Spec]:
    """Specs by name, of the same number of parameters but for the twins."""
    first = spec("kagn", dims, [features * 2**stage for stage in range(STAGES)])
    wanted = parameters(first if dims == 3 else spec(SMP, dims, []))
    found: dict[str, Spec] = {}
    for name in names:
        if name == SMP:
            found |= {name: spec(name, dims, [])} if dims == 2 else {}
            continue
        found[name] = next(fit for step in STEPS for fit in fits(name, dims, wanted, step))
        if name in UKANETS:
            found[f"twin of {name}"] = spec(PLAIN, dims, found[name]["features_per_stage"])
    return found


def fits(name: str, dims: int, wanted: int, step: int) -> Iterator[Spec]:
    """The spec with widths in steps of `step`, doubled from stage to stage, that comes closest, if it is close."""

    def at(width: float) -> Spec:
        return spec(name, dims, [step * max(1, round(width * 2**stage / step)) for stage in range(STAGES)])

    low, high = 1.0, 512.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(at(middle)) < wanted else (low, middle)
    best = min((at(low), at(high)), key=lambda one: abs(parameters(one) - wanted))
    if abs(parameters(best) - wanted) <= CLOSE * wanted:
        yield best


# ------------------------------------------------------------------------------------------------ measuring


def training(given: argparse.Namespace, network: Any, dims: int) -> Callable[[], Any]:
    """A training step on noise."""
    import torch

    size = (given.batch[dims], *[given.patch[dims]] * dims)
    x = torch.randn(size, device=given.device)[:, None]
    label = torch.randint(CLASSES, size, device=given.device)
    network.to(given.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        network.train()
        with cast(given.device, given.dtype):
            y = network(x)
        torch.nn.functional.cross_entropy(y.float(), label).backward()
        optimizer.step()
        optimizer.zero_grad()
        finish(given.device)

    return step


def inference(given: argparse.Namespace, network: Any, dims: int) -> Callable[[], Any]:
    """A sliding window over a volume of noise; in 2D over all its slices."""
    import torch
    from monai.inferers import sliding_window_inference

    size = [given.volume] * 3
    x = torch.randn(1, 1, *size) if dims == 3 else torch.randn(size)[:, None]
    x, patch = x.to(given.device), [given.patch[dims]] * dims
    network.to(given.device)

    def call() -> None:
        network.eval()
        with torch.inference_mode(), cast(given.device, given.dtype):
            sliding_window_inference(x, patch, WINDOWS, network, overlap=given.overlap, mode="gaussian")
        finish(given.device)

    return call


def measured(given: argparse.Namespace, dims: int, specs: dict[str, Spec]) -> list[dict[str, Any]]:
    """A row a network, with ratios to all others; prints them."""
    networks = {name: make(described) for name, described in specs.items()}
    steps = {name: training(given, network, dims) for name, network in networks.items()}
    times = {"training": take_turns(steps, given.rounds)}
    windows = {name: inference(given, network, dims) for name, network in networks.items()}
    uncounted = int(given.device == "cuda")  # what is compiled at the first call
    times["inference"] = take_turns(windows, max(1, given.rounds // 3), uncounted)
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    del networks, steps, windows
    rows = []
    for name, described in specs.items():
        row: dict[str, Any] = {
            "network": name,
            "spatial_dims": dims,
            "parameters": sizes[name],
            "spec": described,
        }
        for job, taken in times.items():
            about = {"dims": dims, "job": job, "described": described}
            row[job] = {"seconds": statistics.median(taken[name]), "mb": alone(given, about)}
        rows.append(row)
    for row in rows:
        row["against"] = {
            other["network"]: {job: compared(row, other, job, times[job]) for job in times}
            for other in rows
            if other is not row
        }
    show(dims, rows)
    return rows


def compared(
    row: dict[str, Any], other: dict[str, Any], job: str, taken: dict[str, list[float]]
) -> dict[str, Any]:
    """Ratios of time, with their spread, and of memory."""
    one, two = taken[row["network"]], taken[other["network"]]
    each = [a / b for a, b in zip(one, two, strict=True)]
    return {
        "time": ratio(one, two),
        "from": min(each),
        "to": max(each),
        "mb": row[job]["mb"] / other[job]["mb"],
    }


def show(dims: int, rows: list[dict[str, Any]]) -> None:
    """Print the rows of a dimension, and the UKANets against the others."""
    print(f"\n{f'{dims}D':26}{'parameters':>11}{'training s':>12}{'MB':>7}{'inference s':>13}{'MB':>7}")
    for row in rows:
        numbers = [row[job][key] for job in JOBS for key in ("seconds", "mb")]
        line = "{:>12.2f}{:>7.0f}{:>13.1f}{:>7.0f}".format(*numbers)
        print(f"{row['network']:26}{row['parameters'] / 1e6:>10.2f}M{line}")
    for pair, found in against(rows):
        both = [
            f"{job} {f['time']:.2f} x ({f['from']:.2f} to {f['to']:.2f}), {f['mb']:.2f} x the memory"
            for job, f in found.items()
        ]
        print(f"{pair}: {'; '.join(both)}", flush=True)


def alone(given: argparse.Namespace, about: dict[str, Any]) -> float:
    """`peak` in a fresh process; a GPU's memory is counted in this one."""
    if given.device == "cuda":
        return peak(given, **about)
    command = [sys.executable, *sys.argv, "--alone", json.dumps(about)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def peak(given: argparse.Namespace, dims: int, job: str, described: Spec) -> float:
    """MB that two steps, or one volume, take in this process above what it has now and the libraries of MONAI.

    Of the GPU's memory where the network is there, all of them.
    """
    import monai.inferers  # noqa: F401  # takes memory too
    import torch

    from kanseg.memory import taken

    make(spec(PLAIN, dims, [2, 2]))  # what a first network loads
    cuda = given.device == "cuda"
    before = torch.cuda.memory_allocated() if cuda else taken("VmRSS")
    step = {"training": training, "inference": inference}[job](given, make(described), dims)
    if cuda or job == "training":
        step()
    if cuda:  # the first call tries algorithms
        torch.cuda.reset_peak_memory_stats()
    step()
    after = torch.cuda.max_memory_allocated() if cuda else taken("VmHWM")
    if before is None or after is None:
        raise SystemExit("This system does not tell what memory a process takes.")
    return (after - before) / 2**20


# ------------------------------------------------------------------------------------------------ to a Dice


class Reached(Exception):  # noqa: N818  # no error
    """A training has come to the target."""


def reached(seconds: float | None) -> str:
    """How long it took, for people."""
    return "not within the minutes" if seconds is None else f"{seconds:.0f} s"


def raced(given: argparse.Namespace, specs: dict[str, Spec]) -> list[dict[str, Any]]:
    """Seconds of training and validation to the target, None where `--minutes` were not enough; prints them."""
    from rich.console import Console

    from kanseg.config import load_config
    from kanseg.data.formats import read_dataset
    from kanseg.data.planner import make_plan
    from kanseg.training.fit import fit

    def watch(record: dict[str, Any]) -> None:
        if (record["mean_dice"] or 0) >= TARGET:
            raise Reached(record["total_seconds"])

    dataset = read_dataset(given.to_dice)
    planned = make_plan(dataset, dim=3)
    short = ["training=sgd", f"training.max_minutes={given.minutes}", "training.steps_per_epoch=50"]
    config = load_config(
        overrides=[*short, "training.validation_cases=16", "training.final_validation=false"]
    )
    rows = []
    for name, described in specs.items():
        options = {
            k: v
            for k, v in described.items()
            if k not in ("name", "spatial_dims", "in_channels", "out_channels")
        }
        if described["name"] == "ukanet":
            options |= {"strides": [[1] * 3] + [[2] * 3] * (STAGES - 1), "kernel_sizes": [[3] * 3] * STAGES}
        plan = replace(planned, model=described["name"], model_options=options)
        seconds = None
        with tempfile.TemporaryDirectory() as run:
            try:
                fit(config, plan, dataset, run, console=Console(quiet=True), watch=watch)
            except Reached as target:
                seconds = target.args[0]
        rows.append({"network": name, "dice": TARGET, "seconds": seconds})
        print(f"{name}: {reached(seconds)} to a Dice of {TARGET}")
    return rows


if __name__ == "__main__":
    main()

"""Time and memory of KAN layers against the plain convolution of the same channels, as ratios from one run.

Every case is one layer (convolution, norm and activation), kernel 3, stride 1, float32. The rivals take turns within
each round, so that whatever else the machine does meets them alike; a ratio is the median of the rounds' ratios, with
the lowest and the highest. The plain rival is `torch.nn.Conv2d/3d` alone, channels-last, without norm or activation.
`--reference PATH` adds the layers of a clone of torch-conv-kan (MIT) with their defaults; nothing of it is needed
otherwise. It allocates so much that a good part of its time is fresh memory: `--allocator system` leaves memory to the
system as a plain Python program does, the default keeps what was freed as kanseg's own trainings do.

    python pipelines/benchmarks/layers.py --complete runs/layers --reference ../torch-conv-kan
    python pipelines/benchmarks/layers.py -o pipelines/benchmarks/results/layers.json
    python pipelines/benchmarks/layers.py --families kagn kan --reference ../torch-conv-kan --allocator system
    python pipelines/benchmarks/layers.py --layers-of-ukanet --families kagn -o ukanet_layers.json
    python pipelines/benchmarks/layers.py --device cuda --dtype bfloat16 --cases "3d 32 -> 32, 128^3"

On a GPU a third rival is the plain convolution with as many input channels as the expansion has ("folded"): the same
operations, already expanded. With `-o FILE.json` the table is also written as FILE.md. `--layers-of-ukanet` takes
every shape of layer that a UKANet (3D, 16 to 128 channels, a patch of 64^3) has instead. `--complete FOLDER` makes all
tables of a processor one after the other: these layers, those without the extension, and with `--reference` the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple


class Case(NamedTuple):
    """Shapes of one layer; `size` is that of its input, one number an axis."""

    batch: int
    in_channels: int
    out_channels: int
    size: tuple[int, ...]
    kernel_size: int = 3
    stride: int = 1

    @property
    def dims(self) -> int:
        """Spatial dimensions."""
        return len(self.size)

    def __str__(self) -> str:
        shape = f"{self.dims}d {self.in_channels} -> {self.out_channels}, {self.size[0]}^{self.dims}"
        kernel = "" if self.kernel_size == 3 else f", kernel {self.kernel_size}"
        return shape + kernel + ("" if self.stride == 1 else f", stride {self.stride}")


CASES = {
    str(case): case
    for case in (
        Case(1, 32, 32, (48,) * 3),
        Case(2, 64, 64, (128,) * 2),
        Case(2, 32, 32, (128,) * 2),
        Case(2, 32, 32, (128,) * 3),
    )
}
KEYS = ("forward", "training")
# Tables of `--complete`: what is in the environment, and the arguments.
WIDEST = ["--cases", "3d 32 -> 32, 48^3", "--families", "kagn", "kan"]
TABLES: dict[str, tuple[dict[str, str], list[str]]] = {
    "layers": ({}, []),
    "layers_without_extension": (
        {"KANSEG_NATIVE": "0"},
        ["--cases", "2d 32 -> 32, 128^2", "--families", "kagn", "kan", "--rounds", "15"],  # short ones
    ),
}
OF_REFERENCE: dict[str, tuple[dict[str, str], list[str]]] = {
    "layers_reference": ({}, WIDEST),
    "layers_reference_system": ({}, [*WIDEST, "--allocator", "system"]),
    "layers_of_ukanet": ({}, ["--layers-of-ukanet", "--families", "kagn"]),
}
CPU_CASES = list(CASES)[:3]
REFERENCES = {  # families and names of layers there
    "kagn": "KAGNConv",
    "kaln": "KALNConv",
    "kacn": "KACNConv",
    "kajn": "KAJNConv",
    "kabn": "KABNConv",
    "kan": "KANConv",
    "fastkan": "FastKANConv",
    "relukan": "ReLUKANConv",
    "wavkan": "WavKANConv",
}
# One function for each of eight groups of channels.
SHARED = {"shared gram": {"basis": "gram", "shared_by": 8, "base": False}}
FAMILIES = (*REFERENCES, "grkan", "fourier", *SHARED, "bottleneck_kagn", "bottleneck_relukan")
INFERENCE = """
import torch
from kanseg.layers import conv_layer
def memory(name):  # MB; getrusage would also count what the parent of this process had
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024
layer = conv_layer(**{options})(3, 16, 16).eval()
x = torch.empty(1, 16, 128, 128, 128, memory_format=torch.{layout}).normal_()
with torch.inference_mode():
    layer(torch.zeros(1, 16, 16, 16, 16))
    before = memory("VmRSS")
    y = layer(x)
print(memory("VmHWM") - before - y.numel() * 4 / 2**20)
"""


def main() -> None:
    """Run the cases, print a table and write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, help="JSON file for the numbers")
    parser.add_argument(
        "--complete", type=Path, metavar="FOLDER", help="all tables of a processor, in a folder"
    )
    parser.add_argument("--families", nargs="*", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--cases", nargs="*", default=CPU_CASES, choices=CASES)
    parser.add_argument("--layers-of-ukanet", action="store_true", help="instead of the cases")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="by autocast")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reference", type=Path, help="a clone of torch-conv-kan")
    parser.add_argument(
        "--allocator",
        default="kept",
        choices=("kept", "system"),
        help="kept: freed memory stays with the process, as in kanseg's trainings; system: as Python starts",
    )
    given = parser.parse_args()
    if given.complete:
        return complete(given.complete, given.rounds, given.reference)

    import torch

    from kanseg.layers.kernels import gpu
    from kanseg.training.devices import keep_freed_memory

    torch.set_num_threads(given.threads)
    if given.allocator == "kept":
        keep_freed_memory()
    if given.reference:
        sys.path.insert(0, str(given.reference))
    results: dict[str, Any] = {
        **machine(),
        "triton kernels": gpu.described(),
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "dtype": given.dtype,
        "rounds": given.rounds,
        "allocator": given.allocator,
        "layers": [],
    }
    print(json.dumps({key: value for key, value in results.items() if key != "layers"}))
    print(f"{'case':34}{'family':19}{'rival':12}{'forward':>10}{'training':>10}{'saved':>8}{'peak MB':>9}")
    cases = layers_of_ukanet() if given.layers_of_ukanet else {name: CASES[name] for name in given.cases}
    for case in cases.values():
        for family in given.families:
            for row in measure(case, family, given.rounds, bool(given.reference), given.device, given.dtype):
                results["layers"].append(row)
                shown = [f"{row[key]:.2f} x" for key in KEYS]
                saved = f"{row['saved']:.2f}" if "saved" in row else ""
                peak = f"{row['inference_mb']:.0f}" if "inference_mb" in row else ""
                line = (
                    f"{case!s:34}{family:19}{row['rival']:12}{shown[0]:>10}{shown[1]:>10}{saved:>8}{peak:>9}"
                )
                print(line, flush=True)
            if given.out:  # now, so that a run that is cut off has left something
                write(given.out, results, markdown(results))


def complete(folder: Path, rounds: int, reference: Path | None) -> None:
    """Each table by a process of its own."""
    clone = ["--reference", str(reference)] if reference else []
    tables = dict(TABLES)
    tables |= {name: (set_, [*given, *clone]) for name, (set_, given) in OF_REFERENCE.items() if reference}
    for name, (environment, arguments) in tables.items():
        out = ["-o", str(folder / f"{name}.json")]
        command = [sys.executable, __file__, "--rounds", str(rounds), *arguments, *out]
        subprocess.run(command, env={**os.environ, **environment}, check=True)


def write(path: Path, results: dict[str, Any], table: str) -> None:
    """The numbers as JSON and, beside it, their table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(table)


def markdown(results: dict[str, Any]) -> str:
    """The numbers as a table, each ratio with the lowest and highest of the rounds."""
    facts = ", ".join(str(results[key]) for key in ("machine", "torch", "device", "dtype"))
    how = f"{results['threads']} threads, {results['rounds']} rounds, {results['allocator']} allocator"
    lines = [f"{facts}, {how}", ""]
    lines += ["| case | family | against | forward | training | saved / input | peak MB |", "|---" * 7 + "|"]
    for row in results["layers"]:
        cells = [row["case"], row["family"], row["rival"]]
        cells += [
            f"{row[key]:.2f} ({row[key + '_range'][0]:.2f} to {row[key + '_range'][1]:.2f}) x" for key in KEYS
        ]
        cells += [
            f"{row[key]:.{digits}f}" if key in row else ""
            for key, digits in (("saved", 2), ("inference_mb", 0))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def layers_of_ukanet() -> dict[str, Case]:
    """Every shape of a layer in a UKANet of 16 to 128 channels on 64^3, once each."""
    import torch

    from kanseg import UKANet
    from kanseg.layers.kan_conv import KANConv

    network, found = UKANet(3, 1, 3, basis="gram", features_per_stage=(16, 32, 64, 128)).eval(), {}

    def note(conv: Any, inputs: Any) -> None:
        x = inputs[0]
        shape = (conv.kernel_size[0], conv.stride[0])
        case = Case(1, x.shape[1], conv.out_channels, tuple(x.shape[2:]), *shape)
        found[str(case)] = case

    for module in network.modules():
        if isinstance(module, KANConv):
            module.register_forward_pre_hook(note)
    with torch.inference_mode():
        network(torch.zeros(1, 1, 64, 64, 64))
    return found


def measure(
    case: Case, family: str, rounds: int, reference: bool, device: str = "cpu", dtype: str = "float32"
) -> list[dict[str, Any]]:
    """Ratios of kanseg's layer to the plain convolution, and with a reference of that to kanseg's."""
    import torch

    from kanseg.layers import conv_layer

    dims, kernel = case.dims, case.kernel_size
    memory = torch.channels_last if dims == 2 else torch.channels_last_3d
    x = torch.randn(case.batch, case.in_channels, *case.size, device=device).contiguous(memory_format=memory)
    channels, how = (
        (case.in_channels, case.out_channels, kernel),
        {"stride": case.stride, "padding": kernel // 2},
    )
    plain = (torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d)(*channels, **how, bias=False)
    layers: dict[str, torch.nn.Module] = {
        "plain": plain.to(memory_format=memory),
        "kanseg": conv_layer(**options_of(family))(dims, *channels, stride=case.stride),
    }
    if reference and family in REFERENCES:
        module = import_module("kan_convs")
        layer = getattr(module, f"{REFERENCES[family]}{dims}DLayer")(*channels, **how)
        try:
            layer(x[:, :, :8, :8]).sum().backward()
            layers["reference"] = layer
        except RuntimeError as error:
            print(f"{family}: the layer of torch-conv-kan does not run here ({str(error).splitlines()[0]})")
    inputs = dict.fromkeys(layers, x)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        if hasattr(layers["kanseg"].conv, "recipe"):
            layers["folded"], inputs["folded"] = _folded(layers["kanseg"], plain, x)
        layers = {name: layer.to(device) for name, layer in layers.items()}
    calls = {
        key: {name: turn(layer, inputs[name], device, dtype) for name, layer in layers.items()}
        for key, turn in (("forward", _forward), ("training", _training))
    }
    times = {key: take_turns(turns, rounds) for key, turns in calls.items()}
    named = {"case": str(case), "family": family}
    row = {**named, "rival": "plain", **ratios(times, "kanseg", "plain")}
    row |= {f"{key}_ms": 1e3 * statistics.median(taken["kanseg"]) for key, taken in times.items()}
    row["saved"] = saved(layers["kanseg"], inputs["kanseg"])
    if case in CASES.values() and dims == 3 and device == "cpu" and sys.platform == "linux":
        row["inference_mb"] = inference_peak(family)
    rows = [row]
    if "folded" in layers:
        rows.append({**named, "rival": "folded", **ratios(times, "kanseg", "folded")})
    if "reference" in layers:
        rows.append({**named, "rival": "reference", **ratios(times, "reference", "kanseg")})
    return rows


def options_of(family: str) -> dict[str, Any]:
    """Of `conv_layer`."""
    return SHARED.get(family, {"basis": family})


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    from kanseg.layers.kernels.native import available

    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_processor()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compiled kernels": available(),
    }


def _folded(layer: Any, plain: Any, x: Any) -> tuple[Any, Any]:
    """The plain convolution over as many channels as the layer's expansion has, and an input for it."""
    import torch

    from kanseg.layers.kernels.recipe import read

    conv = layer.conv
    weight = read(conv.recipe).fold(conv.base_weight, conv.basis_weight)[0]
    folded = type(plain)(weight.shape[1], len(weight), 3, padding=1, bias=False)
    memory = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    size = (len(x), weight.shape[1], *x.shape[2:])
    wide = torch.randn(size, device=x.device).contiguous(memory_format=memory)
    return folded.to(memory_format=memory), wide


def take_turns(
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    uncounted: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call in every round, after rounds that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(uncounted + rounds):
        for name, call in calls.items():
            begun = clock()
            call()
            if number >= uncounted:
                times[name].append(clock() - begun)
    return times


def _forward(layer: Any, x: Any, device: str, dtype: str) -> Callable[[], Any]:
    import torch

    def call() -> None:
        with torch.inference_mode(), cast(device, dtype):
            layer(x)
        finish(device)

    return call


def _training(layer: Any, x: Any, device: str, dtype: str) -> Callable[[], Any]:
    leaf = x.detach().requires_grad_()

    def call() -> None:
        leaf.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        with cast(device, dtype):
            y = layer(leaf)
        y.backward(y.detach())
        finish(device)

    return call


def cast(device: str, dtype: str) -> Any:
    """Autocast where the type is not float32."""
    import torch

    return torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32")


def finish(device: str) -> None:
    """Wait for the GPU."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def ratios(times: dict[str, dict[str, list[float]]], one: str, other: str) -> dict[str, Any]:
    """Ratio of one rival to another in forward and training, and the lowest and highest of the rounds."""
    found: dict[str, Any] = {}
    for key, taken in times.items():
        rounds = [a / b for a, b in zip(taken[one], taken[other], strict=True)]
        found |= {key: statistics.median(rounds), f"{key}_range": [min(rounds), max(rounds)]}
    return found


def ratio(one: list[float], other: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def saved(layer: Any, x: Any) -> float:
    """Bytes kept for backward, each tensor's memory once, in units of the input's; weights do not count."""
    import torch

    seen: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = layer(x.detach().requires_grad_())
    del kept
    return sum(seen.values()) / (x.numel() * x.element_size())


def inference_peak(family: str) -> float:
    """MB of a fresh process above input and output, 16 channels x 128^3, in the worse of both layouts of memory."""
    programs = [
        INFERENCE.format(options=options_of(family), layout=layout)
        for layout in ("channels_last_3d", "contiguous_format")
    ]
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    return max(float(run([sys.executable, "-c", program]).stdout) for program in programs)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


if __name__ == "__main__":
    main()

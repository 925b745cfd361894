"""Networks for software without kanseg: ONNX, a program of torch.export, a MONAI bundle, with what is done around it.

A KAN layer is written out in plain operations (basis functions, one convolution, norm, activation), so whoever runs the
file needs neither kanseg nor its kernels. Each export is run beside the original and the difference is written down.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kanseg import __version__
from kanseg.data.class_plan import ClassPlan
from kanseg.data.plan import Plan
from kanseg.data.plans import AnyPlan
from kanseg.data.unlabelled import find_images
from kanseg.errors import UsageError, UserError, did_you_mean
from kanseg.export import AGREE
from kanseg.export.bundle import NETWORK, check_bundle, write_bundle
from kanseg.files import make_folder, temporary_folder, write_json
from kanseg.inference.agreement import agreement, seconds_a_window
from kanseg.inference.classify import is_classifier
from kanseg.inference.ensemble import Loaded
from kanseg.inference.windows import windows_of
from kanseg.layers import plain_steps
from kanseg.study.quantize import quantize

TOLERANCE = 1e-3  # of the largest logit
WINDOWS = 3
INPUT, OUTPUT = "image", "logits"
Run = Callable[[np.ndarray], np.ndarray]  # (N, C, *patch) -> (N, K, *patch), of a classifier (N, K)


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        file: its name.
        needs: packages that write and run it, of the extra `onnx`.
        write: (program, path) writes it.
        open: path -> a function on arrays that runs it.
        check: refuses plans that it is not made for.
        beside: (folder, what was loaded) writes what else belongs to it.
    """

    file: str
    needs: tuple[str, ...]
    write: Callable[[torch.export.ExportedProgram, Path], None]
    open: Callable[[Path], Run]
    check: Callable[[AnyPlan], None] = lambda plan: None
    beside: Callable[[Path, Loaded], object] = lambda out, loaded: None


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    found = torch.onnx.export(program, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False)
    assert found is not None
    found.save(path)


def _open_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda window: session.run(None, {name: window})[0]


def _open_torch(path: Path) -> Run:
    network = torch.export.load(path).module()
    return lambda window: network(torch.from_numpy(window)).numpy()


FORMATS = {
    "onnx": Format("model.onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _open_onnx),
    "torch": Format("model.pt2", (), torch.export.save, _open_torch),
    "monai": Format(NETWORK, (), torch.export.save, _open_torch, check_bundle, write_bundle),
}


class Exported(nn.Module):
    """A network in a file as a module, for kanseg's own prediction."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.run(np.ascontiguousarray(x.as_subclass(Tensor).numpy())))


def export_network(
    models: Sequence[Path],
    out: Path,
    to: str = "onnx",
    *,
    images: Path | None = None,
    int8: bool = False,
    agree: float = AGREE,
) -> dict[str, Any]:
    """Write OUT/model.onnx, OUT/model.pt2 or a bundle, and OUT/model.json: shapes, labels, preprocessing, differences.

    Args:
        models: runs, folds, checkpoints or names of weights of one plan; several become one network, their mean.
        to: name in `FORMATS`.
        images: an image or a folder of them; then the file is also run over them by the sliding window, and the label
            maps are compared.
        int8: write convolutions and matrix products in int8 (ONNX alone, see `kanseg.study.quantize`), with the ranges
            that they have on windows of the images.
        agree: least Dice of each class, the mean over the images, between label maps of both for an int8 file.

    Returns:
        What model.json says of the comparison and of post-processing, and the path of the file.

    Raises:
        UserError: models of several plans, or a file that does not give the numbers of the network, or in int8 not its
            label maps; it is not kept.
    """
    if to not in FORMATS:
        raise UsageError(f"Unknown format '{to}'.{did_you_mean(to, FORMATS)}")
    kind = FORMATS[to]
    if missing := [name for name in kind.needs if find_spec(name) is None]:
        raise UserError(f"--to {to} needs {', '.join(missing)}: pip install 'kanseg[onnx]'.")
    if out.is_file() or out.suffix in (".onnx", ".pt2", ".json"):
        raise UsageError(f"-o {out} is to be a folder, for {kind.file} and model.json.")
    if others := [f.file for f in FORMATS.values() if f.file != kind.file and (out / f.file).exists()]:
        raise UsageError(f"{out} holds {others[0]}, which model.json there tells of. Choose another folder.")
    classifier = is_classifier(models[0])
    if classifier and (images is not None or int8):
        raise UsageError(
            f"-i and --int8 go by label maps, and {models[0]} is a classifier, which makes none."
        )
    if int8 and (to != "onnx" or images is None):
        raise UsageError("--int8 is for --to onnx, and needs images like those to predict: -i IMAGES.")
    loaded = Loaded(models, kind=ClassPlan if classifier else Plan)
    if len(loaded.plans) > 1:
        raise UserError(
            f"{', '.join(map(str, loaded.files))} have {len(loaded.plans)} different plans, and a file holds one "
            "network. Export each by itself."
        )
    plan, network = loaded.plan, loaded.networks[0]
    if getattr(plan, "previous_stage", None):
        raise UserError(
            f"{models[0]} is a cascade, whose second network takes the label map of the first; a file holds one "
            "network for an image alone. Export a model of one stage."
        )
    kind.check(plan)
    names = plan.channel_names
    cases = [] if images is None else find_images(images, channels=len(names), names=names)
    shape = (plan.in_channels, *plan.patch_size)
    path = out / kind.file
    make_folder(path.parent)
    with temporary_folder(out) as folder:
        part = Path(folder) / path.name
        kind.write(program_of(network, shape), part)
        run = kind.open(part)
        found = compare(network, run, random_windows(shape))
        if not found["relative_difference"] <= TOLERANCE:
            raise UserError(
                f"The exported network differs from its original by {found['relative_difference']:.1e} of its largest "
                f"output ({TOLERANCE:g} is allowed), so it was not kept. Report this with the output of `kanseg info`."
            )
        if int8:
            run, found = _in_int8(part, kind, network, windows_of(cases, plan))
        if cases:
            found["images"] = agreement(network, Exported(run), cases, plan)
            if int8 and (lowest := min(found["images"]["dice"].values())) < agree:
                raise UserError(
                    f"In int8 label maps differ from those of the original, Dice {lowest:.4f} ({agree:g} is asked), so "
                    "it was not kept. Give more images like those to predict by -i, or take less by --agree."
                )
        further = [
            said for said, true in ((CALIBRATED, loaded.temperatures != [1]), (CLEANED, loaded.rules)) if true
        ]
        about = {**describe(plan, to, kind, further), "postprocessing": loaded.rules}
        about["temperature"] = loaded.temperatures[0]
        about["parity"] = found
        path.unlink(missing_ok=True)  # or a kill would leave it beside the description of another
        kind.beside(out, loaded)
        write_json(out / "model.json", {**about, "checkpoints": loaded.digests, "plan": plan.to_dict()})
        part.replace(path)
    size = round(path.stat().st_size / 2**20, 1)
    return {"file": str(path), "megabytes": size, "parity": found, "postprocessing": loaded.rules}


def _in_int8(
    path: Path, kind: Format, network: nn.Module, windows: Sequence[Tensor]
) -> tuple[Run, dict[str, Any]]:
    """Put an int8 file in the place of one of float32; what runs it, and how it compares on the windows."""
    size, whole = path.stat().st_size, Exported(kind.open(path))
    kept = quantize(path, path, windows)
    run = kind.open(path)
    found = compare(network, run, windows, {"float32": whole})
    return run, {**found, "int8": {"float32_products": kept, "float32_megabytes": round(size / 2**20, 1)}}


def program_of(network: nn.Module, shape: Sequence[int]) -> torch.export.ExportedProgram:
    """A network in operations of torch alone, for any number of windows (C, *patch) = `shape`."""
    copied = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
    window = torch.zeros(2, *shape)
    dynamic = ({0: torch.export.Dim("windows", min=1)},)
    with plain_steps():
        return torch.export.export(copied, (window,), dynamic_shapes=dynamic, strict=False)


def random_windows(shape: Sequence[int]) -> list[Tensor]:
    """Windows (N, C, *patch) of normalised values, one alone and two together in turn."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1 + number % 2, *shape, generator=generator) for number in range(WINDOWS)]


@torch.inference_mode()
def compare(
    network: nn.Module, run: Run, windows: Sequence[Tensor], others: Mapping[str, nn.Module] | None = None
) -> dict[str, Any]:
    """Outputs of both for some windows (N, C, *patch), and times, those of others as well."""
    exported = Exported(run)
    largest = worst = 0.0
    equal = []
    for window in windows:
        expected, given = network(window), exported(window)
        if given.shape != expected.shape:
            raise UserError(
                f"The exported network gives {tuple(given.shape)}, its original {tuple(expected.shape)}."
            )
        worst = max(worst, float((given - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
        equal.append((given.argmax(1) == expected.argmax(1)).float().mean().item())
    return {
        "windows": len(windows),
        "largest_difference": worst,
        "relative_difference": worst / max(largest, 1e-30),
        "equal_classes": float(np.mean(equal)),
        "seconds_a_window": seconds_a_window(
            {"kanseg": network, "exported": exported, **(others or {})}, windows[0]
        ),
    }


def describe(plan: AnyPlan, to: str, kind: Format, further: Sequence[str] = ()) -> dict[str, Any]:
    """What whoever runs the file has to do around it, in words and numbers.

    Args:
        further: steps after those of the plan.
    """
    window = ["windows", plan.in_channels, *plan.patch_size]
    classes = [
        {"name": name, "value": value}
        for name, value in zip(plan.label_names, plan.label_values, strict=True)
    ]
    told, places = (steps(plan), plan.patch_size) if isinstance(plan, Plan) else (class_steps(plan), [])
    return {
        "format": to,
        "file": kind.file,
        "made_by": {"kanseg": __version__, **{n: version_of(n) for n in ("torch", *kind.needs)}},
        "input": {"name": INPUT, "type": "float32", "shape": window},
        "output": {"name": OUTPUT, "type": "float32", "shape": [window[0], len(classes), *places]},
        "classes": classes,
        "steps": [*told, *further],
    }


def class_steps(plan: ClassPlan) -> list[str]:
    """The way from an image to its class, a sentence a step; the numbers are in `plan`."""
    size = " x ".join(map(str, plan.patch_size))
    linear = "bilinearly with antialiasing" if plan.spatial_dims == 2 else "trilinearly"
    order = "rows before columns" if plan.spatial_dims == 2 else "axes in the order of the file"
    colours = "Repeat a grey image" if plan.in_channels > 1 else "Take the mean of colours"
    decided = (
        "Sigmoid; the image has each class that is at least 1/2."
        if plan.multilabel
        else "Softmax gives the probabilities; the class with the largest output is that of the image."
    )
    return [
        f"Take the values as they are stored (0 to 255 in most pictures), {order}.",
        f"{colours} where an image has not as many channels as the network, {plan.in_channels}.",
        f"Scale it, all axes alike, so that it just covers {size}, {linear} (corners are not aligned).",
        f"Cut {size} about its middle; of an odd rest one more is cut at the end.",
        *(
            f"Channel {name}: subtract {one['mean']:g}, divide by {one['std']:g}."
            for name, one in zip(plan.channel_names, plan.normalization, strict=True)
        ),
        decided,
    ]


def steps(plan: Plan) -> list[str]:
    """The way from an image to its label map, a sentence a step; the numbers are in `plan`."""
    axes = ["rows", "columns"] if plan.image_dims == 2 else list(plan.orientation)
    found = []
    if plan.image_dims == 3:
        found.append(f"Turn the image so that its axes run to {', '.join(axes)} (the ends of the letters).")
        within = "" if plan.slice_axis is None else f" within the slices across axis {axes[plan.slice_axis]}"
        found.append(f"Resample it to {' x '.join(f'{s:g}' for s in plan.spacing)} mm{within}, linearly.")
    else:
        found.append("Take the pixels as they are stored (0 to 255 in most pictures), rows before columns.")
    for name, scheme in zip(plan.channel_names, plan.normalization, strict=True):
        found.append(f"Channel {name}: {NORMALISED[scheme['scheme']].format(**scheme)}.")
    if plan.slice_axis is not None:
        found.append(
            f"Cut slices across axis {axes[plan.slice_axis]}; the channels of a slice are those of {plan.slices} "
            "neighbouring ones, the outermost repeated."
        )
    patch = " x ".join(map(str, plan.patch_size))
    found.append(
        f"Where it is smaller than {patch}, pad it with 0 on both sides, the odd one at the end, and cut the outputs "
        "again."
    )
    found.append(
        f"Slide a window of {patch} over it by half its size, the last one up to the end, and average the outputs. "
        "They weigh by a Gaussian about the middle of the window: standard deviation an eighth of its size, 1 in the "
        "middle, nowhere less than 0.001."
    )
    if plan.regions:
        found.append("Sigmoid; where a region is above 1/2 paint its value, region by region in their order.")
    else:
        found.append("The class with the largest output is that of the voxel; write its value.")
    if plan.image_dims == 3:
        found.append("Bring the outputs back onto the image's own grid before the largest is sought.")
    return found


CALIBRATED = (
    "For probabilities, divide the outputs by `temperature` before the softmax (of regions: the sigmoid), which the "
    "file does not do; no label changes by it."
)
CLEANED = "Then clean the label map by the rules of `postprocessing`, which `kanseg predict` does as well."
NORMALISED = {
    "zscore": "subtract the mean of the image and divide by its standard deviation",
    "zscore_nonzero": "subtract the mean of what is not 0 and divide by its standard deviation; 0 stays 0",
    "fixed": "subtract {mean:g}, divide by {std:g}",
    "minmax": "subtract the smallest value of the image and divide by its range",
    "ct": "clip to {lower:g} ... {upper:g}, subtract {mean:g}, divide by {std:g}",
}

"""Prediction: sliding window over the preprocessed image, back to its own grid, written with its geometry."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from kanseg.data.formats import Case
from kanseg.data.images import SUFFIXES_2D, SUFFIXES_3D, Image, suffix_of, write_array, write_label
from kanseg.data.plan import Plan
from kanseg.data.transforms import load_case, restore, restored_labels
from kanseg.errors import UserError

WINDOWS_AT_ONCE = 2
NIFTI = ".nii.gz"
LOSSY = (".jpg", ".jpeg")


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    image: Tensor,
    plan: Plan,
    *,
    overlap: float = 0.5,
    tta: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Logits of a preprocessed image, (1, C, *S) -> (1, K, *S), by a sliding window with Gaussian weights.

    Args:
        overlap: share of a window that its neighbour covers too.
        tta: average over all mirrorings of the plan's `mirror_axes`.
    """
    image = torch.as_tensor(image).to(device)
    axes = plan.mirror_axes if tta else []
    flips = [flip for count in range(len(axes) + 1) for flip in combinations(axes, count)]

    def logits_of(flip: Sequence[int]) -> Tensor:
        dims = [axis + 2 for axis in flip]
        logits = sliding_window_inference(
            image.flip(dims), plan.patch_size, WINDOWS_AT_ONCE, model, overlap=overlap, mode="gaussian"
        )
        return torch.as_tensor(logits).flip(dims)

    total = logits_of(flips[0])
    for flip in flips[1:]:
        total += logits_of(flip)
    return total.div_(len(flips))


def predict_case(
    model: nn.Module,
    case: Case,
    plan: Plan,
    *,
    overlap: float = 0.5,
    tta: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, Image]:
    """Label map of one case on its own grid, in the values of the training labels, and the image it belongs to."""
    labels, source, _ = _predict(model, case, plan, overlap, tta, device)
    return labels, source


def _predict(
    model: nn.Module, case: Case, plan: Plan, overlap: float, tta: bool, device: torch.device | str
) -> tuple[np.ndarray, Image, _Probabilities]:
    item, source = load_case(case, plan, with_label=False)
    was_training = model.training
    model.eval()
    try:
        image = item["image"].as_tensor()[None]
        logits = predict_logits(model, image, plan, overlap=overlap, tta=tta, device=device)[0].cpu()
    finally:
        model.train(was_training)
    if not torch.isfinite(logits).all():
        raise UserError(f"{source.path}: the network gives values that are not finite. Train it again.")
    labels = np.asarray(plan.label_values)[restored_labels(logits, item, plan)]
    return labels, source, _Probabilities(logits, item, plan)


class _Probabilities:
    """Probabilities on the image's own grid, made when they are asked for."""

    def __init__(self, logits: Tensor, item: dict, plan: Plan) -> None:
        self.logits, self.item, self.plan = logits, item, plan

    def of(self, number: int) -> np.ndarray:
        """Probability of one class, (*original) float32."""
        return restore(self.logits.softmax(0)[number][None], self.item, self.plan)[0].numpy()


def predict_folder(
    model: nn.Module,
    plan: Plan,
    cases: Sequence[Case],
    out: Path,
    *,
    suffix: str | None = None,
    overlap: float = 0.5,
    tta: bool = False,
    probabilities: bool = False,
    device: torch.device | str = "cpu",
    console: Console | None = None,
    description: str = "kanseg",
) -> dict[str, str]:
    """Predict every case into a folder as <id><suffix>; what fails is reported, the others go on.

    Args:
        out: a folder, or the file to write where there is one case and `out` has the suffix of an image.
        suffix: format of the outputs; default that of each input (.nii.gz for DICOM, .png for JPEG).
        probabilities: also write <id>_prob_<class><suffix>, float32, one file a class.

    Returns:
        Message of each case that failed, by its id.

    Raises:
        UserError: before anything is written, where an output would replace an image or another output.
    """
    failures: dict[str, str] = {}
    paths = _outputs(cases, out, suffix)
    console = console or Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Predicting", total=len(cases))
        for case, path in zip(cases, paths, strict=True):
            try:
                labels, source, chances = _predict(model, case, plan, overlap, tta, device)
                write_label(path, labels, source, plan.label_dtype, description)
                if probabilities:
                    _write_probabilities(path, chances, source, plan)
            except (
                UserError,
                MemoryError,
                RuntimeError,
            ) as error:  # torch runs out of memory by RuntimeError
                failures[case.id] = str(error)
                console.print(f"[red]{case.id} failed:[/red] {error}", highlight=False, soft_wrap=True)
            else:
                console.print(f"{case.id} -> {path}", highlight=False, soft_wrap=True)
            progress.advance(task)
    return failures


def _outputs(cases: Sequence[Case], out: Path, suffix: str | None) -> list[Path]:
    """Where each label map goes."""
    if suffix_of(out) in (*SUFFIXES_3D, *SUFFIXES_2D):
        if len(cases) != 1:
            raise UserError(f"-o {out} is one file, but {len(cases)} images are given. Give a folder.")
        paths = [out]
    else:
        paths = [out / f"{case.id}{suffix or _suffix(case)}" for case in cases]
    taken = {image.resolve(): "an image to be segmented" for case in cases for image in case.images}
    for case, path in zip(cases, paths, strict=True):
        if other := taken.get(path.resolve()):
            raise UserError(
                f"The label map of {case.images[0]} would replace {path}, {other}. Choose another folder or other "
                "names."
            )
        taken[path.resolve()] = f"the label map of {case.images[0]}"
    return paths


def _write_probabilities(path: Path, chances: _Probabilities, source: Image, plan: Plan) -> None:
    suffix = suffix_of(path)
    if suffix in SUFFIXES_2D:
        raise UserError("Probabilities need a format with floating-point numbers; add --format nii.gz")
    stem = path.name[: -len(suffix)]
    for number, name in enumerate(plan.label_names):
        safe = "".join(c if c.isalnum() else "_" for c in name)
        write_array(
            path.with_name(f"{stem}_prob_{safe}{suffix}"), chances.of(number), source, np.dtype("float32")
        )


def _suffix(case: Case) -> str:
    suffix = suffix_of(case.images[0])
    if suffix in LOSSY:
        return ".png"
    return suffix if suffix in (*SUFFIXES_3D, *SUFFIXES_2D) and case.images[0].is_file() else NIFTI

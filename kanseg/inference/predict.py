"""Prediction: sliding window over the preprocessed image, back to its own grid, written with its geometry."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.text import Text
from torch import Tensor, nn

from kanseg.data.beside import NIFTI, UNCERTAINTY, probability_path, remove_beside, uncertainty_path
from kanseg.data.cascade import with_previous
from kanseg.data.cases import Case
from kanseg.data.digests import file_digest, made_from
from kanseg.data.fingerprint import exchanged_channels, unlike_training
from kanseg.data.images import Image, read_description, read_provenance, write_array, write_label
from kanseg.data.plan import Plan
from kanseg.data.suffixes import (
    LOSSY,
    RTSTRUCT,
    SUFFIXES_2D,
    SUFFIXES_3D,
    SUFFIXES_DICOM,
    TWO_FILES,
    stem_of,
    suffix_of,
)
from kanseg.data.transforms import Item, highest, load_case, restore, restored_labels
from kanseg.errors import UsageError, UserError
from kanseg.export.dicom_seg import check_series, write_segmentation
from kanseg.export.rt_struct import write_structures
from kanseg.files import make_folder
from kanseg.inference.cascade import Cascade
from kanseg.inference.logits import Watch, whole_logits
from kanseg.inference.postprocess import Rule, apply_postprocessing
from kanseg.inference.quality import Verdict, judge
from kanseg.inference.uncertainty import QUALITY, doubt, expected_in_words, keep_quality, read_quality
from kanseg.memory import settle, taken
from kanseg.progress import say, telling

# Where label maps cannot have the format of their image.
WRITTEN_AS = TWO_FILES | dict.fromkeys(LOSSY, ".png")
NO_FOLDERS = tuple(".dicom .img .hdr .mgz .mgh .npy .npz .gz .zip .seg .h5 .csv".split())
VOXEL = 36  # bytes a voxel of the own grid takes at most on its way to a label, of any number of classes
Network = nn.Module | Sequence[nn.Module]
Plans = Plan | Sequence[Plan]
T = TypeVar("T")


@dataclass
class Part:
    """Logits of one case by one network, and the way back to the image's own grid.

    Attributes:
        temperature: that logits are divided by before they become probabilities.
    """

    logits: Sequence[Tensor]
    item: Item
    plan: Plan
    temperature: float = 1.0

    def _scaled(self, number: int) -> Tensor:
        values = self.logits[number]
        return values if self.temperature == 1 else values / self.temperature

    @cached_property
    def _rest(self) -> Tensor:
        """What turns logits into probabilities, (*S): their logarithmic sum, or the likeliest of the regions."""
        if self.plan.regions:
            return reduce(torch.maximum, (self._scaled(k) for k in range(1, len(self.logits))))
        return reduce(torch.logaddexp, map(self._scaled, range(len(self.logits))))

    def chance(self, number: int) -> Tensor:
        """Probability of a class on the network's grid, (*S): softmax over the classes, of regions each for itself."""
        if self.plan.regions:
            return self._scaled(number).sigmoid() if number else 1 - self._rest.sigmoid()
        return (self._scaled(number) - self._rest).exp()

    def probability(self, number: int) -> np.ndarray:
        """The same on the image's own grid, (*original)."""
        return np.asarray(restore(self.chance(number)[None], self.item, self.plan)[0])


@dataclass
class Prediction:
    """What is predicted for one case, by one network or several of different plans."""

    source: Image
    parts: list[Part]

    def labels(self, watch: Watch | None = None) -> np.ndarray:
        """Label map (*original) in the values of the training labels; of several networks by their mean probability.

        Temperatures change none: of several networks the mean is that of their probabilities without.

        Args:
            watch: told how many classes are back on the image's own grid.
        """
        first = self.parts[0]
        if len(self.parts) == 1:
            numbers = restored_labels(_counted(first.logits, watch), first.item, first.plan)
            return np.asarray(first.plan.label_values, np.int32)[numbers]
        plain = Prediction(self.source, [replace(part, temperature=1.0) for part in self.parts])
        chances = (plain.probability(number) for number in _counted(range(len(first.logits)), watch))
        return decide(chances, first.plan.label_values, bool(first.plan.regions))

    def probability(self, number: int) -> np.ndarray:
        """Probability of one class, (*original) float32."""
        maps = [part.probability(number) for part in self.parts]
        return np.asarray(np.mean(maps, axis=0, dtype=np.float32))


def _counted(items: Sequence[T], watch: Watch | None) -> Iterator[T]:
    for done, item in enumerate(items):
        if watch is not None:
            watch(done, len(items))
        yield item


def decide(chances: Iterable[np.ndarray], values: Sequence[int], regions: bool) -> np.ndarray:
    """Label map from the probabilities (*S) of each class in turn: the highest, or regions painted in their order."""
    numbers = highest(map(torch.as_tensor, chances), 0.5 if regions else None)
    return np.asarray(values, np.int32)[numbers]


def predict(
    model: Network,
    case: Case,
    plan: Plans,
    *,
    temperatures: Sequence[float] | None = None,
    watch: Watch | None = None,
    look: Callable[[Image], None] | None = None,
    **how: Any,
) -> Prediction:
    """Logits of one case, by one network or by several, each with its plan.

    A `Cascade` predicts its first stage before, unless the case has that label map.

    Args:
        temperatures: of each network, see `kanseg.inference.calibration`; default 1.
        look: is shown the image before anything is predicted.
        how: overlap, blending, tta, device, memory; see `kanseg.inference.logits.whole_logits`.
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    plans = [plan] if isinstance(plan, Plan) else list(plan)
    heat = temperatures or [1.0] * len(models)
    parts = []
    for number, (network, own, temperature) in enumerate(zip(models, plans, heat, strict=True)):
        previous = None
        if isinstance(network, Cascade) and case.previous is None:
            first = predict(list(network.first), case, network.plans, watch=watch, look=look, **how)
            previous, look = first.labels(), None
            del first
        item, source = load_case(case, own, with_label=False, look=look, previous=previous)
        look = None
        settle(how.get("memory"))  # what reading left
        seen = None if watch is None else _shifted(watch, number, len(models))
        was_training = network.training
        network.eval()
        try:
            logits = whole_logits(network, with_previous(item)[None], own, watch=seen, **how)
        finally:
            network.train(was_training)
        settle(how.get("memory"))
        parts.append(Part(logits, item, own, temperature))
    return Prediction(source, parts)


def _shifted(watch: Watch, number: int, count: int) -> Watch:
    return lambda done, total: watch(number * total + done, count * total)


def predict_case(model: Network, case: Case, plan: Plans, **how: Any) -> tuple[np.ndarray, Image]:
    """Label map of one case on its own grid, in the values of the training labels, and the image it belongs to."""
    predicted = predict(model, case, plan, **how)
    return predicted.labels(), predicted.source


def predict_folder(
    model: Network,
    plan: Plans,
    cases: Sequence[Case],
    out: Path,
    *,
    suffix: str | None = None,
    probabilities: bool = False,
    uncertainty: bool = False,
    rules: Sequence[Rule] = (),
    quality: Mapping[str, Any] | None = None,
    judged: Callable[[str, Verdict], object] | None = None,
    settings: Mapping[str, Any] | None = None,
    again: bool = False,
    console: Console | None = None,
    description: str = "kanseg",
    provenance: Mapping[str, Any] | None = None,
    **how: Any,
) -> dict[str, str]:
    """Predict every case into a folder as <id><suffix>; what fails is reported, the others go on.

    Args:
        model, plan: a network and its plan, or as many of both; then their probabilities are averaged.
        out: a folder, or the file to write where there is one case and `out` has the suffix of an image.
        suffix: format of the outputs; default that of each input (.nii.gz for DICOM, .png for JPEG, one file for two).
            .dcm: DICOM-SEG, .rtstruct.dcm: RT structures, of DICOM series; .seg.nrrd: segments of 3D Slicer. What lies
            beside them is .nii.gz.
        probabilities: also write <id>_prob_<class><suffix>, float32, one file a class.
        uncertainty: also write <id>_uncertainty<suffix>, and a row a case and class to quality.csv beside the label
            maps; see `kanseg.inference.uncertainty`.
        rules: post-processing, see `kanseg.inference.postprocess`.
        quality: what `kanseg.inference.quality.judge` needs; with it doubtful cases are told, and a folder of label
            maps has quality.csv without `uncertainty`, too.
        judged: told of each case what was judged.
        settings: what the outputs depend on (model digests, options); where given, cases of unchanged images that
            an earlier call finished with the same settings are passed over, unless `again` or quality.csv lacks them.
        provenance: of the model, for the headers of label maps, which also tell digests of the images.
        how: temperatures, see `predict`; overlap, blending, tta, device, memory; see
            `kanseg.inference.logits.whole_logits`.

    Returns:
        Message of each case that failed, by its id.

    Raises:
        UserError: before anything is written, where an output would replace an image or another output, or its format
            cannot hold it.
    """
    failures: dict[str, str] = {}
    paths = _outputs(cases, out, suffix)
    if (probabilities or uncertainty) and (flat := [p for p in paths if suffix_of(p) in SUFFIXES_2D]):
        raise UsageError(
            f"{flat[0]} cannot hold probabilities, which are fractions. Add --format nii.gz, or end -o so."
        )
    known, table = set(), uncertainty or (bool(quality) and paths != [out])
    if table:  # no other one is replaced
        known = {row["case"] for row in read_quality(paths[0].parent / QUALITY)}
    console = console or Console(stderr=True)
    first = plan if isinstance(plan, Plan) else plan[0]
    if settings is not None:
        settings = {**settings, "probabilities": probabilities}
        settings |= {"uncertainty": True} if uncertainty else {}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Predicting", total=len(cases))
        within = progress.add_task("")
        for case, path in zip(cases, paths, strict=True):
            progress.update(within, description=escape(case.id), completed=0, total=None)
            try:
                remark = _remark(description, settings, case)
                beside = [uncertainty_path(path)] if uncertainty else []
                if probabilities:
                    names = first.label_names
                    beside += [probability_path(path, names, number) for number in range(len(names))]
                complete = (not table or stem_of(path) in known) and all(map(Path.is_file, beside))
                if settings is not None and not again and complete and read_description(path) == remark:
                    say(console, f"{case.id} is there already")
                    progress.advance(task)
                    continue

                told = partial(_watch, progress, within, case.id)
                notes: list[str] = []
                look = partial(_remark_on, console, case.id, first, how.get("memory"), notes)
                make_folder(path.parent)  # or there is no use in predicting
                predicted = predict(model, case, plan, watch=told("windows"), look=look, **how)
                remove_beside(path)  # of another prediction
                progress.update(within, description=f"{escape(case.id)}: classes")
                labels = predicted.labels(told("classes on the image's own grid"))
                if rules:
                    labels = apply_postprocessing(labels, rules, predicted.source.spacing)
                verdict = judge(predicted, labels, quality) if quality else Verdict([])
                verdict.notes[:0] = notes
                chances = _probabilities(path, predicted, first, keep=probabilities)
                if uncertainty:
                    verdict.unsure(_write_uncertainty(path, predicted.source, chances, labels, first))
                if probabilities:  # those that are not made yet
                    deque(chances, maxlen=0)
                if table:
                    keep_quality(path.parent / QUALITY, stem_of(path), verdict.table())
                write_prediction(
                    path, labels, predicted.source, first, remark, provenance=provenance, case=case
                )
                del predicted, chances  # their logits are not to lie beside those of the next case
            except (
                UserError,
                OSError,
                MemoryError,
                RuntimeError,
            ) as error:  # torch runs out of memory by RuntimeError
                failures[case.id] = _cause(error)
                said = Text.assemble((f"{case.id} failed:", "red"), f" {failures[case.id]}")
                console.print(said, highlight=False, soft_wrap=True)
            else:
                say(console, f"{case.id} -> {path}")
                if uncertainty:
                    say(console, f"  {expected_in_words(verdict.rows)}")
                for why in filter(None, (verdict.doubtful, *verdict.notes[len(notes) :])):
                    say(console, f"  check it: {why}")
                if judged is not None and quality:
                    judged(case.id, verdict)
                if (labels == first.label_values[0]).all():
                    console.print("  note: nothing was found in it", highlight=False)
            progress.advance(task)
    return failures


def _remark_on(
    console: Console, case: str, plan: Plan, memory: int | None, notes: list[str], image: Image
) -> None:
    """Say before the work begins, and note, what looks unlike the images of the training; say what is too large."""
    size = unlike_training(image.array.shape[1:], image.affine, plan.fingerprint)
    exchanged = exchanged_channels(image.array, plan.fingerprint, plan.channel_names)
    for said in filter(None, (size, exchanged)):
        notes.append(said)
        say(console, f"{case}: note: {said}")
    settle(memory)
    needed = taken() + VOXEL * image.array[0].size
    if plan.image_dims == 3 and memory is not None and needed > memory:
        say(
            console,
            f"{case}: note: its label map alone takes the program to {needed / 2**30:.1f} GiB, more than --memory "
            f"{memory / 2**30:.1f}G",
        )


def _watch(progress: Progress, task: TaskID, case: str, what: str) -> Watch:
    """Who is told how far a case is: the bar, or where there is none a line from time to time."""
    return telling(f"{case}: {what}") if progress.disable else partial(_show, progress, task)


def _show(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def _cause(error: BaseException) -> str:
    """What went wrong, in one line: of MONAI's errors about a transform the error in it."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    said = " ".join(str(error).split())
    return (
        said if isinstance(error, UserError | RuntimeError | OSError) else f"{type(error).__name__}: {said}"
    )


def _remark(description: str, settings: Mapping[str, Any] | None, case: Case) -> str:
    """What the header of a label map says: the description, and a digest of all that the label map depends on.

    In ASCII, which every format gives back as it was.
    """
    said = description.encode("ascii", "replace").decode()
    return said if settings is None else f"{said[:50]} {made_from(case.images, settings)}"


def _outputs(cases: Sequence[Case], out: Path, suffix: str | None) -> list[Path]:
    """Where each label map goes."""
    if suffix_of(out) in (*SUFFIXES_3D, *SUFFIXES_2D, *SUFFIXES_DICOM) and not out.is_dir():
        if suffix is not None and suffix != suffix_of(out):
            raise UsageError(f"-o {out} ends in {suffix_of(out)}, --format says {suffix}. Give one of them.")
        if len(cases) != 1:
            raise UserError(f"-o {out} is one file, but {len(cases)} images are given. Give a folder.")
        paths = [out]
    elif out.suffix.lower() in NO_FOLDERS and not out.is_dir():
        raise UsageError(
            f"-o {out}: label maps are not written as {out.suffix}. Give a folder, or a file such as mask.nii.gz, "
            "mask.nrrd or mask.png."
        )
    else:
        paths = [out / f"{case.id}{suffix or _suffix(case)}" for case in cases]
    for case, path in zip(cases, paths, strict=True):
        if suffix_of(path) in SUFFIXES_DICOM:
            check_series(case.images[0], suffix_of(path))
            if path.resolve().parent == case.images[0].resolve():
                raise UserError(f"{path} would lie among the images of its series. Choose another folder.")
    taken = {image.resolve(): "an image to be segmented" for case in cases for image in case.images}
    for case, path in zip(cases, paths, strict=True):
        if other := taken.get(path.resolve()):
            raise UserError(
                f"The label map of {case.images[0]} would replace {path}, {other}. Choose another folder or other "
                "names."
            )
        taken[path.resolve()] = f"the label map of {case.images[0]}"
    return paths


def write_prediction(
    path: Path,
    labels: np.ndarray,
    source: Image,
    plan: Plan,
    remark: str = "",
    *,
    provenance: Mapping[str, Any] | None = None,
    case: Case | None = None,
) -> None:
    """Write a label map on the grid of its image in the format that the suffix of `path` names.

    Args:
        provenance: of the model, for a header that keeps it, with the digests of the images of the `case`, and of the
            networks that made the label map of the stage before, where it comes with one.
    """
    if suffix_of(path) in SUFFIXES_DICOM:
        write = write_structures if suffix_of(path) == RTSTRUCT else write_segmentation
        values, names = plan.label_values, plan.label_names
        write(path, labels, source, values, names, model=plan.dataset_name, description=remark)
    else:
        classes = dict(zip(plan.label_values, plan.label_names, strict=True))
        if provenance and case is not None:
            before = read_provenance(case.previous).get("models", []) if case.previous else []
            provenance = {**provenance, "models": [*provenance["models"], *before]}
            provenance["images"] = [file_digest(image) for image in case.images]
        write_label(path, labels, source, plan.label_dtype, remark, names=classes, provenance=provenance)


def _probabilities(path: Path, predicted: Prediction, plan: Plan, *, keep: bool) -> Iterator[np.ndarray]:
    """Map (*original) of each class in turn; to be kept they are written beside the label map as they are made, and
    their headers tell `kanseg ensemble` what the classes are painted as.
    """
    kind = "region" if plan.regions else "class"
    for number, value in enumerate(plan.label_values):
        remark = f"probability of {kind} {number}, painted as {value}"
        chance = predicted.probability(number)
        if keep:
            place = probability_path(path, plan.label_names, number)
            write_array(place, chance, predicted.source, np.dtype("float32"), remark)
        yield chance


def _write_uncertainty(
    path: Path, source: Image, chances: Iterable[np.ndarray], labels: np.ndarray, plan: Plan
) -> list[dict[str, Any]]:
    """Entropy beside the label map; what the table tells of each class."""
    how: dict[str, Any] = {"regions": bool(plan.regions), "spacing": source.spacing}
    found = doubt(chances, labels, plan.label_values, plan.label_names, **how)
    write_array(uncertainty_path(path), found.entropy, source, np.dtype("float32"), UNCERTAINTY)
    return found.rows


def _suffix(case: Case) -> str:
    suffix = suffix_of(case.images[0])
    if suffix in WRITTEN_AS:
        return WRITTEN_AS[suffix]
    return suffix if suffix in (*SUFFIXES_3D, *SUFFIXES_2D) and case.images[0].is_file() else NIFTI

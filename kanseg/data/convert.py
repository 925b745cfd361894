"""Data sets written in the layouts of others: the Decathlon's and nnU-Net's raw folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kanseg.data.cases import COLOURS, Case, Dataset, label_path, require_file_name
from kanseg.data.images import Image, check_pair, label_from, read_image, write_array
from kanseg.data.labels import IGNORE, class_values, known_values
from kanseg.data.segmentations import are_segmentations, read_segments
from kanseg.errors import UsageError, UserError, did_you_mean
from kanseg.files import make_folder, write_json
from kanseg.progress import progress

SUFFIX = {2: ".png", 3: ".nii.gz"}


@dataclass(frozen=True)
class Sample:
    """A case as it is written: image, label map (*S) or None, and the patient."""

    id: str
    image: Image
    label: np.ndarray | None
    group: str


@dataclass(frozen=True)
class Layout:
    """How a layout names its files and tells of itself.

    Attributes:
        split: whether each channel has a file of its own, NAME_0000, NAME_0001, ...; else those of pictures alone have.
        consecutive: whether label values must be 0, 1, 2, ...
        describe: dataset.json from the data set, its label values in the files, the written samples by folder, and the
            endings of the files of an image.
    """

    split: bool
    consecutive: bool
    describe: Callable[[Dataset, dict[int, int], dict[str, list[str]], Sequence[str]], dict[str, Any]]


def convert(dataset: Dataset, out: Path | str, to: str, *, only: bool = False) -> dict[str, Any]:
    """Write a data set in another layout; images keep their voxels and grids, patients go into `subjects`.

    Args:
        only: of labels that are segmentations, segments that are no classes are left aside; see `read_segments`.

    Returns:
        {"out", "layout", "training", "test": how many images, "test_labels": how many of the latter have labels,
        "label_values": value in the files -> value written}.

    Raises:
        UserError: `out` is not empty, an image cannot be read or written or lacks a channel, or two have one name.
    """
    tests = _samples(dataset, dataset.test_cases, only)
    return write_dataset(dataset, out, to, _samples(dataset, dataset.cases, only), tests)


def write_dataset(
    dataset: Dataset,
    out: Path | str,
    to: str,
    training: Iterable[Sample],
    test: Iterable[Sample] = (),
    *,
    consecutive: bool = False,
) -> dict[str, Any]:
    """Write samples as they come, and a dataset.json with the channels and labels of `dataset`; see `convert`.

    Args:
        consecutive: number the labels 0, 1, 2, ... also where the layout does not ask for it.
    """
    if to not in LAYOUTS:
        raise UsageError(f"Unknown layout '{to}'.{did_you_mean(to, LAYOUTS)}")
    layout, out, suffix = LAYOUTS[to], Path(out), SUFFIX[dataset.spatial_dims]
    consecutive = consecutive or layout.consecutive
    if dataset.source.is_dir() and out.resolve().is_relative_to(dataset.source):
        raise UserError(f"{out} lies inside {dataset.source}, which stays as it is. Choose a folder outside.")
    known = known_values(dataset)
    values = {value: place if consecutive else value for place, value in enumerate(known)}
    if dataset.ignore_value is not None:  # nnU-Net wants it to be the highest
        values[dataset.ignore_value] = len(known) if consecutive else dataset.ignore_value
    endings = _endings(dataset, layout, suffix)
    group_of: dict[str, dict[str, str]] = {"Tr": {}, "Ts": {}}
    test_labels = 0
    with new_folder(out) as folder:
        for key, samples in (("Tr", training), ("Ts", test)):
            for sample in samples:
                _check(sample, dataset, key, group_of)
                _write(folder, key, sample, endings, values)
                group_of[key][sample.id] = sample.group
                test_labels += key == "Ts" and sample.label is not None
        names = {key: list(of) for key, of in group_of.items()}
        described = layout.describe(dataset, values, names, endings)
        groups: dict[str, set[str]] = {}
        for name, group in (*group_of["Tr"].items(), *group_of["Ts"].items()):
            groups.setdefault(group, set()).add(name)
        if any(cases != {group} for group, cases in groups.items()):
            described["subjects"] = {group: sorted(cases) for group, cases in sorted(groups.items())}
        if dataset.splits:
            described["splits"] = [dict(fold) for fold in dataset.splits]
        write_json(folder / "dataset.json", described)
    counts = {"training": len(group_of["Tr"]), "test": len(group_of["Ts"]), "test_labels": test_labels}
    return {"out": str(out), "layout": to, **counts, "label_values": {str(k): v for k, v in values.items()}}


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when all went well and is gone when not.

    Raises:
        UserError: `out` is there already and not empty, or cannot be made.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty. Choose a new folder.")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an earlier call that was killed
    try:
        yield make_folder(part)
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _samples(dataset: Dataset, cases: Sequence[Case], only: bool) -> Iterator[Sample]:
    for case in progress(cases, "Converting"):
        image = read_image(case.images, dataset.spatial_dims)
        label = None
        if are_segmentations([case]):
            label = read_segments(label_path(case), image, dataset.label_names[1:], only=only)
        elif case.label is not None:
            found = read_image(label_path(case), dataset.spatial_dims)
            check_pair(image, found)
            label = label_from(found)
        yield Sample(case.id, image, label, case.group)


def _endings(dataset: Dataset, layout: Layout, suffix: str) -> list[str]:
    """What the files of an image end in, one with all channels or one a channel."""
    count, flat = len(dataset.channel_names), suffix == SUFFIX[2]
    colours = flat and count == len(COLOURS) and all(len(case.images) == 1 for case in dataset.cases)
    if (
        colours or count == 1 or not (flat or layout.split)
    ):  # a picture holds grey or colours, no other channels
        return [f"_0000{suffix}" if layout.split else suffix]
    return [f"_{number:04d}{suffix}" for number in range(count)]


def _check(sample: Sample, dataset: Dataset, key: str, group_of: Mapping[str, Mapping[str, str]]) -> None:
    """Raise `UserError` for a sample that would not come back from the files as it is."""
    if len(sample.image.array) != len(dataset.channel_names):
        raise UserError(
            f"{sample.image.path} has {len(sample.image.array)} channels, expected are {len(dataset.channel_names)} "
            f"({', '.join(dataset.channel_names)}). Correct it, or take it out."
        )
    if sample.id in group_of[key] or group_of["Tr"].get(sample.id, sample.group) != sample.group:
        raise UserError(
            f"{dataset.name} has several images called '{sample.id}'. Give every image a name of its own (in lists: "
            "'id')."
        )
    require_file_name(sample.id)


def _write(out: Path, key: str, sample: Sample, endings: Sequence[str], values: dict[int, int]) -> None:
    array, folder = sample.image.array, make_folder(out / f"images{key}")
    suffix = SUFFIX[sample.image.spatial_dims]
    dtype = _dtype_of(array, suffix)
    parts = array if len(endings) == len(array) else [array]
    for ending, part in zip(endings, parts, strict=True):
        write_array(folder / f"{sample.id}{ending}", part, sample.image, dtype)
    if sample.label is not None:
        dtype = np.result_type(np.min_scalar_type(max(values.values())), np.uint8)
        path = make_folder(out / f"labels{key}") / f"{sample.id}{suffix}"
        write_array(path, _mapped(sample.label, values, sample.id), sample.image, dtype)


def _dtype_of(array: np.ndarray, suffix: str) -> np.dtype:
    """The smallest type that holds the voxels as they are: whole numbers as such, others as float32."""
    low, high = float(array.min(initial=0)), float(array.max(initial=0))
    if np.array_equal(array, np.rint(array)):
        for name in ("uint8", "int16", "uint16", "int32"):
            limits = np.iinfo(name)
            if limits.min <= low and high <= limits.max and (suffix != SUFFIX[2] or name[0] == "u"):
                return np.dtype(name)
    if suffix == SUFFIX[2]:
        raise UserError(
            f"Pictures hold whole numbers from 0 to 65535, not {low:g} to {high:g}. Scale them first."
        )
    return np.dtype("float32")


def _mapped(label: np.ndarray, values: dict[int, int], name: str) -> np.ndarray:
    """The label map of a case with other values; `UserError` for one that `values` does not have."""
    keys = np.array(sorted(values))
    if (foreign := np.setdiff1d(label, keys)).size:
        raise UserError(
            f"The label map of '{name}' has the values {foreign.tolist()}, which those of the training cases do not "
            f"have: {keys.tolist()}. Correct it, or name its class."
        )
    return np.array([values[key] for key in keys])[np.searchsorted(keys, label)]


def _msd(
    dataset: Dataset, values: dict[int, int], names: dict[str, list[str]], endings: Sequence[str]
) -> dict[str, Any]:
    """Keys of the Decathlon; regions, which it does not know, stand beside the labels that they are made of."""

    def files(key: str, name: str) -> str | list[str]:
        found = [f"./images{key}/{name}{ending}" for ending in endings]
        return found if len(found) > 1 else found[0]

    plain = (
        class_values(dataset)
        if not dataset.regions
        else {f"label {v}": (v,) for v in known_values(dataset)[1:]}
    )
    labels = {"0": dataset.label_names[0], **{str(values[v[0]]): name for name, v in plain.items()}}
    if dataset.ignore_value is not None:
        labels[str(values[dataset.ignore_value])] = IGNORE
    described: dict[str, Any] = {
        "name": dataset.name,
        "description": f"written by kanseg from {dataset.layout}",
        "tensorImageSize": "4D" if len(dataset.channel_names) > 1 else "3D",
        "modality": {str(i): name for i, name in enumerate(dataset.channel_names)},
        "labels": labels,
        "numTraining": len(names["Tr"]),
        "numTest": len(names["Ts"]),
        "training": [
            {"image": files("Tr", name), "label": f"./labelsTr/{name}{SUFFIX[dataset.spatial_dims]}"}
            for name in names["Tr"]
        ],
        "test": [
            files("Ts", name) if len(endings) == 1 else {"image": files("Ts", name)} for name in names["Ts"]
        ],
    }
    if dataset.regions:
        described["regions"] = {
            name: [values[v] for v in found] for name, found in class_values(dataset).items()
        }
        described["regions_class_order"] = [values[value] for value in dataset.label_values[1:]]
    return described


def _nnunet(
    dataset: Dataset, values: dict[int, int], names: dict[str, list[str]], endings: Sequence[str]
) -> dict[str, Any]:
    """Keys of nnU-Net v2."""
    mapped = {name: [values[value] for value in found] for name, found in class_values(dataset).items()}
    labels: dict[str, Any] = {dataset.label_names[0]: 0}
    labels |= mapped if dataset.regions else {name: found[0] for name, found in mapped.items()}
    if dataset.ignore_value is not None:
        labels[IGNORE] = values[dataset.ignore_value]
    described: dict[str, Any] = {
        "name": dataset.name,
        "channel_names": {str(i): name for i, name in enumerate(dataset.channel_names)},
        "labels": labels,
        "numTraining": len(names["Tr"]),
        "file_ending": SUFFIX[dataset.spatial_dims],
    }
    if dataset.regions:
        described["regions_class_order"] = [values[value] for value in dataset.label_values[1:]]
    return described


LAYOUTS = {"msd": Layout(False, False, _msd), "nnunet": Layout(True, True, _nnunet)}


def on_own_grid(image: Image, **changes: Any) -> Image:
    """An image whose grid is its affine, whatever the header of the file that it came from says."""
    return replace(image, path=Path(image.path.name).with_suffix(""), **changes)

"""Both sides of an evaluation: which files belong together, and how their label maps are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from kanseg.data.beside import is_beside
from kanseg.data.cases import few
from kanseg.data.colours import BLACK, colour_names, label_colours, numbered, require_classes
from kanseg.data.dicom import is_structures
from kanseg.data.images import CONVERSION, Image, colour_name, label_from, read_image
from kanseg.data.listing import image_files, segmentations_in
from kanseg.data.segmentations import read_segments, require_highdicom
from kanseg.data.suffixes import SEGMENTS, SUFFIXES_DICOM, stem_of, suffix_of
from kanseg.data.unlabelled import find_images, labels_in_case_folders
from kanseg.errors import UserError
from kanseg.evaluation.metrics import Label

ENDINGS = ("_mask", "_label", "_seg")
Reader = Callable[[Path, Image], Image]  # of a prediction, beside its reference


@dataclass
class Pairs:
    """Files of both sides by the name of their case.

    Attributes:
        read: how a prediction is read.
        codes: value of each colour in the references, and in the predictions; empty where they are numbers.
        classes: name -> value (or values, of a region) of the classes to score; empty where none are given.
    """

    references: dict[str, Path]
    predictions: dict[str, Path]
    read: Reader
    codes: Sequence[Mapping[int, int]] = ({}, {})
    classes: Mapping[str, Label] = field(default_factory=dict)
    _palette: dict[int, int] = field(default_factory=dict)

    @property
    def paired(self) -> list[Path]:
        """The predictions that have a reference."""
        return [path for name, path in self.predictions.items() if name in self.references]

    def reference(self, case: str) -> tuple[np.ndarray, Image]:
        """Label map (*S) and its image."""
        image = read_image(self.references[case])
        if not self.codes[0]:
            require_classes(image, self._palette)
        return _labels_in(image, self.codes[0]), image

    def prediction(self, case: str, reference: Image) -> tuple[np.ndarray, Image]:
        """Label map (*S) and its image; `UserError` where there is none, or none that can be read."""
        if case not in self.predictions:
            raise UserError("no prediction")
        image = self.read(self.predictions[case], reference)
        return _labels_in(image, self.codes[1]), image


def pair_files(
    reference: Path, prediction: Path, classes: Mapping[str, Label], segments: Mapping[str, int]
) -> Pairs:
    """Label maps of two folders (or files), by their names without suffix; see `kanseg.evaluation.folders`."""
    if segmentations_in(reference):
        raise UserError(
            f"{reference} holds {SEGMENTS}; references are label maps. {CONVERSION}, in its labelsTr."
        )
    single = {name: value for name, value in classes.items() if isinstance(value, int)}
    references = _label_maps(reference)
    predictions, read = _predictions(prediction, segments or single)
    references = _called_alike(references, predictions)
    predictions = _called_alike(predictions, references)
    if prediction.is_file() and reference.is_file():
        predictions = dict(zip(references, predictions.values(), strict=True))
    pairs = Pairs(references, predictions, read)
    known = colour_names(reference, reference.parent, prediction)
    by_colour = bool(single) and all(name[:1] == "#" or name in known.values() for name in single)
    colours = [label_colours(paths, coded=by_colour) for paths in (list(references.values()), pairs.paired)]
    if not classes and all(colours):  # they are numbered among themselves
        every = sorted(set[int]().union(*colours) - {BLACK})
        classes = single = {known.get(code, colour_name(code)): n for n, code in enumerate(every, start=1)}
    sides = zip((reference, prediction), colours, strict=True)
    codes = [_colour_values(side, there, segments or single, known) for side, there in sides]
    return replace(pairs, codes=codes, classes=classes)


def _colour_values(
    side: Path | str, colours: Sequence[int], values: Mapping[str, int], names: Mapping[int, str]
) -> dict[int, int]:
    """Value of each colour of the label maps of one side, {} where they are numbers.

    Args:
        values: of classes, by the names of colours in `names` or as the web writes them.
    """
    if not colours:
        return {}
    found = {code: values.get(names.get(code, ""), values.get(colour_name(code))) for code in colours}
    found[BLACK] = 0
    if missing := [colour_name(code) for code, value in found.items() if value is None]:
        example = ",".join(f"{name}={number}" for number, name in enumerate(missing[:2], start=1))
        raise UserError(
            f"{side} has the colours {few(missing, 5)}, and the other side numbers. Say which number each has: "
            f"--labels with the folder of a run that was trained on such labels, or '{example},...'."
        )
    return {code: value for code, value in found.items() if value is not None}


def _labels_in(image: Image, coded: Mapping[int, int] | None) -> np.ndarray:
    """The label map in an image, whose classes may be told by colours."""
    return numbered(image, coded) if coded else label_from(image)


def _predictions(prediction: Path, segments: Mapping[str, int]) -> tuple[dict[str, Path], Reader]:
    """Label maps by name, or DICOM-SEG, RTSTRUCT and .seg.nrrd where there are some, and how they are read."""
    files = segmentations_in(prediction)
    if not files:
        return _label_maps(prediction) if _any(prediction) else {}, lambda path, _: read_image(path)
    if prediction.is_dir() and (others := [p.name for p in image_files(prediction) if not is_beside(p)]):
        raise UserError(
            f"{prediction} holds {SEGMENTS} and label maps ({few(others, 3)}). Give one kind at a time."
        )
    if not segments:
        raise UserError(
            f"{prediction} is {SEGMENTS}, whose segments have names and no values. Say which value of the "
            "references each has: --labels with the run folder, or name=1,name=2."
        )
    if any(suffix_of(file) in SUFFIXES_DICOM and not is_structures(file) for file in files):
        require_highdicom(prediction)
    return {_stem(stem_of(path)): path for path in files}, partial(_laid_on, segments)


def _label_maps(path: Path) -> dict[str, Path]:
    """Label maps by name, each file for itself: one numbered _0000 may be the frame of a video."""
    files = [file for file in image_files(path) if not is_beside(file)] if path.is_dir() else []
    if path.is_dir() and not files and (labels := labels_in_case_folders(path)):
        return labels
    if not files:
        return {_stem(case.id): case.images[0] for case in find_images(path)}
    return {_stem(stem_of(file)): file for file in files}


def _called_alike(maps: Mapping[str, Path], others: Mapping[str, Path]) -> dict[str, Path]:
    """Label maps, those called as their images are (x_0000) without that number where the other side has x."""
    short = {name: name.removesuffix("_0000") for name in maps}
    return {
        short[name] if name not in others and short[name] in others else name: path
        for name, path in maps.items()
    }


def _laid_on(segments: Mapping[str, int], path: Path, target: Image) -> Image:
    """A DICOM-SEG, RTSTRUCT or .seg.nrrd as a label map on the grid of another one."""
    values = np.array([0, *segments.values()])
    return replace(target, array=values[read_segments(path, target, list(segments))][None], path=path)


def _any(folder: Path) -> bool:
    """Whether there is any prediction at all: an empty folder is a folder of failures, a missing one a mistake."""
    return not folder.is_dir() or any(path.is_file() for path in folder.iterdir())


def _stem(name: str) -> str:
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return name

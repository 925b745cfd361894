"""What a prediction puts beside its label map, found again by names and headers: maps of probability and doubt."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from kanseg.data.images import read_description
from kanseg.data.suffixes import SUFFIXES_SEGMENTS, stem_of, suffix_of

NIFTI = ".nii.gz"
NAMED = re.compile(r"_prob_|_uncertainty$")  # names of what a prediction puts beside its label map
UNCERTAINTY = "uncertainty, 0 to 1"
PROBABILITY = re.compile(r"probability of (region|class) (\d+), painted as (\d+)")


def probability_path(path: Path, names: Sequence[str], number: int) -> Path:
    """Where the probability of a class lies beside its label map: <id>_prob_<class><suffix>, its signs as _.

    Names that are alike then have the number of the class before them.
    """
    safe = ["".join(c if c.isalnum() else "_" for c in name) for name in names]
    alike = [name.lower() for name in safe].count(safe[number].lower()) > 1
    return _beside(path, f"_prob_{f'{number}_' * alike}{safe[number]}{suffix_of(path)}")


def _beside(path: Path, ending: str) -> Path:
    """What ends as an object of DICOM would, or as segments of 3D Slicer, has maps that are NIfTI."""
    suffix = suffix_of(path)
    if suffix in SUFFIXES_SEGMENTS:
        ending = ending.replace(suffix, NIFTI)
    return path.with_name(path.name[: -len(suffix)] + ending)


def uncertainty_path(path: Path) -> Path:
    """Where the uncertainty lies beside a label map."""
    return _beside(path, f"_uncertainty{suffix_of(path)}")


def is_beside(path: Path) -> bool:
    """Whether a file is a map that a prediction put beside its label map, by its name and its header."""
    if not NAMED.search(stem_of(path)):
        return False
    said = read_description(path)
    return said == UNCERTAINTY or PROBABILITY.fullmatch(said) is not None


def remove_beside(path: Path) -> None:
    """Remove the maps beside a label map: they do not belong to one that is made anew."""
    stem = path.name[: -len(suffix_of(path))]
    for file in path.parent.glob(f"{glob.escape(stem)}_*"):
        if file.name.startswith((f"{stem}_prob_", f"{stem}_uncertainty.")) and is_beside(file):
            file.unlink()


def find_probabilities(path: Path) -> tuple[list[Path], list[int], bool] | None:
    """Maps beside a label map, in the order of the classes, the value of each, and whether they are regions."""
    suffix = suffix_of(path)
    stem = f"{path.name[: -len(suffix)]}_prob_"
    found = []
    for file in path.parent.iterdir():
        said = PROBABILITY.fullmatch(read_description(file)) if file.name.startswith(stem) else None
        if said and suffix_of(file) == suffix:
            found.append((int(said[2]), file, int(said[3]), said[1] == "region"))
    found.sort()
    if not found or [number for number, *_ in found] != list(range(len(found))):
        return None
    return [file for _, file, *_ in found], [value for *_, value, _ in found], found[0][3]

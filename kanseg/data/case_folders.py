"""Folders of one case each, where files are called by what they show: NAME/NAME-t1c.nii.gz beside NAME/NAME-seg.nii.gz.

So BraTS has a file for each channel, KiTS `imaging` and `segmentation`. A name is what is left of a file's without what
all files of its folder begin with; capitals do not count.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kanseg.data.suffixes import stem_of

CASE_LABEL = re.compile(r"label|mask|seg|segmentation")
SIGNS = "-_. "  # between the words of a name
UNNAMED = ("image",)  # the channel of cases whose only images have no name in common


@dataclass(frozen=True)
class CaseFolder:
    """Files of a folder: label maps, and the others by their names."""

    labels: Sequence[Path]
    others: Mapping[str, Path]


def look_into(files: Iterable[Path]) -> CaseFolder:
    """What the images of a folder are called."""
    stems = {file: stem_of(file).lower() for file in files}
    shared = os.path.commonprefix(list(stems.values()))  # noqa: RUF071 (of letters)
    start = 1 + max(shared.rfind(sign) for sign in SIGNS)
    labels = [file for file, stem in stems.items() if CASE_LABEL.fullmatch(stem[start:])]
    return CaseFolder(labels, {stem[start:]: file for file, stem in stems.items() if file not in labels})


def usual_channels(folders: Iterable[CaseFolder]) -> tuple[str, ...]:
    """The names that the images of most folders with one label map have, in the order of the alphabet.

    `UNNAMED` where each has one image, whatever it is called; () where there is no such folder, or no agreement.
    """
    labelled = [tuple(sorted(found.others)) for found in folders if len(found.labels) == 1 and found.others]
    if not labelled:
        return ()
    names, count = Counter(labelled).most_common(1)[0]
    if 2 * count > len(labelled):
        return names
    return UNNAMED if all(len(own) == 1 for own in labelled) else ()


def by_channel(files: Iterable[Path], names: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Files whose names end with that of a channel, of several the longest: {what stands before it: {channel: file}}.

    >>> by_channel([Path("a-t1.nii"), Path("a-gd_t1.nii"), Path("a-seg.nii")], ["T1", "gd_T1"])
    {'a': {'T1': PosixPath('a-t1.nii'), 'gd_T1': PosixPath('a-gd_t1.nii')}}
    """
    found: dict[str, dict[str, Path]] = {}
    for file in files:
        stem = stem_of(file)
        fitting = [n for n in names if re.search(rf"(^|[{SIGNS}]){re.escape(n)}$", stem, re.IGNORECASE)]
        if fitting:
            name = max(fitting, key=len)
            found.setdefault(stem[: len(stem) - len(name)].rstrip(SIGNS), {})[name] = file
    return found


def of_one_case(files: Iterable[Path], names: Sequence[str]) -> dict[str, Path]:
    """The files of a folder by channel."""
    return {name: file for one in by_channel(files, names).values() for name, file in one.items()}


def is_called_label(file: Path) -> bool:
    """Whether a file's name ends as that of a label map."""
    return bool(re.search(rf"(^|[{SIGNS}])({CASE_LABEL.pattern})$", stem_of(file), re.IGNORECASE))

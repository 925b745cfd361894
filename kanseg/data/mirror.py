"""Axes that an image may be mirrored along: in training as a random change, in prediction to average over (TTA).

Mirroring is right where what comes out could be an image too and its labels still mean the same. Pictures under a
microscope have no side; a body has: its front, its top, its heart on the left. So pictures are mirrored unless told
otherwise, volumes only where somebody who knows them says so, and nothing whose labels tell left from right is
mirrored from side to side.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from kanseg.errors import UsageError

SIDES = {"left": "right", "lh": "rh", "l": "r"}
NONE = "none"
AXES = {
    2: "0 (up and down), 1 (left and right)",
    3: "0 (left and right), 1 (back and front), 2 (feet and head)",
}
SIDEWAYS = {2: 1, 3: 0}  # the axis from the left to the right
DEFAULT = {2: (0, 1), 3: ()}


def parse_mirror(text: str | None) -> list[int] | None:
    """Axes from the command line; None where nothing was said.

    >>> parse_mirror("0,2"), parse_mirror("none"), parse_mirror(None)
    ([0, 2], [], None)
    """
    if text is None or text.strip().lower() == NONE:
        return None if text is None else []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise UsageError(f"--mirror '{text}' is no list of axes such as 0 or 0,1,2, nor {NONE}.")
    axes = sorted({int(part) for part in parts})
    if axes[-1] > 2:
        raise UsageError(f"--mirror {axes[-1]}: the axes of 3D images are {AXES[3]}, or {NONE}.")
    return axes


def mirror_axes(image_dims: int, label_names: Sequence[str], asked: Sequence[int] | None) -> list[int]:
    """Axes of the image to mirror along: what is asked for, else those of its kind of image.

    Raises:
        UsageError: no such axis, or labels that would exchange their meaning.
    """
    sides, sideways = pairs_of_sides(label_names), SIDEWAYS[image_dims]
    if asked is None:
        return [axis for axis in DEFAULT[image_dims] if not sides]
    if beyond := [axis for axis in asked if not 0 <= axis < image_dims]:
        raise UsageError(
            f"--mirror {beyond[0]}: the axes of {image_dims}D images are {AXES[image_dims]}, or {NONE}."
        )
    if sides and sideways in asked:
        left, right = sides[0]
        raise UsageError(
            f"--mirror {sideways} would show '{left}' where '{right}' is ({len(sides)} such pairs of labels). Leave "
            f"that axis away, or give both sides one label."
        )
    return sorted(asked)


def pairs_of_sides(names: Sequence[str]) -> list[tuple[str, str]]:
    """Names that differ by the side alone.

    >>> pairs_of_sides(["kidney_left", "kidney_right", "Left lung", "spleen"])
    [('kidney_left', 'kidney_right')]
    """
    words = {tuple(_words(name)): name for name in names}
    pairs = []
    for key, name in words.items():
        other = tuple(SIDES.get(word, word) for word in key)
        if other != key and other in words:
            pairs.append((name, words[other]))
    return pairs


def axes_of_network(axes: Sequence[int], slice_axis: int | None) -> list[int]:
    """Axes of the image -> axes of a network that sees slices across `slice_axis`; that one is lost.

    >>> axes_of_network([0, 2], 1)
    [0, 1]
    """
    return [axis - (slice_axis is not None and axis > slice_axis) for axis in axes if axis != slice_axis]


def why_mirror(image_dims: int, label_names: Sequence[str], axes: Sequence[int]) -> str:
    """A sentence for the plan: along which axes of the image, and what that means."""
    if axes:
        return f"mirrored along the axes {list(axes)} of the image in training, and by --tta in prediction"
    if sides := pairs_of_sides(label_names):
        return f"never mirrored: labels tell the sides apart, e.g. '{sides[0][0]}' and '{sides[0][1]}'"
    return (
        "never mirrored: the sides of a body differ. Where they do not, plan with --mirror, e.g. --mirror 0 "
        f"of {AXES[image_dims]}"
    )


def _words(name: str) -> list[str]:
    """Words of a name in lower case, also of one written leftLung.

    >>> _words("Left-Lung_2"), _words("leftLung")
    (['left', 'lung', '2'], ['left', 'lung'])
    """
    return re.findall(r"[a-z]+|\d+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())

"""Labels that are pictures in colour: a colour for each class, or the numbers of a palette that all files share."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kanseg.data.images import (
    FULL,
    LOSSY,
    MOST_COLOURS,
    NUMBERS,
    Image,
    colour_codes,
    colour_name,
    in_colour,
    load_image,
    suffix_of,
)
from kanseg.errors import UserError

BLACK = 0


def label_colours(paths: Sequence[Path]) -> tuple[int, ...]:
    """The colours that tell classes apart in label files, black first; () where numbers do, or nothing can.

    Colours do where some file has several without a palette, or with one whose numbers are no classes.
    """
    if not any(map(in_colour, paths)):
        return ()
    found, palette, coded = {BLACK}, dict[int, int](), False
    for path in (path for path in paths if suffix_of(path) not in LOSSY):
        with contextlib.suppress(UserError):  # whoever reads it for good says what is wrong
            image = load_image([path])
            if image.array.max() > FULL:
                return ()
            codes = colour_codes(image.array)
            found.update(np.unique(codes).tolist())
            coded |= len(image.labels) > 1 and bool((image.array != image.array[0]).any())
            coded |= no_classes(image, palette) is not None
        if len(found) > MOST_COLOURS:
            return ()
    return tuple(sorted(found)) if coded else ()


def require_classes(image: Image, palette: dict[int, int]) -> None:
    """Raise `UserError` for a label with a palette whose numbers are no classes; see `no_classes`."""
    if why := no_classes(image, palette):
        raise UserError(
            f"{image.path} has a palette whose numbers are no classes: {why}. Save all labels with one palette and a "
            f"black background, or without a palette; {NUMBERS}."
        )


def no_classes(image: Image, palette: dict[int, int]) -> str | None:
    """Why the numbers of a label's palette are no classes, or None.

    Programs that save bytes number the colours of each file as they like. What gives a number two colours, or black,
    the background, another number than 0 (but 255), was written by one.

    Args:
        palette: number -> colour in the labels before, which learns those of this one.
    """
    if image.indices is None:
        return None
    numbers, places = np.unique(image.indices.astype(int), return_index=True)
    colours = colour_codes(image.array).flat[places]
    for number, colour in zip(numbers.tolist(), colours.tolist(), strict=True):
        if palette.setdefault(number, colour) != colour:
            return f"{number} is {colour_name(colour)} there and {colour_name(palette[number])} in a label before it"
    black = [number for number, colour in palette.items() if colour == BLACK and number != FULL]
    first = palette.get(0, BLACK)
    return f"black is {black[0]}, and 0 is {colour_name(first)}" if black and first != BLACK else None


def numbered(image: Image, colours: Sequence[int]) -> np.ndarray:
    """The label map (*S) of a picture: a colour is its place in `colours`."""
    return np.searchsorted(colours, colour_codes(image.array)).astype(np.int32)

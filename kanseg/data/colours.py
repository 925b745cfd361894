"""Labels that are pictures in colour: a colour for each class, or the numbers of a palette that all files share."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kanseg.data.images import FULL, MOST_COLOURS, NUMBERS, Image, colour_codes, colour_name, load_image
from kanseg.data.pictures import in_colour
from kanseg.data.suffixes import LOSSY, suffix_of
from kanseg.data.tables import columns_named, read_rows, text_of
from kanseg.errors import UserError

BLACK = 0
LABELMAP, CLASS_DICT = "labelmap.txt", "class_dict.csv"
COLOUR_COLUMNS = (("name", "class", "label"), ("r", "red"), ("g", "green"), ("b", "blue"))


def label_colours(paths: Sequence[Path], *, coded: bool = False) -> tuple[int, ...]:
    """The colours that tell classes apart in label files, black first; () where numbers do, or nothing can.

    Colours do where some file has several without a palette, or with one whose numbers are no classes.

    Args:
        coded: it is known that those of a palette do.
    """
    if not any(map(in_colour, paths)):
        return ()
    found, palette = {BLACK}, dict[int, int]()
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


def numbered(image: Image, values: Mapping[int, int]) -> np.ndarray:
    """The label map (*S) of a picture: each colour has its value."""
    colours, places = np.unique(colour_codes(image.array), return_inverse=True)
    if foreign := [colour_name(colour) for colour in colours.tolist() if colour not in values]:
        known = ", ".join(map(colour_name, values))
        raise UserError(
            f"{image.path} has the colours {', '.join(foreign[:5])}; known are {known}. Correct it."
        )
    return np.array([values[c] for c in colours.tolist()], np.int32)[places].reshape(image.array.shape[1:])


def colour_names(*folders: Path) -> dict[int, str]:
    """What the colours of labels are called by a table in the first of the folders that has one.

    Tables are CVAT's labelmap.txt (lines name:r,g,b:...) and class_dict.csv (columns name, r, g, b). Black is always
    the background.
    """
    for folder in folders:
        found: list[Sequence[str]] = []
        if (file := folder / LABELMAP).is_file():
            parts = (line.split(":") for line in text_of(file).splitlines() if line[:1] != "#")
            found = [(part[0], *part[1].split(",")) for part in parts if len(part) > 1]
        elif (file := folder / CLASS_DICT).is_file() and (rows := read_rows(file)):
            columns = [(columns_named(rows[0], *names) or [""])[0] for names in COLOUR_COLUMNS]
            found = [[row.get(column, "") for column in columns] for row in rows]
        if found:
            return _by_code(file, found)
    return {}


def _by_code(file: Path, rows: Sequence[Sequence[str]]) -> dict[int, str]:
    try:
        codes = [(int(r) << 16 | int(g) << 8 | int(b), name.strip()) for name, r, g, b in rows]
    except ValueError as error:
        raise UserError(
            f"{file} is to name colours, and has a line that is no name with red, green and blue. Correct it, or take "
            "it away."
        ) from error
    names = dict(code for code in codes if code[0] != BLACK)
    if len(set(names.values()) - {""}) < len(names):
        raise UserError(f"{file} gives several colours one name, or none. Give each a name of its own.")
    return names

"""How sure a prediction is: the entropy of a voxel, and the Dice that the probabilities themselves expect.

Sources: Shannon entropy of the mean probability, which for an ensemble counts doubt within and between its members
(Lakshminarayanan et al., arXiv 1612.01474); the expected Dice is that of a mask and independent voxels of the given
probabilities, to first order, as in soft Dice. Both are as good as the probabilities: a network that is surely wrong is
not found out.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kanseg.errors import UserError
from kanseg.files import SURROGATES, in_turn, write_text

COLUMNS = ("case", "class", "volume_ml", "expected_dice", "low", "high", "uncertainty", "notes")
QUALITY = "quality.csv"


@dataclass
class Doubt:
    """How sure a label map is.

    Attributes:
        entropy: (*S) float32, 0 where one class is certain, 1 where all are alike; of regions the largest of theirs.
        rows: class, volume_ml, expected_dice and uncertainty (mean entropy within) of each class but the background;
            None where the class was not found.
    """

    entropy: np.ndarray
    rows: list[dict[str, Any]]


def _information(chance: np.ndarray) -> np.ndarray:
    """-p log p, 0 where p is."""
    made = np.maximum(chance, 1e-30, dtype=np.float32)
    np.log(made, out=made)
    made *= -chance
    return made


def doubt(
    chances: Iterable[np.ndarray],
    labels: np.ndarray,
    values: Sequence[int],
    names: Sequence[str],
    *,
    regions: bool,
    spacing: Sequence[float],
) -> Doubt:
    """What the probabilities of all classes, one map (*S) after the other, say of the label map (*S) they led to.

    Args:
        regions: whether each map but the first is a region by itself, which may overlap others.
        spacing: mm of a voxel; 2D images count as 1 mm thick.
    """
    voxel = math.prod(spacing[: labels.ndim]) / 1000
    entropy, rows, masks = np.zeros(labels.shape, np.float32), [], []
    for number, (chance, value, name) in enumerate(zip(chances, values, names, strict=True)):
        if not regions:
            entropy += _information(chance)
        elif number:
            np.maximum(entropy, _information(chance) + _information(1 - chance), out=entropy)
        if number == 0:
            continue
        mask = (chance > 0.5) & (labels != values[0]) if regions else labels == value
        size = int(mask.sum())
        expected = 2 * float(chance[mask].sum()) / (size + float(chance.sum())) if size else None
        rows.append({"class": name, "volume_ml": size * voxel, "expected_dice": expected})
        masks.append(np.packbits(mask))
    entropy = np.clip(entropy / math.log(2 if regions else len(values)), 0, 1)
    for row, packed in zip(rows, masks, strict=True):
        inside = entropy.ravel()[np.unpackbits(packed, count=entropy.size).astype(bool)]
        row["uncertainty"] = float(inside.mean()) if inside.size else None
    return Doubt(entropy, rows)


def expected_in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for a screen; what has no interval is the network's own word."""
    told = (
        f"{row['class']} "
        + ("not found" if row["expected_dice"] is None else f"{row['expected_dice']:.3f}")
        + (f" [{row['low']:.3f}, {row['high']:.3f}]" if row.get("low") is not None else "")
        for row in rows
    )
    known = any(row.get("low") is not None for row in rows)
    return f"expected Dice{'' if known else ' (not calibrated)'}: {', '.join(told)}"


def read_quality(path: Path) -> list[dict[str, Any]]:
    """Rows of the table of a folder, none where there is no table.

    Raises:
        UserError: it is another table.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors=SURROGATES) as stream:
        reader = csv.DictReader(stream)
        if not {"case", "class", "expected_dice"} <= {*(reader.fieldnames or ())} <= {*COLUMNS}:
            raise UserError(f"{path} is another table than that of predictions. Choose another folder.")
        rows = list(reader)
    if any(None in row or None in row.values() for row in rows):
        raise UserError(f"{path} is damaged: a line has other columns than the first. Correct or remove it.")
    return rows


def keep_quality(path: Path, case: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put the rows of a case into the table at `path`, in place of older ones of the same case; atomically, and
    after another process that does the same.
    """
    new = [{"case": case, **{key: _shown(value) for key, value in row.items()}} for row in rows]
    with in_turn(path.parent):
        kept = [row for row in read_quality(path) if row["case"] != case]
        write_text(path, _table([*kept, *new]))


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: row["case"]))
    return text.getvalue()


def _shown(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value

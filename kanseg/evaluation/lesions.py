"""Lesions: connected pieces of a class, found or missed as wholes.

A lesion of the reference is found where a voxel of the prediction lies in it; a predicted piece without a voxel of the
reference is false. Voxels that touch by a corner belong together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

COUNTS = ("lesions", "lesions_found", "pieces", "pieces_false")
RATES = ("sensitivity", "precision", "f1", "false_per_case")


def lesion_counts(prediction: np.ndarray, reference: np.ndarray) -> dict[str, int]:
    """Numbers of pieces of two masks (*S): lesions of the reference and how many are found, pieces and false ones.

    >>> lesion_counts(np.array([1, 1, 0, 0, 1, 0, 0, 0]) > 0, np.array([0, 1, 0, 1, 0, 0, 0, 1]) > 0)
    {'lesions': 3, 'lesions_found': 1, 'pieces': 2, 'pieces_false': 1}
    """
    touching = np.ones((3,) * reference.ndim)
    (ours, pieces), (theirs, lesions) = (ndimage.label(mask, touching) for mask in (prediction, reference))
    both = prediction & reference
    found, right = (len(np.unique(numbers[both])) for numbers in (theirs, ours))
    return {"lesions": lesions, "lesions_found": found, "pieces": pieces, "pieces_false": pieces - right}


def summarize_lesions(rows: Sequence[Mapping[str, Any]], drawn: np.ndarray) -> dict[str, dict[str, Any]]:
    """Counts over all cases and what follows of them, by label, with bootstrap intervals.

    sensitivity = found / lesions, precision = right / pieces, f1 = their harmonic mean, false_per_case = false pieces a
    case. What has no lesion, or no piece, to divide by is None.

    Args:
        rows: of each case and label, with `lesion_counts`.
        drawn: numbers of cases in each resample, (resamples, cases).
    """
    summary: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["label"] for row in rows):
        counts = np.array([[row[key] for key in COUNTS] for row in rows if row["label"] == name], float)
        rates = _rates(counts.sum(0), len(counts))
        resampled = _rates(counts[drawn].sum(1), len(counts))
        summary[name] = dict(zip(COUNTS, counts.sum(0).astype(int).tolist(), strict=True))
        for key, value, values in zip(RATES, rates.T, resampled.T, strict=True):
            known = values[np.isfinite(values)]
            summary[name][key] = (
                {"value": float(value), "ci95": np.percentile(known, (2.5, 97.5)).tolist()}
                if np.isfinite(value)
                else None
            )
    return summary


def _rates(counts: np.ndarray, cases: int) -> np.ndarray:
    """`RATES` of sums of counts, (..., 4) -> (..., 4); NaN where there is nothing to divide by."""
    lesions, found, pieces, false = np.moveaxis(counts, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        sensitivity, precision = found / lesions, (pieces - false) / pieces
        f1 = 2 * sensitivity * precision / (sensitivity + precision)
    f1 = np.where((sensitivity == 0) & (precision == 0), 0.0, f1)
    return np.stack([sensitivity, precision, f1, false / cases], axis=-1)


def lesion_lines(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each class."""
    lines = []
    for name, found in summary.items():
        shown = {key: "-" if found[key] is None else _with_interval(found[key]) for key in RATES}
        lines.append(
            f"{name}: {found['lesions_found']} of {found['lesions']} lesions found "
            f"(sensitivity {shown['sensitivity']}), {found['pieces_false']} of {found['pieces']} pieces false "
            f"(precision {shown['precision']}), "
            f"F1 {shown['f1']}, false pieces a case {shown['false_per_case']}"
        )
    return lines


def _with_interval(rate: Mapping[str, Any]) -> str:
    low, high = rate["ci95"]
    return f"{rate['value']:.2f} [{low:.2f}, {high:.2f}]"

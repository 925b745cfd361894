"""Whether a label map can be trusted, told without a reference: its likely Dice, and what is unlike the training.

The Dice that a network's own probabilities expect is put into a line that was fitted on cases which it had not seen,
where the true Dice is known; how far those were from it gives the interval. Where no line tells the Dice of cases of
other folds better than the mean does, the estimate is the mean, and no case is doubtful. Intensities and volumes are
compared with the ranges of the training cases. A network that is surely wrong about an image like all others is not
found out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from kanseg.data.fingerprint import FAR
from kanseg.data.labels import Labels, class_values, value_counts
from kanseg.data.transforms import highest
from kanseg.progress import in_figures

if TYPE_CHECKING:
    from kanseg.inference.predict import Part, Prediction

PERCENTILES = (1, 50, 99)  # of the intensities of a channel, as the network sees them
SAMPLED = 100_000  # intensities of a channel
# Of the range of the training cases, and of a channel's: how far out a percentile is unlike.
BEYOND, LEAST = 0.5, 0.1
COVERED = 0.9  # of unseen cases lie in the interval
DOUBTFUL = 0.05  # of unseen cases had a lower estimate than one that is doubtful
FEWEST = 10  # cases of a class that a line is fitted to
Fit = Callable[[np.ndarray, np.ndarray], tuple[float, float]]  # (said, true) -> slope, intercept


@dataclass
class Verdict:
    """What is told of a label map.

    Attributes:
        rows: class, volume_ml, expected_dice, low and high of each class but the background; None where not known.
        notes: what is unlike the training, in words.
        doubtful: why its likely Dice is low, in words, or "".
    """

    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    doubtful: str = ""

    def unsure(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take over what `kanseg.inference.uncertainty.doubt` tells; a Dice by other cases is not replaced."""
        known = {row["class"]: {k: v for k, v in row.items() if v is not None} for row in self.rows}
        self.rows = [{**row, **known.get(row["class"], {})} for row in rows]

    def table(self) -> list[dict[str, Any]]:
        """Rows for quality.csv: the notes of a case are in each."""
        said = "; ".join(filter(None, (self.doubtful, *self.notes)))
        return [{**row, "notes": said} for row in self.rows]


def expected_dice(predicted: Prediction) -> np.ndarray:
    """Dice that the probabilities expect of each class but the background, (K - 1,); NaN where it is not found.

    On the network's grid, before post-processing and at temperature 1; of several networks the mean.
    """
    return mean_known([_expected(replace(part, temperature=1.0)) for part in predicted.parts])


def mean_known(values: Any) -> np.ndarray:
    """Mean of (N, K) over those that are numbers, (K,); NaN where none is.

    >>> mean_known([[1.0, np.nan, np.nan], [3.0, 4.0, np.nan]])
    array([ 2.,  4., nan])
    """
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    return np.where(count, np.where(known, values, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def _expected(part: Part) -> list[float]:
    labels = None if part.plan.regions else highest(part.logits)
    told = []
    for number in range(1, len(part.logits)):
        chance = part.chance(number)
        mask = chance > 0.5 if labels is None else labels == number
        size, total = int(mask.sum()), float(chance.sum())
        told.append(2 * float(chance[mask].sum()) / (size + total) if size else math.nan)
    return told


def intensities(predicted: Prediction) -> np.ndarray:
    """`PERCENTILES` of each channel as the first network sees it, (C, 3)."""
    random = np.random.default_rng(0)
    flat = predicted.parts[0].item["image"].as_tensor().flatten(1).numpy()
    if flat.shape[1] > SAMPLED:
        flat = flat[:, random.integers(0, flat.shape[1], SAMPLED)]
    return np.percentile(flat, PERCENTILES, axis=1).T


def volumes(labels: np.ndarray, spacing: Sequence[float], plan: Labels) -> np.ndarray:
    """ml of each class but the background in a label map (*S) as predictions are, (K - 1,); pictures are 1 mm thick."""
    counts = value_counts(labels)
    voxel = math.prod(spacing[: labels.ndim]) / 1000
    return np.array([voxel * sum(counts.get(v, 0) for v in own) for own in class_values(plan).values()])


@dataclass(frozen=True)
class Unseen:
    """Cases that their network had not seen.

    Attributes:
        expected: (N, K - 1), see `expected_dice`.
        dice: (N, K - 1), the true one, after post-processing.
        volumes: (N, K - 1), of the references, in ml.
        intensities: (N, C, 3), see `intensities`.
        fold: (N,) that each case was held out in.
    """

    expected: np.ndarray
    dice: np.ndarray
    volumes: np.ndarray
    intensities: np.ndarray
    fold: np.ndarray


def fit_quality(cases: Unseen, names: Sequence[str]) -> dict[str, Any]:
    """What `judge` needs, with errors of estimates that were made without the case's own fold.

    Returns:
        "cases", "intensities" (lowest, highest of each channel), "doubtful" (mean estimate of a case that `DOUBTFUL` of
        the unseen were below), and of each of the "classes" "volume_ml" (least, most), and where `FEWEST` cases allow
        it "slope", "intercept", "below" and "above" (of the interval, from the estimate), "n", and of the estimates by
        other folds "mae", "spearman" and "covered" (share of true Dice within their intervals).
    """
    told = np.full(cases.expected.shape, np.nan)
    classes: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(names):
        sizes = cases.volumes[:, number]
        classes[name] = {"volume_ml": [float(sizes.min()), float(sizes.max())]}
        known = ~np.isnan(cases.expected[:, number])
        said, true, fold = cases.expected[known, number], cases.dice[known, number], cases.fold[known]
        others = [int((fold != one).sum()) for one in np.unique(fold)]
        if known.sum() < FEWEST or min(others) < FEWEST // 2 or len(others) < 2:
            continue
        tried = [(*_crossed(said, true, fold, fit), fit) for fit in (_level, _line)]
        apart, within, fit = min(tried, key=lambda one: float(np.square(true - one[0]).sum()))
        slope, intercept = fit(said, true)
        told[known, number] = apart if slope else intercept
        below, above = _reach(true - apart)
        varied = slope > 0 and np.ptp(apart) > 0 and np.ptp(true) > 0
        classes[name] |= {
            "slope": slope,
            "intercept": intercept,
            "below": below,
            "above": above,
            "n": len(said),
            "mae": float(np.abs(true - apart).mean()),
            "spearman": float(spearmanr(apart, true).statistic) if varied else None,
            "covered": float(within.mean()),
        }
    lines = any(one.get("slope") for one in classes.values())
    means = [float(np.nanmean(row)) for row in told if not np.isnan(row).all()]
    return {
        "cases": len(cases.dice),
        "intensities": [cases.intensities.min(0).tolist(), cases.intensities.max(0).tolist()],
        "doubtful": float(np.quantile(means, DOUBTFUL)) if means and lines else None,
        "classes": classes,
    }


def _crossed(said: np.ndarray, true: np.ndarray, fold: np.ndarray, fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Estimates (N,) by lines of the other folds, and whether the true Dice lies within their intervals."""
    apart, within = np.empty(len(said)), np.empty(len(said), bool)
    for one in np.unique(fold):
        own = fold == one
        line = fit(said[~own], true[~own])
        below, above = _reach(true[~own] - _along(line, said[~own]))
        apart[own] = _along(line, said[own])
        within[own] = (below <= true[own] - apart[own]) & (true[own] - apart[own] <= above)
    return apart, within


def _level(said: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """The mean, whatever was said."""
    return 0.0, float(true.mean())


def _line(said: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Slope and intercept by least squares; the slope is never negative, for doubt never raises the Dice."""
    spread = float(((said - said.mean()) ** 2).sum())
    slope = max(0.0, float(((said - said.mean()) * true).sum()) / spread) if spread > 0 else 0.0
    return slope, float(true.mean() - slope * said.mean())


def _along(line: tuple[float, float], said: np.ndarray) -> np.ndarray:
    return np.clip(line[0] * said + line[1], 0, 1)


def _reach(misses: np.ndarray) -> tuple[float, float]:
    """Between which `COVERED` of further misses lie, by the ranks of these; of few the least and the most."""
    share = (1 - COVERED) / 2
    rank = max(0, math.floor(share * (len(misses) + 1)) - 1)
    ranked = np.sort(misses)
    return float(ranked[rank]), float(ranked[-1 - rank])


def judge(predicted: Prediction, labels: np.ndarray, quality: Mapping[str, Any]) -> Verdict:
    """What is told of the label map (*S) of a prediction.

    Args:
        quality: of `fit_quality`.
    """
    plan = predicted.parts[0].plan
    sizes = volumes(labels, predicted.source.spacing, plan)
    notes = _unlike(intensities(predicted), quality["intensities"], plan.channel_names)
    rows: list[dict[str, Any]] = []
    unit, factor = ("pixels", 1000) if plan.image_dims == 2 else ("ml", 1)
    for name, size, said in zip(plan.label_names[1:], sizes, expected_dice(predicted), strict=True):
        known = quality["classes"].get(name, {})
        row = {"class": name, "volume_ml": float(size), "expected_dice": None, "low": None, "high": None}
        if size and "slope" in known and not math.isnan(said):
            dice = float(_along((known["slope"], known["intercept"]), np.array(said)))
            low, high = (float(np.clip(dice + known[end], 0, 1)) for end in ("below", "above"))
            row |= {"expected_dice": dice, "low": low, "high": high}
        rows.append(row)
        least, most = known.get("volume_ml", (0, math.inf))
        if plan.ignore_value is not None:  # the training was annotated in parts: volumes there are no sizes
            continue
        if size * FAR < least or size > FAR * most:
            ends = " to ".join(in_figures(end * factor) for end in (least, most))
            found = f"has {in_figures(size * factor)} {unit}" if size else "was not found"
            notes.append(f"{name} {found}, in the training cases it has {ends}")
    return Verdict(rows, notes, _doubt(rows, quality["doubtful"]))


def _unlike(found: np.ndarray, seen: Sequence[Any], names: Sequence[str]) -> list[str]:
    """A note for each channel (C, 3) with a percentile far outside those of the training; the farthest is told."""
    low, high = np.array(seen)
    if low.shape != found.shape:
        return []
    beyond = np.maximum(low - found, found - high)
    beyond -= np.maximum(BEYOND * (high - low), LEAST * (high[:, -1:] - low[:, :1]))
    notes = []
    for channel, name in enumerate(names):
        at = int(beyond[channel].argmax())
        if beyond[channel, at] > 0:
            notes.append(
                f"channel {name} is unlike the training: percentile {PERCENTILES[at]} of its normalised intensities is "
                f"{found[channel, at]:.2f}, there {low[channel, at]:.2f} to {high[channel, at]:.2f}"
            )
    return notes


def _doubt(rows: Sequence[Mapping[str, Any]], least: float | None) -> str:
    told = [row for row in rows if row["expected_dice"] is not None]
    if least is None or not told:
        return ""
    mean = np.mean([row["expected_dice"] for row in told])
    lowest = min(told, key=lambda row: row["expected_dice"])
    if mean >= least:
        return ""
    which = f" ({lowest['class']} {lowest['expected_dice']:.2f})" if len(told) > 1 else ""
    return f"expected Dice {mean:.2f}{which} is lower than of {1 - DOUBTFUL:.0%} of unseen training cases"

"""What cross-validation learns for predictions without a reference, from cases that their network has not seen.

fold_*/calibration/ID.safetensors keeps what is needed of each held-out case, calibration.json of a run what all of them
tell: see `kanseg.inference.calibration` and `kanseg.inference.quality`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from kanseg.data.cases import few
from kanseg.data.plan import Plan
from kanseg.files import make_folder, write_bytes, write_json
from kanseg.inference.calibration import CALIBRATION, Sample, calibrate, draw_sample
from kanseg.inference.predict import Prediction
from kanseg.inference.quality import Unseen, expected_dice, fit_quality, intensities, mean_known
from kanseg.progress import note
from kanseg.training.run_folder import Splits

COLUMNS = ("dice", "reference_volume_ml")  # of scores
CASES = "calibration"  # folder of a fold
Observed = tuple[Sample, np.ndarray, np.ndarray]  # with the expected Dice, (K - 1,), and intensities, (C, 3)


def observe(
    predicted: Prediction, labels: np.ndarray, reference: np.ndarray, case: str, folder: Path
) -> Path:
    """Keep of a held-out case what `conclude_calibration` needs; its label map and reference (*S) are at hand."""
    part = predicted.parts[0]
    sample = draw_sample(part, predicted.source.affine, labels, reference, part.plan, case)
    beside = {"expected_dice": expected_dice(predicted), "intensities": intensities(predicted)}
    return write_bytes(_file(make_folder(folder), case), save({**asdict(sample), **beside}))


def _file(folder: Path, case: str) -> Path:
    return folder / f"{case}.safetensors"


def _observed(path: Path) -> Observed | None:
    """What `observe` kept, None where there is nothing of the kind."""
    try:
        kept = load(path.read_bytes())
        beside = kept.pop("expected_dice"), kept.pop("intensities")
        return Sample(**kept), *beside
    except (OSError, SafetensorError, TypeError, ValueError, KeyError):
        return None


def conclude_calibration(
    folder: Path, plan: Plan, rows: Sequence[Mapping[str, Any]], splits: Splits, runs: Sequence[Path]
) -> None:
    """Write calibration.json; none, and none stays, where a held-out case was not observed or one fold has them all.

    Args:
        rows: scores of the held-out cases, a row a case and class.
        runs: whose networks predicted them; of several there is no temperature, for each has its own.
    """
    names = plan.label_names[1:]
    scores = {(row["case"], row["label"]): row for row in rows}
    # Where folds share cases, the last one's label map is scored, see `held_out`.
    fold_of = {case: n for n, fold in enumerate(splits) for case in fold["val"] if (case, names[0]) in scores}
    files = {case: [_file(run / f"fold_{n}" / CASES, case) for run in runs] for case, n in fold_of.items()}
    found = {case: [one for file in own if (one := _observed(file))] for case, own in files.items()}
    missing = [case for case, several in found.items() if len(several) < len(runs)]
    if missing or len({*fold_of.values()}) < 2:
        if missing:
            note(
                "Probabilities are not calibrated, and predictions tell no Dice to expect: folds of an earlier "
                f"version kept nothing for it of {few(missing)}. Train those folds anew for it."
            )
        (folder / CALIBRATION).unlink(missing_ok=True)
        return
    told: dict[str, Any] = {}
    samples: dict[int, list[Sample]] = {}
    for case, several in found.items():
        if len(several[0][0].weight):
            samples.setdefault(fold_of[case], []).append(several[0][0])
    if len(runs) == 1 and len(samples) > 1:
        told = calibrate(list(samples.values()), names, bool(plan.regions))
    columns = {key: [[scores[case, name][key] for name in names] for case in found] for key in COLUMNS}
    cases = Unseen(
        expected=np.array([mean_known([one[1] for one in several]) for several in found.values()]),
        dice=np.array(columns["dice"]),
        volumes=np.array(columns["reference_volume_ml"]),
        intensities=np.array([several[0][2] for several in found.values()]),
        fold=np.array(list(fold_of.values())),
    )
    write_json(folder / CALIBRATION, {**told, "quality": fit_quality(cases, names)})

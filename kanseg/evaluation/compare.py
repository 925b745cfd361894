"""Is A better than B? Paired differences of the same cases, with intervals and a test, a class and a metric.

Patients are drawn and tested as wholes where they are known. Tests are Wilcoxon's signed-rank tests; with several
classes their p values are corrected by Holm's method within a metric.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import wilcoxon

from kanseg.data.fingerprint import load_fingerprint
from kanseg.data.image_classes import read_classes
from kanseg.errors import UsageError, UserError
from kanseg.evaluation.class_tables import find_table, is_predictions
from kanseg.evaluation.classification import answers, evaluate_classes, read_scored
from kanseg.evaluation.folders import evaluate_folders
from kanseg.evaluation.metrics import METRICS, RESAMPLES, bootstrap_interval
from kanseg.evaluation.report import LONGEST, Whole, short, told_apart
from kanseg.files import (
    SURROGATES,
    make_folder,
    parse_json,
    read_json,
    temporary_folder,
    write_bytes,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from rich.table import Table

TABLES = ("cases.csv", "cross_validation.csv", "validation/predictions.csv", "predictions.csv")
ACCURACY = "accuracy"  # of classifiers: 1 for an image whose class is the likeliest, else 0
LOWER_IS_BETTER = ("hd95", "assd")
ALPHA = 0.05
LETTERS = 60  # of a path in the picture
FEWEST = 6  # patients; with fewer the smallest p that Wilcoxon's test can give, 2 / 2^n, is above ALPHA
Scores = dict[str, dict[str, dict[str, float]]]  # metric -> class -> case -> score


def compare(
    one: Path | str,
    other: Path | str,
    out: Path | str | None = None,
    *,
    reference: Path | str | None = None,
    groups: Mapping[str, str] | None = None,
    seed: int = 0,
    **how: Any,
) -> dict[str, Any]:
    """Compare two runs, two folders of scores, or, with their references, two folders of label maps.

    Args:
        out: folder for comparison.json, comparison.csv and comparison.png.
        reference: folder of references; then `one` and `other` hold label maps, or are tables of classifiers and it is
            the data set with the classes.
        groups: patient of each case; default what the runs' fingerprints say.
        how: labels, unions, segments, ignore, with `reference`; see `kanseg.evaluation.folders.evaluate_folders`.

    Returns:
        {"a", "b", "cases", "patients", "only_in_a", "only_in_b", "rows"}; a row has class, metric, mean_a, mean_b,
        difference (a - b), ci95 of it, p, p_holm, wins, losses (cases in which a is better, worse), better.

    Raises:
        UserError: no scores, or no case that both have.
    """
    if reference is None and how:
        raise UsageError(f"{', '.join(how)} go with label maps: give the reference, too.")
    first, second = (load_scores(path, reference, **how) for path in (one, other))
    if groups is None and reference is not None and find_table(Path(one)):
        classes = read_classes(reference)
        groups = {case.id: case.group for case in (*classes.cases, *classes.test_cases)}
    groups = groups or {**_groups(Path(other)), **_groups(Path(one))}
    cases = [_cases(scores) for scores in (first, second)]
    shared = sorted(cases[0] & cases[1])
    if not shared:
        raise UserError(
            f"{one} and {other} have no case in common, e.g. {min(cases[0])} and {min(cases[1])}. Compare predictions "
            "of the same cases."
        )
    rows = []
    for metric in (*METRICS, ACCURACY):
        pairs = {
            label: (column, second[metric][label])
            for label, column in first.get(metric, {}).items()
            if label in second.get(metric, {})
        }
        rows += _with_holm([_row(label, metric, pair, groups, seed) for label, pair in pairs.items()])
    if not rows:
        raise UserError(f"{one} and {other} have no class and metric in common.")
    result = {
        "a": str(one),
        "b": str(other),
        "cases": len(shared),
        "patients": len({groups.get(case, case) for case in shared}),
        "only_in_a": sorted(cases[0] - cases[1]),
        "only_in_b": sorted(cases[1] - cases[0]),
        "interval": f"95 % bootstrap interval of the mean difference, {RESAMPLES} resamples of patients, seed {seed}",
        "rows": rows,
    }
    if out is not None:
        folder = make_folder(Path(out))
        write_json(folder / "comparison.json", result)
        write_text(folder / "comparison.csv", _csv(rows))
        scatter = {label: (first["dice"][label], second["dice"][label]) for label in _classes(rows)}
        write_bytes(folder / "comparison.png", draw(result, scatter, shared))
    return result


def load_scores(path: Path | str, reference: Path | str | None = None, **how: Any) -> Scores:
    """Scores of every case: of a table, an evaluated folder, a run, or label maps with their references.

    A reference whose label map is missing or unreadable is no case.
    """
    path = Path(path)
    if reference is not None and (table := find_table(path)):
        if how:
            raise UsageError(f"{', '.join(how)} go with label maps; {table} is a table of classes.")
        with temporary_folder() as folder:
            evaluate_classes(table, Path(reference), Path(folder))
            return _of_classes(Path(folder) / TABLES[0])
    if reference is not None:
        with temporary_folder() as folder:
            failed = evaluate_folders(path, reference, folder, **how)["failed"]
            found = _from_table(Path(folder) / TABLES[0])
        for by_class in (column for metric in found.values() for column in metric.values()):
            for case in failed:  # counts as 0 in an evaluation, and tells nothing of a difference
                by_class.pop(case, None)
        if not _cases(found):
            raise UserError(f"{path} has no label map of a case of {reference}.")
        return found
    if path.is_file() and path.suffix.lower() == ".csv":
        return _from_table(path)
    path = _chosen(path)
    for name in TABLES:
        if (path / name).is_file():
            return _from_table(path / name)
    if tables := sorted(
        path.glob(f"fold_[0-9]*/{TABLES[2]}")
    ):  # of a classifier that is not cross-validated to its end
        if len(tables) > 1:
            raise UserError(
                f"{path} has several folds that are not pooled yet: kanseg train {path} -f all --resume."
            )
        return _of_classes(tables[0])
    summaries = sorted(path.glob("fold_*/summary.json")) or sorted(path.glob("summary.json"))
    scores: Scores = {}
    for file in summaries:
        for case, by_class in parse_json(file, "scores", "Train or evaluate again.", _dice_of_cases).items():
            for label, dice in by_class.items():
                scores.setdefault("dice", {}).setdefault(label, {})[case] = float(dice)
    if not scores:
        raise UserError(
            f"{path} holds no scores. Give a folder of `kanseg evaluate -o`, a run whose folds are validated, or label "
            "maps with --reference."
        )
    return _with_mean(scores)


def _dice_of_cases(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """case -> class -> Dice of a training's summary; that of an evaluation only counts its cases."""
    cases = summary.get("cases")
    return cases if isinstance(cases, dict) else {}


def _of_classes(file: Path) -> Scores:
    """Which images are right, in all ("mean") and of each class, whose mean is its recall."""
    table = read_scored(file)
    right = (answers(table.probabilities, multilabel=table.multilabel) == table.truth).mean(1)
    if not table.multilabel:
        right = np.floor(right)
    columns: dict[str, dict[str, float]] = {name: {} for name in table.names}
    for case, score, values in zip(table.ids, right, table.values, strict=True):
        for value in values:
            columns[table.names[value]][case] = float(score)
    there = {name: column for name, column in columns.items() if column and not table.multilabel}
    return {ACCURACY: {**there, "mean": dict(zip(table.ids, map(float, right), strict=True))}}


def _from_table(file: Path) -> Scores:
    if is_predictions(file):
        return _of_classes(file)
    scores: Scores = {}
    try:
        with file.open(newline="", encoding="utf-8", errors=SURROGATES) as stream:
            for row in csv.DictReader(stream):
                for metric in METRICS:
                    if row.get(metric):
                        by_class = scores.setdefault(metric, {}).setdefault(row["label"], {})
                        by_class[row["case"]] = float(row[metric])
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise UserError(
            f"{file} is no table of scores with the columns case, label, {', '.join(METRICS)}."
        ) from error
    if not scores:
        raise UserError(f"{file} holds no scores.")
    return _with_mean(scores)


def _with_mean(scores: Scores) -> Scores:
    """The class "mean": of each case over its classes, where there are several."""
    for by_class in scores.values():
        if len(by_class) > 1 and "mean" not in by_class:
            shared = set.intersection(*(set(column) for column in by_class.values()))
            by_class["mean"] = {
                case: float(np.mean([column[case] for column in by_class.values()])) for case in shared
            }
    return scores


def _cases(scores: Scores) -> set[str]:
    return {case for by_class in scores.values() for column in by_class.values() for case in column}


def _chosen(path: Path) -> Path:
    """The configuration that `kanseg run` chose, where the folder is one of those; else the folder itself."""
    choice = read_json(path / "choice.json")
    return path / str(choice.get("choice")) if choice else path


def _groups(path: Path) -> dict[str, str]:
    """Patient of each case, as the fingerprint of the run, or of the run that the folder belongs to, knows.

    Test images of classifiers are in no fingerprint; their tables know.
    """
    chosen, known = _chosen(path), {}
    tables = (path, *(chosen / name for name in TABLES), *sorted(chosen.glob(f"fold_[0-9]*/{TABLES[2]}")))
    if table := next((file for file in tables if is_predictions(file)), None):
        scored = read_scored(table)
        known = {case: one for case, one in zip(scored.ids, scored.groups, strict=True) if one != case}
    beside = sorted(chosen.parent.glob("*/")) if (chosen.parent / "choice.json").is_file() else []
    for folder in (chosen, chosen.parent, *beside):  # of an ensemble, that of any of its members
        if folder.is_dir() and (seen := load_fingerprint(folder)):
            return known | {case: entry["group"] for case, entry in seen["cases"].items()}
    return known


def _row(
    label: str,
    metric: str,
    pair: tuple[Mapping[str, float], Mapping[str, float]],
    groups: Mapping[str, str],
    seed: int,
) -> dict[str, Any]:
    """One class and metric, over the cases that both sides have."""
    cases = sorted(set(pair[0]) & set(pair[1]))
    first, second = (np.array([column[case] for case in cases]) for column in pair)
    difference = first - second
    patients = [groups.get(case, case) for case in cases]
    _, index = np.unique(patients, return_inverse=True)
    gain = -difference if metric in LOWER_IS_BETTER else difference
    return {
        "class": label,
        "metric": metric,
        "n": len(difference),
        "mean_a": float(first.mean()),
        "mean_b": float(second.mean()),
        "difference": float(difference.mean()),
        "ci95": bootstrap_interval(difference, patients, seed),
        "p": _p(np.bincount(index, difference) / np.bincount(index)),
        "wins": int((gain > 0).sum()),
        "losses": int((gain < 0).sum()),
    }


def _p(differences: np.ndarray) -> float:
    """Wilcoxon's signed-rank test of patients' differences; without any difference there is nothing to test."""
    return float(wilcoxon(differences).pvalue) if np.any(differences) else 1.0


def _with_holm(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add p_holm over the classes of a metric ("mean" is no further hypothesis), and which side is better."""
    classes = sorted((row for row in rows if row["class"] != "mean"), key=lambda row: row["p"])
    highest = 0.0
    for place, row in enumerate(classes):
        highest = max(highest, min(1.0, row["p"] * (len(classes) - place)))
        row["p_holm"] = highest
    for row in rows:
        row.setdefault("p_holm", row["p"])
        gain = -row["difference"] if row["metric"] in LOWER_IS_BETTER else row["difference"]
        row["better"] = "" if row["p_holm"] >= ALPHA else "a" if gain > 0 else "b"
    return rows


def _classes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [row["class"] for row in rows if row["metric"] == "dice"]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    flat = [{**row, "ci95": None, "low": row["ci95"][0], "high": row["ci95"][1]} for row in rows]
    columns = [key for key in flat[0] if key != "ci95"]
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def comparison_table(result: Mapping[str, Any]) -> Table:
    """For the terminal: a row a class and metric; the better side is marked where the test says so."""
    from rich.markup import escape
    from rich.table import Table

    several = result["patients"] < result["cases"]  # else each may count as one for want of knowledge
    of = f" of {result['patients']} patients" if several else ""
    counts = f"{result['cases']} cases{of}, 95 % intervals"
    title = escape(f"A = {result['a']}, B = {result['b']}\n{counts}")
    if (patients := result["patients"]) < FEWEST:
        title += f"\ntoo few patients for the test: its p is {min(1.0, 2 / 2**patients):.2g} at least"
    table = Table(title=title, title_justify="left")
    table.add_column("class", overflow="fold")  # alone gives way in a narrow terminal: no number is cut
    table.add_column("metric", no_wrap=True)
    for heading in ("A", "B", "A - B", "p\n(Holm)", "A\nwins"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["rows"]:
        digits = 2 if row["metric"] in LOWER_IS_BETTER else 4
        mean_a, mean_b = (f"{row[key]:.{digits}f}" for key in ("mean_a", "mean_b"))
        difference, low, high = (f"{value:+.{digits}f}" for value in (row["difference"], *row["ci95"]))
        table.add_row(
            escape(row["class"]),
            row["metric"],
            f"[bold]{mean_a}[/bold]" if row["better"] == "a" else mean_a,
            f"[bold]{mean_b}[/bold]" if row["better"] == "b" else mean_b,
            Whole(f"{difference} [{low}, {high}]"),
            f"{row['p_holm']:.2g}",
            f"{row['wins']}:{row['losses']}",
        )
    return table


def draw(
    result: Mapping[str, Any],
    scatter: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]],
    cases: Sequence[str],
) -> bytes:
    """PNG: Dice of A against B case by case (of classifiers accuracy by class), and mean differences with intervals."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["metric"] == "dice"] or result["rows"]
    figure = Figure(figsize=(10, max(3.8, 0.45 * len(rows) + 1.6)), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    told_apart(left)
    figure.suptitle(f"A: {short(result['a'], LETTERS)}    B: {short(result['b'], LETTERS)}", parse_math=False)
    for label, (first, second) in scatter.items():
        if label != "mean" or len(scatter) == 1:
            both = [case for case in cases if case in first and case in second]
            left.plot(
                [second[c] for c in both],
                [first[c] for c in both],
                ".",
                label=short(label, LONGEST),
                alpha=0.7,
            )
    name, point = ("Dice", "case") if scatter else (rows[0]["metric"], "class")
    if not scatter:
        each = [row for row in rows if row["class"] != "mean"] or rows
        left.plot([row["mean_b"] for row in each], [row["mean_a"] for row in each], ".", alpha=0.7)
    left.set_aspect("equal")
    left.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    title = f"each point is a {point}; above the line A is better"
    left.set(xlabel=f"{name} of B", ylabel=f"{name} of A", title=title)
    if scatter:
        left.legend()
    for place, row in enumerate(reversed(rows)):
        right.plot(row["ci95"], [place, place], color="black", linewidth=1)
        right.plot([row["difference"]], [place], "o", color="black")
    right.axvline(0, color="grey", linewidth=0.8)
    right.set_yticks(range(len(rows)), [short(row["class"], LONGEST) for row in reversed(rows)])
    right.set(xlabel=f"A - B ({name}), mean and 95 % interval")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()

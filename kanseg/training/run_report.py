"""The report of a run: what the data are, what was planned and why, how well it went on unseen cases, and at what cost.

RUN/report.md with the pictures in RUN/report/, and RUN/report.html, which is the same in one file.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from kanseg.data.cases import Case, Dataset, label_path
from kanseg.data.images import in_ras, label_from, read_image, read_label
from kanseg.data.labels import painted
from kanseg.data.plan import Plan
from kanseg.data.plans import dataset_of, load_plan
from kanseg.errors import UserError
from kanseg.evaluation.compare import FEWEST, Scores, compare, load_scores
from kanseg.evaluation.document import as_html, table
from kanseg.evaluation.report import (
    draw_agreement,
    draw_reliability,
    draw_scores,
    interval,
    limits_of_agreement,
    picture,
    score_rows,
)
from kanseg.files import SURROGATES, read_json, write_text
from kanseg.inference.calibration import CALIBRATION
from kanseg.inference.postprocess import apply_postprocessing
from kanseg.progress import in_figures
from kanseg.training.class_report import ClassReport
from kanseg.training.cross_validation import RESULT, TABLE
from kanseg.training.run_folder import PLAN, PREDICTIONS, SUMMARY, read_splits, stages
from kanseg.training.told import CLASSES, PICTURES, Told
from kanseg.training.validate import kept_prediction

MARKDOWN, HTML = "report.md", "report.html"
CHOICE = "choice.json"  # of a run of the pipeline
ALL, WORST = 30, 10  # rows that are shown; of up to ALL cases all
MOST_COLUMNS = 6  # classes of a table of cases
REMARK = (
    "Scores are of cases that the network which predicted them has not seen in training, after post-processing. "
    "Post-processing was chosen by the same cases. kanseg is research software, not a medical device."
)
MEANING = (
    "Dice, IoU and NSD are 1 at best, HD95 is 0. HD95: the 95th percentile of the distances from one surface to the "
    "other, or back, whichever is larger. NSD: the share of both surfaces within the distance in brackets."
)


@dataclass
class Configuration:
    """One configuration of a run: the folder of its cross-validation, and what stands there."""

    name: str
    folder: Path

    @cached_property
    def result(self) -> dict[str, Any]:
        found = read_json(self.folder / RESULT) or {}
        if not {"metrics", "cases", "postprocessing"} <= found.keys():
            raise UserError(
                f"{self.folder / RESULT} is damaged. kanseg train {self.folder} -f all --resume writes it anew."
            )
        return found

    @cached_property
    def scores(self) -> Scores:
        return load_scores(self.folder / TABLE)

    @cached_property
    def volumes(self) -> dict[str, np.ndarray]:
        """Of each class, (2, cases): of the predictions, and of the references, in ml."""
        found: dict[str, list[list[float]]] = {}
        with (self.folder / TABLE).open(newline="", encoding="utf-8", errors=SURROGATES) as stream:
            for row in csv.DictReader(stream):
                both = [float(row["volume_ml"]), float(row["reference_volume_ml"])]
                found.setdefault(row["label"], []).append(both)
        return {name: np.array(rows).T for name, rows in found.items()}

    @cached_property
    def calibration(self) -> dict[str, Any]:
        """What is told without a reference, and how well; empty where nothing was learnt of it."""
        return read_json(self.folder / CALIBRATION) or {}

    @property
    def folds(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("fold_*") if path.is_dir())

    def prediction(self, case: Case, plan: Plan) -> Path:
        """The label map of an unseen case."""
        folders = [self.folder, *self.folds]
        paths = (kept_prediction(folder / PREDICTIONS, case, plan) for folder in folders)
        found = next((path for path in paths if path.exists()), None)
        if found is None:
            raise UserError(f"{self.folder} has no prediction of {case.id}.")
        return found

    def dice(self) -> Mapping[str, float]:
        """Mean Dice of each case."""
        by_class = self.scores["dice"]
        return by_class.get("mean") or next(iter(by_class.values()))


def write_report(run: Path | str, dataset: Dataset | None = None) -> Path:
    """Write the report of a run of `kanseg run`, or of `kanseg train -f all`, anew; report.html is returned.

    Args:
        dataset: that the run was planned for; default it is read.

    Raises:
        UserError: the folder holds no plan.
    """
    run = Path(run)
    places = [run, *sorted(path for path in run.iterdir() if path.is_dir())] if run.is_dir() else []
    planned = [path for path in places if (path / PLAN).exists()]
    if not planned:
        raise UserError(f"{run} holds no plan.json, so there is nothing to report. Give the folder of a run.")
    firsts = [first for path in planned for first in stages(path)[1:]]  # of cascades, which are no choice
    planned = list(dict.fromkeys([*planned, *firsts]))
    plan = load_plan(planned[0] / PLAN)
    dataset = dataset or dataset_of(plan, planned[0])
    found = [path for path in places if path not in firsts and (path / RESULT).exists()]
    told: Told = (
        _Report(run, planned, plan, dataset, [Configuration(path.name, path) for path in found])
        if isinstance(plan, Plan)
        else ClassReport(run, planned, plan, dataset)
    )
    text = "\n\n".join(told.parts()) + "\n"
    write_text(run / MARKDOWN, text)
    return write_text(run / HTML, as_html(text, run))


@dataclass
class _Report(Told):
    """The report of networks that segment."""

    found: Sequence[Configuration]

    @cached_property
    def chosen(self) -> Configuration | None:
        name = (read_json(self.run / CHOICE) or {}).get("choice")
        return next((one for one in self.found if one.name == name), self.found[0] if self.found else None)

    def results(self) -> Iterator[str]:
        """Scores of every configuration, and cases of the chosen one as pictures."""
        yield from self.scored()
        if self.chosen:
            yield from self.cases(self.chosen)
            yield from self.trust(self.chosen)

    def summary(self) -> Iterator[str]:
        """What came out, in a few lines."""
        if self.chosen is None:
            yield "Not validated: there is one patient, or the cross-validation is not done."
        else:
            low, high = self.chosen.result["metrics"]["mean"]["dice"]["ci95"]
            mean = self.chosen.result["metrics"]["mean"]["dice"]["mean"]
            by = " chosen by the Dice of unseen cases" if len(self.found) > 1 else ""
            yield (
                f"**{self.chosen.name}**{by}: mean Dice **{mean:.3f}** [{low:.3f}, {high:.3f}] over "
                f"{self.chosen.result['cases']} unseen cases (95 % interval by patient)."
            )
        yield f"Predict: `kanseg predict -m {self.run} -i IMAGES -o OUT`"
        yield REMARK

    def scored(self) -> Iterator[str]:
        """Scores of every configuration, and how far the others are from the chosen one."""
        if not self.found:
            return
        yield "## Cross-validation"
        if len(self.found) > 1 and self.chosen:
            yield from self._against()
        for one in self.found:
            result = one.result
            yield f"### {one.name}"
            yield f"{result['cases']} unseen cases, mean [95 % interval by patient]:"
            scored = sum(len((read_json(fold / SUMMARY) or {}).get("cases") or {}) for fold in one.folds)
            if scored > result["cases"]:
                yield (
                    f"**Not all are among them:** {scored} cases have scores now. `kanseg train RUN -f all --resume` "
                    "pools them."
                )
            yield table(*score_rows(result["metrics"] | result.get("unions", {}), self.plan.unit))
            rules = (
                "; ".join(_rule(rule, self.plan) for rule in result["postprocessing"]) or "none that helps"
            )
            yield f"Post-processing: {rules} (mean Dice without it: {result['dice_without_postprocessing']:.4f})."
            for fold, message in result.get("failed", {}).items():
                yield f"**Fold {fold} failed:** {message}"
        yield MEANING

    def _against(self) -> Iterator[str]:
        assert self.chosen is not None
        rows, patients = [], FEWEST
        for one in self.found:
            dice = interval(one.result["metrics"]["mean"]["dice"])
            difference = ["", ""]
            if one is not self.chosen:
                found = compare(one.folder, self.chosen.folder)
                row = next(row for row in reversed(found["rows"]) if row["metric"] == "dice")
                patients = found["patients"]
                difference = [f"{row['difference']:+.3f} {_range(row['ci95'])}", f"{row['p']:.2g}"]
            rows.append([f"**{one.name}**" if one is self.chosen else one.name, dice, *difference])
        yield table(["configuration", "mean Dice", f"difference to {self.chosen.name}", "p (Wilcoxon)"], rows)
        if patients < FEWEST:
            yield f"{patients} patients are too few for the test: its p is {2 / 2**patients:.2g} at least."

    def cases(self, one: Configuration) -> Iterator[str]:
        """Dice by case, and pictures of the best, the middle and the worst."""
        yield f"## Cases ({one.name})"
        dice = {name: list(column.values()) for name, column in one.scores["dice"].items()}
        draw_scores(dice, self.run / PICTURES / "dice.png")
        yield f"![Dice of every case by class](./{PICTURES}/dice.png)"
        yield "Each point is a case. Boxes reach from quartile to quartile, with the median inside."
        yield from self.agreement(one)
        ranked = sorted(one.dice(), key=one.dice().__getitem__)
        few = len(ranked) if len(ranked) <= ALL else WORST
        yield (
            f"### The {few} worst of {len(ranked)} cases"
            if few < len(ranked)
            else "### The worst cases first"
        )
        yield self._worst(one, ranked[:few])
        yield f"All scores and volumes, a row a case and class: `{(one.folder / TABLE).relative_to(self.run)}`"
        known = {case.id: case for case in self.dataset.cases}
        for name, case in _examples(ranked).items():
            file = f"./{PICTURES}/{name.replace(' ', '_')}.png"
            yield f"### {name.capitalize()} case: {case}, mean Dice {one.dice()[case]:.3f}"
            self._draw(one, known[case], self.run / file)
            yield f"![Image, reference and prediction of {case}]({file})"

    def agreement(self, one: Configuration) -> Iterator[str]:
        """Volumes (of pictures areas) of the predictions beside those of the references."""
        flat = self.plan.image_dims == 2  # whose pixels are taken for mm3
        what, unit = ("area", "pixels") if flat else ("volume", "ml")
        volumes = {name: both * (1000 if flat else 1) for name, both in one.volumes.items()}
        if next(iter(volumes.values())).shape[1] < 2:
            return
        yield f"### {what.capitalize()}s"
        yield (
            f"Prediction less reference, case by case, in {unit}. 95 % limits of agreement (Bland and Altman): mean "
            "difference ± 1.96 standard deviations."
        )
        rows = []
        for name, (said, true) in list(volumes.items())[:CLASSES]:
            numbers = (true.mean(), said.mean(), (said - true).mean(), *limits_of_agreement(said - true))
            mean, other, difference, low, high = map(in_figures, numbers)
            rows.append([name, mean, other, difference, f"{low} to {high}"])
        heading = [
            "class",
            f"reference, mean ({unit})",
            f"prediction, mean ({unit})",
            "difference",
            "95 % limits",
        ]
        yield table(heading, rows)
        shown = dict(list(volumes.items())[:MOST_COLUMNS])
        draw_agreement(shown, self.run / PICTURES / f"{what}s.png", what=what, unit=unit)
        yield f"![Difference of {what}s over their mean, a point a case](./{PICTURES}/{what}s.png)"

    def trust(self, one: Configuration) -> Iterator[str]:
        """How well probabilities hold, and how well the Dice is told without a reference."""
        parts = [one] if one.calibration.get("classes") else [part for part in self.found if part is not one]
        for part in parts:
            known = part.calibration
            if not known.get("classes"):
                continue
            yield f"### Calibration of probabilities ({part.name})"
            rows = []
            for name, errors in list(known["classes"].items())[:CLASSES]:
                cells = (f"{error:.4f}" for key in ("ece_near", "ece") for error in errors[key])
                rows.append([name, *cells])
            yield (
                f"Logits are divided by {known['temperature']:.3f}, the temperature with the least negative "
                f"log-likelihood of {known['voxels']} voxels of {known['cases']} unseen cases, before they become the "
                "probabilities of `--probabilities` and `--uncertainty`; label maps stay as they are. Expected "
                "calibration errors after it are by temperatures of the other folds "
                f"({', '.join(f'{t:.3f}' for t in known['temperatures'])}). Negative log-likelihood a voxel: "
                f"{known['nll'][0]:.5f} before, {known['nll'][1]:.5f} after."
            )
            yield table(["class", "error near structures", "after", "of whole images", "after"], rows)
            file = f"./{PICTURES}/reliability_{part.name}.png"
            draw_reliability({n: c["curve"] for n, c in known["classes"].items()}, self.run / file)
            yield f"![Reliability of probabilities near structures: {part.name}](./{quote(file[2:])})"
        fitted = {
            name: one_class
            for name, one_class in one.calibration.get("quality", {}).get("classes", {}).items()
            if "slope" in one_class
        }
        if not fitted:
            return
        yield f"### Dice without a reference ({one.name})"
        yield (
            "`kanseg predict` tells the Dice that is to be expected of each class, with an interval for 90 % of cases, "
            "and names doubtful ones. Here each case was estimated by the other folds. Where no rank correlation "
            "stands, probabilities told no more than the mean Dice does: the estimate is that mean."
        )
        rows = []
        for name, line in list(fitted.items())[:CLASSES]:
            rank = "" if line["spearman"] is None else f"{line['spearman']:.2f}"
            rows.append([name, line["n"], f"{line['mae']:.3f}", rank, f"{line['covered']:.0%}"])
        yield table(["class", "cases", "mean error", "rank correlation", "within their interval"], rows)

    def _worst(self, one: Configuration, cases: Sequence[str]) -> str:
        where = {
            case: number for number, fold in enumerate(read_splits(self.planned[0])) for case in fold["val"]
        }
        classes = [name for name in one.scores["dice"] if name != "mean"]
        few = classes if 1 < len(classes) <= MOST_COLUMNS else []
        rows: list[list[Any]] = []
        for case in cases:
            by_class = {name: one.scores["dice"][name][case] for name in classes}
            lowest = min(by_class, key=by_class.__getitem__)
            patient = [self.groups.get(case, case)] if self.patients_known else []
            rows.append([case, *patient, where.get(case, ""), f"{one.dice()[case]:.3f}"])
            if len(classes) > 1:
                rows[-1] += [f"{by_class[name]:.3f}" for name in few] or [f"{lowest} {by_class[lowest]:.3f}"]
            rows[-1].append(f"{np.mean([one.scores['hd95'][name][case] for name in classes]):.1f}")
        columns = few or (["lowest class"] if len(classes) > 1 else [])
        columns = ["case", *["patient"] * self.patients_known, "fold", "mean Dice", *columns]
        return table([*columns, f"mean HD95 ({self.plan.unit})"], rows)

    def _draw(self, one: Configuration, case: Case, path: Path) -> None:
        image = read_image(case.images, self.plan.image_dims)
        reference = painted(read_label(label_path(case), self.plan.image_dims), self.plan)
        prediction = label_from(read_image(one.prediction(case, self.plan), self.plan.image_dims))
        prediction = apply_postprocessing(prediction, one.result["postprocessing"], image.spacing)
        colours = self.plan.image_dims == 2 and len(image.array) == 3
        shown = np.moveaxis(image.array, 0, -1) if colours else in_ras(image, image.array[0])[0]
        (reference, spacing), (prediction, _) = (in_ras(image, labels) for labels in (reference, prediction))
        what: dict[str, Any] = {
            "spacing": spacing,
            "label_names": self.plan.label_names,
            "label_values": self.plan.label_values,
        }
        picture(shown, reference, prediction, path, **what)

    def data(self) -> Iterator[str]:
        """Layout, sizes, classes, and what the doctor found."""
        plan, summary = self.plan, self.plan.fingerprint
        yield "## Data"
        rows = [
            ["source", f"{plan.data} ({self.dataset.layout})"],
            ["cases", f"{len(self.dataset.cases)} labelled images {self.of_patients(self.dataset.cases)}"],
            ["channels", ", ".join(plan.channel_names)],
        ]
        physical = [("spacing", "mm")] if plan.image_dims == 3 else []
        dots = "voxels" if plan.image_dims == 3 else "pixels"
        for key, unit in [("size", dots if physical else f"{dots} (height x width)"), *physical]:
            parts = (f"{name} {' x '.join(f'{v:g}' for v in summary[key][name])}" for name in summary[key])
            rows.append([key, f"{', '.join(parts)} {unit}"])
        yield table(["what", "found"], rows)
        voxels = summary.get("voxels", {})
        names = list(zip(plan.label_names, plan.label_values, strict=True))
        yield table(
            ["class", "value", f"median {dots}"],
            [[name, value, voxels.get(name, "")] for name, value in names[: CLASSES + 1]],
        )
        if len(names) > CLASSES + 1:
            yield f"{len(names) - CLASSES - 1} more classes are in plan.json."
        yield from self.findings()


def _range(limits: Sequence[float]) -> str:
    return f"[{limits[0]:.3f}, {limits[1]:.3f}]"


def _rule(rule: Mapping[str, Any], plan: Plan) -> str:
    """A rule of post-processing in words."""
    names = dict(zip(plan.label_values, plan.label_names, strict=True))
    labels = [names.get(value, str(value)) for value in rule["labels"]]
    what = ["the largest piece stays"] if rule.get("largest") else []
    size = f"{rule.get('min_mm3') or 0:g} {'mm3' if plan.image_dims == 3 else 'pixels'}"
    what += [f"pieces below {size} go"] if rule.get("min_mm3") else []
    what += ["holes are filled"] if rule.get("fill_holes") else []
    whole = len(labels) == len(plan.label_names) - 1 > 1
    return f"of {'all classes together' if whole else ', '.join(labels)} {' and '.join(what)}"


def _examples(ranked: Sequence[str]) -> dict[str, str]:
    """The best, the middle and the worst cases by name of the place; each once."""
    places = {"worst": 0, "second worst": 1, "median": len(ranked) // 2, "best": len(ranked) - 1}
    once = {at: name for name, at in places.items() if at < len(ranked)}
    return {name: ranked[at] for at, name in once.items()}

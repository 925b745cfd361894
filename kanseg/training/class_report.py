"""The report of a classifier: scores of held-out images with intervals, each class, the confusion, and the mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from kanseg.data.cases import Case
from kanseg.data.class_plan import ClassPlan
from kanseg.data.image_classes import ImageClasses
from kanseg.data.images import in_ras, read_image
from kanseg.errors import UserError
from kanseg.evaluation.class_pictures import draw_confusion, draw_images, draw_roc, roc
from kanseg.evaluation.class_tables import THRESHOLD
from kanseg.evaluation.classification import (
    SCORES,
    TOP,
    Scored,
    answers,
    confusion,
    shown_classes,
    shown_scores,
)
from kanseg.evaluation.document import table
from kanseg.evaluation.report import short
from kanseg.files import read_json
from kanseg.training.cross_validation import RESULT, pool_classes
from kanseg.training.run_folder import SUMMARY
from kanseg.training.told import CLASSES, PICTURES, Told

MISTAKES, CONFUSED = 12, 10  # pictures, and rows of a table
WORDS = {
    "accuracy": "accuracy",
    "exact": "all answers right",
    "top5": f"top-{TOP} accuracy",
    "balanced_accuracy": "balanced accuracy (mean recall)",
    "auc": "AUC (mean of the classes)",
}
REMARK = (
    "Scores are of images that the network which predicted them has not seen in training. kanseg is research software, "
    "not a medical device."
)
CHOSEN = (
    "The best epoch of each training was chosen by these images, which makes their scores a little too good; test "
    "images of their own would not be."
)


class ClassReport(Told):
    """See `kanseg.training.run_report.write_report`."""

    plan: ClassPlan
    dataset: ImageClasses

    @cached_property
    def metric(self) -> str:  # type: ignore[override]
        """Of the validations."""
        return self.plan.metric

    @property
    def curve(self) -> str:  # type: ignore[override]
        """Its words."""
        return f"{'mean AUC' if self.plan.multilabel else 'accuracy'} of validation images"

    score = "accuracy of held-out images"
    most_named = 20
    part = "classification"

    def trained_score(self, summary: Mapping[str, Any]) -> str:
        """Accuracy of the held-out images, and how many there are."""
        return f"{summary['accuracy']:.3f} of {summary['images']}" if "accuracy" in summary else ""

    @cached_property
    def scored(self) -> Scored | None:
        """The held-out images, None where no fold is done."""
        try:
            return pool_classes(self.run, self.dataset)
        except UserError:
            return None

    @cached_property
    def folds(self) -> list[dict[str, Any]]:
        """Summaries of the trainings that are done."""
        found = (read_json(folder / SUMMARY) for folder in self.trainings)
        return [one for one in found if one and one.get("images")]

    @cached_property
    def tested(self) -> bool:
        """Whether the scored images are the test images of the data."""
        return any(one.get("held_out") == "test" for one in self.folds)

    def results(self) -> Iterator[str]:
        """Scores, classes and mistakes of the held-out images."""
        if self.scored is not None:
            yield from self.scores(self.scored)
            yield from self.classes(self.scored)
            yield from self.mistakes(self.scored)

    def summary(self) -> Iterator[str]:
        """What came out, in a few lines."""
        if self.scored is None:
            yield f"No training is done, so nothing is scored. Go on: `kanseg train {self.run} -f all --resume`"
            return
        accuracy = shown_scores(self.result, 3)["accuracy"]
        yield f"Accuracy **{accuracy}** of {self.result['images']} {self._kind()} (95 % interval by patient)."
        yield f"Predict: `kanseg predict -m {self.run} -i IMAGES -o OUT`"
        yield REMARK
        if not self.tested:
            yield CHOSEN

    def _kind(self) -> str:
        several = f", by the mean probability of {len(self.folds)} networks" if len(self.folds) > 1 else ""
        return f"test images{several}" if self.tested else "unseen images of validation"

    @cached_property
    def result(self) -> dict[str, Any]:
        """Scores of all held-out images, with intervals."""
        assert self.scored is not None
        return self.scored.scores()

    def scores(self, scored: Scored) -> Iterator[str]:
        """Every score with its interval, and its spread over the folds."""
        yield "## Scores"
        yield f"{self.result['images']} {self._kind()}, [95 % interval by patient]:"
        spread = {name: [one[name] for one in self.folds if one.get(name) is not None] for name in SCORES}
        several = len(self.folds) > 1
        rows = []
        for name, shown in shown_scores(self.result, 3).items():
            rows.append([WORDS[name], shown])
            if several:
                rows[-1].append(f"{np.mean(spread[name]):.3f} ± {np.std(spread[name]):.3f}")
        yield table(
            ["score", "all together", *(["mean ± deviation over the folds"] if several else [])], rows
        )
        if self.plan.multilabel:
            yield f"A class is said to be there from a probability of {THRESHOLD} on."
        else:
            chance = scored.probabilities.max(1).mean()
            yield (
                f"Mean probability of the answers: {chance:.3f}; {self.result['accuracy']:.3f} of them are right. The "
                "closer these two, the more the probabilities say."
            )
        for fold, message in (read_json(self.run / RESULT) or {}).get("failed", {}).items():
            yield f"**Fold {fold} failed:** {message}"

    def classes(self, scored: Scored) -> Iterator[str]:
        """Recall, precision and AUC of each class, the confusion matrix, and ROC curves."""
        yield "## Classes"
        heading, rows = shown_classes(self.result)
        if len(rows) > CLASSES:  # the lowest recalls are worth a look
            known = self.result["classes"]
            rows.sort(key=lambda row: known[row[0]]["recall"] if known[row[0]]["recall"] is not None else 2.0)
            yield f"The {CLASSES} of {len(rows)} classes with the lowest recall:"
        yield table(heading, rows[:CLASSES])
        if any("-" in row for row in rows[:CLASSES]):
            yield "-: nothing to tell it by, as no image has the class, or none is said to have it."
        if not self.plan.multilabel:
            yield from self._confusion(scored)
        each = zip(scored.names, scored.probabilities.T, scored.truth.T, strict=True)
        if (
            len(scored.names) == 2 and not self.plan.multilabel
        ):  # the curve of one is that of the other, turned
            each = zip(scored.names[1:], scored.probabilities.T[1:], scored.truth.T[1:], strict=True)
        curves = {name: found for name, chances, truth in each if (found := roc(chances, truth))}
        if curves:
            draw_roc(curves, self.run / PICTURES / "roc.png")
            yield "### ROC curves, each class against the rest"
            yield f"![ROC curves](./{PICTURES}/roc.png)"

    def _confusion(self, scored: Scored) -> Iterator[str]:
        truth = np.array([one[0] for one in scored.values])
        counts = confusion(scored.probabilities, truth, len(scored.names))
        draw_confusion(counts, scored.names, self.run / PICTURES / "confusion.png")
        yield "### Confusion matrix"
        yield f"![Images by true and predicted class](./{PICTURES}/confusion.png)"
        wrong = counts - np.diag(np.diag(counts))
        most = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED]
        pairs = [divmod(int(place), len(counts)) for place in most if wrong.flat[place]]
        if pairs and len(scored.names) > 2:
            yield "Most often confused:"
            rows = [
                [
                    scored.names[one],
                    scored.names[other],
                    wrong[one, other],
                    f"{wrong[one, other] / counts[one].sum():.1%}",
                ]
                for one, other in pairs
            ]
            yield table(["true class", "predicted as", "images", "of the true class"], rows)

    def mistakes(self, scored: Scored) -> Iterator[str]:
        """The images that it is most surely wrong about."""
        how: dict[str, Any] = {"multilabel": self.plan.multilabel}
        wrong = answers(scored.probabilities, **how) & ~scored.truth
        if self.plan.multilabel:  # also what is there, and was not said
            wrong |= ~answers(scored.probabilities, **how) & scored.truth
        sure = np.where(wrong, np.abs(scored.probabilities - scored.truth), -1.0)
        if not self.plan.multilabel:
            sure = np.where(wrong, scored.probabilities, -1.0)
        missed = int(wrong.any(1).sum())
        yield "## Mistakes"
        if not missed:
            yield "There is none."
            return
        ranked = np.argsort(-sure.max(1), kind="stable")[: min(MISTAKES, missed)]
        yield f"The {len(ranked)} most confident of {missed} images with a wrong answer:"
        known = {case.id: case for case in (*self.dataset.cases, *self.dataset.test_cases)}
        images, captions, rows = [], [], []
        for place in ranked:
            name, answer = scored.ids[place], int(sure[place].argmax())
            chance, truth = scored.probabilities[place], scored.values[place]
            there = ", ".join(f"{scored.names[k]} ({chance[k]:.2f})" for k in truth) or "none"
            said = f"{scored.names[answer]} ({chance[answer]:.2f})"
            rows.append([name, *[scored.groups[place]] * self.patients_known, said, there])
            if name in known:
                images.append(self._thumbnail(known[name]))
                lines = [short(name, 34), f"predicted {short(said, 28)}", f"true {short(there, 32)}"]
                captions.append("\n".join(lines))
        if images:
            draw_images(images, captions, self.run / PICTURES / "mistakes.png")
            yield f"![The most confident mistakes](./{PICTURES}/mistakes.png)"
        columns = ["image", *["patient"] * self.patients_known]
        yield table([*columns, "wrong answer (probability)", "true class (its probability)"], rows)

    def _thumbnail(self, case: Case) -> np.ndarray:
        """A picture of an image: in colours where it has them, of a volume the middle axial slice."""
        if self.dataset.arrays or self.dataset.spatial_dims == 2:
            array = self.dataset.read(case)
            if array.ndim == 4:
                return np.asarray(array[0, array.shape[1] // 2])
            return np.moveaxis(array, 0, -1) if len(array) == 3 else np.asarray(array[0])
        image = read_image(case.images, 3)
        volume, _ = in_ras(image, image.array[0])
        return np.asarray(volume[:, :, volume.shape[2] // 2].T[::-1, ::-1])

    def data(self) -> Iterator[str]:
        """Layout, sizes, classes, and what the doctor found."""
        cases, tests = self.dataset.cases, self.dataset.test_cases
        yield "## Data"
        dots = "pixels (height x width)" if self.plan.spatial_dims == 2 else "voxels"
        rows = [
            ["source", f"{self.plan.data} ({self.dataset.layout})"],
            [
                "images",
                f"{len(cases)} to train on and validate, {len(tests)} to test on, {self.of_patients([*cases, *tests])}",
            ],
            ["channels", ", ".join(self.plan.channel_names)],
            ["seen by the network", f"{' x '.join(map(str, self.plan.patch_size))} {dots}"],
        ]
        yield table(["what", "found"], rows)
        counts = [Counter(number for case in part for number in case.values) for part in (cases, tests)]
        heading = ["class", "images to train on and validate", *(["images to test on"] if tests else [])]
        names = list(enumerate(self.plan.label_names))
        shown = [[name, *(count[k] for count in counts[: len(heading) - 1])] for k, name in names[:CLASSES]]
        yield table(heading, shown)
        if len(names) > CLASSES:
            yield f"{len(names) - CLASSES} more classes are in plan.json."
        yield from self.findings()

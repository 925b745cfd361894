"""What the reports of all tasks tell: the plans, the course and the cost of trainings, the splits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kanseg.data.cases import Case, few
from kanseg.data.plan import Plan
from kanseg.data.plans import AnyPlan, load_plan
from kanseg.evaluation.document import table
from kanseg.evaluation.report import draw_curves
from kanseg.files import read_json
from kanseg.training.manifest import MANIFEST
from kanseg.training.monitor import LOG, read_log
from kanseg.training.run_folder import PLAN, SUMMARY, read_splits

PICTURES = "report"  # folder of a run
SETTINGS, DOCTOR = "run.json", "doctor.json"  # of a run of the pipeline
FINDINGS, CLASSES = 20, 60  # rows that are shown


@dataclass
class Told(ABC):
    """A report, paragraph by paragraph, and the paragraphs of all tasks.

    Attributes:
        planned: folders with a plan, each of one configuration or of the first stage of a cascade.
    """

    run: Path
    planned: Sequence[Path]
    plan: Any  # of the first folder, of the kind of the task
    dataset: Any

    metric, curve = "dice", "mean Dice of validation cases"  # of the epochs of a training
    score = "Dice before post-processing"  # of its end
    most_named = 500  # cases of a split
    part = "training"  # of the options, that has the loss

    def parts(self) -> Iterator[str]:
        """The document, paragraph by paragraph."""
        yield f"# {self.dataset.name}"
        yield from self.summary()
        yield from self.results()
        yield from self.data()
        yield from self.plans()
        yield from self.courses()
        yield from self.cost()
        yield from self.split()

    @abstractmethod
    def summary(self) -> Iterator[str]:
        """What came out, in a few lines."""

    @abstractmethod
    def results(self) -> Iterator[str]:
        """Scores, and pictures of cases."""

    @abstractmethod
    def data(self) -> Iterator[str]:
        """Layout, sizes, classes, and what the doctor found."""

    def trained_score(self, summary: Mapping[str, Any]) -> str:
        """The score of a training, from its summary."""
        return f"{summary['dice']['mean']:.3f}" if "dice" in summary else ""

    @cached_property
    def groups(self) -> dict[str, str]:
        """Patient of each case."""
        return {case.id: case.group for case in self.dataset.cases}

    @cached_property
    def patients_known(self) -> bool:
        """Whether the data say whose images they are; else each is taken for a patient's only one."""
        return any(case != patient for case, patient in self.groups.items())

    def of_patients(self, cases: Sequence[Case]) -> str:
        """How many patients there are, in words."""
        patients = len({case.group for case in cases})
        return (
            f"of {patients} patients"
            if self.patients_known
            else "whose patients are not known: each counts as one"
        )

    @property
    def trainings(self) -> list[Path]:
        """Folders of all trainings."""
        return [fold for path in self.planned for fold in sorted(path.glob("fold_*")) if fold.is_dir()]

    def findings(self) -> Iterator[str]:
        """What the doctor found, where it was asked."""
        told = (read_json(self.run / DOCTOR) or {}).get("findings", [])
        words = ([f["severity"] + ":", f["case"], f["message"]] for f in told[:FINDINGS])
        if told:
            yield "\n".join(f"- {' '.join(filter(None, said))}" for said in words)
        if len(told) > FINDINGS:
            yield f"{len(told) - FINDINGS} more findings are in {DOCTOR}."

    def plans(self) -> Iterator[str]:
        """Every plan with its reasons."""
        yield "## Plan"
        for folder in self.planned:
            plan: AnyPlan = load_plan(folder / PLAN)
            if len(self.planned) > 1:
                yield f"### {folder.name}"
            options = ", ".join(f"{key} {value}" for key, value in plan.model_options.items())
            yield f"{plan.model} in {plan.spatial_dims}D: {options}."
            yield "\n".join(f"- {reason}" for reason in plan.reasons)

    def courses(self) -> Iterator[str]:
        """Curves of loss and validation score."""
        drawn = []
        for folder in self.planned:
            folds = [fold for fold in self.trainings if fold.parent == folder]
            logs = {fold.name.replace("_", " "): read_log(fold / LOG) for fold in folds}
            if logs := {name: records for name, records in logs.items() if records}:
                picture = self.run / PICTURES / f"curves_{folder.name}.png"
                title = folder.name if len(self.planned) > 1 else ""
                draw_curves(logs, picture, metric=self.metric, label=self.curve, title=title)
                drawn.append(
                    f"![Loss and {self.curve}: {folder.name}](./{PICTURES}/{quote(f'curves_{folder.name}.png')})"
                )
        if drawn:
            yield "## Training"
            yield from drawn

    def cost(self) -> Iterator[str]:
        """Time, memory, energy, and by what it was computed."""
        made = {fold: read_json(fold / MANIFEST) or {} for fold in self.trainings}
        made = {fold: manifest for fold, manifest in made.items() if manifest.get("sessions")}
        if not made:
            return
        yield "## Time, memory, versions"
        rows: list[list[Any]] = []
        for fold, manifest in made.items():
            sessions = manifest["sessions"]
            summary = read_json(fold / SUMMARY) or {}
            minutes = max((s.get("minutes") or 0 for s in sessions), default=0)  # counted over resumes
            memory = max((s.get("peak_memory_mb") or 0 for s in sessions), default=0)
            energy, wait = manifest.get("energy_joules"), summary.get("data_wait")
            score = self.trained_score(summary)
            rows.append([fold.relative_to(self.run), score, summary.get("epochs", ""), f"{minutes:.1f}"])
            rows[-1] += ["" if wait is None else f"{wait:.1%}", f"{memory / 1024:.2f}", len(sessions)]
            rows[-1].append("" if energy is None else f"{energy / 3600:.1f}")
        heading = [
            "training",
            self.score,
            "epochs",
            "minutes",
            "waiting for data",
            "peak memory of the process (GiB)",
            "sessions",
        ]
        measured = any(row[-1] for row in rows)
        if measured:
            heading.append("energy (Wh)")
        yield table(heading, rows if measured else [row[:-1] for row in rows])
        if not measured:
            yield "The energy was not measured: no counter of the processors (RAPL) or the GPU (NVML) could be read."
        last = next(reversed(made.values()))
        hardware = dict(last["hardware"])
        hardware["memory"] = f"{hardware.pop('memory_bytes') / 2**30:.1f} GiB"
        sessions = [session for manifest in made.values() for session in manifest["sessions"]]
        times = sorted(time for s in sessions for time in (s["began"], s["until"]) if time)
        facts = {
            "trained": f"{times[0][:16].replace('T', ' ')} to {times[-1][:16].replace('T', ' ')} UTC",
            "how": self._settings(last["config"]),
            **hardware,
            "seed": last["seed"],
            "git": _revision(last["git"]),
            "data sha256": last["data"]["sha256"],
        }
        facts |= {"command": " ".join(last["command"]), **last["versions"]}
        facts["options"] = " ".join((read_json(self.run / SETTINGS) or {}).get("overrides", [])) or None
        yield table(["what", "which"], [[key, value] for key, value in facts.items() if value is not None])

    def _settings(self, config: Mapping[str, Any]) -> str:
        """The options of a training that readers ask for first."""
        known = {**config["training"], "loss": config[self.part]["loss"]}
        told = ("loss", "optimizer", "lr", "weight_decay", "schedule", "steps_per_epoch", "ema_decay")
        return f"{', '.join(f'{key} {known[key]}' for key in told)}; all options are in config.json"

    def split(self) -> Iterator[str]:
        """Who validated where; patients are never parted."""
        splits = read_splits(self.planned[0])
        if not splits:
            return
        yield "## Splits"
        own = self.dataset.splits and not isinstance(self.plan, Plan)  # whose copies are told of, not moved
        yield (
            "The split is that of the data. No patient is on both sides."
            if own
            else "Cases of one patient, and copies of one image, are never on both sides."
        )
        rows = []
        for number, fold in enumerate(splits):
            sides = [
                f"{len(fold[key])} of {len({self.groups.get(c, c) for c in fold[key]})}"
                for key in ("train", "val")
            ]
            rows.append([number, *sides, few(fold["val"], self.most_named)])
        yield table(["fold", "trained on (cases of patients)", "validated on", "validation cases"], rows)


def _revision(git: Mapping[str, Any] | None) -> str | None:
    """Of the code, in words."""
    return f"{git['commit']}{' with changes' if git['changed'] else ''}" if git else None

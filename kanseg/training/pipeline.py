"""From a labelled folder to a chosen, cross-validated model with its report, in one go that any stop may interrupt.

RUN/3d and RUN/2d are run folders, one a configuration, and RUN/ensemble has the label maps of both together;
choice.json says which is best by the Dice of unseen cases. RUN/model is the final model, complete in itself, and
RUN/report.html (and report.md) tells it all. What is done already is not done again: calling it once more goes on where
it stood.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kanseg.config import Config, changes, load_config, with_options
from kanseg.data.cases import Case, Dataset, few
from kanseg.data.digests import file_digest, signature
from kanseg.data.doctor import diagnose
from kanseg.data.fingerprint import fingerprint
from kanseg.data.formats import list_dataset, read_dataset
from kanseg.data.image_classes import is_classes
from kanseg.data.images import read_provenance
from kanseg.data.plan import Plan, check_size
from kanseg.data.planner import check_wishes, plan_run
from kanseg.data.suffixes import suffix_of
from kanseg.errors import UsageError, UserError, counted, did_you_mean, each
from kanseg.evaluation.report import score_table
from kanseg.files import locked, make_folder, read_json, write_bytes, write_json
from kanseg.inference.calibration import CALIBRATION
from kanseg.inference.postprocess import load_rules, save_rules
from kanseg.inference.predict import predict_case, write_prediction
from kanseg.inference.provenance import by_networks
from kanseg.progress import in_words, is_main, progress, say
from kanseg.training.cascade import seen_before
from kanseg.training.checkpoint import BEST, EXPORTED, load_model
from kanseg.training.class_pipeline import run_classes
from kanseg.training.cross_validation import RESULT, conclude, cross_validate, finished
from kanseg.training.fit import fit, fitting_model
from kanseg.training.parallel import once
from kanseg.training.planning import follow_data, measuring, reasons, tell_findings
from kanseg.training.run_folder import (
    FINAL,
    PLAN,
    PREDICTIONS,
    SPLITS,
    SUMMARY,
    WHOLE,
    Splits,
    run_splits,
    stages,
)
from kanseg.training.run_report import CHOICE, HTML, write_report
from kanseg.training.told import DOCTOR, SETTINGS
from kanseg.training.validate import inference_options, kept_prediction

CASCADE = "cascade"  # of two stages in 3D, which is made where it is asked for: it doubles the trainings
CONFIGURATIONS = {"3d": 3, "2d": 2, CASCADE: 3}  # and the dimension of their networks
ENSEMBLE, MODEL, REPAIRED = "ensemble", "model", "data"
PLANNED = ("memory", "size", "mirror", "regions")  # options that only a new plan could follow
FINALS = ("folds", "all")
MARGIN = 1e-9  # of the Dice: of equals the simpler is taken


@dataclass
class Pipeline:
    """What the steps share: the folder, the data, the options, and the configurations that compete."""

    run: Path
    dataset: Dataset
    config: Config
    names: list[str]
    final: str
    override: bool
    console: Console

    def say(self, text: str) -> None:
        """Print one line."""
        say(self.console, text)


def run_pipeline(
    data: Path | str,
    run: Path | str,
    overrides: Sequence[str] = (),
    *,
    minutes: float | None = None,
    configurations: str = "auto",
    final: str = "folds",
    memory: int | None = None,
    size: str = "standard",
    regions: Mapping[str, Sequence[int]] | None = None,
    mirror: Sequence[int] | None = None,
    config: str = "default",
    id_pattern: str | None = None,
    override: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Look at the data, plan, train all folds of each configuration, choose, post-process, build the model, report.

    Args:
        minutes: of training in all, shared out evenly; default as long as the config says.
        configurations: "auto" (3d and 2d for volumes, 2d for pictures), or names with commas, cascade among them.
        final: "folds" (the model is all networks of the chosen folds) or "all" (one more training on every case).
        regions: see `read_dataset`.
        memory, size, mirror: see `make_plan`.
        override: go on although options differ from those of the first call.

    Returns:
        {"choice", "dice" (None for a single patient), "model", "report", "configurations": Dice of each, "failed":
        reason of each fold and configuration that was not trained, the others being in model and report}. Of images
        with classes what `run_classes` gives.

    Raises:
        UsageError: unknown names, or options that differ from those of the first call.
        UserError: the data cannot be used, or every training failed.
    """
    run, console = Path(run), console or Console()
    if final not in FINALS:
        raise UsageError(f"--final is {' or '.join(FINALS)}, got '{final}'.")
    if not Path(data).exists():
        raise UserError(f"There is no {data}. Give a folder or list of labelled images.")
    check_size(size)
    checked, wanted = load_config(config, overrides), _configurations(configurations)
    asked: dict[str, Any] = {
        "data": str(Path(data).resolve()),
        "overrides": list(overrides),
        "minutes": minutes,
    }
    asked |= {"final": final, "configurations": configurations, "memory": memory, "size": size}
    asked |= {"config": config, "id_pattern": id_pattern, "mirror": mirror}
    asked["regions"] = None if regions is None else {name: list(values) for name, values in regions.items()}
    classes = is_classes(data)
    if classes:
        alone: dict[str, Any] = {
            "configurations": configurations != "auto",
            "final": final != "folds",
            "memory": memory,
        }
        alone |= {"size": size != "standard", "regions": regions, "mirror": mirror is not None}
        if given := [f"--{name}" for name, value in alone.items() if value]:
            raise UsageError(
                f"{data} has a class for each image, and {', '.join(given)} only serve segmentation."
            )
        asked = {key: asked[key] for key in ("data", "overrides", "minutes", "config", "id_pattern")}
    once(lambda: _follow(Path(data), run))
    _check_asked(run, asked, override, own_plan=classes)
    if classes:
        own: dict[str, Any] = {"minutes": minutes, "id_pattern": id_pattern, "override": override}
        return run_classes(Path(data), run, checked, asked, console=console, **own)
    with locked(make_folder(run), is_main()):
        source, values = once(lambda: _examined(Path(data), run, id_pattern, console))
        if regions and values:
            regions = {name: [values.get(v, v) for v in region] for name, region in regions.items()}
        planned = next((path.parent for path in sorted(run.glob(f"*/{PLAN}"))), None)
        dataset = read_dataset(source, id_pattern=id_pattern, regions=regions, run=planned)
        names = _fitting(wanted, dataset)
        begun = run / names[0]
        if (begun / SPLITS).exists():
            folds = len(run_splits(dataset, checked, begun))
        else:
            folds = _folds(checked, dataset, console)
        if not folds:  # nobody is left to choose by
            names, final = [name for name in names if name != CASCADE][:1], "all"
            if not names:
                raise UserError(
                    "A cascade needs two patients at least: it learns from cases its first stage did not see."
                )
        count = sum(1 + (name == CASCADE) for name in names) * folds + (final == "all")
        share = None if minutes is None else minutes / count
        if share is not None:
            told = f"{count} trainings of {in_words(60 * share)}; planning, validation and scores take time"
            say(console, f"{told} beside")
            checked = with_options(checked, "training", max_minutes=share, max_epochs=None)
        checked = with_options(checked, "data", folds=max(2, folds))
        job = Pipeline(run, dataset, checked, names, final, override, console)
        how: dict[str, Any] = {"memory": memory, "size": size, "mirror": mirror, "regions": regions}
        once(lambda: _plan(job, seconds=None if share is None else 60 * share, **how))
        _check_options(job)
        once(lambda: write_json(run / SETTINGS, asked))
        found, failed = _validated(job) if folds else ({}, {})
        choice = once(lambda: _choose(job, found)) if folds else names[0]
        trained = _final_folds(job, choice)
        model = once(lambda: _build(job, choice, trained))
        report = once(lambda: _report(job))
    dice = {name: result["metrics"]["mean"]["dice"]["mean"] for name, result in found.items()}
    told = f"{dice[choice]:.4f}" if dice else "unknown: one patient leaves nobody to validate on"
    job.say(f"Chosen: {choice}, Dice {told}. Model: {model}. Report: {report}")
    return {
        "choice": choice,
        "dice": dice.get(choice),
        "model": str(model),
        "report": str(report),
        "configurations": dice,
        "failed": failed,
    }


def _configurations(text: str) -> list[str]:
    """The names that are asked for; none for auto."""
    names = [] if text == "auto" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in CONFIGURATIONS:
            raise UsageError(
                f"Unknown configuration '{name}'.{did_you_mean(name, ['auto', *CONFIGURATIONS])}"
            )
    return names


def _fitting(wanted: Sequence[str], dataset: Dataset) -> list[str]:
    fitting = [name for name, dims in CONFIGURATIONS.items() if dims <= dataset.spatial_dims]
    if beyond := [name for name in wanted if name not in fitting]:
        raise UsageError(f"Configuration '{beyond[0]}' does not fit {dataset.spatial_dims}D data.")
    return list(wanted) or [name for name in fitting if name != CASCADE]


def _follow(data: Path, run: Path) -> None:
    """Let a run go on where its data, or its own folder with a repaired copy of them, have moved.

    Raises:
        UserError: these are other data.
    """
    begun, looked = (read_json(run / name) or {} for name in (SETTINGS, DOCTOR))
    if not begun:
        return
    source = run / REPAIRED if (run / REPAIRED).exists() else data
    if not Path(begun.get("data", "")).exists():
        _require_unchanged(data, run, looked.get("files") or {})
    for plan in (run / PLAN, *run.glob(f"*/{PLAN}")):
        if plan.exists():
            follow_data(source, plan.parent)
    for name, kept, key, place in ((DOCTOR, looked, "trained_on", source), (SETTINGS, begun, "data", data)):
        if key in kept and not Path(kept[key]).exists():
            write_json(run / name, {**kept, key: str(place.resolve())})


def _check_asked(run: Path, asked: Mapping[str, Any], override: bool, *, own_plan: bool) -> None:
    """Raise `UsageError` for a folder of another kind (with `own_plan` RUN may have a plan), or of other options."""
    if (run / PLAN).exists() and not (own_plan and (run / SETTINGS).exists()):
        raise UsageError(
            f"{run} is a run of kanseg plan and train, which kanseg run would not use. Choose another folder, or go on "
            f"there by kanseg train {run} -f all --resume."
        )
    before, now = _one_by_one(read_json(run / SETTINGS) or asked), _one_by_one(asked)
    changed, planned = changes(before, dict.fromkeys(before) | now), any(run.glob(f"*/{PLAN}"))
    fixed = [told for key, told in changed.items() if key == "data" or (key in PLANNED and planned)]
    if changed and (not override or fixed):
        told = ", ".join(fixed or changed.values())
        way = "Choose another folder" if fixed else "Give the same, or say --override"
        raise UsageError(f"{run} was begun with {told}. {way}.")


def _one_by_one(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, each override by its key and the memory in GiB, as changes are told."""
    overrides = dict(override.partition("=")[::2] for override in asked.get("overrides") or ())
    memory = {"memory": f"{asked['memory'] / 2**30:g}G"} if asked.get("memory") else {}
    return {key: value for key, value in asked.items() if key != "overrides"} | overrides | memory


def _folds(config: Config, dataset: Dataset, console: Console) -> int:
    """The data set's own folds, or as many as asked for, at most one a patient; 0 for a single patient."""
    if dataset.splits:
        return len(dataset.splits)
    patients = len({case.group for case in dataset.cases})
    folds = min(config.data.folds, patients) if patients > 1 else 0
    if folds < config.data.folds:
        console.print(f"{patients} patients: {folds or 'no'} folds", highlight=False)
    return folds


def _examined(data: Path, run: Path, id_pattern: str | None, console: Console) -> tuple[Path, dict[int, int]]:
    """What to train on: the data, or a repaired copy of them in RUN/data where the doctor finds errors.

    Also given is what became of the label values in a copy.

    Raises:
        UserError: an error that cannot be repaired.
    """
    done = read_json(run / DOCTOR)
    if done is not None:
        _require_unchanged(data, run, done.get("files") or {})
        return Path(done["trained_on"]), {int(k): v for k, v in done.get("label_values", {}).items()}
    found = diagnose(data, id_pattern=id_pattern)
    if found.dataset is None:
        raise UserError(next(f for f in found.findings if not f.case and f.repair is None).message)
    say(console, f"{data}: {found.layout}, {found.cases} cases")
    tell_findings(found.findings, console)
    values: dict[str, int] = {}
    files: dict[str, Any] = {}  # that a copy was made of
    if found.errors:
        files = _files(data, run)
        shutil.rmtree(run / REPAIRED, ignore_errors=True)
        values = found.fix(run / REPAIRED)["label_values"]
        count = counted(len(found.errors), "error")
        say(console, f"{count}: training on a repaired copy, {run / REPAIRED}")
    trained_on = (run / REPAIRED if found.errors else data).resolve()
    kept = {"trained_on": str(trained_on), "label_values": values, "files": files}
    write_json(run / DOCTOR, {**found.to_dict(), **kept})
    return trained_on, {int(k): v for k, v in values.items()}


def _require_unchanged(data: Path, run: Path, before: Mapping[str, Any]) -> None:
    """Raise `UserError` where what was copied differs now; other data are looked at when their plan is."""
    now = _files(data, run) if before else {}
    if changed := sorted(name for name in {*now, *before} if now.get(name) != before.get(name)):
        raise UserError(
            f"{data} changed since {run} was begun with a repaired copy of it: {few(changed)}. Start anew in another "
            "folder."
        )


def _files(data: Path, run: Path) -> dict[str, Any]:
    """Size and time of change of every image and list of a data set, by its path from there; RUN may lie among them."""
    data, run = data.resolve(), run.resolve()
    if data.is_dir():
        known = [file for file in data.rglob("*") if suffix_of(file) or file.suffix in (".json", ".csv", "")]
        files = [f for f in known if f.is_file() and f.name[0] != "." and run not in f.parents]
    else:  # a list of them, which may be anywhere
        cases = list_dataset(data, problem=lambda *found: None).cases
        files = [data, *(path for case in cases for path in (*case.images, case.label) if path is not None)]
    root = data if data.is_dir() else data.parent
    return {os.path.relpath(file, root): signature(file) for file in sorted(files) if file.exists()}


def _plan(job: Pipeline, **how: Any) -> None:
    """Plan the configurations that have no plan yet; the images are read once for all."""
    missing = [name for name in job.names if not (job.run / name / PLAN).exists()]
    check_wishes(job.dataset, **how)  # before every image is read
    seen = fingerprint(job.dataset) if missing else {}
    for name in missing:
        own: dict[str, Any] = {"dim": CONFIGURATIONS[name], "cascade": name == CASCADE}
        with _refused_for(name, job):
            plan = plan_run(
                job.dataset, job.run / name, seen=seen, measure=measuring(job.config), **own, **how
            )
        for reason in reasons(plan, job.run / name):
            job.say(f"- {reason}")


def _check_options(job: Pipeline) -> None:
    """Raise `UsageError` for options that the network of one configuration does not take, before the first trains."""
    for name in job.names:
        folder = job.run / name
        if (folder / RESULT).exists():
            continue
        with _refused_for(name, job):
            for stage in stages(folder):
                fitting_model(job.config, Plan.load(stage / PLAN), stage / "fold_0")


@contextmanager
def _refused_for(name: str, job: Pipeline) -> Iterator[None]:
    """Name the configuration that takes no such options, and the way to go without it."""
    try:
        yield
    except UsageError as error:
        others = [other for other in job.names if other != name]
        way = f" Leave {name} out by --configurations {','.join(others)}, or correct it." if others else ""
        raise UsageError(f"Configuration {name}: {str(error).rstrip('.')}.{way}") from error


def _validated(job: Pipeline) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Result of the cross-validation of each configuration, and of all together, on the same splits; what failed, why.

    Raises:
        UserError: every configuration failed.
    """
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    splits = once(lambda: _same_splits(job))
    for name in job.names:
        folder, plan = job.run / name, Plan.load(job.run / name / PLAN)
        done, *before = (finished(stage, splits) for stage in stages(folder))
        if done is not None and None not in before and not job.override:
            found[name] = done
            continue
        try:
            how: dict[str, Any] = {"resume": True, "override": job.override, "console": job.console}
            job.say(f"Cross-validation of {name}")
            found[name] = cross_validate(job.config, plan, job.dataset, folder, **how)
        except UsageError:
            raise
        except (UserError, RuntimeError, MemoryError) as error:
            failed[name] = str(error)
            job.say(f"Configuration {name} failed: {error}")
    if not found:
        raise UserError(f"Every configuration of {job.run} failed ({each(failed)}).")
    for name, result in found.items():
        failed |= {f"fold {fold} of {name}": why for fold, why in result["failed"].items()}
    if len(found) > 1:
        members = list(found)
        found[ENSEMBLE] = once(lambda: _ensemble(job, members, splits))
    unit = Plan.load(job.run / job.names[0] / PLAN).unit
    for name, result in found.items():
        title = f"{name}: {result['cases']} unseen cases"
        job.console.print(score_table(result["metrics"] | result.get("unions", {}), title, unit))
    return found, failed


def _same_splits(job: Pipeline) -> Splits:
    """The splits of the first configuration, written to all."""
    splits = run_splits(job.dataset, job.config, job.run / job.names[0])
    for name in job.names:
        if not (job.run / name / SPLITS).exists():
            write_json(job.run / name / SPLITS, splits)
    return splits


def _ensemble(job: Pipeline, names: Sequence[str], splits: Splits) -> dict[str, Any]:
    """Result of all configurations together: each case by the networks of its own fold, which never saw it."""
    folder = make_folder(job.run / ENSEMBLE)
    kept = make_folder(folder / PREDICTIONS)
    cases = {case.id: case for case in job.dataset.cases}
    plan = Plan.load(job.run / names[0] / PLAN)
    predictions: dict[str, Path] = {}
    digests: list[str] = []
    for fold, entry in enumerate(splits):
        folders = [job.run / name / f"fold_{fold}" for name in names]
        if all((path / SUMMARY).exists() for path in folders):
            own = [cases[name] for name in entry["val"]]
            for name in names:
                if (member := Plan.load(job.run / name / PLAN)).previous_stage:
                    own = seen_before(own, member, job.run / name, splits, fold)
            predictions |= {case.id: kept_prediction(kept, case, plan) for case in own}
            digests += _predict_together(job, folders, own, kept)
    done = read_json(folder / RESULT)
    if done is not None and done.get("models") == digests:
        return done
    runs = [job.run / name for name in names]
    return conclude(folder, plan, job.dataset, predictions, splits, runs, models=digests)


def _predict_together(job: Pipeline, folders: Sequence[Path], cases: Sequence[Case], kept: Path) -> list[str]:
    """Label maps of the networks of several folders together, where they are not there; digests of the networks."""
    digests = [file_digest(folder / BEST) for folder in folders]
    plan = Plan.load(folders[0].parent / PLAN)
    paths = {case.id: kept_prediction(kept, case, plan) for case in cases}
    made_by = {case.id: read_provenance(paths[case.id]).get("models", []) for case in cases}
    # Networks of a stage before are named behind them.
    missing = [case for case in cases if made_by[case.id][: len(digests)] != digests]
    if not missing:
        return digests
    cuda = job.config.training.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    loaded = [load_model(folder, device)[:2] for folder in folders]
    networks, plans = [network for network, _ in loaded], [plan for _, plan in loaded]
    how = inference_options(job.config.inference, plan, device)
    made = by_networks(plan, digests, **how)
    for case in progress(missing, "Predicting"):
        labels, source = predict_case(networks, case, plans, **how)
        write_prediction(paths[case.id], labels, source, plan, provenance=made, case=case)
    return digests


def _newer(path: Path, time: float) -> bool:
    return path.exists() and path.stat().st_mtime > time


def _choose(job: Pipeline, found: Mapping[str, Mapping[str, Any]]) -> str:
    """The configuration with the highest mean Dice of unseen cases, after post-processing; it is written down."""
    dice = {name: result["metrics"]["mean"]["dice"]["mean"] for name, result in found.items()}
    most = max(result["cases"] for result in found.values())
    whole = [name for name, result in found.items() if result["cases"] == most]  # a failed fold tells less
    choice = max(whole, key=lambda name: dice[name] - MARGIN * list(found).index(name))
    write_json(job.run / CHOICE, {"choice": choice, "dice": dice})
    save_rules(job.run, found[choice]["postprocessing"])
    return choice


def _final_folds(job: Pipeline, choice: str) -> list[Path]:
    """Fold folders of the networks that the final model is made of; one more on every case where that is asked for."""
    done = [name for name in job.names if (job.run / name / RESULT).exists()]
    names = done if choice == ENSEMBLE else [choice]
    if job.final == "all":
        for name in names:
            plan = Plan.load(job.run / name / PLAN)
            how: dict[str, Any] = {"resume": True, "override": job.override, "console": job.console}
            fit(job.config, plan, job.dataset, job.run / name, fold=FINAL, **how)
    pattern = WHOLE if job.final == "all" else "fold_[0-9]*"
    folds = [fold for name in names for fold in sorted((job.run / name).glob(pattern))]
    return [fold for fold in folds if (fold / SUMMARY).exists()]


def _build(job: Pipeline, choice: str, folds: Sequence[Path]) -> Path:
    """RUN/model: checkpoints of the networks as fold_0, fold_1 ..., their post-processing and calibration.

    Of a cascade also all folds of its first stage, whose label map of an image that none of them saw is their mean's.
    """
    model, part, old = job.run / MODEL, job.run / f".{MODEL}.part", job.run / f".{MODEL}.old"
    for left in (part, old):  # by an earlier call that was killed
        shutil.rmtree(left, ignore_errors=True)
    files = {part / f"fold_{number}" / EXPORTED: fold / BEST for number, fold in enumerate(folds)}
    for run in dict.fromkeys(fold.parent for fold in folds):
        for first in stages(run)[1:]:
            files |= {
                part / first.name / best.parent.name / EXPORTED: best
                for best in sorted(first.glob(f"fold_[0-9]*/{BEST}"))
            }
    for copy, best in files.items():
        make_folder(copy.parent)
        write_bytes(copy, best.read_bytes())
    own = folds if choice == ENSEMBLE else ()  # whose networks have temperatures of their own
    for number, fold in enumerate(own):
        _copy_calibration(fold.parent, part / f"fold_{number}")
    save_rules(part, load_rules(job.run) or [])
    _copy_calibration(job.run / choice, part)
    if model.exists():  # it goes aside whole: one that lacks some networks would predict all the same
        model.rename(old)
    part.rename(model)
    shutil.rmtree(old, ignore_errors=True)
    return model


def _copy_calibration(source: Path, target: Path) -> None:
    if (source / CALIBRATION).exists():
        write_bytes(target / CALIBRATION, (source / CALIBRATION).read_bytes())


def _report(job: Pipeline) -> Path:
    """RUN/report.html, made anew where a result is newer."""
    results = [*job.run.glob(f"*/{RESULT}"), *job.run.glob(f"*/fold_*/{SUMMARY}")]
    report = job.run / HTML
    return (
        report
        if _newer(report, max(p.stat().st_mtime for p in results))
        else write_report(job.run, job.dataset)
    )

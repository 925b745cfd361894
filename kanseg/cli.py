"""The command line: one function a verb, nothing but arguments and calls; heavy imports stand inside the verbs.

The verbs of the main path stand here; those around it in `kanseg.verbs`, by theme.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import signal
import sys
from collections.abc import Mapping
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any

import typer

from kanseg import __version__
from kanseg.cgroups import limit_threads
from kanseg.errors import UsageError, UserError, counted, each
from kanseg.progress import processes, say
from kanseg.training.stop import INTERRUPTED, TERMINATED, orderly_end
from kanseg.verbs import data, results, training
from kanseg.verbs.common import (
    ConfigName,
    Json,
    Memory,
    Mirror,
    Out,
    OutFile,
    Pattern,
    Regions,
    Size,
    Verb,
    refuse_given,
    require,
)
from kanseg.verbs.common import console as _console
from kanseg.verbs.common import emit as _emit

# Of the verbs in the help: the short way first.
ORDER = "demo doctor run predict evaluate report plan train search compare ensemble".split()
ORDER += ["prune", "export", "convert", "download", "models", "info"]

# Options of predict that say how windows become label maps.
MASKS_ALONE = {"format_": "--format", "overlap": "--overlap", "blending": "--blending", "memory": "--memory"}
MASKS_ALONE |= {"postprocess": "--no-postprocess"}
SCORED_MASKS = {
    "labels": "--labels",
    "ignore": "--ignore",
    "tolerance": "--tolerance",
    "lesions": "--lesions",
}

# How a verb goes on that was stopped; the others write all or nothing.
GO_ON = dict.fromkeys(("train", "search"), "Go on with --resume.")
GO_ON |= dict.fromkeys(("run", "predict", "download"), "The same command goes on.")

app = typer.Typer(
    name="kanseg",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help"]},
    help="Medical image segmentation with Kolmogorov-Arnold networks: from a folder of scans to masks.\n\n"
    "Start with [bold]kanseg demo[/bold]; then kanseg run DATA -o RUN and kanseg predict -m RUN -i SCANS -o MASKS. "
    "Step by step: kanseg plan DATA -o RUN, kanseg train RUN, kanseg evaluate MASKS REFERENCES.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kanseg {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """What the command takes before its verb; the help is that of `app`."""


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="Minutes of training.", min=0.1)] = 5.0,
    json_: Json = False,
) -> None:
    """Plan, train, predict and evaluate on embedded data, offline, in minutes on two CPU cores.

    For weights that are there already, without training: kanseg predict -m hippocampus -i scan.nii.gz -o mask.nii.gz

    Example: kanseg demo -o runs/demo
    """
    from kanseg.demo import run_demo

    _emit(run_demo(out, minutes=minutes, console=_console(json_)), json_)


@app.command()
def plan(
    data: Annotated[
        Path, typer.Argument(help="MSD, nnU-Net raw, images/ + labels/, CSV, or images by class.")
    ],
    out: Out,
    memory: Memory = None,
    dim: Annotated[str, typer.Option(help="auto, 2 or 3; 2 learns volumes slice by slice.")] = "auto",
    slices: Annotated[int, typer.Option(help="With --dim 2: slices seen at once, e.g. 3 or 5.")] = 1,
    size: Size = "standard",
    regions: Regions = None,
    mirror: Mirror = None,
    cascade: Annotated[
        bool,
        typer.Option(
            "--cascade",
            help="Two stages: one network sees the image in coarse voxels, a second its label map and the image.",
        ),
    ] = False,
    trial: Annotated[bool, typer.Option(help="Measure the memory of a step.")] = True,
    id_pattern: Pattern = None,
    json_: Json = False,
) -> None:
    """Look at the data and decide spacing, patches, normalisation and network; writes RUN/plan.json.

    Images with classes (a folder a class, of volumes below train/; a CSV with image,class; MNIST, CIFAR, MedMNIST) are
    planned for a classifier; --dim, --slices, --size, --memory, --mirror, --regions and --cascade are for segmentation
    alone.

    Example: kanseg plan Task04_Hippocampus -o runs/hippocampus --memory 8G

    Example: kanseg plan Task04_Hippocampus -o runs/slices --dim 2 --slices 3 --size small
    """
    if dim not in ("auto", "2", "3"):
        raise UsageError(f"--dim is auto, 2 or 3, got '{dim}'.")
    if (out / "plan.json").exists() and any((*out.glob("fold_*"), *out.glob("*/fold_*"))):
        raise UsageError(f"{out} holds a training by the plan it has. Choose another folder.")
    from kanseg.data.sizing import check_memory
    from kanseg.memory import size_in_bytes
    from kanseg.training.planning import plan_data

    if trial:
        check_memory(size_in_bytes(memory))
    how: dict[str, Any] = {"dim": None if dim == "auto" else int(dim), "slices": slices, "size": size}
    how |= {"memory": memory, "mirror": mirror, "regions": regions, "id_pattern": id_pattern, "trial": trial}
    how["cascade"] = cascade
    console = _console(json_)
    made = plan_data(data, out, console=console, **how)
    say(console, f"Plan: {out / 'plan.json'}. Next: kanseg train {out}")
    _emit(made.to_dict(), json_)


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="Folder with plan.json, or a data set (then give -o RUN).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value: training.max_minutes=60")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Run folder for a data set.")] = None,
    fold: Annotated[
        str,
        typer.Option(
            "-f", "--fold", help="Fold that validates; all: each in turn; final: train on all cases."
        ),
    ] = "0",
    model: Annotated[str | None, typer.Option(help="Network of `kanseg models`; default the plan's.")] = None,
    config: ConfigName = "default",
    id_pattern: Pattern = None,
    trial: Annotated[bool, typer.Option(help="Measure the memory of a step, if it must plan.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    override: Annotated[bool, typer.Option("--override", help="Go on with other options.")] = False,
    json_: Json = False,
) -> None:
    """Train a planned run: one fold, or all of them (cross-validation). A data set without a plan is planned first.

    Of images with classes a classifier is trained; its keys are classification.*, and training.balanced=true draws all
    classes equally often.

    `kanseg info --keys` lists every key, its default and meaning; RUN/config.json has the values of a run. A wrong one
    is answered by the nearest.

    Example: kanseg train runs/hippocampus training.max_minutes=45 training=sgd

    Example: kanseg train Task04_Hippocampus -o runs/hippocampus -f 1 model.options.basis=legendre
    """
    from kanseg.config import load_config

    if fold not in ("all", "final") and not fold.isdigit():
        raise UsageError(f"-f is a number, all or final, got '{fold}'.")
    given = [*(overrides or []), *([f"model.name={model}"] if model else [])]
    checked = load_config(config, given)  # before anything is read or written
    console = _console(json_)
    folder = out or run
    planned = (folder / "plan.json").exists()
    if not planned and out is None:
        from kanseg.training.run_folder import require_plan

        require_plan(run, f"If it is a data set: kanseg train {run} -o RUN.")
    from kanseg.data.plans import Plan, dataset_of, load_plan
    from kanseg.evaluation.report import score_table
    from kanseg.training.cross_validation import cross_validate
    from kanseg.training.fit import fit
    from kanseg.training.parallel import once
    from kanseg.training.planning import follow_data, plan_data, require_fold

    number = int(fold) if fold.isdigit() else fold
    if not planned:
        require_fold(run, number, checked)
    make: dict[str, Any] = {"console": console, "id_pattern": id_pattern, "trial": trial, "config": checked}
    once(lambda: follow_data(run, folder) if planned else plan_data(run, folder, **make))
    plan_ = load_plan(folder / "plan.json")
    other = run.resolve() not in (folder.resolve(), Path(plan_.data).resolve())
    if other or id_pattern not in (None, plan_.id_pattern):
        raise UsageError(f"{folder} has a plan for {plan_.data} already. Choose another folder with -o.")
    dataset = dataset_of(plan_, folder)
    how: dict[str, Any] = {"resume": resume, "override": override, "console": console}
    if fold == "all":
        found = cross_validate(checked, plan_, dataset, folder, **how)
        if isinstance(plan_, Plan):
            title = f"{found['cases']} unseen cases, mean [95 % interval]"
            console.print(score_table(found["metrics"] | found["unions"], title, plan_.unit))
        for name, score in found.get("scores", {}).items():
            console.print(
                f"{name} {score['mean']:.4f} +- {score['std']:.4f} over {len(found['folds'])} folds"
            )
        _emit(found, json_)
        if found["failed"]:
            count = counted(len(found["failed"]), "fold")
            raise UserError(f"{count} failed ({each(found['failed'], 'fold ')}). Go on with --resume.")
        return
    _emit(fit(checked, plan_, dataset, folder, fold=number, **how), json_)


@app.command()
def predict(
    context: typer.Context,
    model: Annotated[
        list[Path],
        typer.Option("-m", "--model", help="Run, fold, checkpoint or name of weights; may be repeated."),
    ],
    images: Annotated[Path, typer.Option("-i", "--input", help="Image, folder of images, or DICOM folder.")],
    out: OutFile,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="nii.gz, nrrd, seg.nrrd, mha, dicom-seg, rtstruct, png, ..."),
    ] = None,
    overlap: Annotated[
        float, typer.Option(help="Overlap of neighbouring windows, 0 to 0.9.", min=0, max=0.9)
    ] = 0.5,
    blending: Annotated[str, typer.Option(help="Weights in a window: gaussian or constant.")] = "gaussian",
    tta: Annotated[bool, typer.Option("--tta", help="Average over the plan's mirror axes.")] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write a map of the probability of each class.")
    ] = False,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty",
            help="Also write a map of entropy, and quality.csv: its mean in each class, and the Dice to expect.",
        ),
    ] = False,
    postprocess: Annotated[bool, typer.Option(help="Apply the rules stored with the model.")] = True,
    again: Annotated[bool, typer.Option("--again", help="Predict also the cases that are done.")] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            "--max-memory",
            help="Logits beyond it go to the disk, e.g. 4G; image and label map come on top. Default: what is free.",
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Segment images, or tell their classes. A label map lies on its image's own grid, with its affine and header.

    A run with several trained folds, and several -m, predict as one by their mean probability. A folder that was not
    finished is gone on with. A case that fails is reported and the others go on; the exit code is then 1.

    A model of a cross-validation also tells the Dice to expect, in quality.csv of a folder, and names cases to check.

    A classifier writes OUT/predictions.csv (or -o TABLE.csv): the class of each image, always with the probability of
    every class. --uncertainty adds their entropy, --tta averages over the mirrored images that its training drew, and
    --format, --overlap, --blending, --no-postprocess and --memory are for segmentation alone.

    Example: kanseg predict -m runs/hippocampus -i scans/ -o masks/

    Example: kanseg predict -m hippocampus -i scan.nii.gz -o mask.nii.gz

    Example: kanseg predict -m runs/liver -i series/ -o liver.dcm --uncertainty

    Example: kanseg predict -m runs/liver -i series/ -o liver.rtstruct.dcm

    Example: kanseg predict -m runs/moles -i pictures/ -o moles.csv
    """
    from kanseg.data.suffixes import DICOM, RTSTRUCT, SUFFIXES_2D, SUFFIXES_3D, SUFFIXES_DICOM

    suffix = None if format_ is None else f".{format_.lstrip('.')}"
    suffix = {".dicom-seg": DICOM, ".rtstruct": RTSTRUCT}.get(suffix or "", suffix)
    if suffix is not None and suffix not in (*SUFFIXES_3D, *SUFFIXES_2D, *SUFFIXES_DICOM):
        raise UsageError(
            f"--format {format_} is not known. Known: nii.gz, nii, nrrd, seg.nrrd, mha, dicom-seg, rtstruct, png, tif."
        )
    if blending not in ("gaussian", "constant"):
        raise UsageError(f"--blending is gaussian or constant, got '{blending}'.")
    require("an image, a folder of images, or a folder with a DICOM series", images)
    from kanseg.inference.classify import is_classifier, predict_classes
    from kanseg.inference.ensemble import predict_with
    from kanseg.memory import size_in_bytes

    how: dict[str, Any] = {"suffix": suffix, "overlap": overlap, "blending": blending, "tta": tta}
    how |= {"probabilities": probabilities, "uncertainty": uncertainty}
    how |= {"postprocess": postprocess, "again": again}
    how["memory"] = size_in_bytes(memory)
    if is_classifier(model[0]):
        refuse_given(context, MASKS_ALONE, "a classifier takes images whole and writes a table")
        how = {"tta": tta, "uncertainty": uncertainty, "again": again}
        result = predict_classes(model, images, out, console=_console(True), **how)
    else:
        result = predict_with(model, images, out, console=_console(True), version=__version__, **how)
    _emit(result, json_)
    if failed := result["failed"]:
        from kanseg.data.cases import few

        count = f"{len(failed)} of {result['predicted'] + len(failed)} cases"
        raise UserError(f"{count} failed: {few(list(failed))}.")


@app.command()
def evaluate(
    context: typer.Context,
    prediction: Annotated[
        Path,
        typer.Argument(
            help="Folder of label maps (or DICOM-SEG, RTSTRUCT, .seg.nrrd), one file, or predictions.csv."
        ),
    ],
    reference: Annotated[
        Path, typer.Argument(help="References with the same names, or images with classes.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for cases.csv and summary.json.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Classes: 1,2 or tumour=1,whole=1+2 or a run folder.")
    ] = None,
    ignore: Annotated[int | None, typer.Option(help="Value of voxels that do not count.")] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            help="Distance up to which NSD counts a surface as right: mm, of pictures pixels.", min=0
        ),
    ] = 1.0,
    lesions: Annotated[
        bool, typer.Option("--lesions", help="Count connected pieces, too: found, missed and false ones.")
    ] = False,
    json_: Json = False,
) -> None:
    """Score label maps: Dice, IoU, HD95, ASSD, NSD and volumes per case, means with 95 % intervals.

    The table of a classifier (or a folder with its predictions.csv) is scored against images with classes, or a table
    of them: accuracy, top-5 and AUC with intervals, recall and precision of each class; --labels, --ignore,
    --tolerance and --lesions are for label maps alone.
    A missing or unreadable prediction counts as a failure with Dice 0; the exit code is then 1.
    Predictions that are DICOM-SEG, RTSTRUCT or .seg.nrrd need the names of their segments, from a run folder or
    name=1,name=2.

    Example: kanseg evaluate masks/ labelsTs/ -o scores/

    Example: kanseg evaluate segmentations/ labelsTs/ --labels runs/mine

    Example: kanseg evaluate masks/ labelsTs/ --labels lesion=1 --lesions

    Example: kanseg evaluate predictions.csv pictures/ -o scores/
    """
    from kanseg.data.cases import few
    from kanseg.evaluation.class_tables import find_tables
    from kanseg.evaluation.folders import evaluate_folders, label_options
    from kanseg.evaluation.lesions import lesion_lines
    from kanseg.evaluation.report import score_table

    require("predictions, and references with the same names", prediction, reference)
    if prediction.suffix == ".csv" or (tables := find_tables([prediction])):
        from kanseg.evaluation.classification import evaluate_classes

        refuse_given(context, SCORED_MASKS, "a table of classes is scored as it is")
        scores = evaluate_classes(prediction if prediction.suffix == ".csv" else tables[0], reference, out)
        _tell_classes(scores, _console(json_))
        _emit(scores, json_)
        return
    how = label_options(labels) | ({} if ignore is None else {"ignore": ignore})
    summary = evaluate_folders(prediction, reference, out, tolerance=tolerance, lesions=lesions, **how)
    console = _console(json_)
    shown = summary["metrics"] | summary["unions"]
    title = "1 case" if summary["cases"] == 1 else f"{summary['cases']} cases, mean [95 % interval]"
    console.print(score_table(shown, title, summary["unit"], tolerance))
    for line in lesion_lines(summary.get("lesions", {})):
        say(console, line)
    for name in summary["absent"]:
        say(console, f"{name} is in no reference; the mean leaves it out")
    if surplus := summary["predictions_without_reference"]:
        text = f"{len(surplus)} predictions have no reference and are not scored: {few(surplus, 5)}"
        say(console, text)
    _emit(summary, json_)
    if summary["failed"]:
        shown = "; ".join(f"{case}: {why}" for case, why in list(summary["failed"].items())[:5])
        count = f"{len(summary['failed'])} of {summary['cases']} cases"
        raise UserError(f"{count} failed and count as Dice 0: {shown}")


def _tell_classes(scores: Mapping[str, Any], console: Any) -> None:
    """Scores of a classifier: a line, a table of the classes, and what is not scored."""
    from rich.markup import escape
    from rich.table import Table

    from kanseg.data.cases import few
    from kanseg.evaluation.classification import score_lines, shown_classes

    console.print(score_lines(scores), highlight=False)
    heading, rows = shown_classes(scores)
    table = Table(*heading)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    for key, said in (("without_reference", "a class"), ("without_prediction", "a prediction")):
        if names := scores[key]:
            text = f"{len(names)} images without {said} are not scored: {few(names, 5)}"
            say(console, text)


@app.command()
def models(
    weights: Annotated[
        bool, typer.Option("--weights", help="Trained weights that come with kanseg.")
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="KAN layers and bases, and their options.")
    ] = False,
    json_: Json = False,
) -> None:
    """List networks and encoders with their parameters (1 channel, 3 classes) and what they are.

    Networks are for model.name=NAME, encoders for model.options.encoder=NAME, layers for model.options.basis=NAME
    model.options.layer_options.OPTION=VALUE, weights for `kanseg predict -m NAME`, offline.

    Example: kanseg models

    Example: kanseg models --layers

    Example: kanseg models --weights
    """
    from rich.markup import escape
    from rich.table import Table

    if weights and layers:
        raise UsageError("Give --weights or --layers, not both.")

    if weights:
        from kanseg.weights import table_of_weights

        known = table_of_weights()
        for row in known:
            table = Table("", "", title=f"{row['name']}: {row['title']}", show_header=False, box=None)
            for key in "images labels dice networks parameters data licence use limits".split():
                if key in row:
                    said = row[key]
                    text = (
                        ", ".join(f"{k} {v}" for k, v in said.items())
                        if isinstance(said, dict)
                        else str(said)
                    )
                    table.add_row(key, text)
            table.add_row("predict", f"kanseg predict -m {row['name']} -i SCAN -o MASK")
            _console(json_).print(table)
        _emit(known, json_)
        return
    from kanseg.layers.families import family_name
    from kanseg.models.table import table_of_layers, table_of_models

    if layers:
        rows = table_of_layers()
        table = Table("layer", "weights", "what it is, and how it is made in Python", box=None)
        table.title = "Weights: times those of a plain convolution (32 to 32 channels, kernel 3, 3D)"
        for row in rows:
            options = {} if row["class"] else {"basis": row["basis"]}
            shown = ", ".join(f"{key}={value!r}" for key, value in {**options, **row["options"]}.items())
            made = f"{row['class'] or 'KANConv'}(..., {shown})"
            basis = row["basis"] if family_name(row["basis"]) == row["name"] != row["basis"] else None
            name = f"{row['name']} = basis {basis}" if basis else row["name"]
            table.add_row(name, f"{row['parameters']:.1f}", escape(f"{row['description']}.\n{made}"))
        _console(json_).print(table)
        _emit(rows, json_)
        return
    rows = table_of_models()
    for kind in ("network", "encoder"):
        table = Table(kind, "2D", "3D", "what it is", title="Parameters in millions", box=None)
        for row in (row for row in rows if row["kind"] == kind):
            counts = [row[f"parameters_{dims}d"] for dims in (2, 3)]
            millions = ["-" if count is None else f"{count / 1e6:.1f}" for count in counts]
            table.add_row(row["name"], *millions, row["description"])
        _console(json_).print(table)
    _emit(rows, json_)


@app.command()
def info(
    model: Annotated[
        Path | None,
        typer.Argument(help="Run, model, checkpoint, name of weights, or a label map.", show_default=False),
    ] = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="Every key=value of kanseg run and train: default and meaning.")
    ] = False,
    json_: Json = False,
) -> None:
    """Versions and hardware, for a bug report; of a model what it takes, gives and was trained on; of a label map how
    large its classes are, and the model that made it.

    Example: kanseg info

    Example: kanseg info runs/hippocampus

    Example: kanseg info mask.nii.gz

    Example: kanseg info --keys
    """
    if keys:
        _tell_keys(model, json_)
        return
    if model is not None:
        from kanseg.data.suffixes import SUFFIXES_2D, SUFFIXES_3D, suffix_of

        if suffix_of(model) in (*SUFFIXES_3D, *SUFFIXES_2D):
            from kanseg.data.facts import facts_of_label_map as facts_of
        else:
            from kanseg.inference.members import facts_of_model as facts_of
        _tell(facts_of(model), json_)
        return
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found: dict[str, Any] = {"kanseg": __version__, "python": platform.python_version()}
    for package in ("torch", "monai", "nibabel", "SimpleITK", "accelerate", "albumentations", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    from kanseg.layers.kernels.gpu import described
    from kanseg.layers.kernels.native import absent, available
    from kanseg.memory import free_memory

    found["compiled kernels"] = available() or f"none: {absent()}"
    found["triton kernels"] = described()
    found["system"] = platform.platform()
    found["cpu threads"] = torch.get_num_threads()
    found["free memory"] = f"{free_memory() / 2**30:.1f} GiB"
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    _tell(found, json_)


def _tell_keys(model: Path | None, json_: bool) -> None:
    """Options of a training with their defaults, one a line."""
    import json

    from kanseg.config import default_config, flat, meanings

    if model is not None:
        raise UsageError(f"Give {model} or --keys, not both. The options of a run are in its config.json.")
    default, told, console = flat(default_config()), meanings(), _console(json_)
    for key, meaning in told.items():
        text = f"{key}={json.dumps(default[key])}"
        say(console, f"{text:48} {meaning}".rstrip())
    _emit({key: {"default": default[key], "meaning": meaning} for key, meaning in told.items()}, json_)


def _tell(found: Mapping[str, Any], json_: bool) -> None:
    """Facts, one a line."""
    console = _console(json_)
    for name, value in found.items():
        shown = value if isinstance(value, dict) else {"": value}
        for inner, one in shown.items():
            told = ", ".join(f"{key} {part}" for key, part in one.items()) if isinstance(one, dict) else one
            line = f"{inner}: {told}" if inner else told
            say(console, f"{name:16} {line}")
            name = ""
    _emit(found, json_)


for _theme in (data, results, training):
    app.registered_commands += _theme.app.registered_commands
for _command in app.registered_commands:
    _command.cls = Verb
    # A terminal breaks lines anew, and those of the text would be torn.
    _parts = (getdoc(_command.callback) or "").split("\n\n")
    _command.help = "\n\n".join(" ".join(part.split()) for part in _parts)
app.registered_commands.sort(key=lambda command: ORDER.index(getattr(command.callback, "__name__", "")))


def main() -> None:
    """Entry point: a mistake of the user is one line and an exit code (1, or 2 for wrong usage), never a traceback.

    Ctrl-C ends with 130 and SIGTERM with 143, one line and nothing half-written.
    """
    # MONAI imports it; where the home is read-only it takes a temporary folder, and would say so.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    limit_threads()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # One that was closed by who started this is not to leave its number to a file of data.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # names of files may be no text of the terminal's encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with orderly_end():
            app()
    except SystemExit as done:
        # All is done, and a Ctrl-C while libraries end would be their traceback.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
        if done.code in (INTERRUPTED, TERMINATED):
            _stopped(int(done.code))
        if not done.code and processes() > 1:
            from kanseg.training.parallel import leave

            leave()
        raise
    except KeyboardInterrupt:  # while the command is still being read
        _stopped(INTERRUPTED)
    except UserError as error:
        _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except MemoryError as error:
        _fail(f"The memory does not suffice. {error}".strip(), 1)
    except ImportError as error:  # also where a limit (ulimit -v) leaves no room for a library
        _fail(f"A package cannot be loaded: {error}. Install kanseg again, or allow more memory.", 1)
    except OSError as error:
        _fail(f"{error.filename or 'A file'} cannot be used: {error.strerror or error}.", 1)


def _stopped(code: int) -> None:
    by = "Ctrl-C" if code == INTERRUPTED else "SIGTERM"
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    _fail(f"stopped by {by}. {GO_ON.get(verb, 'Nothing is left half-written.')}", code)


def _fail(message: str, code: int) -> None:
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}kanseg: {' '.join(message.splitlines())}{plain}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

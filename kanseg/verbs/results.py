"""Verbs around results and models: compare, combine, prune, export, report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kanseg import __version__
from kanseg.errors import UsageError, UserError, counted, did_you_mean
from kanseg.export import AGREE, FORMATS
from kanseg.progress import say
from kanseg.verbs.common import Json, Out, OutFile, console, emit, require

app = typer.Typer()


def agreement_in_words(found: Mapping[str, Any]) -> str:
    """What `kanseg.inference.agreement.agreement` found, in a line."""
    classes = ", ".join(f"{name} {value:.4f}" for name, value in found["dice"].items())
    images = counted(len(found["cases"]), "image")
    return (
        f"Label maps of {images} by both: equal labels {found['equal_labels']:.4%}, Dice {classes}, "
        f"lowest {found['lowest_dice']:.4f}"
    )


Paths = Annotated[
    list[Path],
    typer.Argument(help="Folders of predictions, or tables of classifiers; with -i: runs or models."),
]


@app.command()
def compare(
    one: Annotated[
        Path,
        typer.Argument(
            metavar="A", help="Run, scores of kanseg evaluate, label maps, or a table of classes."
        ),
    ],
    other: Annotated[Path, typer.Argument(metavar="B", help="What A is compared with, of the same cases.")],
    reference: Annotated[
        Path | None, typer.Option(help="References, for folders of label maps and tables of classes.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for comparison.csv, .json and .png.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="With --reference: classes, 1,2 or tumour=1 or a run folder.")
    ] = None,
    json_: Json = False,
) -> None:
    """Say whether A is better than B on the same cases: paired bootstrap and Wilcoxon test per class and metric.

    Classifiers are compared by accuracy: of all images ("mean"), and of those of each class.

    Example: kanseg compare scores_kan/ scores_plain/ -o comparison/

    Example: kanseg compare kan.csv plain.csv --reference pictures/
    """
    from kanseg.evaluation.compare import compare as compare_scores
    from kanseg.evaluation.compare import comparison_table
    from kanseg.evaluation.folders import label_options

    if labels is not None and reference is None:
        raise UsageError("--labels is for folders of label maps; give their references by --reference.")
    require("a run, scores of kanseg evaluate, or label maps", one, other, reference)
    result = compare_scores(one, other, out, reference=reference, **label_options(labels))
    talk = console(json_)
    talk.print(comparison_table(result))
    for side in ("a", "b"):
        if alone := result[f"only_in_{side}"]:
            say(talk, f"{len(alone)} cases only in {side.upper()} do not count: {', '.join(alone[:5])}")
    emit(result, json_)


@app.command()
def ensemble(
    members: Paths,
    out: OutFile,
    images: Annotated[
        Path | None, typer.Option("-i", "--input", help="Images to predict by the runs or models.")
    ] = None,
    tta: Annotated[bool, typer.Option("--tta", help="With -i: average over the mirror axes.")] = False,
    json_: Json = False,
) -> None:
    """Combine several predictions of the same cases, or several models on images, by their mean probability.

    Label maps without the maps of `kanseg predict --probabilities` are combined by vote. Rules of post-processing are
    applied where models predict (-i), not to what is combined of folders. Of classifiers tables (predictions.csv, or
    folders with one) are combined, or runs and models with -i.

    Example: kanseg ensemble masks_2d/ masks_3d/ -o masks/

    Example: kanseg ensemble runs/2d runs/3d -i scans/ -o masks/

    Example: kanseg ensemble one.csv other.csv -o both.csv
    """
    talk = console(True)
    if images is None:
        if tta:
            raise UsageError("--tta needs models and images; give -i.")
        from kanseg.evaluation.class_tables import find_tables
        from kanseg.inference.classify import combine_tables
        from kanseg.inference.ensemble import combine_folders
        from kanseg.training.checkpoint import holds_model

        require("folders of predictions, or tables of classifiers", *members)
        if tables := find_tables(members):
            emit(combine_tables(tables, out, console=talk), json_)
            return
        if models := [str(member) for member in members if holds_model(member)]:
            raise UsageError(f"{models[0]} is a run or a model: give the images to predict by -i.")
        emit(combine_folders(members, out, console=talk), json_)
        return
    from kanseg.inference.classify import is_classifier, predict_classes
    from kanseg.inference.ensemble import predict_with

    require("an image, a folder of images, or a folder with a DICOM series", images)
    result: dict[str, Any]
    if is_classifier(members[0]):
        result = predict_classes(members, images, out, console=talk, tta=tta)
    else:
        result = predict_with(members, images, out, console=talk, version=__version__, tta=tta)
    emit(result, json_)
    if result["failed"]:
        from kanseg.data.cases import few

        raise UserError(f"{len(result['failed'])} cases failed: {few(list(result['failed']))}.")


@app.command()
def prune(
    model: Annotated[Path, typer.Option("-m", "--model", help="Run, fold, checkpoint or name of weights.")],
    images: Annotated[Path, typer.Option("-i", "--input", help="Images that say which functions count.")],
    out: Out,
    share: Annotated[
        float, typer.Option(min=0, max=1, help="Learned functions of each layer to set to 0, the weakest.")
    ] = 0.0,
    within: Annotated[
        float,
        typer.Option(min=0, help="Fewer functions in layers that change by less: a share of their spread."),
    ] = 0.0,
    json_: Json = False,
) -> None:
    """Take learned functions away that say little on images: a smaller model, and how far its label maps agree.

    --share sets the weakest functions to 0, which saves neither time nor room. --within gives layers the fewest
    functions that keep their outputs (straight lines, polynomials of a low degree), which saves both. The model is one
    like others, to predict with, to export and to start trainings from (training.weights=MODEL).

    Example: kanseg prune -m runs/mine -i scans/ --within 0.1 -o pruned/
    """
    from kanseg.inference.reduce import prune_model

    require("an image, a folder of images, or a folder with a DICOM series", images)
    talk = console(json_)
    with talk.status("Looking at the functions"):
        result = prune_model(model, images, out, share=share, within=within)
    for number, network in enumerate(result["networks"], start=1):
        for one in network["simplified"]:
            say(talk, "{layer}: {before} functions a channel, now {after} (error {error:.3f})".format(**one))
        fewer = f"{len(network['simplified'])} of {result['layers']} layers have fewer functions"
        say(talk, f"Network {number}: {fewer}, {network['share']:.1%} of all functions are 0")
    for what in ("parameters", "seconds_a_window"):
        both = result[what]
        say(talk, f"{what.replace('_', ' ')}: {both['before']:,}, now {both['after']:,}")
    say(talk, agreement_in_words(result["agreement"]))
    emit(result, json_)


@app.command()
def export(
    models: Annotated[list[Path], typer.Argument(help="Runs, folds, checkpoints or names of weights.")],
    out: Out,
    to: Annotated[
        str, typer.Option(help="onnx, torch (a program of torch.export), or monai (a bundle).")
    ] = "onnx",
    images: Annotated[
        Path | None, typer.Option("-i", "--input", help="Images to compare the label maps of both on.")
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Convolutions in int8, by ranges on the images (ONNX, needs -i).")
    ] = False,
    agree: Annotated[
        float, typer.Option(min=0, max=1, help="With --int8: least Dice of both label maps, of each class.")
    ] = AGREE,
    json_: Json = False,
) -> None:
    """Write a network for software without kanseg: ONNX, torch.export or a MONAI bundle, and model.json about it.

    Several models, or the folds of a run, become one network, their mean. The file is run beside the original, and the
    difference is written down; a file that differs is not kept. ONNX needs the extra `onnx`. Classifiers are written
    to ONNX and torch.

    --int8 makes files a quarter as large, and predictions faster where the processor multiplies int8 (VNNI). Label maps
    change a little: give images like those to predict, some that the training never saw among them.

    Example: kanseg export runs/mine -o exported/ -i scan.nii.gz

    Example: kanseg export runs/mine -o exported/ --int8 -i scans/
    """
    if to not in FORMATS:
        raise UsageError(f"Unknown format '{to}'.{did_you_mean(to, FORMATS)}")
    from kanseg.export.network import export_network

    talk = console(json_)
    with talk.status("Exporting, a minute or so"):
        result = export_network(models, out, to, images=images, int8=int8, agree=agree)
    found = result["parity"]
    say(talk, f"{result['file']} ({result['megabytes']} MB) and model.json")
    say(
        talk,
        f"on {found['windows']} {'windows of the images' if int8 else 'random windows'}: largest difference "
        f"{found['relative_difference']:.1e} of the largest output, equal classes {found['equal_classes']:.2%}",
    )
    if int8:
        seconds, size = found["seconds_a_window"], found["int8"]["float32_megabytes"]
        say(
            talk,
            f"In float32 it has {size} MB. A window takes {seconds['exported']} s, in float32 {seconds['float32']} s: "
            f"{seconds['exported'] / seconds['float32']:.2f} times that",
        )
    if images is not None:
        say(talk, agreement_in_words(found["images"]))
    if result["postprocessing"]:
        say(talk, "The post-processing of kanseg predict is no part of it: model.json says the rules.")
    emit(result, json_)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of kanseg run or kanseg train.")],
    json_: Json = False,
) -> None:
    """Write the report of a run anew: RUN/report.md with pictures, and RUN/report.html, one file to hand on.

    Of a classifier, also of one fold alone: accuracy, top-5 and AUC with intervals, recall and precision of each class,
    the confusion matrix, ROC curves, the most confident mistakes.

    Example: kanseg report runs/hippocampus
    """
    from kanseg.training.run_report import write_report

    path = write_report(run)
    say(console(json_), f"Report: {path}")
    emit({"report": str(path)}, json_)

"""Verbs around data sets: look, repair, fetch, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kanseg.errors import UsageError, UserError, counted, did_you_mean
from kanseg.progress import say
from kanseg.verbs.common import Json, Out, Pattern, console, emit

app = typer.Typer()


@app.command()
def doctor(
    data: Annotated[Path, typer.Argument(help="A data set in any layout, or a folder of images.")],
    fix: Annotated[Path | None, typer.Option(help="New folder for a repaired copy.")] = None,
    id_pattern: Pattern = None,
    json_: Json = False,
) -> None:
    """Find what is wrong with a data set, explain it, and write a repaired copy; the source stays as it is.

    Of images with classes it tells unreadable ones, copies, patients in two parts, and classes with few images. Those
    are mended by hand.

    The exit code is 1 while there is an error that no repair was made for.

    Example: kanseg doctor scans/ --fix scans_repaired/
    """
    from rich.markup import escape
    from rich.table import Table

    from kanseg.data.class_doctor import diagnose_classes
    from kanseg.data.doctor import diagnose
    from kanseg.data.findings import rows
    from kanseg.data.image_classes import is_classes

    classes = is_classes(data)
    if classes and fix is not None:
        raise UsageError(
            f"{data} has a class for each image, and --fix repairs label maps. Mend by hand what kanseg doctor tells."
        )
    found = (diagnose_classes if classes else diagnose)(data, id_pattern=id_pattern)
    what = f"{data}: {found.layout}, {found.cases} cases"
    table = Table("", "what", "found", "repair (--fix)", title=escape(what))
    table.columns[2].overflow = "fold"
    for row in rows(found.findings, found.source):
        table.add_row(*map(escape, row))
    talk = console(json_)
    if found.findings:
        talk.print(table)
    else:
        say(talk, f"{what}, nothing wrong")
    result: dict[str, Any] = found.to_dict()
    if fix is not None:
        try:
            result["fixed"] = found.fix(fix)
        except UserError:
            emit(result, json_)
            raise
        count = result["fixed"]["training"]
        say(talk, f"{count} of {found.cases} cases written to {fix}. Next: kanseg plan {fix} -o RUN")
        if found.dataset is not None and found.dataset.test_cases:
            talk.print(f"{len(found.dataset.test_cases)} test images stay where they are.", highlight=False)
    emit(result, json_)
    if found.errors and fix is None:
        advice = "Write a repaired copy with --fix OUT." if found.dataset else "See the table."
        count = counted(len(found.errors), "error")
        raise UserError(f"{data} has {count}. {advice}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A data set in any layout; with --from a file of weights.")],
    out: Out,
    to: Annotated[str, typer.Option(help="msd (Medical Segmentation Decathlon) or nnunet.")] = "msd",
    origin: Annotated[
        str | None, typer.Option("--from", help="Source of published weights: torch-conv-kan.")
    ] = None,
    architecture: Annotated[str | None, typer.Option(help="Published name of the weights' network.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Segment or structure that becomes a class; give it once a class. Default: all."),
    ] = None,
    id_pattern: Pattern = None,
    json_: Json = False,
) -> None:
    """Write a data set in the layout of the Decathlon or of nnU-Net; or make a model of published weights.

    Patients go along as `subjects`, test images with their labels. Labels that are DICOM-SEG, RTSTRUCT or 3D Slicer's
    .seg.nrrd are joined by the names of their segments; where those overlap, --only says which become classes, the last
    of which has the voxel.

    Published weights of torch-conv-kan (a file, or the folder with its model.safetensors) are VGG
    KAGN 11 v2 and v4, VGG KAGN-BN 11 v4 and the same with attention (vgg_kagn_bn11sa_v4); the encoder then starts a
    segmenter: kanseg train RUN model.options.encoder=vggkan11v4 ...

    Example: kanseg convert scans/ -o nnUNet_raw/Dataset001_Scans --to nnunet

    Example: kanseg convert tcia/ -o data --only Liver --only GTV

    Example: kanseg convert --from torch-conv-kan vgg_kagn11_v4.safetensors -o models/vgg11v4
    """
    talk = console(json_)
    if origin is not None:
        emit(_converted_weights(source, out, origin, architecture, talk), json_)
        return
    from kanseg.data.cases import few
    from kanseg.data.convert import convert as convert_to
    from kanseg.data.formats import list_dataset
    from kanseg.data.image_classes import require_label_maps
    from kanseg.data.segmentations import are_segmentations, with_segments
    from kanseg.data.suffixes import SEGMENTS
    from kanseg.data.values import with_values

    require_label_maps(source)
    listed = list_dataset(source, id_pattern=id_pattern)
    drawn = are_segmentations(listed.cases)
    if only and not drawn:
        raise UsageError(f"--only chooses segments of {SEGMENTS}; the labels of {source} are none of these.")
    dataset = with_segments(listed, only or ()) if drawn else with_values(listed)
    made = convert_to(dataset, out, to, only=bool(only))
    for said in dataset.notes:
        say(talk, f"- {said}")
    labelled = f" ({made['test_labels']} of them with labels)" if made["test_labels"] else ""
    counts = f"{made['training']} labelled and {made['test']} further images{labelled}"
    classes = few(dataset.label_names[1:])
    say(talk, f"{counts} of {classes} -> {out}")
    emit(made, json_)


def _converted_weights(
    file: Path, out: Path, origin: str, architecture: str | None, talk: Any
) -> dict[str, Any]:
    """A model of published weights in a folder, and its description."""
    from kanseg.compat.published import SOURCES

    if origin not in SOURCES:
        raise UsageError(f"Unknown source '{origin}'.{did_you_mean(origin, SOURCES)}")
    spec = SOURCES[origin](file, out, architecture)
    say(talk, f"{spec['options']['encoder']} with {spec['out_channels']} classes: {out}")
    return {"out": str(out), "model": spec}


@app.command()
def download(
    name: Annotated[str | None, typer.Argument(help="A data set; without one they are listed.")] = None,
    out: Out = Path("data"),
    json_: Json = False,
) -> None:
    """Fetch a public data set, its licence shown first; goes on where an earlier call broke off.

    Example: kanseg download Task04_Hippocampus -o data/
    """
    from dataclasses import asdict

    from rich.table import Column, Table

    from kanseg.data.download import BY_HAND, SOURCES, find_source
    from kanseg.data.download import download as fetch

    talk = console(json_)
    if name is not None:
        emit(fetch(find_source(name), out, talk), json_)
        return
    table = Table(Column("name", no_wrap=True), "what", "size", "licence")
    for source in SOURCES.values():
        table.add_row(source.name, source.what, source.size, source.licence.partition(",")[0])
    for source in SOURCES.values():
        for part in source.parts:
            say(talk, f"{part.name}: {part.url}, MD5 {part.md5}")
    talk.print(table)
    for other, how in BY_HAND.items():
        say(talk, f"{other} is read, not fetched. {how}")
    emit([asdict(source) for source in SOURCES.values()], json_)

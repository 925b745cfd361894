"""Verbs around training: everything in one go, and the search of options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kanseg.errors import UserError, each
from kanseg.verbs.common import ConfigName, Json, Memory, Mirror, Out, Pattern, Regions, Size, console, emit

app = typer.Typer()
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value: training.optimizer=sgd")]


@app.command()
def run(
    data: Annotated[
        Path,
        typer.Argument(help="MSD, nnU-Net raw, images/ + labels/, CSV, datalist JSON, or images by class."),
    ],
    out: Out,
    overrides: Overrides = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Minutes of all trainings together, without validation; default: 100 epochs of 100 steps each.",
            min=0.01,
        ),
    ] = None,
    configurations: Annotated[
        str, typer.Option(help="auto (3d,2d), 3d, 2d, cascade, or several: 3d,cascade.")
    ] = "auto",
    final: Annotated[
        str, typer.Option(help="Final model: folds (all of them) or all (trained on all).")
    ] = "folds",
    memory: Memory = None,
    size: Size = "standard",
    regions: Regions = None,
    mirror: Mirror = None,
    config: ConfigName = "default",
    id_pattern: Pattern = None,
    override: Annotated[bool, typer.Option("--override", help="Go on with other options.")] = False,
    json_: Json = False,
) -> None:
    """From a labelled folder to a cross-validated model with its report. Stopped, it goes on when called again.

    Images with classes make a classifier: --configurations, --final, --memory, --size, --regions and --mirror are for
    segmentation alone.

    Example: kanseg run Task04_Hippocampus -o runs/hippocampus --minutes 120

    Example: kanseg run pictures_by_class/ -o runs/moles --minutes 30 training.balanced=true
    """
    from kanseg.data.labels import parse_regions
    from kanseg.data.mirror import parse_mirror
    from kanseg.data.sizing import check_memory
    from kanseg.memory import size_in_bytes
    from kanseg.training.pipeline import run_pipeline

    limit = size_in_bytes(memory or None)
    check_memory(limit)
    how: dict[str, Any] = {"minutes": minutes, "configurations": configurations, "final": final}
    how |= {"memory": limit, "size": size}
    how |= {"config": config, "id_pattern": id_pattern}
    how |= {"mirror": parse_mirror(mirror), "regions": parse_regions(regions) if regions else None}
    found = run_pipeline(data, out, overrides or [], override=override, console=console(json_), **how)
    emit(found, json_)
    if found["failed"]:
        raise UserError(f"Not all was trained ({each(found['failed'])}). The same command goes on.")


@app.command()
def search(
    run: Annotated[Path, typer.Argument(help="Folder with plan.json.")],
    options: Annotated[
        list[str], typer.Argument(help="training.lr=loguniform(1e-4,1e-2) and fixed key=value.")
    ],
    trials: Annotated[int, typer.Option(help="Number of trials.", min=1)] = 20,
    concurrent: Annotated[int, typer.Option(help="Trials at the same time.", min=1)] = 1,
    fold: Annotated[
        int, typer.Option("-f", "--fold", help="Fold whose validation cases judge a trial.", min=0)
    ] = 0,
    config: ConfigName = "default",
    prune: Annotated[bool, typer.Option(help="End trials early that fall behind.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search of this folder.")] = False,
    json_: Json = False,
) -> None:
    """Search options on Ray Tune with Optuna's sampler: uniform, loguniform, randint (a,b), choice(a,b,...).

    Networks that segment are judged by their Dice, classifiers by accuracy, or by AUC where images may have several
    classes.

    Example: kanseg search runs/hippocampus "training.lr=loguniform(1e-4,1e-2)" training.max_epochs=20 --trials 16
    """
    from kanseg.training.search import search as search_options

    how: dict[str, Any] = {"trials": trials, "concurrent": concurrent, "fold": fold, "config": config}
    emit(search_options(run, options, prune=prune, resume=resume, console=console(json_), **how), json_)

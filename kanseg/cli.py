"""The command line: one function a verb, nothing but arguments and calls; heavy imports stand inside the verbs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kanseg import __version__
from kanseg.errors import UsageError, UserError, did_you_mean

app = typer.Typer(
    name="kanseg",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help"]},
    help="Medical image segmentation with Kolmogorov-Arnold networks: from a folder of scans to masks.\n\n"
    "Start with [bold]kanseg demo[/bold]; then, with your own data: kanseg plan DATA -o RUN, kanseg train RUN, "
    "kanseg predict -m RUN -i SCANS -o MASKS, kanseg evaluate MASKS REFERENCES.",
)
Json = Annotated[bool, typer.Option("--json", help="Result as JSON on stdout, all else on stderr.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder (or file) to write.")]
Pattern = Annotated[str | None, typer.Option(help="Regular expression, one group: the patient in an id.")]
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="Minutes of training.", min=0.1)] = 5.0,
    json_: Json = False,
) -> None:
    """Plan, train, predict and evaluate on embedded data, offline, in minutes on two CPU cores.

    Example: kanseg demo -o runs/demo
    """
    from kanseg.demo import run_demo

    _emit(run_demo(out, minutes=minutes, console=_console(json_)), json_)


@app.command()
def plan(
    data: Annotated[Path, typer.Argument(help="MSD, nnU-Net raw, images/ + labels/, CSV or datalist JSON.")],
    out: Out,
    memory: Annotated[str | None, typer.Option(help="To stay within, e.g. 8G; default what is free.")] = None,
    dim: Annotated[str, typer.Option(help="auto, 2 or 3.")] = "auto",
    id_pattern: Pattern = None,
    json_: Json = False,
) -> None:
    """Look at the data and decide spacing, patches, normalisation and network; writes RUN/plan.json.

    Example: kanseg plan Task04_Hippocampus -o runs/hippocampus --memory 8G
    """
    if dim not in ("auto", "2", "3"):
        raise UsageError(f"--dim is auto, 2 or 3, got '{dim}'.")
    budget = _bytes(memory)
    if (out / "plan.json").exists() and any(out.glob("fold_*")):
        raise UsageError(f"{out} holds a training by the plan it has. Choose another folder.")
    made = _make_plan(data, out, budget, None if dim == "auto" else int(dim), id_pattern, _console(json_))
    _emit(made.to_dict(), json_)


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="Folder with plan.json, or a data set (then give -o RUN).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value: training.max_minutes=60")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Run folder for a data set.")] = None,
    fold: Annotated[str, typer.Option("-f", "--fold", help="The one to validate on, or all: on none.")] = "0",
    model: Annotated[str | None, typer.Option(help="Network of `kanseg models`; default the plan's.")] = None,
    config: Annotated[str, typer.Option(help="Name of a config of kanseg.")] = "default",
    id_pattern: Pattern = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    json_: Json = False,
) -> None:
    """Train one fold of a planned run. A data set without a plan is planned first.

    Example: kanseg train runs/hippocampus training.max_minutes=45 training=sgd

    Example: kanseg train Task04_Hippocampus -o runs/hippocampus -f 1 model.options.basis=legendre
    """
    from kanseg.config import load_config

    if fold != "all" and not fold.isdigit():
        raise UsageError(f"-f is a number or all, got '{fold}'.")
    given = [*(overrides or []), *([f"model.name={model}"] if model else [])]
    checked = load_config(config, given)  # before anything is read or written
    console = _console(json_)
    folder = out or run
    planned = (folder / "plan.json").exists()
    if not planned and out is None:
        raise UsageError(
            f"{run} has no plan.json. Run: kanseg plan DATA -o {run}, or give -o RUN after DATA."
        )
    from kanseg.data.formats import read_dataset
    from kanseg.data.plan import Plan
    from kanseg.training.fit import fit

    if not planned:
        _make_plan(run, folder, None, None, id_pattern, console)
    plan_ = Plan.load(folder / "plan.json")
    other = run.resolve() not in (folder.resolve(), Path(plan_.data).resolve())
    if other or id_pattern not in (None, plan_.id_pattern):
        raise UsageError(f"{folder} has a plan for {plan_.data} already. Choose another folder with -o.")
    dataset = read_dataset(plan_.data, id_pattern=plan_.id_pattern)
    number = fold if fold == "all" else int(fold)
    _emit(fit(checked, plan_, dataset, folder, fold=number, resume=resume, console=console), json_)


@app.command()
def predict(
    model: Annotated[Path, typer.Option("-m", "--model", help="Run folder, fold folder, or checkpoint.")],
    images: Annotated[Path, typer.Option("-i", "--input", help="Image, folder of images, or DICOM folder.")],
    out: Out,
    format_: Annotated[str | None, typer.Option("--format", help="nii.gz, nrrd, mha, png, ...")] = None,
    overlap: Annotated[float, typer.Option(help="Of neighbouring windows.", min=0, max=0.9)] = 0.5,
    tta: Annotated[bool, typer.Option("--tta", help="Average over the plan's mirror axes.")] = False,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Also write a map a class.")] = False,
    json_: Json = False,
) -> None:
    """Segment images; each label map lies on its image's own grid, with its affine and header.

    A case that fails is reported and the others go on; the exit code is then 1.

    Example: kanseg predict -m runs/hippocampus -i scan.nii.gz -o masks/
    """
    from kanseg.data.formats import find_images
    from kanseg.data.images import SUFFIXES_2D, SUFFIXES_3D

    suffix = None if format_ is None else f".{format_.lstrip('.')}"
    if suffix is not None and suffix not in (*SUFFIXES_3D, *SUFFIXES_2D):
        raise UsageError(f"--format {format_} is not known. Known: nii.gz, nii, nrrd, mha, png, tif.")
    import torch

    from kanseg.inference.predict import predict_folder
    from kanseg.training.checkpoint import load_model
    from kanseg.training.devices import keep_freed_memory

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
    network, plan_, _ = load_model(model, device)
    cases = find_images(images, channels=len(plan_.channel_names))
    how: dict[str, Any] = {"overlap": overlap, "tta": tta, "probabilities": probabilities, "device": device}
    how |= {"suffix": suffix, "description": f"kanseg {__version__} {plan_.model} {plan_.dataset_name}"}
    failures = predict_folder(network, plan_, cases, out, console=_console(True), **how)
    _emit({"predicted": len(cases) - len(failures), "failed": failures, "out": str(out)}, json_)
    if failures:
        raise UserError(f"{len(failures)} of {len(cases)} cases failed: {', '.join(list(failures)[:5])}.")


@app.command()
def evaluate(
    prediction: Annotated[Path, typer.Argument(help="Folder of label maps, or one file.")],
    reference: Annotated[Path, typer.Argument(help="Folder of references with the same names, or one file.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="For cases.csv, summary.json.")] = None,
    labels: Annotated[str | None, typer.Option(help="1,2 or tumour=1,edema=2 or a run folder.")] = None,
    tolerance: Annotated[float, typer.Option(help="Of the surface distance NSD, in mm.", min=0)] = 1.0,
    json_: Json = False,
) -> None:
    """Score label maps: Dice, IoU, HD95, NSD and volumes a case, means with 95 % intervals.

    A missing or unreadable prediction counts as a failure with Dice 0; the exit code is then 1.

    Example: kanseg evaluate masks/ labelsTs/ -o scores/
    """
    from kanseg.evaluation.metrics import evaluate_folders, parse_labels
    from kanseg.evaluation.report import score_table

    names = None if labels is None else parse_labels(labels)
    summary = evaluate_folders(prediction, reference, out, labels=names, tolerance=tolerance)
    console = _console(json_)
    console.print(score_table(summary["metrics"], f"{summary['cases']} cases, mean [95 % interval]"))
    for name in summary["predictions_without_reference"]:
        console.print(f"{name} has no reference and is not scored", highlight=False)
    _emit(summary, json_)
    if summary["failed"]:
        shown = "; ".join(f"{case}: {why}" for case, why in list(summary["failed"].items())[:5])
        count = f"{len(summary['failed'])} of {summary['cases']} cases"
        raise UserError(f"{count} failed and count as Dice 0: {shown}")


@app.command()
def models(json_: Json = False) -> None:
    """List networks and encoders with their parameters (1 channel, 3 classes) and what they are.

    Networks are for `kanseg train --model NAME`, encoders for model.options.encoder=NAME.

    Example: kanseg models
    """
    from rich.table import Table

    from kanseg.models.table import table_of_models

    rows = table_of_models()
    table = Table("name", "kind", "parameters 2D", "parameters 3D", "description")
    for row in rows:
        millions = [f"{row[f'parameters_{d}d'] / 1e6:.1f} M" for d in (2, 3)]
        table.add_row(row["name"], row["kind"], *millions, row["description"])
    _console(json_).print(table)
    _emit(rows, json_)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="Weights: .safetensors or a state_dict of torch.")],
    out: Out,
    source: Annotated[str, typer.Option("--from", help="Whose weights: torch-conv-kan.")],
    architecture: Annotated[str | None, typer.Option(help="Published name, if it is not recognised.")] = None,
    json_: Json = False,
) -> None:
    """Make a kanseg model of published weights of torch-conv-kan (VGG KAGN 11 v2 and v4, VGG KAGN-BN 11 v4).

    The encoder then starts a segmenter: kanseg train RUN model.options.encoder=vggkan11v4 ...

    Example: kanseg convert --from torch-conv-kan vgg_kagn11_v4.safetensors -o models/vgg11v4
    """
    from kanseg.compat.published import SOURCES

    if source not in SOURCES:
        raise UsageError(f"Unknown source '{source}'.{did_you_mean(source, SOURCES)}")
    spec = SOURCES[source](file, out, architecture)
    _console(json_).print(
        f"{spec['options']['encoder']} with {spec['out_channels']} classes: {out}", highlight=False
    )
    _emit({"out": str(out), "model": spec}, json_)


@app.command()
def info(json_: Json = False) -> None:
    """Versions and hardware, for a bug report.

    Example: kanseg info
    """
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
    from kanseg.layers.kernels.native import available

    found["compiled kernels"] = available() or "none (was there a compiler at installation?)"
    found["triton kernels"] = described()
    found["system"] = platform.platform()
    found["cpu threads"] = torch.get_num_threads()
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    console = _console(json_)
    for name, value in found.items():
        console.print(f"{name:16} {value}", highlight=False)
    _emit(found, json_)


def _make_plan(
    data: Path, out: Path, memory: int | None, dim: int | None, id_pattern: str | None, console: Any
) -> Any:
    """Read, plan, say what was decided and why, and write plan.json."""
    from kanseg.data.formats import read_dataset
    from kanseg.data.plan import make_plan
    from kanseg.training.files import make_folder

    dataset = read_dataset(data, id_pattern=id_pattern)
    patients = len({case.group for case in dataset.cases})
    console.print(f"[bold]{dataset.name}[/bold]: {dataset.layout}", highlight=False)
    found = f"{len(dataset.cases)} labelled images of {patients} patients"
    console.print(f"{found}; {', '.join(dataset.label_names)}", highlight=False)
    made = make_plan(dataset, memory=memory, dim=dim)
    for reason in made.reasons:
        console.print(f"- {reason}", highlight=False, markup=False)
    path = made.save(make_folder(out) / "plan.json")
    console.print(f"Plan: {path}. Next: kanseg train {out}", highlight=False)
    return made


def _bytes(text: str | None) -> int | None:
    """ "8G" -> bytes."""
    if text is None:
        return None
    number, unit = text.upper().removesuffix("B").removesuffix("I"), ""
    if number and number[-1] in UNITS:
        number, unit = number[:-1], number[-1]
    try:
        size = float(number) * UNITS[unit]
    except ValueError:
        size = 0
    if size <= 0:
        raise UsageError(f"--memory '{text}' is not a size such as 8G or 500M.")
    return int(size)


def _console(to_stderr: bool) -> Any:
    from rich.console import Console

    return Console(stderr=to_stderr)


def _emit(result: Any, json_: bool) -> None:
    if json_:
        print(json.dumps(result, indent=1, default=str))


def main() -> None:
    """Entry point: a user's mistake is one line and an exit code (1, or 2 for wrong usage), never a traceback."""
    try:
        app()
    except UserError as error:
        _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except OSError as error:
        _fail(f"{error.filename or 'A file'} cannot be used: {error.strerror or error}.", 1)


def _fail(message: str, code: int) -> None:
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}kanseg: {' '.join(message.splitlines())}{plain}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

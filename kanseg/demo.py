"""The main job on embedded data: plan, train, predict, evaluate, and a picture; `kanseg demo` and `make demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from kanseg.data.embedded import CASES, LABELS, write_demo_data, write_hippocampus
from kanseg.data.formats import read_dataset
from kanseg.data.images import read_image, read_label
from kanseg.data.planner import make_plan
from kanseg.data.unlabelled import find_images
from kanseg.errors import UserError
from kanseg.evaluation.folders import evaluate_folders
from kanseg.evaluation.report import picture, score_table
from kanseg.files import make_folder, write_json
from kanseg.progress import say

MINUTES = 5.0  # of training; reading, prediction and evaluation take half a minute more on two cores
PATCH = [48, 48, 48]
FEATURES = [16, 32, 64]
OVERRIDES = ["training.steps_per_epoch=25", "training.validate_every=1000", "training.final_validation=false"]
RULES = [{"labels": [1, 2, 3], "largest": True}]  # known beforehand: a head has one brain
REMARK = (
    "This is one average brain, cut in two: a demonstration that everything works, not a benchmark. "
    "Train on your own scans with `kanseg plan DATA -o RUN` and `kanseg train RUN`."
)


def run_demo(out: Path | str, *, minutes: float = MINUTES, console: Console | None = None) -> dict[str, Any]:
    """Train a small 3D UKANet on the back of the MNI152 template and segment its front.

    Then the weights `hippocampus` that come with kanseg segment the template's hippocampus.

    Writes to `out`: data/, run/ (plan, weights, log), the label maps, picture.png, hippocampus.png, scores/ and
    summary.json, which is also returned.

    Raises:
        UserError: nilearn is missing, or `out` is not empty.
    """
    from kanseg.config import load_config
    from kanseg.inference.postprocess import save_rules
    from kanseg.inference.predict import predict_folder
    from kanseg.training.checkpoint import load_model
    from kanseg.training.fit import fit

    console, out, begun = console or Console(), Path(out), time.monotonic()
    if out.is_dir() and any(out.iterdir()):
        raise UserError(
            f"{out} already holds a demonstration, or something else. Delete it, or choose another folder with -o."
        )
    data = write_demo_data(make_folder(out) / "data")
    dataset = read_dataset(data)
    console.print(
        f"[bold]Data[/bold]  {dataset.layout}: {len(dataset.cases)} blocks of the back of the brain"
    )
    plan = make_plan(dataset)
    stages = len(FEATURES)
    plan.patch_size, plan.batch_size, plan.features_per_stage = PATCH, 2, FEATURES
    plan.strides, plan.kernel_sizes = [[1] * 3] + [[2] * 3] * (stages - 1), [[3] * 3] * stages
    plan.mirror_axes = [0]  # the template is symmetric
    plan.reasons.append(f"patch {PATCH} and features {FEATURES}: small, for the demonstration")
    config = load_config(overrides=[*OVERRIDES, f"training.max_minutes={minutes}", "data.folds=2"])
    fit(config, plan, dataset, out / "run", fold="final", console=console)
    model, plan, _ = load_model(out / "run")
    (case,) = dataset.test_cases
    masks = make_folder(out / "masks")
    save_rules(out / "run", RULES)
    failures = predict_folder(model, plan, [case], masks, rules=RULES, console=console)
    if failures:
        raise UserError(failures[case.id])
    (mask,) = (found.images[0] for found in find_images(masks))
    classes = {name: value for value, name in enumerate(LABELS) if value}
    scores = evaluate_folders(masks, data / "labelsTs", out / "scores", labels=classes)
    image = read_image(case.images)
    shown = picture(
        image.array[0],
        read_label(data / "labelsTs" / mask.name),
        read_label(mask),
        out / "picture.png",
        spacing=image.spacing,
        title="MNI152 template, front (unseen in training)",
        label_names=LABELS,
    )
    dice = {name: scores["metrics"][name]["dice"]["mean"] for name in classes}
    hippocampus = segment_hippocampus(out)
    summary = {
        "dice": dice,
        "mean_dice": float(np.mean(list(dice.values()))),
        "training_minutes": minutes,
        "seconds": round(time.monotonic() - begun, 1),
        "label_map": str(mask),
        "picture": str(shown),
        "scores": str(out / "scores" / "cases.csv"),
        "model": str(out / "run"),
        "hippocampus": hippocampus,
        "remark": REMARK,
    }
    write_json(out / "summary.json", summary)
    console.print(score_table(scores["metrics"], "The unseen front of the brain"))
    for name in ("label_map", "picture", "scores", "model"):
        say(console, f"{name.replace('_', ' '):10} {summary[name]}")
    volumes = ", ".join(f"{name} {volume:.2f} ml" for name, volume in hippocampus["volume_ml"].items())
    said = f"Hippocampus by the weights that come with kanseg: {volumes}; {hippocampus['picture']}"
    say(console, said)
    console.print(REMARK, soft_wrap=True)
    return summary


def segment_hippocampus(out: Path) -> dict[str, Any]:
    """The left hippocampus of the template by the weights `hippocampus`: label map, picture and volumes."""
    from kanseg import Segmenter

    scan = write_hippocampus(out / "data" / f"{CASES}_left_hippocampus.nii.gz")
    segmenter, mask = Segmenter.load("hippocampus"), make_folder(out / "masks") / scan.name
    labels, image = segmenter.predict(scan, out=mask), read_image((scan,))
    assert segmenter.plan is not None
    names = segmenter.plan.label_names
    voxel = float(np.prod(image.spacing)) / 1000
    shown = picture(
        image.array[0],
        None,
        labels,
        out / "hippocampus.png",
        spacing=image.spacing,
        title="Left hippocampus of the MNI152 template",
        label_names=names,
    )
    volumes = {name: float((labels == value).sum()) * voxel for value, name in enumerate(names) if value}
    return {"label_map": str(mask), "picture": str(shown), "volume_ml": volumes}

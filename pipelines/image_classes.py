"""Image classification by the options of torch-conv-kan: MNIST, CIFAR, Tiny ImageNet, ImageNet, HAM10000, MedMNIST.

    python pipelines/image_classes.py cifar10 DATA -o runs/cifar10
    python pipelines/image_classes.py mnist data/ --download
    python pipelines/image_classes.py medmnist data/ --download organmnist3d

DATA is a folder or file in the data's usual format (see `kanseg.data.image_classes`); nothing is fetched unless asked.
A recipe is configs/NAME.yaml. A tenth or fifth of the training images chooses the epoch, unless the data come with
images for that; those of the test are looked at once, at the end. (torch-conv-kan chooses by the images that it reports
on, so its numbers, in `PUBLISHED`, are of all training images and somewhat too good.)

Not run to its end here: a GPU and the data are needed. A smoke test runs the CIFAR recipe on a small made-up set:

    python pipelines/image_classes.py cifar10 SMALL training.max_epochs=1 training.steps_per_epoch=2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from kanseg.config import load_config
from kanseg.data.class_plan import plan_classes
from kanseg.data.download import download, find_source
from kanseg.data.image_classes import read_classes
from kanseg.evaluation.classification import score_lines
from kanseg.training.fit import fit

PUBLISHED = {
    "mnist": "accuracy 0.9968 (8-layer Gram, 150 epochs)",
    "cifar10": "accuracy 0.8417 (ResKALN-18, 75 epochs)",
    "cifar100": "accuracy 0.7487 (8-layer Gram, 204 M parameters)",
    "tiny_imagenet": "accuracy 0.4061, top5 0.6508 (DenseKAGN-121, 250 epochs)",
    "imagenet": "accuracy 0.685, top5 0.8846 (VGG KAGN-BN 11 v4)",
    "ham10000": "none",
    "medmnist": "see Yang et al., Scientific Data 10:41 (2023)",
}


def main() -> None:
    """Fetch if asked, plan, train one fold and print the scores of the images that were held out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", choices=PUBLISHED, help="options to train with")
    parser.add_argument("data", type=Path, help="the data; with --download the folder to put them in")
    parser.add_argument("-o", "--out", type=Path, help="run folder; default runs/RECIPE")
    parser.add_argument(
        "--download", nargs="?", const="", metavar="NAME", help="fetch; default the recipe's data"
    )
    parser.add_argument("--fold", type=int, default=0, help="whose images choose the epoch")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. training.max_epochs=10")
    given = parser.parse_intermixed_args()
    console, data = Console(), given.data
    run = given.out or Path("runs") / given.recipe
    if given.download is not None:
        source = find_source(given.download or given.recipe)
        there = given.data / source.name
        data = there if there.exists() else Path(download(source, given.data, console)["folder"])
    config = load_config(given.recipe, given.overrides)
    dataset = read_classes(data)
    console.print(f"{dataset.name}: {dataset.layout}", highlight=False)
    summary = fit(
        config,
        plan_classes(dataset, run),
        dataset,
        run,
        fold=given.fold,
        resume=given.resume,
        console=console,
    )
    if "accuracy" in summary:
        console.print(f"{summary['held_out']}: {score_lines(summary)}", highlight=False)
    console.print(f"Published by torch-conv-kan: {PUBLISHED[given.recipe]}", highlight=False)


if __name__ == "__main__":
    main()

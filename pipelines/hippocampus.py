"""Hippocampus (Medical Segmentation Decathlon, Task04): from the folder to Dice on unseen subjects, and to weights.

Data: T1-weighted MR crops of 1 mm, two classes (anterior, posterior); Vanderbilt University Medical Center, CC BY-SA
4.0; Simpson et al., arXiv 1902.09063. Two files can be the two hemispheres of one person; `subjects` in dataset.json
keeps them on one side of the split.

    python pipelines/hippocampus.py DATA -o runs/hippocampus                        # a fold, and its unseen subjects
    python pipelines/hippocampus.py DATA -o runs/hippocampus --fold final --pack    # every case, and pack the weights

Four trainings like the second made the three networks of `kanseg/weights/hippocampus`; its README.md is the model card
and has the commands. The recipe is configs/hippocampus.yaml. Networks are compared by pipelines/benchmarks/accuracy.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kanseg import Segmenter
from kanseg.data.formats import read_dataset
from kanseg.data.planner import plan_run

MINUTES, MEMORY = 64, 8 * 2**30
CARD = {
    "title": "anterior and posterior hippocampus",
    "images": "T1-weighted MR, a crop around a left hippocampus, or a right one mirrored (about 35 x 50 x 36 mm)",
    "data": "Medical Segmentation Decathlon, Task04_Hippocampus: 209 of its 260 labelled cases, 136 subjects",
    "licence": "CC BY-SA 4.0 (data: Vanderbilt University Medical Center; Simpson et al., arXiv 1902.09063)",
    "use": "research; no medical device",
    "limits": "whole heads must be cropped first; other contrasts, species and pathologies were never seen",
}


def main() -> None:
    """Plan, train a fold by subject, and print Dice on its validation subjects; or train on all and pack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with dataset.json, imagesTr and labelsTr")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/hippocampus"), help="run folder")
    parser.add_argument("--fold", default="0", help="number, or final for every case")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    parser.add_argument("--pack", action="store_true", help="write kanseg/weights/hippocampus")
    parser.add_argument("--number", type=int, default=1, help="which network of the model it is, with --pack")
    parser.add_argument("--dice", help="what the model card says of unseen subjects, with --pack")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. training.max_minutes=10")
    given = parser.parse_intermixed_args()
    if given.pack and not given.dice:
        parser.error("--pack needs --dice: what was measured on unseen subjects, e.g. '.88 [.87, .89]'")
    if not (given.out / "plan.json").exists():
        plan_run(read_dataset(given.data), given.out, memory=MEMORY, size="small")
    fold = int(given.fold) if given.fold.isdigit() else given.fold
    how = {"fold": fold, "config": "hippocampus", "resume": given.resume}
    overrides = [f"training.max_minutes={MINUTES}", "training.validate_every=1000000", *given.overrides]
    Segmenter("ukanet", spatial_dims=3).fit(given.data, given.out, overrides=overrides, **how)
    folder = given.out / f"fold_{fold}"
    print(json.dumps(json.loads((folder / "summary.json").read_text()), indent=1))
    if given.pack:
        from kanseg.weights import pack

        card = {**CARD, "dice": given.dice}
        print(pack(folder / "best.safetensors", "hippocampus", card, number=given.number))


if __name__ == "__main__":
    main()

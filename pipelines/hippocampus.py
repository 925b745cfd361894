"""Hippocampus (Medical Segmentation Decathlon, Task04): from the folder to Dice on unseen subjects.

Data: T1-weighted MR crops of 1 mm, two classes (anterior, posterior); Vanderbilt University Medical Center, CC BY-SA
4.0; Simpson et al., arXiv 1902.09063. Two files can be the two hemispheres of one person; `subjects` in dataset.json
keeps them on one side of the split.

    python pipelines/hippocampus.py DATA -o runs/hippocampus

Last run by this command: 209 cases of 136 subjects, fold 0 of 5 by subject (167 cases train, 42 validate), seed 0, two
cores (AMD EPYC, AVX-512, shared with other work), 30 minutes, 1957 steps of batch 2, UKANet of 7.3 M parameters (Gram
layers in their narrow form from the second stage on). Dice of the validation cases on their own grids, mean [95 %
bootstrap by subject]: anterior 0.874 [0.860, 0.887], posterior 0.863 [0.851, 0.876], both 0.869 [0.856, 0.881]. One
seed, and the weights with the best Dice on 16 of these cases were kept: a check of the pipeline, no benchmark.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kanseg import Segmenter

OVERRIDES = [
    "training=sgd",
    "training.max_minutes=30",
    "training.steps_per_epoch=50",
    "training.validate_every=3",
    "training.validation_cases=16",
]


def main() -> None:
    """Plan, train fold 0 by subject, and print Dice on its validation subjects."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with dataset.json, imagesTr and labelsTr")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/hippocampus"), help="run folder")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. training.max_minutes=10")
    given = parser.parse_intermixed_args()
    segmenter = Segmenter("ukanet", spatial_dims=3)
    segmenter.fit(given.data, run=given.out, overrides=[*OVERRIDES, *given.overrides], resume=given.resume)
    print(json.dumps(json.loads((given.out / "fold_0" / "summary.json").read_text()), indent=1))


if __name__ == "__main__":
    main()

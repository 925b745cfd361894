"""A file a class, as TotalSegmentator's data have it, joined to one label map a case and described for training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kanseg.data.images import check_pair, label_from, read_image, write_label
from kanseg.data.suffixes import stem_of
from kanseg.data.tables import read_rows
from kanseg.errors import UserError
from kanseg.files import write_json
from kanseg.progress import progress

IMAGE, MASKS, LABEL, TABLE = "ct.nii.gz", "segmentations", "label.nii.gz", "meta.csv"


def join_masks(root: Path, name: str) -> None:
    """Write CASE/label.nii.gz for each CASE/ct.nii.gz with CASE/segmentations/CLASS.nii.gz, and dataset.json.

    Images are CT. Classes are numbered by name from 1; where two masks overlap the later name stands. Cases that
    meta.csv puts to "test" are listed as such.

    Raises:
        UserError: no such case, or a mask on another grid than its image.
    """
    folders = sorted(path.parent for path in root.glob(f"*/{IMAGE}"))
    names = sorted({stem_of(mask) for folder in folders for mask in (folder / MASKS).glob("*.nii.gz")})
    if not names:
        raise UserError(f"{root} has no case with {IMAGE} and {MASKS}/ of one mask a class.")
    numbers = {name: number for number, name in enumerate(names, start=1)}
    for folder in progress(folders, "Joining masks"):
        image = read_image(folder / IMAGE, 3)
        label = np.zeros(image.array.shape[1:], np.min_scalar_type(len(names)))
        for path in sorted((folder / MASKS).glob("*.nii.gz")):
            mask = read_image(path, 3)
            check_pair(image, mask)
            label[label_from(mask) > 0] = numbers[stem_of(path)]
        write_label(folder / LABEL, label, image, label.dtype.name)
    held_out = _held_out(root / TABLE)
    files = {folder.name: {"id": folder.name, "image": f"./{folder.name}/{IMAGE}"} for folder in folders}
    training = [{**files[case], "label": f"./{case}/{LABEL}"} for case in files if case not in held_out]
    described = {
        "name": name,
        "modality": {"0": "CT"},
        "labels": {"0": "background", **{str(number): name for name, number in numbers.items()}},
        "numTraining": len(training),
        "training": training,
        "test": [files[case] for case in files if case in held_out],
    }
    write_json(root / "dataset.json", described)


def _held_out(table: Path) -> set[str]:
    """Cases of the split "test"."""
    rows = read_rows(table) if table.exists() else []
    return {row["image_id"] for row in rows if row.get("split") == "test"}

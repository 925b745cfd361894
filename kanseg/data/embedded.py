"""Data for the demonstration, offline: the MNI152 brain template that ships inside nilearn.

Template: ICBM 152 nonlinear symmetric 2009c, McConnell Brain Imaging Centre (Fonov et al., NeuroImage 47, 2009). It is
the average of 152 adults and left-right symmetric, so it is cut front to back: no half knows the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import from_matvec

from kanseg.data.images import Image, write_array
from kanseg.errors import UserError
from kanseg.files import make_folder, write_bytes

RESOLUTION = 1  # mm: at 2 mm the fluid is too thin to learn
LABELS = ("background", "fluid", "grey matter", "white matter")
FRONT = 0.38  # share of the brain's length that is tested on
TRAINING_BLOCKS = 2
CASES = "mni152"
# Corners in mm (RAS) of a crop around the left hippocampus, the side that the data of the weights `hippocampus` show.
LEFT_HIPPOCAMPUS = (-43, -45, -30), (-8, 5, 6)


def write_demo_data(folder: Path | str) -> Path:
    """Write an MSD data set: blocks of the back of the brain for training, the front in imagesTs and labelsTs.

    Raises:
        UserError: nilearn is not installed.
    """
    folder = Path(folder)
    image, labels, affine = load_template()
    brain = np.flatnonzero((labels > 0).any(axis=(0, 2)))
    border = round(brain[-1] + 1 - FRONT * len(brain))
    cuts = np.linspace(brain[0], border, TRAINING_BLOCKS + 1).round().astype(int)
    blocks = {f"{CASES}_back{i + 1}": (cuts[i], cuts[i + 1]) for i in range(TRAINING_BLOCKS)}
    entries = []
    for name, (start, stop) in blocks.items():
        _write_block(folder, "Tr", name, image, labels, affine, start, stop)
        entries.append({"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"})
    front = f"{CASES}_front"
    _write_block(folder, "Ts", front, image, labels, affine, border, brain[-1] + 1)
    described = {
        "name": "MNI152 template",
        "description": "One average brain, back for training, front for testing: a demonstration, no benchmark",
        "reference": "ICBM 152 nonlinear symmetric 2009c, Fonov et al. 2009; from nilearn",
        "modality": {"0": "T1"},
        "labels": {str(i): name for i, name in enumerate(LABELS)},
        "training": entries,
        "test": [f"./imagesTs/{front}.nii.gz"],
    }
    write_bytes(folder / "dataset.json", (json.dumps(described, indent=1) + "\n").encode())
    return folder


def write_hippocampus(path: Path) -> Path:
    """Write the crop of the template at 1 mm around its left hippocampus, as the weights `hippocampus` expect it.

    Raises:
        UserError: nilearn is not installed.
    """
    template = nib.as_closest_canonical(_nilearn("load_mni152_template")(resolution=1))
    first, last = (
        np.rint(np.linalg.inv(template.affine) @ [*corner, 1]).astype(int)[:3] for corner in LEFT_HIPPOCAMPUS
    )
    box = tuple(slice(start, stop) for start, stop in zip(first, last, strict=True))
    crop = np.asarray(template.dataobj, dtype=np.float32)[box]
    affine = template.affine @ from_matvec(np.eye(3), first)
    make_folder(path.parent)
    write_array(path, crop, Image(crop[None], affine, path, 3), np.dtype("float32"))
    return path


def _nilearn(name: str) -> Any:
    """A function of nilearn.datasets."""
    try:
        from nilearn import datasets
    except ImportError as error:
        raise UserError("The demonstration needs nilearn. Run: pip install 'kanseg[demo]'") from error
    return getattr(datasets, name)


def load_template() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T1 image and tissue labels of the template, cropped to the brain, and their affine (RAS+ mm).

    Inside the brain mask the label is the likeliest of fluid (what neither matter map claims), grey and white matter.
    """
    template = _nilearn("load_mni152_template")(resolution=RESOLUTION)
    grey, white, mask = (
        np.asarray(_nilearn(f"load_mni152_{what}")(resolution=RESOLUTION).dataobj, dtype=np.float32)
        for what in ("gm_template", "wm_template", "brain_mask")
    )
    tissue = 1 + np.argmax([1 - grey - white, grey, white], axis=0)
    labels = np.where(mask > 0.5, tissue, 0).astype(np.uint8)
    template = nib.as_closest_canonical(template)
    box = tuple(slice(hit.min(), hit.max() + 1) for hit in np.nonzero(labels))
    affine = template.affine @ from_matvec(np.eye(3), [s.start for s in box])
    image = np.asarray(template.dataobj, dtype=np.float32)[box]
    return image, labels[box], affine


def _write_block(
    folder: Path,
    part: str,
    name: str,
    image: np.ndarray,
    labels: np.ndarray,
    affine: np.ndarray,
    start: int,
    stop: int,
) -> None:
    """Slices start ... stop - 1 along the second axis (back to front), where they lie in the template."""
    shifted = affine @ from_matvec(np.eye(3), [0, start, 0])
    for kind, array, dtype in (("images", image, "float32"), ("labels", labels, "uint8")):
        path = make_folder(folder / f"{kind}{part}") / f"{name}.nii.gz"
        block = array[:, start:stop]
        write_array(path, block, Image(block[None], shifted, path, 3), np.dtype(dtype))

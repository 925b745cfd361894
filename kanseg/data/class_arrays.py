"""Classified images in arrays: MNIST's idx files, the binary and the python version of CIFAR, MedMNIST's npz.

Formats: idx is a big-endian header (type, number of axes, sizes) before the bytes, also compressed by gzip; a record of
CIFAR is one label byte (CIFAR-100: coarse, then fine) and 3 x 32 x 32 bytes; MedMNIST's npz holds PART_images and
PART_labels. CIFAR's python version is a pickle, which can name any code to run: only arrays, numbers and text are read
from it, and a file that names more is refused.
"""

from __future__ import annotations

import gzip
import math
import pickle
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kanseg.data.listing import only
from kanseg.errors import UserError

PARTS = ("train", "val", "test")
IDX = {
    (part, kind): [f"{prefix}-{kind}{dot}{axes}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    for part, prefix in (("train", "train"), ("test", "t10k"))
    for kind, axes in (("images", "idx3"), ("labels", "idx1"))
}
UINT8 = 8  # idx's number for unsigned bytes
CIFAR_SHAPE = (3, 32, 32)
CIFAR_10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
ORGANS = (
    "bladder|left femur|right femur|heart|left kidney|right kidney|liver|left lung|right lung|pancreas|spleen"
)
# Classes of MedMNIST v2 (Yang et al., Scientific Data 10:41, 2023), by the name of the file.
MEDMNIST = {
    "chestmnist": "atelectasis|cardiomegaly|effusion|infiltration|mass|nodule|pneumonia|pneumothorax|consolidation"
    "|edema|emphysema|fibrosis|pleural|hernia",
    "pathmnist": "adipose|background|debris|lymphocytes|mucus|smooth muscle|normal mucosa|stroma|adenocarcinoma",
    "dermamnist": "actinic keratosis|basal cell carcinoma|benign keratosis|dermatofibroma|melanoma|nevus"
    "|vascular lesion",
    "octmnist": "choroidal neovascularization|diabetic macular edema|drusen|normal",
    "pneumoniamnist": "normal|pneumonia",
    "breastmnist": "malignant|normal or benign",
    "bloodmnist": "basophil|eosinophil|erythroblast|immature granulocyte|lymphocyte|monocyte|neutrophil|platelet",
    "organamnist": ORGANS,
    "organcmnist": ORGANS,
    "organsmnist": ORGANS,
    "organmnist3d": "liver|right kidney|left kidney|right femur|left femur|bladder|heart|right lung|left lung|spleen"
    "|pancreas",
    "nodulemnist3d": "benign|malignant",
    "adrenalmnist3d": "normal|hyperplasia",
    "fracturemnist3d": "buckle|nondisplaced|displaced",
    "vesselmnist3d": "vessel|aneurysm",
    "synapsemnist3d": "inhibitory|excitatory",
}
DAMAGED = (OSError, EOFError, zlib.error, zipfile.BadZipFile, ValueError, KeyError)


@dataclass(frozen=True)
class Arrays:
    """Images (N, *S) or (N, *S, C) and class numbers (N,) by part, and the files that they lie in.

    Where an image may have several classes, `labels` are (N, K) of 0 and 1.
    """

    layout: str
    spatial_dims: int
    channels: int
    names: Sequence[str]
    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    files: Sequence[Path]


Found = Callable[[], Arrays]


def find_arrays(path: Path) -> Found | None:
    """What reads the arrays that lie there (also in a folder below), or None."""
    if path.suffix == ".npz" and path.is_file():
        return partial(_read_npz, path)
    if not path.is_dir():
        return None
    found: dict[Path, Found] = {}
    binary: set[bool] = set()  # whether it is CIFAR-100
    pickled: dict[Path, bool] = {}
    for folder in (path, *sorted(p for p in path.glob("*") if p.is_dir()), *sorted(path.glob("*/raw"))):
        if all(_idx_file(folder, "train", kind) for kind in ("images", "labels")):
            found[folder] = partial(_read_mnist, folder)
        if (folder / "data_batch_1.bin").is_file() or (folder / "train.bin").is_file():
            found[folder] = partial(_read_cifar, folder)
            binary.add((folder / "train.bin").is_file())
        if (folder / "batches.meta").is_file() or (
            (folder / "meta").is_file() and (folder / "train").is_file()
        ):
            pickled[folder] = (folder / "train").is_file()
    for folder, hundred in pickled.items():
        if hundred not in binary:  # the same images in binary form are read faster
            found[folder] = partial(_read_cifar_python, folder)
    if place := only(list(found)):
        return found[place]
    files = sorted(path.glob("*.npz"))
    return partial(_read_npz, files[0]) if len(files) == 1 else None


def _idx_file(folder: Path, part: str, kind: str) -> Path | None:
    return next((folder / name for name in IDX[part, kind] if (folder / name).is_file()), None)


def _read_mnist(folder: Path) -> Arrays:
    files, images, labels = [], {}, {}
    for part in ("train", "test"):
        pictures, numbers = (_idx_file(folder, part, kind) for kind in ("images", "labels"))
        if pictures is None or numbers is None:
            continue
        images[part], labels[part] = read_idx(pictures), read_idx(numbers)
        files += [pictures, numbers]
    names = _numbers(int(labels["train"].max()) + 1)
    return _checked("MNIST (idx files)", names, images, labels, files, images["train"].ndim - 1)


def read_idx(path: Path) -> np.ndarray:
    """The bytes of an idx file as an array; `UserError` where it is cut short or holds other numbers."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read ({error}). Fetch it again.") from error
    kind, axes = content[2:4] if len(content) >= 4 and content[:2] == b"\0\0" else (None, 0)
    start = 4 + 4 * axes
    shape = np.frombuffer(content[4:start], ">u4").tolist() if len(content) >= start else []
    if kind != UINT8 or len(content) != start + math.prod(shape):
        raise UserError(
            f"{path} is no whole idx file: {len(content)} bytes for the shape {shape}. Fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read_cifar(folder: Path) -> Arrays:
    """CIFAR-10 with five files to train, or CIFAR-100 with one and two labels a record: the fine one counts."""
    hundred = (folder / "train.bin").is_file()
    table = folder / ("fine_label_names.txt" if hundred else "batches.meta.txt")
    names = table.read_text(encoding="utf-8").split() if table.is_file() else None
    return _cifar(folder, hundred, ".bin", "binary", partial(_records, label_bytes=1 + hundred), names)


def _read_cifar_python(folder: Path) -> Arrays:
    """The same as pickles."""
    hundred = (folder / "train").is_file()
    table, key = ("meta", "fine_label_names") if hundred else ("batches.meta", "label_names")
    names = _unpickled(folder / table, key)[key] if (folder / table).is_file() else None
    records = partial(_pickled_records, labels="fine_labels" if hundred else "labels")
    return _cifar(folder, hundred, "", "python", records, names)


def _cifar(
    folder: Path,
    hundred: bool,
    end: str,
    version: str,
    read: Callable[[Path], np.ndarray],
    names: Sequence[str] | None,
) -> Arrays:
    train = [folder / f"train{end}"] if hundred else sorted(folder.glob(f"data_batch_[0-9]{end}"))
    test = folder / f"test{end}" if hundred else folder / f"test_batch{end}"
    parts = {"train": train, "test": [test] if test.is_file() else []}
    images, labels = {}, {}
    for part, files in parts.items():
        if files:
            records = np.concatenate([read(file) for file in files])
            size = math.prod(CIFAR_SHAPE)
            labels[part] = records[:, -size - 1]
            images[part] = np.moveaxis(records[:, -size:].reshape(-1, *CIFAR_SHAPE), 1, -1)
    if "train" not in images:
        raise UserError(f"{folder} has no data_batch_1{end} ... of CIFAR-10 to train on. Fetch it again.")
    names = names or (_numbers(int(labels["train"].max()) + 1) if hundred else CIFAR_10)
    layout = f"CIFAR-{100 if hundred else 10} ({version} version)"
    return _checked(layout, names, images, labels, [*parts["train"], *parts["test"]], 2)


def _records(path: Path, label_bytes: int) -> np.ndarray:
    content = np.fromfile(path, np.uint8)
    size = label_bytes + math.prod(CIFAR_SHAPE)
    if len(content) == 0 or len(content) % size:
        raise UserError(f"{path} has {len(content)} bytes, no multiple of a record's {size}. Fetch it again.")
    return content.reshape(-1, size)


def _pickled_records(path: Path, labels: str) -> np.ndarray:
    """As `_records`: a label byte and the image's bytes."""
    stored = _unpickled(path, "data", labels)
    pixels, numbers = (np.asarray(stored[key]) for key in ("data", labels))
    if pixels.dtype != np.uint8 or pixels.shape != (len(pixels), math.prod(CIFAR_SHAPE)) or len(pixels) == 0:
        raise UserError(f"{path} holds no bytes of {math.prod(CIFAR_SHAPE)} an image. Fetch it again.")
    if (
        numbers.dtype.kind not in "iu"
        or numbers.shape != (len(pixels),)
        or not 0 <= numbers.min() <= numbers.max() < 256
    ):
        raise UserError(
            f"{path} has no label of 0 to 255 for each of its {len(pixels)} images. Fetch it again."
        )
    return np.concatenate([numbers.astype(np.uint8)[:, None], pixels], axis=1)


class _Type:
    """What a pickle says of an array's numbers. numpy's own would believe that bytes are addresses of objects."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.order = state[1]


class _Array:
    """An array in a pickle, read as bytes."""

    def __setstate__(self, state: Sequence[Any]) -> None:
        _, shape, kind, fortran, content = state
        content = content.encode("latin1") if isinstance(content, str) else content
        self.array = np.frombuffer(content, kind.order + kind.code).reshape(
            shape, order="F" if fortran else "C"
        )


class _ArraysAlone(pickle.Unpickler):
    """A reader of pickles that calls nothing but what makes arrays of numbers."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda *_: _Array()
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _Type if name == "dtype" else None
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array, number or text")


def _unpickled(path: Path, *keys: str) -> dict[str, Any]:
    """What a pickle of CIFAR holds, without running code that it names; `UserError` where a key is not there."""
    try:
        with path.open("rb") as file:
            stored = _ArraysAlone(file, encoding="latin1").load()  # written by Python 2
        found = {key: stored[key] for key in keys}
        return {key: one.array if isinstance(one, _Array) else one for key, one in found.items()}
    except Exception as error:  # damaged ones raise almost anything
        raise UserError(
            f"{path} is not read as CIFAR's python version: {type(error).__name__}, {error}. Fetch it again, or take "
            "the binary version (`kanseg download cifar10`)."
        ) from error


def _read_npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read as arrays of numbers ({error}). Fetch it again.") from error
    parts = [part for part in PARTS if {f"{part}_images", f"{part}_labels"} <= set(found)]
    if "train" not in parts:
        raise UserError(
            f"{path} holds {', '.join(list(found)[:6]) or 'nothing'}; expected are train_images and train_labels, also "
            "val_... and test_... (MedMNIST)."
        )
    images = {part: found[f"{part}_images"] for part in parts}
    labels = {part: found[f"{part}_labels"] for part in parts}
    labels = {part: one[:, 0] if one.ndim == 2 and one.shape[1] == 1 else one for part, one in labels.items()}
    if any(one.shape[1:] != labels["train"].shape[1:] or one.ndim > 2 for one in labels.values()):
        raise UserError(
            f"{path} has labels of other shapes in its parts: {[one.shape for one in labels.values()]}."
        )
    shape = images["train"].shape
    # No volume is that flat, those of MedMNIST are 28 or 64 wide.
    channels = len(shape) > 3 and shape[-1] in (1, 3)
    names = MEDMNIST.get(path.stem.partition("_")[0], "").split("|")
    several = labels["train"].ndim == 2
    count = labels["train"].shape[1] if several else int(labels["train"].max(initial=0)) + 1
    if len(names) < count:
        names = _numbers(count)
    return _checked("arrays (MedMNIST's npz)", names, images, labels, [path], len(shape) - 1 - channels)


def _numbers(count: int) -> list[str]:
    """Names of classes that have none."""
    return [str(number) for number in range(count)]


def _checked(
    layout: str,
    names: Sequence[str],
    images: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    files: Sequence[Path],
    dims: int,
) -> Arrays:
    for part, one in images.items():
        if dims not in (2, 3) or one.ndim != images["train"].ndim:
            raise UserError(f"{files[0]} has images of shape {one.shape[1:]}; 2D or 3D ones are expected.")
        if len(one) != len(labels[part]) or len(one) == 0:
            raise UserError(
                f"{files[0]} has {len(one)} images and {len(labels[part])} labels in its part {part}."
            )
        most = 1 if labels[part].ndim == 2 else len(names) - 1
        if labels[part].dtype.kind not in "iu" or labels[part].min() < 0 or labels[part].max() > most:
            kind = "not 0 or 1 for each class" if labels[part].ndim == 2 else f"no classes 0 ... {most}"
            raise UserError(f"{files[0]} has labels that are {kind} in its part {part}.")
    channels = 1 if images["train"].ndim == dims + 1 else images["train"].shape[-1]
    return Arrays(layout, dims, channels, names, images, labels, files)

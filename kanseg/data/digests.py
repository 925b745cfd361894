"""Which images are the same: digests of files and voxels, and thumbnails that find copies that were saved again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

THUMBNAIL = {2: 32, 3: 16}  # cells an axis
# Correlation of thumbnails from which on two images count as one. Different patients reach .99 where all images look
# alike (retinas), so what all have in common is taken away first, where there are enough images to know it; then
# different ones stay below .94 on hippocampi, breast ultrasound, glands and retinas.
SAME, SAME_BESIDE_THE_COMMON, ENOUGH = 0.999, 0.97, 10
BLOCK = 2048  # images that are compared with all at once


def signature(path: Path) -> dict[str, Any]:
    """Bytes and time of change of a file, or of all files of a DICOM folder together."""
    stats = [file.stat() for file in _files(path)]
    return {"bytes": sum(s.st_size for s in stats), "changed": max((s.st_mtime_ns for s in stats), default=0)}


def made_from(images: Iterable[Path], *what: Any) -> str:
    """What an output depends on, images (also ones that are not there) and settings, in 24 hexadecimal digits."""
    files = [{"path": str(path.resolve()), **(signature(path) if path.exists() else {})} for path in images]
    known = json.dumps([*what, files], sort_keys=True, default=str)
    return hashlib.sha256(known.encode()).hexdigest()[:24]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a DICOM folder."""
    total = hashlib.sha256()
    for file in _files(path):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def content_digest(array: np.ndarray) -> str:
    """SHA-256 of the voxels and their arrangement, whatever the format of the file."""
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


def thumbnail(array: np.ndarray) -> np.ndarray:
    """Small copy of an image (C, *S) -> flat float32, mean 0 and length 1; means of cells, so noise hardly shows."""
    small = array.mean(axis=0)
    cells = THUMBNAIL[small.ndim]
    for axis, size in enumerate(small.shape):
        edges = np.linspace(0, size, cells + 1).astype(int)
        sums = np.add.reduceat(small, np.minimum(edges[:-1], size - 1), axis=axis)
        counts = np.maximum(np.diff(edges), 1)
        small = sums / counts.reshape([-1 if a == axis else 1 for a in range(small.ndim)])
    return _unit(small.ravel() - small.mean()).astype(np.float32)


def near_duplicates(thumbnails: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    """Pairs of names whose images are the same, or the same but for noise, size or compression."""
    names = list(thumbnails)
    if len(names) < 2:
        return []
    rows = np.stack([thumbnails[name] for name in names])
    own = _unit(rows - rows.mean(axis=0)) if len(names) >= ENOUGH else None
    found = []
    for start in range(0, len(names), BLOCK):
        block = slice(start, start + BLOCK)
        same = rows[block] @ rows.T >= SAME
        if own is not None:
            same |= own[block] @ own.T >= SAME_BESIDE_THE_COMMON
        pairs = zip(*np.nonzero(np.triu(same, start + 1)), strict=True)
        found += [(names[start + i], names[j]) for i, j in pairs]
    return found


def joined(groups: Mapping[str, str], pairs: Iterable[Sequence[str]]) -> dict[str, str]:
    """Groups by case, where cases of a pair (and all that share a group with them) are one group."""
    joined_to: dict[str, str] = {}

    def root(group: str) -> str:
        while group in joined_to:
            group = joined_to[group]
        return group

    for one, other in pairs:
        if one in groups and other in groups:
            first, second = root(groups[one]), root(groups[other])
            if first != second:
                joined_to[max(first, second)] = min(first, second)
    return {case: root(group) for case, group in groups.items()}


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]

"""Prepared cases, in memory as far as it is allowed and on the disk beyond; either way they are the same."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kanseg.files import temporary_folder
from kanseg.memory import spill_folder

Arrays = dict[str, Any]  # name -> tensor, array, or list of arrays


class Shelf(Sequence[Arrays]):
    """A list of dictionaries of arrays, of which at most `limit` bytes stay in memory.

    The others are files in a temporary folder; only what is touched of them is read, and is forgotten again.

    Args:
        limit: bytes; None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.bytes = limit, 0
        self._entries: list[Arrays | Path] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def append(self, arrays: Arrays) -> None:
        """Put an entry behind the others."""
        plain = {name: _plain(value) for name, value in arrays.items()}
        size = sum(array.nbytes for _, array in _flat(plain))
        if self.limit is None or self.bytes + size <= self.limit:
            self.bytes += size
            self._entries.append(plain)
            return
        if self._folder is None:
            self._folder = temporary_folder(spill_folder())
        folder = Path(self._folder.name) / str(len(self._entries))
        folder.mkdir()
        for name, array in _flat(plain):
            np.save(folder / f"{name}.npy", array)
        self._entries.append(folder)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Arrays:  # type: ignore[override]  # no slices
        entry = self._entries[index]
        if isinstance(entry, dict):
            return {name: _tensor(value) for name, value in entry.items()}
        loaded: Arrays = {}
        for path in sorted(entry.iterdir()):
            name, _, number = path.stem.partition("@")
            array = np.load(path, mmap_mode="c" if path.stat().st_size else None)
            if number:
                loaded.setdefault(name, []).append(array)
            else:
                loaded[name] = array
        return {name: _tensor(value) for name, value in loaded.items()}

    def on_disk(self) -> int:
        """How many entries are files."""
        return sum(isinstance(entry, Path) for entry in self._entries)


def _plain(value: Any) -> Any:
    """Arrays without what MONAI knows of them; places of voxels as 32-bit numbers, where they fit."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    from torch import Tensor

    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    small = array.dtype == np.int64 and array.max(initial=0) < 2**31
    return array.astype(np.int32) if small else array


def _tensor(value: Any) -> Any:
    """Images as tensors, places of voxels as arrays."""
    import torch

    return torch.from_numpy(value) if isinstance(value, np.ndarray) and value.ndim > 1 else value


def _flat(arrays: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """Every array with a name of its own; parts of a list are numbered so that names sort as they stand."""
    for name, value in arrays.items():
        if isinstance(value, list):
            yield from zip((f"{name}@{i:04d}" for i in itertools.count()), value, strict=False)
        else:
            yield name, value

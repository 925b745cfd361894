"""Logits of a whole image by a sliding window: in memory where they fit, else on the disk, read a class at a time.

An image of 10 million voxels and 100 classes has 4 GB of them. MONAI places the windows; what the network says of one
is added to where it belongs, weighted so that the sum over all windows is their mean.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from math import prod
from typing import Any

import numpy as np
import torch
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from kanseg.data.cascade import network_input
from kanseg.data.plan import Plan
from kanseg.data.transforms import slices_as_channels
from kanseg.errors import UserError
from kanseg.memory import FITS, fits, spill_folder
from kanseg.progress import telling

WINDOWS_AT_ONCE = 2
FLOAT = np.dtype(np.float32)
Watch = Callable[[int, int], None]  # windows that are done, of how many
Place = tuple[slice, ...]


class Logits(Sequence[Tensor]):
    """K maps (*S) of the logits of each class, made on demand.

    Args:
        shape: (K, N, *S) of N images of a batch, which are one volume where they are slices across an axis.
        slice_axis: that axis.
    """

    def __init__(self, shape: Sequence[int], slice_axis: int | None = None) -> None:
        self.shape, self.slice_axis = tuple(shape), slice_axis

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, number: int) -> Tensor:  # type: ignore[override]  # no slices
        if not 0 <= number < len(self):
            raise IndexError(number)
        found = self.read(number)
        return found[0] if self.slice_axis is None else found.movedim(0, self.slice_axis)

    @abstractmethod
    def read(self, number: int) -> Tensor:
        """One class, (N, *S)."""

    @abstractmethod
    def add(self, place: Place, values: Tensor, share: Tensor) -> None:
        """Add values (K, *window) times share (*window) at a place of one image of the batch."""


class InMemory(Logits):
    """All classes in one tensor."""

    def __init__(self, shape: Sequence[int], slice_axis: int | None, device: torch.device) -> None:
        super().__init__(shape, slice_axis)
        self.tensor = torch.zeros(self.shape, device=device)

    def read(self, number: int) -> Tensor:
        return self.tensor[number]

    def add(self, place: Place, values: Tensor, share: Tensor) -> None:
        self.tensor[(slice(None), *place)] += (values * share).to(self.tensor.device)[:, None]


class OnDisk(Logits):
    """A file without a name; in memory are the class that is read and the planes that windows are in.

    Windows come plane by plane along the first axis (of slices across an axis, image by image), so those that lie in
    the same planes are added up in memory, and each class is written in one piece when other planes begin.

    Args:
        hold: whether all classes of these planes fit into memory; else each window goes to the file by itself.

    Raises:
        UserError: the disk has no room.
    """

    def __init__(self, shape: Sequence[int], slice_axis: int | None, *, hold: bool = True) -> None:
        super().__init__(shape, slice_axis)
        self.bytes = prod(self.shape[1:]) * FLOAT.itemsize  # of a class
        self.axis = 0 if self.shape[1] > 1 else 1  # of (N, *S), along which planes are cut
        self.planes = slice(0, 0)
        self.held: Tensor | None = torch.zeros(len(self), 0) if hold else None
        self.folder, needed = spill_folder(), len(self) * self.bytes
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"The logits of {len(self)} classes take {needed / 2**30:.1f} GiB: more than the memory allows, and "
                f"than {self.folder} has free ({free / 2**30:.1f} GiB). Name a larger disk by TMPDIR, or give more "
                "--memory."
            )
        self.file = tempfile.TemporaryFile(prefix="kanseg-", dir=self.folder)  # noqa: SIM115  # gone with this object
        self.file.truncate(needed)

    def read(self, number: int) -> Tensor:
        self._write_planes()
        self.file.seek(number * self.bytes)
        found = np.fromfile(self.file, FLOAT, prod(self.shape[1:]))
        return torch.from_numpy(found.reshape(self.shape[1:]))

    def add(self, place: Place, values: Tensor, share: Tensor) -> None:
        if self.held is None:
            for number, found in enumerate(values):
                mapped = np.memmap(self.file, FLOAT, "r+", number * self.bytes, self.shape[1:])
                mapped[place] += (found * share).cpu().numpy()
                del mapped  # or its pages would count as memory of this process
            return
        planes, inside = place[self.axis], list(place)
        inside[self.axis] = slice(None)
        if planes != self.planes:
            self._write_planes()
            lines = list(self.shape)
            lines[1 + self.axis] = planes.stop - planes.start
            self.planes, self.held = planes, torch.zeros(lines)
        for held, found in zip(self.held, values, strict=True):  # at once it would be one more map of all
            held[tuple(inside)] += (found * share).cpu()

    def _write_planes(self) -> None:
        """Add what is held of each class to the file, and hold nothing."""
        if self.held is None or not self.held.numel():
            return
        plane = self.bytes // self.shape[1 + self.axis]
        for number, values in enumerate(self.held.numpy()):
            start = number * self.bytes + self.planes.start * plane
            self.file.seek(start)
            before = np.frombuffer(self.file.read(values.nbytes), FLOAT)
            self.file.seek(start)
            try:
                self.file.write((values.ravel() + before).tobytes())
                self.file.flush()
            except OSError as error:
                raise UserError(f"The logits do not fit onto {self.folder}: {error.strerror}.") from error
        self.planes, self.held = slice(0, 0), torch.zeros(len(self), 0)


@torch.inference_mode()
def whole_logits(
    model: nn.Module,
    image: Tensor,
    plan: Plan,
    *,
    memory: int | None = None,
    device: torch.device | str = "cpu",
    **how: Any,
) -> Logits:
    """Logits of a preprocessed image, (1, C, *S) -> K maps (*S).

    Args:
        memory: bytes that this process may take; logits that would pass it lie on the disk. Default what is free.
        overlap: share of a window that its neighbour covers too.
        blending: weights within a window, "gaussian" (its middle counts most) or "constant".
        tta: average over all mirrorings of the plan's `mirror_axes`, the axes whose ends may be exchanged.
        watch: told about progress; default a line a minute on standard error.

    Raises:
        UserError: the network gives numbers that are not finite, or the disk is too small.
    """
    batch = as_batch(image, plan, device)
    shape, window = (len(plan.label_names), len(batch), *batch.shape[2:]), bytes_of_window(plan)
    size = FLOAT.itemsize * prod(shape)
    if batch.device.type == "cuda" and size <= FITS * torch.cuda.mem_get_info()[0]:
        logits: Logits = InMemory(shape, plan.slice_axis, batch.device)
    elif fits(size, memory) and fits(WINDOWS_AT_ONCE * window, memory):  # each in half of the room
        logits = InMemory(shape, plan.slice_axis, torch.device("cpu"))
    else:
        deep = plan.patch_size[0] / batch.shape[2] if len(batch) == 1 else 1 / len(batch)
        held = 2 * min(deep, 1) * size  # beside them what is read and written of them
        hold = fits(round(held), memory) and fits(window, memory)
        logits = OnDisk(shape, plan.slice_axis, hold=hold)
    _slide(model, batch, plan, logits, **how)
    return logits


def bytes_of_window(plan: Plan) -> int:
    """What the logits of one window take at most, as the network makes them and as they lie in memory afterwards."""
    return 2 * FLOAT.itemsize * len(plan.label_names) * prod(plan.patch_size)


def as_batch(image: Tensor, plan: Plan, device: torch.device | str = "cpu") -> Tensor:
    """The image as the network takes it, (N, C, *S) on its device; a volume learnt slice by slice is N slices."""
    image = torch.as_tensor(image).to(device)
    return image if plan.slice_axis is None else slices_as_channels(image[0], plan)


def _slide(
    model: nn.Module,
    batch: Tensor,
    plan: Plan,
    logits: Logits,
    *,
    overlap: float = 0.5,
    blending: str = "gaussian",
    tta: bool = False,
    watch: Watch | None = None,
) -> None:
    """Move the window over every image of the batch and each of its mirrorings; see `whole_logits`."""
    axes, size = plan.mirror_axes if tta else [], batch.shape[2:]
    flips = [flip for count in range(len(axes) + 1) for flip in combinations(axes, count)]
    patch, margin = plan.patch_size, [max(p - n, 0) // 2 for n, p in zip(size, plan.patch_size, strict=True)]
    how: dict[str, Any] = {"roi_size": patch, "overlap": overlap, "with_coord": True}
    how["sw_batch_size"] = 1 if isinstance(logits, OnDisk) else WINDOWS_AT_ONCE
    weights = compute_importance_map(tuple(patch), mode=blending, device=batch.device)
    sums = torch.zeros([max(n, p) for n, p in zip(size, patch, strict=True)], device=batch.device)
    windows = 0

    def weigh(window: Tensor, where: Sequence[Sequence[slice]]) -> Tensor:
        nonlocal windows
        windows += len(where)
        for _, _, *place in where:
            sums[tuple(place)] += weights
        return window

    sliding_window_inference(batch[:1, :1], predictor=weigh, **how)
    watch = watch or telling("Windows of the image")
    done, total = 0, windows * len(batch) * len(flips)

    def answer(flip: Sequence[int], window: Tensor, where: Sequence[Sequence[slice]]) -> Tensor:
        nonlocal done
        said = model(network_input(window, plan))
        if not torch.stack(said.aminmax()).isfinite().all():  # without a map of its own for all classes
            raise UserError("The network gives values that are not finite. Train it again.")
        for values, (one, _, *place) in zip(said, where, strict=True):
            inside, at = _within(place, margin, size, flip)
            share = weights[inside] / sums[tuple(place)][inside] / len(flips)
            logits.add(
                (one, *at), _flipped(values[(slice(None), *inside)], flip, 1), _flipped(share, flip, 0)
            )
        done += len(window)
        watch(done, total)
        return window[:, :1]  # MONAI wants something to add up

    for flip in flips:
        sliding_window_inference(_flipped(batch, flip, 2), predictor=partial(answer, flip), **how)


def _within(
    place: Sequence[slice], margin: Sequence[int], size: Sequence[int], flip: Sequence[int]
) -> tuple[Place, Place]:
    """What of a window lies in the image, and where that is in the image before it was padded and mirrored."""
    inside, at = [], []
    for axis, (window, before, length) in enumerate(zip(place, margin, size, strict=True)):
        start = window.start - before
        low, high = max(start, 0), min(window.stop - before, length)
        inside.append(slice(low - start, high - start))
        at.append(slice(length - high, length - low) if axis in flip else slice(low, high))
    return tuple(inside), tuple(at)


def _flipped(values: Tensor, axes: Sequence[int], first: int) -> Tensor:
    """Mirrored along axes that are counted from the `first`."""
    return values.flip([first + axis for axis in axes]) if axes else values

"""Planes of a batch that are expanded and convolved at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kanseg.layers.kernels import gpu
from kanseg.layers.kernels.geometry import Geometry
from kanseg.layers.kernels.rows import is_channels_last

SLAB_BYTES = 32 * 2**20  # of an expansion; a smaller one starves the gradient of the weight
COPY_BYTES = 12 * 2**20  # of an input
TILE = 4  # rows of Winograd's largest tile; what begins with one has the same numbers
SLAB_OF_GPU = 1 / 512  # of its memory
LEAST_OF_GPU = 64 * 2**20  # bytes


@dataclass(frozen=True)
class Slab:
    """Planes of the first spatial axis of some samples.

    Attributes:
        whole: the whole batch at once, with the padding left to the convolution.
        sample: which samples.
        out: planes of the output.
        source: planes of the input that they see.
        before, after: planes of zeros around these.
    """

    whole: bool
    sample: slice
    out: slice
    source: slice
    before: int = 0
    after: int = 0

    def padding(self, geometry: Geometry) -> tuple[int, ...]:
        """What is left for the convolution to pad."""
        return geometry.padding if self.whole else (0, *geometry.padding[1:])

    def geometry(self, geometry: Geometry) -> Geometry:
        """That of a convolution which makes just these planes of the output, and pads for itself."""
        return geometry if self.whole else replace(geometry, padding=(self.before, *geometry.padding[1:]))


WHOLE = Slab(True, slice(None), slice(None), slice(None))


def slab_bytes(device: torch.device) -> int:
    """Of an expansion, at most.

    On a CPU it fits into the caches. On a GPU its way through the memory takes a tenth of the convolution's time, while
    each slab costs a launch of every kernel and the planes that its neighbours make too.
    """
    if device.type != "cuda":
        return SLAB_BYTES
    return max(LEAST_OF_GPU, int(SLAB_OF_GPU * gpu.memory(device)))


def copied(inputs: Sequence[Tensor], geometry: Geometry) -> Iterator[Slab]:
    """All at once; where inputs must be copied into channels-last memory, COPY_BYTES of each at a time."""
    scattered = next((x for x in inputs if not is_channels_last(x)), None)
    if scattered is None:
        return iter([WHOLE])
    return slabs(scattered, scattered.shape[1], scattered.dtype, geometry, COPY_BYTES, TILE)


def slabs(
    x: Tensor,
    channels: int,
    dtype: torch.dtype,
    geometry: Geometry,
    most: int | None = None,
    multiple: int = 1,
) -> Iterator[Slab]:
    """Cut the batch `x` where its expansion to so many channels has more than `most` bytes (None: `slab_bytes`), into
    slabs of a multiple of so many planes of the output.
    """
    samples, _, planes, *rest = x.shape
    most = slab_bytes(x.device) if most is None else most
    plane_bytes = channels * dtype.itemsize * torch.Size(rest).numel()
    outputs = geometry.out_size(x.shape[2:])[0]
    every = slice(0, samples)
    if samples * planes * plane_bytes <= most:
        yield Slab(True, every, slice(0, outputs), slice(0, planes))
        return
    stride, padding = geometry.stride[0], geometry.padding[0]
    reach = geometry.dilation[0] * (geometry.kernel_size[0] - 1)
    height = max(1, (most // plane_bytes - reach) // stride)
    height = math.ceil(outputs / max(1, math.ceil(outputs / height)))  # no thin slab at the end
    height = math.ceil(height / multiple) * multiple
    for sample in range(samples):
        for start in range(0, outputs, height):
            stop = min(start + height, outputs)
            low, high = start * stride - padding, (stop - 1) * stride - padding + reach + 1
            source = slice(min(max(low, 0), planes), max(min(high, planes), 0))
            yield Slab(
                False,
                slice(sample, sample + 1),
                slice(start, stop),
                source,
                before=min(max(-low, 0), high - low),
                after=min(max(high - planes, 0), high - low),
            )


def outputs(y: Tensor, slab: Slab) -> Tensor:
    return y if slab.whole else y[slab.sample, :, slab.out]


def planes_of(x: Tensor, slab: Slab) -> Tensor:
    return x if slab.whole else x[slab.sample, :, slab.source]

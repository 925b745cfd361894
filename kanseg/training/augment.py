"""Random changes of patches in batches, on the device: what `data.transforms.augmentation` does one by one on the CPU.

A patch's changes depend on its `seed` alone, not on its batch, so processes and interruptions change nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kanseg.data.plan import Plan
from kanseg.data.transforms import BLUR, FIELD, LINEAR, MODES, STRENGTHS, coloured, rotation
from kanseg.training.task import Batch


class BatchAugmentation:
    """Rotation and scale, flips, noise, blur, brightness, low resolution and gamma of a batch.

    Called with {"image": (B, C, *patch), "label": (B, 1, *patch), "seed": (B,)}; gives the same keys. What else lies on
    the grid of the patches is moved as labels are.
    """

    def __init__(self, plan: Plan, strength: str = "standard") -> None:
        self.dims, self.mirror_axes, self.amount = plan.spatial_dims, plan.mirror_axes, STRENGTHS[strength]
        self.rotation, self.colours = rotation(plan, self.amount), coloured(plan)

    def __call__(self, batch: Batch) -> Batch:
        """The batch changed; the one that was given stays."""
        draws = [torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]]
        moved = self._moved({key: x.float() for key, x in batch.items() if key != "seed"}, draws)
        shaded = [self._shaded(one, draw) for one, draw in zip(moved["image"], draws, strict=True)]
        return {**batch, **moved, "image": torch.stack(shaded)}

    def _moved(self, batch: Batch, draws: list[torch.Generator]) -> Batch:
        """One resampling of the whole batch; a patch that is not turned keeps its values to rounding."""
        image = batch["image"]
        matrices = torch.stack([self._matrix(draw, image.shape[2:]) for draw in draws]).to(image)
        theta = torch.cat([matrices, torch.zeros_like(matrices[..., :1])], dim=-1)
        grid = F.affine_grid(theta, list(image.shape), align_corners=False)
        if self._of_dims(self.amount.deform):
            grid = grid + torch.stack([self._bent(draw, image.shape[2:]) for draw in draws]).to(image)
        how: dict[str, Any] = {"padding_mode": "border", "align_corners": False}
        return {key: F.grid_sample(x, grid, mode=MODES[key], **how) for key, x in batch.items()}

    def _matrix(self, draw: torch.Generator, size: torch.Size) -> Tensor:
        """From places in the new patch to places in the old, in `grid_sample`'s units and order (last axis first)."""
        extent = torch.tensor(size, dtype=torch.float32)
        matrix = torch.eye(self.dims)
        if _chance(draw, self._of_dims(self.amount.affine)):
            for angle, (a, b) in zip(self.rotation, self._planes(), strict=True):
                turn, by = torch.eye(self.dims), _between(draw, -angle, angle)
                turn[a, a] = turn[b, b] = math.cos(by)
                turn[a, b], turn[b, a] = -math.sin(by), math.sin(by)
                matrix = matrix @ turn
            scale = self._of_dims(self.amount.scale)
            matrix = matrix * torch.tensor([1 + _between(draw, -scale, scale) for _ in size])
        for axis in self.mirror_axes:
            if _chance(draw, 0.5):
                matrix[:, axis] *= -1
        return (matrix * extent[None, :] / extent[:, None]).flip((0, 1))

    def _bent(self, draw: torch.Generator, size: torch.Size) -> Tensor:
        """A smooth displacement (*patch, dims) in `grid_sample`'s units, 0 where the patch is not deformed."""
        if not _chance(draw, self._of_dims(self.amount.deform)):
            return torch.zeros(*size, self.dims)
        points = torch.rand(1, self.dims, *(max(2, round(n / FIELD)) for n in size), generator=draw)
        field = F.interpolate(2 * points - 1, size=list(size), mode=LINEAR[self.dims], align_corners=True)[0]
        reach = 2 * self.amount.reach / torch.tensor(size[::-1], dtype=torch.float32)
        return field.movedim(0, -1) * reach

    def _of_dims(self, pair: tuple[float, float]) -> float:
        """The entry for 2D or 3D."""
        return pair[self.dims - 2]

    def _planes(self) -> list[tuple[int, int]]:
        """The plane that each angle turns: about axis 0, 1 and 2 in 3D."""
        return [(0, 1)] if self.dims == 2 else [(1, 2), (0, 2), (0, 1)]

    def _shaded(self, image: Tensor, draw: torch.Generator) -> Tensor:
        """Changes of intensity of one image (C, *patch)."""
        if _chance(draw, self.amount.noise):
            own = torch.Generator(image.device).manual_seed(int(torch.randint(2**31, (), generator=draw)))
            noise = torch.randn(image.shape, generator=own, device=image.device)
            image = image + _between(draw, 0, self.amount.noise_std) * noise
        if _chance(draw, self.amount.blur):
            image = self._blurred(image, _between(draw, *BLUR))
        if _chance(draw, self.amount.brightness):
            image = image * (1 + _between(draw, -self.amount.brightness_range, self.amount.brightness_range))
        if _chance(draw, self.amount.coarse):
            image = self._coarse(image, _between(draw, 0.5, 1.0))
        if _chance(draw, self.amount.gamma):
            image = _gamma(image, _between(draw, *self.amount.gamma_range))
        for place, reach in enumerate(self.amount.colour_range if self.colours else ()):
            if _chance(draw, self.amount.colour):
                each = torch.tensor([_between(draw, -reach, reach) for _ in image]).to(image)[:, None, None]
                image = image * (1 + each) if place == 0 else image + each
        return image

    def _blurred(self, image: Tensor, sigma: float) -> Tensor:
        reach = math.ceil(3 * sigma)
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=image.device) / sigma) ** 2)
        kernel = kernel / kernel.sum()
        convolve = {2: F.conv2d, 3: F.conv3d}[self.dims]
        blurred = image[:, None]
        for axis in range(self.dims):
            shape, pad = [1] * (self.dims + 2), [0] * (2 * self.dims)
            shape[axis + 2] = len(kernel)
            pad[-2 * axis - 2] = pad[-2 * axis - 1] = reach
            blurred = convolve(F.pad(blurred, pad, mode="replicate"), kernel.view(shape))
        return blurred[:, 0]

    def _coarse(self, image: Tensor, zoom: float) -> Tensor:
        small = [max(1, round(n * zoom)) for n in image.shape[1:]]
        low = F.interpolate(image[None], size=small, mode="nearest-exact")
        return F.interpolate(low, size=image.shape[1:], mode=LINEAR[self.dims], align_corners=False)[0]


def _gamma(image: Tensor, gamma: float) -> Tensor:
    """Values raised to a power between their least and greatest, mean and spread kept, channel by channel."""
    axes = tuple(range(1, image.dim()))
    low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
    mean, std = image.mean(axes, keepdim=True), image.std(axes, keepdim=True)
    changed = ((image - low) / (high - low).clamp_min(1e-7)) ** gamma
    spread = changed.std(axes, keepdim=True).clamp_min(1e-7)
    return (changed - changed.mean(axes, keepdim=True)) / spread * std + mean


def _chance(draw: torch.Generator, probability: float) -> bool:
    return _between(draw, 0, 1) < probability


def _between(draw: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=draw))

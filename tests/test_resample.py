"""Resampling along the axes: the numbers of MONAI and of scipy, there and back, in little memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd, Spacingd
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from kanseg.data import resample
from kanseg.data.plan import Plan
from kanseg.data.resample import ResampleAlongAxes
from kanseg.data.transforms import preprocessing
from kanseg.memory import taken

KEYS = ("image", "label")
TURNED = Rotation.from_euler("xyz", [0.3, -0.2, 0.1]).as_matrix()
SHEAR = np.array([[1, 0.2, 0], [0, 1, 0], [0, 0, 1]])
GRIDS = {  # without places halfway between two voxels, where MONAI takes one label or the other by rounding
    "finer": ((24, 20, 18), (1.5, 1.5, 1.5), (0.7, 0.7, 1.0)),
    "coarser": ((40, 36, 30), (0.7, 0.7, 1.0), (1.43, 1.43, 1.43)),
    "thick": ((32, 30, 7), (0.5, 0.5, 5.9), (1.0, 1.0, 1.0)),
    "thin": ((1, 30, 40), (2.0, 0.81, 0.81), (2.0, 1.0, 1.0)),
    "same": ((20, 20, 20), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
}


def item(shape: tuple[int, ...], spacing: tuple[float, ...], turn: np.ndarray) -> dict:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * np.array(spacing) * (-1, 1, 1), (3, 4, 5)
    affine = torch.from_numpy(affine.astype(np.float32).astype(float))  # as NIfTI stores it
    return {
        "image": MetaTensor(torch.randn(2, *shape), affine=affine),
        "label": MetaTensor(torch.randint(5, (1, *shape)).float(), affine=affine),
    }


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("turn", [np.eye(3), TURNED, SHEAR], ids=["straight", "turned", "sheared"])
@pytest.mark.parametrize("at_once", [1 << 21, 500])
def test_resampling_there_and_back_is_monais(
    grid: str, turn: np.ndarray, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resample, "AT_ONCE", at_once)
    shape, spacing, wanted = GRIDS[grid]
    given, results = item(shape, spacing, turn), []
    for own in (False, True):
        spaced = Spacingd(
            KEYS, wanted, mode=["bilinear", "nearest"], padding_mode="border", allow_missing_keys=True
        )
        if own:
            spaced.spacing_transform.sp_resample = ResampleAlongAxes(dtype=np.float64)
        both = Compose([Orientationd(KEYS, axcodes="RAS", labels=None, allow_missing_keys=True), spaced])
        done = both({key: value.clone() for key, value in given.items()})
        back = both.inverse({"image": done["image"]})["image"]
        assert back.shape == given["image"].shape
        results.append([done["image"], done["label"], back, done["image"].affine, back.affine])
    exact = at_once > 500
    for monai, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, monai, atol=0 if exact else 1e-5, rtol=0)


def test_finer_and_coarser_grids_are_interpolated_as_by_scipy(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resample, "AT_ONCE", 500)
    plan.spacing[:] = [0.8, 1.3, 1.0]
    given = item((20, 24, 18), (1.0, 1.0, 1.5), np.eye(3))
    done = preprocessing(plan)(given)["image"]
    places = np.stack([*np.indices(done.shape[1:]), np.ones(done.shape[1:])]).reshape(4, -1)
    places = np.linalg.solve(given["image"].affine.numpy(), done.affine.numpy() @ places)[:3]
    expected = map_coordinates(given["image"][0].numpy().astype(float), places, order=1, mode="nearest")
    np.testing.assert_allclose(done[0].numpy().ravel(), expected, atol=1e-5)


def test_labels_come_from_the_nearest_voxel(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halfway between two voxels from one of them, also where a finer grid has such places by the dozen."""
    monkeypatch.setattr(resample, "AT_ONCE", 500)
    plan.spacing[:] = [0.5, 1.0, 2.5]
    given = item((12, 14, 11), (1.0, 1.0, 1.0), np.eye(3))
    done = preprocessing(plan)({key: value.clone() for key, value in given.items()})["label"][0]
    labels = given["label"][0].flip(0)  # the axis points to the left
    ways = [np.arange(n) * step for n, step in zip(done.shape, plan.spacing, strict=True)]
    places = np.meshgrid(
        *(way.clip(0, n - 1) for way, n in zip(ways, labels.shape, strict=True)), indexing="ij"
    )
    ends = [[np.ceil(place - 0.5).astype(int), np.floor(place + 0.5).astype(int)] for place in places]
    assert done.numel() > 500
    assert any((end[0] != end[1]).any() for end in ends)
    near = np.array([labels[x, y, z].numpy() for x in ends[0] for y in ends[1] for z in ends[2]])
    assert (near == done.numpy()).any(0).all()


def taken_by_resampling(mode: str) -> tuple[int, int]:
    """Bytes at most, and voxels of the result."""
    size, affine = (320, 320, 320), torch.diag(torch.tensor([0.5, 0.5, 0.5, 1.0])).double()
    values = MetaTensor(torch.zeros(1, 160, 160, 160), affine=torch.eye(4).double())
    base = taken("VmRSS")
    resampled = ResampleAlongAxes(dtype=np.float64)
    found = resampled(values, affine, size, mode=mode, padding_mode="border", align_corners=False)
    return taken("VmHWM") - base, found.numel()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the memory")
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_resampling_takes_little_more_than_its_result(mode: str, apart: Callable[..., Any]) -> None:
    """Coordinates of all voxels at once would be 56 bytes of each; the result has 4."""
    peak, voxels = apart(taken_by_resampling, mode)
    assert peak < 20 * voxels  # a third of that here; libraries that are loaded on the way count too

"""The demonstration runs offline from start to end and says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from kanseg.data.embedded import LABELS, write_demo_data
from kanseg.demo import run_demo
from kanseg.errors import UserError

pytest.importorskip("nilearn", reason="the demonstration needs nilearn: pip install 'kanseg[demo]'")


def test_front_and_back_do_not_overlap_and_lie_in_one_space(tmp_path: Path) -> None:
    data = write_demo_data(tmp_path)
    blocks = sorted(nib.load(p).affine[1, 3] for p in (data / "imagesTr").iterdir())
    ends = sorted(nib.load(p).affine[1, 3] + nib.load(p).shape[1] for p in (data / "imagesTr").iterdir())
    (front,) = (nib.load(p) for p in (data / "imagesTs").iterdir())
    assert ends[-1] <= front.affine[1, 3]
    assert all(end <= start for end, start in zip(ends[:-1], blocks[1:], strict=True))
    labels = np.asarray(nib.load(data / "labelsTs" / next((data / "labelsTs").iterdir()).name).dataobj)
    assert set(np.unique(labels)) == set(range(len(LABELS)))


def test_demo_writes_what_it_promises(tmp_path: Path) -> None:
    summary = run_demo(tmp_path / "demo", minutes=0.05)
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == summary
    for key in ("label_map", "picture", "scores", "model"):
        assert Path(summary[key]).exists()
    image = nib.load(next((tmp_path / "demo" / "data" / "imagesTs").iterdir()))
    mask = nib.load(summary["label_map"])
    np.testing.assert_allclose(mask.affine, image.affine)
    assert mask.shape == image.shape
    assert "not a benchmark" in summary["remark"]
    with pytest.raises(UserError, match="already holds a demonstration"):
        run_demo(tmp_path / "demo")


@pytest.mark.slow
def test_demo_reaches_its_dice(tmp_path: Path) -> None:
    assert run_demo(tmp_path / "demo")["mean_dice"] >= 0.88

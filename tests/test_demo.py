"""The demonstration: its data lies where the template lies, and the whole way runs."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from kanseg import demo
from kanseg.data import embedded
from kanseg.data.formats import read_dataset
from kanseg.data.images import read_image
from kanseg.errors import UserError

needs_nilearn = pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None,
    reason="the demo's data comes with: pip install 'kanseg[demo]'",
)


@needs_nilearn
def test_blocks_lie_where_the_template_lies_and_never_overlap(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template

    monkeypatch.setattr(embedded, "RESOLUTION", 2)
    dataset = read_dataset(embedded.write_demo_data(tmp_path))
    template, grey = load_mni152_template(resolution=2), load_mni152_gm_template(resolution=2)
    volume, grey_matter = template.get_fdata(dtype=np.float32), grey.get_fdata(dtype=np.float32)
    spans = []
    for case in (*dataset.cases, *dataset.test_cases):
        image = nib.load(case.images[0])
        path = case.label or tmp_path / "labelsTs" / case.images[0].name
        label = np.asarray(nib.load(path).dataobj)
        corner = np.rint(np.linalg.inv(template.affine) @ image.affine[:, 3]).astype(int)[:3]
        box = tuple(slice(c, c + n) for c, n in zip(corner, image.shape, strict=True))
        np.testing.assert_array_equal(np.asarray(image.dataobj), volume[box])
        assert set(np.unique(label)) == {0, 1, 2, 3}
        assert (grey_matter[box][label == 2] > 1 / 3).all()
        assert (label > 0).any(axis=(0, 2)).all()
        spans.append((image.affine[1, 3], (image.affine @ [0, image.shape[1] - 1, 0, 1])[1]))
    assert dataset.label_names == embedded.LABELS
    assert [case.id for case in dataset.test_cases] == ["mni152_front"]
    assert all(stop < start for (_, stop), (start, _) in pairwise(spans)), "back to front"


@needs_nilearn
def test_the_whole_way_runs_and_says_what_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "RESOLUTION", 4)
    monkeypatch.setattr(demo, "PATCH", [16] * 3)
    monkeypatch.setattr(demo, "FEATURES", [4, 8])
    console = Console(file=io.StringIO(), width=160)
    summary = demo.run_demo(tmp_path / "out", minutes=0.03, console=console)
    text = console.file.getvalue()
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert set(summary["dice"]) == set(embedded.LABELS[1:])
    assert summary["mean_dice"] == pytest.approx(np.mean(list(summary["dice"].values())))
    mask, image = read_image(Path(summary["label_map"])), read_image(next(tmp_path.rglob("imagesTs/*")))
    assert mask.array.shape == image.array.shape
    np.testing.assert_allclose(mask.affine, image.affine)
    for name in ("label_map", "picture", "scores", "model"):
        assert Path(summary[name]).exists()
        assert summary[name] in text
    volumes = summary["hippocampus"]["volume_ml"]
    assert all(1 < volume < 3.5 for volume in volumes.values())  # ml, of adults
    assert Path(summary["hippocampus"]["picture"]).exists()
    assert all(name in text for name in (*embedded.LABELS[1:], *volumes, "weights that come with kanseg"))
    assert "not a benchmark" in text
    with pytest.raises(UserError, match="already holds a demonstration"):
        demo.run_demo(tmp_path / "out", console=console)


def test_a_run_is_not_mixed_with_a_demonstration(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="or something else"):
        demo.run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_without_nilearn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "nilearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(UserError, match=r"pip install 'kanseg\[demo\]'"):
        embedded.write_demo_data(tmp_path / "data")
    assert not (tmp_path / "data").exists()


@needs_nilearn
@pytest.mark.slow
def test_the_demonstration_meets_its_number_in_its_time(tmp_path: Path) -> None:
    begun = time.monotonic()
    summary = demo.run_demo(tmp_path)
    assert time.monotonic() - begun < 480
    assert summary["mean_dice"] >= 0.88

"""Pictures and tables: what they show and that they are read the right way round."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture
from rich.console import Console

from kanseg.evaluation.metrics import METRICS, summarize_rows
from kanseg.evaluation.report import picture, score_table


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Picture.open(path).convert("RGB")).astype(int)


@pytest.fixture
def volume() -> tuple[np.ndarray, np.ndarray]:
    """A grey volume, axes right, front, up, and a ball of label 1 in its right upper front."""
    grid = np.indices((30, 36, 24))
    centre = np.array((20, 26, 16)).reshape(3, 1, 1, 1)
    labels = (np.linalg.norm(grid - centre, axis=0) < 5).astype(np.uint8)
    return grid[0] + 2.0 * grid[1] + np.random.default_rng(0).normal(0, 2, labels.shape), labels


def test_three_planes_stand_beside_each_other_with_reference_and_prediction(volume, tmp_path) -> None:
    image, labels = volume
    other = np.roll(labels, -6, axis=1)
    names = ("background", "ball")
    with_both = pixels(
        picture(image, labels, other, tmp_path / "a.png", spacing=(1, 1, 1), label_names=names)
    )
    alone = pixels(picture(image, None, other, tmp_path / "b.png", spacing=(1, 1, 1), label_names=names))
    assert with_both.shape[0] == alone.shape[0] > 800
    assert with_both.shape[1] == pytest.approx(1.5 * alone.shape[1], rel=0.01)
    same = pixels(picture(image, labels, labels, tmp_path / "c.png", spacing=(1, 1, 1), label_names=names))
    changed = (with_both != same).any(axis=(0, 2))
    assert changed.any()
    assert not changed[: int(0.6 * len(changed))].any(), "only the column of the prediction may differ"
    assert not list(tmp_path.glob(".*"))


def test_the_patients_right_is_on_the_left_and_up_is_up(tmp_path) -> None:
    image = np.zeros((20, 20, 20))
    image[0, 0, 0] = 1.0  # a range of intensities, far from every cut
    labels = np.zeros(image.shape, np.uint8)
    labels[13:17, 3:17, 13:17] = 1  # right, upper
    labels[3:7, 3:17, 3:7] = 2  # left, lower
    labels[9:11, 9:11, 3:17] = 1
    path = picture(
        image, None, labels, tmp_path / "a.png", spacing=(1, 1, 1), label_names=("background", "one", "two")
    )
    shown = pixels(path)
    height, width = shown.shape[:2]
    found = [np.argwhere(near(shown, colour)) for colour in ((31, 119, 180), (255, 127, 14))]
    coronal = [
        p[(p[:, 0] > 0.36 * height) & (p[:, 0] < 0.63 * height) & (p[:, 1] > width / 2)] for p in found
    ]
    (one_row, one_column), (two_row, two_column) = (p.mean(axis=0) for p in coronal)
    assert one_column < two_column
    assert one_row < two_row


def near(shown: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a colour lies over black as the label maps do."""
    return (np.abs(shown - 0.45 * np.array(colour)) < 12).all(axis=-1)


def test_values_with_gaps_take_their_own_colour_and_unknown_ones_none(tmp_path) -> None:
    image = np.zeros((40, 40))
    labels = np.zeros((40, 40), np.int32)
    labels[5:15], labels[20:30], labels[32:38] = 255, 7, 99
    path = picture(
        image,
        None,
        labels,
        tmp_path / "new" / "a.png",
        spacing=(1, 1),
        label_names=("background", "a", "b"),
        label_values=(0, 255, 7),
    )
    shown = pixels(path)
    first, second = near(shown, (31, 119, 180)).sum(), near(shown, (255, 127, 14)).sum()
    assert first == pytest.approx(second, rel=0.05)
    assert first > 1000
    black = (shown < 10).all(axis=-1).sum()
    # the 40 rows of the image, and 20 of the prediction: background and the unknown value
    assert black == pytest.approx(first / 10 * 60, rel=0.05)


def test_the_table_names_classes_and_hides_the_interval_of_one_case() -> None:
    def text(cases: int) -> str:
        rows = [
            {"case": str(i), "label": "grey matter", **dict.fromkeys(METRICS, 0.5 + 0.1 * i)}
            for i in range(cases)
        ]
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(score_table(summarize_rows(rows), "title"))
        return console.export_text()

    one, three = text(1), text(3)
    assert "grey matter" in one
    assert "0.500" in one
    assert "[" not in one
    assert "0.600 [0.5" in three

"""Pictures and tables: what they show and that they are read the right way round."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture
from rich.console import Console

from kanseg.errors import UserError
from kanseg.evaluation.metrics import METRICS, summarize_rows
from kanseg.evaluation.report import (
    SAFE,
    _differences,
    class_colours,
    draw_agreement,
    draw_curves,
    draw_scores,
    limits_of_agreement,
    picture,
    score_table,
)
from kanseg.training.run_report import Configuration

BLUE, ORANGE = (0, 114, 178), (230, 159, 0)  # of the first two classes


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Picture.open(path).convert("RGB")).astype(int)


@pytest.fixture
def volume() -> tuple[np.ndarray, np.ndarray]:
    """A grey volume, axes right, front, up, and a ball of label 1 in its right upper front."""
    grid = np.indices((30, 36, 24))
    centre = np.array((20, 26, 16)).reshape(3, 1, 1, 1)
    labels = (np.linalg.norm(grid - centre, axis=0) < 5).astype(np.uint8)
    return grid[0] + 2.0 * grid[1] + np.random.default_rng(0).normal(0, 2, labels.shape), labels


@pytest.mark.parametrize("with_reference", [True, False])
def test_a_long_name_stays_within_the_picture(volume, tmp_path, with_reference: bool) -> None:
    image, labels = volume
    how: dict[str, Any] = {
        "spacing": (1, 1, 1),
        "label_names": ("background", "right ventricular tract " * 8),
    }
    shown = pixels(picture(image, labels if with_reference else None, labels, tmp_path / "a.png", **how))
    legend = shown[-20:] < 200
    assert legend.any()
    assert not legend[:, :8].any()
    assert not legend[:, -8:].any()


def test_three_planes_stand_beside_each_other_with_reference_and_prediction(volume, tmp_path) -> None:
    image, labels = volume
    other = np.roll(labels, -6, axis=1)
    names = ("background", "ball")
    with_both = pixels(
        picture(image, labels, other, tmp_path / "a.png", spacing=(1, 1, 1), label_names=names)
    )
    alone = pixels(picture(image, None, other, tmp_path / "b.png", spacing=(1, 1, 1), label_names=names))
    assert with_both.shape[0] == alone.shape[0] > 800
    assert with_both.shape[1] == pytest.approx(2 * alone.shape[1], rel=0.01)
    same = pixels(picture(image, labels, labels, tmp_path / "c.png", spacing=(1, 1, 1), label_names=names))
    changed = (with_both != same)[:-60].any(axis=(0, 2))  # without the legend
    assert changed.any()
    assert not changed[: int(0.48 * len(changed))].any(), "only prediction and difference may differ"
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
    found = [np.argwhere(near(shown, colour)) for colour in (BLUE, ORANGE)]
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
    first, second = near(shown, BLUE).sum(), near(shown, ORANGE).sum()
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


def test_pictures_in_colours_stay_coloured(tmp_path: Path) -> None:
    image = np.zeros((40, 40, 3))
    image[..., 0] = 200
    labels = np.zeros((40, 40), np.uint8)
    shown = pixels(
        picture(image, labels, labels, tmp_path / "a.png", spacing=(1, 1), label_names=("none", "gland"))
    )
    assert (np.abs(shown - np.array([200, 0, 0])).max(axis=-1) < 3).mean() > 0.3


def test_the_legend_names_what_is_shown_and_no_more(tmp_path: Path) -> None:
    image, labels = np.random.default_rng(0).normal(size=(60, 60)), np.zeros((60, 60), np.int32)
    labels[5:20, 5:20] = 100

    def height(count: int) -> int:
        names = [f"organ {k}" for k in range(count)]
        return pixels(
            picture(image, None, labels, tmp_path / "a.png", spacing=(1, 1), label_names=names)
        ).shape[0]

    one = height(200)
    assert height(101) == one  # of 199 names one is there
    labels[:, 30:] = np.arange(1800).reshape(60, 30) % 200
    assert one < height(200) == height(101)  # names beyond the fortieth are counted


def test_every_case_has_a_point_and_many_classes_are_cut_to_the_lowest(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    few = {"liver": generator.uniform(0.8, 1, 50), "mean": generator.uniform(0.8, 1, 50)}
    many = {f"label {k}": generator.uniform(0, 1, 5) for k in range(200)}
    shown = pixels(draw_scores(few, tmp_path / "few.png"))
    blue = (shown[..., 2] - shown[..., 0] > 60).any(axis=1)
    rows = np.flatnonzero(blue)
    assert len(rows) > 20
    assert rows.max() < 0.35 * shown.shape[0], "all points lie above 0.8"
    wide = pixels(draw_scores(many, tmp_path / "many.png"))
    assert shown.shape[1] < wide.shape[1] < 3000


def test_curves_of_one_epoch_and_without_validation_are_drawn(tmp_path: Path) -> None:
    once = [{"epoch": 0, "loss": 1.0, "mean_dice": None}]
    long = [{"epoch": e, "loss": 1 / (e + 1), "mean_dice": e / 50} for e in range(50)]
    shown = pixels(draw_curves({"fold 0": once, "fold 1": long}, tmp_path / "a.png"))
    assert (shown < 200).any(axis=-1).mean() > 0.005


@pytest.mark.parametrize("width", [80, 140])
def test_intervals_stay_whole_in_narrow_terminals(width):
    scores = {
        metric: {"mean": mean, "ci95": [mean - 0.05, mean + 0.05], "n": 9}
        for metric, mean in {"dice": 0.8, "iou": 0.7, "hd95": 12.5, "nsd": 0.9}.items()
    }
    console = Console(width=width, file=io.StringIO())
    long = "a structure of a long name [1]"
    console.print(score_table({long: scores, "right": scores, "mean": scores}))
    shown = console.file.getvalue()
    assert shown.count("[0.750, 0.850]") == shown.count("[12.45, 12.55]") == 3
    assert "[1]" in shown
    assert max(map(len, shown.splitlines())) <= width


def test_epochs_are_counted_in_whole_numbers_also_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr("kanseg.evaluation.report.saved", lambda figure, path: figures.append(figure))
    draw_curves({"fold 0": [{"epoch": 0, "loss": 1.0, "mean_dice": 0.5}]}, tmp_path / "a.png")
    for axes in figures[0].axes:
        low, high = axes.get_xlim()
        shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert shown == [0, 1]


def drawn(monkeypatch: pytest.MonkeyPatch, draw: Callable[..., object], *args: object, **how: object) -> Any:
    """The figure of what would be saved."""
    figures: list[Any] = []
    monkeypatch.setattr("kanseg.evaluation.report.saved", lambda figure, path: figures.append(figure))
    draw(*args, "a.png", **how)
    return figures[0]


def test_planes_say_where_the_patients_ends_are_and_how_long_ten_millimetres(volume, monkeypatch) -> None:
    """A bar of n mm is n / spacing voxels long, also where voxels are no cubes."""
    image, labels = volume
    figure = drawn(monkeypatch, picture, image, None, labels, spacing=(1.0, 0.5, 4.0))
    planes = figure.axes[::2]
    assert [axes.get_ylabel() for axes in planes] == ["sagittal", "coronal", "axial"]
    for axes, ends, spacing in zip(planes, ("AP", "RL", "RL"), (0.5, 1.0, 1.0), strict=True):
        one, other, scale = axes.texts
        assert (one.get_text(), other.get_text()) == tuple(ends)
        assert one.get_position()[0] < other.get_position()[0]
        (bar,) = axes.lines
        length = float(scale.get_text().removesuffix(" mm"))
        assert np.ptp(bar.get_xdata()) * spacing == pytest.approx(length)
        assert axes.get_xlim()[0] < min(bar.get_xdata()) < max(bar.get_xdata()) < axes.get_xlim()[1]


def test_differences_are_missed_added_or_of_another_class_and_never_where_the_reference_is_ignored() -> None:
    reference = np.array([0, 5, 5, 5, 0, 9, 9])
    prediction = np.array([0, 5, 0, 7, 5, 5, 0])
    assert _differences(prediction, reference, [0, 5, 7]).tolist() == [0, 0, 1, 3, 2, 0, 0]


def test_up_to_six_classes_have_colours_that_the_colour_blind_tell_apart() -> None:
    """Those of Okabe and Ito, also as seen with deuteranopia (Machado 2009, severity 1)."""
    seen_by = np.array(
        [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    )  # of linear red, green and blue
    colours = np.array(class_colours(6))[:, :3]
    assert len(class_colours(6)) == len(SAFE)
    seen = colours**2.2 @ seen_by.T
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[~np.eye(6, dtype=bool)]
    assert apart.min() > 0.1
    assert len({tuple(colour) for colour in class_colours(30)}) == 30


def test_limits_of_agreement_are_those_of_bland_and_altman_and_drawn(monkeypatch) -> None:
    """By the formula of their paper: mean -+ 1.96 standard deviations of the differences."""
    said, true = np.array([1.0, 2.0, 4.0, 8.0]), np.array([1.5, 1.0, 4.0, 6.0])
    d = said - true
    spread = 1.96 * np.sqrt(((d - d.mean()) ** 2).sum() / 3)
    low, high = limits_of_agreement(d)
    assert (low, high) == pytest.approx((d.mean() - spread, d.mean() + spread))
    both = {"liver": np.stack([said, true]), "$x_1$": np.stack([true, said])}
    figure = drawn(monkeypatch, draw_agreement, both)
    liver, other = figure.axes
    assert [line.get_ydata()[0] for line in liver.lines[2:]] == pytest.approx([d.mean(), low, high])
    assert [line.get_ydata()[0] for line in other.lines[2:]] == pytest.approx([-d.mean(), -high, -low])
    assert np.allclose(liver.lines[0].get_xdata(), (said + true) / 2)
    assert np.allclose(liver.lines[0].get_ydata(), d)


def test_the_table_says_within_what_distance_a_surface_counts() -> None:
    rows = [{"case": "a", "label": "liver", **dict.fromkeys(METRICS, 0.5)}]
    for unit, tolerance, said in (("mm", 1.0, "1 mm"), ("mm", 2.5, "2.5 mm"), ("pixels", 1, "1 pixel")):
        columns = score_table(summarize_rows(rows), unit=unit, tolerance=tolerance).columns
        assert columns[-1].header == f"NSD ({said})"


@pytest.mark.parametrize("letters", [5, 18, 45])
def test_the_legend_stays_within_the_picture(letters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(26).repeat(40).reshape(26, 40)
    names = ["background", *(f"{'n' * letters}{k}" for k in range(25))]
    for reference in (labels, None):
        figure = drawn(monkeypatch, picture, labels, reference, labels, spacing=(1, 1), label_names=names)
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_scores_of_a_run_that_are_damaged_are_named(tmp_path: Path) -> None:
    (tmp_path / "cross_validation.json").write_text('{"metrics": ')
    with pytest.raises(UserError, match=r"cross_validation.json is damaged. .*--resume writes it anew"):
        _ = Configuration("3d", tmp_path).result

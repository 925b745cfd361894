"""Labels that are pictures in colour, or numbers of a palette, as PASCAL VOC and annotation tools write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from kanseg.data.doctor import diagnose
from kanseg.data.formats import read_dataset
from kanseg.data.images import read_image, read_label
from kanseg.errors import UserError
from kanseg.evaluation.folders import evaluate_folders, options_of

COLOURS = np.array(
    [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 128]], np.uint8
)  # VOC's first, and a grey one
Write = Callable[[np.ndarray, Path], None]


def label(number: int) -> np.ndarray:
    """All four classes in odd cases, three in even ones."""
    array = np.zeros((16, 20), np.uint8)
    array[2:9, 3 : 10 + number], array[10:14, 2:8] = 1, 2
    array[10:14, 12:15] = 3 * (number % 2)
    return array


def with_palette(array: np.ndarray, path: Path, colours: np.ndarray = COLOURS) -> None:
    picture = Picture.fromarray(array)
    picture.putpalette(colours.ravel().tolist())
    picture.save(path)


def in_colours(array: np.ndarray, path: Path) -> None:
    Picture.fromarray(COLOURS[array]).save(path)


def with_opacity(array: np.ndarray, path: Path) -> None:
    Picture.fromarray(np.dstack([COLOURS[array], np.full_like(array, 255)])).save(path)


def quantized(array: np.ndarray, path: Path) -> None:
    """As a program that saves bytes does: colours are numbered by how often they occur."""
    order = np.argsort(-np.bincount(array.ravel(), minlength=4), kind="stable")[::-1]
    with_palette(np.argsort(order)[array].astype(np.uint8), path, COLOURS[order])


def pictures(root: Path, write: Write, count: int = 4) -> Path:
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (16, 20, 3), np.uint8)
        Picture.fromarray(noise).save(root / "images" / f"c{number}.png")
        write(label(number), root / "labels" / f"c{number}.png")
    return root


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_the_numbers_of_a_palette_are_the_label(tmp_path: Path, suffix: str) -> None:
    with_palette(label(1), tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read_label(tmp_path / f"a{suffix}", 2), label(1))
    np.testing.assert_array_equal(  # and its colours the image
        read_image(tmp_path / f"a{suffix}", 2).array, np.moveaxis(COLOURS[label(1)], -1, 0)
    )


def test_grey_levels_of_a_palette_are_the_label(tmp_path: Path) -> None:
    levels = np.array([[255] * 3, [0] * 3, [7] * 3], np.uint8)  # the palette only saves bytes
    with_palette(label(2), tmp_path / "a.png", levels)
    np.testing.assert_array_equal(read_label(tmp_path / "a.png"), levels[label(2), 0])


def test_labels_with_a_palette_are_trained_on_and_scored_as_their_numbers(tmp_path: Path) -> None:
    root = pictures(tmp_path / "set", with_palette)
    assert read_dataset(root).label_values == (0, 1, 2, 3)
    assert not diagnose(root).findings
    for number in range(4):
        Picture.fromarray(label(number)).save(tmp_path / f"c{number}.png")
    scores = evaluate_folders(tmp_path, root / "labels")
    assert {name: row["dice"]["mean"] for name, row in scores["metrics"].items()} == dict.fromkeys(
        ["label 1", "label 2", "label 3", "mean"], 1.0
    )


@pytest.mark.parametrize("write", [in_colours, with_opacity, quantized])
def test_colours_are_numbered_in_a_repaired_copy(tmp_path: Path, write: Write) -> None:
    root = pictures(tmp_path / "set", write)
    found = diagnose(root)
    assert [f.kind for f in found.errors] == ["colours"]
    assert "#000000, #008000, #800000, #808080" in found.errors[0].message
    found.fix(tmp_path / "fixed")
    dataset = read_dataset(tmp_path / "fixed")
    assert dataset.label_names == ("background", "#008000", "#800000", "#808080")
    for number, case in enumerate(dataset.cases):
        expected = np.array([0, 2, 1, 3])[label(number)]
        np.testing.assert_array_equal(read_label(case.label), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("write", "message"),
    [(in_colours, "has the colours #000000, #008000, #800000"), (quantized, "no classes")],
)
def test_colours_are_refused_by_name_in_training(tmp_path: Path, write: Write, message: str) -> None:
    root = pictures(tmp_path / "set", write)
    with pytest.raises(UserError, match=rf"{message}.*doctor DATA --fix"):
        read_dataset(root)


@pytest.mark.parametrize("write", [in_colours, with_opacity, quantized])
def test_references_in_colours_score_what_was_trained_on_their_numbers(tmp_path: Path, write: Write) -> None:
    """Also where the references lack a colour that the training had."""
    root = pictures(tmp_path / "set", write)
    diagnose(root).fix(tmp_path / "fixed")
    (root / "labels" / "c1.png").unlink()
    (root / "labels" / "c3.png").unlink()  # the only ones with grey
    fixed = tmp_path / "fixed" / "labelsTr"
    if write != quantized:  # whose numbers might be classes
        with pytest.raises(UserError, match=r"colours #008000, #800000, and .* '#008000=1,#800000=2"):
            evaluate_folders(fixed, root / "labels")
    labels = options_of(read_dataset(tmp_path / "fixed"))
    scores = evaluate_folders(fixed, root / "labels", **labels)
    found = {name: row["dice"]["mean"] for name, row in scores["metrics"].items()}
    assert found == dict.fromkeys(["#008000", "#800000", "#808080", "mean"], 1.0)
    assert scores["absent"] == ["#808080"]
    turned = evaluate_folders(fixed, root / "labels", labels={"#008000": 2, "#800000": 1, "#808080": 3})
    assert turned["metrics"]["#800000"]["dice"]["mean"] < 0.5
    Picture.fromarray(np.full((16, 20, 3), 9, np.uint8)).save(root / "labels" / "c0.png")
    with pytest.raises(UserError, match="colours #090909"):
        evaluate_folders(fixed, root / "labels", **labels)


def test_label_maps_that_are_both_in_colours_are_scored_by_these(tmp_path: Path) -> None:
    root = pictures(tmp_path / "set", in_colours)
    (tmp_path / "found").mkdir()
    for number in range(4):
        in_colours(np.where(label(number) == 2, 0, label(number)), tmp_path / "found" / f"c{number}.png")
    scores = evaluate_folders(tmp_path / "found", root / "labels")
    found = {name: row["dice"]["mean"] for name, row in scores["metrics"].items()}
    assert found.pop("mean") == pytest.approx(2 / 3)
    assert found == {"#008000": 0, "#800000": 1, "#808080": 1}


TABLES = {
    "labelmap.txt": "# label:color_rgb:parts:actions\nbackground:0,0,0::\nliver:128,0,0::\ntumour:0,128,0::\n",
    "class_dict.csv": "name,r,g,b\nvoid,0,0,0\nliver,128,0,0\ntumour,0,128,0\n",
}


@pytest.mark.parametrize("table", TABLES)
def test_colours_are_called_as_a_table_beside_the_data_says(tmp_path: Path, table: str) -> None:
    root = pictures(tmp_path / "set", in_colours)
    (root / table).write_text(TABLES[table])
    diagnose(root).fix(tmp_path / "fixed")
    fixed = read_dataset(tmp_path / "fixed")
    assert fixed.label_names == ("background", "tumour", "liver", "#808080")
    scores = evaluate_folders(tmp_path / "fixed" / "labelsTr", root / "labels", **options_of(fixed))
    assert scores["metrics"]["liver"]["dice"]["mean"] == 1
    assert "liver" in evaluate_folders(root / "labels", root / "labels")["metrics"]
    numbers = pictures(tmp_path / "palette", with_palette)
    (numbers / table).write_text(TABLES[table])
    assert read_dataset(numbers).label_names == ("background", "liver", "tumour", "label 3")
    grey = pictures(
        tmp_path / "grey", lambda array, path: Picture.fromarray((array == 1) * np.uint8(255)).save(path)
    )
    (grey / table).write_text(TABLES[table].replace("128,0,0", "255,255,255"))
    assert read_dataset(grey).label_names == ("background", "liver")
    (root / table).write_text(TABLES[table].replace("tumour", "liver"))
    with pytest.raises(UserError, match="several colours one name"):
        diagnose(root)
    (root / table).write_text(TABLES[table].replace("128", "much"))
    with pytest.raises(UserError, match="no name with red, green and blue"):
        diagnose(root)


def test_one_number_in_two_colours_is_no_class(tmp_path: Path) -> None:
    root = pictures(tmp_path / "set", with_palette)
    with_palette(label(3), root / "labels" / "c3.png", COLOURS[[0, 2, 1, 3]])
    with pytest.raises(UserError, match="c3.png .*1 is #008000 there and #800000"):
        read_dataset(root)
    assert {f.kind for f in diagnose(root).errors} == {"colours"}


def test_colours_are_not_guessed_where_values_are_declared(tmp_path: Path) -> None:
    root = pictures(tmp_path / "set", in_colours)
    (root / "images").rename(root / "imagesTr")
    (root / "labels").rename(root / "labelsTr")
    for path in (root / "imagesTr").iterdir():
        path.rename(path.with_stem(f"{path.stem}_0000"))
    (root / "dataset.json").write_text('{"labels": {"background": 0, "a": 1, "b": 2, "c": 3}}')
    found = diagnose(root)
    assert [f.kind for f in found.errors] == ["colours for values"]
    with pytest.raises(UserError, match="cannot be repaired.*#800000"):
        found.fix(tmp_path / "fixed")


def test_greys_of_a_palette_that_nobody_declared_are_explained(tmp_path: Path) -> None:
    """A program wrote 0, 1, 2 with the palette 0, 127, 255: the greys count, and the message says what the file has."""
    levels = np.repeat(np.array([[0], [127], [255]], np.uint8), 3, axis=1)
    root = pictures(tmp_path / "set", lambda array, path: with_palette(np.minimum(array, 2), path, levels))
    entries = [{"image": f"images/c{n}.png", "label": f"labels/c{n}.png"} for n in range(4)]
    described = {"labels": {"0": "background", "1": "a", "2": "b"}, "training": entries}
    (root / "dataset.json").write_text(json.dumps(described))
    message = r"\[127, 255\], which dataset.json does not declare .* numbers in this file are \[0, 1, 2\]"
    with pytest.raises(UserError, match=message):
        read_dataset(root)
    assert {f.kind for f in diagnose(root).errors} >= {"undeclared values"}
    for path in (root / "labels").iterdir():
        Picture.fromarray(np.array(Picture.open(path))).save(path)
    assert read_dataset(root).label_values == (0, 1, 2)


def test_a_photograph_is_no_label_in_colours(tmp_path: Path) -> None:
    root = pictures(tmp_path / "set", in_colours)
    (root / "labels" / "c2.png").write_bytes((root / "images" / "c2.png").read_bytes())
    assert {f.kind for f in diagnose(root).errors} == {"no label map"}
    with pytest.raises(UserError, match=r"c2.png has 3 channels that differ, \d+ colours"):
        read_label(root / "labels" / "c2.png")


def void(array: np.ndarray, path: Path) -> None:
    """VOC's masks: 255 along the borders."""
    array[8:10] = 255
    with_palette(array, path, np.concatenate([COLOURS, np.zeros((251, 3), np.uint8), [[224, 224, 192]]]))


def test_void_beside_classes_is_told_and_may_be_left_aside(tmp_path: Path) -> None:
    root = pictures(tmp_path / "set", void)
    told = [note for note in read_dataset(root).notes if "--regions ignore=255" in note]
    assert len(told) == 1
    assert "255 beside classes" in {f.kind for f in diagnose(root).findings}
    dataset = read_dataset(root, regions={"ignore": [255]})
    assert (dataset.label_values, dataset.ignore_value) == ((0, 1, 2, 3), 255)
    assert not [note for note in dataset.notes if "--regions" in note]
    named = read_dataset(root, regions={"all": [1, 2, 3], "third": [3], "ignore": [255]})
    assert named.label_names == ("background", "all", "third")
    assert named.ignore_value == 255


def test_void_of_a_repaired_copy_is_no_class(tmp_path: Path) -> None:
    root = pictures(tmp_path / "set", void)
    values = diagnose(root).fix(tmp_path / "fixed")["label_values"]
    dataset = read_dataset(tmp_path / "fixed", regions={"ignore": [values["255"]]})
    assert (dataset.label_values, dataset.ignore_value) == ((0, 1, 2, 3), 4)

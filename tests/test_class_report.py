"""Scores, pictures and the report of classifiers; and the verbs around them, from a folder to the report."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_classification import SMALL, corners, kanseg, train, write, write_several

from kanseg.config import load_config
from kanseg.data.class_copies import copies
from kanseg.data.class_doctor import diagnose_classes
from kanseg.data.class_plan import plan_classes
from kanseg.data.image_classes import is_classes, read_classes
from kanseg.errors import UserError
from kanseg.evaluation.class_pictures import Roc, draw_confusion, draw_roc, roc
from kanseg.evaluation.class_tables import read_predictions
from kanseg.evaluation.classification import (
    _weighted_auc,
    class_rows,
    confusion,
    read_scored,
    score_intervals,
)
from kanseg.evaluation.compare import compare
from kanseg.inference.classify import predict_classes
from kanseg.training.run_folder import run_splits
from kanseg.training.run_report import write_report


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of pictures by class, 16 of each."""
    folder = tmp_path_factory.mktemp("pictures") / "pictures"
    images, labels = corners(48, 2, 0)
    for number, (image, label) in enumerate(zip(images, labels[:, 0], strict=True)):
        (folder / "abc"[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "abc"[label] / f"im{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one command makes of them."""
    made = tmp_path_factory.mktemp("run") / "run"
    code, said = kanseg("run", pictures, "-o", made, *SMALL, "data.folds=2", "classification.changes=[flip]")
    assert code == 0, said
    return made


def test_one_command_goes_from_the_folder_to_the_report(run: Path, pictures: Path) -> None:
    found = json.loads((run / "cross_validation.json").read_text())
    assert (found["held_out"], found["pooled"]["images"]) == ("validation", 48)
    scored = read_scored(run / "cross_validation.csv")
    assert sorted(scored.ids) == sorted(case.id for case in read_classes(pictures).cases)
    right = scored.probabilities.argmax(1) == [one[0] for one in scored.values]
    assert found["pooled"]["accuracy"] == pytest.approx(right.mean())
    html = (run / "report.html").read_text()
    pictured = sorted(path.name for path in (run / "report").glob("*.png"))
    assert pictured == ["confusion.png", "curves_run.png", "mistakes.png", "roc.png"]
    assert html.count("data:image/png;base64,") == len(pictured)
    shown = f"{found['pooled']['accuracy']:.3f} [{found['pooled']['ci95'][0]:.3f}"
    assert shown in (run / "report.md").read_text()
    assert "Dice" not in (run / "report.md").read_text()


def test_the_same_command_goes_on_and_another_is_refused(run: Path, pictures: Path, tmp_path: Path) -> None:
    weights = run / "fold_0" / "last.safetensors"
    before = weights.stat().st_mtime_ns
    options = [*SMALL, "data.folds=2", "classification.changes=[flip]"]
    assert kanseg("run", pictures, "-o", run, *options)[0] == 0
    assert weights.stat().st_mtime_ns == before
    code, said = kanseg("run", pictures, "-o", run, *options, "training.lr=0.5")
    assert (code, "was begun with training.lr=None, not '0.5'." in " ".join(said.split())) == (2, True)
    code, said = kanseg("run", pictures, "-o", tmp_path / "new", "--size", "small")
    assert (code, "only serve segmentation" in said, (tmp_path / "new").exists()) == (2, True, False)


def test_options_of_label_maps_are_refused_by_name(run: Path, pictures: Path, tmp_path: Path) -> None:
    for words in (["--memory", "4G"], ["--overlap", "0.5"], ["--format", "png"], ["--no-postprocess"]):
        code, said = kanseg("predict", "-m", run, "-i", pictures, "-o", tmp_path / "out", *words)
        assert (code, f"{words[0]} is for segmentation" in said) == (2, True)
    assert not (tmp_path / "out").exists()
    table = tmp_path / "table.csv"
    assert kanseg("predict", "-m", run, "-i", pictures, "-o", table, "--probabilities")[0] == 0
    for words in (["--labels", "1"], ["--ignore", "3"], ["--tolerance", "1"]):
        code, said = kanseg("evaluate", table, pictures, *words)
        assert (code, f"{words[0]} is for segmentation" in said) == (2, True)
    out = ["-o", tmp_path / "x"]
    for words in (
        ["export", run, *out, "-i", pictures],
        ["export", run, *out, "--to", "monai"],
    ):
        code, said = kanseg(*words)
        assert code in (1, 2)
        assert "classif" in said
    assert not (tmp_path / "x").exists()


def test_a_cohort_goes_on_where_it_stopped(run: Path, pictures: Path, tmp_path: Path) -> None:
    images, table = tmp_path / "in", tmp_path / "table.csv"
    images.mkdir()
    for number, image in enumerate(corners(3, 2, 5)[0]):
        Image.fromarray(image).save(images / f"im{number}.png")
    predict_classes([run], images, table)
    rows = list(csv.DictReader(table.open()))
    made = [row["p a"] for row in rows]
    rows[0]["p a"] = rows[1]["p a"] = "0.5"  # what is done is not looked at again
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows[:2])  # and here it stopped
    Image.fromarray(corners(1, 2, 6)[0][0]).save(images / "im1.png")  # but this image is another now
    predict_classes([run], images, table)
    found = {row["image"]: row["p a"] for row in csv.DictReader(table.open())}
    assert (found["im0"], found["im2"]) == ("0.5", made[2])
    assert found["im1"] != "0.5"
    predict_classes([run / "fold_0"], images, table)  # another model begins anew
    alone = tmp_path / "alone.csv"
    predict_classes([run / "fold_0"], images, alone)
    assert table.read_text() == alone.read_text()
    predict_classes([run], images, table)
    predict_classes([run], images, table, again=True)
    assert next(csv.DictReader(table.open()))["p a"] == made[0]
    with pytest.raises(UserError, match="predictions of 3 other images"):
        predict_classes([run], pictures, table)


def test_copies_of_training_images_are_told(run: Path, pictures: Path, tmp_path: Path) -> None:
    new = tmp_path / "in" / "new.png"
    shutil.copytree(pictures / "a", new.parent)
    Image.fromarray(corners(1, 2, 6)[0][0]).save(new)
    code, said = kanseg("predict", "-m", run, "-i", new.parent, "-o", tmp_path / "out")
    assert (code, "the networks were trained on 16 of these images (im" in said) == (0, True)
    code, said = kanseg("predict", "-m", run / "fold_0", "-i", new.parent, "-o", tmp_path / "fold")
    assert (code, "the networks were trained on 8 of these images (im" in said) == (0, True)
    code, said = kanseg("predict", "-m", run, "-i", new, "-o", tmp_path / "alone")
    assert (code, "the networks were trained on" in said) == (0, False)


def test_a_table_of_something_else_is_not_replaced(run: Path, pictures: Path, tmp_path: Path) -> None:
    labels = tmp_path / "cases.csv"
    labels.write_text("image,class\nim0.png,a\n")
    for again in (False, True):
        with pytest.raises(UserError, match="no table of predictions"):
            predict_classes([run], pictures, labels, again=again)
    assert labels.read_text() == "image,class\nim0.png,a\n"


def test_entropy_and_mirrored_images_are_what_they_say(run: Path, pictures: Path, tmp_path: Path) -> None:
    flipped = tmp_path / "flipped"
    for file in pictures.rglob("*.png"):
        (flipped / file.parent.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.array(Image.open(file))[:, ::-1]).save(flipped / file.parent.name / file.name)
    predict_classes([run], pictures, tmp_path / "plain.csv")
    predict_classes([run], flipped, tmp_path / "flipped.csv")
    predict_classes([run], pictures, tmp_path / "tta.csv", tta=True, uncertainty=True)
    plain, turned, both = (
        read_predictions(tmp_path / f"{name}.csv")[1] for name in ("plain", "flipped", "tta")
    )
    np.testing.assert_allclose(both, (plain + turned) / 2, atol=2e-5)
    entropy = [float(row["entropy"]) for row in csv.DictReader((tmp_path / "tta.csv").open())]
    np.testing.assert_allclose(entropy, -(both * np.log(both)).sum(1) / np.log(3), atol=1e-4)


def test_tables_and_models_are_combined_alike_and_compared(run: Path, pictures: Path, tmp_path: Path) -> None:
    tables = [tmp_path / f"{number}.csv" for number in (0, 1)]
    for number, table in enumerate(tables):
        predict_classes([run / f"fold_{number}"], pictures, table)
    folds = [run / "fold_0", run / "fold_1"]
    assert kanseg("ensemble", *tables, "-o", tmp_path / "both.csv")[0] == 0
    assert kanseg("ensemble", *folds, "-i", pictures, "-o", tmp_path / "models.csv")[0] == 0
    both, models = (read_predictions(tmp_path / f"{name}.csv") for name in ("both", "models"))
    assert both[0] == models[0]
    np.testing.assert_allclose(both[1], models[1], atol=2e-6)
    accuracy = []
    for number, table in enumerate(tables):
        assert kanseg("evaluate", table, pictures, "-o", tmp_path / f"scores{number}")[0] == 0
        accuracy.append(json.loads((tmp_path / f"scores{number}" / "summary.json").read_text())["accuracy"])
    found = compare(tmp_path / "scores0", tmp_path / "scores1", tmp_path / "compared")
    row = next(row for row in found["rows"] if row["class"] == "mean")
    assert (row["metric"], row["n"]) == ("accuracy", 48)
    assert (row["mean_a"], row["mean_b"]) == pytest.approx(tuple(accuracy))
    assert (tmp_path / "compared" / "comparison.png").exists()
    assert compare(*tables, reference=pictures)["rows"] == found["rows"]
    with pytest.raises(UserError, match="does not tell the true classes"):
        compare(*tables)
    assert kanseg("compare", run, run)[0] == 0


def test_intervals_classes_and_curves_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    chances = generator.dirichlet(np.ones(3), 60).round(1)  # with ties
    classes = generator.integers(0, 3, 60)
    truth = classes[:, None] == np.arange(3)
    rows = class_rows(chances, truth, list("abc"))
    said = chances.argmax(1)
    precision, recall, _, images = metrics.precision_recall_fscore_support(classes, said)
    for k, row in enumerate(rows.values()):
        assert (row["precision"], row["recall"], row["images"]) == pytest.approx(
            (precision[k], recall[k], images[k])
        )
        curve = roc(chances[:, k], truth[:, k])
        assert curve is not None
        assert curve.area == pytest.approx(metrics.roc_auc_score(truth[:, k], chances[:, k]))
        weight = generator.integers(0, 4, 60).astype(float)
        order = np.argsort(chances[:, k], kind="stable")
        expected = metrics.roc_auc_score(truth[:, k], chances[:, k], sample_weight=weight)
        assert _weighted_auc(chances[:, k], truth[:, k], order, weight) == pytest.approx(expected)
    np.testing.assert_array_equal(confusion(chances, classes, 3), metrics.confusion_matrix(classes, said))
    found = score_intervals(chances, truth, [str(i) for i in range(60)])
    means = {
        "accuracy": metrics.accuracy_score(classes, said),
        "balanced_accuracy": np.mean(recall),
        "auc": np.mean([row["auc"] for row in rows.values()]),
    }
    assert set(found) == set(means)
    for name, mean in means.items():
        assert found[name][0] < mean < found[name][1]


def test_intervals_of_copies_of_one_patient_are_points() -> None:
    chances, truth = (
        np.tile([[0.9, 0.1], [0.6, 0.4]], (8, 1)),
        np.tile([[True, False], [False, True]], (8, 1)),
    )
    found = score_intervals(chances, truth, [str(i // 2) for i in range(16)])
    assert found == {"accuracy": [0.5, 0.5], "balanced_accuracy": [0.5, 0.5], "auc": [1.0, 1.0]}


@pytest.mark.parametrize("classes", [1, 2, 25, 100])
def test_pictures_of_any_number_of_classes_are_drawn(classes: int, tmp_path: Path) -> None:
    names = [f"class number {k}" for k in range(classes)]
    counts = np.random.default_rng(0).integers(0, 5, (classes, classes))
    curves = {name: Roc(np.array([0.0, 0.5, 1]), np.array([0.0, 1, 1]), 0.75) for name in names}
    for file in (draw_confusion(counts, names, tmp_path / "c.png"), draw_roc(curves, tmp_path / "r.png")):
        assert np.array(Image.open(file)).std() > 10


@pytest.mark.parametrize("dims", [2, 3])
def test_a_report_of_test_images_in_arrays_says_so(dims: int, tmp_path: Path) -> None:
    data = write(tmp_path / "corners.npz", dims)
    train(data, tmp_path / "run")
    text = write_report(tmp_path / "run").with_suffix(".md").read_text()
    assert "of 15 test images" in text
    assert "was chosen by these images" not in text


def test_a_report_of_images_with_any_number_of_classes_has_no_confusion(tmp_path: Path) -> None:
    train(write_several(tmp_path / "corners.npz"), tmp_path / "run")
    text = write_report(tmp_path / "run").with_suffix(".md").read_text()
    assert "all answers right" in text
    assert "Confusion" not in text
    assert (tmp_path / "run" / "report" / "roc.png").exists()


def test_a_run_without_a_finished_training_has_a_report_that_says_so(pictures: Path, tmp_path: Path) -> None:
    plan_classes(read_classes(pictures), tmp_path / "run")
    assert "No training is done" in write_report(tmp_path / "run").with_suffix(".md").read_text()


def table_of(folder: Path, rows: list[str], count: int = 12) -> Path:
    """Pictures of noise with a table of them; in the rows im0 and so on."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (70, 70)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"im{number}.png")
    (folder / "cases.csv").write_text("\n".join(rows))
    return folder


def test_copies_of_an_image_stay_on_one_side_of_every_split(tmp_path: Path) -> None:
    rows = ["image,class", *(f"im{number}.png,{'ab'[number % 2]}" for number in range(12))]
    data = table_of(tmp_path / "data", rows)
    noisy = np.array(Image.open(data / "im0.png")).astype(int) + np.random.default_rng(99).integers(
        -2, 3, (70, 70)
    )
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(data / "im2.png")
    (data / "im5.png").write_bytes((data / "im3.png").read_bytes())
    dataset = read_classes(data)
    pairs = copies(dataset)
    assert sorted(map(sorted, pairs)) == [["im0", "im2"], ["im3", "im5"]]
    for seed in range(4):
        run = tmp_path / f"run{seed}"
        plan_classes(dataset, run, same=pairs if seed else None)  # found here, or by the doctor before
        for fold in run_splits(dataset, load_config(overrides=["data.folds=3", f"data.seed={seed}"]), run):
            for pair in ({"im0", "im2"}, {"im3", "im5"}):
                assert len(pair & set(fold["val"])) != 1
    found = diagnose_classes(data)
    assert found.copies == pairs
    assert sorted((one.kind, one.case) for one in found.findings) == [("copy", "im2"), ("copy", "im5")]


def test_a_column_label_has_the_classes_where_it_names_no_files(tmp_path: Path) -> None:
    rows = ["image,label", *(f"im{number}.png,{'ab'[number % 2]}" for number in range(12))]
    dataset = read_classes(table_of(tmp_path / "data", rows))
    assert [dataset.label_names[case.values[0]] for case in dataset.cases] == ["a", "b"] * 6
    for number in range(12):
        (tmp_path / f"data/truth/{number}").mkdir(parents=True)
    series, missing = ([f"{folder}/{number}" for number in range(12)] for folder in ("truth", "gone"))
    for names in (["im0.png"] * 12, series, missing):
        lines = ["image,label", *(f"im{number}.png,{name}" for number, name in enumerate(names))]
        assert not is_classes(table_of(tmp_path / "data", lines))


def test_data_that_changed_since_planning_are_refused_with_the_difference(tmp_path: Path) -> None:
    rows = ["image,class", *(f"im{number}.png,{'ab'[number % 2]}" for number in range(12))]
    data, config = table_of(tmp_path / "data", rows), load_config()
    plan_classes(read_classes(data), tmp_path / "run")
    run_splits(read_classes(data), config, tmp_path / "run")
    (data / "cases.csv").write_text("\n".join([*rows[:3], "im2.png,b", *rows[4:]]))
    with pytest.raises(UserError, match="the class of im2 has changed"):
        run_splits(read_classes(data), config, tmp_path / "run")
    arrays = write(tmp_path / "corners.npz")
    plan_classes(read_classes(arrays), tmp_path / "arrays")
    np.savez(arrays, **{**np.load(arrays), "train_labels": np.load(arrays)["train_labels"][::-1]})
    with pytest.raises(UserError, match=r"corners\.npz has changed"):
        run_splits(read_classes(arrays), config, tmp_path / "arrays")


def test_a_patient_is_never_in_training_and_test_images(tmp_path: Path) -> None:
    split = ["train"] * 8 + ["test"] * 4
    rows = [f"im{number}.png,{'ab'[number % 2]},p{number % 8},{part}" for number, part in enumerate(split)]
    data = table_of(tmp_path / "data", ["image,class,patient,split", *rows])
    with pytest.raises(UserError, match="4 test images are of patients to train on"):
        plan_classes(read_classes(data))
    assert "patients in two parts" in [found.kind for found in diagnose_classes(data).errors]
    (data / "cases.csv").write_text(
        "\n".join(
            ["image,class,split", *(f"{r.split(',p')[0]},{p}" for r, p in zip(rows, split, strict=True))]
        )
    )
    plan_classes(read_classes(data))
    pattern = r"^im(.)"  # of the test images, too: im1 with im10 and im11
    with pytest.raises(UserError, match="2 test images are of patients to train on"):
        plan_classes(read_classes(data, id_pattern=pattern))


@pytest.mark.parametrize("whole", [True, False])
def test_classifiers_are_compared_by_patient_of_the_test_images(tmp_path: Path, whole: bool) -> None:
    split = ["train"] * 6 + ["test"] * 6
    rows = [f"im{i}.png,{'ab'[i % 2]},{part}{i // 3},{part}" for i, part in enumerate(split)]
    data = table_of(tmp_path / "data", ["image,class,patient,split", *rows])
    runs = [tmp_path / name for name in "ab"]
    for run in runs:
        train(data / "cases.csv", run, "data.folds=2")
        assert not whole or kanseg("train", run, "-f", "all", "--resume")[0] == 0
    result = compare(*runs)
    assert (result["cases"], result["patients"]) == (6, 2)


def test_an_image_that_is_not_there_does_not_stop_the_others(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").symlink_to(tmp_path / "gone.png")
    file = next((pictures / "a").iterdir())
    (tmp_path / "images" / "b.png").write_bytes(file.read_bytes())
    found = predict_classes([run], tmp_path / "images", tmp_path / "out")
    assert (found["predicted"], list(found["failed"])) == (1, ["a"])


def test_the_doctor_tells_what_is_wrong_with_images_by_class(tmp_path: Path) -> None:
    rows = [f"im{number}.png,{'ab'[number == 0]},train" for number in range(11)]
    data = table_of(tmp_path / "data", ["image,class,split", *rows, "im11.png,a,test"])
    (data / "im11.png").write_bytes((data / "im1.png").read_bytes())
    (data / "im2.png").write_bytes((data / "im0.png").read_bytes())
    Image.new("L", (70, 70), 7).save(data / "im3.png")
    found = {finding.kind: finding.case for finding in diagnose_classes(data).findings}
    expected = {"copy in another part": "im11", "copy with another class": "im2", "constant image": "im3"}
    assert found == expected | {"few images of a class": "", "uneven classes": ""}
    (data / "im10.png").write_bytes(b"no picture")
    assert [finding.case for finding in diagnose_classes(data).errors] == ["im10"]
    assert kanseg("doctor", data)[0] == 1
    code, said = kanseg("doctor", data, "--fix", tmp_path / "new")
    assert (code, "repairs label maps" in said, (tmp_path / "new").exists()) == (2, True, False)


def quiet_plan(data: Path, run: Path) -> list[str]:
    return plan_classes(read_classes(data), run).reasons


def test_a_plan_tells_of_uneven_classes_and_of_copies_between_given_parts(tmp_path: Path) -> None:
    rows = [f"im{number}.png,{'ab'[number < 2]},{'val' if number > 9 else 'train'}" for number in range(12)]
    data = table_of(tmp_path / "data", ["image,class,split", *rows])
    assert any("training.balanced=true" in reason for reason in quiet_plan(data, tmp_path / "one"))
    (data / "im11.png").write_bytes((data / "im3.png").read_bytes())
    assert any(
        "1 images lie in two parts or folds" in reason for reason in quiet_plan(data, tmp_path / "two")
    )
    rows = [f"im{number}.png,{'ab'[number < 2]},{number % 2}" for number in range(12)]
    table_of(data, ["image,class,fold", *rows])
    (data / "im10.png").write_bytes((data / "im3.png").read_bytes())
    assert any(
        "1 images lie in two parts or folds" in reason for reason in quiet_plan(data, tmp_path / "folds")
    )
    assert len(run_splits(read_classes(data), load_config(), tmp_path / "folds")) == 2

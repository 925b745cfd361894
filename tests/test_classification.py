"""Classifiers learn, are scored as by other libraries, predict by the command line, and give their encoders on."""

from __future__ import annotations

import csv
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from test_ensemble import checkpoint
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from kanseg import Segmenter, create_model
from kanseg.cli import app, main
from kanseg.config import load_config
from kanseg.data.class_plan import plan_classes
from kanseg.data.image_classes import read_classes
from kanseg.data.plan import Plan
from kanseg.encoders import load_encoder
from kanseg.errors import UsageError, UserError
from kanseg.evaluation.class_tables import read_predictions, write_predictions
from kanseg.evaluation.classification import class_scores, evaluate_classes, label_scores
from kanseg.export.network import FORMATS, export_network
from kanseg.inference.classify import is_classifier, predict_classes
from kanseg.inference.ensemble import Loaded
from kanseg.layers import take_balance_loss
from kanseg.training.checkpoint import load_model
from kanseg.training.classification import (
    CLASS_LOSSES,
    LABEL_LOSSES,
    PREDICTIONS,
    Classification,
    class_loss,
)
from kanseg.training.fit import fit
from kanseg.training.monitor import read_log
from kanseg.training.optimizers import OPTIMIZERS, SCHEDULES
from kanseg.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "model=classifier",
    "model.options.encoder=plainkanet4",
    "model.options.encoder_options={layers:[4,8,8,8]}",
    "model.options.bottleneck=false",
    "training.batch_size=8",
    "training.steps_per_epoch=4",
    "training.max_epochs=1",
    "data.workers=0",
]


def corners(count: int, dims: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright corner, which is the class: 0, 1 or 2."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = generator.integers(0, 60, (count, *[8] * dims)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        place = [slice(0, 4)] * dims
        for axis in range(label):
            place[axis] = slice(4, 8)
        image[tuple(place)] += 120
    return images, labels[:, None]


def write(path: Path, dims: int = 2, test: bool = True) -> Path:
    parts = {"train": 48, "val": 18, "test": 15} if test else {"train": 48}
    arrays = {}
    for seed, (part, count) in enumerate(parts.items()):
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = corners(count, dims, seed)
    np.savez(path, **arrays)
    return path


def bright_corners(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with any of three corners bright, each a class of its own."""
    generator = np.random.default_rng(seed)
    labels = np.stack([(np.arange(count) >> bit) & 1 for bit in range(3)], axis=1)
    images = generator.integers(0, 60, (count, 8, 8)).astype(np.uint8)
    for image, row in zip(images, labels, strict=True):
        for there, (top, left) in zip(row, ((0, 0), (0, 4), (4, 0)), strict=True):
            image[top : top + 4, left : left + 4] += np.uint8(120 * there)
    return images, labels


def write_several(path: Path) -> Path:
    arrays = {}
    for seed, (part, count) in enumerate((("train", 64), ("val", 16), ("test", 24))):
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = bright_corners(count, seed)
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("corners") / "corners.npz")


def train(data: Path, run: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    config = load_config(overrides=[*SMALL, *overrides])
    dataset = read_classes(data)
    return fit(config, plan_classes(dataset, run), dataset, run, console=Console(quiet=True), **options)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    train(
        data,
        run,
        "training.max_epochs=4",
        "training.steps_per_epoch=15",
        "training.lr=0.01",
        "training.ema_decay=null",
    )
    return run


def test_it_learns_and_the_test_images_are_scored_at_the_end(trained: Path, data: Path) -> None:
    fold = trained / "fold_0"
    summary = json.loads((fold / "summary.json").read_text())
    assert (summary["held_out"], summary["images"]) == ("test", 15)
    assert summary["accuracy"] > 0.9
    assert [record["accuracy"].keys() for record in read_log(fold / "log.jsonl")] == [{"top-1"}] * 4
    ids, probabilities, names, _ = read_predictions(fold / "validation" / PREDICTIONS)
    assert names == ["0", "1", "2"]
    truth = {case.id: case.values[0] for case in read_classes(data).test_cases}
    right = [truth[name] == row.argmax() for name, row in zip(ids, probabilities, strict=True)]
    assert np.mean(right) == summary["accuracy"]
    assert (fold / "progress.png").exists()


def test_an_exported_classifier_gives_its_probabilities_by_what_model_json_says(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    said = export_network([trained], tmp_path, "torch")
    about = json.loads((tmp_path / "model.json").read_text())
    assert about["parity"] == said["parity"]
    assert about["output"]["shape"] == ["windows", len(about["classes"])]
    (scaling,) = about["plan"]["normalization"]
    with np.load(data) as arrays:
        images = (np.float32(arrays["test_images"][:, None]) - scaling["mean"]) / scaling["std"]
    assert list(images.shape[1:]) == about["input"]["shape"][1:]
    logits = torch.from_numpy(FORMATS["torch"].open(tmp_path / about["file"])(images))
    ids, probabilities, names, _ = read_predictions(trained / "fold_0" / "validation" / PREDICTIONS)
    assert names == [one["name"] for one in about["classes"]]
    assert ids == sorted(ids)
    np.testing.assert_allclose(logits.softmax(1), probabilities, atol=1e-5)
    assert f"subtract {scaling['mean']:g}, divide by {scaling['std']:g}" in " ".join(about["steps"])


def test_images_with_any_number_of_classes_are_learned_predicted_and_scored(tmp_path: Path) -> None:
    data, run = write_several(tmp_path / "corners.npz"), tmp_path / "run"
    options = ["training.max_epochs=4", "training.steps_per_epoch=20", "training.lr=0.02"]
    summary = train(data, run, *options, "training.ema_decay=null", "classification.label_smoothing=0.05")
    assert (summary["held_out"], summary["images"]) == ("test", 24)
    assert (summary["auc"] > 0.95, summary["accuracy"] > 0.8, summary["exact"] > 0.4) == (True,) * 3
    assert [record["auc"].keys() for record in read_log(run / "fold_0" / "log.jsonl")] == [{"mean"}] * 4
    assert kanseg("predict", "-m", run, "-i", data, "-o", tmp_path / "out")[0] == 0
    table = tmp_path / "out" / PREDICTIONS
    with table.open() as file:
        rows = list(csv.DictReader(file))
    ids, probabilities, names, _ = read_predictions(table)
    assert names == ["0", "1", "2"]
    for row, chances in zip(rows, probabilities, strict=True):
        assert row["classes"] == "|".join(name for name, p in zip(names, chances, strict=True) if p >= 0.5)
    assert kanseg("evaluate", table, data, "-o", tmp_path / "scores")[0] == 0
    scores = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert scores["classes"] == summary["classes"]
    assert (scores["accuracy"], scores["ci95"], scores["auc"]) == tuple(
        summary[key] for key in ("accuracy", "ci95", "auc")
    )
    said = kanseg("evaluate", table, write(tmp_path / "one.npz"))[1]
    assert "says any number of classes an image, and" in said
    assert ids == [f"test-{number:06d}" for number in range(24)]


@pytest.mark.parametrize(
    "options", [["classification.cutmix=1.0"], ["classification.loss=focal"], ["training.balanced=true"]]
)
def test_options_of_classes_also_serve_any_number_of_them(options: list[str], tmp_path: Path) -> None:
    summary = train(write_several(tmp_path / "corners.npz"), tmp_path / "run", *options)
    assert 0 <= summary["auc"] <= 1


def test_scores_of_any_number_of_classes_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    probabilities, truth = generator.random((50, 4)), generator.random((50, 4)) > 0.7
    truth[:, 3] = False  # no image has it, so it has no AUC
    found = label_scores(probabilities, truth, list("abcd"))
    said = probabilities >= 0.5
    assert found["exact"] == pytest.approx(metrics.accuracy_score(truth, said))
    assert found["accuracy"] == pytest.approx(1 - metrics.hamming_loss(truth, said))
    areas = [metrics.roc_auc_score(truth[:, k], probabilities[:, k]) for k in range(3)]
    assert [found["classes"][name]["auc"] for name in "abc"] == pytest.approx(areas)
    assert found["auc"] == pytest.approx(np.mean(areas))
    assert found["classes"]["d"]["auc"] is None
    assert found["classes"]["b"]["accuracy"] == pytest.approx(metrics.accuracy_score(truth[:, 1], said[:, 1]))


def test_losses_of_any_number_of_classes_are_their_formulas() -> None:
    logits, target, weight = torch.randn(6, 4), (torch.rand(6, 4) > 0.5).float(), [1.0, 2.0, 0.5, 1.0]
    loss = LABEL_LOSSES.create("ce", label_smoothing=0.1, weight=weight)
    expected = F.binary_cross_entropy_with_logits(logits, target * 0.9 + 0.05, weight=torch.tensor(weight))
    torch.testing.assert_close(loss(logits, target), expected)
    torch.testing.assert_close(
        LABEL_LOSSES.create("focal", gamma=2.0)(logits, target),
        sigmoid_focal_loss(logits, target, alpha=-1, gamma=2.0, reduction="mean"),
    )
    assert set(LABEL_LOSSES) == set(CLASS_LOSSES)


def test_without_images_of_validation_and_test_a_fold_is_held_out(tmp_path: Path) -> None:
    summary = train(write(tmp_path / "alone.npz", test=False), tmp_path / "run", "data.folds=4", fold=1)
    splits = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert (summary["held_out"], summary["images"], len(splits)) == ("validation", 12, 4)


def test_a_stopped_training_ends_with_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        "training.max_epochs=2",
        "classification.mixup=0.4",
        "classification.cutmix=1",
        "model.options.head_dropout=0.5",
    )
    train(data, tmp_path / "whole", *options)
    step = Trainer._train_step

    def stop(self: Trainer, batches: Any) -> float:
        if self.state.updates == 5:
            self.stop.signal = 15
        return step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stop)
        with pytest.raises(SystemExit):
            train(data, tmp_path / "parted", *options)
    train(data, tmp_path / "parted", *options, resume=True)
    states = [load_model(tmp_path / name)[0].state_dict() for name in ("whole", "parted")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss_of_a_classifier(optimizer: str, data: Path, tmp_path: Path) -> None:
    train(
        data, tmp_path / "run", f"training={optimizer}", "training.steps_per_epoch=3", "training.max_epochs=2"
    )
    losses = [record["loss"] for record in read_log(tmp_path / "run" / "fold_0" / "log.jsonl")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_warms_up(schedule: str, data: Path, tmp_path: Path) -> None:
    train(
        data,
        tmp_path / "run",
        f"training.schedule={schedule}",
        "training.warmup=0.5",
        "training.max_epochs=4",
    )
    rates = [record["lr"] for record in read_log(tmp_path / "run" / "fold_0" / "log.jsonl")]
    assert rates[0] < rates[1]
    assert (rates[3] == rates[2]) == (schedule == "constant")


def test_the_power_of_the_schedule_is_an_option(data: Path, tmp_path: Path) -> None:
    for power in (0.2, 2.0):
        train(
            data, tmp_path / str(power), f"training.schedule_options={{power:{power}}}", "training.warmup=0"
        )
    flat, steep = (read_log(tmp_path / str(power) / "fold_0" / "log.jsonl")[0]["lr"] for power in (0.2, 2.0))
    assert flat == pytest.approx(1e-3 * 0.25**0.2)
    assert steep == pytest.approx(1e-3 * 0.25**2)
    with pytest.raises(UsageError, match="schedule 'cosine'.*power"):
        load_config(overrides=["training.schedule=cosine", "training.schedule_options={power:2}"])


@pytest.mark.parametrize("head", ["matryoshka", "kan"])
def test_nested_heads_and_class_balance_train(head: str, data: Path, tmp_path: Path) -> None:
    summary = train(data, tmp_path / "run", f"model.options.head={head}", "training.balanced=true")
    assert 0 <= summary["accuracy"] <= 1


@pytest.mark.parametrize("task", ["class", "mask"])
def test_the_imbalance_of_mixtures_is_part_of_the_loss(
    task: str, data: Path, tmp_path: Path, fit_balls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(run: Path) -> float:
        options = (
            "model.options.layer_options={num_experts:4,k:1}",
            "training.max_epochs=1",
            "training.ema_decay=null",
        )
        if task == "class":
            train(data, run, *options)
        else:
            fit_balls(*options, "model.options.kan_stages=all", run=run)
        return float(read_log(run / "fold_0" / "log.jsonl")[0]["loss"])

    whole = loss(tmp_path / "whole")
    monkeypatch.setattr(
        "kanseg.training.trainer.take_balance_loss", lambda model: 10 * take_balance_loss(model)
    )
    weighed = loss(tmp_path / "weighed")
    monkeypatch.setattr(
        "kanseg.training.trainer.take_balance_loss", lambda model: 0 * take_balance_loss(model)
    )
    alone = loss(tmp_path / "alone")
    assert alone < whole < weighed


def task_of(data: Path, *overrides: str) -> Classification:
    dataset = read_classes(data)
    config = load_config(overrides=[*SMALL, *overrides])
    plan = plan_classes(dataset)
    return Classification(config, plan, dataset.cases, [], torch.device("cpu"), dataset=dataset)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mixer", ["mixup", "cutmix"])
def test_mixed_images_carry_the_shares_of_their_classes(mixer: str, dims: int, tmp_path: Path) -> None:
    task = task_of(write(tmp_path / "corners.npz", dims), f"classification.{mixer}=1.0")
    batch = next(task.batches(0, 0, 0, 1))
    mixed, again = task.augmented(batch), task.augmented(batch)
    assert torch.equal(mixed["image"], again["image"])
    assert type(mixed["image"]) is torch.Tensor
    torch.testing.assert_close(mixed["label"].sum(1), torch.ones(8))
    one_hot = F.one_hot(batch["label"], 3).float()
    own, other = batch["image"], batch["image"].roll(1, 0)
    for place in range(8):
        if batch["label"][place] == batch["label"].roll(1)[place]:
            continue
        share = mixed["label"][place][batch["label"][place]]
        torch.testing.assert_close(
            mixed["label"][place], share * one_hot[place] + (1 - share) * one_hot.roll(1, 0)[place]
        )
        if mixer == "mixup":
            torch.testing.assert_close(mixed["image"][place], share * own[place] + (1 - share) * other[place])
        else:
            kept = (mixed["image"][place] == own[place]).float().mean()
            assert abs(kept - share) < 0.02  # a pixel may be the same in both


@pytest.mark.parametrize("soft", [False, True])
def test_the_losses_are_their_formulas(soft: bool) -> None:
    logits, smoothing = torch.randn(6, 4), 0.1
    target = torch.rand(6, 4).softmax(1) if soft else torch.randint(4, (6,))
    cross = CLASS_LOSSES.create("ce", label_smoothing=smoothing)
    torch.testing.assert_close(
        cross(logits, target), F.cross_entropy(logits, target, label_smoothing=smoothing)
    )
    flat = CLASS_LOSSES.create("focal", gamma=0.0, label_smoothing=smoothing)
    torch.testing.assert_close(flat(logits, target), cross(logits, target))
    if not soft:
        p = logits.softmax(1).gather(1, target[:, None])
        sharp = CLASS_LOSSES.create("focal", gamma=2.0)
        torch.testing.assert_close(sharp(logits, target), (-((1 - p) ** 2) * p.log()).mean())


def test_the_scores_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(7), 200)
    classes = generator.integers(0, 7, 200)
    found = class_scores(probabilities, classes, [str(i) for i in range(7)])
    assert found["accuracy"] == metrics.accuracy_score(classes, probabilities.argmax(1))
    assert found["top5"] == metrics.top_k_accuracy_score(classes, probabilities, k=5)
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(classes, probabilities, multi_class="ovr"))
    balanced = metrics.balanced_accuracy_score(classes, probabilities.argmax(1))
    assert found["balanced_accuracy"] == pytest.approx(balanced)
    low, high = found["ci95"]
    assert low < found["accuracy"] < high


@pytest.mark.parametrize("several", [False, True])
def test_intervals_draw_whole_patients(several: bool, tmp_path: Path) -> None:
    """Of the two images of each patient one is right: whatever patients are drawn, half of all is right."""
    column = "classes" if several else "class"
    rows = [f"image,{column},patient"]
    for number in range(16):
        Image.new("L", (4, 4)).save(tmp_path / f"im{number}.png")
        rows.append(f"im{number}.png,{'ab'[number // 8]},p{number // 2}")
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    truth = np.arange(16) // 8
    answers = np.eye(2)[np.where(np.arange(16) % 2, truth, 1 - truth)]
    table = write_predictions(
        tmp_path / "said.csv", [f"im{i}" for i in range(16)], answers, ["a", "b"], multilabel=several
    )
    found = evaluate_classes(table, tmp_path / "cases.csv")
    assert found["accuracy"] == 0.5
    assert found["ci95"] == [0.5, 0.5]
    dataset, config = read_classes(tmp_path / "cases.csv"), load_config(overrides=SMALL)
    cases, plan = dataset.cases, plan_classes(dataset)
    trained = Classification(config, plan, cases, cases, torch.device("cpu"), dataset=dataset)
    assert trained.summarize([answers.tolist()])["ci95"] == [0.5, 0.5]
    scores = label_scores if several else class_scores
    low, high = scores(answers, np.eye(2)[truth] if several else truth, ["a", "b"])["ci95"]  # of images
    assert low < 0.3 < 0.7 < high


def test_a_class_that_is_not_there_leaves_the_scores_finite() -> None:
    found = class_scores(np.eye(3)[[0, 0, 1]], np.array([0, 0, 1]), ["a", "b", "c"])
    assert (found["accuracy"], found["auc"], found["recall"]) == (1.0, 1.0, {"a": 1.0, "b": 1.0})
    assert class_scores(np.eye(2)[[0]], np.array([0]), ["a", "b"])["auc"] is None


def kanseg(*arguments: object) -> tuple[int, str]:
    """The command line in this process: exit code, and what went to standard error."""
    before, sys.argv = sys.argv, ["kanseg", *map(str, arguments)]
    said, err = io.StringIO(), sys.stderr
    sys.stderr = said
    try:
        main()
    except SystemExit as error:
        return int(error.code or 0), said.getvalue()
    finally:
        sys.argv, sys.stderr = before, err
    return 0, said.getvalue()


def test_plan_train_predict_and_evaluate_by_the_command_line(data: Path, tmp_path: Path) -> None:
    assert kanseg("plan", data, "-o", tmp_path / "run")[0] == 0
    assert kanseg("train", tmp_path / "run", *SMALL)[0] == 0
    assert kanseg("predict", "-m", tmp_path / "run", "-i", data, "-o", tmp_path / "out")[0] == 0
    assert kanseg("evaluate", tmp_path / "out" / PREDICTIONS, data, "-o", tmp_path / "scores")[0] == 0
    scores = json.loads((tmp_path / "scores" / "summary.json").read_text())
    summary = json.loads((tmp_path / "run" / "fold_0" / "summary.json").read_text())
    assert {key: scores[key] for key in ("images", "accuracy")} == {
        key: summary[key] for key in ("images", "accuracy")
    }
    code, said = kanseg(
        "predict", "-m", tmp_path / "run", "-i", data, "-o", tmp_path / "out", "--overlap", "0.1"
    )
    assert code == 2
    assert "for segmentation" in said
    code, said = kanseg("plan", data, "-o", tmp_path / "other", "--dim", "2")
    assert code == 2
    assert "has a class for each image" in said
    with pytest.raises(UsageError, match="is for classification. Predict by"):
        Segmenter.load(tmp_path / "run")


def test_pictures_are_predicted_by_name_and_a_broken_one_does_not_stop_the_others(
    trained: Path, tmp_path: Path
) -> None:
    images, labels = corners(4, 2, 9)
    (tmp_path / "in").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(np.kron(image, np.ones((3, 3), np.uint8))).save(tmp_path / "in" / f"im{number}.png")
    (tmp_path / "in" / "im1.png").write_bytes(b"no picture")
    code, said = kanseg("predict", "-m", trained, "-i", tmp_path / "in", "-o", tmp_path / "table.csv")
    assert code == 1
    assert "1 of 4 cases failed: im1" in said.splitlines()[-1]
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["im0", "im2", "im3"]
    assert [row["class"] for row in rows] == [str(labels[i, 0]) for i in (0, 2, 3)]
    for row in rows:
        assert sum(float(row[f"p {name}"]) for name in "012") == pytest.approx(1, abs=1e-4)
    Image.fromarray(np.kron(images[0], np.ones((3, 3), np.uint8))).save(tmp_path / "in" / "im0.bmp")
    code, said = kanseg("predict", "-m", trained, "-i", tmp_path / "in", "-o", tmp_path / "other.csv")
    assert code == 1
    assert "several images called im0" in said
    with pytest.raises(UserError, match="No image of .* is in"):
        evaluate_classes(tmp_path / "table.csv", write(tmp_path / "corners.npz"))


def test_folds_are_trained_in_turn_and_predict_by_their_mean(tmp_path: Path) -> None:
    data = write(tmp_path / "alone.npz", test=False)
    app(
        ["train", str(data), "-o", str(tmp_path / "run"), "-f", "all", *SMALL, "data.folds=2"],
        standalone_mode=False,
    )
    found = json.loads((tmp_path / "run" / "cross_validation.json").read_text())
    accuracy = [fold["accuracy"] for fold in found["folds"].values()]
    assert found["scores"]["accuracy"] == {"mean": np.mean(accuracy), "std": np.std(accuracy)}
    folds = [tmp_path / "run" / f"fold_{number}" for number in (0, 1)]
    for number, models in enumerate(([folds[0]], [folds[1]], [tmp_path / "run"])):
        predict_classes(models, data, tmp_path / f"{number}.csv")
    one, other, both = (read_predictions(tmp_path / f"{number}.csv")[1] for number in range(3))
    np.testing.assert_allclose(both, (one + other) / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("classification.loss=cr", "Unknown loss of classes 'cr'"),
        ("classification.changes=[flipp]", "Did you mean 'flip'"),
        ("classification.loss_options={gama:1}", "gama"),
        (
            "classification.loss_options={weight:[1.0,2.0,3.0,4.0,5.0,6.0,7.0]}",
            "classification.loss ce of . classes",
        ),
        ("classification.label_smoothing=1.5", "label_smoothing"),
        ("classification.mixupp=1", "Did you mean 'mixup'"),
        ("model.options.hed=kan", "Unknown config key 'model.options.hed'"),
        ("model.options.head=kann", "Did you mean 'kan'"),
        ("model.options.encoder=vggkan11v4", "halves too often"),
        ("model.name=ukanet", "not for classification"),
        ("classification.changes=[resized_crop]", "is for 2D images"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    override: str, words: str, tmp_path: Path
) -> None:
    data = write(tmp_path / "corners.npz", 3)
    dataset = read_classes(data)
    plan, quiet = plan_classes(dataset), Console(quiet=True)
    with pytest.raises(UsageError, match=words):
        fit(load_config(overrides=[*SMALL[:1], override]), plan, dataset, tmp_path / "run", console=quiet)
    assert not list((tmp_path / "run").glob("**/*.safetensors"))


def test_a_classifier_is_not_for_segmentation(fit_balls: Any) -> None:
    with pytest.raises(UsageError, match="The model 'classifier' is not for segmentation"):
        fit_balls("model.name=classifier")


def test_a_classifier_is_no_member_of_an_ensemble_that_segments(
    trained: Path, plan: Plan, tmp_path: Path
) -> None:
    checkpoint(plan, tmp_path / "balls", 0)
    for models in ([tmp_path / "balls", trained], [trained]):
        with pytest.raises(UserError, match="tells the class of an image"):
            Loaded(models)


def test_what_a_classifier_learned_moves_into_a_segmenter(balls: Any, fit_balls: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "corners.npz", 3)
    _, plan = balls
    sizes = {key: getattr(plan, key) for key in ("features_per_stage", "strides", "kernel_sizes")}
    shared = {
        "encoder": "reskanet10",
        "basis": "legendre",
        "kan_stages": [1],
        "norm": "batch",
        "bottleneck": False,
    }
    options = json.dumps({**shared, "encoder_options": sizes})
    config = load_config(overrides=[*SMALL[4:], f"model={'classifier'}"])
    config.model.options = json.loads(options)
    classes = read_classes(data)
    fit(
        config,
        plan_classes(classes, tmp_path / "run"),
        classes,
        tmp_path / "run",
        console=Console(quiet=True),
    )
    assert is_classifier(tmp_path / "run")
    best = tmp_path / "run" / "fold_0" / "best.safetensors"
    learned = load_model(best)[0].encoder.state_dict()
    segmenter = create_model("ukanet", 3, 1, 2, **shared, **sizes)
    assert not all(torch.equal(value, learned[key]) for key, value in segmenter.encoder.state_dict().items())
    load_encoder(segmenter, best)
    assert all(torch.equal(value, learned[key]) for key, value in segmenter.encoder.state_dict().items())

    words = [f"model.options.{key}={json.dumps(value)}" for key, value in shared.items()]
    frozen = (
        f"model.options.encoder_weights={best}",
        "training.freeze=['encoder.*']",
        "training.max_epochs=1",
    )
    fit_balls("model.name=ukanet", *words, *frozen, run=tmp_path / "masks")
    trained = load_model(tmp_path / "masks")[0].encoder.state_dict()
    names = [key for key in trained if key.endswith("weight")]
    assert all(torch.equal(trained[key], learned[key]) for key in names)


def test_the_cifar_recipe_runs_on_a_small_made_up_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    for name, count in (("data_batch_1", 40), ("test_batch", 10)):
        records = generator.integers(0, 256, (count, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(count) % 10
        records.tofile(tmp_path / f"{name}.bin")
    small = ["training.max_epochs=1", "training.steps_per_epoch=2", "training.batch_size=4", "data.folds=2"]
    small += ["data.workers=0", "model.options.encoder_options={width:0.5}", "classification.cutmix=1"]
    arguments = ["image_classes.py", "cifar10", str(tmp_path), "-o", str(tmp_path / "run"), *small]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "pipelines" / "image_classes.py"), run_name="__main__")
    summary = json.loads((tmp_path / "run" / "fold_0" / "summary.json").read_text())
    assert (summary["held_out"], summary["images"]) == ("test", 10)
    assert load_model(tmp_path / "run")[2]["labels"].keys() >= {"airplane", "truck"}


def test_unknown_options_of_losses_are_named() -> None:
    config = load_config(overrides=["classification.loss=focal", "classification.loss_options={gamma:2.0}"])
    assert class_loss(config).gamma == 2.0

"""Regions that overlap, voxels that nobody annotated, and their way through loss, prediction and scores."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.data.cases import Case, Dataset, label_path
from kanseg.data.fingerprint import fingerprint
from kanseg.data.formats import read_dataset
from kanseg.data.images import Image, read_image, read_label, write_label
from kanseg.data.labels import (
    class_numbers,
    class_values,
    known_values,
    parse_regions,
    targets,
    unions,
    value_counts,
)
from kanseg.data.plan import Plan, planned_dataset
from kanseg.data.planner import make_plan
from kanseg.data.transforms import AnnotatedPlaces
from kanseg.errors import UsageError, UserError
from kanseg.evaluation.folders import evaluate_folders, label_options
from kanseg.evaluation.metrics import label_dice
from kanseg.inference.predict import decide, predict_case
from kanseg.training.cross_validation import pool
from kanseg.training.losses import LOSSES, create_loss
from kanseg.training.validate import validate_batch

BRATS = {"whole": [1, 2, 3, 4], "core": [1, 3, 4], "enhancing": [4]}


@pytest.fixture(scope="module")
def regions(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The blobs with a region of both balls and one of the far ball, and a slab that nobody annotated."""
    root = tmp_path_factory.mktemp("regions") / "set"
    shutil.copytree(blobs, root)
    described = json.loads((root / "dataset.json").read_text())
    described["labels"] = {"background": 0, "both": [1, 2], "far": [2], "ignore": 9}
    described["regions_class_order"] = [1, 2]
    (root / "dataset.json").write_text(json.dumps(described))
    for path in (root / "labelsTr").iterdir():
        file = nib.load(path)
        label = np.asarray(file.dataobj).copy()
        label[:2] = 9
        nib.save(nib.Nifti1Image(label, file.affine), path)
    return root


@pytest.fixture(scope="module")
def plan(regions: Path) -> Plan:
    return replace(make_plan(read_dataset(regions), memory=2**31), patch_size=[16, 16, 16])


def test_the_grammar_is_that_of_nnunet(regions: Path) -> None:
    dataset = read_dataset(regions)
    assert dataset.label_names == ("background", "both", "far")
    assert dataset.label_values == (0, 1, 2)
    assert dataset.regions == ((0,), (1, 2), (2,))
    assert dataset.ignore_value == 9
    assert class_values(dataset) == {"both": (1, 2), "far": (2,)}
    assert known_values(dataset) == [0, 1, 2]


def test_tumour_regions_of_real_data_need_no_order(shared_data: Path) -> None:
    assert parse_regions("whole=1+2+3+4,core=1+3+4,enhancing=4") == BRATS
    dataset = read_dataset(shared_data / "brats_small", regions=BRATS)
    assert dataset.label_names == ("background", *BRATS)
    assert dataset.label_values == (0, 2, 1, 4)  # a value that no later region has, for each
    plan = Plan.from_dict(make_plan(dataset, memory=2**32, regions=BRATS).to_dict())
    assert planned_dataset(plan).regions == dataset.regions
    label = read_label(dataset.cases[0].label)  # type: ignore[arg-type]
    member = targets(torch.from_numpy(class_numbers(label, plan, "x"))[None], plan)
    for number, values in enumerate(plan.regions[1:], start=1):
        np.testing.assert_array_equal(member[number].numpy() > 0, np.isin(label, values))
    painted = decide((m.numpy() for m in member), plan.label_values, True)
    assert label_dice(painted, label, plan) == [1.0] * 3


@pytest.mark.parametrize("text", ["whole", "whole=", "whole=a+b", "=1+2"])
def test_regions_that_cannot_be_read_are_explained(text: str) -> None:
    with pytest.raises(UsageError, match="not of the form"):
        parse_regions(text)


def test_a_plan_with_other_labels_than_the_data_is_refused(regions: Path, blobs: Path, plan: Plan) -> None:
    from kanseg.training.run_folder import check_data

    check_data(plan, read_dataset(regions))
    with pytest.raises(UserError, match="its regions is"):
        check_data(plan, read_dataset(blobs))


def test_the_loss_of_regions_is_binary_cross_entropy_and_dice() -> None:
    logits, member = torch.randn(2, 3, 6, 6, 6), (torch.rand(2, 3, 6, 6, 6) > 0.5).float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits[:, 1:], member[:, 1:])
    chance = logits.sigmoid()
    overlap = [2 * (chance[:, k] * member[:, k]).sum() + 1e-5 for k in (1, 2)]
    both = [chance[:, k].sum() + member[:, k].sum() + 1e-5 for k in (1, 2)]
    soft_dice = 1 - torch.stack([o / b for o, b in zip(overlap, both, strict=True)]).mean()
    torch.testing.assert_close(create_loss("dice_ce")(logits, member), cross_entropy + soft_dice)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("overlapping", [False, True])
def test_what_nobody_annotated_has_no_gradient(name: str, overlapping: bool) -> None:
    logits = torch.randn(2, 3, 6, 6, 6, requires_grad=True)
    label = torch.randint(3, (2, 1, 6, 6, 6)).float()
    if overlapping:
        label = (torch.rand(2, 3, 6, 6, 6) > 0.5).float()
    label[:, :, :2] = -1
    loss = create_loss(name)(logits, label)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert (logits.grad[:, :, :2] == 0).all()
    assert (logits.grad[:, 1:, 2:] != 0).any()
    with torch.no_grad():
        other = logits.clone()
        other[:, :, :2] = 5 * torch.randn(2, 3, 2, 6, 6)
        torch.testing.assert_close(create_loss(name)(other, label), loss.detach())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("overlapping", [False, True])
def test_the_loss_is_that_of_the_annotated_voxels_alone(name: str, overlapping: bool) -> None:
    """However few they are. A loss of distances cannot leave voxels out: for it the others are answered rightly."""
    logits = torch.randn(2, 3, 6, 6, 6)
    label = torch.randint(3, (2, 1, 6, 6, 6)).float()
    if overlapping:
        label = (torch.rand(2, 3, 6, 6, 6) > 0.5).float()
    known, rest = label[:, :, :2].clone(), logits[:, :, :2]
    label[:, :, 2:] = -1
    if name == "dice_boundary":
        rest, known = logits.clone(), label.clamp(min=0)
        rest[:, 0, 2:], rest[:, 1:, 2:] = 1e3, -1e3
    torch.testing.assert_close(create_loss(name)(logits, label), create_loss(name)(rest, known))


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_that_nobody_annotated_teaches_nothing(name: str) -> None:
    logits = torch.randn(2, 3, 6, 6, 6, requires_grad=True)
    loss = create_loss(name)(logits, torch.full((2, 1, 6, 6, 6), -1.0))
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert not logits.grad.any()


def test_dice_of_each_sample_stays_one_where_some_voxels_are_unknown() -> None:
    logits, label = torch.randn(2, 3, 6, 6, 6), torch.randint(3, (2, 1, 6, 6, 6)).float()
    label[0, :, :2] = -1
    loss = create_loss("dice", batch=False)
    each = [loss(logits[i : i + 1], label[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(loss(logits, label), torch.stack(each).mean())


@pytest.mark.parametrize("overlapping", [False, True])
def test_while_training_too_what_nobody_annotated_is_not_scored(plan: Plan, overlapping: bool) -> None:
    """A network that sees every class (or its last one) everywhere is right where the label says so."""
    numbers = torch.full((1, 16, 16, 16), 2)
    numbers[:, :9] = -1
    classes = replace(plan, regions=[], label_names=["background", "near", "far"])
    label = targets(numbers, plan if overlapping else classes)
    batch = {"image": torch.randn(1, 1, 16, 16, 16), "label": label[None]}

    def network(x: Tensor) -> Tensor:
        return torch.ones(len(x), 3, *x.shape[2:]).cumsum(1)

    scores = validate_batch(network, batch, plan if overlapping else classes, torch.device("cpu"))  # type: ignore[arg-type]
    assert scores == [1.0, 1.0]


def test_what_nobody_annotated_is_no_foreground_of_a_patch_or_of_the_intensities(
    plan: Plan, regions: Path
) -> None:
    label = torch.tensor([[[-1.0, -1, 0, 1], [0, 0, 2, -1]]])
    places = AnnotatedPlaces()({"label": label})
    assert places["label_fg_indices"].tolist() == [3, 6]
    assert places["label_bg_indices"].tolist() == [2, 4, 5]
    none = AnnotatedPlaces()({"label": torch.full((1, 2, 2), -1.0)})
    assert none["label_fg_indices"].tolist() == none["label_bg_indices"].tolist() == [0, 1, 2, 3]
    dataset, inside = read_dataset(regions), []
    for case in dataset.cases:
        truth = read_label(label_path(case))
        inside.append(read_image(case.images).array[0][(truth > 0) & (truth != 9)])
    assert fingerprint(dataset)["channels"][0]["mean"] == pytest.approx(np.concatenate(inside).mean())


@pytest.mark.parametrize("overlapping", [False, True])
def test_post_processing_goes_by_whole_predictions_and_is_scored_where_something_is_annotated(
    plan: Plan, regions: Path, tmp_path: Path, overlapping: bool
) -> None:
    """What is annotated every other slice cuts the ball into slices, of which the largest would be kept."""
    grid = np.stack(np.meshgrid(*[np.arange(20)] * 3, indexing="ij"), -1)
    ball = (np.linalg.norm(grid - 8, axis=-1) < 6).astype(np.uint8)
    guess, truth = ball.copy(), ball.copy()
    guess[16:19, 16:19, 16:19] = 1  # a speck
    truth[1::2] = 9
    image, path = (
        Image(ball[None].astype(np.float32), np.eye(4), tmp_path / "x", 3),
        tmp_path / "truth.nii.gz",
    )
    write_label(path, truth, image, "uint8")
    write_label(tmp_path / "guess.nii.gz", guess, image, "uint8")
    cases = [Case(name, (path,), path, name, (0, 1)) for name in "abc"]
    known = plan if overlapping else replace(plan, regions=[], label_names=["background", "near", "far"])
    found = pool(
        known, replace(read_dataset(regions), cases=cases), {c.id: tmp_path / "guess.nii.gz" for c in cases}
    )
    assert any(rule.get("largest") or rule.get("min_mm3") for rule in found["postprocessing"])
    assert found["dice_without_postprocessing"] < found["metrics"]["mean"]["dice"]["mean"]
    assert found["metrics"][known.label_names[1]]["dice"]["mean"] == 1


def test_cross_validation_leaves_the_unknown_out(plan: Plan, regions: Path, tmp_path: Path) -> None:
    dataset, kept = read_dataset(regions), {}
    for case in dataset.cases[:2]:
        image = read_image(case.images)
        truth = read_label(regions / "labelsTr" / f"{case.id}.nii.gz")
        kept[case.id] = tmp_path / f"{case.id}.nii.gz"
        write_label(kept[case.id], np.where(truth == 9, 2, truth), image, "uint8")
    found = pool(plan, dataset, kept)
    assert found["dice_without_postprocessing"] == found["metrics"]["mean"]["dice"]["mean"] == 1
    assert found["postprocessing"] == []


class Known(nn.Module):
    """A network whose answer is known: "both" where the image is high, "far" where it is highest."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([0 * x, 4 * (x - 1.0), 4 * (x - 2.2)], dim=1)


def test_regions_are_painted_in_their_order(plan: Plan, regions: Path) -> None:
    case = read_dataset(regions).cases[0]
    labels, source = predict_case(Known(), case, plan)
    array = source.array[0]
    x = (array - array.mean()) / array.std()
    np.testing.assert_array_equal(labels, np.where(x > 2.2, 2, np.where(x > 1.0, 1, 0)))
    pair, _ = predict_case([Known(), Known()], case, [plan, plan])
    np.testing.assert_array_equal(pair, labels)


@pytest.mark.parametrize(
    "label",
    [
        np.random.default_rng(0).integers(0, 9, (70, 60, 50), dtype=np.uint8).T[::2],
        np.random.default_rng(1).integers(0, 3, (1200, 1100)).astype(np.int32),
        np.array([[0, 70000], [-1, 70000]]),
        np.zeros((0, 3), np.int16),
    ],
)
def test_values_are_counted_as_numpy_does(label: np.ndarray) -> None:
    values, counts = np.unique(label, return_counts=True)
    found = value_counts(label)
    assert list(found.items()) == list(zip(values.tolist(), counts.tolist(), strict=True))


def test_scores_count_regions_as_wholes_and_leave_the_unknown_out(
    plan: Plan, regions: Path, blobs: Path, tmp_path: Path
) -> None:
    """The true labels, drawn where nobody annotated: perfect, although values differ there."""
    plan.save(tmp_path / "plan.json")
    names = label_options(str(tmp_path))["labels"]
    assert names == {"both": (1, 2), "far": 2}
    scores = evaluate_folders(blobs / "labelsTr", regions / "labelsTr", labels=names, ignore=9)
    assert all(row["dice"]["mean"] == 1 for row in scores["metrics"].values())
    truth = read_label(regions / "labelsTr" / "case_0.nii.gz")
    near = np.where(truth == 2, 1, truth)
    assert label_dice(near, truth, plan) == [1.0, 0.0]
    drawn = np.where(truth == 9, 2, truth)
    classes = replace(plan, regions=[], label_names=["background", "near", "far"])
    for known in (plan, classes):
        assert label_dice(drawn, truth, known) == [1.0, 1.0]
    assert label_options("whole=1+2,core=2")["labels"] == {"whole": (1, 2), "core": 2}


def test_a_network_learns_regions_and_ignores(
    plan: Plan, regions: Path, tmp_path: Path, quick_learner: list[str]
) -> None:
    """From a folder with regions to a label map, by the ordinary ways; nobody says what a bright slab is.

    It looks like the balls, so it is taken for them, which it were not if it counted as background.
    """
    from kanseg.config import load_config
    from kanseg.inference.ensemble import Loaded
    from kanseg.training.fit import fit

    root = tmp_path / "set"
    shutil.copytree(regions, root)
    for path in root.glob("*Tr/*.nii.gz"):
        file = nib.load(path)
        array = np.asarray(file.dataobj).copy()
        if path.parent.name == "labelsTr":
            array[:6] = 9
        else:
            array[:5] += 4
        nib.save(nib.Nifti1Image(array, file.affine), path)
    config = load_config(overrides=[*quick_learner, "training.steps_per_epoch=30"])
    dataset = read_dataset(root)
    summary = fit(config, plan, dataset, tmp_path / "run", fold=0)
    assert set(summary["dice"]) == {"both", "far", "mean"}
    assert summary["dice"]["both"] > 0.6
    loaded = Loaded([tmp_path / "run"])
    labels, _ = predict_case(loaded.networks, dataset.cases[0], loaded.plans)
    assert set(np.unique(labels)) <= {0, 1, 2}
    assert (labels[:4] > 0).mean() > 0.5 > (labels[6:] > 0).mean()


def named(*names: str) -> Dataset:
    values = tuple(range(len(names) + 1))
    return Dataset("", Path(), "", 3, ("x",), ("background", *names), values, (), (), ())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("edema", "non-enhancing tumor", "enhancing tumour"), ((1, 2, 3), (2, 3))),  # of the Decathlon
        (("NCR", "ED", "ET"), ((1, 2, 3), (1, 3))),
        (("NETC", "SNFH", "ET", "RC"), ((1, 2, 3), (1, 3))),
        (
            ("necrotic and non-enhancing tumor core", "peritumoral edema", "GD-enhancing tumor"),
            ((1, 2, 3), (1, 3)),
        ),
        (("necrosis", "edema", "nonenhancing tumour", "enhancing tumour"), ((1, 2, 3, 4), (1, 3, 4))),
    ],
)
def test_parts_of_a_glioma_are_scored_together_too(
    names: tuple[str, ...], expected: tuple[tuple[int, ...], ...]
) -> None:
    assert unions(named(*names)) == dict(zip(("whole tumour", "tumour core"), expected, strict=True))


@pytest.mark.parametrize(
    "names",
    [
        ("liver", "tumour"),
        ("edema", "enhancing tumour"),
        ("edema", "necrosis", "enhancing", "vessel"),
    ],
)
def test_other_classes_are_scored_by_themselves(names: tuple[str, ...]) -> None:
    assert unions(named(*names)) == {}


def test_unions_have_the_scores_of_regions_and_leave_the_mean_alone(
    shared_data: Path, tmp_path: Path
) -> None:
    dataset = read_dataset(shared_data / "brats_small")
    assert any("whole tumour" in note for note in dataset.notes)
    references, predictions = tmp_path / "references", tmp_path / "predictions"
    references.mkdir()
    predictions.mkdir()
    for case in dataset.cases[:2]:
        shutil.copy(case.label, references)  # type: ignore[arg-type]
        image = read_image(case.label)  # type: ignore[arg-type]
        worse = np.roll(image.array, 2, axis=-1)[0]
        write_label(predictions / Path(str(case.label)).name, worse, image)
    names = class_values(dataset)
    scored = evaluate_folders(predictions, references, labels=names, unions=unions(dataset))
    alone = evaluate_folders(predictions, references, labels=names)
    assert scored["metrics"] == alone["metrics"]
    regions = evaluate_folders(predictions, references, labels={"whole": (1, 2, 3, 4), "core": (1, 3, 4)})
    assert scored["unions"]["whole tumour"] == regions["metrics"]["whole"]
    assert scored["unions"]["tumour core"] == regions["metrics"]["core"]
    assert scored["unions"]["whole tumour"]["dice"]["mean"] < 1

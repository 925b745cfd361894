"""Cascades: a second network gets what a first one, at coarse voxels, says of the whole image, and no case leaks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from kanseg.cli import app
from kanseg.config import load_config
from kanseg.data import loaders, planner, transforms
from kanseg.data.cascade import PREVIOUS, SMALL, DamagedLabels, network_input, with_previous
from kanseg.data.digests import file_digest
from kanseg.data.formats import read_dataset
from kanseg.data.images import read_label, read_provenance, write_label
from kanseg.data.loaders import TrainLoader
from kanseg.data.plan import Plan
from kanseg.data.planner import make_plan
from kanseg.errors import UsageError, UserError
from kanseg.files import make_folder
from kanseg.inference import predict as prediction
from kanseg.inference.ensemble import Loaded
from kanseg.inference.members import facts_of_model
from kanseg.inference.predict import predict_case
from kanseg.segmenter import Segmenter
from kanseg.training import cascade
from kanseg.training.augment import BatchAugmentation
from kanseg.training.checkpoint import load_checkpoint, load_model, save_checkpoint
from kanseg.training.cross_validation import cross_validate
from kanseg.training.fit import fit
from kanseg.training.pipeline import Pipeline, _ensemble, run_pipeline

QUICK = ["training.steps_per_epoch=4", "training.max_epochs=1", "data.workers=0", "data.folds=2"]
QUIET = Console(quiet=True)


def two_stages(plan: Plan, run: Path) -> Plan:
    """Plans of both stages for the small balls, whose coarse voxels show a patch the whole image."""
    second = replace(plan, previous_stage="lowres", mirror_axes=[0])
    replace(second, previous_stage=None, spacing=[1.75] * 3).save(make_folder(run / "lowres") / "plan.json")
    second.save(run / "plan.json")
    return second


@pytest.fixture(scope="module")
def done(balls, tmp_path_factory):
    """The folder of `kanseg run` with a cascade, and every pair of a case and the label map that was read with it."""
    dataset, plan = balls
    folder, load, seen = tmp_path_factory.mktemp("run"), transforms.load_case, set()
    two_stages(plan, folder / "cascade")

    def watched(case, plan, **how):
        seen.update({(case.id, case.previous)} if plan.previous_stage else ())
        return load(case, plan, **how)

    with pytest.MonkeyPatch.context() as patch:
        for module in (loaders, prediction):
            patch.setattr(module, "load_case", watched)
        found = run_pipeline(dataset.source, folder, QUICK, configurations="cascade", console=QUIET)
    return folder, found, seen


def stage(run: Path, name: str, fold: int) -> Path:
    return run / "cascade" / name / f"fold_{fold}"


def test_the_second_stage_learns_and_validates_by_label_maps_of_networks_that_did_not_see_the_case(
    balls, done
):
    dataset, _ = balls
    run, _, seen = done
    splits = json.loads((run / "cascade" / "splits.json").read_text())
    assert json.loads((run / "cascade/lowres/splits.json").read_text()) == splits
    patients = {case.id: case.group for case in dataset.cases}
    assert {case for case, _ in seen} == patients.keys()
    for case, path in seen:
        (fold,) = (number for number, split in enumerate(splits) if case in split["val"])
        assert path == stage(run, "lowres", fold) / "validation" / f"{case}.nii.gz"
        assert patients[case] not in {patients[other] for other in splits[fold]["train"]}
        network, plan, info = load_model(stage(run, "lowres", fold))
        assert (info["fold"], plan.previous_stage) == (fold, None)
        own = next(c for c in dataset.cases if c.id == case)
        assert np.array_equal(predict_case(network, own, plan)[0], read_label(path))


def test_the_chain_gives_what_both_steps_give_by_hand(balls, done, tmp_path):
    dataset, _ = balls
    run, case = done[0] / "cascade", dataset.cases[0]
    first, whole = Loaded([run / "lowres"]), Loaded([run])
    labels, source = predict_case(first.networks, case, first.plans)
    write_label(tmp_path / "first.nii.gz", labels, source, "uint8")
    seconds = [load_model(run / f"fold_{fold}")[0] for fold in range(2)]
    by_hand = Loaded([run]).networks[0].network
    for member, network in zip(by_hand.members, seconds, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(member.parameters(), network.parameters(), strict=True))
    known = replace(case, previous=tmp_path / "first.nii.gz")
    expected = predict_case(by_hand, known, whole.plans[0])[0]
    assert np.array_equal(predict_case(whole.networks, case, whole.plans)[0], expected)
    nothing = np.zeros_like(labels)
    write_label(tmp_path / "nothing.nii.gz", nothing, source, "uint8")
    other = prediction.predict(by_hand, replace(case, previous=tmp_path / "nothing.nii.gz"), whole.plans[0])
    one = prediction.predict(by_hand, known, whole.plans[0])
    assert not torch.equal(other.parts[0].logits[1], one.parts[0].logits[1])
    with pytest.raises(UserError, match="second of a cascade"):
        predict_case(seconds[0], case, whole.plans[0])


def test_a_model_of_a_cascade_is_complete_in_itself(balls, done, tmp_path):
    dataset, _ = balls
    image = dataset.cases[0].images[0]
    expected = Segmenter.load(done[0]).predict(image)
    shutil.copytree(done[0] / "model", tmp_path / "moved")
    saved = Segmenter.load(tmp_path / "moved").save(tmp_path / "saved").parent
    assert {file.name for file in (saved / "lowres").iterdir()} == {
        "model.safetensors",
        "model_2.safetensors",
    }
    for model in (tmp_path / "moved", saved):
        assert np.array_equal(Segmenter.load(model).predict(image), expected)
    shutil.copy(tmp_path / "moved/fold_0/model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="its first stage is missing: a folder lowres"):
        Segmenter.load(tmp_path / "alone.safetensors")


def test_a_first_stage_is_told_where_only_some_networks_have_one(done, tmp_path):
    run = shutil.copytree(done[0] / "cascade", tmp_path / "run")
    shutil.copy(run / "lowres/fold_0/best.safetensors", run / "fold_0/best.safetensors")
    assert facts_of_model(run)["first stage"]["networks"] == 2


def test_predict_goes_on_with_a_cohort_unless_a_network_of_the_first_stage_is_another(balls, done, tmp_path):
    dataset, _ = balls
    model, mask = shutil.copytree(done[0] / "model", tmp_path / "model"), tmp_path / "mask.nii.gz"
    command = [
        "predict",
        "-m",
        model,
        "-i",
        dataset.cases[0].images[0],
        "-o",
        mask,
        "--tta",
        "--memory",
        "8G",
    ]
    found = [CliRunner().invoke(app, [*map(str, command)]).output for _ in range(2)]
    assert "its first stage has 2 networks" in found[0]
    assert ["is there already" in output for output in found] == [False, True]
    told = CliRunner().invoke(app, ["info", str(mask)]).output
    digests = Loaded([model]).digests
    assert len(set(digests)) == 4
    assert all(digest[:20] in "".join(told.split()) for digest in digests)
    shutil.copy(model / "lowres/fold_0/model.safetensors", model / "lowres/fold_1/model.safetensors")
    assert "is there already" not in CliRunner().invoke(app, [*map(str, command)]).output


def test_the_label_map_of_a_validation_names_the_networks_of_both_stages(balls, done):
    for kept in (done[0] / "cascade").glob("fold_*/validation/*.nii.gz"):
        fold = int(kept.parents[1].name[-1])
        files = [folder / "best.safetensors" for folder in (kept.parents[1], stage(done[0], "lowres", fold))]
        assert read_provenance(kept)["models"] == [file_digest(file) for file in files]


def test_memory_for_the_windows_of_the_first_stage_is_counted(balls, done, tmp_path):
    """They have 1000^3 voxels here, those of the second stage 8^3."""
    run = shutil.copytree(done[0] / "model", tmp_path / "model")
    for file in run.glob("lowres/fold_*/model.safetensors"):
        tensors, info = load_checkpoint(file)
        save_checkpoint(file, tensors, {**info, "plan": {**info["plan"], "patch_size": [1000] * 3}})
    words = [
        "predict",
        "-m",
        run,
        "-i",
        balls[0].cases[0].images[0],
        "-o",
        tmp_path / "out",
        "--memory",
        "8G",
    ]
    told = CliRunner().invoke(app, [*map(str, words)])
    assert "one window of 2 classes" in str(told.exception)


def test_other_options_go_through_the_first_stage_once(balls, done, tmp_path, monkeypatch):
    run, calls = shutil.copytree(done[0] / "cascade", tmp_path / "run"), []

    def counted(*given, **how):
        calls.append(given[3])
        return cross_validate(*given, **how)

    monkeypatch.setattr(cascade, "cross_validate", counted)
    for lr in ("0.02", "0.02", "0.03"):
        config = load_config(overrides=[*QUICK, f"training.lr={lr}"])
        how = {"resume": True, "override": True, "console": QUIET}
        cross_validate(config, Plan.load(run / "plan.json"), balls[0], run, **how)
    assert calls == [run / "lowres"] * 2


def test_a_fold_of_the_first_stage_that_is_damaged_is_named_and_trained_again_when_it_is_gone(
    balls, done, tmp_path
):
    run, how = shutil.copytree(done[0], tmp_path / "run"), {"configurations": "cascade", "console": QUIET}
    best = stage(run, "lowres", 1) / "best.safetensors"
    whole = best.read_bytes()
    best.write_bytes(whole[:-1] + b"?")
    with pytest.raises(UserError, match=r"lowres/fold_1/best.safetensors is damaged"):
        run_pipeline(balls[0].source, run, QUICK, **how)
    shutil.rmtree(best.parent)
    run_pipeline(balls[0].source, run, QUICK, **how)
    kept, expected = (load_checkpoint(stage(r, "lowres", 1) / best.name)[0] for r in (run, done[0]))
    assert all(torch.equal(value, expected[name]) for name, value in kept.items())


def test_the_ensemble_with_3d_keeps_to_networks_that_did_not_see_the_case(balls, done, tmp_path):
    dataset, _ = balls
    run = shutil.copytree(done[0], tmp_path / "run")
    shutil.copytree(run / "cascade/lowres", run / "3d")  # another network for the same folds
    job = Pipeline(run, dataset, load_config(overrides=QUICK), ["3d", "cascade"], "folds", False, QUIET)
    splits = json.loads((run / "3d/splits.json").read_text())
    assert _ensemble(job, job.names, splits)["cases"] == len(dataset.cases)
    for fold, entry in enumerate(splits):
        case = next(case for case in dataset.cases if case.id == entry["val"][0])
        pairs = [load_model(run / name / f"fold_{fold}")[:2] for name in job.names]
        known = replace(case, previous=stage(run, "lowres", fold) / f"validation/{case.id}.nii.gz")
        expected = predict_case([network for network, _ in pairs], known, [plan for _, plan in pairs])[0]
        assert np.array_equal(read_label(run / f"ensemble/validation/{case.id}.nii.gz"), expected)


def test_the_report_tells_of_the_trainings_of_both_stages(done):
    run, found, _ = done
    assert (found["choice"], list(found["configurations"])) == ("cascade", ["cascade"])
    report = (run / "report.md").read_text()
    assert all(f"cascade/{name}fold_1" in report for name in ("", "lowres/"))
    assert "### lowres" in report


def test_a_run_that_was_stopped_between_the_stages_goes_on_with_its_own_options(
    balls, done, tmp_path, monkeypatch
):
    dataset, plan = balls
    second, run = two_stages(plan, tmp_path), tmp_path
    with monkeypatch.context() as patch:

        def stop(*args):
            raise SystemExit(143)

        patch.setattr(cascade, "seen_before", stop)
        with pytest.raises(SystemExit):
            cross_validate(load_config(overrides=QUICK), second, dataset, run, console=QUIET)
    assert (run / "lowres/cross_validation.json").exists()
    assert not (run / "fold_0").exists()
    with pytest.raises(UsageError, match="lowres/fold_0 in .* was trained with other options"):
        fit(load_config(overrides=["training.lr=0.1"]), second, dataset, run, console=QUIET)
    fit(load_config(), second, dataset, run, resume=True, console=QUIET)
    whole, resumed = (
        load_checkpoint(folder / "fold_0/best.safetensors")[0] for folder in (done[0] / "cascade", run)
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Volumes of noise on turned grids, whose two structures nothing but a label map could tell; and their plan."""
    folder = tmp_path_factory.mktemp("noise")
    generator = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (12, 16, 14)], indexing="ij"), -1)
    affine = np.array([[0, 0, -1.5, 9], [1.25, 0, 0, -4], [0, -1, 0, 3], [0, 0, 0, 1.0]])
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for case in range(4):
        label = np.zeros(grid.shape[:3], np.uint8)
        for value, low in ((3, (2, 3, 3)), (5, (8, 3, 3))):
            label[np.linalg.norm(grid - low - generator.uniform(0, (1, 9, 7)), axis=-1) < 3.5] = value
        image = generator.normal(size=label.shape).astype(np.float32)
        nib.save(nib.Nifti1Image(image, affine), folder / "images" / f"{case}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / "labels" / f"{case}.nii.gz")
    dataset = read_dataset(folder)
    made = make_plan(dataset, memory=2**30)
    sizes = {"patch_size": [12, 12, 12], "spacing": [1.0, 1.0, 1.0], "batch_size": 2}
    return dataset, replace(made, **sizes, previous_stage="lowres", mirror_axes=[0, 1, 2])


@pytest.mark.parametrize("device", [False, True], ids=["loader", "device"])
def test_a_label_map_moves_with_the_label_wherever_patches_go(noise, monkeypatch, device):
    """Where the stage before is right it says of every voxel of a patch what the label says, however changed."""
    dataset, plan = noise
    calm = replace(transforms.STRENGTHS["strong"], border=0.0, missing=0.0, affine=(1, 1), deform=(1, 1))
    monkeypatch.setitem(transforms.STRENGTHS, "strong", calm)
    cases = [replace(case, previous=case.label) for case in dataset.cases]
    how = {"batch_size": 4, "steps": 4, "strength": "strong", "changes": not device, "balanced": True}
    batches = TrainLoader(plan, cases, seed=0, **how).batches()
    changed = BatchAugmentation(plan, "strong") if device else lambda batch: batch
    for _ in range(4):
        batch = changed(next(batches))
        assert set(batch["label"].unique().tolist()) == {0, 1, 2}
        assert torch.equal(batch[PREVIOUS], batch["label"].float())
        taken = network_input(with_previous(batch), plan)
        assert taken.shape == (4, plan.in_channels, 12, 12, 12)
        assert torch.equal(taken[:, :1], batch["image"])
        for number in (1, 2):
            assert torch.equal(taken[:, number], (batch["label"][:, 0] == number).float())


def test_a_second_stage_learns_to_use_a_first_one_that_is_right(noise, quick_learner, tmp_path, monkeypatch):
    """In noise it finds both structures by the label maps alone, which need not lie on its grid."""
    dataset, plan = noise
    plan.save(tmp_path / "plan.json")
    monkeypatch.setattr(cascade, "train_first_stage", lambda *stages, **how: None)  # it said what is true
    for fold in range(2):
        shutil.copytree(dataset.source / "labels", tmp_path / f"lowres/fold_{fold}/validation")
    options = [*quick_learner, "data.folds=2", "training.steps_per_epoch=60", "training.augmentation=none"]
    found = fit(load_config(overrides=options), plan, dataset, tmp_path, console=QUIET)
    assert min(found["dice"].values()) > 0.85


def test_regions_of_the_stage_before_are_those_that_its_values_belong_to(noise):
    _, plan = noise
    regions = {"label_names": ["background", "whole", "core"], "label_values": [0, 2, 5]}
    plan = replace(plan, **regions, regions=[[0], [2, 5], [5]])
    numbers = torch.tensor([0.0, 1.0, 2.0]).reshape(
        1, 1, 3, 1, 1
    )  # 0, painted as whole (2), painted as core (5)
    taken = network_input(torch.cat([torch.ones_like(numbers), numbers], 1), plan)
    assert taken.reshape(3, 3).tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]


def test_damage_moves_borders_and_takes_small_pieces_away():
    grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"), -1)
    numbers = np.zeros((24,) * 3, np.float32)
    numbers[:, :, :10] = 1  # much of the patch
    numbers[np.linalg.norm(grid - 17, axis=-1) < 4] = 2
    item = {PREVIOUS: torch.from_numpy(numbers)[None]}

    def damaged(seed, border, missing):
        change = DamagedLabels(3, border, missing)
        return change.set_random_state(seed)(item)[PREVIOUS][0].numpy()

    moved = [damaged(seed, 1.0, 0.0) for seed in range(12)]
    far = np.ones_like(numbers, bool)  # from every border
    far[:, :, 7:13] = far[np.linalg.norm(grid - 17, axis=-1) < 8] = False
    assert all(np.array_equal(found[far], numbers[far]) for found in moved)
    assert any(((found == 2) > (numbers == 2)).any() for found in moved)  # grown
    assert any(((found == 2) < (numbers == 2)).any() for found in moved)  # shrunk
    expected = np.where(numbers == 2, 0, numbers)
    assert (numbers == 1).mean() > SMALL > (numbers == 2).mean()
    assert np.array_equal(damaged(0, 0.0, 1.0), expected)
    assert np.array_equal(damaged(0, 0.0, 0.0), numbers)
    assert np.array_equal(damaged(3, 0.5, 0.5), damaged(3, 0.5, 0.5))


def test_the_first_stage_sees_a_quarter_of_an_image_and_the_finest_axes_are_coarsened_first(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / "data" / part).mkdir(parents=True)
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    for case in range(2):
        label = np.zeros((48, 48, 32), np.uint8)
        label[20:30, 20:30, 10:20] = 1
        image = np.random.default_rng(case).normal(size=label.shape).astype(np.float32)
        nib.save(nib.Nifti1Image(image, affine), tmp_path / "data/images" / f"{case}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), tmp_path / "data/labels" / f"{case}.nii.gz")

    def planned(run, memory, *words):
        command = ["plan", tmp_path / "data", "-o", run, "--no-trial", "--size", "small", "--memory", memory]
        return CliRunner().invoke(app, [*map(str, command), *words])

    run = tmp_path / "run"
    assert "a cascade of two resolutions may help" in " ".join(
        planned(tmp_path / "one", "20M").output.split()
    )
    told = planned(run, "20M", "--cascade")
    assert told.exit_code == 0, told.output
    assert "first stage of a cascade" in told.output
    second, first = Plan.load(run / "plan.json"), Plan.load(run / "lowres/plan.json")
    assert (second.previous_stage, first.previous_stage) == ("lowres", None)
    assert (second.in_channels, first.in_channels) == (2, 1)
    assert second.spacing == [1.0, 1.0, 2.0]
    assert 1 < first.spacing[0] == first.spacing[1] <= first.spacing[2]
    size = np.array([48, 48, 64]) / first.spacing
    assert np.prod(first.patch_size) / np.prod(size) == pytest.approx(0.25, rel=0.2)
    large = planned(tmp_path / "large", "4G", "--cascade")
    assert isinstance(large.exception, UsageError)
    assert "A cascade has nothing to add here" in str(large.exception)
    assert not (tmp_path / "large/plan.json").exists()
    assert "cascade" not in planned(tmp_path / "whole", "4G").output
    slices = planned(tmp_path / "slices", "20M", "--cascade", "--dim", "2")
    assert isinstance(slices.exception, UsageError)
    assert "learnt in 3D" in str(slices.exception)
    (run / "lowres/fold_0").mkdir()
    assert "holds a training by the plan it has" in str(planned(run, "20M").exception)


def test_a_cascade_whose_planning_was_killed_is_not_planned(balls, tmp_path, monkeypatch):
    save = Plan.save

    def killed(plan, path):
        save(plan, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(Plan, "save", killed)
    monkeypatch.setattr(planner, "first_stage", lambda plan, *seen, **how: plan)
    monkeypatch.setattr(planner, "make_plan", lambda *data, **how: replace(balls[1], previous_stage="lowres"))
    with pytest.raises(KeyboardInterrupt):
        planner.plan_run(balls[0], tmp_path, cascade=True)
    assert not (tmp_path / "plan.json").exists()


def test_what_a_cascade_cannot_do_is_refused_before_anything_is_trained(balls, done, tmp_path):
    dataset, plan = balls
    second = two_stages(plan, tmp_path)
    ids = [case.id for case in dataset.cases]
    own = [{"train": ids[:4], "val": ids[4:]}]
    (tmp_path / "splits.json").write_text(json.dumps(own))
    config = load_config(overrides=QUICK)
    with pytest.raises(UserError, match=f"every case validates: .* In no fold: {ids[0]}"):
        fit(config, second, dataset, tmp_path, console=QUIET)
    (tmp_path / "splits.json").write_text(json.dumps([own[0], {"train": ids[4:], "val": ids[:4]}]))
    (tmp_path / "lowres/splits.json").write_text(json.dumps([{"train": ids[4:], "val": ids[:4]}, own[0]]))
    with pytest.raises(UserError, match="have other folds, and both stages need the same"):
        cross_validate(config, second, dataset, tmp_path, console=QUIET)
    assert not list(tmp_path.glob("**/*.safetensors"))
    for words, said in (
        (["export", done[0] / "model", "-o", tmp_path / "out"], "is a cascade"),
        (["search", done[0] / "cascade", "training.lr=loguniform(1e-4,1e-2)"], "is a cascade"),
    ):
        told = CliRunner().invoke(app, [*map(str, words)])
        assert isinstance(told.exception, UserError)
        assert said in str(told.exception)
    for name in ("../lowres", "..", ""):
        with pytest.raises(UserError, match="previous_stage is the name of a folder"):
            Plan.from_dict({**second.to_dict(), "previous_stage": name})
    with pytest.raises(UserError, match="previous_stage is for networks in 3D"):
        Plan.from_dict({**make_plan(dataset, dim=2, memory=2**30).to_dict(), "previous_stage": "lowres"})

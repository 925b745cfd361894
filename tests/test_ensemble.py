"""Ensembles average probabilities, of networks and of predictions; a cohort goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from kanseg.data.beside import find_probabilities, is_beside, probability_path
from kanseg.data.class_names import names_in
from kanseg.data.digests import file_digest
from kanseg.data.fingerprint import fingerprint, save_fingerprint
from kanseg.data.formats import read_dataset
from kanseg.data.images import read_image, read_provenance
from kanseg.data.plan import Plan
from kanseg.data.planner import make_plan
from kanseg.data.unlabelled import find_images
from kanseg.errors import UserError
from kanseg.files import write_json
from kanseg.inference.calibration import CALIBRATION
from kanseg.inference.ensemble import (
    Ensemble,
    Loaded,
    combine_folders,
    predict_with,
)
from kanseg.inference.members import facts_of_model, find_members
from kanseg.inference.postprocess import POSTPROCESSING, save_rules
from kanseg.inference.predict import predict, predict_case, predict_folder
from kanseg.training.checkpoint import BEST, build_model, load_checkpoint, named, save_checkpoint
from kanseg.training.run_folder import training_images


class Constant(nn.Module):
    """The same logits everywhere."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.view(1, -1, 1, 1, 1).expand(len(x), -1, *x.shape[2:]).clone()


class Brightness(nn.Module):
    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.threshold - x, x - self.threshold, -5 + 0 * x], dim=1)


@pytest.mark.parametrize("regions", [False, True])
def test_the_members_probabilities_are_averaged(regions: bool) -> None:
    members = [Constant(2.0, 0.5, -1.0), Constant(-1.0, 0.3, 3.0)]
    x = torch.zeros(1, 1, 2, 2, 2)
    chance = (lambda z: z.sigmoid()) if regions else (lambda z: z.softmax(1))
    mean = (chance(members[0](x)) + chance(members[1](x))) / 2
    torch.testing.assert_close(chance(Ensemble(members, regions)(x)), mean)


def test_networks_of_different_plans_meet_on_the_grid_of_the_image(plan: Plan, blobs: Path) -> None:
    flat = replace(
        make_plan(read_dataset(blobs), memory=2**31, dim=2),
        slice_axis=2,
        spacing=[1.0, 1.0],
        patch_size=[16, 16],
    )
    coarse = replace(plan, spacing=[1.3, 1.3, 1.5])
    case = read_dataset(blobs).cases[0]
    networks, plans = [Brightness(0.5), Brightness(1.0), Brightness(2.0)], [plan, coarse, flat]
    together = predict(networks, case, plans)
    alone = [predict(n, case, p).probability(1) for n, p in zip(networks, plans, strict=True)]
    np.testing.assert_allclose(together.probability(1), np.mean(alone, axis=0), atol=1e-6)
    np.testing.assert_array_equal(together.labels() == 1, np.mean(alone, axis=0) > 0.5)


def checkpoint(plan: Plan, folder: Path, seed: int, **changes: object) -> Path:
    torch.manual_seed(seed)
    options = {"features_per_stage": [4, 8], "strides": [1, 2], "kernel_sizes": [3, 3]}
    sizes = {"in_channels": plan.in_channels, "out_channels": len(plan.label_names)}
    spec = {"name": "ukanet", "spatial_dims": plan.spatial_dims, **sizes, "options": options}
    folder.mkdir(parents=True)
    info = json.loads(json.dumps({"model": spec, "plan": replace(plan, **changes).to_dict()}))  # type: ignore[arg-type]
    return save_checkpoint(folder / BEST, named("model", build_model(spec).state_dict()), info)


def test_a_run_predicts_by_all_its_folds(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    files = [checkpoint(plan, tmp_path / f"fold_{i}", i) for i in range(3)]
    assert find_members(tmp_path) == files
    assert find_members(tmp_path / "fold_1") == [files[1]]
    assert find_members(files[2]) == [files[2]]
    case = read_dataset(blobs).cases[0]
    loaded = Loaded([tmp_path])
    assert len(loaded.networks) == 1
    labels, _ = predict_case(loaded.networks, case, loaded.plans)
    single = [Loaded([file]) for file in files]
    chances = [
        np.stack([predict(s.networks, case, s.plans).probability(k) for k in range(3)]) for s in single
    ]
    agreement = (labels == np.mean(chances, axis=0).argmax(0)).mean()
    assert (
        agreement > 0.99
    )  # windows are blended as logits, so they differ where windows meet and nothing is sure


def test_folds_named_all_stand_alone(plan: Plan, tmp_path: Path) -> None:
    file = checkpoint(plan, tmp_path / "fold_all", 0)
    assert find_members(tmp_path) == [file]
    with pytest.raises(UserError, match="does not exist"):
        find_members(tmp_path / "nothing")


def test_models_of_different_tasks_are_no_ensemble(plan: Plan, tmp_path: Path) -> None:
    first = checkpoint(plan, tmp_path / "a", 0)
    other = checkpoint(plan, tmp_path / "b", 1, label_names=["background", "near", "other"])
    with pytest.raises(UserError, match="are no ensemble: their label_names differ"):
        Loaded([first, other])


def test_rules_of_a_run_are_loaded_and_checked(plan: Plan, tmp_path: Path) -> None:
    checkpoint(plan, tmp_path / "fold_0", 0)
    rules = [{"labels": [1], "largest": True}]
    (tmp_path / POSTPROCESSING).write_text(json.dumps({"rules": rules}))
    assert Loaded([tmp_path]).rules == Loaded([tmp_path / "fold_0"]).rules == rules
    (tmp_path / POSTPROCESSING).write_text(json.dumps([{"label": 1}]))
    with pytest.raises(UserError, match="needs 'labels'"):
        Loaded([tmp_path])


def test_rules_are_those_of_the_first_model_alone(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = {"labels": [1], "largest": True}
    one, two = (checkpoint(plan, tmp_path / name, 0) for name in ("one", "two"))
    save_rules(two.parent, [rule])
    assert Loaded([two]).rules == [rule]
    save_rules(one.parent, [])
    assert Loaded([one, two]).rules == []  # it was found that no rule helps
    save_rules(tmp_path, [rule])
    monkeypatch.chdir(tmp_path)
    assert Loaded([Path("hippocampus")]).rules == []  # what lies in the working folder belongs to another


def test_images_are_told_from_the_maps_of_a_prediction_by_their_headers(
    plan: Plan, blobs: Path, tmp_path: Path
) -> None:
    source = blobs / "imagesTr" / "case_0.nii.gz"
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("x_prob_1", "y_uncertainty"):
        shutil.copy(source, folder / f"{name}.nii.gz")
    model = checkpoint(plan, tmp_path / "model", 0)
    said = StringIO()
    how: dict[str, Any] = {"console": Console(file=said, width=200), "version": "1"}
    assert predict_with([model], folder, tmp_path / "out", **how)["predicted"] == 2
    shutil.copy(source, folder / "z.nii.gz")
    beside: dict[str, Any] = {"probabilities": True, "uncertainty": True}
    assert predict_with([model], folder, folder / "masks", **how, **beside)["predicted"] == 3
    for file in (folder / "masks").iterdir():
        if is_beside(file):
            shutil.copy(file, folder)
    assert predict_with([model], folder, tmp_path / "again", **how)["predicted"] == 3
    left = {path.name for path in (folder / "masks").iterdir()}
    predict_with([model], folder, folder / "masks", **how, again=True)
    assert {path.name for path in (folder / "masks").iterdir() if not is_beside(path)} < left
    assert not any(is_beside(path) for path in (folder / "masks").iterdir())
    assert "Passed over: 12 maps of an earlier prediction" in said.getvalue()
    assert "Not looked at, for there are image files: masks/" in said.getvalue()


def test_images_that_the_networks_were_trained_on_are_told(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    """By their bytes, wherever they lie; those that a fold validates on are not."""
    run, folder = tmp_path / "run", tmp_path / "scans"
    file = checkpoint(plan, run / "3d" / "fold_0", 0)
    tensors, info = load_checkpoint(file)
    save_checkpoint(file, tensors, {**info, "fold": 0})
    dataset = read_dataset(blobs)
    save_fingerprint(fingerprint(dataset), run / "3d")
    names = [case.id for case in dataset.cases]
    write_json(run / "3d" / "splits.json", [{"train": names[1:], "val": names[:1]}])
    folder.mkdir()
    for number, name in enumerate("abc"):
        shutil.copy(blobs / "imagesTr" / f"case_{number}.nii.gz", folder / f"{name}.nii.gz")
    cases = find_images(folder)
    assert training_images([file], cases) == ["b", "c"]
    shutil.copytree(run / "3d" / "fold_0", run / "model" / "fold_0")  # the final model of kanseg run
    assert training_images(find_members(run), cases) == ["b", "c"]
    shutil.copytree(run / "model", tmp_path / "alone" / "model")
    assert training_images(find_members(tmp_path / "alone"), cases) == []
    said = StringIO()
    predict_with([run], folder, tmp_path / "out", console=Console(file=said, width=200), version="1")
    assert "the networks were trained on 2 of these images (b, c), and scores" in said.getvalue()


def test_classes_whose_names_differ_by_signs_have_maps_of_their_own() -> None:
    names = ["background", "lesion <1cm", "Lesion >1cm", "organ"]
    paths = [probability_path(Path("a.nii.gz"), names, number).name for number in range(4)]
    assert paths == [
        "a_prob_background.nii.gz",
        "a_prob_1_lesion__1cm.nii.gz",
        "a_prob_2_Lesion__1cm.nii.gz",
        "a_prob_organ.nii.gz",
    ]


def test_folders_with_probabilities_are_averaged_others_vote(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    cases = find_images(blobs / "imagesTr")[:2]
    mapped = replace(plan, label_values=[0, 7, 300], label_dtype="uint16")
    folders = [tmp_path / name for name in "abc"]
    for folder, threshold in zip(folders, (0.2, 0.6, 2.5), strict=True):
        predict_folder(Brightness(threshold), mapped, cases, folder, probabilities=True)
    files, values, regions = find_probabilities(folders[0] / "case_0.nii.gz") or ([], [], True)
    assert (len(files), values, regions) == (3, [0, 7, 300], False)
    assert set(combine_folders(folders, tmp_path / "mean")["by"].values()) == {"probability"}
    networks = [Brightness(t) for t in (0.2, 0.6, 2.5)]
    wanted, _ = predict_case(networks, cases[0], [mapped] * 3)
    found = read_image(tmp_path / "mean" / "case_0.nii.gz").array[0]
    np.testing.assert_array_equal(found, wanted)
    for path in folders[0].glob("*_prob_*"):
        path.unlink()
    assert set(combine_folders(folders, tmp_path / "vote")["by"].values()) == {"vote"}
    middle = read_image(
        folders[1] / "case_0.nii.gz"
    ).array  # of three thresholds the middle one is the majority
    np.testing.assert_array_equal(read_image(tmp_path / "vote" / "case_0.nii.gz").array, middle)
    nib_map = nib.load(tmp_path / "vote" / "case_0.nii.gz")
    np.testing.assert_allclose(nib_map.affine, nib.load(cases[0].images[0]).affine)
    told = names_in(tmp_path / "vote" / "case_0.nii.gz")
    assert [*told] == mapped.label_values
    assert told == names_in(folders[0] / "case_0.nii.gz")
    for name, kind in (("mean", "probability"), ("vote", "vote")):
        told = read_provenance(tmp_path / name / "case_0.nii.gz")
        assert told["combined by"] == kind
        parts = [file_digest(folder / "case_0.nii.gz") for folder in folders]
        assert [part["sha256"] for part in told["label maps"]] == parts


def test_a_tie_of_votes_goes_to_the_earliest_folder(tmp_path: Path) -> None:
    maps = [np.random.default_rng(seed).permutation(np.arange(27) % 3) for seed in range(2)]
    folders = [tmp_path / name for name in "ab"]
    for folder, labels in zip(folders, maps, strict=True):
        folder.mkdir()
        image = nib.Nifti1Image(labels.reshape(3, 3, 3).astype(np.uint8), np.eye(4))
        nib.save(image, folder / "case.nii.gz")
    for number, order in enumerate((folders, folders[::-1])):
        combine_folders(order, tmp_path / f"out{number}")
        found, first = (read_image(f / "case.nii.gz").array for f in (tmp_path / f"out{number}", order[0]))
        np.testing.assert_array_equal(found, first)


def test_folders_that_cannot_be_combined_are_refused(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    for folder, count in (("a", 2), ("b", 1)):
        predict_folder(Brightness(0.5), plan, find_images(blobs / "imagesTr")[:count], tmp_path / folder)
    with pytest.raises(UserError, match="do not hold the same cases: only one has case_1"):
        combine_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(UserError, match="is one of the folders to combine"):
        combine_folders([tmp_path / "a", tmp_path / "a"], tmp_path / "a")
    with pytest.raises(UserError, match="at least two"):
        combine_folders([tmp_path / "a"], tmp_path / "out")


class Counting(Brightness):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_a_cohort_goes_on_where_it_stopped(plan: Plan, blobs: Path, tmp_path: Path, suffix: str) -> None:
    scans = tmp_path / "scans"
    shutil.copytree(blobs / "imagesTr", scans)
    cases = find_images(scans)

    def predicted(settings: dict, **how: object) -> int:
        """How many cases the network saw."""
        network = Counting(0.5)
        how = {"suffix": suffix, "settings": settings, **how}
        assert not predict_folder(network, plan, cases, tmp_path / "out", **how)  # type: ignore[arg-type]
        return network.calls // per_case

    per_case = 1
    per_case = predicted({"model": "x"}) // len(cases)
    assert predicted({"model": "x"}) == 0
    (tmp_path / "out" / f"case_2{suffix}").unlink()
    assert predicted({"model": "x"}) == 1
    assert predicted({"model": "x"}, again=True) == len(cases)
    assert predicted({"model": "y"}) == len(cases)
    file = nib.load(scans / "case_3.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(file.dataobj) * 2, file.affine), scans / "case_3.nii.gz")
    assert predicted({"model": "y"}) == 1
    assert len(list((tmp_path / "out").iterdir())) == len(cases)


def recorder(seen: list[tuple[int, int]]) -> Callable[[int, int], None]:
    return lambda done, total: seen.append((done, total))


def test_progress_within_a_case_counts_every_window(plan: Plan, blobs: Path) -> None:
    case = read_dataset(blobs).cases[0]
    for how in ({}, {"tta": True}, {"overlap": 0.25}, {"blending": "constant"}):
        seen: list[tuple[int, int]] = []
        mirrored = replace(plan, mirror_axes=[0, 2])
        predict([Brightness(0.5)] * 2, case, [plan, mirrored], watch=recorder(seen), **how)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        first = [at for at in seen if at[0] <= at[1] // 2]
        assert first[-1][0] * 2 == first[-1][1]
        assert seen[-1][0] == seen[-1][1]


def test_constant_blending_weighs_windows_alike(plan: Plan) -> None:
    from kanseg.inference.logits import whole_logits

    class Ramp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.arange(16.0).view(1, 1, -1, 1, 1).expand(len(x), 3, 16, 16, 16).clone()

    image = torch.zeros(1, 1, 24, 16, 16)
    line = whole_logits(Ramp(), image, plan, overlap=0.5, blending="constant")[0][:, 0, 0]
    wanted = [*range(8), *((i + i - 8) / 2 for i in range(8, 16)), *range(8, 16)]
    torch.testing.assert_close(line, torch.tensor(wanted))


def test_networks_have_the_temperatures_of_their_own_runs(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    """Of one plan their geometric mean; a folder of a network goes before that of its model, which has the Dice's."""
    flat = make_plan(read_dataset(blobs), memory=2**31, dim=2)
    for number, (own, heat) in enumerate(((plan, 2.0), (plan, 0.5), (plan, 8.0), (flat, 3.0), (flat, None))):
        checkpoint(own, tmp_path / f"fold_{number}", number)
        if heat:
            known = {"temperature": heat, "quality": {"cases": number}}
            (tmp_path / f"fold_{number}" / CALIBRATION).write_text(json.dumps(known))
    (tmp_path / CALIBRATION).write_text('{"temperature": 12, "quality": {"cases": 30}}')
    loaded = Loaded([tmp_path])
    assert loaded.temperatures == pytest.approx([2.0, 6.0])
    assert loaded.quality == {"cases": 30}
    found = facts_of_model(tmp_path)
    assert found["temperature"] == [2, 0.5, 8, 3, 12]
    assert found["expected Dice by"] == "30 unseen cases"
    for file in tmp_path.rglob(CALIBRATION):
        file.unlink()
    assert Loaded([tmp_path]).temperatures == [1, 1]
    assert not Loaded([tmp_path]).quality
    assert not {"temperature", "expected Dice by"} & facts_of_model(tmp_path).keys()


def test_facts_of_a_model_of_two_plans_tell_both(plan: Plan, blobs: Path, tmp_path: Path) -> None:
    """The model of kanseg run may hold networks in 3D and in 2D."""
    flat = make_plan(read_dataset(blobs), memory=2**31, dim=2)
    for number, own in enumerate((plan, plan, flat)):
        checkpoint(own, tmp_path / f"fold_{number}", number)
    found = facts_of_model(tmp_path)
    assert found["networks"] == 3
    assert found["network"] == ["ukanet in 3D", "ukanet in 2D"]
    assert found["patch size"] == [plan.patch_size, flat.patch_size]

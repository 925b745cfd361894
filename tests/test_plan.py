"""Plans fit the data and the memory, and say why."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kanseg.cli import app
from kanseg.config import load_config
from kanseg.data.formats import read_dataset
from kanseg.data.plan import Plan
from kanseg.data.planner import make_plan, plan_run
from kanseg.data.sizing import BYTES_A_CASE_VOXEL, Need, check_memory, loader_bytes
from kanseg.errors import UsageError, UserError
from kanseg.memory import on_gpu, taken
from kanseg.models import create_model
from kanseg.training.checkpoint import model_spec

GIB = 2**30


def volumes(root: Path, size: tuple[int, ...], spacing: tuple[float, ...], channel: str = "MRI") -> Path:
    import json

    entries = []
    for i in range(3):
        label = np.zeros(size, np.uint8)
        label[tuple(slice(n // 4, n // 2) for n in size)] = 1
        image = np.random.default_rng(i).normal(40, 10, size) + 100 * label
        for folder, array in (("images", image.astype(np.float32)), ("labels", label)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0])), root / folder / f"{i}.nii.gz")
        entries.append({"image": f"images/{i}.nii.gz", "label": f"labels/{i}.nii.gz"})
    described = {"labels": {"0": "background", "1": "organ"}, "modality": {"0": channel}, "training": entries}
    (root / "dataset.json").write_text(json.dumps(described))
    return root


def test_hippocampus(shared_data: Path, tmp_path: Path) -> None:
    plan = make_plan(read_dataset(shared_data / "hippocampus"), memory=8 * GIB)
    assert plan.patch_size == [40, 56, 40]
    assert plan.strides == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert plan.spacing == [1, 1, 1]
    assert plan.label_dtype == "uint8"
    assert plan.reasons
    again = Plan.load(plan.save(tmp_path / "plan.json"))
    assert again == plan


def test_thick_slices_are_halved_within_first(tmp_path: Path) -> None:
    plan = make_plan(read_dataset(volumes(tmp_path, (64, 64, 12), (1.0, 1.0, 5.0))), memory=8 * GIB)
    assert plan.strides[1] == [2, 2, 1]
    assert plan.kernel_sizes[0] == [3, 3, 1]
    assert plan.spacing == [1.0, 1.0, 5.0]
    assert all(n % f == 0 for n, f in zip(plan.patch_size, np.prod(plan.strides, axis=0), strict=True))


def test_the_distance_of_thick_slices_goes_by_its_tenth_percentile(tmp_path: Path) -> None:
    root, distances = volumes(tmp_path, (32, 32, 12), (1.0, 1.0, 5.0)), (5.0, 10.0, 15.0)
    for path in root.glob("*/*.nii.gz"):
        affine = np.diag([1.0, 1.0, distances[int(path.name[0])], 1.0])
        nib.save(nib.Nifti1Image(np.asarray(nib.load(path).dataobj), affine), path)
    plan = make_plan(read_dataset(root), memory=8 * GIB)
    assert plan.spacing == pytest.approx([1.0, 1.0, np.percentile(distances, 10)])


def test_a_few_slices_do_not_stop_the_halving_within_them(tmp_path: Path) -> None:
    plan = make_plan(read_dataset(volumes(tmp_path, (256, 256, 2), (1.0, 1.0, 3.0))), memory=8 * GIB)
    assert plan.strides[1:] == [[2, 2, 1]] * 5
    assert plan.kernel_sizes[-1] == [3, 3, 3]


def test_axes_are_counted_in_ras_order(tmp_path: Path) -> None:
    root = volumes(tmp_path, (40, 32, 48), (1.0, 1.0, 1.0))
    turned = np.array([[0, 0, 3.0, 0], [-1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]])  # stored P, S, R
    for path in root.glob("*/*.nii.gz"):
        nib.save(nib.Nifti1Image(np.asarray(nib.load(path).dataobj), turned), path)
    plan = make_plan(read_dataset(root), memory=8 * GIB)
    assert plan.spacing == [3.0, 1.0, 1.0]


@pytest.mark.parametrize("channel", ["CT", "ct", " Ct "])
def test_ct_is_clipped_to_its_foreground(tmp_path: Path, channel: str) -> None:
    plan = make_plan(read_dataset(volumes(tmp_path, (32, 32, 32), (1.0, 1.0, 1.0), channel)))
    (scheme,) = plan.normalization
    assert scheme["scheme"] == "ct"
    assert 100 < scheme["lower"] < scheme["mean"] < scheme["upper"] < 180


@pytest.mark.parametrize(
    ("channel", "scheme"),
    [
        ("noNorm", {"scheme": "fixed", "mean": 0.0, "std": 1.0}),
        ("rgb_to_0_1", {"scheme": "fixed", "mean": 0.0, "std": 255.0}),
        ("rescale_to_0_1", {"scheme": "minmax"}),
        ("T1", {"scheme": "zscore"}),
    ],
)
def test_channels_that_nnunet_would_not_standardise_are_not(
    tmp_path: Path, channel: str, scheme: dict[str, object]
) -> None:
    dataset = read_dataset(volumes(tmp_path, (32, 32, 32), (1.0, 1.0, 1.0), channel))
    assert make_plan(dataset).normalization == [scheme]


def test_less_memory_gives_smaller_steps(tmp_path: Path) -> None:
    dataset = read_dataset(volumes(tmp_path, (96, 96, 96), (1.0, 1.0, 1.0)))
    plans = [make_plan(dataset, memory=m * GIB) for m in (1, 4, 64)]
    steps = [math.prod(p.patch_size) * p.batch_size * p.features_per_stage[0] for p in plans]
    assert steps[0] < steps[1] < steps[2]
    assert plans[0].features_per_stage[0] < plans[1].features_per_stage[0]  # width goes before sight


def test_presets_scale_one_plan(tmp_path: Path) -> None:
    dataset = read_dataset(volumes(tmp_path, (64, 64, 64), (1.0, 1.0, 1.0)))
    plans = [make_plan(dataset, memory=64 * GIB, size=size) for size in ("small", "standard", "large")]
    assert [p.features_per_stage[0] for p in plans] == [16, 32, 48]
    for key in ("patch_size", "strides", "spacing", "normalization"):
        assert len({str(getattr(p, key)) for p in plans}) == 1
    counts = []
    for plan in plans:
        spec = model_spec(load_config(), plan)
        counts.append(sum(p.numel() for p in create_model(**spec.pop("options"), **spec).parameters()))
    assert counts[0] < counts[1] < counts[2]
    with pytest.raises(UserError, match="Unknown size 'standrd'. Did you mean 'standard'"):
        make_plan(dataset, size="standrd")


def test_the_planned_network_takes_the_planned_patch(blobs: Path) -> None:
    plan = make_plan(read_dataset(blobs), memory=2 * GIB)
    spec = model_spec(
        load_config(), replace(plan, features_per_stage=[4 * 2**i for i in range(len(plan.strides))])
    )
    model = create_model(**spec.pop("options"), **spec).eval()
    assert model(torch.zeros(1, 1, *plan.patch_size)).shape == (1, 3, *plan.patch_size)


def test_a_broken_plan_is_explained(tmp_path: Path, blobs: Path) -> None:
    values = make_plan(read_dataset(blobs)).to_dict()
    with pytest.raises(UserError, match="no key 'patchsize'. Did you mean 'patch_size'"):
        Plan.from_dict({**values, "patchsize": 1})
    values.pop("spacing")
    with pytest.raises(UserError, match="not complete, .*spacing"):
        Plan.from_dict(values)
    values |= {"spacing": [1.0, 1.0, 1.0], "batch_size": "two"}
    with pytest.raises(UserError, match="words for numbers"):
        Plan.from_dict(values)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as a plan"):
        Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"plan.json: A plan has no key 'a'"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("patch_size", [16, 16], r"patch_size needs a positive number for each of 3 axes, but is \[16, 16\]"),
        ("spacing", [1, 1, -1], "spacing needs a positive number"),
        ("normalization", [], "normalization has 0 entries, channel_names has 1"),
        ("strides", [[1, 1, 1]], "features_per_stage has . entries, strides has 1"),
        ("label_values", [0, 2, 1], "label_values must rise"),
        ("batch_size", 0, "batch_size is 0"),
        ("version", 99, "version 99"),
        ("spacing", [1, 1, float("inf")], "spacing needs a positive number"),
        ("label_names", [["a"], 1, 2], "words for numbers: 'label_names.0'"),
        ("label_dtype", "float99", "label_dtype is one of uint8"),
        ("normalization", [{"scheme": "z"}], "a normalization is one of zscore"),
        ("normalization", [{"scheme": "fixed", "mean": 0}], "'fixed' needs the numbers mean, std"),
    ],
)
def test_a_plan_edited_into_nonsense_is_refused(blobs: Path, key: str, value: Any, message: str) -> None:
    values = make_plan(read_dataset(blobs)).to_dict()
    with pytest.raises(UserError, match=message):
        Plan.from_dict({**values, key: value})


def test_the_wrong_dimension_is_refused(blobs: Path, shared_data: Path) -> None:
    with pytest.raises(UserError, match="is 2D and dim=3 was asked for"):
        make_plan(read_dataset(shared_data / "glas"), dim=3)
    for dim, slices in ((3, 3), (2, 2), (2, -1)):
        with pytest.raises(UserError, match=f"slices={slices} does not fit"):
            make_plan(read_dataset(blobs), dim=dim, slices=slices)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_volumes_are_sliced_across_their_thick_slices(tmp_path: Path, axis: int) -> None:
    spacing, size = [1.0, 1.2, 1.1], [40, 40, 40]
    spacing[axis], size[axis] = 4.0, 12
    plan = make_plan(
        read_dataset(volumes(tmp_path, tuple(size), tuple(spacing))), memory=8 * GIB, dim=2, slices=3
    )
    assert (plan.spatial_dims, plan.image_dims, plan.slice_axis, plan.in_channels) == (2, 3, axis, 3)
    assert plan.spacing == [s for i, s in enumerate(spacing) if i != axis]
    assert len(plan.patch_size) == 2


def steps_of(base: float, per_voxel: float, least: float = 0.0) -> Callable[[Plan], Need]:
    """A machine whose memory is known: as `per_voxel` a voxel and feature."""
    return lambda plan: Need(base, per_voxel * plan.features_per_stage[0], least)


def test_a_measured_step_fits_into_the_memory(tmp_path: Path) -> None:
    dataset = read_dataset(volumes(tmp_path, (96, 96, 96), (1.0, 1.0, 1.0)))
    for budget in (1.2 * GIB, 2 * GIB, 4 * GIB):
        machine = steps_of(GIB / 2, 500)
        plan = make_plan(dataset, memory=int(budget), measure=machine)
        need = machine(plan)
        taken = need.base + need.per_voxel * math.prod(plan.patch_size) * plan.batch_size
        assert 0.5 * budget < taken < budget
        assert "trial steps took" in " ".join(plan.reasons)
    with pytest.raises(UserError, match="900 MiB are too few"):
        make_plan(dataset, memory=900 * 2**20, measure=steps_of(GIB, 500))


@pytest.mark.skipif(on_gpu(), reason="tells of main memory")
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_less_memory_than_the_program_takes_is_refused_before_the_data_are_looked_for(verb: str) -> None:
    check_memory(2 * taken())
    told = CliRunner().invoke(app, [verb, "nowhere", "-o", "run", "--memory", "100M"])
    assert isinstance(told.exception, UsageError)
    assert re.match(
        r"--memory 100M is too little: the program alone takes \d+ MiB .* No less than", str(told.exception)
    )


def test_the_memory_is_enough_for_step_prepared_cases_and_loader_together(tmp_path: Path) -> None:
    size = (96, 96, 96)
    dataset = read_dataset(volumes(tmp_path, size, (1.0, 1.0, 1.0)))
    machine = steps_of(10 * 2**20, 10)
    cases = len(dataset.cases) * math.prod(size) * (4 + BYTES_A_CASE_VOXEL)
    for budget in (144 * 2**20, 192 * 2**20):
        assert cases < 0.25 * budget  # all of them stay in memory
        plan = make_plan(dataset, memory=budget, measure=machine)
        need, voxels = machine(plan), math.prod(plan.patch_size) * plan.batch_size
        step = need.base + need.per_voxel * voxels
        assert plan.training_bytes == pytest.approx(step + cases)
        assert 0.7 * budget < step + cases + loader_bytes(plan) < budget


def test_the_memory_of_a_gpu_is_for_the_step_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared cases and loaders are in main memory there."""
    dataset = read_dataset(volumes(tmp_path, (96, 96, 96), (1.0, 1.0, 1.0)))
    machine, budget = steps_of(10 * 2**20, 10), 144 * 2**20
    beside = make_plan(dataset, memory=budget, measure=machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = make_plan(dataset, memory=budget, measure=machine)
    need, voxels = machine(plan), math.prod(plan.patch_size) * plan.batch_size
    assert voxels > math.prod(beside.patch_size) * beside.batch_size
    assert 0.7 * budget < plan.training_bytes == need.base + need.per_voxel * voxels < budget
    assert "prepared cases" not in " ".join(plan.reasons)


def test_a_short_training_gets_smaller_steps_rather_than_few(tmp_path: Path) -> None:
    dataset = read_dataset(volumes(tmp_path, (96, 96, 96), (1.0, 1.0, 1.0)))

    def machine(plan: Plan) -> Need:
        return Need(GIB, 100 * plan.features_per_stage[0], seconds=1e-5 * plan.features_per_stage[0] / 32)

    plans = [make_plan(dataset, memory=16 * GIB, measure=machine, seconds=s) for s in (None, 3600, 600)]
    voxels = [plan.batch_size * math.prod(plan.patch_size) for plan in plans]
    assert voxels[0] > voxels[1] > voxels[2]
    for plan, seconds, count in zip(plans[1:], (3600, 600), voxels[1:], strict=True):
        steps = seconds / machine(plan).seconds / count
        assert 250 <= steps < 1000
        assert f"; {steps:.0f} fit into the time" in " ".join(plan.reasons)
    assert f"a step takes about {voxels[0] * 1e-5:.0f} s here" in " ".join(plans[0].reasons)


def test_what_a_step_takes_at_any_size_is_not_saved_by_a_smaller_patch() -> None:
    need = Need(GIB, 100, seconds=1e-6, overhead=0.05)
    assert need.voxels_within(1.05) == pytest.approx(1e6)
    assert need.voxels_within(0.06) == need.voxels_within(0.01) == pytest.approx(5e4)


def test_a_patch_that_would_see_next_to_nothing_gets_coarser_voxels_the_finest_axes_first(
    tmp_path: Path,
) -> None:
    dataset = read_dataset(volumes(tmp_path, (200, 200, 100), (0.5, 0.5, 1.0)))
    machine = steps_of(GIB, 500)

    def voxels_allowed(plan: Plan) -> Need:
        return replace(machine(plan), seconds=1e-2)

    rich, poor = (make_plan(dataset, memory=16 * GIB, measure=voxels_allowed, seconds=s) for s in (1e6, 2e4))
    assert rich.spacing == [0.5, 0.5, 1.0]
    assert "coarsened" not in rich.reasons[0]
    assert 0.5 < poor.spacing[0] == poor.spacing[1] < 1.01 * poor.spacing[2]
    image = math.prod(np.array([100.0, 100.0, 100.0]) / poor.spacing)
    assert 1 / 100 < math.prod(poor.patch_size) / image < 1 / 16
    assert "coarsened to" in poor.reasons[0]
    assert "a longer training or more memory" in poor.reasons[0]


def test_pairs_on_different_grids_stop_the_plan(tmp_path: Path) -> None:
    root = volumes(tmp_path, (16, 16, 16), (1.0, 1.0, 1.0))
    label = root / "labels" / "1.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((16, 16, 15), np.uint8), np.eye(4)), label)
    with pytest.raises(UserError, match=r"images/1.nii.gz and .*labels/1.nii.gz lie on different grids"):
        make_plan(read_dataset(root))


def test_what_a_plan_cannot_keep_within_the_memory_is_said(shared_data: Path) -> None:
    """Two hundred classes of a whole head: logits of the image alone are gigabytes."""
    plan = make_plan(read_dataset(shared_data / "volumes_misc"), memory=2 * GIB)
    assert "GiB of logits (200 classes)" in " ".join(plan.reasons)
    assert max(map(len, plan.reasons)) < 400
    plan = make_plan(read_dataset(shared_data / "hippocampus"), memory=2 * GIB)
    assert "logits" not in " ".join(plan.reasons)


def test_what_does_not_fit_is_refused_before_an_image_is_read(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kanseg.data.planner.fingerprint", lambda dataset: pytest.fail("images were read"))
    for wrong in ({"size": "big"}, {"slices": 2}, {"mirror": [3]}):
        with pytest.raises(UserError):
            plan_run(read_dataset(blobs), tmp_path / "run", **wrong)  # type: ignore[arg-type]


def test_a_plan_names_what_limits_its_patch(tmp_path: Path) -> None:
    """The memory, the time, or the image itself."""
    dataset = read_dataset(volumes(tmp_path, (96, 96, 96), (1.0, 1.0, 1.0)))

    def why(memory: int, seconds: float | None = None) -> str:
        def machine(plan: Plan) -> Need:
            return Need(GIB, 100 * plan.features_per_stage[0], seconds=1e-5)

        return make_plan(dataset, memory=memory * GIB, measure=machine, seconds=seconds).reasons[1]

    assert "features: what fits into 4.0 GiB" in why(4)
    assert "features: small enough for many steps in 10 min of training; more would fit into" in why(16, 600)
    assert "features: the whole image in the largest batch, which fits into 64.0 GiB" in why(64)
    assert "the whole image" in why(64, 1e6)
    assert "the largest batch" in make_plan(dataset, memory=640 * GIB).reasons[1]


def test_why_a_network_is_narrower_than_its_size_is_told_truly(tmp_path: Path) -> None:
    """Its weights and their copies pass the memory at any patch, or a wide one would see too little."""
    dataset = read_dataset(volumes(tmp_path, (96, 96, 96), (1.0, 1.0, 1.0)))

    def heavy(plan: Plan) -> Need:
        return Need(GIB / 2 + plan.features_per_stage[0] * GIB / 8, 10.0)

    said = " ".join(make_plan(dataset, memory=3 * GIB, size="large", measure=heavy).reasons)
    assert "narrower than size 'large', so that it fits into the memory by itself" in said
    said = " ".join(make_plan(dataset, memory=GIB, size="large", measure=steps_of(GIB / 2, 500)).reasons)
    assert "narrower than size 'large', so that a patch sees enough of the image" in said

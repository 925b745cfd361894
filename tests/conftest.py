"""What the tests share: real data beside the project, and a small data set made of numbers."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each process of tests, and for those that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import nibabel as nib
import numpy as np
import pytest
import torch
from backends import BACKENDS, kernels
from rich.console import Console

from kanseg.config import load_config
from kanseg.data.formats import read_dataset
from kanseg.data.plan import Plan
from kanseg.data.planner import make_plan
from kanseg.layers.kernels import native
from kanseg.training.fit import fit

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
SHORT = ["training.steps_per_epoch=4", "data.workers=0", "data.folds=3", "training.final_validation=false"]
collect_ignore = ["interpreted_triton.py"]  # run by test_triton.py in a process of its own
LONG = ("test_triton", "test_packaging", "test_notebooks")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that none is begun when the other processes have nothing left to do."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections, of which a training near its memory makes many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real labelled scans; tests that need it are skipped where it is not beside the project."""
    if not SHARED.is_dir():
        pytest.skip("the real data (../shared/data) is not beside the project")
    return SHARED


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As trainings whose bits are compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every set of kernels in turn."""
    found = kernels(request.param)
    monkeypatch.setattr(native, "library", lambda: found)
    return request.param


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MSD data set of 6 volumes with two bright balls each, 3 patients with two volumes."""
    root = tmp_path_factory.mktemp("blobs")
    generator = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (20, 24, 18)], indexing="ij"), -1)
    entries, subjects = [], {}
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir()
    for case in range(6):
        label = np.zeros((20, 24, 18), dtype=np.uint8)
        for value, at in ((1, (6, 7, 8)), (2, (13, 16, 9))):
            centre = np.array(at) + generator.integers(-2, 3, 3)
            label[np.linalg.norm(grid - centre, axis=-1) < 4] = value
        image = generator.normal(0, 0.3, label.shape) + 2 * (label == 1) + 4 * (label == 2)
        affine = np.diag([-1.0, -1.0, 1.5, 1.0])
        affine[:3, 3] = generator.normal(0, 20, 3)
        name = f"case_{case}.nii.gz"
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), root / "imagesTr" / name)
        nib.save(nib.Nifti1Image(label, affine), root / "labelsTr" / name)
        entries.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
        subjects[f"case_{case}"] = f"p{case // 2}"
    described = {
        "name": "Blobs",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "near", "2": "far"},
        "training": entries,
        "subjects": subjects,
    }
    (root / "dataset.json").write_text(json.dumps(described))
    return root


@pytest.fixture(scope="module")
def plan(blobs: Path) -> Plan:
    """A plan for the blobs, with small patches."""
    return replace(make_plan(read_dataset(blobs), memory=2**31), patch_size=[16, 16, 16])


@pytest.fixture(scope="session")
def balls(tmp_path_factory):
    """Six noisy volumes with a bright ball, two a patient, as a data set on disk and its small plan."""
    folder = tmp_path_factory.mktemp("balls")
    generator = np.random.default_rng(0)
    rows = ["image,label,patient"]
    grid = np.stack(np.meshgrid(*[np.arange(14)] * 3, indexing="ij"), -1)
    for number in range(6):
        ball = np.linalg.norm(grid - generator.uniform(5, 9, 3), axis=-1) < 4
        image = ball * 2.0 + generator.normal(0, 0.3, ball.shape)
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), folder / f"image{number}.nii.gz")
        nib.save(nib.Nifti1Image(ball.astype(np.uint8) * 7, np.eye(4)), folder / f"label{number}.nii.gz")
        rows.append(f"image{number}.nii.gz,label{number}.nii.gz,patient{number // 2}")
    (folder / "cases.csv").write_text("\n".join(rows))
    dataset = read_dataset(folder / "cases.csv")
    plan = replace(
        make_plan(dataset, memory=2**30),
        patch_size=[8, 8, 8],
        batch_size=2,
        features_per_stage=[4, 8, 8],
        strides=[[1] * 3, [2] * 3, [2] * 3],
        kernel_sizes=[[3] * 3] * 3,
        model_options={"basis": "legendre", "kan_stages": [1], "deep_supervision": True},
    )
    return dataset, plan


@pytest.fixture
def fit_balls(balls, tmp_path):
    """`fit` on the small balls in tmp_path/run (or `run`), quickly: fit_balls("training.lr=0.1", fold=1)."""

    def run(*overrides, run=tmp_path / "run", **options):
        dataset, plan = balls
        config = load_config(overrides=[*SHORT, *overrides])
        return fit(config, plan, dataset, run, console=Console(quiet=True), **options)

    return run


@pytest.fixture(scope="session")
def quick_learner() -> list[str]:
    """Overrides: a network of two stages that learns something within seconds, in one epoch."""
    training = ["training.max_epochs=1", "training.lr=0.01", "training.ema_decay=null"]
    network = ["features_per_stage=[8,16]", "strides=[1,2]", "kernel_sizes=[3,3]", "deep_supervision=false"]
    return [*training, "data.folds=3", "data.workers=0", *(f"model.options.{option}" for option in network)]


@pytest.fixture(scope="session")
def processes():
    """A context whose processes start at once, with everything imported."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("real kills are tested where processes can be forked")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kanseg.training.fit", "kanseg.config", "hydra", "matplotlib.figure"])
    return context


@pytest.fixture(scope="session")
def apart(processes):
    """What a function of a module gives in such a process: apart(function, *arguments)."""

    def result(function, *arguments):
        with ProcessPoolExecutor(1, mp_context=processes) as process:
            return process.submit(function, *arguments).result()

    return result

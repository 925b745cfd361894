"""The command line as a person types it: it teaches, it works, and a mistake is one line and an exit code."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

VERBS = ("demo", "plan", "train", "predict", "evaluate", "models", "info")
QUICK = [
    "training.max_epochs=1",
    "training.steps_per_epoch=2",
    "model.options.features_per_stage=[4,8]",
    "model.options.strides=[1,2]",
    "model.options.kernel_sizes=[3,3]",
    "model.options.deep_supervision=false",
    "data.folds=3",
    "data.workers=0",
]


def kanseg(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kanseg.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def refused(result: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    for part in parts:
        assert part in result.stderr, result.stderr


@pytest.fixture(scope="module")
def run(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planned and trained run, by the two commands."""
    folder = tmp_path_factory.mktemp("run") / "blobs"
    planned = kanseg("plan", blobs, "-o", folder, "--memory", "2G")
    assert planned.returncode == 0, planned.stderr
    assert "Decathlon" in planned.stdout
    trained = kanseg("train", folder, *QUICK)
    assert trained.returncode == 0, trained.stderr
    return folder


def test_help_teaches_and_is_fast() -> None:
    whole = kanseg("--help")
    assert whole.returncode == 0
    assert all(verb in whole.stdout for verb in VERBS)
    for verb in VERBS:
        assert f"kanseg {verb}" in kanseg(verb, "--help").stdout
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        kanseg("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 1.0


def test_importing_kanseg_imports_no_torch() -> None:
    code = "import sys, kanseg, kanseg.cli; assert not {'torch', 'monai', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_plan_train_predict_evaluate(run: Path, blobs: Path, tmp_path: Path) -> None:
    predicted = kanseg("predict", "-m", run, "-i", blobs / "imagesTr", "-o", tmp_path / "masks", "--json")
    assert predicted.returncode == 0, predicted.stderr
    assert json.loads(predicted.stdout)["predicted"] == 6
    image, mask = (
        nib.load(blobs / "imagesTr" / "case_0.nii.gz"),
        nib.load(tmp_path / "masks" / "case_0.nii.gz"),
    )
    np.testing.assert_allclose(mask.affine, image.affine)
    assert mask.shape == image.shape
    assert mask.get_data_dtype() == np.uint8
    scored = kanseg("evaluate", tmp_path / "masks", blobs / "labelsTr", "-o", tmp_path / "scores")
    assert scored.returncode == 0, scored.stderr
    assert "Dice" in scored.stdout
    assert {p.name for p in (tmp_path / "scores").iterdir()} == {"cases.csv", "summary.json"}


def test_a_failed_case_is_reported_and_the_exit_code_is_1(run: Path, blobs: Path, tmp_path: Path) -> None:
    shutil.copytree(blobs / "imagesTr", tmp_path / "scans")
    (tmp_path / "scans" / "case_2.nii.gz").write_bytes(b"")
    result = kanseg("predict", "-m", run, "-i", tmp_path / "scans", "-o", tmp_path / "masks")
    refused(result, 1, "case_2 failed", "1 of 6 cases failed")
    assert len(list((tmp_path / "masks").iterdir())) == 5


def test_models_and_info_print_json() -> None:
    listed = json.loads(kanseg("models", "--json").stdout)
    assert {"name", "parameters_3d", "description"} <= set(listed[0])
    assert "torch" in json.loads(kanseg("info", "--json").stdout)


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["plan", "nowhere", "-o", "run"], 1, ["There is no nowhere"]),
        (["plan", ".", "-o", "run"], 1, ["no layout that kanseg knows"]),
        (["plan", "{data}", "-o", "run", "--memory", "much"], 2, ["--memory 'much'"]),
        (["plan", "{data}", "-o", "run", "--dim", "2"], 1, ["is 3D and dim=2"]),
        (["train", "{data}", "-o", "run", "model.name=uknet"], 2, ["Did you mean 'ukanet'"]),
        (["train", "{data}", "-o", "run", "model.options.basis=grma"], 2, ["Did you mean 'gram'"]),
        (
            ["train", "{data}", "-o", "run", "training.epochs=3"],
            2,
            ["Unknown config key", "training.max_epochs"],
        ),
        (["train", "run"], 2, ["has no plan.json"]),
        (["predict", "-m", "run", "-i", "{data}", "-o", "out"], 1, ["run does not exist"]),
        (["predict", "-i", "{data}", "-o", "out"], 2, ["--model"]),
        (["evaluate", "nowhere", "{data}/labelsTr"], 1, ["There is no nowhere"]),
        (["evaluat"], 2, ["evaluat"]),
    ],
)
def test_mistakes_are_one_line(
    blobs: Path, tmp_path: Path, arguments: list[str], code: int, parts: list[str]
) -> None:
    refused(kanseg(*[a.format(data=blobs) for a in arguments], cwd=tmp_path), code, *parts)
    assert not list(tmp_path.iterdir())


def test_a_cut_checkpoint_is_explained(run: Path, blobs: Path, tmp_path: Path) -> None:
    whole = (run / "fold_0" / "best.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    result = kanseg(
        "predict", "-m", tmp_path / "cut.safetensors", "-i", blobs / "imagesTr", "-o", tmp_path / "out"
    )
    refused(result, 1, "is not a complete checkpoint")
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_dimension_is_refused(run: Path, shared_data: Path, tmp_path: Path) -> None:
    picture = shared_data / "bad_inputs" / "png" / "normal (2).png"
    refused(kanseg("predict", "-m", run, "-i", picture, "-o", tmp_path), 1, "is 2D, 3D was expected")


def test_a_second_training_in_a_folder_is_refused(run: Path) -> None:
    refused(kanseg("train", run, *QUICK), 2, "--resume")
    assert kanseg("train", run, "--resume").returncode == 0

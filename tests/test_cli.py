"""The command line as a person types it: it teaches, it works, and a mistake is one line and an exit code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Picture
from safetensors.numpy import save_file
from typer.main import get_command

from kanseg import Segmenter
from kanseg.cli import app, main
from kanseg.config import flat, load_config
from kanseg.errors import UsageError

VERBS = ("demo", "doctor", "run", "predict", "evaluate", "report", "plan", "train", "search", "compare")
VERBS += ("ensemble", "prune", "export", "convert", "download", "models", "info")
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


Result = subprocess.CompletedProcess[str]
BAD_PAIRS = [  # image, label, what the message says
    ("hippocampus_118_image", None, "label"),
    ("hippocampus_003_image", "hippocampus_281_label", "different grids"),
    ("fpg_t2_image", "fpg_t1space_label", "different grids"),
    ("ct_112slices_image", "ct_30slices_label", "different grids"),
]
BAD_DICOM = {
    "ct_gantry_tilt": "tilted gantry",
    "ct_gantry_tilt_missing_slice": "",
    "ct_missing_slice": "misses slices",
    "ct_same_position": "at one position",
    "mr_mixed_orientation": "",
}


def kanseg(*arguments: object, cwd: Path | None = None) -> Result:
    """The command in this process (torch is loaded once), with what it printed and its exit code."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(cwd or Path.cwd()))
        stack.enter_context(mock.patch.object(sys, "argv", ["kanseg", *map(str, arguments)]))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


def typed(*arguments: object, **options: object) -> Result:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "kanseg.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]


def refused(result: Result, code: int, *parts: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    for part in parts:
        assert part in result.stderr, result.stderr
    lines = result.stderr.strip().splitlines()
    if code == 1:
        assert lines[-1].startswith("kanseg: ")
        assert sum(line.startswith("kanseg: ") for line in lines) == 1


def pair(root: Path, image: Path, label: Path | None) -> Path:
    """A data set of one image and its label, if it has one."""
    for folder, source in (("images", image), ("labels", label)):
        (root / folder).mkdir(parents=True)
        if source is not None:
            shutil.copy(source, root / folder / f"case{image.name.removeprefix(image.name.split('.')[0])}")
    return root


@pytest.fixture(scope="module")
def run(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planned and trained run, by the two commands."""
    folder = tmp_path_factory.mktemp("run") / "blobs"
    planned = kanseg("plan", blobs, "-o", folder, "--memory", "2G", "--no-trial")
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
        assert typed("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 1.0


def test_every_verb_shows_an_example_and_has_few_short_options() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert tuple(commands) == VERBS
    for name, command in commands.items():
        assert f"Example: kanseg {name}" in command.help
        assert not re.search(r"[^\n]\n[^\n]", command.help), f"{name}: a terminal would tear this line"
        options = {option for parameter in command.params for option in parameter.opts}
        assert {o for o in options if not o.startswith("--") and o.startswith("-")} <= {
            "-i",
            "-o",
            "-m",
            "-f",
        }
        assert "--json" in options


@pytest.mark.parametrize("verb", VERBS)
def test_an_option_of_one_value_is_not_taken_twice(verb: str) -> None:
    for option in get_command(app).commands[verb].params:  # type: ignore[attr-defined]
        if option.param_type_name == "option" and not (option.multiple or option.is_flag):
            refused(
                kanseg(verb, option.opts[0], "1", option.opts[-1], "2"), 2, "2 times, and takes one value"
            )


@pytest.mark.parametrize("rank", ["0", "1"])
def test_variables_that_a_launcher_left_do_not_make_verbs_of_one_process_wait_or_fall_silent(
    rank: str, blobs: Path, tmp_path: Path
) -> None:
    incomplete = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost"}
    with mock.patch.dict(os.environ, {**incomplete, "MASTER_PORT": "1234"}):
        planned = kanseg("plan", blobs, "-o", tmp_path / "run", "--memory", "2G", "--no-trial", "--json")
    assert "patch_size" in json.loads(planned.stdout)
    for verb in (["train", tmp_path / "run"], ["run", blobs, "-o", tmp_path / "all"]):
        with mock.patch.dict(os.environ, incomplete):
            refused(kanseg(*verb), 2, "WORLD_SIZE=2", "torchrun", "unset WORLD_SIZE")


def test_importing_kanseg_imports_no_torch() -> None:
    code = "import sys, kanseg, kanseg.cli; assert not {'torch', 'monai', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


UNUSED = """
import sys
from typer.testing import CliRunner
from kanseg.cli import app
done = CliRunner().invoke(app, sys.argv[2:])
assert done.exit_code == 0, done.output
assert not set(sys.argv[1].split()) & set(sys.modules), [*sys.modules]
"""


@pytest.mark.parametrize(
    ("unused", "words"),
    [
        ("torch monai", "info --keys"),
        ("torch monai", "doctor DATA"),
        ("torch monai", "info DATA/labelsTr/case_0.nii.gz"),
        ("monai", "info"),
        ("monai", "info hippocampus"),
    ],
)
def test_verbs_without_networks_do_not_wait_for_libraries_of_networks(
    unused: str, words: str, blobs: Path
) -> None:
    """MONAI takes four seconds of a processor, torch more than one."""
    given = [sys.executable, "-c", UNUSED, unused, *words.replace("DATA", str(blobs)).split()]
    done = subprocess.run(given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
    named = kanseg("evaluate", tmp_path / "masks", blobs / "labelsTr", "--labels", run, "--json")
    assert list(json.loads(named.stdout)["metrics"]) == ["near", "far", "mean"]
    (tmp_path / "masks" / "case_3.nii.gz").unlink()
    failed = kanseg("evaluate", tmp_path / "masks", blobs / "labelsTr", "--json")
    refused(failed, 1, "case_3: no prediction")
    assert list(json.loads(failed.stdout)["failed"]) == ["case_3"]


def test_predict_writes_one_file_in_another_format(run: Path, blobs: Path, tmp_path: Path) -> None:
    image = blobs / "imagesTr" / "case_1.nii.gz"
    assert kanseg("predict", "-m", run, "-i", image, "-o", tmp_path / "a.nrrd", "--tta").returncode == 0
    assert kanseg("predict", "-m", run / "fold_0", "-i", image, "-o", tmp_path / "b", "--format", "mha",
                  "--probabilities", "--overlap", "0.25").returncode == 0  # fmt: skip
    written = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    chances = [f"case_1_prob_{name}.mha" for name in ("background", "far", "near")]
    assert written == ["a.nrrd", "case_1.mha", *chances]
    refused(kanseg("predict", "-m", run, "-i", image, "-o", tmp_path / "c", "--format", "gif"), 2, "gif")


def test_a_data_set_without_a_plan_is_planned_first(blobs: Path, tmp_path: Path) -> None:
    trained = kanseg("train", blobs, *QUICK, "-o", tmp_path / "run", "-f", "final", "--no-trial", "--json")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["fold"] == "final"
    assert "spacing" in trained.stderr
    assert (tmp_path / "run" / "fold_final" / "last.safetensors").exists()
    shutil.copytree(blobs, tmp_path / "other")
    refused(kanseg("train", tmp_path / "other", "-o", tmp_path / "run"), 2, "has a plan for")
    refused(kanseg("plan", blobs, "-o", tmp_path / "run"), 2, "holds a training")
    refused(kanseg("train", tmp_path / "run", "-f", "9"), 2, "fold")
    refused(kanseg("train", tmp_path / "run", "-f", "first"), 2, "first")


def test_a_failed_case_is_reported_and_the_exit_code_is_1(run: Path, blobs: Path, tmp_path: Path) -> None:
    shutil.copytree(blobs / "imagesTr", tmp_path / "scans")
    (tmp_path / "scans" / "case_2.nii.gz").write_bytes(b"")
    result = kanseg("predict", "-m", run, "-i", tmp_path / "scans", "-o", tmp_path / "masks")
    refused(result, 1, "case_2 failed", "1 of 6 cases failed")
    assert len(list((tmp_path / "masks").iterdir())) == 5


def test_a_loss_for_another_number_of_classes_is_refused(blobs: Path, tmp_path: Path) -> None:
    kanseg("plan", blobs, "-o", tmp_path, "--memory", "2G", "--no-trial")
    options = ("data.folds=2", "training.max_epochs=1", "training.loss_options.weight=[1,2]")
    for fold in ("0", "all"):
        result = kanseg("train", tmp_path, "-f", fold, *options)
        refused(result, 2, "training.loss dice_ce of 3 classes", "same as the number of classes")
    assert not (tmp_path / "config.json").exists()
    assert not list(tmp_path.glob("fold_*/*"))


def test_a_home_that_cannot_be_written_is_no_matter() -> None:
    """Of a container, say. MONAI imports matplotlib, which would warn."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MPL"))}
    done = typed("info", "--json", env={**kept, "HOME": f"{os.devnull}/none"})
    assert (done.returncode, [line for line in done.stderr.splitlines() if "atplotlib" in line]) == (0, [])


def test_models_and_info_print_json() -> None:
    listed = json.loads(kanseg("models", "--json").stdout)
    assert {"name", "parameters_3d", "description"} <= set(listed[0])
    layers = {row["name"]: row for row in json.loads(kanseg("models", "--layers", "--json").stdout)}
    assert layers["kagn"]["options"]["degree"] == 3
    assert layers["fourier"]["class"] is None
    shown = " ".join(kanseg("models", "--layers").stdout.split())
    assert "KAGNConv3d(..., degree=3" in shown
    assert "kagn = basis gram" in shown
    assert "kagn_v2 =" not in shown  # it is no other name of the basis
    assert "plain =" not in shown
    refused(kanseg("models", "--layers", "--weights"), 2, "not both")
    assert "torch" in json.loads(kanseg("info", "--json").stdout)
    keys = json.loads(kanseg("info", "--keys", "--json").stdout)
    assert keys["training.max_minutes"] == {
        "default": None,
        "meaning": "wall-clock budget, counted over resumes",
    }
    assert {key: row["default"] for key, row in keys.items()} == flat(load_config())
    refused(kanseg("info", "hippocampus", "--keys"), 2, "not both")
    told = json.loads(kanseg("info", "hippocampus", "--json").stdout)
    assert (told["networks"], told["channels"], told["classes"]["Posterior"]) == (3, ["MRI"], 2)
    refused(kanseg("info", "hippocampos"), 1, "Did you mean 'hippocampus'?")


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["plan", "nowhere", "-o", "run"], 1, ["There is no nowhere"]),
        (["plan", ".", "-o", "run"], 1, ["no layout that kanseg knows"]),
        (["plan", "{data}", "-o", "run", "--memory", "much"], 2, ["--memory 'much'"]),
        (["plan", "{data}", "-o", "run", "--slices", "3"], 2, ["slices=3 does not fit"]),
        (["train", "{data}", "-o", "run", "model.name=uknet"], 2, ["Did you mean 'ukanet'"]),
        (["train", "{data}", "-o", "run", "model.options.basis=grma"], 2, ["Did you mean 'gram'"]),
        (
            ["train", "{data}", "-o", "run", "training.epochs=3"],
            2,
            ["Unknown config key 'training.epochs'", "Did you mean 'max_epochs'"],
        ),
        (["train", "run"], 1, ["There is no run"]),
        (["predict", "-m", "run", "-i", "{data}/imagesTr", "-o", "out"], 1, ["run does not exist"]),
        (["predict", "-i", "{data}", "-o", "out"], 2, ["--model"]),
        (["evaluate", "nowhere", "{data}/labelsTr"], 1, ["There is no nowhere"]),
        (["evaluat"], 2, ["evaluat"]),
        (["compare", "nowhere", "{data}"], 1, ["There is no nowhere"]),
        (["compare", "{data}", "{data}", "--labels", "1,2"], 2, ["--reference"]),
        (["run", "nowhere", "-o", "run"], 1, ["There is no nowhere"]),
        (["predict", "-m", "hippocampus", "-i", "nowhere", "-o", "out"], 1, ["There is no nowhere"]),
        (["predict", "-m", "hippocampus", "-i", "{data}", "-o", "out"], 1, ["Did you mean {data}/imagesTr?"]),
        (["export", "nowhere", "-o", "out", "--to", "onnxx"], 2, ["Did you mean 'onnx'"]),
    ],
)
def test_mistakes_are_one_line(
    blobs: Path, tmp_path: Path, arguments: list[str], code: int, parts: list[str]
) -> None:
    told = kanseg(*[a.format(data=blobs) for a in arguments], cwd=tmp_path)
    refused(told, code, *(part.format(data=blobs) for part in parts))
    assert not list(tmp_path.iterdir())


def test_a_cut_checkpoint_is_explained(run: Path, blobs: Path, tmp_path: Path) -> None:
    whole = (run / "fold_0" / "best.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    result = kanseg(
        "predict", "-m", tmp_path / "cut.safetensors", "-i", blobs / "imagesTr", "-o", tmp_path / "out"
    )
    refused(result, 1, "is no complete checkpoint")
    assert not (tmp_path / "out").exists()


def test_a_foreign_checkpoint_is_explained(run: Path, blobs: Path, tmp_path: Path) -> None:
    save_file({"layer.weight": np.zeros(3, np.float32)}, tmp_path / "foreign.safetensors")
    result = kanseg(
        "predict", "-m", tmp_path / "foreign.safetensors", "-i", blobs / "imagesTr", "-o", tmp_path / "out"
    )
    refused(result, 1, "foreign.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("image", "label", "says"), BAD_PAIRS)
def test_pairs_that_do_not_fit_are_refused(
    shared_data: Path, tmp_path: Path, image: str, label: str | None, says: str
) -> None:
    files = shared_data / "bad_inputs" / "nifti"
    data = pair(tmp_path / "data", files / f"{image}.nii.gz", files / f"{label}.nii.gz" if label else None)
    refused(kanseg("plan", data, "-o", tmp_path / "run"), 1, says, f"kanseg doctor {data}")
    assert not (tmp_path / "run").exists()


def test_a_label_of_whole_floats_is_accepted(shared_data: Path, tmp_path: Path) -> None:
    files = shared_data / "bad_inputs" / "nifti"
    label = files / "hippocampus_003_label_float32.nii.gz"
    data = pair(tmp_path / "data", files / "hippocampus_003_image.nii.gz", label)
    planned = kanseg("plan", data, "-o", tmp_path / "run", "--memory", "2G", "--no-trial", "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["label_values"] == [0, 1, 2]


def test_pictures_without_a_lesion_or_with_two_masks_are_refused(shared_data: Path, tmp_path: Path) -> None:
    files = shared_data / "bad_inputs" / "png"
    for name, says in (("normal", "background alone"), ("benign", "benign (54)")):
        for path in files.glob(f"{name}*"):
            folder = tmp_path / name / ("masks" if "_mask" in path.name else "images")
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder)
        refused(kanseg("plan", tmp_path / name, "-o", tmp_path / "run"), 1, says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "says"), [("dmri_4d_image", "4 channels"), ("rgb_voxels_image", "structured or complex voxels")]
)
def test_volumes_of_another_kind_are_refused(
    run: Path, shared_data: Path, tmp_path: Path, name: str, says: str
) -> None:
    path = shared_data / "bad_inputs" / "nifti" / f"{name}.nii.gz"
    refused(kanseg("predict", "-m", run, "-i", path, "-o", tmp_path / "out"), 1, says)
    assert not list(tmp_path.rglob("*.nii.gz"))


@pytest.mark.parametrize(("name", "says"), BAD_DICOM.items())
def test_broken_series_are_refused(
    run: Path, shared_data: Path, tmp_path: Path, name: str, says: str
) -> None:
    path = shared_data / "bad_inputs" / "dicom" / name
    refused(kanseg("predict", "-m", run, "-i", path, "-o", tmp_path / "out"), 1, name, says)
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_damaged_voxels_are_refused(run: Path, blobs: Path, tmp_path: Path) -> None:
    whole = blobs / "imagesTr" / "case_0.nii.gz"
    image = nib.load(whole)
    holes = image.get_fdata(dtype=np.float32).copy()
    holes[2, 2, 2] = np.nan
    nib.save(nib.Nifti1Image(holes, image.affine), tmp_path / "nan.nii.gz")
    (tmp_path / "cut.nii.gz").write_bytes(whole.read_bytes()[:-900])
    for name, says in (("nan", "NaN"), ("cut", "cannot be read")):
        result = kanseg("predict", "-m", run, "-i", tmp_path / f"{name}.nii.gz", "-o", tmp_path / "out")
        refused(result, 1, says)
    assert not list((tmp_path / "out").glob("*"))


def test_what_cannot_be_written_is_said_and_leaves_nothing(run: Path, blobs: Path, tmp_path: Path) -> None:
    image = blobs / "imagesTr" / "case_0.nii.gz"
    (tmp_path / "file").write_text("in the way")
    for arguments in (
        ("predict", "-m", run, "-i", image, "-o", tmp_path / "file" / "masks"),
        ("plan", blobs, "--no-trial", "-o", tmp_path / "file" / "run"),
        ("evaluate", blobs / "labelsTr", blobs / "labelsTr", "-o", tmp_path / "file"),
    ):
        refused(kanseg(*arguments), 1, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_is_said_and_leaves_nothing(run: Path, blobs: Path, tmp_path: Path) -> None:
    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # no file may grow beyond: as on a full disk

    image = blobs / "imagesTr" / "case_0.nii.gz"
    result = typed("predict", "-m", run, "-i", image, "-o", tmp_path / "out", preexec_fn=full)
    refused(result, 1, "cannot be written")
    assert not list((tmp_path / "out").iterdir())


def test_a_flat_model_refuses_a_volume(blobs: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(3):
        mask = np.zeros((32, 32), np.uint8)
        mask[8:20, 8:20] = 255
        for folder, array in (("images", mask // 2 + generator.integers(0, 90, mask.shape)), ("masks", mask)):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            Picture.fromarray(array.astype(np.uint8)).save(tmp_path / "data" / folder / f"{number}.png")
    trained = kanseg("train", tmp_path / "data", *QUICK, "-o", tmp_path / "run", "--no-trial")
    assert trained.returncode == 0, trained.stderr
    picture, volume = tmp_path / "data" / "images" / "0.png", blobs / "imagesTr" / "case_0.nii.gz"
    assert kanseg("predict", "-m", tmp_path / "run", "-i", picture, "-o", tmp_path / "m").returncode == 0
    assert set(np.unique(np.asarray(Picture.open(tmp_path / "m" / "0.png")))) <= {0, 255}
    refused(kanseg("predict", "-m", tmp_path / "run", "-i", volume, "-o", tmp_path / "m"), 1, "is 3D, 2D was")


def test_a_model_of_another_dimension_is_refused(run: Path, shared_data: Path, tmp_path: Path) -> None:
    picture = shared_data / "bad_inputs" / "png" / "normal (2).png"
    refused(kanseg("predict", "-m", run, "-i", picture, "-o", tmp_path), 1, "is 2D, 3D was expected")


def test_a_second_training_in_a_folder_is_refused(run: Path) -> None:
    refused(kanseg("train", run, *QUICK), 2, "--resume")
    assert kanseg("train", run, "--resume").returncode == 0


def test_doctor_repair_and_conversion_by_command(blobs: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(blobs, root)
    assert kanseg("doctor", root).returncode == 0
    (root / "labelsTr" / "case_3.nii.gz").unlink()
    refused(kanseg("doctor", root), 1, "has 1 error. Write a repaired copy with --fix OUT.")
    fixed = kanseg("doctor", root, "--fix", tmp_path / "fixed", "--json")
    assert fixed.returncode == 0, fixed.stderr
    told = json.loads(fixed.stdout)
    assert [finding["kind"] for finding in told["findings"]] == ["missing file"]
    assert told["fixed"]["training"] == 5
    converted = kanseg("convert", tmp_path / "fixed", "-o", tmp_path / "nnunet", "--to", "nnunet")
    assert converted.returncode == 0, converted.stderr
    assert len(list((tmp_path / "nnunet" / "imagesTr").glob("*_0000.nii.gz"))) == 5
    refused(kanseg("convert", root, "-o", tmp_path / "x", "--to", "nnunet"), 1, "case_3")
    refused(kanseg("doctor", tmp_path / "nowhere"), 1, "There is no")


def test_data_sets_are_listed_and_unknown_ones_named(tmp_path: Path) -> None:
    listed = kanseg("download", "--json", cwd=tmp_path)
    assert {"Task04_Hippocampus", "ixi_tiny"} <= {source["name"] for source in json.loads(listed.stdout)}
    refused(kanseg("download", "Task4_Hippo", cwd=tmp_path), 2, "Did you mean")
    assert not list(tmp_path.iterdir())


def test_folds_predict_for_a_run_and_the_training_on_every_case_is_named(
    run: Path, blobs: Path, tmp_path: Path
) -> None:
    both = shutil.copytree(run, tmp_path / "both")
    shutil.copytree(both / "fold_0", both / "fold_final")
    scan = blobs / "imagesTr" / "case_0.nii.gz"
    made = kanseg("predict", "-m", both, "-i", scan, "-o", tmp_path / "a")
    assert f"For it, -m {both / 'fold_final'}" in " ".join(made.stderr.split())
    assert (
        "Not among them"
        not in kanseg("predict", "-m", both / "fold_final", "-i", scan, "-o", tmp_path / "b").stderr
    )


def test_predictions_are_combined_and_compared_by_command(run: Path, blobs: Path, tmp_path: Path) -> None:
    scans, references = blobs / "imagesTr", blobs / "labelsTr"
    first = kanseg("predict", "-m", run, "-i", scans, "-o", tmp_path / "a", "--blending", "constant")
    assert first.returncode == 0, first.stderr
    again = kanseg("predict", "-m", run, "-i", scans, "-o", tmp_path / "a", "--blending", "constant")
    assert again.stderr.count("is there already") == 6
    other = kanseg("ensemble", run, run / "fold_0", "-i", scans, "-o", tmp_path / "b")
    assert other.returncode == 0, other.stderr
    assert "An ensemble of 2 networks" in other.stderr
    refused(kanseg("ensemble", run, run / "fold_0", "-o", tmp_path / "c"), 2, "images to predict by -i")
    vote = kanseg("ensemble", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "c", "--json")
    assert json.loads(vote.stdout)["cases"] == 6
    compared = kanseg(
        "compare", tmp_path / "a", tmp_path / "c", "--reference", references, "--labels", run, "-o", tmp_path / "d"
    )  # fmt: skip
    assert compared.returncode == 0, compared.stderr
    assert "A - B" in compared.stdout
    assert (tmp_path / "d" / "comparison.png").exists()
    refused(
        kanseg("predict", "-m", run, "-i", scans, "-o", tmp_path / "a", "--blending", "linear"), 2, "gaussian"
    )


def test_a_plan_for_data_that_changed_is_refused(blobs: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(blobs, root)
    planned = kanseg("plan", root, "-o", tmp_path / "run", "--memory", "2G", "--no-trial")
    assert planned.returncode == 0, planned.stderr
    shutil.copy(root / "labelsTr" / "case_1.nii.gz", root / "labelsTr" / "case_1.nii.gz.old")
    file = nib.load(root / "labelsTr" / "case_1.nii.gz")
    nib.save(
        nib.Nifti1Image(np.zeros(file.shape, np.uint8), file.affine), root / "labelsTr" / "case_1.nii.gz"
    )
    refused(kanseg("train", tmp_path / "run", *QUICK), 1, "is not as it was planned", "case_1 has changed")
    (root / "labelsTr" / "case_1.nii.gz.old").rename(root / "labelsTr" / "case_1.nii.gz")


def test_slices_and_regions_are_planned_by_command(blobs: Path, shared_data: Path, tmp_path: Path) -> None:
    flat = kanseg("plan", blobs, "-o", tmp_path / "a", "--dim", "2", "--slices", "3", "--no-trial", "--json")
    plan = json.loads(flat.stdout)
    assert (plan["spatial_dims"], plan["slice_axis"], plan["slices"]) == (2, 2, 3)
    regions = kanseg(
        "plan", blobs, "-o", tmp_path / "b", "--regions", "both=1+2,far=2", "--no-trial", "--size", "small"
    )
    assert regions.returncode == 0, regions.stderr
    trained = kanseg("train", tmp_path / "b", *QUICK)
    assert trained.returncode == 0, trained.stderr
    assert "both" in trained.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "nowhere", "-o", "run", "--memory", "8"], "--memory '8' has no unit; did you mean 8G?"),
        (["plan", "nowhere", "-o", "run", "--memory", "inf"], "--memory 'inf' is not a size"),
        (["run", "nowhere", "-o", "run", "--memory", "nanG"], "--memory 'nanG' is not a size"),
        (["plan", "nowhere", "-o", "run", "--size", "big"], "Unknown size 'big'"),
        (["run", "{data}", "-o", "run", "--size", "big"], "Unknown size 'big'"),
        (["plan", "nowhere", "-o", "run", "--mirror", "5"], "--mirror 5: the axes of 3D images are 0"),
    ],
)
def test_wrong_options_are_refused_before_any_image_is_read(
    blobs: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    refused(kanseg(*[a.format(data=blobs) for a in arguments], cwd=tmp_path), 2, says)
    assert not list(tmp_path.iterdir())


def test_a_fold_that_there_will_not_be_is_refused_before_the_data_is_planned(
    blobs: Path, tmp_path: Path
) -> None:
    refused(
        kanseg("train", blobs, "-o", tmp_path / "run", "-f", "7"), 2, "There is no fold 7. Folds are 0 ... 4"
    )
    refused(
        kanseg("train", blobs, "-o", tmp_path / "run", "-f", "3", "data.folds=3"), 2, "There is no fold 3"
    )
    with pytest.raises(UsageError, match="There is no fold 7"):
        Segmenter().fit(blobs, tmp_path / "run", fold=7)
    assert not list(tmp_path.iterdir())


def test_a_missing_image_is_told_before_anything_of_the_models(run: Path, tmp_path: Path) -> None:
    told = kanseg("predict", "-m", run, "-m", run, "-i", tmp_path / "nowhere", "-o", tmp_path / "out")
    refused(told, 1, "There is no")
    assert "ensemble" not in told.stderr


def test_a_verb_runs_where_all_its_streams_are_closed(blobs: Path, tmp_path: Path) -> None:
    """As under some schedulers; a file that got the number of one would be written into by libraries."""
    command = [sys.executable, "-m", "kanseg.cli", "convert", str(blobs), "-o", str(tmp_path / "out")]
    subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command], check=True)
    assert len(list((tmp_path / "out/labelsTr").iterdir())) == 6


@pytest.mark.parametrize(
    ("number", "code", "by"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_a_verb_that_is_stopped_says_so_and_leaves_nothing_half_written(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, by: str
) -> None:
    from kanseg.data import convert

    write = convert._write

    def stopped(*arguments: Any) -> None:
        write(*arguments)
        signal.raise_signal(number)

    monkeypatch.setattr(convert, "_write", stopped)
    before = signal.getsignal(signal.SIGTERM)
    refused(kanseg("convert", blobs, "-o", tmp_path / "out"), code, f"stopped by {by}")
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt, 130, "stopped by Ctrl-C. Go on with --resume"),  # before the verb is reached
        (MemoryError("12 GiB"), 1, "The memory does not suffice. 12 GiB"),
        (ImportError("libtorch_cpu.so: failed to map segment"), 1, "cannot be loaded: libtorch_cpu.so"),
    ],
)
def test_what_ends_a_command_from_outside_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    monkeypatch.setattr("kanseg.cli.app", mock.Mock(side_effect=error))
    refused(kanseg("train", "run"), code, says)


@pytest.mark.parametrize(
    ("name", "told"), [(b"M\xfcller", rb"M\udcfcller: Medical"), (b"[/b] [red]x", b"[/b] [red]x: Medical")]
)
def test_names_that_are_no_utf_8_or_look_like_markup_are_told(
    blobs: Path, tmp_path: Path, name: bytes, told: bytes
) -> None:
    """A terminal or pipe takes text, and a name may be none."""
    folder = tmp_path / os.fsdecode(name)
    shutil.copytree(blobs, folder)
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with mock.patch.object(sys, "argv", ["kanseg", "doctor", str(folder)]), contextlib.redirect_stdout(out):
        with pytest.raises(SystemExit) as done:
            main()
        out.flush()
    assert not done.value.code
    assert told in b" ".join(out.buffer.getvalue().split())  # type: ignore[attr-defined]


def test_formats_of_export_are_known_without_importing_torch() -> None:
    from kanseg.export import FORMATS
    from kanseg.export.network import FORMATS as MADE

    assert tuple(MADE) == FORMATS
    code = "import sys; sys.argv = 'kanseg export x -o y --to z'.split()\nfrom kanseg.cli import main\n"
    code += "try: main()\nexcept SystemExit as end: assert end.code == 2 and 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_every_option_says_what_it_is_and_configs_are_named() -> None:
    from kanseg.config import config_folder

    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            words = (parameter.help or "").split()
            assert words, f"{name} {parameter.name}"
            assert words[0] not in ("Of", "For", "To", "Whose", "The"), f"{name}: {parameter.help}"
    configs = {path.stem for path in config_folder().glob("*.yaml")}
    for verb in ("run", "train", "search"):
        (option,) = (p for p in get_command(app).commands[verb].params if p.name == "config")  # type: ignore[attr-defined]
        assert set(option.help.rstrip(".").partition(": ")[2].split(", ")) == configs


def test_a_run_follows_its_data_where_they_move(blobs: Path, tmp_path: Path) -> None:
    """As long as they are the same files."""
    before, after, run = tmp_path / "before", tmp_path / "after", tmp_path / "run"
    shutil.copytree(blobs, before)
    assert kanseg("train", before, "-o", run, *QUICK, "--no-trial").returncode == 0
    before.rename(after)
    refused(kanseg("train", run, "--resume", *QUICK), 1, "are gone", f"kanseg train DATA -o {run}")
    assert kanseg("train", after, "-o", run, "-f", 1, *QUICK).returncode == 0
    assert json.loads((run / "plan.json").read_text())["data"] == str(after.resolve())
    other = tmp_path / "other"
    after.rename(other)
    label = next((other / "labelsTr").iterdir())
    image = nib.load(label)
    nib.save(nib.Nifti1Image(1 - np.minimum(image.get_fdata(), 1).astype(np.uint8), image.affine), label)
    refused(kanseg("train", other, "-o", run, "-f", 2, *QUICK), 1, "has changed")
    assert json.loads((run / "plan.json").read_text())["data"] == str(after.resolve())

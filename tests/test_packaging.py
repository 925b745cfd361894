"""What is installed: the wheel has all of kanseg, and the command starts fast."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_FILES = ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the project, built without network; kernels that only must be there, in little time."""
    for module in ("setuptools", "pip"):
        pytest.importorskip(module, reason="building the wheel needs setuptools and pip")
    copy, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("dist")
    for name in PACKAGE_FILES:
        shutil.copy(ROOT / name, copy)
    for folder in ("kanseg", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        out,
        copy,
    ]
    quick = out / "quick"
    quick.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    quick.chmod(0o755)
    compilers = dict.fromkeys(("CC", "CXX"), str(quick)) if shutil.which("g++") else {}
    environment = {**os.environ, **compilers}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("kanseg-*.whl")
    return built


def test_the_wheel_has_every_module_and_every_config(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (listed,) = (name for name in names if name.endswith("entry_points.txt"))
        entry_points = archive.read(listed).decode()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kanseg").rglob("*.py")}
    configs = {f"kanseg/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs
    assert modules <= names
    assert configs <= names
    assert any(name.endswith("LICENSE") for name in names)
    assert "kanseg = kanseg.cli:main" in entry_points
    assert "kanseg = kanseg:napari.yaml" in entry_points
    assert "kanseg/napari.yaml" in names
    assert not [name for name in names if name.startswith(("tests", "configs", "notebooks"))]
    if shutil.which("g++"):
        assert [name for name in names if name.startswith("kanseg/layers/kernels/_native")], (
            "the kernels are compiled"
        )


def test_the_installed_wheel_finds_its_configs_far_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import kanseg; from kanseg.config import config_folder, load_config; "
        "load_config(overrides=['training=sgd']); print(kanseg.__file__); print(config_folder())"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(site.resolve())) for line in done.stdout.splitlines()), done.stdout


def test_setup_cfg_names_every_package() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = set(setup["options"]["packages"].split())
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "kanseg").rglob("__init__.py")}
    assert named == {".".join(folder.parts) for folder in folders} | {"kanseg.configs"}


def test_help_takes_less_than_a_second_of_cpu() -> None:
    def cpu() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "kanseg.cli", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu() for _ in range(3)) < 1.0


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["plan", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys, kanseg.cli; sys.argv = ['kanseg', *{arguments}]\n"
        "try: kanseg.cli.main()\n"
        "except SystemExit as error: assert not error.code\n"
        "heavy = {'torch', 'monai', 'numpy', 'matplotlib', 'hydra', 'albumentations'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_make_builds_the_environment_of_a_fresh_clone(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in (*PACKAGE_FILES, "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    for target in ("demo", "test", "check", "smoke", "test-slow"):
        done = subprocess.run(
            ["make", "-n", target, "PYTHON=python3.99"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        steps = done.stdout
        assert steps.index("python3.99 -m venv .venv") < steps.index("pip install"), target
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make test" in (ROOT / ".ci" / "run").read_text()

"""The wheel holds everything, configs included."""

from __future__ import annotations

import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed() -> None:
    listed = configparser.ConfigParser()
    listed.read(ROOT / "setup.cfg")
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "kanseg").rglob("__init__.py")}
    assert set(listed["options"]["packages"].split()) == found | {"kanseg.configs"}


def test_the_wheel_holds_code_and_configs(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        tmp_path,
        ROOT,
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("kanseg-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "kanseg").rglob("*.py")}
    configs = {f"kanseg/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")}
    assert modules | configs <= names
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "kanseg = kanseg.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()

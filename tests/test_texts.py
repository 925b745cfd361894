"""What the documents name exists: files, headings, commands and their options, keys, functions, extras."""

from __future__ import annotations

import configparser
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command

from kanseg.cli import app
from kanseg.config import Config, config_folder, flat, model_options
from kanseg.models.model import CLASSIFIERS, MODELS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in (
        "*.md",
        "pipelines/**/README.md",
        "kanseg/docs/*.md",
        "kanseg/**/README.md",
        "notebooks/*.ipynb",
    )
    for path in ROOT.glob(pattern)
)
VERBS = get_command(app).commands  # type: ignore[attr-defined]
KEY = re.compile(
    r"(?<!/)\b(?:model|training|classification|data|inference|logging)\.(?!json|safetensors)[a-z_0-9.]+"
)


@cache
def text_of(path: Path) -> str:
    """A page's Markdown; of a notebook its texts and its code as a block."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(
        source if kind == "markdown" else f"```python\n{source}\n```" for kind, source in cells
    )


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """What a reader would type: lines of blocks, indented lines and code within sentences, as words."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"^ {4}(\S.*)$", prose.replace("\\\n", " "), re.MULTILINE)
    lines += [found.replace("\n", " ") for found in re.findall(r"`([^`]+)`", prose)]
    for line in lines:
        words = shlex.split(line.replace("...", ""), comments=True) if line.count("'") % 2 == 0 else []
        if words:
            yield words


def headings(path: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", text_of(path), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    found = re.findall(r"\]\((?:<([^>]+)>|([^)\s]+))\)", text_of(page)) + re.findall(
        r'()src="([^"]+)"', text_of(page)
    )
    for pair in found:
        target, _, anchor = max(pair).partition("#")
        if target.startswith(("http:", "https:")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in headings(file), f"{page.name}: {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist_with_their_options(page: Path) -> None:
    for words in commands(text_of(page)):
        if (
            len(words) < 2
            or words[0] not in ("kanseg", "python", "make")
            or words[1:2] in (["-m"], ["mykanseg.py"])
        ):
            continue
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert words[1] in targets, words
        elif words[0] == "python":
            script = (ROOT / words[1]).read_text(encoding="utf-8")
            for option in words[2:]:
                assert not option.startswith("-") or f'"{option}"' in script, words
        elif words[1] not in ("VERB", "--help"):
            understood(words[1:])


@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_the_help_are_understood(verb: str) -> None:
    for example in re.findall(r"Example: kanseg (.+)", VERBS[verb].help):
        understood(shlex.split(example))


def understood(words: list[str]) -> None:
    """Fail where a verb is none or does not take one of the options."""
    assert words[0] in VERBS, f"kanseg {words[0]}"
    verb = VERBS[words[0]]
    verb.make_parser(verb.make_context(words[0], [], resilient_parsing=True)).parse_args(words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_keys_exist(page: Path) -> None:
    known = {
        *flat(Config()),
        *(f"model.options.{o}" for name in [*MODELS, *CLASSIFIERS] for o in model_options(name)),
    }
    groups = {key.rpartition(".")[0] for key in known} | {"model.options"}
    for words in commands(text_of(page)):
        for key in (found.rstrip(".") for word in words for found in KEY.findall(word.partition("=")[0])):
            inside = key.split(".options.", 1)[-1].partition(".")[0] if ".options." in key else ""
            short = f"model.options.{inside}" if inside else key
            assert short in known or key in groups, f"{page.name}: {key}"
        for group in ("model", "training"):
            for choice in (word.partition("=")[2] for word in words if word.startswith(f"{group}=")):
                assert (config_folder() / group / f"{choice}.yaml").is_file(), choice


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_in_python_exist(page: Path) -> None:
    text = text_of(page)
    for block in blocks(text, "python"):
        compile(re.sub(r"^%.*$", "", block, flags=re.MULTILINE), page.name, "exec")
        for line in re.findall(r"^from kanseg\S* import .+$", block, re.MULTILINE):
            exec(line, {})
    for name in set(re.findall(r"`(kanseg(?:\.[A-Za-z_]\w*)+)", text)) - {"kanseg.cli"}:
        home, parts = name, []
        while importlib.util.find_spec(home.split(".")[0]) and not _is_module(home):
            home, _, last = home.rpartition(".")
            parts.insert(0, last)
        found = importlib.import_module(home)
        for part in parts:
            found = getattr(found, part)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_every_extra_is_told() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    told = re.findall(
        r"^\| (`[a-z`, ]+`) \| ", text_of(ROOT / "README.md").partition("| extra |")[2], re.MULTILINE
    )
    names = {name for cell in told for name in re.findall(r"`([a-z]+)`", cell)}
    assert set(config["options.extras_require"]) <= names


def test_the_basis_and_network_of_the_page_on_extending_work(tmp_path: Path) -> None:
    """Its files, in a process of their own, make the layer, the network and a command that knows them."""
    page = ROOT / "kanseg/docs/extending.md"
    for number, block in enumerate(blocks(text_of(page), "python")):
        named = re.match(r"# (\w+\.py)\n", block)
        (tmp_path / (named[1] if named else f"use_{number}.py")).write_text(block)
    use = (
        (tmp_path / "use_1.py").read_text()
        + "assert conv.recipe and net.eval()(__import__('torch').ones(1, 1, 8, 8, 8)).shape[1] == 3\n"
    )
    use += "from kanseg.models import list_models\nimport mykanseg\nassert 'mynet' in list_models()\n"
    use += "assert mykanseg.mynet.MyNet(3, 1, 3)(__import__('torch').ones(1, 1, 8, 8, 8)).shape == (1, 3, 8, 8, 8)\n"
    (tmp_path / "use_1.py").write_text(use)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    subprocess.run([sys.executable, "use_1.py"], cwd=tmp_path, env=environment, check=True, timeout=300)


RESULTS = ROOT / "pipelines/benchmarks/results"


def test_costs_of_layers_are_those_measured() -> None:
    """The table of families in kanseg/docs/layers.md has the medians of layers.json, rounded."""
    rows = json.loads((RESULTS / "layers.json").read_text())["layers"]
    measured = {
        (row["case"][:2], row["family"]): row for row in rows if row["case"].endswith(("48^3", "64, 128^2"))
    }
    table = text_of(ROOT / "kanseg/docs/layers.md").partition("| family |")[2].partition("\n\n")[0]
    count = 0
    for line in table.splitlines()[2:]:
        cells = [cell.strip("` ") for cell in line.split("|")[1:-1]]
        family = cells[0] or ("shared gram" if "shared_by" in line else "fourier")
        wanted = [
            measured["3d", family]["training"],
            measured["2d", family]["training"],
            measured["3d", family]["forward"],
        ]
        assert [float(cell.rstrip("x")) for cell in cells[-3:]] == [
            float(f"{value:.2g}") for value in wanted
        ], family
        count += 1
    assert count == 14


def test_scores_in_tables_are_those_stored() -> None:
    """A mean with its interval in a table of README or of the benchmarks is that of a stored result, rounded."""
    stored = set()
    for file in RESULTS.rglob("table.json"):
        for row in json.loads(file.read_text()):
            for name, mean in row["dice"].items():
                low, high = row["ci95"][name]
                stored.add(f"{mean:.3f} [{low:.3f}, {high:.3f}]")
    found = []
    for page in (ROOT / "README.md", ROOT / "pipelines/benchmarks/README.md"):
        lines = [line for line in text_of(page).splitlines() if line.startswith("|")]
        found += re.findall(r"(?<![-+\d])0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", "\n".join(lines))
    assert len(found) > 60
    assert not set(found) - stored

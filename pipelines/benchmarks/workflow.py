"""The way from an MSD folder to a trained network with kanseg, nnU-Net v2 and MONAI Auto3DSeg, side by side.

    python pipelines/benchmarks/workflow.py Task04_Hippocampus --nnunet VENV/bin --auto3dseg VENV/bin -o workflow.json

VENV/bin has `nnunetv2`, respectively `monai` with `fire`; a tool without one is left out. The first `--cases` of the
folder are copied, and everything happens in a temporary folder. Networks, batches and patches are the tools' own choice
and differ, so times and memory tell what a user meets, not which network is faster. Counted:

- commands: all that is typed until training runs, without `export`; variables: the `export`s; files: written by hand.
- first_step_s: from the start of the first command to the end of the first training step, typing not counted.
- peak_mb: highest sum over all processes of a command (proportional set size: shared pages count once), sampled twice a
  second; largest_mb: highest VmHWM of one process.
- repeatable: two fresh starts have the same weights after the first step (CRC-32 of all parameters).
- after SIGKILL of the whole process group at 60 % of the steps and `again` typed: lost_steps were done twice (below 0:
  never done), and same_weights says whether the last weights are, to the bit, those of the whole training.
- shared_subjects: patients on both sides of fold 0, by `subjects` in dataset.json.

To be short, a training is 4 epochs of 4 steps: for kanseg two keys on the command line (and for `run` two folds of the
3D network), for nnU-Net a trainer in a file of its own and the variable nnUNet_extTrainer. Auto3DSeg has no key for
steps: 2 epochs of 8 steps of the first of five folds, by options. All this is left out of the counts, as is CMD_PREFIX,
by which its steps are seen. nnU-Net's checkpoints are as it makes them: checkpoint_best when the moving average of Dice
rises, which in the first epochs is nearly always, checkpoint_latest every 50 epochs, of 250 steps each by default.

Auto3DSeg downloads its networks as "algorithm templates" from github.com when it runs; without a network the way ends
there, unless `--templates` names the folder algorithm_templates of Project-MONAI/research-contributions. It is asked
for SegResNet alone, as DiNTS, otherwise the first to train, takes `cuda:0` by its source. The last run's template was
not of the archive that MONAI 1.6.1 asks for (21ed8e5), but segmenter.py of commit 0122b72, hyper_parameters.yaml of
1b8d3e8, train.py of 727faff, validate.py of f64d560 and the rest of 945c6ec. The environment was without mlflow: where
there is one, this template logs to a folder, which mlflow 3.17 refuses, and the first training ends with that error.

Killed, Auto3DSeg ends by the same command as a success and trains no step: a training that validated once counts as
finished (`import_bundle_algo_history` of MONAI 1.6.1), by default from epoch 10 of 1250 on. Killed before that, here at
step 5 of 16, it begins again with the first step.

The last run's numbers are in results/workflow.json: each tool had one of two cores (AMD EPYC), the other was busy;
Auto3DSeg had its templates at hand. Seconds vary with what else runs: an earlier run under load had nnU-Net at its
first step after 143 s, `kanseg run` after 30, Auto3DSeg after 77. kanseg and nnU-Net planned batches of 2 and patches
of 40 x 56 x 40 for these 20 cases, Auto3DSeg of 1 and 32 x 48 x 32.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from layers import machine

EPOCHS, STEPS, KILLED_AT = 4, 4, 0.6
TRAINER = f"""
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
class nnUNetTrainer_short(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device):  # its checkpoint stores them by name
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = {EPOCHS}, {STEPS}, 2
"""
# Runs a script; every optimizer step adds "time CRC-32 of the parameters" to a file, one of them kills all.
WATCHED = """
import os, runpy, signal, sys, time, zlib
from importlib.metadata import entry_points
out, kill, done = os.environ["STEPS"], int(os.environ["KILL"]), 0
def watch(optimizer, *_):
    global done
    now, crc, done = time.time(), 0, done + 1
    for group in optimizer.param_groups:
        for weight in group["params"]:
            crc = zlib.crc32(weight.detach().contiguous().numpy().data.cast("B"), crc)
    with open(out, "a") as file:
        print(now, crc, file=file)
    if done == kill:
        os.killpg(0, signal.SIGKILL)
if __name__ == "__main__":  # processes that it spawns import this file
    from torch.optim import optimizer
    optimizer.register_optimizer_step_post_hook(watch)
    sys.argv, sys.path[0] = sys.argv[1:], os.path.dirname(sys.argv[1])
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        script, = entry_points(group="console_scripts", name=sys.argv[0])
        sys.exit(script.load()())
"""
MEMORY = ("peak_mb", "largest_mb")


@dataclass(frozen=True)
class Tool:
    """What is typed for one tool. `{data}` and `{run}` in commands and variables become folders.

    `short` takes the place of `{short}` in commands and `hidden` is added to the variables, to make the training short
    and to see its steps. nnU-Net's converter wants a folder imagesTs even if it is empty; the Decathlon's archive has
    one.
    """

    package: str
    prepare: tuple[str, ...]
    train: str
    again: str
    short: str = ""
    files: tuple[str, ...] = ()  # written by hand
    variables: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)
    splits: str = ""
    trainings: int = 1


NNUNET = "nnUNetv2_train 4 3d_fullres 0 -device cpu{short}"
KEYS = f"training.max_epochs={EPOCHS} training.steps_per_epoch={STEPS}"
AUTO3DSEG = (
    "python -m monai.apps.auto3dseg AutoRunner {short}run --work_dir {run}/results --input "
    '\'{{"modality": "mri", "datalist": "{data}/dataset.json", "dataroot": "{data}"}}\' --algos segresnet'
)
TOOLS = {
    "kanseg run": Tool(
        "kanseg",
        (),
        "kanseg run {data} -o {run}/results{short}",
        "kanseg run {data} -o {run}/results{short}",
        f" {KEYS} data.folds=2 --configurations 3d",
        splits="{run}/results/3d/splits.json",
        trainings=2,
    ),
    "kanseg plan, train": Tool(
        "kanseg",
        ("kanseg plan {data} -o {run}/results",),
        "kanseg train {run}/results{short}",
        "kanseg train {run}/results --resume",
        f" {KEYS}",
        splits="{run}/results/splits.json",
    ),
    "nnU-Net v2": Tool(
        "nnunetv2",
        (
            "mkdir -p {data}/imagesTs",
            "nnUNetv2_convert_MSD_dataset -i {data}",
            "nnUNetv2_plan_and_preprocess -d 4 --verify_dataset_integrity",
        ),
        NNUNET,
        f"{NNUNET} --c",
        " -tr nnUNetTrainer_short",
        variables={f"nnUNet_{name}": f"{{run}}/{name}" for name in ("raw", "preprocessed", "results")},
        hidden={"nnUNet_extTrainer": "{run}/trainers"},
        splits="{run}/preprocessed/Dataset004_Hippocampus/splits_final.json",
    ),
    "MONAI Auto3DSeg": Tool(
        "monai",
        (),
        AUTO3DSEG,
        AUTO3DSEG,
        "--templates_path_or_url {templates} set_num_fold 1 "
        'set_training_params \'{{"num_epochs": 2, "quick": True}}\' ',
        hidden={"CMD_PREFIX": "python {run}/../watched.py"},
        splits="{run}/results/dataset.json",
    ),
}


class CommandError(Exception):
    """A command ended with an error; the message is its last line."""


def main() -> None:
    """Go every tool's way, print a table and write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with dataset.json, imagesTr and labelsTr")
    parser.add_argument("-o", "--out", type=Path, help="JSON file for the numbers; rows of other tools stay")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--nnunet", type=Path, help="bin folder of an environment with nnunetv2")
    parser.add_argument("--auto3dseg", type=Path, help="bin folder of an environment with monai and fire")
    parser.add_argument(
        "--templates", type=os.path.abspath, help="folder algorithm_templates, else downloaded"
    )
    parser.add_argument("--tools", nargs="*", default=TOOLS, choices=TOOLS)
    given = parser.parse_args()
    bins = {"kanseg": Path(sys.executable).parent, "nnunetv2": given.nnunet, "monai": given.auto3dseg}
    results: dict[str, Any] = {
        **machine(),
        "cases": given.cases,
        "tools": json.loads(given.out.read_text())["tools"] if given.out and given.out.exists() else {},
    }
    for name in given.tools:
        tool = TOOLS[name]  # MONAI downloads the templates `None`
        tool = replace(tool, short=tool.short.replace("{templates}", str(given.templates)))
        if folder := bins[tool.package]:
            with tempfile.TemporaryDirectory() as temporary:
                results["tools"][name] = follow(tool, folder, given.data, given.cases, Path(temporary))
            print(name, json.dumps(results["tools"][name], indent=1), flush=True)
            if given.out:
                given.out.write_text(json.dumps(results, indent=1) + "\n")


def follow(tool: Tool, bins: Path, data: Path, cases: int, folder: Path) -> dict[str, Any]:
    """Prepare, train to the end, train until the kill, train again; what was met on the way."""
    typed = [*tool.prepare, tool.train]
    row: dict[str, Any] = {
        "version": _version(tool.package, bins),
        "commands": len(typed),
        "variables": len(tool.variables),
        "files": len(tool.files),
        "typed": [_shown(f"export {key}={value}") for key, value in tool.variables.items()]
        + [_shown(command) for command in typed],
        "again": _shown(tool.again),
        "load": round(os.getloadavg()[0], 1),
    }
    source = _subset(data, folder / "Task04_Hippocampus", cases)
    way = Way(tool, bins, source, folder / "run")
    begun = time.time()
    try:
        for command in tool.prepare:
            way.go(command)
        row["prepared_s"] = round(time.time() - begun, 1)
        steps = tool.trainings * EPOCHS * STEPS
        killed_at = round(KILLED_AT * steps)
        if tool.prepare:
            shutil.copytree(way.run, folder / "second")
        whole = way.go(tool.train)
        row |= {"first_step_s": round(whole[0][0] - begun, 1), "finished_s": round(time.time() - begun, 1)}
        row |= way.memory
        row["shared_subjects"] = _shared(source, Path(way.place(tool.splits)))
        way.run = folder / "second"
        way.run.mkdir(exist_ok=True)
        first = way.go(tool.train, killed_at)
        second = way.go(tool.again)
    except CommandError as error:
        return row | way.memory | {"stopped_s": round(time.time() - begun, 1), "not_run": str(error)}
    return row | {
        "steps": len(whole),
        "killed_at": len(first),
        "repeatable": first[0][1] == whole[0][1],
        "lost_steps": len(first) + len(second) - len(whole),
        "same_weights": (second or first)[-1][1] == whole[-1][1],
        "load_at_end": round(os.getloadavg()[0], 1),
    }


class Way:
    """Runs commands of one tool in its environment; `memory` has the highest so far."""

    def __init__(self, tool: Tool, bins: Path, data: Path, run: Path) -> None:
        self.tool, self.bins, self.data, self.run = tool, bins, data, run
        self.memory = dict.fromkeys(MEMORY, 0)
        run.mkdir()

    def place(self, text: str) -> str:
        """The text with its folders."""
        return text.replace("{short}", self.tool.short).format(data=self.data, run=self.run)

    def go(self, command: str, kill: int = 0) -> list[tuple[float, str]]:
        """Run a command, until so many steps if `kill`; time and CRC-32 of each training step it took.

        Raises:
            CommandError: the exit code is not that of success, respectively of the kill.
        """
        words = shlex.split(self.place(command))
        log, steps, watched = (self.run.with_name(name) for name in ("log.txt", "steps.txt", "watched.py"))
        steps.write_text("")
        watched.write_text(WATCHED)
        (self.run / "trainers").mkdir(exist_ok=True)
        (self.run / "trainers" / "short.py").write_text(TRAINER)
        variables = {**self.tool.variables, **self.tool.hidden}
        environment = os.environ | {key: self.place(value) for key, value in variables.items()}
        environment |= {"PATH": f"{self.bins}:{os.environ['PATH']}", "STEPS": str(steps), "KILL": str(kill)}
        if words[0] not in ("python", "mkdir"):
            words = ["python", str(watched), *words]
        with log.open("w") as file:
            process = subprocess.Popen(
                words, stdout=file, stderr=file, env=environment, start_new_session=True, cwd=self.run
            )
            sampler = threading.Thread(target=self._sample, args=(process.pid,))
            sampler.start()
            code = process.wait()
            sampler.join()
        if code != (-9 if kill else 0):
            lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
            raise CommandError(f"{command.split()[0]} ended with {code}: {lines[-1]}")
        return [(float(at), crc) for at, crc in map(str.split, steps.read_text().splitlines())]

    def _sample(self, pid: int) -> None:
        while psutil.pid_exists(pid):
            try:
                root = psutil.Process(pid)
                tree = [root, *root.children(recursive=True)]
                pss = [each.memory_full_info().pss / 2**20 for each in tree if each.is_running()]
                high = [_high_water(each.pid) for each in tree]
            except (psutil.Error, OSError):
                pss, high = [0], [0]  # one of them ended just now
            for key, value in zip(MEMORY, (sum(pss), max(high)), strict=True):
                self.memory[key] = max(self.memory[key], round(value))
            time.sleep(0.5)


def _shown(text: str) -> str:
    return text.format(data="Task04_Hippocampus", run="RUN", short="")


def _high_water(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0)


def _subset(data: Path, out: Path, count: int) -> Path:
    """The first cases of an MSD folder as a folder of its own."""
    described = json.loads((data / "dataset.json").read_text())
    kept = described["training"][:count]
    names = _names(kept)
    subjects = {case: subject for case, subject in described.get("subjects", {}).items() if case in names}
    described |= {"training": kept, "numTraining": len(kept), "test": [], "subjects": subjects}
    for path in (path for case in kept for path in case.values()):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / path, out / path)
    (out / "dataset.json").write_text(json.dumps(described))
    return out


def _shared(data: Path, splits: Path) -> int:
    subjects = json.loads((data / "dataset.json").read_text())["subjects"]
    train, val = _fold_0(json.loads(splits.read_text()))
    return len({subjects[case] for case in train} & {subjects[case] for case in val})


def _fold_0(splits: Any) -> tuple[Iterable[str], Iterable[str]]:
    if isinstance(splits, list):
        return splits[0]["train"], splits[0]["val"]
    val = _names(case for case in splits["training"] if case["fold"] == 0)  # Auto3DSeg's copy of dataset.json
    return _names(splits["training"]) - val, val


def _names(cases: Iterable[dict[str, Any]]) -> set[str]:
    return {Path(case["image"]).name.removesuffix(".nii.gz") for case in cases}


def _version(package: str, bins: Path) -> str:
    code = f"import importlib.metadata as m; print(m.version('{package}'), 'torch', m.version('torch'))"
    return subprocess.check_output([bins / "python", "-c", code], text=True).strip()


if __name__ == "__main__":
    main()

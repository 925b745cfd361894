"""What a training step takes in memory and time, measured by a step in a process of its own.

`python -m kanseg.training.trial` reads a plan as JSON and answers with `Need` as JSON; `measure_step` runs it. Memory
and time grow evenly with the voxels of a step, so two sizes of patch tell the step from the program around it, and a
large patch needs no large trial.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kanseg.config import load_config
from kanseg.data.plan import Plan
from kanseg.data.sizing import LEAST_FEATURES, MEASURED_SHARE, Need
from kanseg.errors import UserError
from kanseg.files import temporary_folder
from kanseg.memory import taken
from kanseg.training.checkpoint import (
    LAST,
    build_model,
    model_spec,
    named,
    pack,
    save_checkpoint,
)
from kanseg.training.devices import keep_freed_memory
from kanseg.training.losses import create_loss
from kanseg.training.optimizers import create_optimizer

LARGEST_TRIAL = {"cpu": 300_000, "cuda": 8_000_000}  # voxels of a step
# Times its weights, what a training of a network takes at least: those of the step (weights, their average, two moments
# of the optimizer; gradients) and on a CPU, in place of gradients, those of the step twice again in a checkpoint.
COPIES = {"cpu": 12, "cuda": 5}
STEPS = 2  # the second finds the state of the optimizer there, as all later ones do
LEAST_GROWTH = 0.1  # of a step's time that goes by its voxels, at least: a disturbed trial may say less
MINUTES = 10


def measure_step(plan: Plan) -> Need:
    """Memory of a training step of a plan: of the GPU where there is one, else resident memory.

    Raises:
        UserError: the trial failed; its own last words are in the message.
    """
    command = [sys.executable, "-m", "kanseg.training.trial"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(plan.to_dict()),
            capture_output=True,
            text=True,
            timeout=60 * MINUTES,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"A trial step took more than {MINUTES} minutes. Plan with --no-trial, or a smaller --size."
        ) from error
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["it was killed, perhaps for want of memory"])[-1]
        raise UserError(
            f"A trial step failed: {words}. Plan with --no-trial to go without, or with less --memory."
        )
    return Need(**json.loads(done.stdout.splitlines()[-1]))


def trial(plan: Plan) -> dict[str, float]:
    """Take the steps in this process; see `Need` for the keys of the answer.

    Of a network whose weights alone are too many for the plan's memory no step is taken, for it would pass it.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
    patch = _patch(plan, LARGEST_TRIAL[device] / min(plan.batch_size, 2))
    batch = max(1, min(plan.batch_size, int(LARGEST_TRIAL[device] / math.prod(patch))))
    config = load_config()
    model = build_model(model_spec(config, plan)).to(device).train()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    standing = torch.cuda.memory_reserved() if device == "cuda" else taken()
    least = standing + (COPIES[device] - 1) * weights
    narrower = plan.features_per_stage[0] > LEAST_FEATURES
    if narrower and plan.memory_bytes and least > MEASURED_SHARE * plan.memory_bytes:
        return {"base": float(least), "per_voxel": 0.0}
    average = copy.deepcopy(model)
    loss = create_loss(config.training.loss)
    optimizer = create_optimizer(model, config.training)
    sizes, peaks, times = [], [], []
    if patch == _smallest(plan):
        batch = max(batch, 2)  # or both steps would be one size
    for size, count in ((_smallest(plan), 1), (patch, batch)):
        for _ in range(STEPS):
            began = time.monotonic()
            _step(model, loss, optimizer, plan, size, count, device)
            took = time.monotonic() - began
        sizes.append(count * math.prod(size))
        peaks.append(_peak(device))
        times.append(took)
    tensors = {**named("model", model.state_dict()), **named("average", average.state_dict())}
    with temporary_folder() as folder:
        state, _ = pack(optimizer.state_dict(), "optimizer")
        save_checkpoint(Path(folder) / LAST, {**tensors, **state}, plan.to_dict())
    per_voxel = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    base = peaks[0] - per_voxel * sizes[0]
    saved = _peak(device) if _peak(device) > peaks[1] else 0.0
    seconds = max((times[1] - times[0]) / (sizes[1] - sizes[0]), times[1] / sizes[1] * LEAST_GROWTH)
    overhead = max(0.0, times[1] - seconds * sizes[1])
    return {"base": base, "per_voxel": per_voxel, "least": saved, "seconds": seconds, "overhead": overhead}


def _step(
    model: Any, loss: Any, optimizer: Any, plan: Plan, patch: list[int], batch: int, device: str
) -> None:
    image = torch.randn(batch, plan.in_channels, *patch, device=device)
    label = torch.randint(len(plan.label_names), (batch, 1, *patch), device=device).float()
    if plan.regions:
        label = (torch.rand(batch, len(plan.label_names), *patch, device=device) > 0.5).float()
    with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda" and torch.cuda.is_bf16_supported()):
        output = model(image)
    loss(output, label).backward()
    optimizer.step()
    optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()


def _smallest(plan: Plan) -> list[int]:
    """The smallest patch in which every map has at least 2 voxels an axis, as far as the plan's patch is that large."""
    return np.minimum(2 * np.prod(plan.strides, axis=0), plan.patch_size).tolist()


def _patch(plan: Plan, most: float) -> list[int]:
    """The plan's patch, or one of its shape with at most so many voxels, divisible by the strides."""
    factor, patch = np.prod(plan.strides, axis=0), np.array(plan.patch_size)
    while patch.prod() > most and (patch > 2 * factor).any():
        axis = int(np.where(patch > 2 * factor, patch, 0).argmax())
        patch[axis] -= factor[axis]
    return patch.tolist()


def _peak(device: str) -> int:
    """Bytes at most so far: of the GPU, else resident."""
    return torch.cuda.max_memory_reserved() if device == "cuda" else taken("VmHWM")


def main() -> None:
    """Plan on standard input, `Need` on standard output, both JSON."""
    import kanseg.training.fit  # noqa: F401  # its libraries take memory too

    plan = Plan.from_dict(json.load(sys.stdin))
    print(json.dumps(trial(replace(plan, reasons=[]))))


if __name__ == "__main__":
    main()

"""TensorBoard, wandb and MLflow, each by a key of the config; one that is down never stops a training."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from kanseg.config import Config, flat
from kanseg.errors import UserError

Tracker = Callable[[Mapping[str, float], int], None]
# Nothing goes anywhere but the numbers of the run to where the user sends them.
QUIET = {
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


def start_trackers(folder: Path, config: Config, say: Callable[[str], None]) -> dict[str, Tracker]:
    """The trackers that the config asks for, by name; each takes the numbers of an epoch, and the epoch.

    Raises:
        UserError: a tracker's package is not installed.
    """
    started = {}
    for name, start in TRACKERS.items():
        if not getattr(config.logging, name):
            continue
        if find_spec(name) is None:
            raise UserError(f"logging.{name}=true needs: pip install 'kanseg[{name}]'. Or leave it off.")
        for key, value in QUIET.items():
            os.environ.setdefault(key, value)
        try:
            started[name] = start(folder, config)
        except Exception as error:  # no network, no login: the training goes on without
            say(f"Warning: {name} cannot start and stays off: {error}")
    return started


def _tensorboard(folder: Path, config: Config) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def track(numbers: Mapping[str, float], epoch: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    return track


def _wandb(folder: Path, config: Config) -> Tracker:
    import wandb

    name = f"{folder.parent.name}-{folder.name}"
    run = wandb.init(project=config.logging.project, dir=str(folder), config=config.model_dump(), name=name)

    def track(numbers: Mapping[str, float], epoch: int) -> None:
        run.log(dict(numbers), step=epoch)

    return track


def _mlflow(folder: Path, config: Config) -> Tracker:
    import mlflow
    from mlflow import MlflowClient

    local = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", local))
    project = config.logging.project
    found = client.get_experiment_by_name(project)
    experiment = found.experiment_id if found else client.create_experiment(project)
    run = client.create_run(experiment, run_name=f"{folder.parent.name}-{folder.name}").info.run_id
    params = [mlflow.entities.Param(key, str(value)) for key, value in flat(config).items()]
    client.log_batch(run, params=params)

    def track(numbers: Mapping[str, float], epoch: int) -> None:
        for name, value in numbers.items():
            client.log_metric(run, name, value, step=epoch)

    return track


TRACKERS: dict[str, Callable[[Path, Config], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}

"""The task of segmentation: patches in, logits out, Dice of whole cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kanseg.config import Config
from kanseg.data.cascade import PREVIOUS, network_input, with_previous
from kanseg.data.cases import Case
from kanseg.data.loaders import Prepared, TrainLoader, val_loader
from kanseg.data.plan import Plan
from kanseg.progress import note
from kanseg.training.augment import BatchAugmentation
from kanseg.training.losses import check_loss, create_loss
from kanseg.training.task import Batch
from kanseg.training.validate import affordable_cases, spread, summarize, validate_batch, validate_case


class Segmentation:
    """A fold's cases, learned by random patches and scored by the Dice of whole images; see `task.Task`."""

    metric = Plan.metric

    def __init__(
        self,
        config: Config,
        plan: Plan,
        training: Sequence[Case],
        validation: Sequence[Case],
        device: torch.device,
        *,
        prepared: Prepared | None = None,
    ) -> None:
        self.prepared = prepared
        self.config, self.options, self.plan = config, config.training, plan
        self.training, self.validation, self.device = training, validation, device
        self.names: Sequence[str] = list(plan.label_names[1:])
        where = config.training.augment
        self.on_device = where == "device" or (where == "auto" and device.type == "cuda")
        self.changes = BatchAugmentation(plan, self.options.augmentation) if self.on_device else None
        self.criterion = create_loss(self.options.loss, **self.options.loss_options).to(device)
        size = (2,) * plan.spatial_dims
        logits = torch.zeros(1, len(plan.label_names), *size, device=device)
        label = torch.zeros(1, 1, *size, device=device)
        check_loss(self.criterion, f"training.loss {self.options.loss}", logits, label)

    def batches(self, epoch: int, step: int, rank: int, ranks: int) -> Iterator[Batch]:
        """Patches; every case that is not prepared yet is read once, now."""
        loader = TrainLoader(
            self.plan,
            self.training,
            batch_size=self.options.batch_size or self.plan.batch_size,
            steps=self.options.steps_per_epoch * self.options.accumulate,
            seed=self.config.seed,
            workers=self.config.data.workers,
            rank=rank,
            ranks=ranks,
            foreground=self.options.foreground,
            balanced=self.options.balanced,
            changes=not self.on_device,
            strength=self.options.augmentation,
            prepared=self.prepared,
            pin=self.device.type == "cuda",
        )
        return loader.batches(epoch, step)

    def augmented(self, batch: Batch) -> Batch:
        """The patches as the network takes them, changed in space and intensity where the loader has not done it."""
        batch = self.changes(batch) if self.changes else batch
        image = network_input(with_previous(batch), self.plan)
        return {**{key: value for key, value in batch.items() if key != PREVIOUS}, "image": image}

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Loss of logits, or of the list of a deeply supervised network."""
        return self.criterion(output, batch["label"].float())

    @cached_property
    def _watched(self) -> Sequence[Batch]:
        batch = self.options.batch_size or self.plan.batch_size
        patches = self.options.steps_per_epoch * self.options.accumulate * batch * self.options.validate_every
        count = self.options.validation_cases or affordable_cases(self.plan, patches)
        chosen = spread(self.validation, count)
        if len(chosen) < len(self.validation) and not self.options.validation_cases:
            note(
                f"{len(chosen)} of {len(self.validation)} validation cases are watched while training goes on: more "
                "would take longer than it (training.validation_cases sets how many)"
            )
        return val_loader(self.plan, chosen)

    def watched(self) -> Sequence[Batch]:
        """Preprocessed validation cases, kept in memory."""
        return self._watched

    def score(self, model: nn.Module, item: Batch, device: torch.device) -> list[float]:
        """Dice a class on the preprocessed grid."""
        return validate_batch(model, item, self.plan, device)

    def mean(self, scores: Sequence[list[float]]) -> Mapping[str, float]:
        """Mean Dice of each class."""
        return dict(zip(self.names, np.mean(scores, axis=0).tolist(), strict=True))

    def held_out(self) -> Sequence[Case]:
        """All validation cases, where they are asked for at the end."""
        return self.validation if self.options.final_validation else []

    def final_score(
        self, model: nn.Module, item: Case, device: torch.device, folder: Path, digest: str
    ) -> list[float]:
        """Dice a class on the image's own grid; the label map is written to `folder`."""
        return validate_case(model, item, self.plan, self.config.inference, device, folder, digest)

    def summarize(self, scores: Sequence[list[float]]) -> Mapping[str, Any]:
        """Dice by case and class with intervals."""
        by_case = {case.id: found for case, found in zip(self.validation, scores, strict=True)}
        return summarize(self.validation, by_case, self.plan, self.config.data.seed)

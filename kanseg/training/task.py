"""What a training learns: the loop turns a network on batches; everything it knows of them stands here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


class Task(Protocol):
    """A task of learning, with its data. Data are read when they are first asked for.

    Attributes:
        metric: name of the score in logs and summaries ("dice"); higher is better.
        parameters: of the loss, to be put on the device.
    """

    metric: str

    def batches(self, epoch: int, step: int, rank: int, ranks: int) -> Iterator[Batch]:
        """Batches without end from a step on, this process's share; each with its "image"."""

    def augmented(self, batch: Batch) -> Batch:
        """The batch, which is on the device, after the random changes that are made there."""

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Loss of the network's output for a batch, both of all processes (`whole_batch`)."""

    def watched(self) -> Sequence[Any]:
        """What is validated after an epoch; empty for no validation."""

    def score(self, model: nn.Module, item: Any, device: torch.device) -> list[float]:
        """Scores of one watched item; quickly."""

    def mean(self, scores: Sequence[list[float]]) -> Mapping[str, float]:
        """Scores by name of all watched items, in their order; their mean tells which epoch is the best."""

    def held_out(self) -> Sequence[Any]:
        """What is validated at the end."""

    def final_score(
        self, model: nn.Module, item: Any, device: torch.device, folder: Path, digest: str
    ) -> list[Any]:
        """Scores of one held-out item, as a user would get them; predictions are kept in `folder`.

        Args:
            digest: of the file of the weights, for what tells of their origin.
        """

    def summarize(self, scores: Sequence[list[Any]]) -> Mapping[str, Any]:
        """Summary of the final scores, in the order of `held_out`."""

"""A cascade of two resolutions at prediction: the second network, and those of the first, whose label map it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kanseg.data.plan import Plan
from kanseg.errors import UserError


class Cascade(nn.Module):
    """The network of a second stage, with what its first stage predicts by; as a module it is the second network.

    forward: (N, C + K - 1, *S) -> (N, K, *S), of windows as `kanseg.data.cascade.network_input` makes them.

    Args:
        network: of the second stage, or an ensemble of such.
        name: of the folder of the first stage.
        first, plans: its networks, each with its plan.
        infos: JSON of the checkpoint of each of its members.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        first: Sequence[nn.Module],
        plans: Sequence[Plan],
        infos: Sequence[Mapping[str, Any]],
    ) -> None:
        super().__init__()
        self.network, self.first = network, nn.ModuleList(first)
        self.name, self.plans, self.infos = name, list(plans), list(infos)

    def forward(self, windows: Tensor) -> Tensor:
        return self.network(windows)


def first_stage_of(file: Path, name: str) -> Path:
    """The folder of the first stage that belongs to a checkpoint of the second: beside it, or beside its fold.

    Raises:
        UserError: there is none.
    """
    own = file.resolve().parent
    found = next((place / name for place in (own, own.parent) if (place / name).is_dir()), None)
    if found is None:
        raise UserError(
            f"{file} is the second network of a cascade, and its first stage is missing: a folder {name} in {own} or "
            f"{own.parent}. Copy the whole run or model, not one file."
        )
    return found

"""How the tensors of a kanseg module are made of the reference's, both ways, and how a state_dict is loaded by it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kanseg.errors import UserError

Arguments = dict[str, Any]  # of the reference's constructors
State = Mapping[str, Tensor]
CONSTANTS = re.compile(r"(^|\.)(arange|rbf\.grid|mean|std|freqs_t_[xy]|num_batches_tracked)$")


def taken(args: Arguments, **defaults: Any) -> Arguments:
    """These arguments, which `args` loses."""
    return {name: args.pop(name, default) for name, default in defaults.items()}


def only(parts: list[Tensor]) -> Tensor:
    """The one tensor of the list."""
    return parts[0]


@dataclass(frozen=True)
class Link:
    """One tensor of ours and the reference's tensors it is made of, with the maps both ways (linear ones)."""

    ours: str
    theirs: tuple[str, ...]
    to_ours: Callable[[list[Tensor]], Tensor] = only
    to_theirs: Callable[[Tensor], list[Tensor]] = lambda t: [t]

    def under(self, ours: str, theirs: str) -> Link:
        """The same link between parts of larger modules."""
        return replace(self, ours=ours + self.ours, theirs=tuple(theirs + name for name in self.theirs))


@dataclass(frozen=True)
class Conversion:
    """A module of ours, its links, and the reference's parameters that no output depends on."""

    module: nn.Module
    links: list[Link]
    unused: Sequence[str] = field(default=())

    def under(self, ours: str, theirs: str) -> list[Link]:
        """The links of this module as a part of a larger one."""
        return [link.under(ours, theirs) for link in self.links]


def stacked(ours: str, pattern: str, count: int) -> Link:
    """A tensor that the reference keeps in `count` parts, named by "{g}" in the pattern (or whole, without one)."""
    names = tuple(pattern.format(g=g) for g in range(count if "{g}" in pattern else 1))
    if ours.endswith("num_batches_tracked"):
        return Link(ours, names, only, partial(_repeated, count=len(names)))
    return Link(ours, names, torch.cat, lambda t: list(t.chunk(len(names))))


def _repeated(t: Tensor, count: int) -> list[Tensor]:
    return [t] * count


def same_names(module: nn.Module, ours: str, theirs: str) -> list[Link]:
    """Links of a module that has the reference's names, under two prefixes."""
    return [Link(ours + key, (theirs + key,)) for key in module.state_dict()]


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a state_dict below a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def spread(links: Iterable[Link], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names -> by the reference's."""
    result: dict[str, Tensor] = {}
    for link in links:
        if link.ours in tensors:
            result.update(zip(link.theirs, link.to_theirs(tensors[link.ours]), strict=True))
    return result


def load(conversion: Conversion, class_name: str, state: Mapping[str, Tensor]) -> Any:
    """Copy the weights, or say which keys do not fit. Constant buffers of the reference are not needed."""
    module, links = conversion.module, conversion.links
    expected = {name for link in links for name in link.theirs}
    ignored = {key for key in (*state, *expected) if CONSTANTS.search(key)}.union(conversion.unused)
    missing = sorted(expected - set(state) - ignored)
    foreign = sorted(set(state) - expected - ignored)
    if missing or foreign:
        raise UserError(
            f"state_dict does not fit {class_name}: missing {missing[:3] or 'none'}, unexpected "
            f"{foreign[:3] or 'none'}. Give the class and arguments that the weights were made with."
        )
    own = module.state_dict()
    for link in links:
        if all(name in state for name in link.theirs):
            own[link.ours] = _value(link, class_name, state, own[link.ours])
    module.to(next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32))
    module.load_state_dict(own)
    return module


def _value(link: Link, class_name: str, state: Mapping[str, Tensor], own: Tensor) -> Tensor:
    try:
        value = link.to_ours([state[name] for name in link.theirs])
    except RuntimeError:  # parts that cannot even be joined or divided
        value = state[link.theirs[0]]
    if value.shape != own.shape:
        raise UserError(
            f"{link.theirs[0]} of {class_name} has shape {tuple(state[link.theirs[0]].shape)}, which does not fit "
            f"the arguments (ours: {link.ours}, {tuple(own.shape)}). Check the arguments."
        )
    return value.clone()

"""What an expansion is made of, as one string, since an operator of torch takes tensors, numbers and strings alone.

A basis or an activation is its class and its settings. What it learns is not in the string: those tensors are given
beside it. The string is made when a layer is, and anew when one of its functions is replaced; each is read once.
`Recipe` is what it says.
"""

from __future__ import annotations

import copy
import functools
import json
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kanseg.bases import Basis
from kanseg.bases.basis import SQUASHES
from kanseg.bases.wavelet import WAVELETS
from kanseg.layers.kernels import native

NAMED: dict[str, type[nn.Module]] = {}  # classes by the names they were written with
OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # attributes that are no settings
FUNCTIONS: dict[str, Callable[..., Tensor]] = {**SQUASHES, **WAVELETS}  # that settings may name


@dataclass(frozen=True)
class Recipe:
    """The functions [base_act(x), basis_act(phi_k(x)), ...], and which of them a convolution can do without.

    Attributes:
        basis: the phi_k; None for none.
        base_act: None for no such branch.
        constant: "first" or "sum" where phi_0 needs no channel, see `Basis.constant`.
        learned: names of the tensors of `basis` that are not in the string.
    """

    basis: Basis | None
    base_act: nn.Module | None
    basis_act: nn.Module
    constant: str | None = None
    learned: tuple[str, ...] = ()

    def written(self) -> str | None:
        """The string, JSON; None where something in it cannot be written."""
        modules = {"basis": self.basis, "base_act": self.base_act, "basis_act": self.basis_act}
        try:
            states = {name: None if m is None else _state(m, name == "basis") for name, m in modules.items()}
            return json.dumps({"constant": self.constant, **states})
        except (TypeError, LookupError):
            return None

    @functools.cached_property
    def one(self) -> float:
        """The value of a constant phi_0 after `basis_act`."""
        ones = torch.ones((), device="cpu", dtype=torch.float64)
        return float(self.basis_act(ones)) if self.constant == "first" else 1.0

    def __call__(self, tensors: Sequence[Tensor], x: Tensor, own: Tensor | None = None) -> list[Tensor]:
        """The functions of rows (P, C), each (P, C).

        Args:
            tensors: those of `learned`.
            own: the input of the phi_k where it is not x.
        """
        base = [] if self.base_act is None else [self.base_act(x)]
        if self.basis is None:
            return base
        functions = self.holding(tensors).of(x if own is None else own)[int(self.constant is not None) :]
        return [*base, *(self.basis_act(f) for f in functions)]

    def holding(self, tensors: Sequence[Tensor]) -> Any:
        """The basis with these tensors in place of its own."""
        made: Any = _without_tensors(self.basis)
        for name, tensor in zip(self.learned, tensors, strict=True):
            owner, _, own = name.rpartition(".")
            made.get_submodule(owner)._parameters[own] = tensor
        return made

    def native(
        self, tensors: Sequence[Tensor], wanted: Sequence[bool], inputs: int
    ) -> Callable[[int], list[native.Part]] | None:
        """As `native.describe`; `wanted` says which of `tensors` need a gradient."""
        if self.basis is None:
            return native.describe(None, self.base_act, self.basis_act, 0, inputs)
        leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
        skip = int(self.constant is not None)
        return native.describe(self.holding(leaves), self.base_act, self.basis_act, skip, inputs)

    def fold(self, base: Tensor | None, basis: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weights over the functions, (out_channels, R * C / groups, *kernel), and of the constant that phi_0 is.

        Args:
            base: weight of the base branch, (out_channels, C / groups, *kernel).
            basis: weight of the basis, (out_channels, C * K / groups, *kernel), channel by channel.
        """
        weights = [] if base is None else [base.unsqueeze(1)]
        if basis is None:
            return weights[0].flatten(1, 2), None
        by_function, constant = self._by_function(basis), None
        if self.constant is not None:
            first, by_function = by_function[:, :1], by_function[:, 1:]
            if self.constant == "sum":
                by_function = by_function - first
            constant = first.sum((1, 2)) * self.one
        return torch.cat([*weights, by_function], dim=1).flatten(1, 2), constant

    def unfold(
        self, weight: Tensor, constant: Tensor | None, base: Tensor | None, basis: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients at `base` and `basis` from those at what `fold` makes of them."""
        of_base = None if base is None else weight[:, : base.shape[1]].to(base.dtype).contiguous()
        if basis is None:
            return of_base, None
        by_function = weight[:, 0 if base is None else base.shape[1] :].unflatten(1, (-1, self._width(basis)))
        of_basis = torch.empty_like(basis, memory_format=torch.contiguous_format)
        into = self._by_function(of_basis)
        if constant is not None:
            first = (constant * self.one).unsqueeze(1)
            into[:, 0] = first - by_function.sum(1) if self.constant == "sum" else first
        into[:, int(constant is not None) :] = by_function
        return of_base, of_basis

    def _by_function(self, basis: Tensor) -> Tensor:
        """A view (out_channels, K, C / groups, *kernel)."""
        return basis.unflatten(1, (self._width(basis), -1)).transpose(1, 2)

    def _width(self, basis: Tensor) -> int:
        assert self.basis is not None
        return basis.shape[1] // self.basis.num_functions


class Written:
    """The recipe of a layer's functions: written anew when one of them is replaced, None while one is watched."""

    def __init__(self) -> None:
        self.known: tuple[tuple[nn.Module | None, ...], str | None] = ((), None)

    def __call__(
        self, functions: tuple[nn.Module | None, ...], write: Callable[[], str | None]
    ) -> str | None:
        """What `write` gives for these functions."""
        before, text = self.known
        if len(before) != len(functions) or any(map(operator.is_not, before, functions)):
            if torch.compiler.is_dynamo_compiling():  # it does not follow, and makes its own of plain steps
                return None
            text = write()
            self.known = functions, text
        return None if any(f is not None and watched(f) for f in functions) else text


def watched(module: nn.Module) -> bool:
    """Whether hooks wait for a call of the module or of one in it, which the kernels do not make."""
    forward, backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    if forward or backward or module._backward_pre_hooks:
        return True
    return any(map(watched, module.children())) if module._modules else False


@functools.cache
def read(text: str) -> Recipe:
    """The recipe that `Recipe.written` wrote."""
    written = json.loads(text)
    modules = {name: _module(written[name]) for name in ("basis", "base_act", "basis_act")}
    learned = tuple(written["basis"]["learned"]) if written["basis"] else ()
    return Recipe(**modules, constant=written["constant"], learned=learned)


def _state(module: nn.Module, learns: bool) -> dict[str, Any]:
    learned = names_of_tensors(module)
    if learned and not learns:
        raise LookupError(type(module).__name__)
    settings = {key: _written(v) for key, v in vars(module).items() if key not in OF_EVERY_MODULE}
    modules = {part: _state(inner, learns) for part, inner in module.named_children()}
    return {"class": _name_of(type(module)), "settings": settings, "modules": modules, "learned": learned}


def names_of_tensors(module: nn.Module) -> list[str]:
    """Names of all that a module and those in it learn or hold, in the order of recipes."""
    return [name for name, _ in (*module.named_parameters(), *module.named_buffers())]


def _written(value: Any) -> Any:
    if callable(value):
        return {"function": {function: name for name, function in FUNCTIONS.items()}[value]}
    if isinstance(value, tuple):
        return {"tuple": [_written(part) for part in value]}
    if isinstance(value, list):
        return [_written(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(type(value).__name__)


def _read(written: Any) -> Any:
    if isinstance(written, list):
        return [_read(part) for part in written]
    if not isinstance(written, dict):
        return written
    if "tuple" in written:
        return tuple(_read(part) for part in written["tuple"])
    return FUNCTIONS[written["function"]]


def _module(state: dict[str, Any] | None) -> Any:
    if state is None:
        return None
    kind = NAMED.get(state["class"]) or _classes()[state["class"]]
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for key, value in state["settings"].items():
        setattr(module, key, _read(value))
    for name, inner in state["modules"].items():
        module.add_module(name, _module(inner))
    return module


def _without_tensors(module: Any) -> Any:
    """A copy, of the modules in it too, whose tensors are for others to set."""
    made = copy.copy(module)
    made._parameters = {}
    made._modules = {name: _without_tensors(inner) for name, inner in module._modules.items()}
    return made


def _classes() -> dict[str, type[nn.Module]]:
    """Activations of torch and every class of bases, by name."""
    return {**vars(nn), **{kind.__name__: kind for kind in _below(Basis)}}


def _name_of(kind: type[nn.Module]) -> str:
    """A name that no other class has here: a notebook may define one anew."""
    if not issubclass(kind, Basis) and kind not in (vars(nn).get(kind.__name__), *NAMED.values()):
        raise LookupError(kind.__name__)
    name, count = kind.__name__, 1
    while NAMED.setdefault(name, kind) is not kind:
        count += 1
        name = f"{kind.__name__} {count}"
    return name


def _below(kind: type[Basis]) -> Iterator[type[Basis]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)

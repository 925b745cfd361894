"""Steps of a layer that are made again in the backward pass, so that less is kept for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kanseg.layers.kernels.operators import only_plain
from kanseg.layers.kernels.recipe import watched

State = dict[str, Any]


class AsItWas(AbstractContextManager[None]):
    """A module as it is now, for a second run of its steps: in its mode, with its tensors, whose place others may take
    until then (where `torch.func.functional_call` lent them, say), and in training with copies of its buffers, so that
    statistics count once and what is iterated in them (`spectral_norm`) comes out alike. May be entered again.

    Args:
        function: a method of the module, or the module; any other function has nothing to keep.
        inputs, reads: what the steps read, all inputs and the parameters whose names begin so. Editing it in place
            until then would change the second run, and is refused as torch does it.
    """

    def __init__(self, function: Any, inputs: tuple[Any, ...], reads: str | tuple[str, ...]) -> None:
        owner = _owner(function)
        parts = dict(owner.named_modules()) if isinstance(owner, nn.Module) else {}
        self.before: list[tuple[Any, State]] = [(vars(part), _state(part)) for part in parts.values()]
        read = list(inputs)
        for prefix, part in parts.items():
            own = part._parameters if part.training else {**part._parameters, **part._buffers}
            read += [t for name, t in own.items() if f"{prefix}.{name}".lstrip(".").startswith(reads)]
        self.versions = [(t, t._version) for t in read if isinstance(t, Tensor) and not t.is_inference()]
        self.name = type(owner).__name__

    def __enter__(self) -> None:
        for tensor, version in self.versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"a tensor of shape {tuple(tensor.shape)} that {self.name} reads again in the backward pass is at "
                    f"version {tensor._version}, expected version {version}. Edit it after backward(), or a copy of it."
                )
        self.now: list[tuple[Any, State]] = []
        for state, before in self.before:
            if not _alike(state, before):  # else a thread that runs the same module would see it change
                self.now.append((state, {key: state[key] for key in before}))
                state.update(before)

    def __exit__(self, *error: Any) -> None:
        for state, now in self.now:
            state.update(now)


def _owner(function: Any) -> Any:
    """The module whose method it is, or the function itself."""
    function = function.func if isinstance(function, partial) else function
    return getattr(function, "__self__", function)


def _state(part: nn.Module) -> State:
    """What the steps of a module depend on."""
    buffers = part._buffers.items()
    kept = {name: b.clone() if part.training and b is not None else b for name, b in buffers}
    return {"training": part.training, "_parameters": part._parameters.copy(), "_buffers": kept}


def _alike(state: State, before: State) -> bool:
    tensors = ((name, key) for name in ("_parameters", "_buffers") for key in {**state[name], **before[name]})
    return state["training"] == before["training"] and all(
        state[name].get(key) is before[name].get(key) for name, key in tensors
    )


def recomputed(
    function: Callable[..., Tensor],
    *inputs: Tensor,
    reads: str | tuple[str, ...] = "",
    **options: Any,
) -> Tensor:
    """`function(*inputs)`, keeping only `inputs` for the backward pass. Under torch.compile the compiler decides,
    transformations of `torch.func` keep what they need, a trace has no second run, and hooks on the module that is
    called, or on its parts, expect none (those that count calls or gather gradients by sample would be wrong).

    Args:
        reads: beginnings of the names of the parts and parameters that it reads, where not all of its module.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or only_plain() or torch.jit.is_tracing():
        return function(*inputs)
    owner = _owner(function)
    if isinstance(owner, nn.Module):
        parts: Iterable[tuple[str, nn.Module]] = (
            [("", owner)] if owner is function else owner.named_children()
        )
        if any(name.startswith(reads) and watched(part) for name, part in parts):
            return function(*inputs)
    # A subclass (MONAI's MetaTensor) makes views of its own, which the second run would not make alike.
    plain = (x.as_subclass(Tensor) if isinstance(x, Tensor) and type(x) is not Tensor else x for x in inputs)
    contexts = nullcontext(), AsItWas(function, inputs, reads)
    return checkpoint(function, *plain, use_reentrant=False, context_fn=lambda: contexts, **options)

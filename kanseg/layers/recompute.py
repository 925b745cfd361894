"""Steps of a layer that are made again in the backward pass, so that less is kept for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kanseg.layers.kernels.operators import transformed

OF_A_RUN = ("training", "_parameters", "_buffers")  # attributes of a module that its steps depend on


class AsItWas:
    """A module as it is now, for a second run of its steps: with its tensors, whose place others may take until then
    (where `torch.func.functional_call` lent them, say), and in its mode. May be entered again.

    Args:
        function: a method of the module, or the module; any other function has nothing to keep.
        inner: entered within.
    """

    def __init__(self, function: Any, inner: AbstractContextManager[Any]) -> None:
        function, self.inner = function.func if isinstance(function, partial) else function, inner
        owner = getattr(function, "__self__", function)
        parts = list(owner.modules()) if isinstance(owner, nn.Module) else []
        self.states = [vars(part) for part in parts]
        self.before = [
            {"training": p.training, "_parameters": p._parameters.copy(), "_buffers": p._buffers.copy()}
            for p in parts
        ]

    def __enter__(self) -> None:
        self.now = [{key: state[key] for key in OF_A_RUN} for state in self.states]
        self._set(self.before)
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)
        self._set(self.now)

    def _set(self, values: list[dict[str, Any]]) -> None:
        for state, value in zip(self.states, values, strict=True):
            state.update(value)


def recomputed(
    function: Callable[..., Tensor],
    *inputs: Tensor,
    second: AbstractContextManager[Any] | None = None,
    **options: Any,
) -> Tensor:
    """`function(*inputs)`, keeping only `inputs` for the backward pass. Under torch.compile the compiler decides,
    transformations of `torch.func` keep what they need, and a trace has no second run.

    Args:
        second: surrounds the run of the backward pass, in which the module is as it was in the first.
    """
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or transformed()
        or torch.jit.is_tracing()
    ):
        return function(*inputs)
    # A subclass (MONAI's MetaTensor) makes views of its own, which the second run would not make alike.
    plain = (x.as_subclass(Tensor) if isinstance(x, Tensor) and type(x) is not Tensor else x for x in inputs)
    contexts = nullcontext(), AsItWas(function, second or nullcontext())
    return checkpoint(function, *plain, use_reentrant=False, context_fn=lambda: contexts, **options)

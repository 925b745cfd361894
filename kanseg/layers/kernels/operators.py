"""Steps that torch's compilers and exporters take as they are: what all operators here have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _len_torch_dispatch_stack


def refuse_second(ctx: Any, *grads: Any) -> Any:
    """The backward pass of a backward pass."""
    raise RuntimeError(
        "the kernels of KAN layers have no second derivative; make the layer with recompute=False for one"
    )


def only_first(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass of a `torch.autograd.Function` that refuses a second derivative.

    torch's `once_differentiable` forgets what the gradients depend on where the gradient it gets is a constant, and a
    penalty on them then does nothing.
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, grad: Tensor) -> Any:
        with torch.no_grad():
            grads = backward(ctx, grad)
        if not torch.is_grad_enabled():
            return grads
        return _Refusing.apply(len(grads), *grads, grad, *ctx.saved_tensors)

    return refusing


class _Refusing(torch.autograd.Function):
    """The first `count` tensors, as ones that depend on all."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Any) -> Any:
        return tensors[:count]

    backward = staticmethod(refuse_second)


def operator(name: str, schema: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator of torch, `kanseg::name`."""
    made = torch.library.custom_op(f"kanseg::{name}", compute, mutates_args=(), schema=schema)
    made.register_fake(fake)
    return made


def transformed() -> bool:
    """Whether a transformation of `torch.func` is at work, which takes plain steps of torch alone."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def plain_eager(x: Tensor) -> bool:
    """Whether nothing watches the operators, so that they need not be called as such (a tenth of a millisecond)."""
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing() or _len_torch_dispatch_stack()
    return not watched and type(x) is Tensor and not x.is_meta

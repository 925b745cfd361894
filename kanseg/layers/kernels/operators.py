"""Steps that torch's compilers and exporters take as they are: what all operators here have in common."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _len_torch_dispatch_stack

WITHIN = "For them, call the network or layer within `with kanseg.layers.plain_steps():`"


def refuse_second(ctx: Any, *grads: Any) -> Any:
    """The backward pass of a backward pass."""
    raise RuntimeError(
        f"kanseg's kernels have no second derivatives. {WITHIN}, or make layers with recompute=False"
    )


def refuse_batched(grad: Tensor) -> None:
    """Raise `RuntimeError` in a backward pass of many gradients at once."""
    if transformed() or torch._C._functorch.is_legacy_batchedtensor(grad):
        raise RuntimeError(f"kanseg's kernels take no batched gradients (is_grads_batched, vmap). {WITHIN}")


def only_first(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass of a `torch.autograd.Function` that refuses a second derivative.

    torch's `once_differentiable` forgets what the gradients depend on where the gradient it gets is a constant, and a
    penalty on them then does nothing.
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, grad: Tensor) -> Any:
        refuse_batched(grad)
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


class Asked(threading.local):
    """What the blocks that a thread is in ask for."""

    plain = direct = False

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """A block that asks for it."""
        before = getattr(self, name)
        setattr(self, name, True)
        try:
            yield
        finally:
            setattr(self, name, before)


asked = Asked()


def plain_steps() -> AbstractContextManager[None]:
    """Within it, in its thread, layers and networks take steps of torch alone: these keep more, may be differentiated
    twice, and are what `torch.onnx.export` knows.

    >>> from kanseg import KANConv
    >>> x = torch.ones(1, 2, 5, 5, requires_grad=True)
    >>> with plain_steps():
    ...     y = KANConv(2, 2, 2)(x)
    >>> (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    >>> slope.square().sum().backward()
    """
    return asked.within("plain")


def direct_products() -> AbstractContextManager[None]:
    """Within it, in its thread, forward passes of convolutions take all their products: slower, and rounded as by
    other libraries.
    """
    return asked.within("direct")


def transformed() -> bool:
    """Whether a transformation of `torch.func` is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def only_plain() -> bool:
    """Whether plain steps of torch alone serve: in `plain_steps`, in `torch.func`, where tangents are carried, or in
    `torch.onnx.export`, which knows no other.
    """
    if torch.compiler.is_dynamo_compiling():  # which follows no such question
        return False
    steps = asked.plain or torch.onnx.is_in_onnx_export()
    return steps or transformed() or forward_ad._current_level >= 0


def plain_eager(x: Tensor) -> bool:
    """Whether nothing watches the operators, so that they need not be called as such (a tenth of a millisecond)."""
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing() or _len_torch_dispatch_stack()
    return not watched and type(x) is Tensor and not x.is_meta

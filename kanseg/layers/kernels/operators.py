"""Steps that torch's compilers and exporters take as they are: what all operators here have in common."""

from __future__ import annotations

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


def operator(name: str, schema: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator of torch, `kanseg::name`."""
    made = torch.library.custom_op(f"kanseg::{name}", compute, mutates_args=(), schema=schema)
    made.register_fake(fake)
    return made


def plain_eager(x: Tensor) -> bool:
    """Whether nothing watches the operators, so that they need not be called as such (a tenth of a millisecond)."""
    return not torch.compiler.is_compiling() and not _len_torch_dispatch_stack() and type(x) is Tensor

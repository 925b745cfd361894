"""Sums of many terms that are evaluated one at a time, in the backward pass again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kanseg.layers.kernels.operators import only_first
from kanseg.layers.kernels.slabs import Slab, outputs

Term = tuple[Slab, Callable[..., Tensor]]  # and the part of the sum to which it adds


def summed(terms: Sequence[Term], tensors: Sequence[Tensor | None]) -> Tensor:
    """The sum of term(*tensors); the first one is whole."""
    total = terms[0][1](*tensors)
    for slab, term in terms[1:]:
        if slab.whole:
            total = total + term(*tensors)
        else:
            outputs(total, slab).add_(term(*tensors))
    return total


class SumOfTerms(torch.autograd.Function):
    """y = sum of term(*tensors), keeping the tensors alone; backward evaluates one term at a time again."""

    @staticmethod
    def forward(ctx: Any, terms: list[Term], *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.terms = terms
        x: Any = tensors[0]
        device = x.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return summed(terms, tensors)

    @staticmethod
    @only_first
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        total: list[Any] = [None] * len(wanted)
        saved = ctx.saved_tensors
        for slab, term in ctx.terms:
            leaves: list[Any] = [
                None if t is None else t.detach().requires_grad_(want)
                for t, want in zip(saved, wanted, strict=True)
            ]
            with torch.enable_grad(), torch.autocast(ctx.autocast[0], ctx.autocast[1], ctx.autocast[2]):
                y = term(*leaves)
            if not y.requires_grad:  # what this term is made of is frozen
                continue
            sought = [i for i, want in enumerate(wanted) if want]
            grads = torch.autograd.grad(
                y, [leaves[i] for i in sought], outputs(grad, slab), allow_unused=True
            )
            for i, g in zip(sought, grads, strict=True):
                if g is not None:
                    total[i] = g if total[i] is None else total[i] + g
        return (None, *total)

"""Mixtures of experts: a gate sends each sample to k of the experts and adds up what they answer.

Sources: Shazeer et al., arXiv 1701.06538 (sparse mixtures); Drokin, arXiv 2407.01092
(experts that are KAN convolutions, also in the narrow space of a bottleneck).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kanseg.layers.gates import LayerFactory, NoisyTopKGate
from kanseg.layers.kernels.operators import only_plain


def beside_samples(numbers: Tensor, x: Tensor) -> Tensor:
    """View a number a sample, (N,), so that it broadcasts against x, (N, C, *S)."""
    return numbers.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


class MixtureOfExperts(nn.Module):
    """y_n = sum over the chosen experts e of w_ne expert_e(x_n), (N, in_channels, *S) -> (N, out_channels, *S').

    The gate sees the mean of each channel. An expert runs on its samples alone; one without samples gets gradients of
    zero. After a forward pass in training `balance_loss` holds the loss that spreads samples over experts; the training
    loop adds `take_balance_loss(model)`. `fully_shard` takes the mixture or what holds it, never single experts, which
    not every process calls.

    Args:
        expert_layer: constructor of one expert, called like `ConvLayer`.
        num_experts, k, noisy, before: see `NoisyTopKGate`.
        balance_weight: factor of the balance loss.
        options: go to every expert (stride, groups, ...).
    """

    balance_loss: Tensor | None = None
    gate_class = NoisyTopKGate

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        expert_layer: LayerFactory,
        num_experts: int = 8,
        k: int = 2,
        noisy: bool = True,
        before: LayerFactory | None = None,
        balance_weight: float = 1e-2,
        **options: Any,
    ) -> None:
        super().__init__()
        self.gate = self.gate_class(in_channels, num_experts, k, noisy=noisy, before=before)
        self.experts = nn.ModuleList(
            expert_layer(spatial_dims, in_channels, out_channels, kernel_size, **options)
            for _ in range(num_experts)
        )
        self.balance_weight = balance_weight

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "balance_loss": None}  # a copy is not part of the step that made the loss

    def forward(self, x: Tensor) -> Tensor:
        y, loss = self.mix(x)
        self.balance_loss = loss if self.training else None
        return y

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the balance loss."""
        chosen, shares, imbalance = self.gate(x.mean(dim=tuple(range(2, x.dim()))))
        everywhere = torch.compiler.is_exporting() or only_plain() or not x.numel()
        send = self._to_all if everywhere else self._to_chosen
        return send(x, chosen, shares), self.balance_weight * imbalance

    def _to_chosen(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Each expert on its own samples."""
        samples, answers, idle = [], [], []
        for number, expert in enumerate(self.experts):
            sample, place = (chosen == number).nonzero(as_tuple=True)
            if len(sample) == 0:
                idle.append(expert)
                continue
            answer = expert(x[sample])
            samples.append(sample)
            answers.append(answer * beside_samples(shares[sample, place], answer))
        parts = torch.cat(answers)
        y = parts.new_zeros(len(x), *parts.shape[1:]).index_add(0, torch.cat(samples), parts)
        return y + self._nothing_of(idle, y)

    def _to_all(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Each expert on all samples: what a graph or `torch.func.vmap` can do, whose shapes do not depend on data."""
        weights = shares.new_zeros(x.shape[0], len(self.experts)).scatter(
            1, chosen, shares
        )  # len would fix N
        answers = [expert(x) for expert in self.experts]
        return torch.stack([a * beside_samples(w, a) for a, w in zip(answers, weights.T, strict=True)]).sum(0)

    def _nothing_of(self, experts: Sequence[nn.Module], y: Tensor) -> Tensor:
        """0 that depends on all weights of the idle experts: data-parallel training waits for every gradient."""
        zero = y.new_zeros(())
        if torch.is_grad_enabled():
            for parameter in nn.ModuleList(experts).parameters():
                zero = zero + 0 * parameter.sum().to(y.dtype)
        return zero


def take_balance_loss(model: nn.Module) -> Tensor | float:
    """The sum of the balance losses of the last forward pass in training, once: they are forgotten then.

    >>> take_balance_loss(nn.Conv2d(1, 1, 1))
    0.0
    """
    total: Tensor | float = 0.0
    for module in model.modules():
        if isinstance(module, MixtureOfExperts) and module.balance_loss is not None:
            total = total + module.balance_loss
            module.balance_loss = None
    return total

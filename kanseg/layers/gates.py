"""The gate of a mixture of experts.

Source: Shazeer et al., arXiv 1701.06538 (noisy top-k gate, balance of importance and load).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg.errors import UsageError

LayerFactory = Callable[..., nn.Module]
LEAST_NOISE = 1e-2


class NoisyTopKGate(nn.Module):
    """Which k experts a sample goes to, with what weight, and how unequally the experts are used.

    Logits are x W; in training N(0, 1) softplus(x V) is added. The weights are the softmax over the k largest.

    Args:
        channels: numbers a sample, x is (N, channels).
        num_experts, k: experts, and how many of them see a sample.
        noisy: add noise in training.
        before: layer that x passes first, `before(channels, channels)`; none by default.
    """

    def __init__(
        self,
        channels: int,
        num_experts: int,
        k: int,
        *,
        noisy: bool = True,
        before: LayerFactory | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise UsageError(f"a mixture needs 1 <= k <= num_experts, got k={k}, num_experts={num_experts}")
        self.num_experts, self.k = num_experts, k
        self.before = nn.Identity() if before is None else before(channels, channels)
        self.weight = nn.Parameter(torch.randn(channels, num_experts) / channels**0.5 * LEAST_NOISE)
        self.noise_weight = nn.Parameter(torch.zeros(channels, num_experts)) if noisy else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, channels) -> experts (N, k), their weights (N, k), and the imbalance, a number of 0 or more."""
        with torch.autocast(x.device.type, enabled=False):
            x = self.before(x.to(self.weight.dtype))
            clean = logits = x @ self.weight
            spread = None
            if self.noise_weight is not None and self.training:
                spread = F.softplus(x @ self.noise_weight) + LEAST_NOISE
                logits = clean + torch.randn_like(clean) * spread
            chosen = logits.topk(self.k, dim=1).indices
            shares = self.shares(logits, chosen)
            importance = torch.zeros_like(logits).scatter(1, chosen, shares).sum(0)
            load = self.load(clean, logits, spread, chosen)
            return chosen, shares, squared_variation(importance) + squared_variation(load)

    def shares(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """Weights of the chosen experts, (N, k); they sum to 1."""
        return logits.gather(1, chosen).softmax(dim=1)

    def load(self, clean: Tensor, logits: Tensor, spread: Tensor | None, chosen: Tensor) -> Tensor:
        """Samples that each expert gets, (E,): with noise the expected number, which has a gradient.

        An expert is among the k when its noisy logit exceeds the k-th largest of the others.
        """
        if spread is None or self.k == self.num_experts:
            return torch.zeros_like(clean).scatter(1, chosen, 1.0).sum(0)
        return torch.special.ndtr((clean - kth_of_the_others(logits, self.k)) / spread).sum(0)


def kth_of_the_others(values: Tensor, k: int) -> Tensor:
    """The k-th largest number of a row without the number itself, (N, E) -> (N, E), for k < E."""
    top = values.topk(k + 1, dim=1).values
    inside = values > top[:, k:]
    return torch.where(inside, top[:, k:], top[:, k - 1 : k])


def squared_variation(values: Tensor) -> Tensor:
    """Variance over squared mean, 0 for a single number."""
    if len(values) == 1:
        return values.new_zeros(())
    return values.var() / (values.mean() ** 2 + 1e-10)

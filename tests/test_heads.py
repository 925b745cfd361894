"""The nested head and the norm with maps of scale and shift."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import prune

from kanseg.errors import UsageError
from kanseg.layers.heads import MatryoshkaHead
from kanseg.layers.spatial_norm import SpatialNorm


@pytest.mark.parametrize("shared", [True, False])
def test_logits_of_a_width_see_its_features_alone(shared: bool) -> None:
    head, x = MatryoshkaHead((2, 5, 8), 3, shared=shared), torch.randn(4, 8)
    changed = x.clone()
    changed[:, 5:] += 1
    for width, before, after in zip(head.nesting, head(x), head(changed), strict=True):
        assert torch.equal(before, after) == (width <= 5)
    assert len(list(head.parameters())) == (2 if shared else 6)


def test_the_shared_weight_gives_every_width_its_first_columns() -> None:
    head, x = MatryoshkaHead((2, 8), 3, shared=True), torch.randn(4, 8)
    weight, bias = head.classifiers[0].weight, head.classifiers[0].bias
    torch.testing.assert_close(head(x)[0], x[:, :2] @ weight[:, :2].T + bias)


def test_widths_that_do_not_grow_are_refused() -> None:
    with pytest.raises(UsageError, match="increasing positive widths, got \\[8, 4\\]"):
        MatryoshkaHead((8, 4), 3)


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_a_spatial_norm_without_maps_is_a_group_norm(spatial_dims: int) -> None:
    norm, x = SpatialNorm(spatial_dims, 8, num_groups=4), torch.randn(2, 8, *[5] * spatial_dims)
    for conv, value in ((norm.scale, 1.0), (norm.shift, 0.0)):
        conv.weight.data.zero_()
        conv.bias.data.fill_(value)
    torch.testing.assert_close(norm(x), F.group_norm(x, 4, eps=1e-6))


def test_the_second_image_may_be_of_any_size() -> None:
    norm, x, z = SpatialNorm(2, 8, 3, num_groups=4), torch.randn(2, 8, 6, 4), torch.randn(2, 3, 3, 2)
    larger = z.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(norm(x, z), norm(x, larger))
    torch.testing.assert_close(
        norm(x, larger), F.group_norm(x, 4, eps=1e-6) * norm.scale(larger) + norm.shift(larger)
    )


def test_groups_that_do_not_divide_are_explained() -> None:
    with pytest.raises(UsageError, match=r"channels \(=6\) must be divisible by num_groups \(=4\)"):
        SpatialNorm(2, 6, num_groups=4)


@pytest.mark.parametrize("shared", [True, False])
def test_a_pruned_head_trains_on(shared: bool) -> None:
    """Pruning makes the weight anew in a hook on each call."""
    head, x = MatryoshkaHead((4, 8), 3, shared=shared), torch.randn(2, 8)
    for classifier in head.classifiers:
        prune.l1_unstructured(classifier, "weight", 0.5)
    for _ in range(2):
        torch.stack(head(x)).sum().backward()
    assert all((c.weight_orig.grad[c.weight_mask == 0] == 0).all() for c in head.classifiers)

"""Focal losses against torch's and MONAI's where these have the same options."""

from __future__ import annotations

import pytest
import torch
from monai.losses import FocalLoss as MonaiFocalLoss
from monai.losses import TverskyLoss
from torch.nn import functional as F

from kanseg.compat.focal import FocalLoss, FocalTverskyLoss
from kanseg.errors import UsageError


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 5, 6), torch.randint(4, (2, 5, 6))


@pytest.mark.parametrize("options", [{}, {"ignore_index": 0}, {"label_smoothing": 0.1}])
def test_without_focus_it_is_torch_s_cross_entropy(options: dict) -> None:
    logits, target = pair()
    theirs = F.cross_entropy(logits, target, **options)
    torch.testing.assert_close(FocalLoss(0, **options)(logits, target), theirs)


def test_it_is_monai_s_focal_loss_summed_over_classes() -> None:
    logits, target = pair()
    theirs = MonaiFocalLoss(gamma=2.0, use_softmax=True, to_onehot_y=True)(logits, target.unsqueeze(1))
    torch.testing.assert_close(FocalLoss(2.0)(logits, target), theirs * 4)


def test_class_weights_scale_the_loss_of_their_class() -> None:
    logits, target = pair()
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0])
    each = torch.stack(
        [FocalLoss(1.5, reduction="sum")(logits, target.where(target == k, -100)) for k in range(4)]
    )
    weighted = FocalLoss(1.5, class_weights=weights, reduction="sum")(logits, target)
    torch.testing.assert_close(weighted, (each * weights).sum())


def test_ignored_voxels_have_no_gradient_and_nothing_else_is_a_loss_of_zero() -> None:
    logits, target = pair()
    logits.requires_grad_()
    FocalLoss(2.0, ignore_index=1)(logits, target).backward()
    touched = logits.grad.abs().sum(1) > 0
    assert torch.equal(touched, target != 1)
    nothing = FocalLoss(2.0, ignore_index=1)(logits, torch.ones_like(target))
    assert nothing == 0
    nothing.backward()
    assert torch.isfinite(logits.grad).all()


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(UsageError, match="reduction must be 'mean', 'sum' or 'none', got 'max'"):
        FocalLoss(reduction="max")


def test_the_loss_of_each_voxel_adds_up_to_the_sum() -> None:
    logits, target = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    each = FocalLoss(1.5, ignore_index=2, reduction="none")(logits, target)
    assert each.shape == ((target != 2).sum(),)
    torch.testing.assert_close(each.sum(), FocalLoss(1.5, ignore_index=2, reduction="sum")(logits, target))


def test_focal_tversky_is_monai_s_tversky_with_an_exponent() -> None:
    logits, target = pair()
    options = {"softmax": True, "to_onehot_y": True, "alpha": 0.3, "beta": 0.7}
    args = (logits, target.unsqueeze(1))
    torch.testing.assert_close(FocalTverskyLoss(1.0, **options)(*args), TverskyLoss(**options)(*args))
    each = TverskyLoss(**options, reduction="none")(*args)
    torch.testing.assert_close(FocalTverskyLoss(2.0, **options)(*args), (each**2).mean())

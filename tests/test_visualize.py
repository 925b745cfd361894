"""The learned functions that are drawn are those that the layer computes."""

from __future__ import annotations

import pytest
import torch

from kanseg import KANConv, UKANet
from kanseg.errors import UserError
from kanseg.study import kan_convolutions, learned_functions, plot_learned_functions


@pytest.mark.parametrize("basis", ["gram", "bspline"])
def test_functions_sum_to_the_layers_output(basis: str) -> None:
    conv = KANConv(2, 3, 4, kernel_size=1, basis=basis, basis_act="silu")
    x = torch.linspace(-2, 2, 11)
    functions = learned_functions(conv, x)
    same_in_all_channels = conv(x.view(1, 1, 1, -1).expand(1, 3, 1, -1))[0, :, 0]
    torch.testing.assert_close(functions.sum(dim=1), same_in_all_channels)


def test_picture_shows_the_asked_number_of_functions() -> None:
    model = UKANet(2, 1, 2, features_per_stage=(4, 8), encoder="reskanet10", kan_stages="deep")
    figure = plot_learned_functions(model, count=6)
    assert sum(axis.axison for axis in figure.axes) == 6
    assert next(iter(kan_convolutions(model))) in figure.get_suptitle()


def test_a_plain_network_has_none() -> None:
    model = UKANet(2, 1, 2, basis=None, features_per_stage=(4, 8), encoder="reskanet10")
    with pytest.raises(UserError, match="all its convolutions are plain"):
        plot_learned_functions(model)

"""Numbers of IvanDrokin/torch-conv-kan, layer by layer: outputs and all gradients, in `eval()`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kanseg.compat import from_torch_conv_kan, reference_gradients, to_torch_conv_kan
from kanseg.errors import UsageError, UserError

PARITY = Path(__file__).parents[1] / ".." / "shared" / "parity"


def cases() -> list[dict]:
    manifest = PARITY / "manifest.json"
    if not manifest.exists():
        return []
    listed = json.loads(manifest.read_text())["cases"]
    return [case for case in listed if case["kind"] in ("layer", "fc")]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


@pytest.mark.skipif(not cases(), reason="the parity data (../shared/parity) is not beside the project")
@pytest.mark.parametrize("case", cases(), ids=lambda case: case["id"])
def test_layer_gives_the_numbers_of_the_reference(case: dict) -> None:
    data = load_file(PARITY / case["file"])
    state = {key.removeprefix("state."): value for key, value in data.items() if key.startswith("state.")}
    layer = from_torch_conv_kan(case["class"], case["args"], state)
    x = data["input"].clone().requires_grad_()
    y = layer(x)
    if "moe_loss" in data:
        y, loss = y
        assert relative(loss, data["moe_loss"]) <= 1e-5
    assert relative(y, data["output"]) <= max(1e-5, 10 * case["relative_f32_noise"])
    y.backward(data["cotangent"])
    if case["grad_input"]:
        assert relative(x.grad, data["grad_input"]) <= 1e-4
    gradients = reference_gradients(layer)
    noise = 1e-5 * max(data[f"grad.{name}"].abs().max() for name in case["grads"])
    for name in case["grads"]:
        theirs = data[f"grad.{name}"]
        if 0 < theirs.abs().max() < noise:  # a bias before a norm: what is left is rounding
            assert gradients[name].abs().max() < noise, name
        else:
            assert relative(gradients[name], theirs) <= 1e-4, name
    back = to_torch_conv_kan(layer)
    assert all(torch.equal(back[key], state[key]) for key in back if not key.endswith("beta_weights"))


def kagn_state() -> dict[str, torch.Tensor]:
    return {
        "base_conv.0.weight": torch.randn(3, 2, 3),
        "poly_weights": torch.randn(1, 3, 8, 3),
        "beta_weights": torch.randn(4),
    }


def test_norms_without_weights_and_classes_as_arguments_work() -> None:
    args = {"input_dim": 2, "output_dim": 3, "kernel_size": 3, "norm_layer": torch.nn.InstanceNorm1d}
    layer = from_torch_conv_kan("KAGNConv1DLayer", args, kagn_state())
    assert layer(torch.randn(1, 2, 9)).shape == (1, 3, 7)


def test_foreign_weights_name_the_keys_that_do_not_fit() -> None:
    args = {"input_dim": 2, "output_dim": 3, "kernel_size": 3}
    with pytest.raises(UserError, match=r"missing \['spline_conv.0.weight'\].*unexpected \['beta_weights'"):
        from_torch_conv_kan("FastKANConv1DLayer", args, kagn_state())
    with pytest.raises(UserError, match="does not fit the arguments"):
        from_torch_conv_kan("KAGNConv1DLayer", {**args, "output_dim": 4}, kagn_state())
    with pytest.raises(UsageError, match="Unknown class 'KAGMConv1DLayer'.*Did you mean"):
        from_torch_conv_kan("KAGMConv1DLayer", args, kagn_state())

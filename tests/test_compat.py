"""Numbers of IvanDrokin/torch-conv-kan, layer by layer: outputs and all gradients, in `eval()`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from monai.losses import DiceLoss
from monai.metrics import (
    compute_confusion_matrix_metric,
    compute_hausdorff_distance,
    get_confusion_matrix,
)
from safetensors.torch import load_file
from torch import nn

from kanseg.compat import from_torch_conv_kan, reference_gradients, to_torch_conv_kan
from kanseg.compat.links import spread
from kanseg.compat.torch_conv_kan import find
from kanseg.errors import UsageError, UserError
from kanseg.training.schedules import polynomial_with_warmup

PARITY = Path(__file__).parents[1] / ".." / "shared" / "parity"


ABSENT = "the parity data (../shared/parity) is not beside the project"


def cases(*kinds: str) -> list:
    manifest = PARITY / "manifest.json"
    listed = json.loads(manifest.read_text())["cases"] if manifest.exists() else []
    return [case for case in listed if case["kind"] in kinds] or [
        pytest.param(None, marks=pytest.mark.skip(reason=ABSENT))
    ]


def name(case: dict | None) -> str:
    return case["id"] if case else "absent"


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("case", cases("layer", "fc"), ids=name)
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


def pooled(data: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Masks of all samples as one volume, (1, 1, N, H, W): probabilities and target above one half."""
    return [(data[key] > 0.5).float().transpose(0, 1)[None] for key in ("probabilities", "target")]


def overlap(data: dict[str, torch.Tensor], args: dict) -> torch.Tensor:
    matrix = get_confusion_matrix(*pooled(data))
    names = {"IoU": "threat score", "dice": "f1 score", "f1_score": "f1 score"}
    values = [compute_confusion_matrix_metric(names.get(key, key), matrix) for key in args["order"]]
    return torch.cat(values).flatten()


def hausdorff(data: dict[str, torch.Tensor], args: dict) -> torch.Tensor:
    distance = partial(compute_hausdorff_distance, *pooled(data), include_background=True)
    return torch.cat([distance(), distance(percentile=95)]).flatten()


def schedule(data: dict[str, torch.Tensor], args: dict) -> torch.Tensor:
    names = {"lr": "lr", "num_warmup_steps": "warmup_steps", "num_training_steps": "total_steps"}
    options = {names.get(key, key.removeprefix("lr_")): value for key, value in args.items()}
    steps = range(len(data["output"]))
    return torch.tensor([polynomial_with_warmup(step, **options) for step in steps], dtype=torch.float64)


def soft_dice(data: dict[str, torch.Tensor], args: dict) -> torch.Tensor:
    return 1 - DiceLoss(smooth_nr=1, smooth_dr=1)(data["probabilities"], data["target"])


FUNCTIONS = {
    "metric_medseg_overlap": overlap,
    "metric_medseg_hausdorff": hausdorff,
    "metric_dice_soft": soft_dice,
    "schedule": schedule,
}
MODULES = {"norm_self_spatial_norm": "SelfSpatialNorm", "norm_spatial_norm": "SpatialNorm"}


@pytest.mark.parametrize("case", cases("functional"), ids=name)
def test_function_gives_the_numbers_of_the_reference(case: dict) -> None:
    data = load_file(PARITY / case["file"])
    function = next((f for start, f in FUNCTIONS.items() if case["id"].startswith(start)), None)
    if function is not None:
        assert relative(function(data, case["args"]), data["output"]) <= 1e-6
        return
    state = {key.removeprefix("state."): value for key, value in data.items() if key.startswith("state.")}
    class_name = MODULES.get(case["id"], case["description"])
    module = from_torch_conv_kan(class_name, case["args"], state)
    inputs = [data[key].clone() for key in ("logits", "target", "input", "input0", "input1") if key in data]
    inputs[0].requires_grad_()
    result = module(*inputs)
    outputs = result if isinstance(result, tuple) else (result,)
    keys = [f"output.{n}" for n in range(len(outputs))] if isinstance(result, tuple) else ["output"]
    for key, output in zip(keys, outputs, strict=True):
        assert relative(output, data[key].view(output.shape)) <= 1e-5
    if "grad_input" in data:
        outputs[0].sum().backward()
        assert relative(inputs[0].grad, data["grad_input"]) <= 1e-4
    assert all(torch.equal(value, state[key]) for key, value in to_torch_conv_kan(module).items())


BLOCKS = {"padding": 1, "kernel_size": 3}
ELSEWHERE = [
    ("KAGNConv{n}DLayer", {"input_dim": 4, "output_dim": 6, "kernel_size": 5, "degree": 5, "groups": 2}),
    ("WavKANConv{n}DLayer", {"input_dim": 4, "output_dim": 6, "kernel_size": 1, "wavelet_type": "dog"}),
    ("KALNConv{n}DLayer", {"input_dim": 4, "output_dim": 6, "kernel_size": 3, "norm_layer": nn.Identity}),
    ("MoEKACNConv{n}DLayer", {"input_size": 4, "output_size": 6, "num_experts": 1, "k": 1}),
    ("MoEKAGNConv{n}DLayer", {"input_size": 4, "output_size": 6, "noisy_gating": False, "groups": 2}),
    ("MoEBottleNeckKAGNConv{n}DLayer", {"input_dim": 4, "output_dim": 6, "dropout": 0.1, **BLOCKS}),
    ("SelfKAGNtention{n}D", {"input_dim": 4, "norm_layer": nn.Identity, **BLOCKS}),
    ("SelfReLUKANtention{n}D", {"input_dim": 4, "g": 3, "k": 2, "train_ab": False, **BLOCKS}),
    ("BottleNeckSelfReLUKANtention{n}D", {"input_dim": 4, "inner_projection": 8, "groups": 2, **BLOCKS}),
    ("RoPEBottleNeckSelfKAGNtention{n}D", {"input_dim": 4, "rope_mixed": False, **BLOCKS}),
    ("KAGNFocalModulation{n}D", {"input_dim": 4, "focal_level": 3, "degree": 1, "dropout": 0.1}),
]


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize(("class_name", "args"), ELSEWHERE, ids=lambda value: str(value)[:30])
def test_other_arguments_convert_there_and_back(class_name: str, args: dict, spatial_dims: int) -> None:
    name = class_name.replace("{n}", str(spatial_dims))
    convert, _ = find(name, args)
    made = convert(spatial_dims, dict(args), {})
    state = {**spread(made.links, made.module.state_dict()), **{key: torch.zeros(1) for key in made.unused}}
    loaded = from_torch_conv_kan(name, args, state)
    x = torch.randn(3, 4, *(9, 6, 5)[:spatial_dims])
    torch.testing.assert_close(loaded(x), made.module.eval()(x), rtol=0, atol=0)
    back = to_torch_conv_kan(loaded)
    assert back.keys() == state.keys() - set(made.unused)
    assert all(torch.equal(back[key], state[key]) for key in back)


def test_the_numbers_of_a_network_s_layers_move_with_its_dropouts() -> None:
    sizes = {1: (5, 4), 3: (4, 3)}
    state = {}
    for position, (inputs, outputs) in sizes.items():
        state[f"layers.{position}.cheby_coeffs"] = torch.randn(inputs, outputs, 3)
    args = {"layers_hidden": [5, 4, 3], "degree": 2, "dropout": 0.3}
    network, x = from_torch_conv_kan("kans.KACN", args, state), torch.randn(6, 5)
    y = x
    for position in sizes:
        t = torch.arccos(torch.tanh(y)).unsqueeze(-1) * torch.arange(3)
        y = torch.einsum("bid,iod->bo", t.cos(), state[f"layers.{position}.cheby_coeffs"])
    torch.testing.assert_close(network(x), y, rtol=1e-4, atol=1e-5)


def test_arguments_that_are_missing_or_unknown_are_named() -> None:
    with pytest.raises(UsageError, match="KAGNConv1DLayer needs the argument 'output_dim'"):
        from_torch_conv_kan("KAGNConv1DLayer", {"input_dim": 2, "kernel_size": 3}, {})
    args = {"input_dim": 2, "output_dim": 2, "kernel_size": 3, "degre": 3}
    with pytest.raises(UsageError, match="does not take"):
        from_torch_conv_kan("KAGNConv1DLayer", args, {})
    with pytest.raises(UsageError, match=r"does not take \['degre'\]"):
        from_torch_conv_kan("GRAMLayer", {"in_channels": 2, "out_channels": 2, "degre": 3}, {})


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

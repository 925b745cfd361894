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

from kanseg.compat import from_torch_conv_kan, reference_gradients, to_torch_conv_kan
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

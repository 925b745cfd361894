"""Numbers of IvanDrokin/torch-conv-kan, layer by layer: outputs and all gradients, in `eval()`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

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
from torch.nn import functional as F

from kanseg.compat import from_torch_conv_kan, reference_gradients, to_torch_conv_kan
from kanseg.compat.layers import reference_layer
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


NAMED = {
    "metric_dice_soft": "train.metrics.dice",
    "metric_medseg_overlap": "train.metrics.medseg_indicators",
    "metric_medseg_hausdorff": "train.metrics.medseg_indicators",
    "schedule_p03": "get_polynomial_decay_schedule_with_warmup",
    "schedule_p1": "get_polynomial_decay_schedule_with_warmup",
}


@pytest.mark.parametrize("start", NAMED)
def test_scores_and_schedules_of_the_reference_are_made_by_name(start: str) -> None:
    class_name, listed = NAMED[start], cases("functional")
    if not isinstance(listed[0], dict):
        pytest.skip(ABSENT)
    case = next(case for case in listed if case["id"].startswith(start))
    data = load_file(PARITY / case["file"])
    order = case["args"].get("order", ["dice"])
    function = from_torch_conv_kan(class_name, {k: v for k, v in case["args"].items() if k != "order"}, {})
    if class_name.endswith("warmup"):
        found = [function(step) for step in range(len(data["output"]))]
    else:
        scores = function(data["target"], data["probabilities"])
        found = [scores[key] for key in order]
    torch.testing.assert_close(torch.tensor(found).float(), data["output"].float())


def test_scores_of_nothing_are_0() -> None:
    scores = from_torch_conv_kan("medseg_indicators", {}, {})
    empty, full = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    assert set(scores(empty, empty).values()) == {0.0, 1.0}  # specificity alone
    assert scores(full, empty)["hd95"] == scores(full, empty)["recall"] == 0
    with pytest.raises(UsageError, match="does not take 'smoth'. Did you mean 'smooth'"):
        from_torch_conv_kan("train.metrics.dice", {"smoth": 1}, {})


@pytest.mark.parametrize("name", ["KANConv2DLayer", "FastKANConv2DLayer", "KACNConv2DLayer"])
def test_grids_and_clamps_are_in_float32_also_where_the_layer_is_not(name: str) -> None:
    """Its functions in float64 over numbers of float32, for inputs far outside the grid too."""
    x = torch.linspace(-12, 12, 97, dtype=torch.float64).view(1, 1, 1, -1)
    if name.startswith("KAN"):
        knots = torch.linspace(-1 - 2 / 7, 1 + 2 / 7, 10).double()
        steps = ((x[..., None] >= knots[:-1]) & (x[..., None] < knots[1:])).double()
        widths, v = knots.float().diff().double(), x[..., None]
        rising = (v - knots[:-2]) / widths[:-1] * steps[..., :-1]
        terms = rising + (knots[2:] - v) / widths[1:] * steps[..., 1:]
        args, key = {"grid_size": 7, "spline_order": 1}, "spline_conv"
    elif name.startswith("Fast"):
        terms = torch.exp(-(((x[..., None] - torch.linspace(-2, 2, 8).double()) / (4 / 7)) ** 2))
        args, key = {}, "spline_conv"
    else:
        angle = torch.arccos(x.tanh().clamp(-1 + 1e-7, 1 - 1e-7))
        terms, args, key = (angle[..., None] * torch.arange(4)).cos(), {}, "poly_conv"
    weight = torch.randn(3, terms.shape[-1], 1, 1)
    state = {f"{key}.0.weight": weight}
    if not name.startswith("KACN"):
        state["base_conv.0.weight"] = torch.zeros(3, 1, 1, 1)
    if name.startswith("KAN"):
        state["prelus.0.weight"] = torch.ones(1)
    sizes = {"input_dim": 1, "output_dim": 3, "kernel_size": 1, "norm_layer": nn.Identity}
    layer = from_torch_conv_kan(name, {**sizes, **args}, state).double()
    expected = torch.einsum("ncxyk,ok->noxy", terms, weight[:, :, 0, 0].double())
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


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
    ("KAGNFocalModulation{n}D", {"input_dim": 4, "focal_window": 1, "focal_level": 1, "focal_factor": 1}),
    ("MoEBottleNeckKAGNConv{n}DLayer", {"input_dim": 4, "output_dim": 6, "pregate": True, **BLOCKS}),
    ("KANConv{n}DLayer", {"input_dim": 4, "output_dim": 6, "kernel_size": 3, "base_activation": "PReLU"}),
    ("FastKANConv{n}DLayer", {"input_dim": 4, "output_dim": 6, "kernel_size": 3, "base_activation": nn.Mish}),
    (
        "KAGNConv{n}DLayer",
        {"input_dim": 4, "output_dim": 6, "kernel_size": 3, "padding": "same", "dilation": 2},
    ),
]


def test_the_balance_loss_of_one_expert_is_a_row_of_one_number() -> None:
    for experts, shape in ((1, (1,)), (2, ())):
        args = {"input_size": 4, "output_size": 6, "num_experts": experts, "k": 1}
        convert, _ = find("MoEKACNConv2DLayer", args)
        _, loss = convert(2, args, {}).module.eval()(torch.randn(3, 4, 8, 8))
        assert loss.shape == shape


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


CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def gram(t: torch.Tensor, beta: torch.Tensor) -> list[torch.Tensor]:
    """P_i = t P_{i-1} - (2 n + 1) n^2 (4 n^2 - 1) / i^2 beta_n P_{i-2}, n = i - 1."""
    terms = [torch.ones_like(t), t]
    for i in range(2, len(beta)):
        n = i - 1
        terms.append(t * terms[-1] - (i + n) * n * n * (4 * n * n - 1) / i**2 * beta[n] * terms[-2])
    return terms[: len(beta)]


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (1, 2)])
def test_a_narrow_mixture_with_a_layer_before_its_gate_is_the_formula(
    size: int, stride: int, spatial_dims: int
) -> None:
    """Its gate looks at all positions, also those that a stride leaves out."""
    inputs, outputs, inner, experts, k, degree, groups = 4, 6, 2, 3, 2, 2, 2
    kernel, wide = (size,) * spatial_dims, groups * inner
    sizes = {
        "w_gate": (wide, experts),
        "w_noise": (wide, experts),
        "experts.w_gate": (wide, experts),
        "experts.w_noise": (wide, experts),
        "experts.pre_gate.base_weights": (wide, wide),
        "experts.pre_gate.grams_basis_weights": (wide, wide, degree + 1),
        "experts.pre_gate.beta_weights": (degree + 1,),
        "experts.pre_gate.norm.weight": (wide,),
        "experts.pre_gate.norm.bias": (wide,),
    }
    for e in range(experts):
        sizes[f"experts.experts.{e}.poly_weights"] = (groups, inner, inner * (degree + 1), *kernel)
        sizes[f"experts.experts.{e}.beta_weights"] = (degree + 1,)
    for g in range(groups):
        sizes[f"base_conv.{g}.weight"] = (outputs // groups, inputs // groups, *kernel)
        sizes[f"inner_proj.{g}.weight"] = (inner, inputs // groups, *[1] * spatial_dims)
        sizes[f"out_proj.{g}.weight"] = (outputs // groups, inner, *[1] * spatial_dims)
    state = {key: torch.randn(size, dtype=torch.float64) * 0.5 for key, size in sizes.items()}
    geometry = {"stride": stride, "padding": size // 2}
    args = {"input_dim": inputs, "output_dim": outputs, "kernel_size": size, "groups": groups, **geometry}
    args |= {"degree": degree, "num_experts": experts, "k": k, "min_internal": inner, "pregate": True}
    layer = from_torch_conv_kan(f"MoEBottleNeckKAGNConv{spatial_dims}DLayer", args, state)
    x = torch.randn(5, inputs, *(6, 5, 4)[:spatial_dims], dtype=torch.float64)

    conv, p = (
        CONV[spatial_dims],
        {key.removeprefix("experts.pre_gate."): value for key, value in state.items()},
    )
    parts = x.chunk(groups, 1)
    z = torch.cat([conv(part, state[f"inner_proj.{g}.weight"]) for g, part in enumerate(parts)], 1)
    pooled = z.flatten(2).mean(2)
    basis = F.silu(torch.stack(gram(torch.tanh(pooled), p["beta_weights"]), -1))
    y = torch.einsum("bld,lod->bo", basis, p["grams_basis_weights"]) + F.silu(pooled) @ p["base_weights"].T
    before = F.silu(F.layer_norm(y, (wide,), p["norm.weight"], p["norm.bias"]))
    shares, chosen = (before @ state["experts.w_gate"]).softmax(1).topk(k, 1)
    gates = torch.zeros(5, experts, dtype=torch.float64).scatter(
        1, chosen, shares / (shares.sum(1, True) + 1e-6)
    )
    mixed = 0
    for e in range(experts):
        weights, beta = (state[f"experts.experts.{e}.{name}_weights"] for name in ("poly", "beta"))
        expanded = [F.silu(torch.cat(gram(torch.tanh(part), beta), 1)) for part in z.chunk(groups, 1)]
        answer = torch.cat([conv(part, weights[g], **geometry) for g, part in enumerate(expanded)], 1)
        mixed = mixed + answer * gates[:, e].view(-1, 1, *[1] * spatial_dims)
    out = []
    for g, (part, narrow) in enumerate(zip(parts, mixed.chunk(groups, 1), strict=True)):
        sum_of_both = conv(narrow, state[f"out_proj.{g}.weight"])
        sum_of_both = sum_of_both + conv(F.silu(part), state[f"base_conv.{g}.weight"], **geometry)
        out.append(F.silu(F.instance_norm(sum_of_both)))
    variations = [v.var() / (v.mean() ** 2 + 1e-10) for v in (gates.sum(0), (gates > 0).double().sum(0))]
    found, loss = layer(x)
    torch.testing.assert_close(found, torch.cat(out, 1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss, 1e-2 * sum(variations), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_norm_of_the_channels_is_one_for_each_group(groups: int) -> None:
    args = {
        "input_dim": 4,
        "output_dim": 6,
        "kernel_size": 1,
        "groups": groups,
        "norm_layer": "timm.LayerNorm2d",
    }
    state = {"poly_weights": torch.randn(groups, 6 // groups, 8 // groups, 1, 1)}
    norms = []
    for g in range(groups):
        state[f"base_conv.{g}.weight"] = torch.randn(6 // groups, 4 // groups, 1, 1)
        norms.append(nn.LayerNorm(6 // groups, eps=1e-6))
        nn.init.normal_(norms[g].weight)
        state |= {
            f"layer_norm.{g}.weight": norms[g].weight.detach(),
            f"layer_norm.{g}.bias": norms[g].bias.detach(),
        }
    layer = from_torch_conv_kan("KALNConv2DLayer", {**args, "degree": 1}, state)
    x, y = torch.randn(2, 4, 5, 3), []
    for g, part in enumerate(x.chunk(groups, 1)):
        t = 2 * (part - part.min()) / (part.max() - part.min()) - 1
        summed = F.conv2d(part, state[f"base_conv.{g}.weight"])
        summed = summed + F.conv2d(torch.cat([torch.ones_like(t), t], 1), state["poly_weights"][g])
        y.append(F.silu(norms[g](summed.movedim(1, -1)).movedim(-1, 1)))
    torch.testing.assert_close(layer(x), torch.cat(y, 1))


@pytest.mark.parametrize(
    "act", ["Softplus", nn.Hardswish, partial(nn.LeakyReLU, 0.3), "torch.nn.PReLU"], ids=str
)
def test_any_pointwise_activation_of_torch_is_taken(act: Any) -> None:
    """By its name, as a class or as what makes one: conv(act(x)) where the functions have no weight."""
    made = getattr(nn, act.rsplit(".", 1)[-1])() if isinstance(act, str) else act()
    state = {"base_conv.0.weight": torch.randn(6, 4, 3, 3), "spline_conv.0.weight": torch.zeros(6, 32, 3, 3)}
    state |= {f"base_activation.{key}": value for key, value in made.state_dict().items()}
    args = {"input_dim": 4, "output_dim": 6, "kernel_size": 3, "base_activation": act}
    layer, x = from_torch_conv_kan("FastKANConv2DLayer", args, state), torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(layer(x), F.conv2d(made(x), state["base_conv.0.weight"]))


def test_one_learned_slope_serves_all_places_of_a_fully_connected_layer() -> None:
    """prelu(norm(prelu(phi(x)) W + prelu(x) V)) with one slope, whose gradient is the sum of all places."""
    state = {"act.weight": torch.tensor([0.3]), "beta_weights": torch.randn(4), "norm.bias": torch.randn(3)}
    state |= {"base_weights": torch.randn(3, 5), "grams_basis_weights": torch.randn(5, 3, 4)}
    state["norm.weight"] = torch.randn(3)
    args = {"in_channels": 5, "out_channels": 3, "act": "PReLU"}
    layer, x = from_torch_conv_kan("kans.GRAMLayer", args, state), torch.randn(6, 5)
    slope = state["act.weight"].clone().requires_grad_()
    basis = F.prelu(torch.stack(gram(torch.tanh(x), state["beta_weights"]), -1), slope)
    y = torch.einsum("bld,lod->bo", basis, state["grams_basis_weights"])
    y = F.layer_norm(
        y + F.prelu(x, slope) @ state["base_weights"].T, (3,), state["norm.weight"], state["norm.bias"]
    )
    expected, found = F.prelu(y, slope), layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(reference_gradients(layer)["act.weight"], slope.grad, rtol=1e-3, atol=1e-4)


def test_same_padding_is_that_of_each_axis() -> None:
    args = {"input_dim": 4, "output_dim": 6, "kernel_size": (3, 5), "padding": "same", "dilation": [2, 1]}
    layer, x = reference_layer("KANConv", 2, args), torch.randn(1, 4, 7, 8)
    assert layer(x).shape == (1, 6, 7, 8)


NORMS_OF_2D = [
    partial(nn.GroupNorm, 2),
    partial(nn.GroupNorm, 2, eps=0.1, affine=False),
    partial(nn.InstanceNorm2d, affine=True, track_running_stats=True),
    partial(nn.BatchNorm2d, eps=0.1),
]


@pytest.mark.parametrize("norm", NORMS_OF_2D, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_norm_with_arguments_of_its_own_is_one_a_group_of_the_layer(norm: partial, groups: int) -> None:
    """Against the layer without a norm and torch's norms behind it, which is the reference's formula."""
    args = {"input_dim": 4, "output_dim": 8, "kernel_size": 3, "groups": groups}
    convert, _ = find("KAGNConv2DLayer", args)
    bare = convert(2, {**args, "norm_layer": nn.Identity}, {})
    norms = nn.ModuleList(norm(8 // groups) for _ in range(groups))
    for tensor in norms.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    convolution = spread(bare.links, bare.module.state_dict())
    plain = from_torch_conv_kan("KAGNConv2DLayer", {**args, "norm_layer": nn.Identity}, convolution)
    state = {**convolution, **norms.state_dict(prefix="layer_norm.")}
    layer = from_torch_conv_kan("KAGNConv2DLayer", {**args, "norm_layer": norm}, state)
    plain.act = nn.Identity()
    x = torch.randn(3, 4, 9, 6)
    parts = zip(norms.eval(), plain(x).chunk(groups, 1), strict=True)
    torch.testing.assert_close(layer(x), F.silu(torch.cat([own(part) for own, part in parts], 1)))
    back = to_torch_conv_kan(layer)
    assert all(torch.equal(back[key], state[key]) for key in norms.state_dict(prefix="layer_norm."))


UNSUITED = {
    "norm_layer 'GroupNorm' needs the number": {"norm_layer": nn.GroupNorm},
    "norm_layer 'LocalResponseNorm' is not supported": {"norm_layer": partial(nn.LocalResponseNorm, 2)},
    "LayerNorm2d is 2D only": {"norm_layer": "LayerNorm2d"},
    "base_activation 'Softmax2d' is not supported": {"base_activation": nn.Softmax2d},
    "padding 'same' keeps the size": {"stride": 2, "padding": "same"},
    "padding must be a number": {"padding": "reflect"},
    "must be divisible by groups": {"groups": 3},
    "grid_size >= 1": {"grid_size": 0},
    "does not take these arguments": {"degree": 3},
}


@pytest.mark.parametrize("message", UNSUITED)
def test_arguments_of_a_layer_that_do_not_fit_say_why(message: str) -> None:
    args = {"input_dim": 4, "output_dim": 6, "kernel_size": 3, **UNSUITED[message]}
    with pytest.raises(UsageError, match=message) as caught:
        from_torch_conv_kan("KANConv1DLayer", args, {})
    assert "\n" not in str(caught.value)


LAYER_FUNCTIONS = {
    "kan_conv3x3": ("KANConv2DLayer", {"padding": 2, "dilation": 2}, {"dilation": 2}),
    "fast_kan_conv1x1": ("FastKANConv2DLayer", {"kernel_size": 1}, {"stride": 1}),
    "bottleneck_kagn_conv3x3": ("BottleNeckKAGNConv2DLayer", {"dim_reduction": 8}, {"l1_decay": 0.1}),
    "moe_kaln_conv3x3": ("MoEKALNConv2DLayer", {"num_experts": 3, "k": 2}, {"num_experts": 3}),
    "self_kagn_conv3x3": ("SelfKAGNtention2D", {"inner_projection": 2, "norm_layer": "InstanceNorm2d"}, {}),
}


@pytest.mark.parametrize("name", LAYER_FUNCTIONS)
def test_functions_make_the_layers_of_their_classes(name: str) -> None:
    class_name, own, given = LAYER_FUNCTIONS[name]
    sizes = ("input_size", "output_size") if "MoE" in class_name else ("input_dim", "output_dim")
    args = dict(zip(sizes, (4, 6), strict=True)) if "self" not in name else {"input_dim": 4}
    args |= {"kernel_size": 3, "padding": int("1x1" not in name), **own}
    convert, _ = find(class_name, args)
    made = convert(2, dict(args), {})
    state = {**spread(made.links, made.module.state_dict()), **{key: torch.zeros(1) for key in made.unused}}
    prefix = "module." if "l1_decay" in given else ""
    planes = {"in_planes": 4, "inner_projection": 2} if "self" in name else {"in_planes": 4, "out_planes": 6}
    other = from_torch_conv_kan(
        f"models.model_utils.{name}", {**planes, **given}, {prefix + k: v for k, v in state.items()}
    )
    one, x = from_torch_conv_kan(class_name, args, state), torch.randn(3, 4, 7, 6)
    torch.testing.assert_close(other(x), one(x), rtol=0, atol=0)


def test_the_plain_layer_takes_an_activation() -> None:
    """act(norm(conv(x)))"""
    state = {"0.weight": torch.randn(6, 2, 3, 3), "0.bias": torch.randn(6)}
    norm = nn.BatchNorm2d(6).eval()
    state |= {f"1.{key}": value for key, value in norm.state_dict().items()}
    args = {"in_planes": 4, "out_planes": 6, "groups": 2, "base_activation": nn.Tanh}
    layer, x = from_torch_conv_kan("conv3x3", args, state), torch.randn(2, 4, 5, 6)
    y = F.conv2d(x, state["0.weight"], state["0.bias"], padding=1, groups=2)
    torch.testing.assert_close(layer(x), norm(y).tanh())


def test_classes_that_take_a_class_are_the_classes_that_name_it() -> None:
    args = {"input_size": 4, "output_size": 6, "num_experts": 2, "k": 1}
    convert, _ = find("MoEKAGNConv3DLayer", args)
    state = spread((made := convert(3, dict(args), {})).links, made.module.state_dict())
    wrapped = from_torch_conv_kan("moe_kan.MoEKANConvBase", {"conv_class": "KAGNConv3DLayer", **args}, state)
    x = torch.randn(2, 4, 5, 5, 5)
    torch.testing.assert_close(wrapped(x), made.module.eval()(x), rtol=0, atol=0)
    with pytest.raises(UsageError, match="takes no KABNConv"):
        from_torch_conv_kan("MoEKANConvBase", {"conv_class": "KABNConv2DLayer", **args}, {})
    with pytest.raises(UsageError, match="Unknown layer 'Conv2d'"):
        from_torch_conv_kan("SelfKANtentionND", {"conv_kan_layer": nn.Conv2d, "input_dim": 4}, {})


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

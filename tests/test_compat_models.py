"""Networks of IvanDrokin/torch-conv-kan: its numbers in `eval()`, and its published weights as ours."""

from __future__ import annotations

import json
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from kanseg import UKANet, create_model
from kanseg.compat import from_torch_conv_kan, to_torch_conv_kan
from kanseg.compat.links import spread
from kanseg.compat.published import PUBLISHED, convert_published, write_published
from kanseg.compat.torch_conv_kan import CONVERTERS, find
from kanseg.compat.wrappers import REFUSED
from kanseg.encoders import load_encoder
from kanseg.errors import UsageError, UserError
from kanseg.layers import ConvLayer, plain_steps
from kanseg.training.checkpoint import build_model, load_checkpoint, load_weights, part

PARITY = Path(__file__).parents[1] / ".." / "shared" / "parity"


def cases() -> list[Any]:
    manifest = PARITY / "manifest.json"
    listed = json.loads(manifest.read_text())["cases"] if manifest.exists() else []
    return [pytest.param(case, id=case["id"]) for case in listed if case["kind"] == "model"]


def values(key: str, seed: int, shape: list[int], low: float, high: float) -> Tensor:
    """Weights by the rule of the parity data: SplitMix64 of crc32(seed:key) * 2^32 + index."""
    count = np.arange(int(np.prod(shape)), dtype=np.uint64)
    z = (np.uint64(zlib.crc32(f"{seed}:{key}".encode())) << np.uint64(32)) + count
    z = z + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    u = ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.float64) / 2**24
    return torch.from_numpy((low + (high - low) * u).astype(np.float32).reshape(shape))


def state_of(case: dict, data: dict[str, Tensor]) -> dict[str, Tensor]:
    stored = {key.removeprefix("state."): value for key, value in data.items() if key.startswith("state.")}
    if case["mode"] == "stored":
        return stored
    described = json.loads((PARITY / case["state_file"]).read_text())
    return {
        key: data.get(f"const.{key}", torch.zeros(entry["shape"]))
        if "const" in entry
        else values(key, case["seed"], entry["shape"], entry["lo"], entry["hi"])
        for key, entry in described.get("state", described).items()
    }


@pytest.mark.skipif(not cases(), reason="the parity data (../shared/parity) is not beside the project")
@pytest.mark.parametrize("case", cases())
def test_network_gives_the_numbers_of_the_reference(case: dict) -> None:
    data = load_file(PARITY / case["file"])
    state = state_of(case, data)
    model = from_torch_conv_kan(case["class"], case["args"], state)
    double = case["compare"] != "float32"
    dtype, suffix = (torch.float64, "64") if double else (torch.float32, "")
    with torch.no_grad():
        outputs = model.to(dtype)(data["input"].to(dtype))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    names = list(case["outputs"])
    assert len(names) == len(outputs)
    for name, output in zip(names, outputs, strict=True):
        expected = data[name + suffix]
        error = (torch.as_tensor(output) - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        assert error <= max(1e-5, 10 * case["relative_f32_noise"]), name
    back = to_torch_conv_kan(model.float())
    assert all(
        torch.equal(back[key], state[key]) for key in back if not key.endswith(("beta_weights", "tracked"))
    )


def kagn_conv3x3() -> None:
    """Stands for the reference's function of that name."""


BASIC = {"layers": [2, 2, 2, 2], "affine": True, "norm_layer": "InstanceNorm2d"}
AS_CLASSES: dict[
    str, tuple[str, dict[str, Any], tuple[str, ...]]
] = {  # case: class, arguments, case's that go
    "ukanet_ukagnet_18": (
        "models.ukanet.UKANet",
        {"block": "KAGNBasicBlock", "fcnv_kernel_size": 3, "fcnv_padding": 1, **BASIC},
        (),
    ),
    "reskanet_reskagnet18": ("models.reskanet.ResKANet", {"block": "KAGNBasicBlock", **BASIC}, ()),
    "reskanet_moe_reskalnet_18x64p": (
        "MoEResKANet",
        {
            "block": "models.reskanet.MoEKALNBasicBlock",
            "layers": [2, 2, 2, 2],
            **{"fcnv_kernel_size": 3, "fcnv_stride": 1, "fcnv_padding": 1},
        },
        (),
    ),
    "densekanet_densekagnet121_g4": ("DenseKANet", {"block_class": "_KAGNDenseBlock"}, ()),
    "densekanet_tiny_densekagnet_bn": ("TinyAutoKAGN", {"model_type": "DenseNet"}, ()),
    "u2kanet_u2kagnet_small": (
        "U2KANetSmall",
        {
            "conv_func": partial(kagn_conv3x3, degree=3),
            "conf_fun_first": kagn_conv3x3,
            "in_ch": 3,
            "out_ch": 1,
        },
        ("input_channels", "num_classes", "norm_layer"),
    ),
}
AUTO = {
    "ukanet_ukagnet_18": {"model_name": "ukagnet18"},
    "reskanet_reskagnet18": {"model_name": "reskagnet18"},
    "vggkan_vggkacn_11": {"model_name": "vggkacn"},
}
AS_CLASSES |= {f"{case} by AutoKAN": ("models.AutoKAN", args, ()) for case, args in AUTO.items()}


@pytest.mark.skipif(not cases(), reason="the parity data (../shared/parity) is not beside the project")
@pytest.mark.parametrize("name", AS_CLASSES)
def test_networks_are_also_made_by_class_and_by_wrapper(name: str) -> None:
    class_name, args, gone = AS_CLASSES[name]
    case = next(one.values[0] for one in cases() if one.id == name.removesuffix(" by AutoKAN"))
    data = load_file(PARITY / case["file"])
    own = {key: value for key, value in case["args"].items() if key not in gone}
    with torch.no_grad():
        found = from_torch_conv_kan(class_name, {**args, **own}, state_of(case, data))(data["input"])
    first, expected = found[0] if isinstance(found, tuple) else found, data[next(iter(case["outputs"]))]
    tolerance = max(1e-5, 10 * case["relative_f32_noise"])
    assert (first - expected).abs().max() <= tolerance * expected.abs().max()


def made_up(name: str, args: dict[str, Any], learned_norms: bool = False) -> dict[str, Tensor]:
    """A state_dict with the names that the reference would have."""
    conversion = CONVERTERS[name](2, dict(args), {})
    state = spread(conversion.links, conversion.module.state_dict())
    for key in list(state):
        if key.endswith("beta_weights"):
            state[key] = torch.randn(len(state[key])) * 0.01
        if key.endswith(".gamma"):
            state[key] = torch.randn(state[key].shape)
        if key.endswith("base_conv.0.weight") and learned_norms:
            channels, (layer, _, _) = len(state[key]), key.partition("base_conv")
            norms = [f"{layer}layer_norm.0."]
            norms += [layer.replace("proj_q.", "norm_layer.")] * layer.endswith("proj_q.")
            for norm in norms:
                state[f"{norm}weight"], state[f"{norm}bias"] = (
                    torch.rand(channels) + 0.5,
                    torch.randn(channels),
                )
                if name.endswith("_bn"):
                    state[f"{norm}running_mean"] = torch.zeros(channels)
                    state[f"{norm}running_var"] = torch.ones(channels)
    return {key: value.contiguous().clone() for key, value in state.items()}


NAMES = {  # of the reference, with arguments that make them small
    **{f"{family}_18x32p": {"width_scale": 1} for family in ("reskagnet", "reskalnet")},
    "fast_reskanet_18x32p": {},
    "moe_reskalnet_50x64p": {"num_experts": 2},
    "reskagnetbn_moe_18x32p": {"num_experts": 2},
    "fast_u2kanet_small": {},
    "u2kacnet_small": {},
    "ukacnet_18": {},
    "UKAGNet": {"unet_depth": 2, "unet_layers": 1, "mixer_type": "self-att", "degree": 4},
    "vgg_wav_kan": {"vgg_type": "VGG13", "expected_feature_shape": (2, 2)},
    "vggkaln": {"vgg_type": "VGG11v4", "expected_feature_shape": (1, 1), "head_type": "KAN"},
    "vggkagn": {"vgg_type": "VGG11", "expected_feature_shape": (1, 1), "head_type": "HiddenKAN", "degree": 2},
    "moe_vggkagn": {"vgg_type": "VGG11", "expected_feature_shape": (1, 1), "num_experts": 2, "k": 1},
    "densekalnet121": {"growth_rate": 2, "num_init_features": 4},
    "tiny_densekagnet": {"growth_rate": 4, "num_init_features": 8},
    "EightSimpleConvKACN": {"layer_sizes": (4,) * 8},
    "SimpleConvWavKAN": {"layer_sizes": (4,) * 4, "degree_out": 1},
    "EightSimpleMoEConvKAGNBN": {"layer_sizes": (4,) * 8, "num_experts": 2, "k": 1},
    "SixteenSimpleConvKAGN": {"layer_sizes": (4,) * 16, "stride_indexes": (2, 5), "degree_out": 1},
    "UKANet": {"block": "KACNBasicBlock", "layers": (1, 2, 1, 3)},
    "KAGNRDNet": {
        **{
            "num_init_features": 8,
            "growth_rates": (8, 8),
            "num_blocks_list": (1, 2),
            "bottleneck_width_ratio": 1,
        },
        **{"is_downsample_block": (None, False), "post_block_attention": True, "norm_layer": "BatchNorm2d"},
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_weights_go_there_and_back(name: str) -> None:
    channels = "in_chans" if name == "KAGNRDNet" else "input_channels"
    args = {channels: 3, "num_classes": 5, **NAMES[name]}
    state = made_up(name, args)
    model = from_torch_conv_kan(f"models.{name}", args, state)
    back = to_torch_conv_kan(model)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state if not key.endswith("beta_weights"))
    outputs = model(torch.randn(1, 3, 64, 64))
    assert all(
        torch.as_tensor(output).isfinite().all()
        for output in (outputs if isinstance(outputs, tuple) else [outputs])
    )


def test_a_norm_with_arguments_of_its_own_stands_in_every_layer_of_a_network() -> None:
    """Its weights look like those of an instance norm."""
    args = {"input_channels": 3, "num_classes": 5, "layer_sizes": (4,) * 8}
    plain = made_up("EightSimpleConvKACN", args)
    norms = [key.partition("poly_conv")[0] + "layer_norm.0." for key in plain if "poly_conv" in key]
    state = plain | {f"{norm}{key}": torch.rand(4) for norm in norms for key in ("weight", "bias")}
    given = {**args, "norm_layer": partial(nn.GroupNorm, 2)}
    network = from_torch_conv_kan("EightSimpleConvKACN", given, state)
    found = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert [norm.num_groups for norm in found] == [2] * 8
    for norm, message in ((nn.GroupNorm, "needs the number"), (nn.LocalResponseNorm, "is not supported")):
        with pytest.raises(UsageError, match=message):
            from_torch_conv_kan("EightSimpleConvKACN", {**args, "norm_layer": norm}, state)


def test_attention_stands_before_pools_and_last_at_once() -> None:
    args = {"input_channels": 1, "num_classes": 2, "vgg_type": "VGG11sa", "expected_feature_shape": (1, 1)}
    state = made_up("vggkagn", {**args, "last_attention": True})
    gates = [key for key in state if key.endswith(".gamma")]
    assert sorted(gates) == ["features.10.gamma", "features.13.gamma", "features.6.gamma"]


@pytest.mark.parametrize("name", ["tiny_densekagnet", "vggkan"])
def test_an_odd_end_is_dropped_where_maps_are_halved(name: str) -> None:
    args = {"input_channels": 1, "num_classes": 2}
    network = from_torch_conv_kan(name, args, made_up(name, args))
    pools = [module for module in network.modules() if hasattr(module, "ceil_mode")]
    x = torch.arange(25.0).view(1, 1, 5, 5)
    assert {tuple(pool(x).shape[2:]) for pool in pools} == {(2, 2)}


@pytest.mark.parametrize(
    ("name", "shape", "padding"),
    [
        ("ResKANet", {"block": "KACNBasicBlock", "layers": (1, 1, 1, 1)}, 3),
        ("MoEResKANet", {"block": "MoEKALNBasicBlock", "layers": (1, 1, 1, 1)}, 3),
        ("DenseKANet", {"block_class": "_KACNDenseBlock", "block_config": (1, 1)}, 3),
        ("TinyDenseKANet", {"block_class": "_KACNDenseBlock", "block_config": (1, 1)}, 2),
    ],
)
def test_the_padding_of_a_stem_does_not_go_with_its_kernel(name: str, shape: dict, padding: int) -> None:
    """The reference's default is a number, whatever the kernel is."""
    args = {"input_channels": 1, "num_classes": 2, **shape, "fcnv_kernel_size": 3}
    network = from_torch_conv_kan(name, args, made_up(name, args))
    first = next(module for module in network.modules() if isinstance(module, ConvLayer))
    assert first.conv.kernel_size == (3, 3)
    assert first.conv.padding == (padding, padding)


def test_places_without_arguments_have_their_own_defaults() -> None:
    args = {"block": "FastKANBasicBlock", "layers": (2, 1, 1, 1)}
    state = made_up("UKANet", args)
    functions = {
        key: state[f"{key}.spline_conv.0.weight"].shape[1] // channels for key, channels in GRIDS.items()
    }
    assert functions == {
        "conv1": 8,
        "layer2e.0.downsample": 8,
        "layer1e.0.conv1": 5,
        "layer1e.1.conv2": 5,
        "merge1": 8,
    }
    state = made_up("UKANet", {**args, "grid_size": 4})
    sizes = [
        state[f"{key}.spline_conv.0.weight"].shape[1] // GRIDS[key] for key in ("conv1", "layer1e.1.conv2")
    ]
    assert sizes == [4, 5]  # all blocks but the first are made without the arguments
    degrees = {"num_init_features": 8, "growth_rates": (8,), "num_blocks_list": (1,), "degree": 2}
    state = made_up("KAGNRDNet", {**degrees, "is_downsample_block": (None,)})
    kept = ("stem.stem.0", "dense_stages.0.0.dense_block0.layers.layers.1")
    assert [len(state[f"{key}.beta_weights"]) - 1 for key in kept] == [3, 2]  # the stem is of degree 3


@pytest.mark.parametrize("attention", [False, True])
def test_blocks_without_scales_are_those_with_scales_of_one(attention: bool) -> None:
    """The reference leaves `gamma` out where `ls_init_value` is not positive."""
    args = {"in_chans": 1, "num_classes": 2, **NAMES["KAGNRDNet"], "post_block_attention": attention}
    state = made_up("KAGNRDNet", args)
    gammas = [key for key in state if "dense_block" in key and key.endswith(".gamma")]
    assert len(gammas) == 3
    ones = {key: torch.ones_like(value) if key in gammas else value for key, value in state.items()}
    without = {key: value for key, value in state.items() if key not in gammas}
    x = torch.randn(1, 1, 32, 32)
    networks = [
        from_torch_conv_kan("KAGNRDNet", args, ones),
        from_torch_conv_kan("KAGNRDNet", {**args, "ls_init_value": 0}, without),
    ]
    torch.testing.assert_close(*(network(x) for network in networks), rtol=0, atol=0)
    assert set(to_torch_conv_kan(networks[1])) == set(without)


def test_the_skip_of_a_block_has_the_grid_that_its_weights_hold() -> None:
    """A block is given its 1x1 layer, which may have been made with another grid."""
    args = {"inplanes": 4, "planes": 4, "stride": 2, "grid_size": 5, "grid_range": (-1, 1)}
    grids = {"conv1": torch.linspace(-1, 1, 5), "downsample": torch.linspace(-2, 2, 5)}
    state = made_up("FastKANBasicBlock", args) | {f"{key}.rbf.grid": grid for key, grid in grids.items()}
    block = from_torch_conv_kan("FastKANBasicBlock", args, state).network
    assert block.layers[0].conv.basis.domain == (-1, 1)
    assert block.skip.conv.basis.domain == (-2, 2)


def test_a_block_keeps_a_skip_that_it_would_not_need() -> None:
    """y = conv2(conv1(x)) + downsample(x), also from 4 to 4 channels."""
    args = {"inplanes": 4, "planes": 4, "degree": 2, "norm_layer": "InstanceNorm2d"}
    plain = made_up("KACNBasicBlock", args)
    skip = {"downsample.poly_conv.0.weight": torch.randn(4, 12, 1, 1)}
    x = torch.randn(2, 4, 6, 5)
    without, block = (from_torch_conv_kan("KACNBasicBlock", args, state) for state in (plain, plain | skip))
    terms = (torch.arccos(x.tanh()).unsqueeze(2) * torch.arange(3).view(-1, 1, 1)).cos().flatten(1, 2)
    added = F.instance_norm(F.conv2d(terms, skip["downsample.poly_conv.0.weight"]))
    torch.testing.assert_close(block(x), without(x) - x + added, atol=1e-4, rtol=1e-4)


def test_a_converted_network_is_rounded_as_by_plain_convolutions() -> None:
    """Winograd's products would lose a digit, which the tolerances of the parity data do not give."""
    args = {"input_channels": 3, "num_classes": 5, "vgg_type": "VGG11v2", "expected_feature_shape": (1, 1)}
    network = from_torch_conv_kan("vggkan", args, made_up("vggkan", args))
    x, found = torch.rand(8, 3, 64, 64) * 4 - 2, {}
    with torch.no_grad():
        found["ours"] = network(x)
        with plain_steps():
            found["plain"] = network(x)
        exact = network.double()(x.double())
    error = {key: float((value - exact).abs().mean()) for key, value in found.items()}
    assert error["ours"] <= 5 * error["plain"]


GRIDS = {"conv1": 3, "layer2e.0.downsample": 8, "layer1e.0.conv1": 8, "layer1e.1.conv2": 8, "merge1": 24}


def test_layers_wrapped_by_a_penalty_are_found() -> None:
    args = {"layer_sizes": (4,) * 4, "num_classes": 5, "degree_out": 1, "input_channels": 3}
    plain = made_up("SimpleConvKALN", args)
    state = {key.replace("layers.2.", "layers.2.module."): value for key, value in plain.items()}
    x = torch.randn(1, 3, 16, 16)
    one, other = (from_torch_conv_kan("SimpleConvKALN", args, weights) for weights in (plain, state))
    assert torch.equal(one(x), other(x))


def test_foreign_weights_name_the_first_keys_that_do_not_fit() -> None:
    state = made_up("ukalnet_18", {})
    with pytest.raises(UserError, match=r"does not fit ukagnet_18: missing \['conv1.beta_weights'"):
        from_torch_conv_kan("ukagnet_18", {}, state)
    with pytest.raises(UserError, match="output.weight of ukalnet_18 has shape"):
        from_torch_conv_kan("ukalnet_18", {"num_classes": 7}, state)
    with pytest.raises(UsageError, match="Unknown class 'ukagnet_19'.*Did you mean 'ukagnet_18'"):
        from_torch_conv_kan("ukagnet_19", {}, state)


UNSUITED = {
    "does not take 'degre' here. Did you mean 'degree'": ("ukalnet_18", {"degre": 4}),
    "Unknown block 'KAGMBasicBlock'.*Did you mean 'KAGNBasicBlock'": ("UKANet", {"block": "KAGMBasicBlock"}),
    "with the blocks of two layers alone": ("UKANet", {"block": "KANBottleneck", "layers": (1,) * 4}),
    "take no dilation": (
        "ResKANet",
        {
            "block": "KANBasicBlock",
            "layers": (1, 1, 2, 1),
            "replace_stride_with_dilation": (True, False, False),
        },
    ),
    "needs the argument 'layers'": ("ResKANet", {"block": "KANBasicBlock"}),
    "Unknown block_class 'Dense'": ("DenseKANet", {"block_class": "Dense"}),
    "Unknown vgg_type 'VGG12'": ("vggkan", {"vgg_type": "VGG12"}),
    "Unknown function 'lambda_conv'": ("U2KANet", {"conv_func": "lambda_conv", "conf_fun_first": "conv3x3"}),
    "layer_sizes needs 4 numbers": ("SimpleConv", {"layer_sizes": (4, 4)}),
    "Unknown model_name 'unet'": ("AutoKAN", {"model_name": "unet"}),
    "cannot make 'u2kagnet_small' itself": ("AutoKAN", {"model_name": "u2kagnet_small"}),
    "makes no 'ResNet'": ("TinyAutoKAGN", {"model_type": "ResNet"}),
    "no counterpart here: it is made of another layer. Merge": ("kan_peft.PEFTKAGNConvNDLayer", {}),
    "no counterpart here: it is made of modules": ("models.vggkan.VGG", {}),
    "no target serves it": ("train.losses.DiceLossWithFocal", {}),
}


@pytest.mark.parametrize("message", UNSUITED)
def test_what_cannot_be_made_says_why(message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_torch_conv_kan(*UNSUITED[message], {})


NAMES_OF_REFERENCE = """
reskagnetbn_18x32p reskagnetbn_moe_18x32p reskagnet_34x32p reskagnetbn_34x32p reskagnetbn_moe_34x32p reskanet_18x32p
reskacnet_18x32p fast_reskanet_18x32p reskalnet_18x32p reskalnet_18x64p reskalnet_50x64p moe_reskalnet_50x64p
reskalnet_101x64p moe_reskalnet_101x64p reskalnet_152x64p moe_reskalnet_152x64p moe_reskalnet_18x64p reskalnet_101x32p
reskalnet_152x32p reskagnet_101x64p reskagnet_18x32p reskagnet50 reskagnet18 reskagnet101 reskagnet152 reskagnet_bn50
ukanet_18 ukalnet_18 fast_ukanet_18 ukacnet_18 ukagnet_18 ukagnetnb_18 UKANet UKAGNet ResKANet MoEResKANet DenseKANet
TinyDenseKANet U2KANet U2KANetSmall KAGNRDNet kagrdnet_tiny kagrdnet_small kagrdnet_base kagrdnet_large AutoKAN
TinyAutoKAGN VGG VGGKAN FastVGGKAN VGGKALN VGGKAGN VGGKAGN_BN MoE_VGGKAGN_BN VGGKACN MoEVGGKAGN WavVVGKAN fast_vggkan
vggkan vggkaln vggkacn vggkagn moe_vggkagn vgg_wav_kan vggkagn_bn moe_vggkagn_bn MatryoshkaHead SelfSpatialNorm
SpatialNorm FocalLoss Dice DiceLoss DiceLossWithBCE DiceLossWithFocal TverskyLoss NoiseInjection L1 L2
NoiseMultiplicativeInjection PEFTKAGNConvNDLayer PEFTVGGKAGN SixteenSimpleConvKAGN MoEKANConvBase SelfKANtentionND
RoPESelfKANtentionND KANFocalModulationND KALNBasicBlock MoEKALNBottleneck MoEBottleneckKAGNBasicBlock kan_conv1x1
""".split()
NAMES_OF_REFERENCE += [
    f"{start}dense{family}et{depth}{end}"
    for family, start, end, depths in (
        *((family, start, "", (121,)) for family, start in (("kan", ""), ("kan", "fast_"), ("kacn", ""))),
        *(
            (family, "", end, (121, 161, 169, 201))
            for family, end in (("kaln", ""), ("kagn", ""), ("kagn", "bn"))
        ),
        ("kagn", "", "moebn", (121, 161, 169, 201)),
        *((family, "tiny_", "", ("",)) for family in ("kan", "kaln", "kacn", "kagn")),
        *(("kagn", "tiny_", end, ("",)) for end in ("_bn", "_moebn")),
        ("kan", "tiny_fast_", "", ("",)),
    )
    for depth in depths
]
NAMES_OF_REFERENCE += [
    f"{start}{name}{end}"
    for name in ("u2kagnet", "u2kacnet", "u2kalnet", "u2kanet", "fast_u2kanet", "u2net", "u2kagnet_bn")
    for start, end in (("", ""), ("", "_small"))
]
NAMES_OF_REFERENCE += [
    f"{eight}Simple{name}"
    for name in "Conv ConvKAN FastConvKAN ConvKALN ConvKACN ConvKAGN ConvWavKAN MoEConvKAGNBN".split()
    for eight in ("", "Eight")
]


@pytest.mark.parametrize("name", NAMES_OF_REFERENCE)
def test_every_public_name_of_the_reference_is_known(name: str) -> None:
    if name in REFUSED or name.replace("ND", "{n}D") in REFUSED:
        with pytest.raises(UsageError, match="has no counterpart here: it"):
            find(name, {})
    else:
        find(f"models.{name}", {})


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_published_weights_become_an_ordinary_classifier(name: str, prefix: str, tmp_path: Path) -> None:
    function, chosen = PUBLISHED[name]
    args = {
        **chosen,
        "num_classes": 7,
        "degree": 4,
        "expected_feature_shape": (1, 1),
        **({"dim_reduction": 8} if function.endswith("_bn") else {}),
    }
    state = made_up(function, args, learned_norms=True)
    path = tmp_path / "weights.safetensors"
    save_file({prefix + key: value for key, value in state.items()}, path)
    reference = from_torch_conv_kan(function, args, state)
    converted, options = convert_published(path, name)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = reference(x)
        torch.testing.assert_close(converted(x), expected, atol=1e-5, rtol=1e-4)
    write_published(path, tmp_path / "model", name)
    tensors, info = load_checkpoint(tmp_path / "model" / "model.safetensors")
    again = build_model(info["model"]).eval()
    load_weights(again, part(tensors, "model"), path)
    assert torch.equal(again(x), converted(x))
    segmenter = create_model(
        "ukanet", 2, 3, 2, encoder_weights=tmp_path / "model", **_of_encoder(options)
    ).eval()
    assert torch.equal(segmenter.encoder(x)[-1], converted.encoder(x)[-1])
    assert isinstance(load_encoder(segmenter, converted), UKANet)


def _of_encoder(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in ("pool_size",)}


def test_the_published_architecture_is_recognised_or_explained(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    args = {"vgg_type": "VGG11v4", "num_classes": 3, "width_scale": 2, "expected_feature_shape": (1, 1)}
    save_file(made_up("vggkagn", args), path)
    assert write_published(path, tmp_path / "model")["options"]["encoder"] == "vggkan11v4"
    narrower = {**args, "vgg_type": "VGG11v2", "width_scale": 1}
    save_file(made_up("vggkagn", narrower), tmp_path / "v2.safetensors")
    assert write_published(tmp_path / "v2.safetensors", tmp_path)["options"]["encoder"] == "vggkan11v2"
    with pytest.raises(
        UserError, match=r"is no vgg_kagn_bn11_v4: .*missing \['features.0.inner_proj.0.weight'"
    ):
        convert_published(path, "vgg_kagn_bn11_v4")
    save_file(made_up("vggkagn_bn", args), path)
    with pytest.raises(
        UserError, match=r"is no vgg_kagn11_v2, which has none of \['features.0.inner_proj.0.weight'"
    ):
        convert_published(path, "vgg_kagn11_v2")
    with pytest.raises(UsageError, match="Unknown architecture 'vgg_kagn11_v3'. Did you mean"):
        convert_published(path, "vgg_kagn11_v3")
    save_file(made_up("vggkagn_bn", {**args, "last_attention": True}, learned_norms=True), path)
    assert write_published(path, tmp_path / "model")["options"]["encoder_options"]["attention_at"] == "last"
    save_file({"a.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"none of vgg_kagn11_v2.*its first keys are a.weight"):
        convert_published(path)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read as weights"):
        convert_published(path)

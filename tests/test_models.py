"""Networks: every listed one trains, predicts, saves and loads in 2D and 3D; published sizes; mistakes explained."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.inferers import sliding_window_inference
from monai.losses import DeepSupervisionLoss, DiceCELoss
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kanseg
from kanseg import KANConv, U2KANet, UKAGNet, UKANet, create_model, list_models
from kanseg.bases import BASES
from kanseg.errors import UsageError, UserError
from kanseg.layers import FAMILIES, FocalModulation, KANAttention, conv_layer
from kanseg.layers.kernels.rows import FORMATS, is_channels_last
from kanseg.models import check_patch, describe_model
from kanseg.models.classifier import HEADS, Classifier
from kanseg.models.table import count_flops, table_of_layers, table_of_models
from kanseg.models.u2kanet import NestedU
from kanseg.models.u_shape import resize

# Options that make each network small.
SMALL: dict[str, dict[str, Any]] = {
    "monai": {"arguments": {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)}},
    "smp": {"encoder": "resnet18", "arguments": {"decoder_channels": (8, 8, 8, 8, 8)}},
    "ukanet": {"features_per_stage": (4, 8), "encoder": "reskanet10"},
    "ukagnet": {"depth": 2, "layers": 1, "width": 0.25},
    "u2kanet": {"width": 0.25},
    "u2kanet_small": {"width": 0.25},
    "ukan": {"features": (4, 4, 8, 8), "token_layers": 1},
}
PUBLISHED_UKANETS = [name for name in list_models() if name.endswith("_18")]
NOT_FOR = {("monai", 1), ("smp", 1), ("smp", 3)}  # names and dimensions
SMALL |= {name: {"encoder_options": {"blocks_per_stage": 1, "width": 0.25}} for name in PUBLISHED_UKANETS}


def skip_where_there_is_none(name: str, dims: int) -> None:
    """Leave a test out for a network that is not made in this dimension."""
    if (name, dims) in NOT_FOR:
        pytest.skip(f"{name} has no networks in {dims}D")


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize(("dims", "size"), [(2, (32, 27)), (3, (16, 16, 9))])
def test_every_network_learns_predicts_saves_and_loads(
    name: str, dims: int, size: tuple[int, ...], tmp_path: Path
) -> None:
    skip_where_there_is_none(name, dims)
    model, other = (create_model(name, dims, 1, 3, **SMALL[name]) for _ in range(2))
    x = torch.randn(2, 1, *size)
    label = (nn.functional.avg_pool2d(x.flatten(2, -2), 3, 1, 1).view_as(x) > 0).float()
    loss_function = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(2):
        loss = loss_function(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    with torch.no_grad():
        logits = model.eval()(x)
        assert torch.equal(logits, other.eval()(x))
    assert logits.shape == (2, 3, *size)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("size", [(33,), (7, 50), (1, 1), (5, 31, 12)])
def test_every_network_takes_any_size(name: str, size: tuple[int, ...]) -> None:
    skip_where_there_is_none(name, len(size))
    model = create_model(name, len(size), 1, 2, **SMALL[name]).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 1, *size)).shape == (1, 2, *size)


@pytest.mark.parametrize("name", list_models())
def test_a_volume_of_one_slice_goes_through_sliding_windows(name: str) -> None:
    skip_where_there_is_none(name, 3)
    model = create_model(name, 3, 1, 2, **SMALL[name]).eval()
    with torch.no_grad():
        tiled = sliding_window_inference(torch.randn(1, 1, 1, 24, 20), (1, 16, 16), 1, model)
    assert torch.as_tensor(tiled).shape == (1, 2, 1, 24, 20)


@pytest.mark.parametrize("family", [*FAMILIES, "hermite", None])
@pytest.mark.parametrize("name", ["ukagnet", "u2kanet_small", "ukan"])
def test_every_family_stands_in_every_network(name: str, family: str | None) -> None:
    narrow = {"bottleneck": False} if name == "ukagnet" else {}
    model = create_model(name, 2, 1, 2, basis=family, **narrow, **SMALL[name]).eval()
    assert model(torch.randn(1, 1, 32, 32)).isfinite().all()


# Trainable parameters of torch-conv-kan's networks (3 channels in, 1 class). Ours have two numbers fewer in each Gram
# layer: factors that no output depends on.
UKAGNETS: list[tuple[dict[str, Any], int]] = [
    ({"mixer": "conv"}, 788_982),
    ({"mixer": "self-attention"}, 2_510_493),
    ({"mixer": "focal"}, 1_241_132),
    ({"mixer": "conv", "bottleneck": False}, 2_434_361),
    ({"mixer": "self-attention", "bottleneck": False}, 8_968_928),
    ({"mixer": "focal", "bottleneck": False}, 3_468_983),
    ({"depth": 5}, 3_043_334),
    ({"depth": 5, "width": 2}, 12_002_166),
    ({"depth": 5, "width": 4}, 47_944_057),
    ({"depth": 5, "bottleneck": False}, 9_808_713),
    ({"depth": 5, "bottleneck": False, "width": 4}, 156_876_873),
    ({"depth": 5, "mixer": "self-attention"}, 9_965_754),
    ({"depth": 5, "mixer": "focal"}, 4_747_542),
    ({"depth": 5, "mixer": "self-attention", "bottleneck": False}, 36_252_925),
    ({"depth": 5, "mixer": "focal", "bottleneck": False}, 13_868_897),
]
FAST = {"grid_size": 5}
U2KANETS: list[tuple[dict[str, Any], int]] = [
    ({"basis": "kagn"}, 13_747_997),
    ({"basis": "kaln"}, 13_747_549),
    ({"basis": "kacn"}, 11_000_173),
    ({"basis": "kan"}, 24_737_165),
    ({"basis": "fastkan", "layer_options": FAST}, 16_497_731),
    ({"basis": "bottleneck_kagn", "layer_options": {"dim_reduction": 8}}, 3_647_002),
    ({"basis": "kagn", "shape": "small"}, 354_109),
    ({"basis": "kaln", "shape": "small"}, 353_661),
    ({"basis": "kacn", "shape": "small"}, 283_389),
    ({"basis": "kan", "shape": "small"}, 634_861),
    ({"basis": "fastkan", "shape": "small", "layer_options": FAST}, 424_427),
]
NARROW = {"basis": "bottleneck_kagn", "layer_options": {"dim_reduction": 8}}
# Its plain one has biases before norms, on which nothing depends.
U2KANETS += [
    ({"basis": None}, 2_761_645 - 3600),
    ({"basis": None, "shape": "small"}, 73_285 - 712),
    ({**NARROW, "shape": "small", "first_kernel": 1}, 254_538),
]
# The reference builds the second block of each level without the arguments of the call, so without learned norms:
# 2 * 2 * (8 + 16 + 32 + 64) * 2 numbers, which ours have.
SECOND_BLOCKS = 960
UKANETS = [("ukanet_18", 2_094_760), ("fast_ukanet_18", 1_396_911), ("ukalnet_18", 1_164_321)]
UKANETS += [("ukagnet_18", 1_164_477), ("ukacnet_18", 931_721)]


def size_of(model: nn.Module) -> int:
    unused = 2 * sum(name.endswith("beta") for name, _ in model.named_parameters())
    return unused + sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("options", "published"), UKAGNETS)
def test_ukagnet_has_the_published_size(options: dict, published: int) -> None:
    with torch.device("meta"):
        assert size_of(UKAGNet(2, 3, 1, norm="batch", **options)) == published


@pytest.mark.parametrize(("options", "published"), U2KANETS)
def test_u2kanet_has_the_published_size(options: dict, published: int) -> None:
    with torch.device("meta"):
        assert size_of(U2KANet(2, 3, 1, **options)) == published


@pytest.mark.parametrize(("name", "published"), UKANETS)
def test_ukanet_18_has_the_published_size(name: str, published: int) -> None:
    with torch.device("meta"):
        assert size_of(create_model(name, 2, 3, 1)) == published + SECOND_BLOCKS
        # The narrow one has learned norms in its second blocks there too.
        assert size_of(create_model("ukagnetnb_18", 2, 3, 1)) == 431_618


def test_u2kanet_gives_seven_outputs_in_training() -> None:
    model = U2KANet(2, 1, 3, shape="small", width=0.25)
    outputs = model(torch.randn(2, 1, 33, 40))
    assert [tuple(o.shape) for o in outputs] == [(2, 3, 33, 40)] * 7
    assert isinstance(
        U2KANet(2, 1, 3, shape="small", width=0.25, deep_supervision=False)(torch.ones(2, 1, 9, 9)), Tensor
    )


def test_a_nested_u_is_its_skip_where_its_last_layer_is_silent() -> None:
    def plain(
        spatial_dims: int, inputs: int, outputs: int, kernel_size: int = 3, dilation: int = 1
    ) -> nn.Module:
        return nn.Conv2d(inputs, outputs, kernel_size, padding=dilation, dilation=dilation)

    nested: Any = NestedU(2, 2, 4, 6, 5, plain, plain)
    nn.init.zeros_(nested.up[-1].weight)
    nn.init.zeros_(nested.up[-1].bias)
    x = torch.randn(1, 2, 20, 23)
    assert torch.equal(nested(x), nested.enter(x))


def test_mixers_stand_in_the_decoder() -> None:
    for mixer, kind in (("self-attention", KANAttention), ("focal", FocalModulation)):
        model = UKAGNet(2, 1, 2, depth=3, layers=1, width=0.25, mixer=mixer)
        assert all(isinstance(stage.layers[0], kind) for stage in model.decoder)
        model(torch.randn(2, 1, 16, 12)).square().mean().backward()


@pytest.mark.parametrize("name", ["ukanet", "ukagnet", "ukan"])
def test_deep_supervision_gives_a_list_from_fine_to_coarse(name: str) -> None:
    options = {**SMALL[name], "deep_supervision": True}
    options |= (
        {"features_per_stage": (4, 4, 8)} if name == "ukanet" else {"depth": 4} if name == "ukagnet" else {}
    )
    outputs = create_model(name, 2, 1, 3, **options)(torch.randn(2, 1, 32, 32))
    sizes = [o.shape[-1] for o in outputs]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 32


def test_strides_by_axis_reach_ukagnet() -> None:
    model = UKAGNet(3, 1, 2, strides=(1, (1, 2, 2), 2), layers=1, width=0.25)
    assert [tuple(m.shape[2:]) for m in model.encoder(torch.randn(1, 1, 6, 16, 16))] == [
        (6, 16, 16),
        (6, 8, 8),
        (3, 4, 4),
    ]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("basis", ["gram", "fastkan", None])
def test_classifiers_train_with_every_head(head: str, basis: str | None) -> None:
    model = Classifier(
        2, 1, 5, encoder="plainkanet4", encoder_options={"layers": (4,) * 4}, head=head, basis=basis
    )
    x = torch.randn(3, 1, 16, 16)
    logits = model(x)
    nested = logits if isinstance(logits, list | tuple) else [logits]
    assert len(nested) == (5 if "tryoshka" in head else 1)
    sum(nn.functional.cross_entropy(one, torch.tensor([0, 1, 2])) for one in nested).backward()
    assert isinstance(model.eval()(x), Tensor)


def test_classifiers_work_in_3d_and_by_name() -> None:
    model = create_model(
        "classifier", 3, 1, 4, encoder="reskanet10", encoder_options={"features_per_stage": (4, 8, 8, 8)}
    )
    assert model.eval()(torch.randn(1, 1, 9, 8, 7)).shape == (1, 4)
    assert "classifier" not in list_models()


def test_one_basis_a_stage() -> None:
    model = UKANet(2, 1, 2, features_per_stage=(4, 8, 8), basis=[None, "legendre", "gram"])
    kinds = [stage[0].layers[0].conv.basis for stage in model.encoder.stages]
    assert kinds[0] is None
    assert type(kinds[1]) is not type(kinds[2])


def test_the_table_has_every_network_and_encoder_with_its_size_and_a_description() -> None:
    rows = {row["name"]: row for row in table_of_models()}
    assert gc.isenabled()
    assert set(list_models()) <= set(rows)
    assert [name for name, row in rows.items() if row["parameters_3d"] is None] == ["smp"]
    for row in rows.values():
        assert 0 < row["parameters_2d"] < (row["parameters_3d"] or math.inf) * 1.01
        assert row["description"].endswith(".")
        assert "partial" not in row["description"]
    ukanet = create_model("ukanet", 2, 1, 3)
    assert rows["ukanet"]["parameters_2d"] == sum(p.numel() for p in ukanet.parameters())
    assert describe_model("ukan").startswith("U-KAN")


@pytest.mark.parametrize("row", table_of_layers(), ids=lambda row: row["name"])
def test_the_table_of_layers_says_how_each_is_made(row: dict[str, Any]) -> None:
    thin = getattr(kanseg, row["class"]) if row["class"] else partial(KANConv, 3, basis=row["basis"])
    layer, named = thin(32, 32, **row["options"]), conv_layer(row["name"])(3, 32, 32)
    assert [w.shape for w in layer.parameters()][:1] == [w.shape for w in named.parameters()][:1]
    plain = sum(p.numel() for p in conv_layer(None)(3, 32, 32).parameters())
    assert sum(p.numel() for p in named.parameters()) == pytest.approx(row["parameters"] * plain)
    options = {"basis": row["name"], "layer_options": row["options"], "features_per_stage": (4, 8)}
    assert create_model("ukanet", 2, 1, 2, **options)(torch.zeros(1, 1, 8, 8)).isfinite().all()
    assert len(row["description"]) > 10


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ukagnet", {"mixer": "attention"}, "Unknown mixer 'attention'. Did you mean 'self-attention'"),
        ("ukagnet", {"depth": 1}, "needs depth >= 2"),
        ("ukagnet", {"strides": (1, 2), "depth": 3}, "at most as many stages as strides"),
        ("ukagnet", {"basis": "grma"}, "Did you mean 'gram'"),
        ("u2kanet", {"shape": "tiny"}, "shape large or small"),
        ("u2kanet", {"width": 0.1}, "width must be at least"),
        ("ukan", {"token_stages": 9}, "at least one convolutional"),
        ("ukanet", {"decoder": "wide"}, "Unknown decoder 'wide'"),
        ("classifier", {"head": "liner"}, "Unknown head 'liner'. Did you mean 'linear'"),
        ("classifier", {"pool": "mean"}, "Unknown pool 'mean'"),
        (
            "ukanet_18",
            {"encoder_option": {}},
            "has no option 'encoder_option'. Did you mean 'encoder_options'",
        ),
    ],
)
def test_mistakes_are_explained(name: str, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_model(name, 2, 1, 2, **options)


def test_a_patch_too_small_for_the_depth_is_refused() -> None:
    check_patch(UKAGNet(2, 1, 2, depth=3, layers=1, width=0.25), [4, 8])
    with pytest.raises(
        UsageError, match=r"coarsest map has stride \[16, 16\], the patch has \[8, 16\].*fewer stages"
    ):
        check_patch(UKAGNet(2, 1, 2, depth=5, layers=1, width=0.25), [8, 16])


@pytest.mark.parametrize(
    ("name", "options", "patch", "told"),
    [
        (
            "monai",
            {"network": "UNet", "arguments": {"channels": [2, 4, 8], "strides": [2, 2]}},
            4,
            r"\[8, 8\]",
        ),
        ("monai", {"network": "SegResNetVAE", "arguments": {"input_image_size": [32, 32]}}, 32, "another"),
        ("smp", {"network": "PAN", "encoder": "resnet18"}, 32, r"\[128, 128\]"),
        ("monai", {"network": "SwinUNETR", "arguments": {"feature_size": 12}}, 32, r"\[64, 64\]"),
    ],
)
def test_a_network_of_another_library_that_fails_on_the_patch_is_refused_before_training(
    name: str, options: dict, patch: int, told: str
) -> None:
    if options["network"] == "SwinUNETR":
        pytest.importorskip("einops")
    model = create_model(name, 2, 1, 2, **options).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=rf"{options['network']} fails on .*\[{patch}, {patch}\].* {told}"):
        check_patch(model, [patch] * 2)
    if told != "another":
        check_patch(model, [128, 128])
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_network_whose_parts_have_several_names_is_as_it_was_after_its_patch_was_checked() -> None:
    arguments = {
        "filters": [4] * 3,
        "kernel_size": [3] * 3,
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2] * 2,
    }
    model = create_model("monai", 2, 1, 2, network="DynUNet", arguments=arguments)
    x = torch.randn(1, 1, 16, 16)
    expected = model(x)
    check_patch(model, [16, 16])
    assert model.training
    torch.testing.assert_close(model(x), expected)


def test_every_basis_stands_in_ukan() -> None:
    for basis in BASES:
        assert (
            create_model("ukan", 2, 1, 2, basis=basis, **SMALL["ukan"])(torch.randn(2, 1, 32, 32))
            .isfinite()
            .all()
        )


@pytest.mark.parametrize("network", ["Unet", "FPN", "DeepLabV3Plus"])
def test_networks_of_smp_take_any_size_and_unknown_names_are_refused(network: str) -> None:
    model = create_model("smp", 2, 3, 2, network=network, encoder="resnet18").eval()
    assert model(torch.randn(1, 3, 45, 70)).shape == (1, 2, 45, 70)
    with pytest.raises(UsageError, match="Did you mean 'resnet18'"):
        create_model("smp", 2, 3, 2, network=network, encoder="resnet19")
    with pytest.raises(UsageError, match="Did you mean 'resnet18'"):
        create_model("smp", 2, 3, 2, network=network, encoder="tu-resnet19")
    with pytest.raises(UsageError, match=f"Did you mean '{network}'"):
        create_model("smp", 2, 3, 2, network=f"{network}s")
    with pytest.raises(UsageError, match="2D only"):
        create_model("smp", 3, 3, 2, network=network)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_networks_of_smp_start_from_the_encoder_s_weights_in_a_file(channels: int, tmp_path: Path) -> None:
    from segmentation_models_pytorch.encoders import get_encoder

    original = get_encoder("resnet18", weights=None)
    path = tmp_path / "pretrained.safetensors"
    save_file(original.state_dict(), path)
    chosen: dict[str, Any] = {"network": "Unet", "encoder_weights": path}
    model: Any = create_model("smp", 2, channels, 2, encoder="resnet18", **chosen).eval()
    original.set_in_channels(channels)
    x = torch.randn(1, channels, 64, 32)
    with torch.no_grad():
        for ours, theirs in zip(model.network.encoder(x), original.eval()(x), strict=True):
            torch.testing.assert_close(ours, theirs)
    with pytest.raises(UserError, match="do not fit"):
        create_model("smp", 2, channels, 2, encoder="resnet34", **chosen)
    with pytest.raises(UsageError, match="Choose one"):
        create_model("smp", 2, channels, 2, encoder="resnet18", pretrained=True, **chosen)


def test_networks_of_monai_are_padded_by_their_own_strides_alone() -> None:
    strides = [1, 2, [1, 2]]
    arguments = {"kernel_size": [3] * 3, "strides": strides, "upsample_kernel_size": strides[1:]}
    network = {"network": "DynUNet", "arguments": {**arguments, "filters": [4, 8, 8]}}
    model: Any = create_model("monai", 2, 1, 2, **network)
    assert model.divisible == (2, 4)
    assert model.eval()(torch.randn(1, 1, 7, 9)).shape == (1, 2, 7, 9)
    assert create_model("monai", 2, 1, 2, divisible=16, **SMALL["monai"]).divisible == (16, 16)


def test_a_network_of_monai_that_needs_a_package_says_so_when_it_is_made() -> None:
    """One calls the package, the other makes layers of it."""
    code = """
import sys
sys.modules["einops"] = None  # not installed
from kanseg import UserError, create_model
for network, arguments in {"SwinUNETR": {}, "UNETR": {"img_size": 32}}.items():
    try:
        create_model("monai", 2, 1, 2, network=network, arguments=arguments)
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    needs = "MONAI's {} needs einops: pip install einops"
    assert done.stdout.splitlines() == [needs.format(network) for network in ("SwinUNETR", "UNETR")]


@pytest.mark.parametrize(("family", "functions"), [(None, 1), ("gram", 4), ("bspline", 9)])
def test_flops_are_those_of_the_convolutions_as_they_are_written(family: str | None, functions: int) -> None:
    # Two for each weight and output voxel; the Gram basis starts with a constant, which needs no channel.
    made = count_flops(lambda: conv_layer(family)(3, 4, 8, 3, stride=2), (2, 4, 10, 9, 8))
    assert made == 2 * (8 * 4 * functions * 27) * (2 * 5 * 5 * 4)


@pytest.mark.parametrize(
    "options",
    [
        {"strides": 2},
        {"kan_stages": 2},
        {"encoder": None},
        {"dropout": 1.5},
        {"norm": "batchh"},
        {"features_per_stage": 32},
        {"layer_options": "abc"},
        {"basis": "wavkan", "layer_options": {"foo": 2}},
        {"layer_options": {"groups": 5}},
    ],
    ids=str,
)
def test_wrong_values_of_options_are_refused_in_one_line(options: dict) -> None:
    with pytest.raises(UsageError) as caught:
        create_model("ukanet", 2, 1, 2, **options)
    assert "\n" not in str(caught.value)


def test_a_misspelt_classifier_is_found_too() -> None:
    with pytest.raises(UsageError, match="Unknown model 'classifierr'. Did you mean 'classifier'"):
        create_model("classifierr", 2, 1, 2)


def test_our_encoders_are_known_to_smp_networks_by_name() -> None:
    model = create_model("smp", 2, 1, 2, network="FPN", encoder="kanseg-plainkanet4-gram").eval()
    assert model(torch.zeros(1, 1, 40, 50)).shape == (1, 2, 40, 50)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_gradients_reach_interpolation_in_its_own_memory(spatial_dims: int) -> None:
    """Those of one of two joined maps are a part of a larger one, with which torch's interpolation is slow."""
    x = torch.randn(2, 4, *[3] * spatial_dims, requires_grad=True)
    y = resize(x.to(memory_format=FORMATS[x.dim()]), [6] * spatial_dims)
    lying: list[bool] = []
    y.grad_fn.register_prehook(lambda grads: lying.append(is_channels_last(grads[0])))
    joined = torch.cat([y, torch.ones_like(y)], dim=1)
    weight = torch.randn_like(joined)
    (joined * weight).sum().backward()
    assert lying == [True]
    mode = {2: "bilinear", 3: "trilinear"}[spatial_dims]
    same = x.detach().clone().requires_grad_()
    (nn.functional.interpolate(same, scale_factor=2, mode=mode) * weight[:, :4]).sum().backward()
    torch.testing.assert_close(x.grad, same.grad)

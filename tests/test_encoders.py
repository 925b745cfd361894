"""Encoders: one contract for all of them, the published shapes, other libraries' encoders, and ours inside smp."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kanseg import VGGKAN, Classifier, DenseKANet, RDKANet, ResKANet, UKANet, create_model
from kanseg.encoders import (
    ENCODERS,
    PlainKANet,
    check_encoder_name,
    create_encoder,
    load_encoder,
    register_smp,
)
from kanseg.encoders.layers import network_layer
from kanseg.encoders.pretrained import ForeignEncoder
from kanseg.errors import ShapeError, UsageError, UserError
from kanseg.layers import FAMILIES, KANAttention, MixtureOfExperts, take_balance_loss
from kanseg.models.table import count_flops, count_parameters

# Options that make each encoder small, by the beginning of its name; the longest that fits counts.
SMALL: dict[str, dict[str, Any]] = {
    "reskanet": {"features_per_stage": (4, 4, 8, 8), "blocks_per_stage": 1},
    **{f"reskanet{d}x": {"width": 0.5, "blocks_per_stage": 1} for d in (18, 34, 50, 101, 152)},
    "vggkan": {"width": 0.25},
    "densekanet": {"growth": 2, "features": 4, "blocks": (1, 1, 1)},
    "rdkanet": {"features": 8, "growths": (8, 8, 8), "halving": (1, 2), "blocks": 1},
    "plainkanet4": {"layers": (4, 4, 4, 8)},
    "plainkanet8": {"layers": (4, 4, 4, 4, 4, 4, 4, 8)},
}


def small(name: str) -> dict[str, Any]:
    return SMALL[max((start for start in SMALL if name.startswith(start)), key=len)]


@pytest.mark.parametrize("name", ENCODERS.names())
def test_every_encoder_keeps_the_contract_trains_saves_and_loads(name: str, tmp_path: Path) -> None:
    for dims, size in ((2, (16, 19)), (3, (9, 16, 12))):
        encoder, other = (create_encoder(name, dims, 2, **small(name)) for _ in range(2))
        maps = encoder(torch.randn(2, 2, *size))
        assert [m.shape[1] for m in maps] == list(encoder.out_channels)
        expected = list(size)
        for m, stride in zip(maps, encoder.strides, strict=True):
            expected = [-(-n // s) for n, s in zip(expected, stride, strict=True)]
            assert all(abs(n - e) <= 1 for n, e in zip(m.shape[2:], expected, strict=True)), "strides"
            expected = list(m.shape[2:])
        sum(m.square().mean() for m in maps).backward()
        assert all(p.grad is not None for p in encoder.parameters())
        before = [p.detach().clone() for p in encoder.parameters()]
        torch.optim.AdamW(encoder.parameters(), 1e-3).step()
        assert any(not torch.equal(p, old) for p, old in zip(encoder.parameters(), before, strict=True))
        save_file(encoder.state_dict(), tmp_path / "weights.safetensors")
        other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        x = torch.randn(2, 2, *size)
        with torch.no_grad():
            again = zip(encoder.eval()(x), other.eval()(x), strict=True)
            assert all(torch.equal(ours, theirs) for ours, theirs in again)


@pytest.mark.parametrize("name", ["reskanet34", "vggkan13", "densekanet_tiny", "rdkanet_tiny", "plainkanet8"])
def test_encoders_work_on_signals(name: str) -> None:
    encoder = create_encoder(name, 1, 2, **small(name))
    assert [m.shape[1] for m in encoder(torch.randn(1, 2, 21))] == list(encoder.out_channels)


@pytest.mark.parametrize("family", [*FAMILIES, None])
@pytest.mark.parametrize("make", [ResKANet, DenseKANet, VGGKAN, RDKANet, PlainKANet])
def test_every_family_stands_in_every_encoder(make: type, family: str | None) -> None:
    options = {
        ResKANet: {"features_per_stage": (4, 8), "blocks_per_stage": 1},
        DenseKANet: small("densekanet"),
        VGGKAN: small("vggkan"),
        RDKANet: small("rdkanet"),
        PlainKANet: {"stages": ((4,), (4, 8))},
    }[make]
    maps = make(2, 1, basis=family, **options)(torch.randn(2, 1, 16, 16))
    assert all(m.isfinite().all() for m in maps)


# Its published narrow VGG, whose last convolution may be attention instead.
NARROW: dict[str, Any] = {"degree": 5, "dim_reduction": 8}
NARROW_VGG = {"basis": "bottleneck_kagn", "layer_options": NARROW}
LAST_ATTENTION = {
    "attention": "bottleneck_kagn",
    "attention_at": "last",
    "attention_options": {"gate": "skip", "scale": 1.0, "layer_options": NARROW},
}
# Its narrow DenseKANets divide the channels by 4 in layers of kernel 1 and by 8 in those of kernel 3.
NARROW_DENSE: dict[str, Any] = {
    "basis": "bottleneck_kagn",
    "encoder_options": {"inner_options": {"dim_reduction": 8}},
}
# Its RDKANets have a narrow stem whatever their layers are.
NARROW_STEM = {"head": "normed_linear", "encoder_options": {"stem_options": {"bottleneck": True}}}
# Trainable parameters of torch-conv-kan's networks (3 channels, 1000 classes). Ours have two numbers fewer in each Gram
# layer: factors that no output depends on.
PUBLISHED: list[tuple[str, dict[str, Any], int]] = [
    ("reskanet18x32p", {"basis": "kaln", "norm": "instance"}, 502_560),
    ("reskanet18x32p", {"basis": "kacn", "norm": "instance"}, 415_048),
    ("reskanet18x32p", {"basis": "kagn", "norm": "instance"}, 502_640),
    ("reskanet18x32p", {"basis": "bottleneck_kagn", "norm": "instance"}, 231_157),
    ("reskanet18x32p", {"basis": "kan", "norm": "instance"}, 852_628),
    ("reskanet18x224p", {"basis": "kagn", "norm": "instance"}, 507_440),
    ("reskanet34x32p", {"basis": "kagn", "norm": "instance"}, 941_104),
    ("reskanet50x224p", {"basis": "kagn"}, 2_101_412),
    ("reskanet101x224p", {"basis": "kagn"}, 3_587_824),
    ("reskanet152x224p", {"basis": "kagn"}, 4_812_348),
    ("densekanet121", {"basis": "kan"}, 57_374_237),
    ("densekanet121", {"basis": "kaln"}, 32_645_800),
    ("densekanet121", {"basis": "kacn"}, 26_463_720),
    ("densekanet121", {"basis": "kagn"}, 32_646_268),
    ("densekanet161", {"basis": "kagn"}, 122_312_684),
    ("densekanet169", {"basis": "kagn"}, 59_394_364),
    ("densekanet201", {"basis": "kagn"}, 84_199_868),
    ("densekanet_tiny", {"basis": "kaln", "head": "kan"}, 5_256_000),
    ("densekanet_tiny", {"basis": "kacn", "head": "kan"}, 4_225_680),
    ("densekanet_tiny", {"basis": "kagn", "head": "kan"}, 5_256_128),
    ("vggkan11", {"basis": "kaln", "norm": "instance", "pool_size": 7}, 9_155_160),
    ("vggkan11", {"basis": "kagn", "norm": "instance", "pool_size": 7}, 9_155_192),
    ("vggkan11", {"basis": "wavkan", "norm": "instance", "pool_size": 7}, 7_628_968),
    ("vggkan11v2", {"basis": "kagn", "layer_options": {"degree": 5}, "width": 2}, 24_652_420),
    ("vggkan11v4", {"basis": "kagn", "layer_options": {"degree": 5}, "width": 2}, 41_424_516),
    ("vggkan11v4", {**NARROW_VGG, "width": 2}, 7_252_115),
    ("vggkan11v4", {**NARROW_VGG, "width": 2, "encoder_options": LAST_ATTENTION}, 12_547_232),
    ("densekanet121", NARROW_DENSE, 20_328_876),
    ("densekanet_tiny", {**NARROW_DENSE, "head": "kan"}, 1_879_333),
    ("rdkanet_tiny", {"basis": "kagn", **NARROW_STEM}, 29_088_517),
    ("rdkanet_tiny", {"basis": "bottleneck_kagn", **NARROW_STEM}, 23_688_689),
]


@pytest.mark.parametrize(("encoder", "options", "published"), PUBLISHED)
def test_classifiers_have_the_published_size(encoder: str, options: dict, published: int) -> None:
    options = dict(options)
    own = dict(options.pop("encoder_options", {}))
    if "width" in options:
        own["width"] = options.pop("width")
    with torch.device("meta"):
        model = Classifier(2, 3, 1000, encoder=encoder, encoder_options=own, **options)
    unused = 2 * sum(name.endswith("beta") for name, _ in model.named_parameters())
    assert sum(p.numel() for p in model.parameters()) + unused == published


def test_classifiers_train_and_their_encoders_move_into_segmenters() -> None:
    classifier = Classifier(2, 1, 3, encoder="reskanet18x32p", encoder_options={"width": 0.5})
    x, label = torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.AdamW(classifier.parameters(), 1e-2)
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(classifier(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    segmenter = UKANet(2, 1, 2, encoder=classifier.encoder)
    assert segmenter(x).shape == (4, 2, 32, 32)
    options = {"encoder": "reskanet18x32p", "norm": "batch", "encoder_options": {"width": 0.5}}
    other = load_encoder(UKANet(2, 1, 2, **options), classifier).eval()
    classifier.eval()
    for ours, theirs in zip(other.encoder(x), classifier.encoder(x), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_of_another_norm_are_warned_about() -> None:
    source = Classifier(2, 1, 3, encoder="reskanet10", norm="batch")
    with pytest.warns(UserWarning, match="running statistics of batch norms"):
        load_encoder(UKANet(2, 1, 2, encoder="reskanet10"), source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_encoder(UKANet(2, 1, 2, encoder="reskanet10", norm="batch"), source)


def test_encoder_weights_come_from_files(tmp_path: Path) -> None:
    options: dict[str, Any] = {"encoder": "vggkan11", "norm": "batch", "encoder_options": {"width": 0.25}}
    source = Classifier(2, 1, 3, **options)
    path = tmp_path / "weights.safetensors"
    save_file({f"model.{name}": value for name, value in source.state_dict().items()}, path)
    model = create_model("ukanet", 2, 1, 2, encoder_weights=path, **options)
    for ours, theirs in zip(model.encoder.parameters(), source.encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    both = {f"average.{name}": value for name, value in source.state_dict().items()}
    both |= {f"model.{name}": value + 1 for name, value in source.state_dict().items()}
    load_encoder(model, _written(both, tmp_path / "last.safetensors"))
    for ours, theirs in zip(model.encoder.parameters(), source.encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # the average is what predicts
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    load_encoder(model, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"do not fit this VGGKAN: missing \['stages.0.0.conv.base_weight'"):
        load_encoder(model, _written({"other": torch.zeros(1)}, tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="of another shape"):
        create_model("ukanet", 2, 2, 2, encoder_weights=path, **options)
    with pytest.raises(UserError, match="There is no file"):
        load_encoder(model, tmp_path / "none.safetensors")


def _written(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file(tensors, path)
    return path


def test_files_that_hold_code_are_not_run(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(UserError, match="no plain state_dict"):
        load_encoder(nn.Linear(1, 1), tmp_path / "module.pt")


FOREIGN = [
    "timm/resnet18",
    "timm/convnext_atto",
    "timm/mobilenetv3_small_050",
    "smp/mobilenet_v2",
    "smp/mit_b0",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_encoders_of_other_libraries_train_in_ukanet(name: str) -> None:
    model = UKANet(2, 1, 3, encoder=name, bottleneck=True)
    x = torch.randn(2, 1, 70, 50)
    logits = model(x)
    assert logits.shape == (2, 3, 70, 50)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in model.decoder.parameters())
    assert {m.shape[1] for m in model.eval().encoder(x)} == set(model.encoder.out_channels)


@pytest.mark.parametrize("size", [(70, 50), (33, 17)])
@pytest.mark.parametrize(
    "name", ["timm/hrnet_w18_small", "timm/pvt_v2_b0", "timm/densenet121", "smp/mit_b0", "smp/vgg11"]
)
def test_encoders_of_other_libraries_take_any_size(name: str, size: tuple[int, int]) -> None:
    model = UKANet(2, 3, 2, encoder=name, basis=None).eval()
    with torch.no_grad():
        x = torch.rand(1, 3, *size)
        assert model(x).shape == (1, 2, *size)
        steps = torch.tensor(model.encoder.strides).cumprod(0).tolist()
        for made, step in zip(model.encoder(x), steps, strict=True):
            assert list(made.shape[2:]) == [-(-n // d) for n, d in zip(size, step, strict=True)]


@pytest.mark.parametrize(
    ("name", "multiple"),
    [
        ("timm/resnet18", 1),
        ("smp/resnet18", 1),
        ("timm/hrnet_w18_small", 32),
        ("timm/maxvit_pico_rw_256", 256),
    ],
)
def test_images_are_filled_up_only_where_a_network_needs_it(name: str, multiple: int) -> None:
    encoder = create_encoder(name, 2, 3).eval()
    assert encoder.multiple == multiple
    x = torch.rand(1, 3, 70, 50)
    with torch.no_grad():
        whole = encoder.body(nn.functional.pad(x, (0, -50 % multiple, 0, -70 % multiple)))
        for made, kept in zip(encoder(x), encoder.kept, strict=True):
            assert torch.equal(made, whole[kept][:, :, : made.shape[2], : made.shape[3]])


def test_an_encoder_for_one_size_says_which() -> None:
    encoder = create_encoder("timm/coatnet_pico_rw_224", 2, 3).eval()
    with pytest.raises(ShapeError, match="images of 224 x 224 alone, got 70 x 50"):
        encoder(torch.zeros(1, 3, 70, 50))
    with torch.no_grad():
        assert [m.shape[1] for m in encoder(torch.zeros(1, 3, 224, 224))] == list(encoder.out_channels)


@pytest.mark.parametrize("size", [(1, 1, 1), (5, 3, 2), (16, 16, 16)])
def test_dense_encoders_take_volumes_that_they_pool_to_a_voxel(size: tuple[int, int, int]) -> None:
    options = {"blocks": (1, 1, 1, 1), "growth": 4, "features": 8}
    encoder = create_encoder("densekanet121", 3, 1, basis=None, **options).eval()
    x = torch.randn(1, 1, *size)
    with torch.no_grad():
        assert [m.shape[2:] for m in encoder(x)] == [
            tuple(-(-n // step) for n in size) for step in (2, 4, 8, 16, 32)
        ]
        assert encoder.bfloat16()(x.bfloat16())[-1].dtype == torch.bfloat16


def test_transformers_come_with_their_weights(tmp_path: Path) -> None:
    import timm

    theirs = timm.create_model("vit_tiny_patch16_224")
    path = _written(theirs.state_dict(), tmp_path / "vit.safetensors")
    ours = UKANet(2, 3, 2, encoder="timm/vit_tiny_patch16_224", basis=None, encoder_weights=path).encoder.body
    found = {name.removeprefix("model."): value for name, value in ours.state_dict().items()}
    assert all(
        torch.equal(found[name], value) for name, value in theirs.state_dict().items() if name in found
    )
    assert "blocks.11.mlp.fc2.weight" in found


def test_operations_are_counted_behind_an_encoder_of_another_library() -> None:
    network = partial(UKANet, 2, 3, 2, encoder="timm/resnet18", basis=None)
    assert count_flops(network, (1, 3, 64, 64)) > 2 * 64**2  # made and run without numbers


def test_transformers_take_any_size() -> None:
    model = UKANet(2, 3, 2, encoder="timm/swin_tiny_patch4_window7_224", basis=None).eval()
    assert model(torch.randn(1, 3, 70, 50)).shape == (1, 2, 70, 50)


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/convnext_atto", "smp/resnet18"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_weights_from_a_file_compute_what_their_library_computes(
    name: str, channels: int, tmp_path: Path
) -> None:
    import timm
    from segmentation_models_pytorch.encoders import get_encoder

    library, _, theirs = name.partition("/")
    whole = timm.create_model(theirs) if library == "timm" else get_encoder(theirs, weights=None)
    path = _written(whole.state_dict(), tmp_path / "pretrained.safetensors")
    if library == "timm":
        given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}, "in_chans": channels}
        original = timm.create_model(theirs, features_only=True, **given)
    else:
        original = whole
        original.set_in_channels(channels)
    x = torch.randn(1, channels, 64, 64)
    model = UKANet(2, channels, 2, encoder=name, basis=None, encoder_weights=path).eval()
    with torch.no_grad():
        maps, expected = model.encoder(x), original.eval()(x)
    for ours, first in zip(maps, expected[-len(maps) :], strict=True):
        torch.testing.assert_close(ours, first, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="do not fit this ForeignEncoder"):
        UKANet(2, 1, 2, encoder="timm/resnet34", basis=None, encoder_weights=path)


@pytest.mark.parametrize(
    ("dims", "options", "message"),
    [
        (3, {"encoder": "timm/resnet18"}, "encoder 'timm/resnet18' is 2D only, but spatial_dims=3"),
        (3, {"encoder": "smp/resnet18"}, "encoder 'smp/resnet18' is 2D only, but spatial_dims=3"),
        (2, {"encoder": "timm/resnet19"}, "timm has no encoder 'resnet19'. Did you mean 'resnet18'"),
        (2, {"encoder": "smp/resnet19"}, "smp has no encoder 'resnet19'. Did you mean 'resnet18'"),
        (2, {"encoder": "tim/resnet18"}, "Unknown encoder library 'tim'. Did you mean 'timm'"),
        (2, {"encoder": "vgkan11"}, "Unknown encoder 'vgkan11'. Did you mean 'vggkan11'"),
        (2, {"encoder_weights": "download"}, "There are no weights of encoder 'reskanet18' to download"),
        (2, {"encoder_options": {"blok": "basic"}}, "blok"),
        (2, {"encoder_options": {"block": "basics"}}, "Unknown block 'basics'. Did you mean 'basic'"),
        (2, {"layer_options": {"groups": 3}}, "must be divisible by groups \\(=3\\)"),
        (2, {"basis": ["gram", None]}, "basis needs one entry or 4"),
    ],
)
def test_impossible_encoders_are_explained(dims: int, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_model("ukanet", dims, 1, 2, **options)


@pytest.mark.parametrize("name", ["timm/resnet18", "smp/resnet18", "smp", "smp/kanseg-plainkanet4-gram"])
def test_weights_that_cannot_be_downloaded_say_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    make: Callable[[], nn.Module] = partial(create_encoder, name, 2, 1, weights="download")
    if name == "smp":
        make = partial(create_model, name, 2, 1, 2, encoder="resnet18", encoder_weights="download")
    with pytest.raises(UserError, match=r"weights of .* could not be downloaded .*encoder_weights=FILE"):
        make()


class _OfOneSize(nn.Module):
    """A network whose positions are learnt on a grid of 14 x 14, as transformers have them: no other size fits."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 3, 16, 1)
        self.positions = nn.Parameter(torch.randn(1, 4, 14, 14))
        self.halves = nn.ModuleList(nn.Conv2d(4, 4, 3, 2, 1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = [self.patches(x) + self.positions]
        for half in self.halves:
            maps.append(half(maps[-1]))
        return maps


def test_an_encoder_for_one_size_is_given_images_of_that_size() -> None:
    """Its coarsest stride is no divisor of the size: filled up to one, the network would refuse them."""
    encoder = ForeignEncoder(3, _OfOneSize(), [0, 1, 2], [4, 4, 4], [16, 32, 64], usual=224)
    assert encoder.only == (224, 224)
    with torch.no_grad():
        maps = encoder(torch.zeros(1, 3, 224, 224))
    assert [m.shape[2] for m in maps] == [14, 7, 4]
    with pytest.raises(ShapeError, match="takes images of 224 x 224 alone, got 256 x 256"):
        encoder(torch.zeros(1, 3, 256, 256))


def test_a_network_of_timm_takes_the_size_that_its_encoder_names() -> None:
    encoder: Any = create_encoder("timm/efficientvit_m0", 2, 3).eval()  # of one size in today's timm
    size = encoder.only or (70, 50)
    with torch.no_grad():
        maps = encoder(torch.zeros(1, 3, *size))
    assert [m.shape[2:] for m in maps] == [tuple(-(-n // step) for n in size) for step in encoder.reductions]


@pytest.mark.parametrize("name", ["timm/tf_efficientnet_b0_ns", "smp/tu-tf_efficientnet_b0_ns"])
def test_former_names_of_timm_are_names(name: str) -> None:
    check_encoder_name(name, 2)


@pytest.mark.parametrize("name", ["timm/resnet19", "timm/resnet18.none", "smp/resnet19", "smp/tu-resnet19"])
def test_names_of_other_libraries_are_checked_before_anything_is_made(name: str) -> None:
    with pytest.raises(UsageError, match="Did you mean 'resnet18'"):
        check_encoder_name(name, 2)


def test_an_encoder_of_other_channels_is_refused() -> None:
    with pytest.raises(UsageError, match="The encoder has spatial_dims=2 and in_channels=1, the network"):
        UKANet(2, 3, 2, encoder=ResKANet(2, 1, features_per_stage=(4, 8)))


def test_groups_and_experts_stand_where_there_is_a_kernel() -> None:
    layer = network_layer("gram", groups=2, num_experts=3, k=1)
    assert isinstance(layer(2, 4, 4, 3), MixtureOfExperts)
    assert layer(2, 4, 4, 3).experts[0].conv.groups == 2
    assert layer(2, 4, 4, 1).conv.groups == 1
    assert layer(2, 1, 4, 3, groups=1).conv.groups == 1
    encoder = VGGKAN(2, 1, width=0.25, groups=2, num_experts=2, k=1)
    encoder(torch.randn(2, 1, 16, 16))
    assert take_balance_loss(encoder) >= 0


def test_attention_layers_take_options() -> None:
    own = {"rotary": "axial", "norm": ["batch", {"affine": False}], "layer_options": {"degree": 5}}
    encoder = VGGKAN(2, 1, width=0.25, attention="kagn", attention_at="last", attention_options=own)
    last = encoder.stages[-1][-1]
    assert last.query.conv.basis.degree == 5
    assert last.rotary is not None
    assert isinstance(last.norm, nn.BatchNorm2d)
    with pytest.raises(UsageError, match="Unknown gate 'skp'. Did you mean 'skip'"):
        VGGKAN(2, 1, width=0.25, attention="kagn", attention_options={"gate": "skp"})


def test_attention_stands_before_the_last_poolings_or_last() -> None:
    for at, stages in (("pools", [2, 3]), ("last", [4])):
        encoder = VGGKAN(2, 1, width=0.25, attention="kaln", attention_at=at)
        assert [i for i, stage in enumerate(encoder.stages) if isinstance(stage[-1], KANAttention)] == stages
        assert len(encoder(torch.randn(1, 1, 32, 32))) == 5


SMP = [
    "Unet",
    "UnetPlusPlus",
    "MAnet",
    "Linknet",
    "FPN",
    "PSPNet",
    "DeepLabV3",
    "DeepLabV3Plus",
    "UPerNet",
    "Segformer",
]


@pytest.mark.parametrize("architecture", SMP)
@pytest.mark.parametrize(
    "encoder", ["kanseg-reskanet18x224p-gram", "kanseg-vggkan11-plain", "kanseg-rdkanet_tiny-plain"]
)
def test_our_encoders_train_and_predict_inside_smp(architecture: str, encoder: str) -> None:
    import segmentation_models_pytorch as smp

    assert encoder in register_smp()
    options = {"encoder_weights": None, "in_channels": 1, "classes": 2}
    if architecture.startswith("DeepLab") and "vgg" in encoder:
        with pytest.raises(UsageError, match="has no map of stride 32 .* choose kanseg-reskanet18-plain"):
            getattr(smp, architecture)(encoder, **options)
        return
    model = getattr(smp, architecture)(encoder, **options)
    x = torch.randn(2, 1, 64, 64)
    model(x).square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.encoder.parameters())
    with torch.no_grad():
        assert model.eval()(x).shape == (2, 2, 64, 64)


def test_counting_parameters_makes_no_weights() -> None:
    assert count_parameters(lambda: nn.Linear(3, 4)) == 16

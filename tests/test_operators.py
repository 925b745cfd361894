"""The layer as one step of torch: compiled, exported, under autocast, in two processes; the numbers stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kanseg import KANConv, create_model
from kanseg.bases import BASES, Basis, create_basis
from kanseg.layers import FAMILIES, conv_layer, plain_steps
from kanseg.layers.kernels.geometry import Geometry
from kanseg.layers.kernels.recipe import Recipe, read

KAN_FAMILIES = sorted(set(FAMILIES) - {"plain"})


def numbers(model: nn.Module, call: Any, x: Tensor) -> list[Tensor]:
    """Output of `call`, gradient at x, gradients at the parameters of `model`."""
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    y = call(leaf)
    upper = (
        torch.arange(y.numel(), dtype=torch.float32).cos().view_as(y) / y.numel()
    )  # a norm would cancel squares
    y.backward(upper.to(y.dtype))
    parameters = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [y.detach(), leaf.grad, *parameters]


def assert_same(model: nn.Module, call: Any, x: Tensor, tolerance: float = 1e-5) -> None:
    """`call` gives the numbers of `model`, with all gradients."""
    for ours, theirs in zip(numbers(model, call, x), numbers(model, model, x), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-6)


@pytest.fixture(autouse=True)
def forget_compiled() -> None:
    """Every test compiles afresh."""
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("family", "spatial_dims"), [*((family, 3) for family in KAN_FAMILIES), ("kagn", 1), ("kagn", 2)]
)
def test_every_family_is_one_graph(family: str, spatial_dims: int) -> None:
    layer = conv_layer(family)(spatial_dims, 4, 6, groups=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(layer, compiled, torch.randn(2, 4, *[5, 6, 7][:spatial_dims]))


@pytest.mark.slow
def test_inductor_compiles_a_convolution_without_a_break() -> None:
    conv = KANConv(2, 4, 6)
    assert_same(conv, torch.compile(conv, fullgraph=True), torch.randn(1, 4, 9, 8))


def test_a_network_is_one_graph_with_the_operators_in_it() -> None:
    network = _small_network()
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module

    torch.compile(network, fullgraph=True, backend=backend)(torch.randn(1, 1, 16, 16))
    assert any("kanseg.expanded_conv" in target for target in seen)
    assert any("kanseg.instance_norm_act" in target for target in seen)


@pytest.mark.slow
def test_inductor_compiles_a_network() -> None:
    network = _small_network()
    assert_same(network, torch.compile(network, fullgraph=True), torch.randn(2, 1, 32, 32), 1e-3)


def _small_network() -> nn.Module:
    return create_model(
        "ukanet", spatial_dims=2, in_channels=1, out_channels=2, features_per_stage=(8, 8, 8, 8)
    )


@pytest.mark.parametrize("family", ["kagn", "fastkan", "relukan", "bottleneck_kagn"])
def test_an_exported_layer_gives_the_same_numbers_for_any_batch(family: str, tmp_path: Path) -> None:
    layer = conv_layer(family)(3, 4, 6).eval()
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    program = torch.export.export(layer, (torch.randn(2, 4, 5, 6, 7),), dynamic_shapes=(batch,))
    torch.export.save(program, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2").module()
    x = torch.randn(3, 4, 5, 6, 7)
    torch.testing.assert_close(again(x), layer(x))


@pytest.mark.parametrize("family", ["kagn", "kan", "bottleneck_kagn"])
def test_autocast_computes_the_basis_in_float32(family: str) -> None:
    layer = conv_layer(family, norm=None, act=None)(2, 4, 6)
    x = torch.randn(1, 4, 12, 12)
    exact = layer(x)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    assert call(x).dtype == torch.bfloat16
    assert (call(x) - exact).abs().max() < 1e-2 * exact.abs().max()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(numbers(layer, compiled, x), numbers(layer, call, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_step, (tmp_path,), nprocs=2)
    network, x = _network_and_batch()
    network(x).square().mean().backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for ours, parameter in zip(found, network.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)


def _network_and_batch() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [conv_layer(family)(2, 4, 4) for family in ("kagn", "kan", "relukan")]
    return nn.Sequential(*layers), torch.randn(4, 4, 8, 7)


def _train_step(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    network, x = _network_and_batch()
    parallel = nn.parallel.DistributedDataParallel(network)
    parallel(x.chunk(2)[rank]).square().mean().backward()
    torch.save([p.grad for p in network.parameters()], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("basis", ["gram", "bernstein", "relu"])
def test_the_operators_keep_torchs_rules(basis: str) -> None:
    conv = KANConv(2, 4, 6, basis=basis, groups=2)
    x = torch.randn(1, 4, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    how = (conv.recipe, Geometry((3, 3), (1, 1), (1, 1), (1, 1), 2).numbers(), torch.float32)
    learned = list(conv.basis.parameters())
    torch.library.opcheck(
        torch.ops.kanseg.expanded_conv.default, (x, None, conv.base_weight, conv.basis_weight, learned, *how)
    )
    y, weight, bias, below = (torch.randn(n, requires_grad=True) for n in ((2, 4, 5, 6), 4, 4, 4))
    y = y.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(torch.ops.kanseg.instance_norm_act.default, (y, weight, bias, below, 1e-5, "prelu"))


@pytest.mark.parametrize("norm", [None, ("instance", {"affine": True})])
def test_a_second_derivative_is_refused_and_says_what_to_do(norm: Any) -> None:
    layer = conv_layer("kagn", norm=norm)(2, 2, 2)
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="recompute=False"):
        torch.autograd.grad(first.square().sum(), x)
    kept = conv_layer("kagn", norm=norm, recompute=False)(2, 2, 2)
    kept.load_state_dict(layer.state_dict())
    (first,) = torch.autograd.grad(kept(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    with plain_steps():
        y = layer(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first.square().sum(), x)[0], second)


@pytest.mark.parametrize("name", ["ukanet", "ukan"])
def test_a_network_has_second_derivatives_in_plain_steps(name: str) -> None:
    """As the differences of its gradients, all of its parts in float64."""
    small: dict[str, Any] = {"ukanet": {"features_per_stage": (4, 8)}, "ukan": {"features": (4, 4, 8)}}
    network = create_model(name, 2, 1, 2, **small[name]).double().eval()
    x = torch.randn(1, 1, 9, 8, dtype=torch.float64, requires_grad=True)
    with plain_steps():
        assert torch.autograd.gradcheck(network, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(network, x, fast_mode=True)


@pytest.mark.parametrize("name", BASES.names())
def test_a_basis_is_what_its_recipe_says(name: str) -> None:
    basis = create_basis(name, channels=3)
    text = Recipe(basis, nn.GELU(), nn.SiLU(), basis.constant).written()
    assert text is not None
    recipe, x = read(text), torch.randn(7, 3)
    tensors = [*basis.parameters(), *basis.buffers()]
    expected = [
        nn.functional.gelu(x),
        *map(nn.functional.silu, basis.of(x)[int(basis.constant is not None) :]),
    ]
    for ours, theirs in zip(recipe(tensors, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_basis_that_no_string_tells_takes_the_long_way() -> None:
    class Own(Basis):
        def functions(self, t: Tensor) -> list[Tensor]:
            return [t, self.bend(t)]

    basis = Own(2)
    basis.bend = lambda t: t**2
    conv = KANConv(2, 3, 4, basis=basis)
    kept = KANConv(2, 3, 4, basis=basis, recompute=False)
    kept.load_state_dict(conv.state_dict())
    assert conv.recipe is None
    x = torch.randn(1, 3, 6, 6)
    for ours, theirs in zip(numbers(conv, conv, x), numbers(kept, kept, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_empty_and_odd_inputs() -> None:
    layer = conv_layer("kagn")(2, 4, 6)
    assert layer(torch.zeros(0, 4, 8, 8)).shape == (0, 6, 8, 8)
    x = torch.randn(2, 8, 9, 10)[:, ::2, ::2, 1:]
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    assert layer(torch.full((1, 4, 5, 5), float("nan"))).isnan().any()

"""Layers under what users do around a call: freezing, hooks, other defaults, tracing, wrong input, own bases."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kanseg.bases import Basis
from kanseg.errors import UsageError
from kanseg.layers import FAMILIES, KANConv, MixtureOfExperts, conv_layer, plain_steps

ALL = [*sorted(FAMILIES), None]
IDS = {"ids": str}
INSTANCE = ("instance", {"affine": True})


def made(family: str | None, dims: int = 2, channels: int = 8, **options: Any) -> Any:
    torch.manual_seed(0)
    return conv_layer(family, **options)(dims, channels, 16)


def image(dims: int = 2, channels: int = 8, size: int = 17) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, channels, *[size] * dims)


def gradients(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    y = layer(x)
    y.backward(torch.arange(y.numel(), dtype=torch.float32).cos().view_as(y).to(y.dtype))
    return {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ALL, **IDS)
def test_frozen_parts_leave_the_other_gradients_as_they_are(family: str | None) -> None:
    layer, x = made(family), image()
    whole = gradients(layer, x)
    for frozen in whole:
        layer.get_parameter(frozen).requires_grad_(False)
        found = gradients(layer, x)
        assert found.keys() == whole.keys() - {frozen}
        for name, grad in found.items():
            torch.testing.assert_close(
                grad, whole[name], rtol=1e-4, atol=1e-4 * float(whole[name].abs().max())
            )
        layer.get_parameter(frozen).requires_grad_(True)


def test_a_frozen_base_does_not_lend_its_gradient_to_a_basis_of_one_function() -> None:
    layer = KANConv(2, 8, 8, basis="legendre", degree=0)
    whole = gradients(layer, image())
    layer.base_weight.requires_grad_(False)
    torch.testing.assert_close(gradients(layer, image())["basis_weight"], whole["basis_weight"])


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("family", ALL, **IDS)
def test_the_default_type_of_torch_is_not_the_layers(family: str | None, default_dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32)
    layer, x = made(family), image()
    wanted, grads = layer(x), gradients(layer, x)
    torch.set_default_dtype(default_dtype)
    torch.testing.assert_close(layer(x), wanted)
    for name, grad in gradients(layer, x).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ALL, **IDS)
@pytest.mark.parametrize("shape", [(1, 7, 32, 32), (1, 16, 32, 32), (8, 32, 32), (1, 8, 32), (1, 8, 9, 9, 9)])
def test_another_shape_than_the_layers_is_refused(family: str | None, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"expected an input of shape \(N, 8, H, W\), got \("):
        made(family)(torch.zeros(shape))


def test_a_map_smaller_than_the_kernel_is_refused_and_so_are_numbers_that_make_none() -> None:
    with pytest.raises(UsageError, match="smaller than the kernel"):
        KANConv(3, 16, 16, padding=0)(torch.zeros(1, 16, 2, 300, 300))
    for wrong in ({"kernel_size": 0}, {"stride": 0}, {"dilation": 0}, {"padding": -1}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            KANConv(2, 4, 4, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ALL, **IDS)
def test_saved_tensors_may_come_back_in_other_memory(family: str | None) -> None:
    layer, x = made(family), image(size=32)
    wanted = gradients(layer, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
        found = gradients(layer, x)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()))


@pytest.mark.parametrize("family", ALL, **IDS)
@pytest.mark.parametrize("options", [{}, {"dropout": 1e-9}, {"recompute": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layers_of_half_precision_run(
    family: str | None, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    layer, x = made(family, **options), image(size=8)
    wanted = layer(x)
    found = layer.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_kernel_1_with_padding_on_some_axes_has_the_shape_of_torch(dims: int) -> None:
    padding = [0, 1, 0][-dims:] if dims > 1 else [1]
    torchs = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, 4, 1, stride=2, padding=padding)
    x = torch.zeros(1, 3, *[8] * dims)
    assert conv_layer("kagn")(dims, 3, 4, 1, stride=2, padding=padding)(x).shape == torchs(x).shape


@pytest.mark.parametrize("family", ALL, **IDS)
@pytest.mark.parametrize("frozen", [True, False])
def test_tangents_are_those_of_differences(family: str | None, frozen: bool) -> None:
    layer, x = made(family).eval().double().requires_grad_(not frozen), image(size=6).double()
    way, step = torch.randn_like(x), 1e-6
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, way))
        found = torch.autograd.forward_ad.unpack_dual(y).tangent
    expected = (layer(x + step * way) - layer(x - step * way)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ALL, **IDS)
@pytest.mark.parametrize("options", [{}, {"num_experts": 3, "noisy": False}], ids=str)
def test_vmap_makes_an_ensemble_of_one_parameter(family: str | None, options: dict[str, Any]) -> None:
    layer, x = made(family, **options).eval(), image(size=6)
    for name, parameter in layer.named_parameters():
        several = torch.stack([parameter, 1.1 * parameter]).detach()

        def call(given: Tensor, name: str = name) -> Tensor:
            return torch.func.functional_call(layer, {name: given}, (x,))

        torch.testing.assert_close(
            torch.vmap(call)(several), torch.stack([*map(call, several)]), rtol=1e-3, atol=1e-4
        )


EDITED = [("kagn", {"dropout": 0.1}), ("bottleneck_kagn", {}), ("bottleneck_relukan", {"dropout": 0.1})]
EDITED += [("fastkan", {"dropout": 0.1}), ("wavkan", {}), ("kan", {"norm": ("group", {"num_groups": 2})})]


@pytest.mark.parametrize(("family", "options"), EDITED)
def test_what_is_edited_before_the_backward_pass_gives_no_wrong_gradient(
    family: str, options: dict[str, Any]
) -> None:
    """Steps that are made again would read the new numbers."""
    x = image()
    for edited in dict(made(family, **options).named_parameters()):
        layer, other = made(family, **options), made(family, **options)
        torch.manual_seed(2)
        wanted = gradients(layer, x)
        torch.manual_seed(2)
        y = other(x)
        with torch.no_grad():
            other.get_parameter(edited).mul_(0.3)
        try:
            y.backward(torch.arange(y.numel(), dtype=torch.float32).cos().view_as(y))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
            continue
        for name, parameter in other.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "options"), EDITED)
def test_weights_may_be_trained_while_the_backward_pass_runs(family: str, options: dict[str, Any]) -> None:
    """A step a parameter as soon as its gradient is there, as in torch's tutorial on memory."""
    layer, x = made(family, **options), image()
    torch.manual_seed(2)
    wanted = gradients(layer, x)
    expected = {name: p.detach() - 0.1 * wanted[name] for name, p in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(_step)
    torch.manual_seed(2)
    gradients(layer, x)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-4, atol=1e-4)


def _step(parameter: Any) -> None:
    with torch.no_grad():
        parameter.sub_(0.1 * parameter.grad)


@pytest.mark.parametrize("name", ["down_weight", "inner.basis_weight"])
def test_spectral_norm_is_the_same_when_steps_are_made_again(name: str) -> None:
    found = []
    for recompute in (True, False):
        layer, x = made("bottleneck_kagn", recompute=recompute), image()
        owner, _, weight = f"conv.{name}".rpartition(".")
        nn.utils.parametrizations.spectral_norm(layer.get_submodule(owner), weight)
        found.append(gradients(layer, x))
    for name, grad in found[1].items():
        torch.testing.assert_close(found[0][name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()))


def test_an_activation_in_place_inside_another_reads_its_input_once() -> None:
    act = nn.Sequential(nn.LeakyReLU(0.1, inplace=True), nn.Tanh())
    layer, x = made("kagn", norm=None, act=act), image()
    y = layer(x)
    (found,) = torch.autograd.grad(y.sum(), layer.conv.base_weight)
    z = layer.conv(x)
    plain = torch.tanh(nn.functional.leaky_relu(z, 0.1))
    (expected,) = torch.autograd.grad(plain.sum(), layer.conv.base_weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ALL, **IDS)
def test_many_gradients_at_once_are_refused_and_right_in_plain_steps(family: str | None) -> None:
    layer, x = made(family).eval(), image(size=17).requires_grad_()
    y = layer(x)
    several = torch.randn(2, *y.shape)
    with pytest.raises(RuntimeError, match="plain_steps"):
        torch.autograd.grad(y, x, several, is_grads_batched=True, retain_graph=True)
    expected = torch.stack([torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in several])
    with plain_steps():
        y = layer(x)
    (found,) = torch.autograd.grad(y, x, several, is_grads_batched=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ALL, **IDS)
def test_a_traced_layer_gives_the_same(family: str | None) -> None:
    layer, x = made(family).eval(), image()
    traced = torch.jit.trace(layer, x)  # with gradients, and checked without them
    with torch.no_grad():
        torch.testing.assert_close(traced(x.flip(0)), layer(x.flip(0)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ALL, **IDS)
def test_gradients_by_torch_func_are_those_of_autograd(family: str | None) -> None:
    layer, x = made(family, norm=INSTANCE), image(size=6)
    parameters = dict(layer.named_parameters())

    def loss(given: dict[str, Tensor]) -> Tensor:
        y = torch.func.functional_call(layer, given, (x,))
        return (y * torch.arange(y.numel(), dtype=torch.float32).cos().view_as(y)).sum()

    wanted = gradients(layer, x)
    for name, grad in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-3 * float(wanted[name].abs().max()))


@pytest.mark.parametrize("family", ALL, **IDS)
@pytest.mark.parametrize("options", [{}, {"norm": "batch"}, {"dropout": 0.5}], **IDS)
@pytest.mark.parametrize("training", [True, False])
def test_steps_are_made_again_as_they_were(family: str | None, options: dict, training: bool) -> None:
    """Between the passes lent tensors (`functional_call`) are taken back, and the mode may change."""
    layer, lender, x = made(family, **options), made(family, **options), image(size=6)
    for part in layer.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(part.running_var, 0.5, 2)
    lent = {name: t.detach().clone() for name, t in layer.state_dict().items()}
    for name, parameter in layer.named_parameters():
        lent[name].requires_grad_(parameter.requires_grad)
    for parameter in lender.parameters():
        nn.init.normal_(parameter)
    own = {name: t.clone() for name, t in lender.state_dict().items()}

    def between(given: Tensor) -> Tensor:
        y = torch.func.functional_call(lender.train(training), lent, (given,))
        lender.train(not training)
        return y

    torch.manual_seed(2)
    wanted = gradients(layer.train(training), x)
    torch.manual_seed(2)
    y = between(x)
    y.backward(torch.arange(y.numel(), dtype=torch.float32).cos().view_as(y))
    for name, grad in wanted.items():
        torch.testing.assert_close(
            lent[name].grad, grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()), msg=name
        )
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(lent[name], buffer)
    assert lender.training is not training
    assert all(torch.equal(t, own[name]) for name, t in lender.state_dict().items())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("family", ALL, **IDS)
def test_dropout_of_an_empty_batch_says_nothing(family: str | None) -> None:
    layer = made(family, dropout=0.5)
    assert all(not grad.any() for grad in gradients(layer, image()[:0]).values())


@pytest.mark.parametrize("family", ALL, **IDS)
def test_an_unknown_place_of_dropout_is_refused(family: str | None) -> None:
    with pytest.raises(UsageError, match="Unknown dropout_at 'inputs'. Did you mean 'input'"):
        conv_layer(family, dropout=0.5, dropout_at="inputs")(2, 4, 4)


def test_dropout_of_a_bare_convolution_acts() -> None:
    with pytest.raises(UsageError, match="Unknown dropout_at 'output'"):
        KANConv(2, 4, 4, dropout=0.5, dropout_at="output")
    layer, x = KANConv(2, 8, 8, basis=None, dropout=0.9), image()
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("family", ["kagn", "wavkan", None], **IDS)
def test_parts_in_another_precision_give_the_same(family: str | None) -> None:
    layer, x = made(family, norm=INSTANCE, act="prelu"), image()
    wanted, grads = layer(x), {name: grad.clone() for name, grad in gradients(layer, x).items()}
    layer.norm.double()
    layer.act.double()
    if family == "wavkan":
        layer.conv.scale.data = layer.conv.scale.double()
    torch.testing.assert_close(layer(x).float(), wanted, rtol=1e-4, atol=1e-4)
    layer.zero_grad(set_to_none=True)
    for name, grad in gradients(layer, x).items():
        torch.testing.assert_close(
            grad.float(), grads[name], rtol=1e-3, atol=1e-3 * float(grads[name].abs().max())
        )


def test_what_a_hook_keeps_of_the_convolution_is_not_overwritten() -> None:
    layer, x, kept = made("kagn"), image(), []
    wanted = layer.conv(x).detach()
    layer.conv.register_forward_hook(lambda module, given, y: kept.append(y))
    with torch.no_grad():
        layer(x)
    assert torch.equal(kept[0], wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", INSTANCE], ids=["batch", "instance"])
def test_hooks_of_the_backward_pass_leave_gradients_as_they_are(norm: Any, training: bool) -> None:
    network = nn.Sequential(made("kagn", norm=norm), nn.Conv2d(16, 1, 1)).train(training)
    x = image()[:1]  # of a single sample, hooks leave other strides
    wanted = gradients(network, x)
    for part in (network[0].conv, network[0].norm, network[0].act, network[0]):
        seen: list[Any] = []
        hook = part.register_full_backward_hook(lambda module, lower, upper, seen=seen: seen.append(upper[0]))
        found = gradients(network, x)
        hook.remove()
        assert len(seen) == 1
        for name, grad in found.items():
            torch.testing.assert_close(
                grad, wanted[name], rtol=1e-4, atol=1e-4 * float(wanted[name].abs().max())
            )


NOISY = {"dropout": 0.1, "mixture": partial(MixtureOfExperts, num_experts=3, k=2)}


@pytest.mark.parametrize(
    ("family", "options"), [*((family, {}) for family in ALL), ("bottleneck_kagn", NOISY)], ids=str
)
def test_hooks_see_each_call_of_a_part_once(family: str | None, options: dict[str, Any]) -> None:
    layer = made(family, norm="batch", **options)
    calls: list[str] = []
    for name, part in layer.named_modules():
        part.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    y = layer(image().requires_grad_())
    forward = len(calls)
    y.sum().backward()
    assert {"norm", "act"} <= set(calls)
    assert len(calls) == len(set(calls)) == forward  # none again in the backward pass


@pytest.mark.parametrize("family", ALL, **IDS)
def test_weight_and_bias_are_numbers_to_those_who_initialise_by_name(family: str | None) -> None:
    for part in made(family).modules():
        for name in ("weight", "bias"):
            assert isinstance(getattr(part, name, None), Tensor | None)


def test_activations_in_place_leave_the_input_to_the_basis() -> None:
    options = {"base_act": ("leakyrelu", {"inplace": True, "negative_slope": 0.1})}
    layer, x = made("kan", norm=None, act=None, **options), image()
    before = x.clone()
    layer(x.requires_grad_()).sum().backward()
    assert torch.equal(x, before)
    conv = layer.conv
    expanded = torch.cat([nn.functional.leaky_relu(x, 0.1).unsqueeze(2), conv.basis(x)], 2).flatten(1, 2)
    torch.testing.assert_close(layer(x), conv.convolve(expanded, conv.joint_weight()), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- bases of one's own


def basis_class(power: int, settings: Any = (1.0, 0.5)) -> type[Basis]:
    """A class of the same name each time: x^power times numbers that its settings hold."""

    class Mine(Basis):
        def __init__(self) -> None:
            super().__init__(num_functions=2)
            self.settings, self._power = settings, power
            self.gain = nn.Parameter(torch.ones(1))

        def functions(self, z: Tensor) -> list[Tensor]:
            assert isinstance(self.settings, tuple)
            return [self.gain * number * z**self._power for number in self.settings]

    return Mine


def test_a_class_that_is_defined_anew_is_another() -> None:
    x = image()
    layers = [KANConv(2, 8, 8, basis=basis_class(power)(), base=False) for power in (1, 2)]
    for layer in layers:
        torch.testing.assert_close(layer(x), layer.expand_and_convolve(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(layers[0].basis(x), layers[1].basis(x))


def test_parametrisations_of_a_basis_count() -> None:
    class Twice(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 2 * value

    layer, x = KANConv(2, 8, 8, basis="gram"), image()
    with torch.no_grad():
        layer.basis.beta.copy_(torch.tensor(np.linspace(0.1, 0.5, layer.basis.beta.numel())))
    before = layer(x)
    parametrize.register_parametrization(layer.basis, "beta", Twice())
    torch.testing.assert_close(layer(x), layer.expand_and_convolve(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(layer(x), before, atol=1e-3)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("family", ALL, **IDS)
def test_an_empty_batch_has_gradients_of_zero(family: str | None, dims: int, kernel_size: int) -> None:
    layer = conv_layer(family)(dims, 16, 16, kernel_size)
    dirt = [torch.full((n,), 7e30) for n in (16 * 16 * 9, 16 * 80 * 9, 16 * 64 * 27, 16 * 16 * 27) * 3]
    del dirt  # memory that is not empty
    x = torch.zeros(0, 16, *[24 if dims < 3 else 12] * dims, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 16, *x.shape[2:])
    assert x.grad is not None
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("basis", ["gram", "legendre", "bernstein", "fourier", "bspline"])
def test_branches_of_different_precision_are_joined_in_the_larger(basis: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = KANConv(2, 16, 16, basis=basis), torch.randn(1, 16, 24, 24)
    expected = layer(x)
    layer.basis_weight.data = layer.basis_weight.data.to(dtype)
    found = layer(x)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()


@pytest.mark.parametrize("family", ALL, **IDS)
def test_numbers_that_are_no_floats_or_elsewhere_are_refused(family: str | None) -> None:
    layer, x = made(family), image()
    for wrong in (x.to(torch.int64), x.to(torch.complex64), x.to("meta")):
        with pytest.raises(
            UsageError, match=f"floating point numbers on cpu.*got {wrong.dtype} on {wrong.device}"
        ):
            layer(wrong)
    with pytest.raises(UsageError, match="expected floating point numbers on meta"):
        layer.to("meta")(x)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("family", ALL, **IDS)
def test_layers_without_memory_tell_their_shapes(family: str | None, dims: int) -> None:
    layer = made(family, dims).to("meta")
    y = layer(image(dims).to("meta").requires_grad_())
    y.sum().backward()
    assert (y.shape, y.device.type) == ((2, 16, *[17] * dims), "meta")


def test_dropout_of_the_input_reaches_a_basis_whose_input_is_normalised() -> None:
    layer, x = conv_layer("fastkan", base=False, dropout=0.5, dropout_at="input")(2, 8, 8).train(), image()
    assert not torch.equal(layer(x), layer(x))
    whole = conv_layer("fastkan", dropout=1.0, dropout_at="input")(2, 8, 8).train()
    expected = whole.eval()(torch.zeros_like(image()))
    torch.testing.assert_close(whole.train()(image()), expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("family", ["kagn", "wavkan", None], **IDS)
def test_dropout_takes_whole_channels(family: str | None, dims: int) -> None:
    dropout = made(family, dims, dropout=0.5).train().conv.dropout
    kept = dropout(torch.ones(4, 8, *[5] * dims)).flatten(2)
    assert torch.equal(kept.amin(2), kept.amax(2))
    assert set(kept.unique().tolist()) == {0.0, 2.0}

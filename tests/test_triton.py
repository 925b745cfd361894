"""The Triton kernels without a GPU: interpreted, and compiled ahead of time; with one: the numbers of float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kanseg import UKANet
from kanseg.layers import conv_layer
from kanseg.layers.kernels import conv_operator, gpu, norm_act, slabs
from kanseg.layers.kernels.rows import channels_last

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
PRODUCTS = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}  # what multiplies matrices on each architecture
LAYERS: dict[str, dict[str, Any]] = {
    **{
        basis: {"basis": basis}
        for basis in ("kagn", "kan", "fastkan", "kaln", "kacn", "kajn", "kabn", "relukan", "grkan")
    },
    **{basis: {"basis": basis} for basis in ("bottleneck_kagn", "fourier", "mexican_hat", "morlet", "dog")},
    **{
        f"shared {basis}": {"basis": basis, "shared_by": 4, "base": False}
        for basis in ("gram", "fourier", "bspline", "morlet")
    },
}


@needs_triton
def test_the_interpreter_gives_the_numbers_of_float64() -> None:
    """In a new process, since the interpreter must be chosen before the kernels are imported."""
    tests = Path(__file__).with_name("interpreted_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tests.parents[1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


class Compiled(NamedTuple):
    """A kernel as it would be launched."""

    name: str
    assembler: str
    stack: int  # bytes a thread keeps in memory because it has too few registers


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Compiled]]:
    """Layers on the CPU compile for a GPU what they would launch there, and leave their results undefined."""
    knobs = pytest.importorskip("triton.knobs")
    if not Path(knobs.nvidia.cuobjdump.path).exists():
        pytest.skip("this Triton has no cuobjdump")
    found: list[Compiled] = []

    def launch(
        kernel: Any, grid: tuple[int, ...], *arguments: Any, registers: int | None = None, **constants: Any
    ) -> None:
        limit = {} if registers is None else {"maxnreg": registers}
        made = kernel.warmup(*arguments, grid=grid, **constants, **limit)
        (tmp_path / "kernel").write_bytes(made.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / "kernel"]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        stack = int(usage.partition("STACK:")[2].split()[0])
        found.append(Compiled(kernel.fn.__name__, made.asm["ptx"], stack))

    pretend(monkeypatch, launch)
    from triton.runtime import driver

    before = driver._active  # where there is no GPU this is None, which `set_active` does not take
    yield found
    driver._active = before


def pretend(monkeypatch: pytest.MonkeyPatch, launch: Callable[..., None]) -> None:
    """Let the kernels serve the tensors of the CPU, by another `launch`."""
    monkeypatch.setattr(gpu, "launch", launch)
    monkeypatch.setattr(gpu, "serves", lambda *tensors: True)
    monkeypatch.setattr(gpu, "_multiprocessors", lambda device: 132)


class NoGPU:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # what is compiled is kept by this number

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_for(
    architecture: int, layer_of: dict[str, Any], dtype: torch.dtype, kernel_size: int, channels: int = 32
) -> None:
    """Forward and backward of a layer."""
    from triton.runtime import driver

    driver.set_active(NoGPU(architecture))
    layer = conv_layer(**layer_of)(3, channels, channels, kernel_size)
    x = channels_last(torch.randn(2, channels, 8, 8, 8)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x)
    y.sum().backward()


@needs_triton
@pytest.mark.parametrize("architecture", PRODUCTS)
def test_kagn_compiles_without_spills(architecture: int, compiled: list[Compiled]) -> None:
    compile_for(architecture, {"basis": "kagn"}, torch.bfloat16, 3)
    around = [
        "prepare",
        "add_constant",
        "moments",
        "normalise",
        "sums",
        "lead_back",
        "prepare",
        "contract",
        "unfold",
    ]
    assert [kernel.name for kernel in compiled] == around
    assert not any(kernel.stack for kernel in compiled), [(kernel.name, kernel.stack) for kernel in compiled]
    expansion = compiled[0].assembler
    assert "st.global.v4" in expansion, "the expansion is not stored 16 bytes at a time"


@needs_triton
@pytest.mark.parametrize("architecture", PRODUCTS)
def test_kernel_one_is_a_product_on_tensor_cores(architecture: int, compiled: list[Compiled]) -> None:
    compile_for(architecture, {"basis": "kagn"}, torch.bfloat16, 1)
    (product,) = [kernel for kernel in compiled if kernel.name == "pointwise"]
    assert PRODUCTS[architecture] in product.assembler
    assert product.stack == 0


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("architecture", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("family", LAYERS)
def test_every_family_compiles_without_spills(
    family: str, kernel_size: int, dtype: torch.dtype, architecture: int, compiled: list[Compiled]
) -> None:
    compile_for(architecture, LAYERS[family], dtype, kernel_size)
    assert "contract" in {kernel.name for kernel in compiled}
    if kernel_size == 1 and dtype == torch.bfloat16:
        products = [kernel.assembler for kernel in compiled if kernel.name == "pointwise"]
        assert products
        assert all(PRODUCTS[architecture] in assembler for assembler in products)
    assert not any(kernel.stack for kernel in compiled), [(kernel.name, kernel.stack) for kernel in compiled]


class Waits(TorchDispatchMode):
    """Notes what waits for the GPU or comes from the memory of the CPU, and cannot be recorded."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "equal", "lift_fresh", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        if func.overloadpacket.__name__ in self.OPERATIONS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_triton
@pytest.mark.parametrize("family", LAYERS)
def test_passes_of_a_network_can_be_recorded(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation of a training step waits for the GPU: here on the CPU, with kernels that do nothing."""
    launched = []
    pretend(monkeypatch, lambda kernel, *arguments, **constants: launched.append(kernel))
    for module in (conv_operator, norm_act):
        monkeypatch.setattr(module, "plain_eager", lambda x: True)  # as without a mode that watches
    options = dict(LAYERS[family])
    network = UKANet(3, 1, 2, basis=options.pop("basis"), features_per_stage=(4, 8), layer_options=options)
    x = torch.zeros(1, 1, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        network(x)  # some numbers are found once
        with Waits() as watch:
            network(x).sum().backward()
    assert launched
    assert watch.seen > 50
    assert not watch.found


def test_triton_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANSEG_TRITON", "0")
    gpu.available.cache_clear()
    try:
        assert gpu.available() is None
        assert gpu.described().startswith("none")
    finally:
        gpu.available.cache_clear()


def test_without_triton_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton that cannot be imported is no Triton."""
    monkeypatch.setitem(sys.modules, "triton", None)
    gpu.available.cache_clear()
    monkeypatch.setattr(gpu, "_capable", lambda device: True)
    try:
        assert not gpu.serves(torch.zeros(1))
        assert conv_layer("kagn")(2, 2, 2)(torch.zeros(1, 2, 4, 4)).shape == (1, 2, 4, 4)
    finally:
        gpu.available.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_gpu_gives_the_numbers_of_float64(
    family: str, kernel_size: int, spatial_dims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu.serves(torch.zeros(1, device="cuda"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    layer = conv_layer(**LAYERS[family])(spatial_dims, 32, 32, kernel_size).cuda()
    exact = conv_layer(**LAYERS[family], recompute=False)(spatial_dims, 32, 32, kernel_size).double().cuda()
    exact.load_state_dict({key: value.double() for key, value in layer.state_dict().items()})
    x = torch.randn(2, 32, *[33] * spatial_dims, device="cuda")
    cotangent = torch.randn_like(x)
    expected = _numbers(exact, x.double(), cotangent.double())
    for slab in (slabs.LEAST_OF_GPU, 2**20):  # all at once, and a few planes at a time
        monkeypatch.setattr(slabs, "slab_bytes", lambda device, slab=slab: slab)
        for ours, theirs in zip(_numbers(layer, x, cotangent), expected, strict=True):
            assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()


def _numbers(layer: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(leaf)
    y.backward(cotangent)
    return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]

"""Accelerators other than CUDA's (MPS, XPU, ...) take torch's own steps: tried on one that is made here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from shutil import which
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

NAME = "other"
OPTIONS: list[dict[str, Any]] = [{}, {"stride": 2}, {"groups": 2}, {"norm": "batch"}]


def build(folder: Path) -> Path:
    """Compile the device; the module of python in it is called accelerator."""
    from torch.utils.cpp_extension import include_paths, library_paths

    made = folder / f"accelerator{sysconfig.get_config_var('EXT_SUFFIX')}"
    headers = [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    libraries = [part for path in library_paths() for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    flags = ["-O0", "-std=c++20", "-shared", "-fPIC", "-w"]
    source = Path(__file__).with_name("accelerator.cpp")
    linked = [f"-l{name}" for name in ("torch", "torch_cpu", "c10", "torch_python")]
    subprocess.run(["c++", *flags, *headers, source, "-o", made, *libraries, *linked], check=True)
    return made


def register(library: str) -> None:
    """Make it a device of torch in this process."""
    spec = importlib.util.spec_from_file_location("accelerator", library)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    torch.utils.rename_privateuse1_backend(NAME)
    module: Any = ModuleType(NAME)
    module.is_available = module.is_initialized = lambda: True
    module.device_count, module.current_device, module._is_in_bad_fork = lambda: 1, lambda: 0, lambda: False
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.device = torch.device
    torch._register_device_module(NAME, module)


def passes(layer: nn.Module, x: Tensor, device: str) -> list[Tensor]:
    """The output, and the gradients of its weighted sum."""
    layer.to(device).zero_grad()
    given = x.to(device, copy=True).requires_grad_()
    output = layer(given)
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape).to(device)).sum().backward()
    assert output.device.type == device
    grads = [p.grad for p in layer.parameters() if p.grad is not None]
    return [t.detach().cpu().clone() for t in (output, given.grad, *grads)]


def compare(library: str) -> None:
    """Every family on that device and on the CPU."""
    register(library)
    from kanseg import UKANet
    from kanseg.layers import FAMILIES, conv_layer
    from kanseg.layers.kernels import gpu

    assert not gpu.serves(torch.zeros(1, device=NAME))
    torch.manual_seed(0)
    cases = [
        (conv_layer(family)(dims, 4, 6, **options), torch.randn(2, 4, *[7] * dims))
        for family in FAMILIES
        for dims in (1, 2, 3)
        for options in OPTIONS
    ]
    cases += [(layer, x.to(memory_format=torch.channels_last)) for layer, x in cases if x.dim() == 4]
    cases.append((UKANet(3, 1, 2, features_per_stage=(4, 8)), torch.randn(1, 1, 16, 16, 16)))
    for layer, x in cases:
        here, there = passes(layer, x, "cpu"), passes(layer, x, NAME)
        largest = max(float(t.abs().max()) for t in here)  # some gradients are nothing but rounding
        for ours, expected in zip(there, here, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5 * largest)
    layer, x = cases[0]
    with torch.autocast(NAME, torch.bfloat16):
        layer.to(NAME)(x.to(NAME))
    print(len(cases), "alike")


@pytest.mark.slow
@pytest.mark.skipif(which("c++") is None, reason="no C++ compiler")
def test_another_accelerator_gives_the_numbers_of_the_cpu(tmp_path: Path) -> None:
    """In a process of its own, since a device cannot be taken back."""
    call = [sys.executable, __file__, str(build(tmp_path))]
    run = subprocess.run(call, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "alike" in run.stdout


if __name__ == "__main__":
    compare(sys.argv[1])

"""The sets of kernels that there are here, one after the other, for tests that compare them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from kanseg.layers.kernels import native

BUILT = sorted(Path(native.__file__).parent.glob("_native*.so"))
BACKENDS = ("eager", *native.INSTRUCTION_SETS)


def kernels(name: str) -> Any:
    """What `native.library` gives for a backend; the test is skipped where it cannot run."""
    if name == "eager":
        return None
    if not BUILT:
        pytest.skip("the extension is not built here (no compiler at installation)")
    loaded = ctypes.CDLL(str(BUILT[0]))
    if native.INSTRUCTION_SETS.index(name) > loaded.kanseg_instruction_set():
        pytest.skip(f"this processor has no {name}")
    return native.Kernels(loaded, name)

"""What the benchmark of the layers measures, and tests bound: memory of inference, bytes kept for the backward pass."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_path = Path(__file__).parents[1] / "pipelines" / "benchmarks" / "layers.py"
_spec = importlib.util.spec_from_file_location("benchmark_layers", _path)
assert _spec is not None
assert _spec.loader is not None
_benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_benchmark)

inference_peak, saved_bytes = _benchmark.inference_peak, _benchmark.saved

"""kanseg: medical image segmentation with Kolmogorov-Arnold networks, from a folder of scans to masks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public names and where they live; loaded when first asked for, so that `import kanseg` stays instant.
_HOMES = {
    "KANConv": "kanseg.layers",
    "ConvLayer": "kanseg.layers",
    "ResKANet": "kanseg.encoders",
    "DenseKANet": "kanseg.encoders",
    "VGGKAN": "kanseg.encoders",
    "RDKANet": "kanseg.encoders",
    "FocalModulation": "kanseg.layers",
    "KANAttention": "kanseg.layers",
    "KANLinear": "kanseg.layers",
    "KANMLP": "kanseg.layers",
    "MixtureOfExperts": "kanseg.layers",
    "UKANet": "kanseg.models",
    "UKAGNet": "kanseg.models",
    "U2KANet": "kanseg.models",
    "UKAN": "kanseg.models",
    "Classifier": "kanseg.models",
    "create_model": "kanseg.models",
    "list_models": "kanseg.models",
    "Segmenter": "kanseg.segmenter",
    "UserError": "kanseg.errors",
    "UsageError": "kanseg.errors",
}
_LAYERS = "KANConv FastKANConv KALNConv KACNConv KAGNConv KAGNV2Conv KAJNConv KABNConv ReLUKANConv WavKANConv".split()
_LAYERS += ["GRKANConv", "BottleneckKAGNConv", "BottleneckReLUKANConv"]
_HOMES |= {f"{name}{dims}d": "kanseg.layers.families" for name in _LAYERS for dims in (1, 2, 3)}
_MODULES = (
    "bases",
    "compat",
    "config",
    "data",
    "encoders",
    "evaluation",
    "inference",
    "layers",
    "models",
    "training",
)

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"kanseg.{name}")
    raise AttributeError(f"module 'kanseg' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_MODULES])

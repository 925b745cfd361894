"""Which parameters a training changes, and at what share of the learning rate: by shell patterns and by layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from kanseg.errors import UsageError, did_you_mean
from kanseg.study.peft import PLACE


def parameter_groups(
    model: nn.Module, scales: Mapping[str, float] | None = None, decay: float | None = None
) -> list[dict[str, Any]]:
    """Parameters that are trained, as groups {"params", "lr_scale"}, one for each share of the learning rate.

    Args:
        scales: shell pattern of parameter names -> share; the last one that fits counts.
        decay: each layer (a stage, as the names tell it: "encoder.stages.2") learns at `decay` times the rate of the
            next, in the order of the model's definition; the last at the full rate.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers = list(dict.fromkeys(layer_of(name) for name, _ in model.named_parameters()))
    shares = {name: (decay or 1.0) ** (len(layers) - 1 - layers.index(layer_of(name))) for name in names}
    for pattern, scale in (scales or {}).items():
        shares |= {name: scale for name in matching(model, pattern) if name in shares}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in shares:
            groups.setdefault(shares[name], []).append(parameter)
    return [{"params": parameters, "lr_scale": share} for share, parameters in groups.items()]


def layer_of(name: str) -> str:
    """The stage that a parameter belongs to: its name up to the first number, else up to the first point.

    >>> layer_of("encoder.stages.2.0.conv.weight"), layer_of("stem.weight")
    ('encoder.stages.2', 'stem')
    """
    parts = name.partition(PLACE)[0].split(".")  # what lies beside a weight belongs to its stage
    number = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def matching(model: nn.Module, pattern: str) -> list[str]:
    """Names of the parameters that a shell pattern fits; `UsageError` if there is none."""
    names = [name for name, _ in model.named_parameters()]
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        if any(name.startswith(f"{pattern}.") for name in names):
            raise UsageError(f"No parameter is called '{pattern}'. For all below it, say '{pattern}.*'.")
        layers = dict.fromkeys(f"{layer_of(name)}.*" for name in names)
        raise UsageError(f"No parameter fits the pattern '{pattern}'.{did_you_mean(pattern, layers)}")
    return found


def shares_of(texts: Sequence[str]) -> dict[str, float]:
    """The share of the learning rate by pattern, of texts PATTERN=SHARE; `UsageError` for a share below 0.

    >>> shares_of(["encoder.*=0.1"])
    {'encoder.*': 0.1}
    """
    shares = {}
    for text in texts:
        pattern, _, share = text.rpartition("=")
        try:
            shares[pattern] = float(share)
        except ValueError:
            shares[pattern] = -1.0
        if not 0 <= shares[pattern] < float("inf"):
            raise UsageError(f"training.lr_scale '{text}' needs a share of 0 or more, e.g. '{pattern}=0.1'.")
    return shares


def check_trained(model: nn.Module, frozen: Sequence[str], scales: Mapping[str, float]) -> None:
    """Raise `UsageError` for a pattern that fits nothing, or where patterns leave no parameter to train."""
    shares = {name: 1.0 for name, parameter in model.named_parameters() if parameter.requires_grad}
    for pattern, share in {**scales, **dict.fromkeys(frozen, 0.0)}.items():
        shares |= {name: share for name in matching(model, pattern) if name in shares}
    if not any(shares.values()):
        said = f"training.freeze={list(frozen)}" + (f" and lr_scale={dict(scales)}" if scales else "")
        raise UsageError(f"{said} leaves no parameter to train.")


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop the training of all parameters that a pattern fits; `UsageError` if nothing is left to train."""
    frozen = {name for pattern in patterns for name in matching(model, pattern)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"training.freeze={list(patterns)} leaves no parameter to train.")


def trained_share(model: nn.Module) -> str:
    """How much of a network is trained, in words: "41,234 of 1,820,460 numbers"."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return f"{sum(n for n, wanted in counts if wanted):,} of {sum(n for n, _ in counts):,} numbers"


def rest_frozen(model: nn.Module) -> None:
    """Put norms whose parameters are all frozen into `eval()`: their running statistics stay as well."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and hasattr(module, "running_mean") and not any(p.requires_grad for p in own):
            module.eval()

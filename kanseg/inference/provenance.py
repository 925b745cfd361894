"""How label maps came to be, for their headers; `kanseg.data.images.read_provenance` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kanseg import __version__
from kanseg.config import InferenceConfig
from kanseg.data.digests import file_digest
from kanseg.data.images import read_provenance
from kanseg.data.plan import Plan
from kanseg.inference.postprocess import Rule


def by_networks(plan: Plan, digests: Sequence[str], rules: Sequence[Rule] = (), **how: Any) -> dict[str, Any]:
    """Of a prediction: the networks, and the settings that its numbers depend on.

    Args:
        digests: SHA-256 of the checkpoint of each network.
        how: options of `kanseg.inference.logits.whole_logits`.
    """
    given = {key: value for key, value in how.items() if key in InferenceConfig.model_fields}
    return {
        "kanseg": __version__,
        "network": plan.model,
        "trained on": plan.dataset_name,
        "models": list(digests),
        **InferenceConfig(**given).model_dump(),
        "post-processing": list(rules),
    }


def by_combination(kind: str, label_maps: Sequence[Path]) -> dict[str, Any]:
    """Of several label maps as one: how ("vote" or "probability"), and what the header of each tells of itself."""
    parts = [{"sha256": file_digest(file), **read_provenance(file)} for file in label_maps]
    return {"kanseg": __version__, "combined by": kind, "label maps": parts}

"""A trained model with fewer functions, saved as a model of its own, and what that does to its label maps and time."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kanseg.data.unlabelled import find_images
from kanseg.errors import UsageError, UserError
from kanseg.inference.agreement import agreement, seconds_a_window
from kanseg.inference.classify import is_classifier
from kanseg.inference.ensemble import Ensemble, Loaded, save_members
from kanseg.inference.windows import windows_of
from kanseg.study import merge, prune, pruned_share, simplify
from kanseg.study.visualize import kan_layers


def prune_model(
    model: Path, images: Path, out: Path, *, share: float = 0.0, within: float = 0.0
) -> dict[str, Any]:
    """Write a model without some of its learned functions to the folder `out`; each of several networks is pruned.

    Args:
        images: what says which functions count: a file or folder, see `kanseg.inference.windows`. Label maps before and
            after are compared on all of them.
        share: of the learned functions of each layer, which become 0, see `kanseg.study.prune`.
        within: what layers may change by when they get fewer functions, see `kanseg.study.simplify`; this comes first.

    Returns:
        {"out", "networks": for each {"simplified": what `simplify` gives, "share": of functions that are 0}, "layers":
        with learned functions, "parameters" and "seconds_a_window" {"before", "after"}, "agreement": see
        `kanseg.inference.agreement`}.

    Raises:
        UsageError: nothing asked for, a classifier, or no layers with learned functions.
        UserError: no model that segments, or one of several plans.
    """
    if not (share or within):
        raise UsageError(
            "Say what may go: --share of the functions, or --within of a layer's output, or both."
        )
    if is_classifier(model):
        raise UsageError(f"Pruning goes by label maps, and {model} is a classifier, which makes none.")
    loaded = Loaded([model])
    if len(loaded.plans) > 1:
        raise UserError(f"{model} has networks of {len(loaded.plans)} plans. Prune each by itself.")
    if loaded.before:
        raise UserError(f"{model} is a cascade of two networks. Prune a model of one stage.")
    if out.is_file() or any(out.resolve() in file.resolve().parents for file in loaded.files):
        raise UsageError(f"-o {out} is to be a folder of its own for the pruned model.")
    plan, network = loaded.plan, loaded.networks[0]
    cases = find_images(images, channels=len(plan.channel_names), names=plan.channel_names)
    windows, before, told = windows_of(cases, plan), copy.deepcopy(network), []
    for member in network.members if isinstance(network, Ensemble) else [network]:
        changed = simplify(member, windows, within) if within else []
        merge(prune(member, share, windows))
        told.append({"simplified": [asdict(one) for one in changed], "share": pruned_share(member)})
    found = agreement(before, network, cases, plan)
    save_members(out, network, loaded.infos, loaded.rules)
    both = {"before": before, "after": network}
    return {
        "out": str(out),
        "networks": told,
        "layers": len(kan_layers(network)) // len(told),
        "parameters": {when: sum(p.numel() for p in one.parameters()) for when, one in both.items()},
        "seconds_a_window": seconds_a_window(both, windows[0]),
        "agreement": found,
    }

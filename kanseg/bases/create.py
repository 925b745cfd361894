"""How a basis is made by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from kanseg.bases.basis import BASES, Basis
from kanseg.bases.groups import SharedFunction
from kanseg.errors import UsageError, unknown_option


def create_basis(
    basis: str | Basis | Callable[..., Basis], channels: int | None, *, shared_by: int = 0, **options: Any
) -> Basis:
    """A basis by name or constructor, or the given one.

    Args:
        channels: used by bases that keep parameters a channel.
        shared_by: groups of channels that share one learned function of the basis each, see `SharedFunction`; 0: none.
    """
    if isinstance(basis, Basis):
        return basis
    if shared_by:
        return SharedFunction(create_basis(basis, None, **options), shared_by, channels)
    entry = BASES.get(basis) if isinstance(basis, str) else basis
    parameters = inspect.signature(entry).parameters.values()
    known = [one.name for one in parameters if one.name != "channels" and one.kind is not one.VAR_KEYWORD]
    for option in options:
        if isinstance(basis, str) and option not in known:
            raise unknown_option(f"basis '{basis}'", option, known)
    try:
        return entry(channels=channels, **options)
    except TypeError as error:
        raise UsageError(f"basis '{basis}' does not take these options: {options} ({error})") from error

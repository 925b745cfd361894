"""How a basis is made by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    if isinstance(basis, str):
        _check_options(basis, options)
    try:
        return entry(channels=channels, **options)
    except TypeError as error:
        raise UsageError(f"basis '{basis}' does not take these options: {options} ({error})") from error


def _check_options(basis: str, options: Iterable[str]) -> None:
    """Raise `OptionError` for an option that a basis does not name; one that takes any is asked itself."""
    parameters = BASES.parameters(basis)
    known = [name for name in parameters if name != "channels"]
    unknown = [option for option in options if option not in known]
    if unknown and all(one.kind is not one.VAR_KEYWORD for one in parameters.values()):
        raise unknown_option(f"basis '{basis}'", unknown[0], known)

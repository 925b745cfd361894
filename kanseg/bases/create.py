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
    """A basis by name or constructor, or the given one, which takes no options.

    Args:
        channels: used by bases that keep parameters a channel.
        shared_by: groups of channels that share one learned function of the basis each, see `SharedFunction`; 0: none.
    """
    if shared_by < 0:
        raise UsageError(f"shared_by must be the number of groups, 0 for none, got {shared_by}")
    if shared_by:
        return SharedFunction(create_basis(basis, None, **options), shared_by, channels)
    if isinstance(basis, Basis):
        if options:
            raise UsageError(f"The basis is made already; options {sorted(options)} come too late for it.")
        return basis
    entry = BASES.get(basis) if isinstance(basis, str) else basis
    if isinstance(basis, str):
        _check_options(basis, options)
    try:
        return entry(channels=channels, **options)
    except TypeError as error:
        raise UsageError(f"basis '{basis}' does not take these options: {options} ({error})") from error


def check_left_aside(options: Iterable[str]) -> None:
    """Raise `OptionError` for an option that no basis has: a plain layer leaves those of bases aside."""
    known = {name for basis in BASES for name in BASES.parameters(basis)} | {"shared_by"}
    for option in options:
        if option not in known:
            raise unknown_option("A plain layer", option, known - {"channels"})


def _check_options(basis: str, options: Iterable[str]) -> None:
    """Raise `OptionError` for an option that a basis does not name; one that takes any is asked itself."""
    parameters = BASES.parameters(basis)
    known = [name for name in parameters if name != "channels"]
    unknown = [option for option in options if option not in known]
    if unknown and all(one.kind is not one.VAR_KEYWORD for one in parameters.values()):
        raise unknown_option(f"basis '{basis}'", unknown[0], known)

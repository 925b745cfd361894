"""Errors that speak to the user: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave (files, values): one clear message, exit code 1, no traceback."""


class UsageError(UserError):
    """A mistake in how kanseg was called (options, names, config keys): exit code 2."""


class OptionError(UsageError):
    """An option that a basis, model or loss does not have; what surrounds a basis may know better what was meant."""

    option: str
    known: tuple[str, ...]


class ShapeError(UsageError, RuntimeError):
    """A tensor that a layer does not take; torch's own layers raise RuntimeError for it."""


@contextmanager
def refused_options(what: str, *others: type[Exception]) -> Iterator[None]:
    """Say which options a constructor refused: its TypeError, ValueError or one of `others` becomes a `UsageError`."""
    kinds: tuple[type[Exception], ...] = (TypeError, ValueError, *others)
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        said = " ".join(str(error).split())
        raise UsageError(f"{what} cannot be made with these options: {said}") from error


def unknown_option(owner: str, option: str, known: Iterable[str]) -> OptionError:
    """The error that names the nearest of the known options."""
    names = tuple(known)
    error = OptionError(f"{owner} has no option '{option}'.{did_you_mean(option, names)}")
    error.option, error.known = option, names
    return error


def one_line(error: Exception) -> str:
    """What an error says, in one line; of ITK's many lines the last one that does not guess at errno."""
    if getattr(error, "strerror", None):
        return str(error.strerror)  # type: ignore[attr-defined]
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Reason:" not in line]
    if not lines:
        return type(error).__name__
    return lines[-1] if isinstance(error, RuntimeError) else " ".join(lines)


def counted(number: int, what: str) -> str:
    """A number of things in words.

    >>> counted(1, "fold"), counted(2, "fold")
    ('1 fold', '2 folds')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def each(reasons: Mapping[Any, object], what: str = "") -> str:
    """What is said of several things, in words.

    >>> each({0: "It is damaged.", 2: "the disk is full"}, "fold ")
    'fold 0: It is damaged; fold 2: the disk is full'
    """
    return "; ".join(f"{what}{name}: {str(reason).rstrip('.')}" for name, reason in reasons.items())


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """A sentence with the nearest known name, or the list of known names.

    >>> did_you_mean("grma", ["gram", "legendre"])
    " Did you mean 'gram'? Known: gram, legendre."
    """
    known = sorted(str(option) for option in options)
    if not known:
        return " None is known."
    plain = {option.lower(): option for option in known}
    nearest = difflib.get_close_matches(str(name).lower(), plain, n=1, cutoff=0.5)
    hint = f" Did you mean '{plain[nearest[0]]}'?" if nearest else ""
    return f"{hint} Known: {', '.join(known)}."

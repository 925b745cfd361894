"""One registry class; the tables of bases, encoders, models, losses and optimizers are its instances."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from kanseg.errors import UsageError, did_you_mean

T = TypeVar("T", bound=Callable[..., Any])


OPTIONS_OF = {"encoder_options": "encoder", "layer_options": "basis"}


class Preset(partial[Any]):
    """Other defaults of a constructor; what is given as a dictionary goes into the default one, key by key.

    None in its place takes the default away, and options of a part are those of the default part alone (`OPTIONS_OF`).
    """

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        for key, default in self.keywords.items():
            part = OPTIONS_OF.get(key, "")
            if part in kwargs and kwargs[part] != self.keywords.get(part):
                kwargs.setdefault(key, None)
            elif isinstance(default, dict) and kwargs.get(key) is not None:
                kwargs[key] = {**default, **kwargs[key]}
        return super().__call__(*args, **kwargs)


class Registry:
    """Names to constructors. A new entry is one decorated class or function.

    >>> shapes = Registry("shape")
    >>> _ = shapes.register("square")(lambda side: side**2)
    >>> shapes.create("square", 3)
    9
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Callable[..., Any]] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator: make the object available under each of `names`; a name is taken once."""

        def add(entry: T) -> T:
            for name in names:
                if name in self._entries:
                    raise ValueError(f"{self.kind} '{name}' is registered twice")
                self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> Callable[..., Any]:
        """The entry of that name; an unknown name raises `UsageError` with the nearest one."""
        if name not in self._entries:
            raise UsageError(f"Unknown {self.kind} '{name}'.{did_you_mean(name, self._entries)}")
        return self._entries[name]

    def create(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the entry of that name."""
        return self.get(name)(*args, **kwargs)

    def preset(self, name: str, entry: Callable[..., Any], description: str, **defaults: Any) -> None:
        """Make an object available under a further name, with other defaults (see `Preset`)."""
        made = Preset(entry, **defaults)
        made.__doc__ = description
        self.register(name)(made)

    def describe(self, name: str) -> str:
        """The first sentence of the entry's documentation."""
        return (inspect.getdoc(self.get(name)) or "").partition("\n")[0]

    def parameters(self, name: str) -> dict[str, inspect.Parameter]:
        """What the entry takes by name."""
        return dict(_signature(self.get(name)).parameters)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


@functools.cache
def _signature(entry: Callable[..., Any]) -> inspect.Signature:
    """Asked for with every layer of a network, and slow to make."""
    return inspect.signature(entry)

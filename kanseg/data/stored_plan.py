"""What every plan can: be JSON, be read back, and say what a hand has put in wrongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from kanseg.errors import UserError, did_you_mean
from kanseg.files import an_object, parse_json, write_json

T = TypeVar("T")


@dataclass
class StoredPlan:
    """A dataclass that is plan.json, and part of each checkpoint.

    Attributes:
        task: what is learned by it, see `kanseg.models.TABLES`.
    """

    task: ClassVar[str]

    def misfit(self) -> str | None:
        """What a plan edited by hand has wrong, or None."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers, lists and dictionaries."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; keys that are unknown or missing, or do not fit together, raise `UserError`."""
        values = dict(values)
        if (task := values.pop("task", cls.task)) != cls.task:
            raise UserError(f"The plan is for {task}, and this is for {cls.task} alone.")
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise UserError(f"A plan has no key '{key}'.{did_you_mean(key, known)}")
        try:
            plan = TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            wrong = error.errors()[0]
            where = ".".join(map(str, wrong["loc"]))
            raise UserError(
                f"The plan is not complete, or has words for numbers: '{where}': {wrong['msg']}. Run `kanseg plan` "
                "again."
            ) from error
        misfit = plan.misfit()
        if misfit:
            raise UserError(
                f"The plan does not fit together: {misfit}. Correct it, or run `kanseg plan` again."
            )
        return plan

    def save(self, path: Path | str) -> Path:
        """Write plan.json, atomically."""
        return write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read plan.json."""
        return named_errors(path, cls.from_dict)


def named_errors(path: Path | str, make: Callable[[dict[str, Any]], T]) -> T:
    """What is made of the values of a plan.json; what is wrong with them names the file."""
    values = read_values(path)
    try:
        return make(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_values(path: Path | str) -> dict[str, Any]:
    """The values of a plan.json, whatever it plans."""
    return parse_json(path, "a plan", "Run `kanseg plan` again.", an_object)

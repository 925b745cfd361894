"""What the verbs share: common options, sizes in words, and where results and remarks go."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from kanseg.errors import UsageError, UserError, counted
from kanseg.progress import RENDEZVOUS, is_main

TOGETHER = ("run", "train")  # verbs that several processes may do together

Json = Annotated[bool, typer.Option("--json", help="Result as JSON on stdout, all else on stderr.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to write to.")]
OutFile = Annotated[Path, typer.Option("-o", "--out", help="Folder, or file for one image, to write to.")]
Memory = Annotated[str | None, typer.Option(help="Memory limit, e.g. 8G; default: what is free.")]
Size = Annotated[str, typer.Option(help="Size of the network: small, standard or large.")]
ConfigName = Annotated[
    str,
    typer.Option(
        help="Options to begin with: default, hippocampus, ham10000, medmnist, mnist, cifar10, cifar100, "
        "tiny_imagenet, imagenet."
    ),
]
Pattern = Annotated[str | None, typer.Option(help="Regular expression, one group: the patient in an id.")]
Mirror = Annotated[
    str | None,
    typer.Option(help="Axes whose ends may be exchanged, e.g. 0 or 0,1,2, or none: flips and --tta."),
]
Regions = Annotated[
    str | None,
    typer.Option(
        help="whole=1+2+4,core=1+4: classes that overlap, the large ones first; ignore=255: what does not count."
    ),
]


class Verb(TyperCommand):
    """A command that takes no option twice which has room for one value: the first one would be lost in silence.

    Verbs of one process do not look at what launchers, also of other programs, tell of several.
    """

    def invoke(self, ctx: Any) -> Any:
        if ctx.info_name not in TOGETHER:
            for name in ("WORLD_SIZE", *RENDEZVOUS):
                os.environ.pop(name, None)
        return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = self.make_parser(ctx).parse_args(args=list(args))[2]
        for option in given:
            several = option.multiple or getattr(option, "is_flag", False)
            if (count := given.count(option)) > 1 and not several:
                raise UsageError(
                    f"{' or '.join(option.opts)} is given {counted(count, 'time')}, and takes one value."
                )
        return super().parse_args(ctx, args)


def require(expected: str, *paths: Path | None) -> None:
    """Raise `UserError` for the first path that does not exist."""
    for path in paths:
        if path is not None and not path.exists():
            raise UserError(f"There is no {path}. Give {expected}.")


def refuse_given(context: typer.Context, options: Mapping[str, str], instead: str) -> None:
    """Raise `UsageError` for those of the options (parameter -> as it is written) that the user gave."""
    given = [
        shown
        for name, shown in options.items()
        if (source := context.get_parameter_source(name)) is not None and source.name != "DEFAULT"
    ]
    if given:
        raise UsageError(
            f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} for segmentation: {instead}."
        )


def console(to_stderr: bool) -> Any:
    """Where to talk: standard error while standard output carries JSON; of several processes the first one talks."""
    from rich.console import Console

    return Console(stderr=to_stderr, quiet=not is_main())


def emit(result: Any, json_: bool) -> None:
    """The result on standard output, where JSON was asked for."""
    if json_ and is_main():
        print(json.dumps(result, indent=1, default=str))

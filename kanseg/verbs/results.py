"""Verbs around results: compare, combine."""

from __future__ import annotations

import typer

app = typer.Typer()

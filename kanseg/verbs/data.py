"""Verbs around data sets: look, repair, fetch, convert."""

from __future__ import annotations

import typer

app = typer.Typer()

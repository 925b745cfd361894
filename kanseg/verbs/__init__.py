"""Verbs of the command line, by theme; `kanseg.cli` puts them beside its own."""

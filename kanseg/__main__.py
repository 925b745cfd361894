"""`python -m kanseg` is `kanseg`."""

from kanseg.cli import main

main()

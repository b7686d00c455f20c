"""The command `ttaq`."""

from ttaq.cli.main import main

__all__ = ["main"]

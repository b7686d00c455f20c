"""Parsing, and turning errors into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ttaq.cli import adapt, convert, data, demo, info, quantize, report
from ttaq.cli.config import ConfigError, config_path, config_tokens
from ttaq.errors import TtaqError
from ttaq.version import __version__
from ttaq_kernels.errors import KernelError

__all__ = ["main"]

_COMMANDS = {
    "demo": demo,
    "quantize": quantize,
    "adapt": adapt,
    "report": report,
    "data": data,
    "convert": convert,
    "info": info,
}


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults to the help, except where there is none to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Says a usage error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_one_line(message)} (see {self.prog} --help)\n")


def _parser() -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="ttaq",
        description="Quantize a vision model, adapt it to a changing world, and report what that does.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ttaq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    found: dict[str, argparse.ArgumentParser] = {}
    for name, module in _COMMANDS.items():
        summary = (module.__doc__ or "").split("\n", 1)[0]
        sub = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=_Formatter, allow_abbrev=False
        )
        sub.add_argument("--config", metavar="FILE", help=f"TOML file whose section [{name}] gives flags; flags win")
        module.add_arguments(sub)
        sub.set_defaults(execute=module.execute, if_interrupted=module.IF_INTERRUPTED)
        found[name] = sub
    return parser, found


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser, commands = _parser()
    if argv and argv[0] in commands and (path := config_path(argv)) is not None:
        sub = commands[argv[0]]
        try:
            argv = [argv[0], *config_tokens(path, argv[0], list(commands), sub, argv), *argv[1:]]
        except ConfigError as error:
            sub.error(str(error))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for an error the user can mend, 130 for an interrupt.

    Usage errors leave through `SystemExit(2)`, as argparse does.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    try:
        args.execute(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        new_line = "\n" if sys.stderr.isatty() else ""  # Behind the ^C that a terminal shows.
        print(f"{new_line}ttaq {args.command}: interrupted; {args.if_interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe left, as `head` does. What is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (TtaqError, KernelError, OSError) as error:
        print(f"ttaq {args.command}: {_one_line(str(error))}", file=sys.stderr)
        return 1
    return 0


def _one_line(message: str) -> str:
    return " ".join(message.split())

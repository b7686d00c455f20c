"""TOML files in place of flags."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["ConfigError", "config_path", "config_tokens"]


class ConfigError(Exception):
    """A configuration file that cannot be used; a usage error."""


def config_path(argv: Sequence[str]) -> str | None:
    """The file that `--config FILE` or `--config=FILE` names; the last one counts."""
    path = None
    for token, following in zip(argv, [*argv[1:], None], strict=True):
        if token == "--config":
            path = following
        elif token.startswith("--config="):
            path = token.removeprefix("--config=")
    return path


def config_tokens(
    path: str, command: str, commands: Collection[str], parser: argparse.ArgumentParser, argv: Sequence[str]
) -> list[str]:
    """The section `[command]` as flags, to be put in front of `argv`, so that flags win over the file.

    A list is joined by commas, or becomes a repeated flag where the flag may be repeated; a repeated flag that `argv`
    gives too is left out. A table becomes `a.b=value` items. Keys are flag names with `-` or `_`.

    Raises:
        ConfigError: the file is missing or no TOML, a section is no command, or a key is no flag of the command.
    """
    try:
        with open(path, "rb") as file:
            sections = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for section, content in sections.items():
        if section not in commands or not isinstance(content, dict):
            raise ConfigError(f"{path}: [{section}] is not a command, expected sections among: {', '.join(commands)}")
    flags = {action.option_strings[-1]: action for action in parser._actions if action.option_strings}
    flags = {flag: action for flag, action in flags.items() if action.dest not in ("help", "config")}
    tokens: list[str] = []
    for key, value in sections.get(command, {}).items():
        action = next((a for a in flags.values() if a.dest == key.replace("-", "_")), None)
        if action is None:
            known = ", ".join(sorted(a.dest.replace("_", "-") for a in flags.values()))
            raise ConfigError(f"{path}: unknown key {key!r} in [{command}], expected one of: {known}")
        tokens += _flag(action, value, argv, f"{path}: {key} in [{command}]")
    return tokens


def _flag(action: argparse.Action, value: Any, argv: Sequence[str], where: str) -> list[str]:
    flag = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ConfigError(f"{where} is {value!r}, expected true or false")
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    if isinstance(value, Mapping):
        value = [f"{name}={item}" for name, item in _flat(value)]
    if isinstance(action, argparse._AppendAction):
        if any(token == flag or token.startswith(f"{flag}=") for token in argv):
            return []
        items = value if isinstance(value, list) else [value]
        return [f"{flag}={item}" for item in items]
    return [f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}"]


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

"""Arguments that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
import ast
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ttaq.data.corruptions import CORRUPTIONS, VALIDATION_CORRUPTIONS
from ttaq.data.decode import PREPROCESSINGS
from ttaq.errors import DataError, InputError
from ttaq.eval.datasets import DATASETS

__all__ = [
    "add_data",
    "add_device",
    "add_preprocessing",
    "at_least_one",
    "check_output",
    "corruptions",
    "integers",
    "method_options",
    "names",
    "positive",
    "set_up_torch",
    "three_numbers",
]


_OWN_FLAG = {"seed": "the flag for seeds", "source_images": "--source-images", "model": "--model", "name": "--methods"}
"""What is handed to a method beside its options."""

_MOST_THREADS = 1024


def add_data(parser: argparse.ArgumentParser) -> None:
    """`--dataset` and `--data`."""
    parser.add_argument("--dataset", choices=list(DATASETS), default="cifar10", help="which images")
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("TTAQ_DATA"),
        metavar="DIR",
        help="folder of the images, or one that holds it; without it the environment variable TTAQ_DATA",
    )


def add_preprocessing(parser: argparse.ArgumentParser) -> None:
    """`--preprocessing`."""
    parser.add_argument(
        "--preprocessing",
        choices=("auto", *PREPROCESSINGS),
        default="auto",
        help="how image files become 224 x 224 pixels; auto looks at their sizes",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device` and `--threads`."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto: cuda where there is one")
    parser.add_argument("--threads", type=at_least_one, metavar="N", help="CPU threads; without it what torch chooses")


def set_up_torch(args: argparse.Namespace) -> torch.device:
    """The chosen device, after setting the number of threads."""
    if args.threads is not None:
        if args.threads > _MOST_THREADS:
            raise InputError(f"--threads: {args.threads} is more than the {_MOST_THREADS} there may be; choose fewer")
        torch.set_num_threads(args.threads)
    if args.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(args.device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError:
        raise InputError(f"--device: unknown device {args.device!r}, expected cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device: {args.device} asked for, but torch finds no CUDA device here; choose cpu")
    return device


def names(text: str) -> list[str]:
    """`a,b,c` as a list without repetitions."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or len(set(parts)) != len(parts):
        raise argparse.ArgumentTypeError(f"expected different names separated by commas, got {text!r}")
    return parts


def corruptions(text: str) -> list[str]:
    """Names of corruptions as `names`, in which `all` and `validation` stand for the 15 and the four held-out ones."""
    sets = {"all": CORRUPTIONS, "validation": VALIDATION_CORRUPTIONS}
    return names(",".join(name for given in names(text) for name in sets.get(given, (given,))))


def integers(text: str) -> list[int]:
    """`0,1,2` as a list without repetitions."""
    try:
        return [int(part) for part in names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers separated by commas, got {text!r}") from None


def at_least_one(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def three_numbers(text: str) -> list[float]:
    """`0.5,0.5,0.5` as a list."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"expected three numbers separated by commas, got {text!r}")
    return values


def method_options(items: Sequence[str], methods: Sequence[str]) -> Mapping[str, dict[str, Any]]:
    """`["tent.lr=1e-3"]` as `{"tent": {"lr": 0.001}}`; values are Python literals, anything else is a string."""
    options: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for item in items:
        name, equals, text = item.partition("=")
        method, dot, option = name.partition(".")
        if not (equals and dot and option):
            raise InputError(f"--option: got {item!r}, expected METHOD.NAME=VALUE such as tent.lr=1e-3")
        if option in _OWN_FLAG:
            raise InputError(f"--option: {option} is no option of {method}; use {_OWN_FLAG[option]}")
        if method not in options:
            raise InputError(f"--option: {item!r} is for {method!r}, expected one for {' or '.join(methods)}")
        options[method][option] = _literal(text)
    return options


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def check_output(path: Path, flag: str, taken: Sequence[Path] = ()) -> None:
    """Refuse a file that could not be written, or that is one of those `taken` by the same command, before any work is
    done for it."""
    folder = path.parent
    if not folder.is_dir():
        raise DataError(f"{flag}: the folder {folder} does not exist; create it or choose another one")
    if path.is_dir():
        raise DataError(f"{flag}: {path} is a folder, expected a file name")
    if path.exists() and not path.is_file():
        raise DataError(f"{flag}: {path} is no regular file; choose another name")
    if any(os.path.realpath(path) == os.path.realpath(other) for other in taken):
        raise DataError(f"{flag}: {path} is already a file of this command and would be lost; choose another name")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise DataError(f"{flag}: {path} cannot be written, permission is missing; choose another place")

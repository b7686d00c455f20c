"""The flags of `ttaq adapt`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ttaq.cli.arguments import (
    add_data,
    add_device,
    add_preprocessing,
    at_least_one,
    corruptions,
    integers,
    names,
    positive,
)
from ttaq.cli.models import MODEL_HELP
from ttaq.eval.stream import SETTINGS, SPLITS
from ttaq.tta import METHODS

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ttaq adapt`."""
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="MODEL",
        help=f"{MODEL_HELP}; may be repeated; {{seed}} in it becomes each seed, to pair calibration and stream",
    )
    add_data(parser)
    parser.add_argument("--methods", type=names, default="source,norm,tent", help=f"of {', '.join(METHODS)}")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="option of a method, such as tent.lr=1e-3; may be repeated",
    )
    parser.add_argument(
        "--seeds", type=integers, default="0", help="draw noise and order of the images; 0,1,2 for three"
    )
    parser.add_argument("--severity", type=int, choices=range(1, 6), default=5, help="strength of the corruptions")
    parser.add_argument(
        "--corruptions",
        type=corruptions,
        default="all",
        help="names, among which all stands for the 15, validation for the four held-out ones and clean for none",
    )
    parser.add_argument(
        "--images", type=at_least_one, metavar="N", help="images per domain; without it the whole split"
    )
    parser.add_argument("--split", choices=SPLITS, default="report", help="which test images")
    parser.add_argument("--batch-size", type=at_least_one, default=200, metavar="N", help="images per batch")
    parser.add_argument(
        "--setting",
        choices=SETTINGS,
        default="continual",
        help="one domain after the other, resetting before each, with severities going up and down, all mixed, or a "
        "long walk in which one corruption fades into the next",
    )
    parser.add_argument("--rounds", type=at_least_one, default=1, metavar="N", help="how often the corruptions recur")
    parser.add_argument(
        "--delta", type=float, metavar="D", help="classes come in bursts (Dirichlet), such as 0.1; 0 sorts by class"
    )
    parser.add_argument(
        "--tail", type=float, metavar="T", help="long-tailed: images of the rarest class per one of the most frequent"
    )
    parser.add_argument(
        "--window", type=at_least_one, default=1, metavar="N", help="with --batch-size 1, the images a method sees"
    )
    parser.add_argument("--length", type=at_least_one, metavar="N", help="transitions of --setting ccc")
    add_preprocessing(parser)
    parser.add_argument(
        "--stored",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="read the CIFAR-10-C, CIFAR-100-C or ImageNet-C folder in --data instead of corrupting the clean images",
    )
    parser.add_argument(
        "--frost", type=Path, metavar="DIR", help="textures for frost; without it DIR/frost of --data, else procedural"
    )
    parser.add_argument(
        "--source-images",
        type=at_least_one,
        metavar="N",
        help="training images for the methods that want some, such as eata; without it as many as the method wants, or "
        "all there are",
    )
    parser.add_argument(
        "--guards",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take a method back when it goes wrong: values that are not finite, predictions that collapse, parameters "
        "that run away",
    )
    parser.add_argument(
        "--shadow",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="the methods adapt, but the source model answers; rows also have the error that the method would have had",
    )
    parser.add_argument(
        "--max-memory",
        type=positive,
        metavar="MB",
        help="halve --batch-size until a step of every method fits; counts tensors (weights, state, activations), on "
        "the GPU or the CPU, not the Python process with its libraries and images",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="row file (JSON lines) to append to")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on behind what --out and its states already hold; without it they may not hold anything of this "
        "command",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=at_least_one,
        metavar="N",
        help="batches after which a state is saved; without it at the end of every domain only",
    )
    add_device(parser)

"""Make data sets: corrupted copies of clean images in the layouts of CIFAR-10-C and ImageNet-C, resumable."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ttaq.cli.arguments import add_preprocessing, at_least_one, corruptions, integers
from ttaq.cli.progress import ProgressLine
from ttaq.data import ImageFolder, cifar_split, imagenet_split, open_image_folder, read_cifar10, read_cifar100
from ttaq.data.corrupted_sets import Noise, Written, write_cifar_c, write_imagenet_c
from ttaq.data.corrupted_sets_jobs import FORMATS
from ttaq.data.corruptions.parameters import SEVERITIES
from ttaq.data.splits import SPLITS
from ttaq.errors import DataError, InputError
from ttaq.eval.datasets import choose_preprocessing

__all__ = ["IF_INTERRUPTED", "add_arguments", "execute"]

IF_INTERRUPTED = "finished files are kept, the same command continues with the rest"

_CIFAR = {"cifar10": (read_cifar10, 10), "cifar100": (read_cifar100, 100)}
_HOMES = {"imagenet": ("imagenet/val", "imagenet", "val"), "folder": ("val",)}
_CLASSES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ttaq data`."""
    parser.add_argument("action", choices=["corrupt"], help="corrupt: write a corrupted copy of a clean set")
    parser.add_argument(
        "--dataset",
        choices=[*_CIFAR, "imagenet", "folder"],
        required=True,
        help="which clean images; folder: class folders",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("TTAQ_DATA"),
        metavar="DIR",
        help="folder of the images, or one that holds it; without it the environment variable TTAQ_DATA",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="gets the folder CIFAR-10-C, CIFAR-100-C or ImageNet-C"
    )
    parser.add_argument(
        "--corruptions",
        type=corruptions,
        default="all",
        help="names, among which all stands for the 15 and validation for the four held-out ones",
    )
    parser.add_argument(
        "--severities", type=integers, default="1,2,3,4,5", help="of 1 to 5; the layout of CIFAR has all five"
    )
    parser.add_argument(
        "--images", type=at_least_one, metavar="N", help="the first N by file order or file name; without it all"
    )
    parser.add_argument(
        "--split", choices=SPLITS, default="all", help="which images; ttaq adapt --stored expects all of CIFAR"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the noise")
    parser.add_argument(
        "--frost", type=Path, metavar="DIR", help="textures for frost; without it DIR/frost of --data, else procedural"
    )
    add_preprocessing(parser)
    parser.add_argument(
        "--format", choices=list(FORMATS), default="png", help="of image files: png is lossless, jpeg has quality 85"
    )
    parser.add_argument(
        "--workers", type=at_least_one, default=os.cpu_count() or 1, metavar="N", help="processes, one thread each"
    )


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.data is None:
        raise DataError(f"--data: {args.dataset} needs a folder of clean images; name one, or set TTAQ_DATA")
    data = Path(args.data)
    frost = data / "frost" if args.frost is None and (data / "frost").is_dir() else args.frost
    noise = Noise(args.seed, frost)
    settings = {"dataset": args.dataset, "split": args.split, "images": args.images}
    with ProgressLine("corrupting") as progress:
        options = {"settings": settings, "workers": args.workers, "progress": progress}
        write = _write_cifar if args.dataset in _CIFAR else _write_folder
        written = write(args, data, noise, options)
    print(f"{written.folder}: {written.made:,} corrupted images made, {written.kept:,} were there")


def _write_cifar(args: argparse.Namespace, data: Path, noise: Noise, options: dict[str, Any]) -> Written:
    if sorted(args.severities) != list(SEVERITIES):
        raise InputError(
            f"--severities: got {','.join(map(str, args.severities))}, but the files of CIFAR-C hold all five "
            f"severities each; leave the flag out"
        )
    read, num_classes = _CIFAR[args.dataset]
    images = read(data)
    rows = cifar_split(args.split)
    rows = rows[rows < len(images.labels)]
    _check_count(args, len(rows))
    return write_cifar_c(
        args.out, images, rows[: args.images], args.corruptions, noise, num_classes=num_classes, **options
    )


def _write_folder(args: argparse.Namespace, data: Path, noise: Noise, options: dict[str, Any]) -> Written:
    folder = _open_folder(args, data)
    _check_count(args, len(folder))
    if args.images is not None:
        folder = folder.choose(folder.files[: args.images])
    return write_imagenet_c(
        args.out, folder, args.corruptions, noise, severities=args.severities, format=args.format, **options
    )


def _open_folder(args: argparse.Namespace, data: Path) -> ImageFolder:
    """The images of the split, ordered by file name, so that the first ones are of many classes."""
    root = next((data / home for home in _HOMES[args.dataset] if (data / home).is_dir()), data)
    auto = args.preprocessing == "auto"
    folder = open_image_folder(root, choose_preprocessing(args.dataset, data) if auto else args.preprocessing)
    if args.dataset == "imagenet" and len(folder.classes) != _CLASSES:
        raise DataError(
            f"--data: {root} has {len(folder.classes)} of {_CLASSES:,} classes and no wnids.txt in or beside it tells "
            f"their order; put that file there, or give --dataset folder for images of other classes"
        )
    if args.dataset == "imagenet":
        return folder.choose(imagenet_split(folder.files, args.split))
    if args.split != "all":
        raise InputError(f"--split: got {args.split}, but a folder is taken whole; leave the flag out")
    return folder.choose(sorted(folder.files, key=lambda file: (file.name, file)))


def _check_count(args: argparse.Namespace, there: int) -> None:
    if args.images is not None and args.images > there:
        raise InputError(f"--images: got {args.images:,}, but split {args.split} of {args.dataset} has {there:,} here")

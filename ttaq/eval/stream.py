"""What a stream of corrupted images is: every flag that decides which images an adapter sees, and in which order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import torch

from ttaq.data.corruptions import CORRUPTIONS, VALIDATION_CORRUPTIONS
from ttaq.errors import InputError

__all__ = ["DATASETS", "SETTINGS", "SPLITS", "Stream", "differing_flags", "parse_description"]

DATASETS = {"digits": 10, "cifar10": 10, "cifar100": 100}
"""Name of a data set and its number of classes."""
SPLITS = ("validate", "report", "all")
SETTINGS = ("continual", "reset_each_shift")
_SOURCES = ("generated", "stored")
_FROST = ("textures", "procedural")


@dataclass(frozen=True)
class Stream:
    """A sequence of domains, one corruption each; equal streams give every method the same batches.

    `str(stream)` holds every flag, so two rows with the same string saw the same images in the same order.

    Args:
        dataset: a key of `DATASETS`.
        corruptions: the domains in order.
        severity: 1 to 5.
        images: images per domain, the first ones of the split in file order; None takes the whole split.
        split: "validate", "report" or "all" of the test images (`ttaq.data.splits`).
        batch_size: images per batch; the last batch of a domain may be smaller.
        seed: draws the corruption noise and the order of the images, both anew for each domain.
        setting: "continual" never resets the adapter, "reset_each_shift" resets it before each domain.
        source: "generated" corrupts the clean images, "stored" reads a CIFAR-10-C or CIFAR-100-C folder.
        frost: "textures" or "procedural", the overlay of generated frost.
    """

    dataset: str
    corruptions: tuple[str, ...] = CORRUPTIONS
    severity: int = 5
    images: int | None = None
    split: str = "report"
    batch_size: int = 200
    seed: int = 0
    setting: str = "continual"
    source: str = "generated"
    frost: str = "procedural"

    def __post_init__(self) -> None:
        object.__setattr__(self, "corruptions", tuple(self.corruptions))
        for flag, known in (("dataset", tuple(DATASETS)), ("split", SPLITS), ("setting", SETTINGS)):
            _one_of(flag, getattr(self, flag), known)
        _one_of("source", self.source, _SOURCES)
        _one_of("frost", self.frost, _FROST)
        if not self.corruptions:
            raise InputError("Stream: corruptions is empty, expected at least one name")
        for name in self.corruptions:
            _one_of("corruption", name, (*CORRUPTIONS, *VALIDATION_CORRUPTIONS))
        if len(set(self.corruptions)) != len(self.corruptions):
            raise InputError(f"Stream: corruptions {self.corruptions} name one twice, expected each at most once")
        if self.severity not in range(1, 6):
            raise InputError(f"Stream: severity is {self.severity}, expected 1 to 5")
        if self.batch_size < 1 or (self.images is not None and self.images < 1):
            raise InputError(
                f"Stream: batch_size is {self.batch_size} and images {self.images}, expected at least 1 each"
            )
        if self.source == "stored" and self.dataset == "digits":
            raise InputError("Stream: digits has no stored corrupted set, expected source='generated'")

    @property
    def num_classes(self) -> int:
        """Number of classes of the data set."""
        return DATASETS[self.dataset]

    @property
    def frost_in_use(self) -> str:
        """Where frost comes from: "textures", "procedural", "stored", or "unused" when the stream generates none."""
        if self.source == "stored":
            return "stored"
        return self.frost if "frost" in self.corruptions else "unused"

    def __str__(self) -> str:
        """`flag=value` for every field in the order of the fields, separated by single spaces."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["corruptions"] = ",".join(self.corruptions)
        values["images"] = "all" if self.images is None else self.images
        values["frost"] = self.frost_in_use
        return " ".join(f"{name}={value}" for name, value in values.items())

    def generator(self, purpose: str, corruption: str) -> torch.Generator:
        """A CPU generator that depends on (seed, purpose, corruption, severity) and on nothing else."""
        text = f"{self.seed} {purpose} {corruption} {self.severity}"
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
        return torch.Generator().manual_seed(number)


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"Stream: unknown {what} {value!r}, expected one of: {', '.join(known)}")


def parse_description(text: str) -> dict[str, str]:
    """The flags of `str(stream)` as a dictionary."""
    pairs = [part.partition("=") for part in text.split(" ")]
    if not all(name and separator for name, separator, _ in pairs):
        raise InputError(
            f"parse_description: {text!r} is not a stream description, expected flag=value separated by spaces"
        )
    return {name: value for name, _, value in pairs}


def differing_flags(first: str, second: str) -> list[str]:
    """The flags other than the seed in which two descriptions differ, as `flag (first value against second value)`."""
    one, two = parse_description(first), parse_description(second)
    return [
        f"{name} ({one.get(name, 'absent')} against {two.get(name, 'absent')})"
        for name in dict.fromkeys([*one, *two])
        if name != "seed" and one.get(name) != two.get(name)
    ]

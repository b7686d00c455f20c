"""What a stream of corrupted images is: every flag that decides which images an adapter sees, and in which order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import torch

from ttaq.data.corruptions import CORRUPTIONS, VALIDATION_CORRUPTIONS
from ttaq.data.decode import PREPROCESSINGS
from ttaq.errors import InputError
from ttaq.eval.datasets import DATASETS

__all__ = ["CLEAN", "SETTINGS", "SPLITS", "Stream", "differing_flags", "parse_description"]

SPLITS = ("validate", "report", "all")
SETTINGS = ("continual", "reset_each_shift", "gradual", "mixed", "ccc")
CLEAN = "clean"
"""The name of the domain that is not corrupted."""
_SOURCES = ("generated", "stored")
_FROST = ("textures", "procedural")


@dataclass(frozen=True)
class Stream:
    """A sequence of domains; equal streams give every method the same batches.

    `str(stream)` holds every flag, so two rows with the same string saw the same images in the same order.

    Args:
        dataset: a key of `ttaq.eval.datasets.DATASETS`.
        corruptions: in order; "clean" stands for none.
        severity: 1 to 5.
        images: images per domain ("mixed": per corruption), the first ones of the split; None takes the whole split.
        split: "validate", "report" or "all" of the test images.
        batch_size: images per batch; the last batch of a domain may be smaller.
        seed: draws the corruption noise, the order of the images and everything else that is drawn here.
        setting: "continual": one domain per corruption, the adapter is never reset. "reset_each_shift": it is reset
            before each domain. "gradual": per corruption one domain for each severity, up from 1 to `severity` and down
            again. "mixed": one domain in which all corruptions come mixed. "ccc": an endless walk in which one
            corruption grows while the one before fades, as in Press et al. (arXiv 2306.05401): see `ttaq.eval.plan`.
        source: "generated" corrupts the clean images, "stored" reads a CIFAR-10-C, CIFAR-100-C or ImageNet-C folder.
        frost: "textures" or "procedural", the overlay of generated frost.
        rounds: how often the corruptions recur, each time with new noise and another order.
        delta: None shuffles a domain; a number makes classes come in bursts (Dirichlet), 0 sorts by class.
        tail: None takes the classes as they are; a number in (0, 1) thins them out until the rarest class has this
            share of the images of the most frequent one (long-tailed).
        window: with batch_size 1, how many of the last images the method gets to see at once.
        length: number of transitions of "ccc"; `images` is then the number of images of one transition.
        preprocessing: how image files become squares (`ttaq.data.decode.decode_image`).
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
    rounds: int = 1
    delta: float | None = None
    tail: float | None = None
    window: int = 1
    length: int | None = None
    preprocessing: str = "crop"

    def __post_init__(self) -> None:
        object.__setattr__(self, "corruptions", tuple(self.corruptions))
        for flag, known in (
            ("dataset", tuple(DATASETS)),
            ("split", SPLITS),
            ("setting", SETTINGS),
            ("source", _SOURCES),
            ("frost", _FROST),
            ("preprocessing", PREPROCESSINGS),
        ):
            _one_of(flag, getattr(self, flag), known)
        if not self.corruptions:
            raise InputError("Stream: corruptions is empty, expected at least one name")
        for name in self.corruptions:
            _one_of("corruption", name, (*CORRUPTIONS, *VALIDATION_CORRUPTIONS, CLEAN))
        if len(set(self.corruptions)) != len(self.corruptions):
            raise InputError(f"Stream: corruptions {self.corruptions} name one twice, expected each at most once")
        if type(self.seed) is not int or not 0 <= self.seed < 2**31:
            raise InputError(f"Stream: seed is {self.seed!r}, expected an integer from 0 below 2^31")
        if self.severity not in range(1, 6):
            raise InputError(f"Stream: severity is {self.severity}, expected 1 to 5")
        for flag in ("batch_size", "images", "rounds", "window", "length"):
            value = getattr(self, flag)
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"Stream: {flag} is {value!r}, expected a whole number of at least 1")
        if self.delta is not None and not 0 <= self.delta < float("inf"):
            raise InputError(f"Stream: delta is {self.delta}, expected 0 (sorted by class) or more, such as 0.1")
        if self.tail is not None and not 0 < self.tail < 1:
            raise InputError(f"Stream: tail is {self.tail}, expected a share between 0 and 1, such as 0.05")
        if self.window > 1 and self.batch_size != 1:
            raise InputError(f"Stream: a window of {self.window} needs single images, but batch_size is not 1")
        if self.source == "stored":
            self._check_stored()
        self._check_walk()

    def _check_stored(self) -> None:
        if DATASETS[self.dataset].stored is None:
            stored = ", ".join(name for name, dataset in DATASETS.items() if dataset.stored)
            raise InputError(
                f"Stream: {self.dataset} has no stored corrupted set (those with one: {stored}), "
                f"expected source='generated'"
            )
        if CLEAN in self.corruptions or self.setting == "ccc":
            what = "clean images" if CLEAN in self.corruptions else "mixtures of two corruptions"
            raise InputError(f"Stream: stored sets hold no {what}, expected source='generated'")

    def _check_walk(self) -> None:
        if (self.setting == "ccc") != (self.length is not None):
            raise InputError(
                f"Stream: setting is {self.setting} and length {self.length}; expected a length, the number of "
                f"transitions, exactly for setting 'ccc'"
            )
        if self.setting != "ccc":
            return
        if len(self.corruptions) < 2 or CLEAN in self.corruptions:
            raise InputError(f"Stream: 'ccc' walks from one corruption to another, but got {self.corruptions}")
        if self.rounds != 1:
            raise InputError(f"Stream: rounds is {self.rounds}, but 'ccc' goes on by itself: choose its length")
        if self.images is not None and self.images < self.severity:
            raise InputError(
                f"Stream: images is {self.images}, expected at least {self.severity}, one for each step of a transition"
            )

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
        values["preprocessing"] = self.preprocessing if DATASETS[self.dataset].files else "unused"
        return " ".join(f"{name}={'none' if value is None else value}" for name, value in values.items())

    def number(self, *purpose: object) -> int:
        """A number for a generator, below 2^63, that depends on the seed and the purpose and on nothing else."""
        text = " ".join(map(str, (self.seed, *purpose)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

    def generator(self, *purpose: object) -> torch.Generator:
        """A CPU generator that depends on the seed and the purpose and on nothing else."""
        return torch.Generator().manual_seed(self.number(*purpose))


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

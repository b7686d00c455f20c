"""What the lines of a table by domain are: each domain, or means over domains where there are too many to read."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ttaq.eval.rows import Row
from ttaq.eval.stream import parse_description

__all__ = ["MOST_LINES", "Breakdown", "breakdown"]

MOST_LINES = 40
"""A table by domain has no more lines than this."""

_NAME = re.compile(r"([^@#>]+)(?:@\d+-?)?(?:#(\d+))?")
_SLICES = 10


@dataclass(frozen=True)
class _Piece:
    """A domain, or one corruption of a domain that mixes several: where it is in the stream, and its error in %."""

    name: str
    index: int
    domains: int
    error: float


@dataclass(frozen=True)
class Breakdown:
    """The lines of a table by domain.

    Args:
        what: what a line is, for the text above the table; empty where it is a domain.
        labels: the lines in order.
        mean: name of the mean over domains, which stands below them.
    """

    what: str
    labels: tuple[str, ...]
    mean: str
    _label: Callable[[_Piece], str | None]

    def label(self, row: Row) -> str | None:
        """The line that a domain belongs to; None for a domain that is spread over several."""
        return None if _mixes(row) else self._label(_piece(row))

    def errors(self, rows: Sequence[Row]) -> dict[str, float]:
        """Per line the mean error in % of its domains, from the rows of one seed."""
        found: dict[str, list[float]] = {}
        for piece in _pieces(rows):
            found.setdefault(str(self._label(piece)), []).append(piece.error)
        return {label: sum(errors) / len(errors) for label, errors in found.items()}


def breakdown(streams: Sequence[Sequence[Row]]) -> Breakdown:
    """The lines for a stream, the finest that every seed has and that are few enough.

    Tried in this order: each domain; the rounds of a stream that meets the same corruptions again and again;
    corruptions; successive parts of the stream, as equal as they can be, which always fit.

    Args:
        streams: for each seed the rows of its domains in order, of any method.
    """
    seeds = [_pieces(rows) for rows in streams]
    parts = _mixes(streams[0][0])
    most = max(len(pieces) if parts else pieces[0].domains for pieces in seeds)
    mean = "all images" if parts and len(streams[0]) == 1 else "mean"
    images = "its images in the mixed stream" if parts else "all its domains"

    def fits(label: Callable[[_Piece], str | None]) -> tuple[str, ...] | None:
        per_seed = [dict.fromkeys(label(piece) for piece in pieces) for pieces in seeds]
        longest = max(per_seed, key=len)
        known = all(labels.keys() <= longest.keys() for labels in per_seed)
        texts = tuple(text for text in longest if text is not None)
        return texts if known and len(texts) == len(longest) <= MOST_LINES else None

    if most <= MOST_LINES and (labels := fits(_name)):
        return Breakdown("one corruption of the mixed stream" if parts else "", labels, mean, _name)
    in_rounds = not parts and all(_rounds_follow(pieces) for pieces in seeds)
    if in_rounds and (labels := fits(_round)):
        return Breakdown("one round, the mean over its domains", labels, mean, _round)
    if (labels := fits(_corruption)) and len(labels) > 1:
        return Breakdown(f"one corruption, the mean over {images}", labels, mean, _corruption)
    slices = min(_SLICES, most)

    def slice_of(piece: _Piece) -> str:
        number = piece.index * slices // piece.domains
        return f"{100 * number // slices}-{100 * (number + 1) // slices} %"

    ends = [100 * number // slices for number in range(slices + 1)]
    labels = tuple(f"{start}-{end} %" for start, end in itertools.pairwise(ends))
    what = f"the mean over one of {slices} successive parts of the stream's {most} domains"
    return Breakdown(what, labels, mean, slice_of)


def _mixes(row: Row) -> bool:
    """Whether the parts are what a reader looks for: all corruptions mixed, not the passage from one to the next."""
    return bool(row["parts"]) and parse_description(row["stream"]).get("setting") == "mixed"


def _piece(row: Row) -> _Piece:
    return _Piece(row["domain"], row["index"], row["domains"], row["error"])


def _pieces(rows: Sequence[Row]) -> list[_Piece]:
    """Domains, those with parts replaced by them; a part of several domains is one piece with all its images."""
    pieces: list[_Piece] = []
    images: dict[str, int] = {}
    wrong: dict[str, float] = {}
    for row in rows:
        if not _mixes(row):
            pieces.append(_piece(row))
            continue
        for name, part in row["parts"].items():
            images[name] = images.get(name, 0) + part["n"]
            wrong[name] = wrong.get(name, 0.0) + part["n"] * part["error"]
    return pieces + [_Piece(name, 0, 1, wrong[name] / images[name]) for name in images]


def _name(piece: _Piece) -> str:
    return piece.name


def _corruption(piece: _Piece) -> str | None:
    match = _NAME.fullmatch(piece.name)
    return match[1] if match else None


def _round(piece: _Piece) -> str | None:
    match = _NAME.fullmatch(piece.name)
    return f"round {match[2] or 1}" if match else None


def _rounds_follow(pieces: Sequence[_Piece]) -> bool:
    """Whether there are several rounds, each of several domains and one after the other."""
    matches = [_NAME.fullmatch(piece.name) for piece in pieces]
    numbers = [int(match[2] or 1) for match in matches if match]
    return len(numbers) == len(pieces) and numbers == sorted(numbers) and 1 < len(set(numbers)) < len(numbers)

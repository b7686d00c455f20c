"""In which order labelled images come, and how often each class does."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ttaq.errors import InputError

__all__ = ["bursts", "thin_out"]

_MOST_SLOTS = 100
_SMALLEST_SLOT = 10


def bursts(labels: Tensor, delta: float, seed: int) -> Tensor:
    """A permutation (int64) in which the images of a class come in bursts, the more so the smaller `delta`.

    The stream is cut into K = min(classes, 100, N / 10) slots. Each class, in random order, deals its images out over
    the slots in the proportions of a draw from Dirichlet(delta, ..., delta); slots that hold N / K images take no
    more. Inside a slot, classes come one after the other in random order. With delta 0 the images are sorted by class,
    the classes in random order; towards infinity every slot has all classes.

    Args:
        labels: int64 [N].
        delta: concentration, >= 0; usual are 0.1 and 0.01.
        seed: draws everything.

    Source: Gong et al., NOTE (arXiv 2208.05117), appendix; its repetition until no slot is small is left out, so that
    every set of labels has a stream.
    """
    draw = np.random.default_rng(seed)
    values = labels.numpy()
    classes = draw.permutation(np.unique(values))
    members = {c: draw.permutation(np.flatnonzero(values == c)) for c in classes}
    slots = max(1, min(len(classes), _MOST_SLOTS, len(values) // _SMALLEST_SLOT))
    if delta == 0 or slots == 1:
        return torch.from_numpy(np.concatenate([members[c] for c in classes]).astype(np.int64))
    limit = len(values) / slots
    filled = np.zeros(slots)
    dealt: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(slots)]
    for c in classes:
        share = draw.dirichlet(np.full(slots, delta)) * (filled < limit)
        # A class whose whole share went to slots that are full goes to those with room, of which one always is.
        share = share / share.sum() if share.sum() > 0 else (filled < limit) / (filled < limit).sum()
        places = np.rint(np.cumsum(share) * len(members[c])).astype(int)[:-1]
        for slot, part in enumerate(np.split(members[c], places)):
            if len(part):
                dealt[slot].append((c, part))
                filled[slot] += len(part)
    parts = [slot[place][1] for slot in dealt for place in draw.permutation(len(slot))]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def thin_out(labels: Tensor, tail: float, seed: int) -> Tensor:
    """Places (int64, ascending) of the images that stay when class frequencies fall exponentially.

    The class of rank r of C, ranks in random order, keeps `n tail^(r / (C - 1))` of its images, the first ones; n is
    the largest number for which no class has too few, so that the rarest class has the share `tail` of the first.

    Args:
        labels: int64 [N].
        tail: images of the rarest class as a share of those of the most frequent, in (0, 1).
        seed: draws the ranks.

    Raises:
        InputError: the rarest class would have no image, or there is one class only.

    Source: Cui et al. (arXiv 1901.05555), section 5: the exponential profile.
    """
    values = labels.numpy()
    classes = np.unique(values)
    if len(classes) < 2:
        raise InputError(f"thin_out: the images are of {len(classes)} class, expected at least 2 for a long tail")
    shares = tail ** (np.random.default_rng(seed).permutation(len(classes)) / (len(classes) - 1))
    members = [np.flatnonzero(values == c) for c in classes]
    most = min(len(each) / share for each, share in zip(members, shares, strict=True))
    if most * tail < 0.5:
        raise InputError(
            f"thin_out: the most frequent class would have {most:.0f} images and the rarest {most * tail:.2f}, "
            f"expected at least 1; take more images per class or a tail closer to 1"
        )
    kept = [each[: max(1, round(most * share))] for each, share in zip(members, shares, strict=True)]
    return torch.from_numpy(np.sort(np.concatenate(kept)).astype(np.int64))

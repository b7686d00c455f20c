"""The digits that come with scikit-learn."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from ttaq.data import load_digits
from ttaq.errors import MissingPackageError

pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'ttaq[demo]'")


def test_shapes_and_fixed_split() -> None:
    train, test = load_digits()
    for part, count in ((train, 1197), (test, 600)):
        assert part.images.shape == (count, 3, 32, 32)
        assert part.images.dtype is torch.uint8
        assert part.images.is_contiguous()
        assert part.labels.dtype is torch.int64
        assert set(part.labels.tolist()) == set(range(10))
        assert torch.equal(part.images[:, 0], part.images[:, 2])
    assert train.labels[:10].tolist() == list(range(10))
    again = load_digits()[1]
    assert torch.equal(test.images, again.images)


def test_enlargement_by_hand() -> None:
    """Bilinear at factor 4 with pixel centres at (i + 1/2) / 4 - 1/2, clamped at the border, in float64."""
    from sklearn.datasets import load_digits as original

    small = original().images[0] * 255 / 16
    place = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    low = np.minimum(place.astype(int), 6)
    weight = np.zeros((32, 8))
    weight[np.arange(32), low], weight[np.arange(32), low + 1] = 1 - (place - low), place - low
    expected = np.rint(weight @ small @ weight.T)
    assert np.array_equal(load_digits()[0].images[0, 0].numpy(), expected.astype(np.uint8))


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingPackageError, match=r"load_digits: .*pip install 'ttaq\[demo\]'"):
        load_digits()

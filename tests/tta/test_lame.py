"""LAME against hand-worked numbers and an independent float64 statement that stops by itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tta_cases import batch_norm_net, group_norm_net, stream

from ttaq.errors import InputError
from ttaq.tta import METHODS, Source

LAME = METHODS["lame"]


def plain(weight: Tensor) -> nn.Sequential:
    """A classifier whose features are the pixels."""
    linear = nn.Linear(weight.shape[1], len(weight), bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return nn.Sequential(nn.Flatten(), linear)


def pictures(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows).view(len(rows), -1, 1, 1)


def test_hand_worked_iteration() -> None:
    """Two images at right angles: K = 1, p = (s, 1-s) with s = 1/(1+e^-1), Y = softmax(ln p + p)."""
    s = 1 / (1 + math.exp(-1))
    first = 1 / (1 + math.exp(-1 - (2 * s - 1)))
    x = pictures([[1.0, 0.0], [0.0, 1.0]])
    expected = torch.tensor([[first, 1 - first], [1 - first, first]])
    torch.testing.assert_close(LAME(plain(torch.eye(2)), kernel="linear", iterations=1)(x).exp(), expected)
    # With the nearest other image instead of itself, each is drawn to the answer of the other.
    first = 1 / (1 + math.exp(-1 + (2 * s - 1)))
    expected = torch.tensor([[first, 1 - first], [1 - first, first]])
    torch.testing.assert_close(LAME(plain(torch.eye(2)), kernel="knn", iterations=1)(x).exp(), expected)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def reference(
    h: np.ndarray, logits: np.ndarray, kernel: str, neighbours: int, symmetric: bool, iterations: int
) -> np.ndarray:
    h = h / np.linalg.norm(h, axis=1, keepdims=True)
    count = len(h)
    distance = np.array([[np.linalg.norm(a - b) for b in h] for a in h])
    if kernel == "linear":
        k = h @ h.T
    elif kernel == "rbf":
        width = np.mean([sorted(row)[min(neighbours, count) - 1] for row in distance])
        k = np.exp(-(distance**2) / (2 * width**2))
    else:
        k = np.zeros((count, count))
        for i, row in enumerate(distance):
            for j in sorted((j for j in range(count) if j != i), key=lambda j: row[j])[:neighbours]:
                k[i, j] = 1
        k = (k + k.T) / 2 if symmetric else k
    u = -np.log(softmax(logits) + 1e-10)
    y, before = softmax(-u), None
    for _ in range(iterations):
        pull = k @ y
        y = softmax(pull - u)
        energy = (u * y - pull * y + y * np.log(y)).sum()
        if before is not None and abs(energy - before) <= 1e-8 * abs(before):
            break
        before = energy
    return y


@pytest.mark.parametrize(("batch", "neighbours", "iterations"), [(12, 5, 100), (12, 2, 100), (12, 5, 3), (4, 5, 100)])
@pytest.mark.parametrize(
    ("kernel", "symmetric"), [("rbf", False), ("linear", False), ("knn", False), ("knn", True), ("rbf", True)]
)
def test_is_the_update_of_the_paper(kernel: str, symmetric: bool, batch: int, neighbours: int, iterations: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 6, generator=generator)
    x = torch.randn(batch, 6, 1, 1, generator=generator)
    options = {"kernel": kernel, "neighbours": neighbours, "symmetric": symmetric, "iterations": iterations}
    h = x.flatten(1).double().numpy()
    expected = reference(h, h @ weight.double().numpy().T, **options)
    got = LAME(plain(weight), **options)(x)
    torch.testing.assert_close(got.exp().double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.softmax(1), got.exp())  # logarithms of probabilities


def test_settles() -> None:
    adapters = [LAME(batch_norm_net(), iterations=iterations) for iterations in (100, 250)]
    one, other = (adapter(stream(1, batch=12)[0]) for adapter in adapters)
    torch.testing.assert_close(one.exp(), other.exp(), rtol=1e-5, atol=1e-6)


def test_neighbours_of_the_same_kind_outvote_one_that_is_unsure() -> None:
    weight = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    x = pictures([[1.0, 0.1], [1.0, 0.2], [1.0, 0.0], [0.7, 0.75], [0.9, 0.3]])
    adapter = LAME(plain(weight), kernel="knn", neighbours=3)
    assert Source(plain(weight))(x).argmax(1).tolist() == [0, 0, 0, 1, 0]
    assert adapter(x).argmax(1).tolist() == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("kernel", ["rbf", "knn", "linear"])
@pytest.mark.parametrize("net", [batch_norm_net, group_norm_net])
def test_a_single_image_gets_the_answer_of_the_source(kernel: str, net: Any) -> None:
    x = stream(1, batch=1)[0]
    got = LAME(net(), kernel=kernel)(x)
    torch.testing.assert_close(got.exp(), Source(net())(x).softmax(1))


@pytest.mark.parametrize("kernel", ["rbf", "knn", "linear"])
def test_equal_images_and_sure_answers_stay_finite(kernel: str) -> None:
    x = pictures([[1.0, 0.0]] * 4)
    got = LAME(plain(torch.tensor([[1e3, 0.0], [0.0, 1e3]])), kernel=kernel)(x)
    assert got.isfinite().all()
    torch.testing.assert_close(got.exp().sum(1), torch.ones(4))
    assert got.argmax(1).tolist() == [0] * 4


def test_answers_in_float32_under_autocast() -> None:
    adapter = LAME(batch_norm_net())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = adapter(stream()[0])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.exp().sum(1), torch.ones(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "cosine"}, "kernel is 'cosine', expected one of rbf, knn, linear"),
        ({"neighbours": 0}, "neighbours is 0, expected an integer >= 1"),
        ({"neighbours": 2.5}, "neighbours is 2.5"),
        ({"iterations": 0}, "iterations is 0, expected an integer >= 1"),
        ({"iterations": True}, "iterations is True"),
        ({"symmetric": 1}, "symmetric is 1, expected True or False"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^LAME: {message}"):
        LAME(batch_norm_net(), **options)


def test_a_model_without_a_classifier_is_refused() -> None:
    with pytest.raises(InputError, match="LAME: the model has no linear layer"):
        LAME(nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten()))

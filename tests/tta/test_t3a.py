"""T3A against hand-worked numbers and an independent statement with lists of supports."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tta_cases import CLASSES, assert_same, batch_norm_net, group_norm_net, quantized_net, stream

from ttaq.errors import InputError
from ttaq.nn.classifier import find_classifier
from ttaq.tta import METHODS, Source

T3A = METHODS["t3a"]


def plain(weight: Tensor, bias: Tensor | None = None) -> nn.Sequential:
    """A classifier whose features are the pixels."""
    linear = nn.Linear(weight.shape[1], len(weight))
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return nn.Sequential(nn.Flatten(), linear)


def pictures(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows).view(len(rows), -1, 1, 1)


def test_hand_worked_prototypes() -> None:
    """Rows (2, 0) and (0, 2) are the supports (1, 0) and (0, 1); (0.3, 0.4), of length 0.5, is taken for class 1."""
    adapter = T3A(plain(2 * torch.eye(2)), keep=2)
    assert adapter.supports.tolist() == [[[1, 0], [0, 0]], [[0, 1], [0, 0]]]
    logits = adapter(pictures([[0.3, 0.4]]))  # prototypes (1, 0) and (0.3, 0.9)
    torch.testing.assert_close(logits, torch.tensor([[0.3, 0.45]]))
    logits = adapter(pictures([[0.0, 5.0]]))  # surer than (0.3, 0.4), whose place it takes
    torch.testing.assert_close(adapter.supports[1].sum(0), torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(logits, torch.tensor([[0.0, 5.0]]))


class Lists:
    """The paper with a Python list of (entropy, normalised feature) per class, in float64."""

    def __init__(self, weight: Tensor, bias: Tensor, keep: int) -> None:
        self.weight, self.bias, self.keep = weight.double(), bias.double(), keep
        self.supports = []
        for row in self.weight:
            unit = row / row.norm()
            self.supports.append([(self.entropy(self.weight @ unit + self.bias), unit)])

    def entropy(self, logits: Tensor) -> float:
        p = logits.softmax(0)
        return -(p * p.log()).sum().item()

    def step(self, features: Tensor) -> Tensor:
        for h in features.double():
            logits = self.weight @ h + self.bias
            self.supports[int(logits.argmax())].append((self.entropy(logits), h / h.norm()))
        self.supports = [sorted(one, key=lambda pair: pair[0])[: self.keep] for one in self.supports]
        prototypes = torch.stack([torch.stack([unit for _, unit in one]).mean(0) for one in self.supports])
        return features.double() @ prototypes.T


@pytest.mark.parametrize("keep", [1, 2, 5, 100])
@pytest.mark.parametrize("batches", [[8, 8, 8, 8], [1] * 12, [3, 1, 40, 2]])
def test_is_the_bank_of_the_paper(keep: int, batches: list[int]) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator)
    adapter, lists = T3A(plain(weight, bias), keep=keep), Lists(weight, bias, keep)
    for batch in batches:
        x = torch.randn(batch, 6, 1, 1, generator=generator)
        torch.testing.assert_close(adapter(x).double(), lists.step(x.flatten(1)), rtol=1e-4, atol=1e-5)
    for own, supports, expected in zip(adapter.entropies, adapter.supports, lists.supports, strict=True):
        used = own.isfinite()
        assert used.sum() == len(expected)
        assert not supports[~used].any()
        order = own[used].argsort()
        torch.testing.assert_close(own[used][order].double(), torch.tensor([e for e, _ in expected]).double())
        torch.testing.assert_close(supports[used][order].double(), torch.stack([unit for _, unit in expected]))


@pytest.mark.parametrize("net", [batch_norm_net, group_norm_net])
def test_features_are_those_of_the_source_model(net: Any) -> None:
    model = net()
    body, head = model[:-1], model[-1]
    adapter, lists = T3A(model, keep=3), Lists(head.weight.detach(), head.bias.detach(), 3)
    for x in stream():
        torch.testing.assert_close(adapter(x).double(), lists.step(body(x).detach()), rtol=1e-4, atol=1e-5)
    assert torch.equal(adapter.model(stream()[0]).detach(), Source(model)(stream()[0]))


def test_older_supports_stay_where_entropies_are_alike() -> None:
    adapter = T3A(plain(torch.tensor([[1.0, 1.0, 0.0], [-1.0, -1.0, 0.0]])), keep=2)
    adapter(pictures([[4.0, 3.0, 0.0], [3.0, 4.0, 1.0]]))  # both surer than the row of the classifier
    before = adapter.supports.clone()
    adapter(pictures([[5.0, 2.0, 2.0]]))
    assert torch.equal(adapter.supports, before)


def test_a_class_that_has_not_come_keeps_the_row_of_the_classifier() -> None:
    adapter = T3A(plain(torch.eye(3)), keep=4)
    adapter(pictures([[9.0, 0.0, 0.0], [8.0, 1.0, 0.0]]))
    assert adapter.entropies.isfinite().sum(1).tolist() == [3, 1, 1]
    assert adapter.supports[1:, 0].tolist() == [[0, 1, 0], [0, 0, 1]]


def test_images_that_are_not_finite_do_not_enter() -> None:
    adapter = T3A(batch_norm_net(), check_finite=False)
    adapter(stream()[0])
    before = adapter.state_dict()["extra"]
    adapter(torch.full((3, 3, 8, 8), float("nan")))
    assert_same(adapter.state_dict()["extra"], before)


def test_predict_uses_a_bank_that_is_dropped() -> None:
    adapter = T3A(batch_norm_net(), keep=2)
    first, second = stream(2)
    adapter(first)
    before = copy.deepcopy(adapter.state_dict())
    predicted = adapter.predict(second)
    assert_same(adapter.state_dict(), before)
    assert torch.equal(adapter(second), predicted)
    assert not torch.equal(adapter.supports, before["extra"]["supports"])


def test_rows_of_a_quantized_classifier_are_its_dequantized_weight() -> None:
    model = quantized_net()
    layer = find_classifier(model, "test")
    expected = nn.functional.normalize(layer.weight_quantizer(layer.weight.detach()), dim=1)
    adapter = T3A(model, keep=1)
    torch.testing.assert_close(adapter.supports[:, 0], expected, rtol=1e-4, atol=1e-5)
    layer.pack()
    assert layer.weight is None
    torch.testing.assert_close(T3A(model, keep=1).supports, adapter.supports, rtol=1e-4, atol=1e-5)


def test_state_is_the_bank() -> None:
    extra = T3A(batch_norm_net(), keep=7).state_dict()["extra"]
    assert {name: tuple(v.shape) for name, v in extra.items()} == {
        "_tally": (1,),
        "supports": (CLASSES, 7, 4),
        "entropies": (CLASSES, 7),
    }


@pytest.mark.parametrize("keep", [0, -2, 2.5, True, "all", None])
def test_keep_out_of_range(keep: Any) -> None:
    with pytest.raises(InputError, match=rf"^T3A: keep is {keep!r}, expected an integer >= 1"):
        T3A(batch_norm_net(), keep=keep)


def test_keeping_all_is_refused() -> None:
    with pytest.raises(InputError, match=r"T3A: keep is -1, .* keeping all would need memory without bound"):
        T3A(batch_norm_net(), keep=-1)


def test_models_whose_classifier_is_not_at_the_end_are_refused() -> None:
    with pytest.raises(InputError, match="T3A: the model has no linear layer"):
        T3A(nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten()))

    class Auxiliary(nn.Module):
        """Registers a head last that it does not use."""

        def __init__(self, uses: bool) -> None:
            super().__init__()
            self.head, self.other, self.uses = nn.Linear(3, 5), nn.Linear(3, 2), uses

        def forward(self, x: Tensor) -> Tensor:
            h = x.mean((2, 3))
            return self.head(h) + (self.other(h).sum() if self.uses else 0)

    with pytest.raises(InputError, match="T3A: the model answered without its last linear layer"):
        T3A(Auxiliary(False))(stream()[0])
    with pytest.raises(InputError, match="T3A: the model answers with 5 classes and its last linear layer has 2"):
        T3A(Auxiliary(True))(stream()[0])

"""NormEMA against hand-worked numbers and an independent statement of its two forwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tta_cases import assert_same, batch_norm_net, group_norm_net, stream

from ttaq.errors import InputError
from ttaq.tta import METHODS, Source

NormEMA = METHODS["norm_ema"]


def test_hand_worked_statistics() -> None:
    """Source mean 1 and variance 1; weight 2, bias 10, eps 0.5; both batches have mean 2 and biased variance 4."""
    norm = nn.BatchNorm2d(1, eps=0.5)
    with torch.no_grad():
        for tensor, value in ((norm.running_mean, 1), (norm.running_var, 1), (norm.weight, 2), (norm.bias, 10)):
            tensor.fill_(value)
    adapter = NormEMA(nn.Sequential(norm, nn.Flatten()), momentum=0.25)
    x = torch.tensor([0.0, 4.0]).view(2, 1, 1, 1)
    for mean, variance in ((1.25, 1.75), (1.4375, 2.3125)):
        expected = [[(value - mean) / (variance + 0.5) ** 0.5 * 2 + 10] for value in (0, 4)]
        torch.testing.assert_close(adapter(x), torch.tensor(expected))
        assert [buffer.item() for _, buffer in adapter.buffers_adapted()] == pytest.approx([mean, variance])


def forward(net: nn.Sequential, x: Tensor, momentum: float | None) -> Tensor:
    """With a momentum: on the statistics of the batch, which move the running ones. Without: on the running ones."""
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d):
            mean, var = layer.running_mean, layer.running_var
            if momentum is not None:
                mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
                layer.running_mean += momentum * (mean - layer.running_mean)
                layer.running_var += momentum * (var - layer.running_var)
            x = (x - mean[:, None, None]) / (var[:, None, None] + layer.eps).sqrt()
            x = x * layer.weight[:, None, None] + layer.bias[:, None, None]
        else:
            x = layer(x)
    return x


@torch.no_grad()
def test_the_first_forward_is_in_train_mode_and_the_second_in_eval_mode() -> None:
    reference, adapter = batch_norm_net().double(), NormEMA(batch_norm_net())
    for x in (*stream(2), *stream(1, batch=1)):
        forward(reference, x.double(), 0.1)
        torch.testing.assert_close(adapter(x).double(), forward(reference, x.double(), None), rtol=1e-5, atol=1e-5)
    own = dict(adapter.model.named_buffers())
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(own[name].to(buffer.dtype), buffer, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_it_is_torch_but_for_the_unbiased_variance() -> None:
    net, x = batch_norm_net(), stream(1)[0]
    first = net[1]
    first.train()
    before = first.running_var.clone()
    net[:2](x)
    adapter = NormEMA(batch_norm_net())
    adapter(x)
    own = adapter.model[1]
    torch.testing.assert_close(own.running_mean, first.running_mean)
    values = len(x) * 64
    unbiased = before + (own.running_var - before + 0.1 * before) * values / (values - 1) - 0.1 * before
    torch.testing.assert_close(unbiased, first.running_var)


def test_momentum_0_is_source_and_1_forgets_the_stream() -> None:
    never, always, again = (
        NormEMA(batch_norm_net(), momentum=0),
        *(NormEMA(batch_norm_net(), momentum=1) for _ in range(2)),
    )
    for x in stream():
        torch.testing.assert_close(never(x), Source(batch_norm_net())(x))
        always(x)
    assert torch.equal(always(x), again(x))


def test_only_running_statistics_change_and_the_state_holds_them() -> None:
    adapter = NormEMA(batch_norm_net())
    names = ["1.running_mean", "1.running_var", "4.running_mean", "4.running_var"]
    assert [name for name, _ in adapter.buffers_adapted()] == names
    assert adapter.parameters_adapted() == []
    adapter(stream()[0])
    assert list(adapter.state_dict()["extra"]) == ["_tally", *(f"model.{name}" for name in names)]
    source = dict(batch_norm_net().named_buffers())
    assert not any(torch.equal(buffer, source[name]) for name, buffer in adapter.buffers_adapted())


def test_predict_leaves_the_model_as_it_is() -> None:
    adapter = NormEMA(batch_norm_net())
    x = stream()[0]
    rest = adapter.model(x)
    adapter.predict(x)
    assert torch.equal(adapter.model(x), rest)
    torch.testing.assert_close(rest.detach(), Source(batch_norm_net())(x))


def test_an_interrupted_batch_leaves_no_trace() -> None:
    adapter, twin = NormEMA(batch_norm_net()), NormEMA(batch_norm_net())
    first, second = stream(2)
    adapter(first), twin(first)
    before = adapter.state_dict()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = adapter.model[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        adapter(second)
    handle.remove()
    assert_same(adapter.state_dict(), before)
    assert torch.equal(adapter.model(second), twin.model(second))
    assert torch.equal(adapter(second), twin(second))


def test_a_batch_that_is_not_finite_is_not_taken_in() -> None:
    adapter = NormEMA(batch_norm_net(), check_finite=False)
    before = copy.deepcopy(adapter.state_dict()["extra"])
    x = stream()[0]
    x[1, 0, 0, 0] = float("inf")
    adapter(x)
    assert_same(adapter.state_dict()["extra"], before)


def test_a_layer_that_is_not_used_keeps_its_statistics() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).mean((2, 3))

    adapter = NormEMA(Net())
    adapter(stream()[0])
    assert adapter.model.used.running_mean.any()
    assert not adapter.model.unused.running_mean.any()


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan"), "all", None])
def test_momentum_out_of_range(momentum: Any) -> None:
    with pytest.raises(InputError, match=rf"^NormEMA: momentum is {momentum!r}, expected a number in \[0, 1\]"):
        NormEMA(batch_norm_net(), momentum=momentum)


def test_models_without_running_statistics_are_refused() -> None:
    with pytest.raises(InputError, match="NormEMA: the model has no batch norm"):
        NormEMA(group_norm_net())
    with pytest.raises(InputError, match="NormEMA: 0 has no running statistics to go on with; use 'norm'"):
        NormEMA(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten()))

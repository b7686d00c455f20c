"""Shadow: the source model answers, whatever the adapter learns."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tta_cases import TESTED, assert_same, batch_norm_net, quantized_net, stream

from ttaq.errors import CheckpointError, InputError
from ttaq.tta import Shadow, SlidingWindow, Source

methods = pytest.mark.parametrize("name", sorted(TESTED))
NETS = {"float": batch_norm_net, "W4A4": quantized_net}


def make(name: str, net: str = "float", **options: Any) -> Shadow:
    return Shadow(TESTED[name](NETS[net](), **options), NETS[net]())


@methods
@pytest.mark.parametrize("net", sorted(NETS))
def test_the_source_answers_while_the_method_adapts(name: str, net: str) -> None:
    shadow, alone, source = make(name, net), TESTED[name](NETS[net]()), Source(NETS[net]())
    assert shadow.adapted is None
    for x in stream(4):
        assert torch.equal(shadow(x), source(x))
        assert torch.equal(shadow.adapted, alone(x))
    assert shadow.counters == alone.counters
    assert_same(shadow.adapter.state_dict(), alone.state_dict())


def test_takes_images_and_nothing_else() -> None:
    assert list(inspect.signature(Shadow.__call__).parameters) == ["self", "x"]
    with pytest.raises(TypeError):
        make("source")(stream(1)[0], torch.zeros(4, dtype=torch.int64))


def test_predict_changes_nothing() -> None:
    shadow = make("everything")
    first, second = stream(2)
    shadow(first)
    before = shadow.state_dict()
    assert torch.equal(shadow.predict(second), Source(batch_norm_net())(second))
    assert_same(shadow.state_dict(), before)


def test_reset_is_a_fresh_shadow() -> None:
    shadow = make("everything")
    for x in stream():
        shadow(x)
    shadow.reset()
    assert shadow.adapted is None
    assert_same(shadow.state_dict(), make("everything").state_dict())


def test_a_saved_state_goes_on_with_the_same_outputs() -> None:
    shadow, resumed = make("everything"), make("everything")
    first, *rest = stream(4)
    shadow(first)
    resumed.load_state_dict(shadow.state_dict())
    for x in rest:
        assert torch.equal(resumed(x), shadow(x))
        assert torch.equal(resumed.adapted, shadow.adapted)
    assert_same(resumed.state_dict(), shadow.state_dict())


@pytest.mark.parametrize("state", [None, {}, {"adapter": {}}], ids=["none", "empty", "window"])
def test_a_state_of_something_else_is_refused(state: Any) -> None:
    shadow = make("everything")
    before = shadow.state_dict()
    with pytest.raises(CheckpointError, match="expected that of a Shadow"):
        shadow.load_state_dict(state)
    with pytest.raises(CheckpointError, match="options lacks lr"):
        shadow.load_state_dict(make("source").state_dict())
    assert_same(shadow.state_dict(), before)


def test_over_a_window_single_images_are_answered_by_the_source() -> None:
    shadow = Shadow(SlidingWindow(TESTED["everything"](batch_norm_net()), 3), batch_norm_net())
    alone, source = SlidingWindow(TESTED["everything"](batch_norm_net()), 3), Source(batch_norm_net())
    for x in stream(7, batch=1):
        assert torch.equal(shadow(x), source(x))
        assert torch.equal(shadow.adapted, alone(x))
    assert shadow.counters == alone.counters
    assert shadow.counters["images"] == 7


def test_bad_images_change_nothing() -> None:
    shadow, twin = make("everything"), make("everything")
    first, second = stream(2)
    shadow(first), twin(first)
    for images in (torch.rand(2, 1, 8, 8), torch.full((1, 3, 8, 8), float("nan"))):
        with pytest.raises(InputError):
            shadow(images)
    assert_same(shadow.state_dict(), twin.state_dict())
    assert torch.equal(shadow(second), twin(second))
    assert torch.equal(shadow.adapted, twin.adapted)


def test_follows_the_adapter_to_another_dtype() -> None:
    adapter = TESTED["everything"](batch_norm_net()).double()
    x = stream(1)[0].double()
    assert torch.equal(Shadow(adapter, batch_norm_net())(x), Source(batch_norm_net().double())(x))


def test_an_adapter_that_learned_before_is_fine_and_another_model_is_not() -> None:
    adapter = TESTED["everything"](batch_norm_net())
    x = stream(1)[0]
    adapter(x)
    assert torch.equal(Shadow(adapter, batch_norm_net())(x), Source(batch_norm_net())(x))
    with pytest.raises(InputError, match="is not the one that the adapter was built from"):
        Shadow(adapter, batch_norm_net(seed=3))


@pytest.mark.parametrize("adapter", [None, nn.Identity(), lambda x: x])
def test_refuses_what_is_no_adapter(adapter: Any) -> None:
    with pytest.raises(InputError, match="expected an Adapter or a SlidingWindow"):
        Shadow(adapter, batch_norm_net())


def test_answers_need_no_gradients() -> None:
    def answer(x: Tensor) -> Tensor:
        return make("everything")(x)

    assert not answer(stream(1)[0].requires_grad_()).requires_grad

"""The batch size that fits: predicted from two small batches, halved until it does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ttaq.errors import InputError
from ttaq.eval.batch_size import NO_LIMITS, Need, choose_batch_size, measure_need
from ttaq.eval.memory_parts import MemoryParts, StepMemory
from ttaq.eval.run import build_stepper
from ttaq.models import build as build_model
from ttaq.ptq import quantize
from ttaq.tta import Adapter, Shadow, build

SHAPE = (3, 16, 16)


def need(who: str, fixed_mb: float, per_image_mb: float, fewest: int = 1) -> Need:
    return Need(who, MemoryParts(weights=1e6 * fixed_mb), MemoryParts(activations=1e6 * per_image_mb), fewest)


def model() -> nn.Module:
    torch.manual_seed(0)
    return build_model("cifar_resnet8", width=4).eval()


def adapters() -> dict[str, Adapter]:
    quantized = quantize(model(), torch.rand(8, *SHAPE), "W4A4")
    made = {
        f"{name} on {kind}": build(name, net)
        for name in ("norm", "tent", "sar")
        for kind, net in (("float", model()), ("W4A4", quantized))
    }
    made["cotta on float"] = build("cotta", model(), augmentations=2)
    for every, capacity in ((64, 64), (128, 128), (16, 24)):
        made[f"rotta {every}/{capacity} on float"] = build("rotta", model(), update_every=every, capacity=capacity)
    return {**made, "source on float": build("source", model())}


@pytest.mark.parametrize("guards", [False, True])
@pytest.mark.parametrize("who", sorted(adapters()))
def test_the_prediction_from_two_and_four_images_holds_for_many(who: str, guards: bool) -> None:
    """For what a stream of larger batches needs, with the good state that guards keep."""
    adapter = adapters()[who]
    limits = replace(NO_LIMITS, snapshot_every=1) if guards else None
    stepper = build_stepper(adapter, model(), 1, limits, False)
    predicted = measure_need(stepper, SHAPE, who).at(40)
    measured = MemoryParts()
    adapter.fill(SHAPE)
    for x in torch.rand(3, 40, *SHAPE):
        with StepMemory(adapter, stepper) as memory:
            stepper(x.contiguous(memory_format=torch.channels_last))
        measured = measured.combine(memory.parts, max)
    assert predicted.total == pytest.approx(measured.total, rel=0.02)
    assert predicted.activations == pytest.approx(measured.activations, rel=0.02)
    assert (predicted.weights, predicted.optimizer) == (measured.weights, measured.optimizer)


def test_a_window_keeps_its_images() -> None:
    alone, within = (measure_need(build("tent", model()), SHAPE, "", keeps_images=kept).at(8) for kept in (False, True))
    assert within.state - alone.state == 8 * 4 * 3 * 16 * 16


def test_leaves_the_adapter_as_new() -> None:
    adapter = build("tent", model())
    measure_need(adapter, SHAPE, "tent")
    assert adapter.counters == {"batches": 0, "samples": 0, "updates": 0}
    x = torch.rand(4, *SHAPE)
    assert torch.equal(adapter(x), build("tent", model())(x))


def test_a_shadow_needs_the_source_model_too() -> None:
    alone = measure_need(build("tent", model()), SHAPE, "tent").at(4)
    shadow = measure_need(Shadow(build("tent", model()), model()), SHAPE, "tent").at(4)
    assert shadow.state - alone.state >= alone.weights


def test_statistics_of_the_batch_need_eight_images() -> None:
    assert measure_need(build("norm", model()), SHAPE, "norm").fewest == 8
    assert measure_need(build("source", model()), SHAPE, "source").fewest == 1


@pytest.mark.parametrize(
    ("most_mb", "size"), [(1000, 200), (211, 200), (210, 100), (111, 100), (61, 50), (36, 25), (110.5, 50)]
)
def test_the_largest_of_the_halves_that_fits(most_mb: float, size: int) -> None:
    chosen, why = choose_batch_size([need("tent", 11, 1), need("source", 5, 0.1)], 200, most_mb)
    assert chosen == size
    assert why.startswith("tent needs ")
    assert ("with" in why) == (size < 200)


def test_the_method_that_needs_most_decides() -> None:
    small, large = need("norm", 100, 0.1), need("tent", 10, 1)
    assert choose_batch_size([small, large], 64, 80 + 26.4)[0] == 64
    assert choose_batch_size([small, large], 256, 130)[0] == 64
    assert "norm needs 106 of 106.4 MB" in choose_batch_size([small, large], 64, 106.4)[1]


def test_what_is_too_little_says_what_is_missing() -> None:
    with pytest.raises(
        InputError, match=r"tent needs 36 MB in tensors for batches of 25, the fewest .* 200 .*weights 11.*"
    ):
        choose_batch_size([need("tent", 11, 1)], 200, 30)
    with pytest.raises(InputError, match="6 MB more than 30"):
        choose_batch_size([need("tent", 11, 1)], 200, 30)


def test_no_fewer_than_a_method_needs_to_see() -> None:
    assert choose_batch_size([need("source", 1, 1)], 64, 3)[0] == 2
    assert choose_batch_size([need("norm", 1, 1, fewest=8)], 64, 9)[0] == 8
    with pytest.raises(InputError, match="for batches of 8"):
        choose_batch_size([need("norm", 1, 1, fewest=8)], 64, 8.5)
    assert choose_batch_size([need("norm", 1, 1, fewest=8)], 4, 6)[0] == 4  # as asked for


def test_a_window_is_what_a_method_sees() -> None:
    assert choose_batch_size([need("tent", 1, 1)], 1, 20, window=16)[0] == 1
    with pytest.raises(InputError, match="17 MB in tensors for batches of 16"):
        choose_batch_size([need("tent", 1, 1)], 1, 10, window=16)

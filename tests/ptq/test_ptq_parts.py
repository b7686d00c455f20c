"""What TTAQ and PD-Quant add to the trainer: centred weights, predictions, corrected inputs, statistics."""

from __future__ import annotations

import math

import pytest
import torch
from ptq_nets import images, net, pair
from torch import Tensor, nn

from ttaq.nn import convert, quantized_layers
from ttaq.ptq.caches import Budget, chunks, mixed
from ttaq.ptq.correction import corrected
from ttaq.ptq.pem import centre
from ttaq.ptq.prediction import prediction_loss
from ttaq.ptq.settings import Reconstruction
from ttaq.ptq.statistics import batch_statistics, estimate_statistics
from ttaq.ptq.student import unit_module
from ttaq.ptq.units import find_units


def test_centring_takes_the_mean_of_each_channel_or_of_the_tensor() -> None:
    for how in ("channel", "tensor"):
        model, before = convert(net(), "W4A4"), net()
        names = centre(model, how)
        assert names == [name for name in quantized_layers(model) if name != "linear"]
        for name in names:
            old, new = before.get_submodule(name).weight, model.get_submodule(name).weight
            mean = old.mean((1, 2, 3), keepdim=True) if how == "channel" else old.mean()
            torch.testing.assert_close(new, old - mean)
        assert torch.equal(model.linear.weight, before.linear.weight)


def test_compensated_centring_keeps_the_function() -> None:
    model, x = convert(net(), "W4A4"), images()
    names = centre(model, "compensated")
    assert names
    assert all(model.get_submodule(name).weight.mean((1, 2, 3)).abs().max() < 1e-7 for name in names)
    with torch.no_grad():
        torch.testing.assert_close(model(x), net()(x), rtol=1e-4, atol=1e-5)


def test_centring_leaves_depthwise_layers_and_layers_without_a_norm_alone() -> None:
    mobilenet = centre(convert(net("mobilenet"), "W4A4"), "channel")
    assert mobilenet == ["conv1.1", *(f"blocks.{index}.1.0" for index in range(13))]
    wide = centre(convert(net("wide"), "W4A4"), "channel")  # conv2 and the shortcuts feed an addition
    assert wide == [f"block{index}.layer.0.conv1" for index in (1, 2, 3)]


def test_centring_leaves_kernels_alone_that_are_all_mean() -> None:
    model = net()
    with torch.no_grad():
        model.conv1.weight[1] = 1e-6
    quantized = convert(model, "W4A4")
    centre(quantized, "channel")
    assert torch.equal(quantized.conv1.weight[1], model.conv1.weight[1])
    assert quantized.conv1.weight[0].mean().abs() < 1e-7


def logits(p: float) -> Tensor:
    return torch.tensor([[math.log(p / (1 - p)), 0.0]])


@pytest.mark.parametrize("kind", ["gaussian", "step", "mix"])
def test_predictions_by_hand(kind: str) -> None:
    """Two classes; p(x_q) = 0.8, the float model says 0.5, the temperature is 1."""
    settings = Reconstruction(prediction=10.0, temperature=1.0)
    generator = torch.Generator().manual_seed(0)
    x_q, mix = logits(0.8), logits(0.6)
    identity = nn.Identity()
    known = prediction_loss(identity, identity, x_q, mix, logits(0.5), settings, None, generator)
    assert known.item() == pytest.approx(10 * (0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)), rel=1e-5)
    settings = Reconstruction(perturbation=3.0, temperature=1.0, perturbation_kind=kind, perturbation_size=0.1)
    noisy = prediction_loss(identity, identity, x_q, mix, logits(0.5), settings, torch.tensor([0.5]), generator)
    if kind == "mix":
        assert noisy.item() == pytest.approx(3 * (0.8 * math.log(0.8 / 0.6) + 0.2 * math.log(0.2 / 0.4)), rel=1e-5)
    else:
        assert 0 < noisy.item() < 0.3


def test_the_undisturbed_prediction_is_held_fixed() -> None:
    settings = Reconstruction(perturbation=1.0, perturbation_kind="mix")
    x_q, mix = (logits(p).requires_grad_() for p in (0.8, 0.6))
    loss = prediction_loss(nn.Identity(), nn.Identity(), x_q, mix, x_q, settings, None, torch.Generator())
    of_x_q, of_mix = torch.autograd.grad(loss, [x_q, mix], allow_unused=True)
    assert of_x_q is None or not of_x_q.any()
    assert of_mix.any()


def test_noise_is_as_large_as_asked_and_stays_above_zero_behind_a_relu() -> None:
    seen: list[Tensor] = []

    def unit(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    x_q = torch.rand(8, 4096, generator=torch.Generator().manual_seed(0)) + 5
    draw = torch.Generator().manual_seed(1)
    for kind, deviation in (("gaussian", 0.1 * x_q.std().item()), ("step", 0.5 / math.sqrt(12))):
        settings = Reconstruction(perturbation=1.0, perturbation_kind=kind)
        prediction_loss(unit, nn.Identity(), x_q, x_q, x_q, settings, torch.tensor([0.5]), draw)
        assert (seen[-1] - x_q).std().item() == pytest.approx(deviation, rel=0.03)
    zeros = torch.zeros(8, 64).index_fill_(1, torch.tensor([0]), 1.0)
    settings = Reconstruction(perturbation=1.0)
    prediction_loss(unit, nn.Identity(), zeros, zeros, zeros, settings, None, draw)
    assert seen[-1].min() == 0


def test_correction_brings_the_inputs_to_the_statistics_of_the_source() -> None:
    teacher = pair()[1]
    unit = unit_module(teacher, find_units(teacher)[1])
    x = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2

    norm = unit.get_submodule("layer1.0.bn1")

    def distance(x: Tensor) -> float:
        seen = []
        handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            unit(x)
        handle.remove()
        return (seen[0].mean((2, 3)) - norm.running_mean).square().mean().item()

    moved = corrected(unit, x, 0.1)
    assert distance(moved) < 0.8 * distance(x)
    near = corrected(unit, x, 1e-6)
    assert (near - x).abs().max() < 0.1 * (moved - x).abs().max()


def test_statistics_of_all_batches_together() -> None:
    model = convert(net(), "W4A4")
    x = images(count=9)
    with batch_statistics(model), torch.no_grad():
        seen = []
        handle = model.bn1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(x)
        handle.remove()
    assert model.bn1.alpha is None
    estimate_statistics(model, x.split(4))
    torch.testing.assert_close(model.bn1.running_mean, seen[0].mean((0, 2, 3)))
    torch.testing.assert_close(model.bn1.running_var, seen[0].var((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_chunks_cover_everything_in_even_parts() -> None:
    for count, side, most in (
        (2, 32, 2),
        (255, 32, 255),
        (257, 8, 257),
        (400, 32, 384),
        (1024, 32, 256),
        (1025, 32, 384),
        (1000, 224, 96),
        (50, 512, 50),
    ):
        places = chunks(torch.empty(count, 3, side, side, device="meta"))
        assert [i for place in places for i in range(place.start, place.stop)] == list(range(count))
        sizes = [place.stop - place.start for place in places]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= most


@pytest.mark.parametrize("megabytes", [1, 0])
def test_rows_come_back_as_they_were(megabytes: float) -> None:
    model = pair()[0]
    grid = model.activation_quantizers["after_relu"]
    budget = Budget(megabytes)
    x = grid(torch.rand(6, 4, 5, 5)).contiguous(memory_format=torch.channels_last)
    for quantizer in (None, grid):
        rows = budget.rows(x, 6, quantizer)
        rows.write(slice(0, 6), x)
        assert rows.values.dtype == (torch.float32 if quantizer is None else torch.uint8)
        back = rows.read(slice(2, 5), x.device)
        assert torch.equal(back, x[2:5])
        assert back.is_contiguous(memory_format=torch.channels_last)
        taken = mixed(
            rows, rows if quantizer is None else budget_rows(x), torch.tensor([5, 0, 0]), 1.0, torch.tensor(3)
        )
        assert torch.equal(taken, x[[5, 0, 0]])
        stored = rows.take(torch.tensor([3, 3, 1]))
        assert torch.equal(stored, rows.values[[3, 3, 1]])
        assert stored.is_contiguous(memory_format=torch.channels_last)
        rows.release()
    assert budget.left == megabytes * 1e6


def budget_rows(x: Tensor) -> object:
    rows = Budget(1).rows(x, len(x))
    rows.write(slice(0, len(x)), x)
    return rows

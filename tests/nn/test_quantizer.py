"""Quantizers: uncalibrated, calibrated, saved, loaded, moved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ttaq.errors import InputError
from ttaq.nn import Quantizer
from ttaq_kernels import fake_quantize

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def calibrated(bits: int = 4, **options: object) -> Quantizer:
    quantizer = Quantizer(bits, **options)
    quantizer.calibrate(X)
    return quantizer


def test_uncalibrated_returns_its_input_and_has_no_state() -> None:
    quantizer = Quantizer(4)
    assert quantizer(X) is X
    assert list(quantizer.state_dict()) == []


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("search", ["mse", "minmax"])
def test_calibrated_is_fake_quantize(axis: int | None, symmetric: bool, search: str) -> None:
    quantizer = Quantizer(3, symmetric, axis)
    quantizer.calibrate(X, search=search)
    qmin, qmax = (-4, 3) if symmetric else (0, 7)
    assert (quantizer.qmin, quantizer.qmax, quantizer.largest_code) == (qmin, qmax, max(-qmin, qmax))
    expected = fake_quantize(X, quantizer.scale, quantizer.zero_point, qmin, qmax, axis)
    assert torch.equal(quantizer(X), expected)
    assert torch.equal(quantizer(expected), expected)


def test_a_larger_p_clips_less() -> None:
    x = torch.cat([torch.randn(5000, generator=torch.Generator().manual_seed(0)), torch.tensor([20.0])])
    scales = []
    for p in (2.0, 3.0, 6.0):
        quantizer = Quantizer(4, p=p)
        quantizer.calibrate(x)
        scales.append(float(quantizer.scale))
    assert scales == sorted(scales)
    assert scales[0] < scales[-1]


def test_a_state_makes_a_grid() -> None:
    source = calibrated(axis=0)
    target = Quantizer(4, axis=0)
    assert not any(target.load_state_dict(source.state_dict()))
    assert torch.equal(target(X), source(X))
    assert target.scale.data_ptr() != source.scale.data_ptr()
    target.load_state_dict({}, strict=False)
    assert torch.equal(target(X), source(X)), "a state without the grid leaves it alone"
    target.set_grid(None, None)
    assert target(X) is X
    assert list(target.state_dict()) == []


def test_half_a_state_is_refused() -> None:
    state = calibrated().state_dict()
    del state["zero_point"]
    with pytest.raises(RuntimeError, match=r"Missing key.*zero_point"):
        Quantizer(4).load_state_dict(state)


def test_scale_stays_float32() -> None:
    quantizer = calibrated()
    scale = quantizer.scale.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        moved = nn.Sequential(copy.deepcopy(quantizer)).to(dtype)[0]
        assert torch.equal(moved.scale, scale)
        assert moved.zero_point.dtype == torch.int32


def test_a_grid_is_made_where_the_model_is() -> None:
    state = calibrated().state_dict()
    quantizer = Quantizer(4).to("meta")
    quantizer.load_state_dict({key: value.to("meta") for key, value in state.items()})
    assert quantizer.scale.device.type == "meta"


def test_deepcopy_is_independent() -> None:
    quantizer = calibrated()
    twin = copy.deepcopy(quantizer)
    twin.scale.mul_(2)
    assert not torch.equal(twin(X), quantizer(X))


def test_calibrating_in_inference_mode_makes_normal_tensors() -> None:
    with torch.inference_mode():
        quantizer = calibrated()
    assert not quantizer.scale.is_inference()


@pytest.mark.parametrize("bits", [1, 9, 4.0, True, None])
def test_bits_out_of_range(bits: object) -> None:
    with pytest.raises(InputError, match=r"^Quantizer: bits is .*, expected 2 to 8"):
        Quantizer(bits)

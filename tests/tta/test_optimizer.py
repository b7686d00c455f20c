"""The optimizer state that exists from the start against torch's own, which appears with the first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ttaq.tta.optimizer import make_optimizer, zero_state


@pytest.mark.parametrize(
    ("kind", "options"),
    [("adam", {}), ("sgd", {}), ("sgd", {"nesterov": True}), ("sgd", {"momentum": 0.0})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zero_state_steps_as_torch_does(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = [torch.randn(7, dtype=dtype), torch.randn(3, 2, dtype=dtype)]
    ours, theirs = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    optimizers = [make_optimizer("test", each, kind, lr=0.1, **options) for each in (ours, theirs)]
    zero_state(optimizers[0])
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    for one, other in zip(ours, theirs, strict=True):
        for key, value in optimizers[1].state[other].items():
            assert value is None or torch.equal(optimizers[0].state[one][key], value), key


def test_zero_state_keeps_the_tensors_it_has() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = make_optimizer("test", [parameter], "adam", lr=0.1)
    zero_state(optimizer)
    tensors = dict(optimizer.state[parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    zero_state(optimizer)
    assert tensors.keys() == {"exp_avg", "exp_avg_sq", "step"}
    assert all(optimizer.state[parameter][key] is value and not value.any() for key, value in tensors.items())

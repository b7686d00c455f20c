"""Soft rounding: every direction, and the step of a unit of three weights."""

import importlib

import torch
from kernel_launch import Launch

from ttaq_kernels import soft_round_step

# The package exports a function of the same name.
soft_round = importlib.import_module("ttaq_kernels.soft_round")


def _soft_round(direction: str, layout: torch.memory_format) -> object:
    v = torch.zeros(64, 64, 3, 3).to(memory_format=layout)
    codes, channel, one = torch.zeros_like(v, dtype=torch.uint8), torch.zeros(64), torch.ones(())
    if direction in ("soft", "hard"):
        return soft_round._launch_forward(v, codes, channel, channel, direction == "hard")
    if direction == "backward":
        return soft_round._launch_backward(v, v, channel)
    if direction == "penalty":
        return soft_round._launch_penalty(v, one)
    return soft_round._launch_penalty_backward(one, v, one)


def _step() -> object:
    weights = [torch.zeros(64, 64, 3, 3), torch.zeros(64, 64, 3, 3), torch.zeros(128, 64, 1, 1)]
    codes = [torch.zeros_like(weight, dtype=torch.uint8) for weight in weights]
    channels = [torch.zeros(len(weight)) for weight in weights]
    lists = (weights, weights, weights, weights, weights, codes, channels, channels)
    return soft_round_step._launch_step(*lists, torch.zeros(4), 0.9, 0.999, 1e-8)


LAUNCHES = [
    *(
        Launch(f"soft_round-{way}", lambda way=way: _soft_round(way, torch.contiguous_format), registers=registers)
        for way, registers in (("soft", 64), ("hard", 64), ("backward", 64), ("penalty", 64), ("penalty_backward", 80))
    ),
    Launch("soft_round-soft-channels_last", lambda: _soft_round("soft", torch.channels_last), registers=64),
    Launch("soft_round_step", _step, registers=128),
]

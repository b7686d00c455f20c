"""Seeded perturbation in plain PyTorch: the CPU path, and what the kernel is tested against, bit for bit."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttaq_kernels.reference.philox import philox

__all__ = ["DISTRIBUTIONS", "NORMAL_STEP", "draw", "perturb"]

DISTRIBUTIONS = ("signs", "half_to_one", "normal")
# 1 / sqrt(16 (256^2 - 1) / 12), the standard deviation of a sum of 16 bytes, in fp32.
NORMAL_STEP = torch.tensor(87380.0, dtype=torch.float64).rsqrt().float().item()


def draw(seed: Tensor, elements: int, distribution: str) -> Tensor:
    """z of the elements 0, ..., `elements` - 1, fp32."""
    words = philox(seed, elements)
    if distribution == "normal":
        return words.view(torch.uint8).sum(1, dtype=torch.int32).sub_(2040).float().mul_(NORMAL_STEP)
    first = words.view(torch.int32)[:, 0]
    # Bit 31 is the sign of an fp32 number too.
    bits = first.bitwise_and(-(1 << 31))
    if distribution == "signs":
        return bits.bitwise_or_(0x3F800000).view(torch.float32)
    magnitude = first.bitwise_and(0x7FFFFF).float().mul_(1 / (1 << 24)).add_(0.5)
    return bits.bitwise_or_(magnitude.view(torch.int32)).view(torch.float32)


def perturb(bases: Sequence[Tensor], c: Tensor, seeds: Tensor, distribution: str, inverse: bool) -> Tensor:
    """[K, P]: all bases one after the other, plus c z or c / z of each seed."""
    flat = torch.cat([base.reshape(-1) for base in bases])
    out = flat.new_empty(seeds.numel(), flat.numel())
    for row, seed, scale in zip(out, seeds.reshape(-1), c.reshape(-1).expand(len(out)), strict=True):
        z = draw(seed, flat.numel(), distribution)
        step = scale / z if inverse else z.mul_(scale)
        row.copy_(step.add_(flat))
    return out

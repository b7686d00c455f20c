"""Groups of samples that have their own weight and bias, such as the perturbed copies of a batch."""

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._launch import tl, triton
from ttaq_kernels.errors import KernelError
from ttaq_kernels.reference.group_affine import sum_groups

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["check_groups", "group_of", "samples_per_group", "sum_groups"]


@triton.jit
def group_of(groups_ptr, sample, per_group, mask):
    """The group of each sample: by index, or `per_group` samples after each other; 64 bits wide."""
    group = sample // per_group
    if groups_ptr is not None:
        group = tl.load(groups_ptr + sample, mask=mask, other=0)
    return group.to(tl.int64)


def samples_per_group(samples: int, groups: int) -> int:
    """Of a batch in equal parts; at least 1, since it is divided by."""
    return max(1, samples // groups)


def check_groups(
    who: str, x: Tensor, channels: int, weight: Tensor | None, bias: Tensor | None, groups: Tensor | None
) -> None:
    """weight and bias have one row of channels for each group, and every sample of `x` has a group."""
    rows = [vector.shape[0] for vector in (weight, bias) if isinstance(vector, Tensor) and vector.ndim == 2]
    count = rows[0] if rows else 1
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            _check.check_parameter(who, name, vector, x, [(count, channels)], "= (groups, channels)", torch.float32)
    samples = x.shape[0]
    if groups is not None:
        _check.check_parameter(who, "groups", groups, x, [(samples,)], "= (x.shape[0],)", torch.int32)
    elif count == 0 or samples % count:
        raise KernelError(
            f"{who}: x has {samples} samples, expected a multiple of {count}, the groups of weight and bias; "
            "give the group of each sample with groups"
        )

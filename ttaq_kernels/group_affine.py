"""Weight and bias per group of samples, for what a norm without affine has normalised.

    y[n, c, s] = x[n, c, s] weight[g(n), c] + bias[g(n), c]

    dx = dy weight,  dweight[g, c] = sum over the samples of g of dy x,  dbias[g, c] = the same sum of dy

So one forward of G copies of a batch, each with its own norm parameters, reads the network's weights once. fp32 inside;
the sums are per tile first, then added in a fixed order. Bytes per element of a 2-byte tensor: forward 4, backward 6,
without dx or without the sums 4. Called by the forward-only methods of `ttaq.tta`.
"""

from typing import Any

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._channels import check_channels, evenly_spaced, laid_out_like
from ttaq_kernels._groups import check_groups, group_of, samples_per_group, sum_groups
from ttaq_kernels._launch import ceil_div, launch, next_power_of_2, tl, triton
from ttaq_kernels._library import register_op
from ttaq_kernels.errors import KernelError
from ttaq_kernels.reference import group_affine as reference

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["group_affine"]

_WHO = "group_affine"
# Tiles where channels are neighbours in memory and positions are many: elements, channels and warps.
_TILE = 4096
_CHANNELS = 64
_WARPS = 8
# Where positions are neighbours: positions at most, those of a warp, and the elements of a warp. A thread then has
# several positions of a channel, which it adds up before threads exchange their sums.
_POSITIONS = 512
_WARP_POSITIONS = 128
_WARP_TILE = 1024


@triton.jit
def _place(sizes, groups_ptr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Sample, channels, positions and mask of this program's tile, the tile's number but for the channels, its group"""
    channels, positions, columns, chunks, per_group = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    program = tl.program_id(0)
    part = (program // columns).to(tl.int64)
    sample = part // chunks
    offs_c = (program % columns).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    offs_s = (part % chunks) * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    mask = (offs_c < channels) & (offs_s < positions)
    return sample, offs_c, offs_s, mask, part, group_of(groups_ptr, sample, per_group, True)


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, groups_ptr, y_ptr, sizes, strides, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """y = x weight + bias"""
    sample, offs_c, offs_s, mask, _, group = _place(sizes, groups_ptr, BLOCK_C, BLOCK_S)
    mask_c = offs_c < sizes[0]
    offs = sample * strides[0][0] + offs_c * strides[0][1] + offs_s * strides[0][2]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.load(weight_ptr + group * sizes[0] + offs_c, mask=mask_c, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + group * sizes[0] + offs_c, mask=mask_c, other=0.0)
    offs = sample * strides[1][0] + offs_c * strides[1][1] + offs_s * strides[1][2]
    tl.store(y_ptr + offs, y, mask=mask)


@triton.jit
def _backward_kernel(
    x_ptr,
    grad_ptr,
    weight_ptr,
    groups_ptr,
    dx_ptr,
    parts_ptr,
    parts,
    sizes,
    strides,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx = dy weight; parts[:, part, c] = sum dy x, sum dy over the tile"""
    sample, offs_c, offs_s, mask, part, group = _place(sizes, groups_ptr, BLOCK_C, BLOCK_S)
    mask_c = offs_c < sizes[0]
    offs = sample * strides[1][0] + offs_c * strides[1][1] + offs_s * strides[1][2]
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if dx_ptr is not None:
        weight = tl.load(weight_ptr + group * sizes[0] + offs_c, mask=mask_c, other=0.0)
        offs = sample * strides[2][0] + offs_c * strides[2][1] + offs_s * strides[2][2]
        tl.store(dx_ptr + offs, grad * weight, mask=mask)
    if parts_ptr is not None:
        offs = sample * strides[0][0] + offs_c * strides[0][1] + offs_s * strides[0][2]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        out_ptr = parts_ptr + part * sizes[0] + offs_c
        tl.store(out_ptr, tl.sum(grad * x, axis=1)[:, None], mask=mask_c)
        tl.store(out_ptr + parts * sizes[0], tl.sum(grad, axis=1)[:, None], mask=mask_c)


def _rows(x: Tensor) -> Tensor:
    """[N, C, S], a view wherever positions are evenly spaced."""
    return x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)


def _tiles(x: Tensor, weight: Tensor) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """Tiles of a sample along the positions, the sizes that the kernels take and their blocks; `x` is [N, C, S]."""
    samples, channels, positions = x.shape
    if x.stride(1) == 1:
        block_s = min(next_power_of_2(positions), _TILE // _CHANNELS)
        block_c = min(next_power_of_2(channels), _TILE // block_s)
        warps = _WARPS
    else:
        block_s = min(next_power_of_2(positions), _POSITIONS)
        warps = max(1, block_s // _WARP_POSITIONS)
        block_c = min(next_power_of_2(channels), warps * _WARP_TILE // block_s)
    chunks = ceil_div(positions, block_s)
    sizes = (channels, positions, ceil_div(channels, block_c), chunks, samples_per_group(samples, len(weight)))
    return chunks, sizes, {"BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": warps}


def _launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: Tensor | None, out_dtype: torch.dtype | None = None
) -> Tensor:
    y = torch.empty_like(x, dtype=out_dtype)
    out = y if evenly_spaced(y) else torch.empty_like(x, dtype=y.dtype, memory_format=torch.contiguous_format)
    x3, out3 = _rows(x), _rows(out)
    chunks, sizes, blocks = _tiles(x3, weight)
    vectors = (None if t is None else t.contiguous() for t in (weight, bias, groups))
    arguments = (x3, *vectors, out3, sizes, (x3.stride(), out3.stride()))
    launch(_WHO, _forward_kernel, len(x) * chunks * sizes[2], *arguments, **blocks)
    return y if out is y else y.copy_(out)


def _launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    groups: Tensor | None,
    need_x: bool,
    need_affine: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, dtype=out_dtype) if need_x else x.new_empty(0)
    out = dx
    if need_x and not evenly_spaced(dx):
        out = torch.empty_like(x, dtype=dx.dtype, memory_format=torch.contiguous_format)
    x3 = _rows(x if evenly_spaced(x) else x.contiguous())
    grad3 = _rows(laid_out_like(grad, x))
    out3 = _rows(out) if need_x else None
    chunks, sizes, blocks = _tiles(x3, weight)
    parts = len(x) * chunks
    partial = weight.new_empty(2, parts, x.shape[1]) if need_affine else None
    strides = (x3.stride(), grad3.stride(), x3.stride() if out3 is None else out3.stride())
    vectors = (None if t is None else t.contiguous() for t in (weight, groups))
    arguments = (x3, grad3, *vectors, out3, partial, parts, sizes, strides)
    launch(_WHO, _backward_kernel, parts * sizes[2], *arguments, **blocks)
    if partial is None:
        affine = weight.new_empty(0)
    else:
        affine = sum_groups(partial.view(2, len(x), chunks, x.shape[1]).sum(2), groups, len(weight))
    return dx if out is dx else dx.copy_(out), affine


def _fake_backward(
    _grad: Tensor, x: Tensor, weight: Tensor, _groups: Tensor | None, need_x: bool, need_affine: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    return dx, weight.new_empty((2, *weight.shape) if need_affine else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, weight, _, groups = inputs
    ctx.save_for_backward(x, weight, groups)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    need_affine = need_weight or need_bias
    dx, affine = _group_affine_backward(grad, *ctx.saved_tensors, need_x, need_affine)
    dweight, dbias = affine if need_affine else (None, None)
    return dx if need_x else None, dweight if need_weight else None, dbias if need_bias else None, None


_group_affine_backward = register_op(
    "group_affine_backward(Tensor grad, Tensor x, Tensor weight, Tensor? groups, bool need_x, bool need_affine)"
    " -> (Tensor, Tensor)",
    cpu=reference.group_affine_backward,
    cuda=_launch_backward,
    fake=_fake_backward,
)
_group_affine = register_op(
    "group_affine(Tensor x, Tensor weight, Tensor? bias, Tensor? groups) -> Tensor",
    cpu=reference.group_affine,
    cuda=_launch_forward,
    fake=lambda x, *_: torch.empty_like(x),
    setup_context=_save,
    backward=_backward,
)


def group_affine(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Tensor | None = None, axis: int = 1) -> Tensor:
    """Each sample times the weight of its group, plus the bias of its group.

        y[n, ..., c, ...] = x[n, ..., c, ...] weight[g(n), c] + bias[g(n), c]

    Args:
        x: float32, bfloat16 or float16, [N, ...] with the channels in dimension `axis`, any memory layout.
        weight, bias: float32 [G, C]; bias may be None.
        groups: int32 [N], the group of each sample, 0 <= g < G (not checked: that would wait for the device). None for
            G equal parts of the batch, one after the other; N is then a multiple of G.
        axis: 1 for [N, C, ...], -1 for [N, L, C].

    Returns:
        A tensor with the shape, type and memory layout of `x` (a tensor with gaps gives a dense one).

    Gradients: of `x`, `weight` and `bias`; repeatable bit for bit.

    Exactness: arithmetic in float32, the result rounded once.

    Raises:
        KernelError: a type, shape, device or axis that does not fit, or a batch that has no G equal parts.
    """
    _check.check_input(_WHO, "x", x)
    check_channels(_WHO, x)
    if axis not in (1, -1):
        raise KernelError(f"{_WHO}: axis is {axis}, expected 1 for [N, C, ...] or -1 for [N, ..., C]")
    moved = x.movedim(axis, 1)
    _check.check_input(_WHO, "weight", weight, (torch.float32,))
    check_groups(_WHO, moved, moved.shape[1], weight, bias, groups)
    y: Tensor = _group_affine(moved, weight, bias, groups)
    return y.movedim(1, axis)

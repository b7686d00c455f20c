"""The kernels of `layer_norm` and their launchers."""

import torch
from torch import Tensor

from ttaq_kernels._groups import group_of, samples_per_group, sum_groups
from ttaq_kernels._launch import ceil_div, launch, next_power_of_2, tl, triton
from ttaq_kernels._math import integer_within, reciprocal, round_within, rounds_within
from ttaq_kernels.reference.norm_act_quant import gradient_carrier, stored_shift

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["group_count", "launch_backward", "launch_forward"]

_WHO = "layer_norm"
_TILE = 2048  # elements of one program where rows are short
_WARP_TILE = 1024  # elements of each warp of the forward
_FEWEST = 4  # channels that a row of the forward counts as: each has a quotient and a root in registers
_REDUCING_PROGRAMS = 512  # the same for all GPUs, since the split decides the rounding


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    groups_ptr,
    scale_ptr,
    zero_point_ptr,
    y_ptr,
    statistics_ptr,
    rows,
    group_rows,
    grid,
    eps,
    CHANNELS: tl.constexpr,
    GROUPED: tl.constexpr,
    CODES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = ((x - mean) rstd) weight + bias, on the grid or as codes; statistics[:, row] = mean, rstd

    A row is PARTS times BLOCK_C channels. Without `groups_ptr` every `group_rows` rows are a group, with it a sample.
    """
    # Beyond the last row comes the last again, whose results are stored twice: so only columns need a mask.
    row = tl.minimum(tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), rows - 1)[:, None]
    first = row.to(tl.int64) * CHANNELS
    columns = tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    xs = ()
    for part in tl.static_range(PARTS):
        offs_c = part * BLOCK_C + columns
        x = tl.load(x_ptr + first + offs_c, mask=offs_c < CHANNELS, other=0.0).to(tl.float32)
        total += x
        xs += (x,)  # type: ignore[assignment]
    mean = tl.sum(total, axis=1)[:, None] * (1.0 / CHANNELS)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for part in tl.static_range(PARTS):
        d = tl.where(part * BLOCK_C + columns < CHANNELS, xs[part] - mean, 0.0)
        squares += d * d
    var = tl.sum(squares, axis=1)[:, None] * (1.0 / CHANNELS)
    rstd = reciprocal(tl.sqrt_rn(var + eps))
    tl.store(statistics_ptr + row, mean)
    tl.store(statistics_ptr + rows + row, rstd)
    parameters = 0
    if GROUPED:
        group = row // group_rows
        if groups_ptr is not None:
            group = tl.load(groups_ptr + group)
        parameters = group.to(tl.int64) * CHANNELS
    if scale_ptr is not None:
        scale, zero_point = tl.load(scale_ptr), tl.load(zero_point_ptr)
        inv, low, high = reciprocal(scale), grid[0] - zero_point, grid[1] - zero_point
    for part in tl.static_range(PARTS):
        offs_c = part * BLOCK_C + columns
        mask = offs_c < CHANNELS
        y = (xs[part] - mean) * rstd
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + parameters + offs_c, mask=mask, other=0.0)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + parameters + offs_c, mask=mask, other=0.0)
        if CODES:
            y = (integer_within(y * inv, low, high) + (zero_point - grid[2])).to(tl.int8)
        elif scale_ptr is not None:
            y = round_within(y * inv, low, high) * scale
        tl.store(y_ptr + first + offs_c, y, mask=mask)


@triton.jit
def _backward_kernel(
    x_ptr,
    grad_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    groups_ptr,
    scale_ptr,
    zero_point_ptr,
    dx_ptr,
    parts_ptr,
    sizes,
    split,
    grid,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx of the rows of one part of a segment, and parts[:, part] = sum g n, sum g; a segment has one group"""
    rows, channels, positions, per_group = sizes[0], sizes[1], sizes[2], sizes[3]
    segment_rows, per_part, parts = split[0], split[1], split[2]
    program = tl.program_id(0).to(tl.int64)
    segment, part = program // parts, program % parts
    first, last = part * per_part, tl.minimum((part + 1) * per_part, segment_rows)
    offs_c = tl.arange(0, BLOCK_C)[None, :]
    mask_c = offs_c < channels
    row = group_of(groups_ptr, segment * segment_rows // positions, per_group, True) * channels
    weight = tl.full((1, BLOCK_C), 1.0, tl.float32)
    bias = tl.zeros((1, BLOCK_C), tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row + offs_c, mask=mask_c, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + row + offs_c, mask=mask_c, other=0.0)
    share = tl.div_rn(1.0, tl.cast(channels, tl.float32))
    dot = tl.zeros((1, BLOCK_C), tl.float32)
    total = tl.zeros((1, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)[:, None]
        mask_r = offs_r < last
        offs_r += segment * segment_rows
        offs, mask = offs_r * channels + offs_c, mask_r & mask_c
        mean = tl.load(statistics_ptr + offs_r, mask=mask_r, other=0.0)
        rstd = tl.load(statistics_ptr + rows + offs_r, mask=mask_r, other=0.0)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        normalised = tl.where(mask, (x - mean) * rstd, 0.0)
        if scale_ptr is not None:
            y = normalised * weight + bias
            zero_point = tl.load(zero_point_ptr)
            low, high = grid[0] - zero_point, grid[1] - zero_point
            grad = tl.where(rounds_within(y * reciprocal(tl.load(scale_ptr)), low, high), grad, 0.0)
        along = grad * normalised
        dot += tl.sum(along, axis=0)[None, :]
        total += tl.sum(grad, axis=0)[None, :]
        if dx_ptr is not None:
            weighted = grad * weight
            mean_h = tl.sum(weighted, axis=1)[:, None] * share
            mean_hn = tl.sum(weighted * normalised, axis=1)[:, None] * share
            tl.store(dx_ptr + offs, ((weighted - mean_h) - normalised * mean_hn) * rstd, mask=mask)
    if parts_ptr is not None:
        out_ptr = parts_ptr + program * channels + offs_c
        tl.store(out_ptr, dot, mask=mask_c)
        tl.store(out_ptr + tl.num_programs(0).to(tl.int64) * channels, total, mask=mask_c)


def _positions(x: Tensor) -> int:
    """Rows of each sample, at least 1."""
    return max(1, x[0].numel() // x.shape[-1]) if len(x) else 1


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    channels = x.shape[-1]
    return x.numel() // channels, channels, _positions(x), samples_per_group(len(x), groups)


def _blocks(channels: int) -> dict[str, int]:
    block_c = next_power_of_2(channels)
    return {"BLOCK_R": max(1, _TILE // block_c), "BLOCK_C": block_c, "num_warps": min(16, max(4, block_c // 512))}


def _forward_blocks(channels: int) -> dict[str, int]:
    """A warp for each 1024 channels; where three quarters of a power of two hold them, the last quarter stays away."""
    width = next_power_of_2(channels)
    parts = 3 if 4 * channels <= 3 * width else 1
    rows = max(1, _WARP_TILE // max(_FEWEST, width))
    blocks = {"BLOCK_R": rows, "BLOCK_C": width if parts == 1 else width // 4}
    return {"PARTS": parts, **blocks, "num_warps": max(1, width // _WARP_TILE)}


def group_count(*parameters: Tensor | None) -> int:
    """Rows of weight and bias."""
    return next((len(parameter) for parameter in parameters if parameter is not None), 1)


def launch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    codes: bool,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics, `y`, and for codes the tensor that carries their gradient."""
    y = torch.empty_like(x, dtype=torch.int8 if codes else out_dtype)
    x = x.contiguous()
    out = y if y.is_contiguous() else torch.empty_like(x, dtype=y.dtype)
    count = group_count(weight, bias)
    rows, channels, positions, per_group = _sizes(x, count)
    statistics = x.new_empty(2, rows, dtype=torch.float32)
    vectors = (None if t is None else t.contiguous() for t in (weight, bias, groups))
    group_rows = positions * (1 if groups is not None else per_group)
    arguments = (x, *vectors, scale, zero_point, out, statistics, rows, group_rows, (qmin, qmax, stored_shift(qmax)))
    options = {"CHANNELS": channels, "GROUPED": count > 1, "CODES": codes, **_forward_blocks(channels)}
    launch(_WHO, _forward_kernel, ceil_div(rows, options["BLOCK_R"]), *arguments, eps, **options)
    return statistics, y if out is y else y.copy_(out), gradient_carrier(x) if codes else x.new_empty(0)


def launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    groups: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    count: int,
    need_x: bool,
    need_affine: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """dx, and [2, G, C]: dweight and dbias of `count` groups; what is not needed comes back empty."""
    dx = torch.empty_like(x, dtype=out_dtype) if need_x else x.new_empty(0)
    x, grad = x.contiguous(), grad.contiguous()
    out = dx if dx.is_contiguous() else torch.empty_like(x, dtype=dx.dtype)
    sizes = _sizes(x, count)
    # A segment has one group: with an index it is a sample, else all samples of a group.
    segments = len(x) if groups is not None else count
    segment_rows = sizes[0] // max(1, segments)
    per_part = max(1, ceil_div(sizes[0], _REDUCING_PROGRAMS))
    parts = ceil_div(segment_rows, per_part)
    partial = statistics.new_empty(2, segments, parts, sizes[1]) if need_affine else None
    vectors = (None if t is None else t.contiguous() for t in (weight, bias, statistics, groups))
    tensors = (x, grad, *vectors, scale, zero_point, out if need_x else None, partial)
    arguments = (*tensors, sizes, (segment_rows, per_part, parts), (qmin, qmax))
    launch(_WHO, _backward_kernel, segments * parts, *arguments, **_blocks(sizes[1]))
    affine = statistics.new_empty(0)
    if partial is not None:
        affine = partial.sum(2) if groups is None else sum_groups(partial.sum(2), groups, count)
    return dx if out is dx else dx.copy_(out), affine

"""The kernels of `batch_norm` and `norm_act_quant`: the statistics of each channel and one pass forward, one reduction
and one pass backward.

    z = (x - mean) (rstd weight) + bias + residual         residual, activation and grid are optional
    a = z, relu(z) or relu6(z)
    q = clamp(rint(a * inv) + zero_point, qmin, qmax)      inv = 1 / scale
    y = a, or (q - zero_point) * scale, or q as int8, or two q in a byte

Backward, with g = dy where neither activation nor grid clip z, else 0:

    dbias = sum g,  dweight = rstd sum g (x - mean),  dresidual = g
    dx    = rstd weight (g - share dbias - (x - batch_mean) share rstd dweight)      share 0 for samples not selected

What is clipped is computed again from x: the codes do not tell (a value that rounds to 0 may have passed relu).
"""

from ttaq_kernels._channels import offsets, tile, tile_of_images
from ttaq_kernels._launch import tl, triton
from ttaq_kernels._math import integer_within, reciprocal, round_within, rounds_within
from ttaq_kernels.moments import merged

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["STATISTICS", "forward_kernel", "input_gradient_kernel", "statistics_kernel", "sums_kernel"]

# Rows of the statistics that the forward keeps: mean, rstd, mean of the batch, share / M, var.
STATISTICS = 5


@triton.jit
def _affine(statistics_ptr, weight_ptr, bias_ptr, channels, offs_c):
    """mean, rstd, rstd weight and bias of the channels of a tile"""
    mask_c = offs_c < channels
    mean = tl.load(statistics_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.load(statistics_ptr + channels + offs_c, mask=mask_c, other=0.0)
    factor = rstd
    if weight_ptr is not None:
        factor = rstd * tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)
    return mean, rstd, factor, bias


@triton.jit
def _normalised(x, mean, factor, bias_ptr, bias):
    """(x - mean) (rstd weight) + bias"""
    y = (x - mean) * factor
    if bias_ptr is not None:
        y += bias
    return y


@triton.jit
def _activated(z, ACT: tl.constexpr, GRID: tl.constexpr):
    """NaN stays what it is, as in torch; without a grid, on which it is the same as 0, also -0."""
    if ACT != "identity":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) if GRID else tl.where(z < 0, 0.0, z)
    if ACT == "relu6":
        z = tl.where(z > 6, 6.0, z)
    return z


@triton.jit
def _grid(scale_ptr, inverse_ptr, zero_point_ptr, qmin, qmax):
    """inv, zero_point and the smallest and largest code minus it; 0 without a grid"""
    inv, zero_point, low, high = 0.0, 0, 0, 0
    if scale_ptr is not None:
        inv = reciprocal(tl.load(scale_ptr)) if inverse_ptr is None else tl.load(inverse_ptr)
        zero_point = tl.load(zero_point_ptr)
        low, high = qmin - zero_point, qmax - zero_point
    return inv, zero_point, low, high


@triton.jit
def _passing(grad, z, inv, low, high, ACT: tl.constexpr, GRID: tl.constexpr):
    """`grad` where activation and grid let it through, else 0; NaN passes nothing but identity and relu"""
    if GRID:
        grad = tl.where(rounds_within(_activated(z, ACT, GRID) * inv, low, high), grad, 0.0)
    if ACT != "identity":
        grad = tl.where(z <= 0, 0.0, grad)
    if ACT == "relu6":
        grad = tl.where(z < 6, grad, 0.0)
    return grad


@triton.jit
def statistics_kernel(
    statistics_ptr, inverse_ptr, parts_ptr, source_mean_ptr, source_var_ptr, scale_ptr,
    channels, parts, keep, alpha, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The rows of `STATISTICS`, from the parts of the moments and the source, and 1 / scale; keep = 1 - alpha.

    Without a single element the share of the batch is 0, and without a source too mean 0 and var 1.
    """
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mean = tl.zeros((BLOCK_C,), tl.float32)
    batch_mean, share, var = mean, mean, mean
    if parts_ptr is not None:
        batch_mean, var, count = merged(parts_ptr, channels, parts, offs_c, BLOCK_P)
        mean = batch_mean
        share = tl.where(count > 0, tl.div_rn(alpha, tl.maximum(count, 1.0)), 0.0)
        if source_mean_ptr is None:
            var = tl.where(count > 0, var, 1.0)
        else:
            alpha = tl.where(count > 0, alpha, 0.0)
            keep = tl.where(count > 0, keep, 1.0)
    if source_mean_ptr is not None:
        mean = keep * tl.load(source_mean_ptr + offs_c, mask=mask_c, other=0.0) + alpha * batch_mean
        var = keep * tl.load(source_var_ptr + offs_c, mask=mask_c, other=0.0) + alpha * var
    tl.store(statistics_ptr + offs_c, mean, mask=mask_c)
    tl.store(statistics_ptr + channels + offs_c, tl.div_rn(1.0, tl.sqrt_rn(var + eps)), mask=mask_c)
    tl.store(statistics_ptr + 2 * channels + offs_c, batch_mean, mask=mask_c)
    tl.store(statistics_ptr + 3 * channels + offs_c, share, mask=mask_c)
    tl.store(statistics_ptr + 4 * channels + offs_c, var, mask=mask_c)
    if scale_ptr is not None:
        tl.store(inverse_ptr, reciprocal(tl.load(scale_ptr)), mask=tl.program_id(0) == 0)


@triton.jit
def _tile_of_output(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, statistics_ptr, grid, channels,
    image, offs_c, offs_s, mask, strides, ACT: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """Codes of one tile as int32, or values."""
    mask &= offs_c < channels
    mean, _, factor, bias = _affine(statistics_ptr, weight_ptr, bias_ptr, channels, offs_c)
    x = tl.load(x_ptr + offsets(image, offs_c, offs_s, strides[0]), mask=mask, other=0.0).to(tl.float32)
    y = _normalised(x, mean, factor, bias_ptr, bias)
    if residual_ptr is not None:
        offs = offsets(image, offs_c, offs_s, strides[1])
        y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    inv, zero_point, low, high = grid
    if ACT == "relu6" and scale_ptr is not None and OUTPUT != "packed":
        # Rounding keeps the order: the code of 6 is a bound like the largest code. Packed, registers are dearer.
        y = _activated(y, "relu", True)
        high = integer_within(6.0 * inv, low, high)
    else:
        y = _activated(y, ACT, scale_ptr is not None)
    if OUTPUT != "values":
        y = integer_within(y * inv, low, high) + zero_point
    elif scale_ptr is not None:
        y = round_within(y * inv, low, high) * tl.load(scale_ptr)
    return y


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, zero_point_ptr, y_ptr, statistics_ptr, inverse_ptr,
    carrier_ptr, qmin, qmax, shift, row_bytes, sizes, strides,
    ACT: tl.constexpr, OUTPUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y of one tile, or of two tiles of neighbouring channels that share their bytes"""
    channels, positions, columns, images = sizes[0], sizes[1], sizes[2], sizes[4]
    program = tl.program_id(0)
    column = program % columns
    TILES: tl.constexpr = 2 if OUTPUT == "packed" else 1
    image, offs_c, offs_s, mask = tile_of_images(
        program // columns, TILES * column, positions, images, BLOCK_N, BLOCK_C, BLOCK_S
    )
    grid = _grid(scale_ptr, inverse_ptr, zero_point_ptr, qmin, qmax)
    y = _tile_of_output(
        x_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, statistics_ptr, grid, channels,
        image, offs_c, offs_s, mask, strides, ACT, OUTPUT,
    )  # fmt: skip
    if OUTPUT == "packed":
        above = offs_c + BLOCK_C
        high = _tile_of_output(
            x_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, statistics_ptr, grid, channels,
            image, above, offs_s, mask, strides, ACT, OUTPUT,
        )  # fmt: skip
        exist = tl.where(offs_c < channels, 15, 0) | tl.where(above < channels, 240, 0)
        byte = column.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :, None]
        # 8 channels of a thread and not 16: its elements share more of what is known of a channel.
        offs = tl.max_contiguous((image * positions + offs_s) * row_bytes + byte, [1, 8, 1])
        tl.store(y_ptr + offs, ((y + 16 * high) & exist).to(tl.uint8), mask=mask)
    else:
        if OUTPUT == "codes":
            y = (y - shift).to(tl.int8)
        tl.store(y_ptr + offsets(image, offs_c, offs_s, strides[2]), y, mask=mask & (offs_c < channels))
    if carrier_ptr is not None:
        tl.store(carrier_ptr, 0.0, mask=program == 0)


@triton.jit
def sums_kernel(
    x_ptr, grad_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, zero_point_ptr, statistics_ptr, passed_ptr,
    parts_ptr, qmin, qmax, sizes, split, strides,
    ACT: tl.constexpr, CLIPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """parts[:, part, c] = rstd sum g (x - mean), sum g over the chunks of one part; passed = g"""
    channels, positions, columns = sizes[0], sizes[1], sizes[2]
    chunks, per_part, parts = split[0], split[1], split[2]
    program = tl.program_id(0)
    column, part = program % columns, program // columns
    offs_c = column.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mean, _, factor, bias = _affine(statistics_ptr, weight_ptr, bias_ptr, channels, offs_c[:, None])
    inv, _, low, high = _grid(scale_ptr, None, zero_point_ptr, qmin, qmax)
    total = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    dot = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for chunk in range(part * per_part, tl.minimum((part + 1) * per_part, chunks)):
        image, rows, offs_s = tile(chunk, column, positions, BLOCK_C, BLOCK_S)
        mask = (rows < channels) & (offs_s < positions)
        x = tl.load(x_ptr + offsets(image, rows, offs_s, strides[0]), mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets(image, rows, offs_s, strides[1]), mask=mask, other=0.0).to(tl.float32)
        if CLIPS:
            z = _normalised(x, mean, factor, bias_ptr, bias)
            if residual_ptr is not None:
                offs = offsets(image, rows, offs_s, strides[2])
                z += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            grad = _passing(grad, z, inv, low, high, ACT, scale_ptr is not None)
        if passed_ptr is not None:
            tl.store(passed_ptr + offsets(image, rows, offs_s, strides[3]), grad, mask=mask)
        total += grad
        dot += grad * (x - mean)
    rstd = tl.load(statistics_ptr + channels + offs_c, mask=mask_c, other=0.0)
    out_ptr = parts_ptr + part.to(tl.int64) * channels + offs_c
    tl.store(out_ptr, rstd * tl.sum(dot, axis=1), mask=mask_c)
    tl.store(out_ptr + parts * channels, tl.sum(total, axis=1), mask=mask_c)


@triton.jit
def input_gradient_kernel(
    x_ptr, grad_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, zero_point_ptr, statistics_ptr, sums_ptr,
    sample_mask_ptr, dx_ptr, qmin, qmax, sizes, strides,
    ACT: tl.constexpr, CLIPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dx = rstd weight (g - share dbias - (x - batch_mean) share rstd dweight)"""
    channels, positions, columns, per_sample, images = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    program = tl.program_id(0)
    image, offs_c, offs_s, mask = tile_of_images(
        program // columns, program % columns, positions, images, BLOCK_N, BLOCK_C, BLOCK_S
    )
    mask_c = offs_c < channels
    mask &= mask_c
    mean, rstd, factor, bias = _affine(statistics_ptr, weight_ptr, bias_ptr, channels, offs_c)
    dx = tl.load(grad_ptr + offsets(image, offs_c, offs_s, strides[1]), mask=mask, other=0.0).to(tl.float32)
    if CLIPS or sums_ptr is not None:
        x = tl.load(x_ptr + offsets(image, offs_c, offs_s, strides[0]), mask=mask, other=0.0).to(tl.float32)
    if CLIPS:
        z = _normalised(x, mean, factor, bias_ptr, bias)
        if residual_ptr is not None:
            offs = offsets(image, offs_c, offs_s, strides[2])
            z += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        inv, _, low, high = _grid(scale_ptr, None, zero_point_ptr, qmin, qmax)
        dx = _passing(dx, z, inv, low, high, ACT, scale_ptr is not None)
    if sums_ptr is not None:
        batch_mean = tl.load(statistics_ptr + 2 * channels + offs_c, mask=mask_c, other=0.0)
        share = tl.load(statistics_ptr + 3 * channels + offs_c, mask=mask_c, other=0.0)
        slope = share * rstd * tl.load(sums_ptr + offs_c, mask=mask_c, other=0.0)
        constant = share * tl.load(sums_ptr + channels + offs_c, mask=mask_c, other=0.0)
        through = (dx - constant) - (x - batch_mean) * slope
        if sample_mask_ptr is not None:
            # Where all images make one row, their tile has one number.
            sample = image if BLOCK_N > 1 else image + offs_s // per_sample
            chosen = tl.load(sample_mask_ptr + sample, mask=(image < images) & (offs_s < positions), other=0) != 0
            through = tl.where(chosen, through, dx)
        dx = through
    tl.store(dx_ptr + offsets(image, offs_c, offs_s, strides[3]), dx * factor, mask=mask)

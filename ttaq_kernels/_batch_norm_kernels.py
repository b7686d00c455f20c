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

from ttaq_kernels._channels import offsets, selected, tile
from ttaq_kernels._launch import tl, triton
from ttaq_kernels._math import round_half_even
from ttaq_kernels.moments import merged

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["STATISTICS", "forward_kernel", "input_gradient_kernel", "statistics_kernel", "sums_kernel"]

# Rows of the statistics that the forward keeps: mean, rstd, mean of the batch, share / M, var.
STATISTICS = 5


@triton.jit
def _normalised(x, mean, rstd, weight_ptr, bias_ptr, offs_c, mask_c):
    """(x - mean) (rstd weight) + bias"""
    factor = rstd
    if weight_ptr is not None:
        factor = rstd * tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0)
    y = (x - mean) * factor
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)
    return y


@triton.jit
def _activated(z, ACT: tl.constexpr):
    """NaN and -0 stay what they are, as in torch."""
    if ACT != "identity":
        z = tl.where(z < 0, 0.0, z)
    if ACT == "relu6":
        z = tl.where(z > 6, 6.0, z)
    return z


@triton.jit
def _grid(scale_ptr, zero_point_ptr):
    """inv and zero_point in fp32, and 0 without a grid"""
    inv, zero_point = 0.0, 0.0
    if scale_ptr is not None:
        inv, zero_point = tl.div_rn(1.0, tl.load(scale_ptr)), tl.load(zero_point_ptr).to(tl.float32)
    return inv, zero_point


@triton.jit
def _passing(grad, z, inv, zero_point, qmin, qmax, ACT: tl.constexpr, GRID: tl.constexpr):
    """`grad` where activation and grid let it through, else 0; NaN passes nothing but identity and relu"""
    if GRID:
        u = round_half_even(_activated(z, ACT) * inv) + zero_point
        grad = tl.where((u >= qmin.to(tl.float32)) & (u <= qmax.to(tl.float32)), grad, 0.0)
    if ACT != "identity":
        grad = tl.where(z <= 0, 0.0, grad)
    if ACT == "relu6":
        grad = tl.where(z < 6, grad, 0.0)
    return grad


@triton.jit
def statistics_kernel(
    statistics_ptr, parts_ptr, source_mean_ptr, source_var_ptr, channels, parts, keep, alpha, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The rows of `STATISTICS`, from the parts of the moments and the source; keep = 1 - alpha.

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


@triton.jit
def _tile_of_output(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, statistics_ptr, scale_ptr, zero_point_ptr, qmin, qmax, channels,
    image, offs_c, offs_s, mask_s, strides, ACT: tl.constexpr,
):  # fmt: skip
    """Codes of one tile, or activations where there is no grid."""
    mask_c = offs_c < channels
    mask = mask_c & mask_s
    mean = tl.load(statistics_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.load(statistics_ptr + channels + offs_c, mask=mask_c, other=0.0)
    x = tl.load(x_ptr + offsets(image, offs_c, offs_s, strides[0]), mask=mask, other=0.0).to(tl.float32)
    y = _normalised(x, mean, rstd, weight_ptr, bias_ptr, offs_c, mask_c)
    if residual_ptr is not None:
        offs = offsets(image, offs_c, offs_s, strides[1])
        y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = _activated(y, ACT)
    if scale_ptr is not None:
        # The lower bound first: maximum drops NaN, which so becomes qmin.
        inv, zero_point = _grid(scale_ptr, zero_point_ptr)
        u = tl.maximum(round_half_even(y * inv) + zero_point, qmin.to(tl.float32))
        y = tl.minimum(u, qmax.to(tl.float32))
    return y


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, zero_point_ptr, y_ptr, statistics_ptr, carrier_ptr,
    qmin, qmax, shift, row_bytes, sizes, strides,
    ACT: tl.constexpr, OUTPUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y of one tile, or of two tiles of neighbouring channels that share their bytes"""
    channels, positions, columns = sizes[0], sizes[1], sizes[2]
    program = tl.program_id(0)
    column = program % columns
    TILES: tl.constexpr = 2 if OUTPUT == "packed" else 1
    image, offs_c, offs_s = tile(program // columns, TILES * column, positions, BLOCK_C, BLOCK_S)
    mask_s = offs_s < positions
    y = _tile_of_output(
        x_ptr, residual_ptr, weight_ptr, bias_ptr, statistics_ptr, scale_ptr, zero_point_ptr, qmin, qmax, channels,
        image, offs_c, offs_s, mask_s, strides, ACT,
    )  # fmt: skip
    if OUTPUT == "packed":
        above = offs_c + BLOCK_C
        high = _tile_of_output(
            x_ptr, residual_ptr, weight_ptr, bias_ptr, statistics_ptr, scale_ptr, zero_point_ptr, qmin, qmax, channels,
            image, above, offs_s, mask_s, strides, ACT,
        )  # fmt: skip
        low_bits = tl.where(offs_c < channels, y, 0.0).to(tl.int32) & 15
        high_bits = tl.where(above < channels, high, 0.0).to(tl.int32) & 15
        pixel = image * positions + offs_s
        byte = column.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
        tl.store(y_ptr + pixel * row_bytes + byte, (low_bits | (high_bits << 4)).to(tl.uint8), mask=mask_s)
    else:
        if OUTPUT == "codes":
            y = (y - shift.to(tl.float32)).to(tl.int8)
        elif scale_ptr is not None:
            y = (y - tl.load(zero_point_ptr).to(tl.float32)) * tl.load(scale_ptr)
        mask = (offs_c < channels) & mask_s
        tl.store(y_ptr + offsets(image, offs_c, offs_s, strides[2]), y, mask=mask)
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
    mean = tl.load(statistics_ptr + offs_c, mask=mask_c, other=0.0)[:, None]
    rstd = tl.load(statistics_ptr + channels + offs_c, mask=mask_c, other=0.0)
    inv, zero_point = _grid(scale_ptr, zero_point_ptr)
    total = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    dot = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for chunk in range(part * per_part, tl.minimum((part + 1) * per_part, chunks)):
        image, rows, offs_s = tile(chunk, column, positions, BLOCK_C, BLOCK_S)
        mask = (rows < channels) & (offs_s < positions)
        x = tl.load(x_ptr + offsets(image, rows, offs_s, strides[0]), mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets(image, rows, offs_s, strides[1]), mask=mask, other=0.0).to(tl.float32)
        if CLIPS:
            z = _normalised(x, mean, rstd[:, None], weight_ptr, bias_ptr, rows, rows < channels)
            if residual_ptr is not None:
                offs = offsets(image, rows, offs_s, strides[2])
                z += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            grad = _passing(grad, z, inv, zero_point, qmin, qmax, ACT, scale_ptr is not None)
        if passed_ptr is not None:
            tl.store(passed_ptr + offsets(image, rows, offs_s, strides[3]), grad, mask=mask)
        total += grad
        dot += grad * (x - mean)
    out_ptr = parts_ptr + part.to(tl.int64) * channels + offs_c
    tl.store(out_ptr, rstd * tl.sum(dot, axis=1), mask=mask_c)
    tl.store(out_ptr + parts * channels, tl.sum(total, axis=1), mask=mask_c)


@triton.jit
def input_gradient_kernel(
    x_ptr, grad_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, zero_point_ptr, statistics_ptr, sums_ptr,
    sample_mask_ptr, dx_ptr, qmin, qmax, sizes, strides,
    ACT: tl.constexpr, CLIPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dx = rstd weight (g - share dbias - (x - batch_mean) share rstd dweight)"""
    channels, positions, columns, per_sample = sizes[0], sizes[1], sizes[2], sizes[3]
    program = tl.program_id(0)
    image, offs_c, offs_s = tile(program // columns, program % columns, positions, BLOCK_C, BLOCK_S)
    mask_c = offs_c < channels
    mask = mask_c & (offs_s < positions)
    rstd = tl.load(statistics_ptr + channels + offs_c, mask=mask_c, other=0.0)
    dx = tl.load(grad_ptr + offsets(image, offs_c, offs_s, strides[1]), mask=mask, other=0.0).to(tl.float32)
    if CLIPS or sums_ptr is not None:
        x = tl.load(x_ptr + offsets(image, offs_c, offs_s, strides[0]), mask=mask, other=0.0).to(tl.float32)
    if CLIPS:
        mean = tl.load(statistics_ptr + offs_c, mask=mask_c, other=0.0)
        z = _normalised(x, mean, rstd, weight_ptr, bias_ptr, offs_c, mask_c)
        if residual_ptr is not None:
            offs = offsets(image, offs_c, offs_s, strides[2])
            z += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        inv, zero_point = _grid(scale_ptr, zero_point_ptr)
        dx = _passing(dx, z, inv, zero_point, qmin, qmax, ACT, scale_ptr is not None)
    if sums_ptr is not None:
        batch_mean = tl.load(statistics_ptr + 2 * channels + offs_c, mask=mask_c, other=0.0)
        share = tl.load(statistics_ptr + 3 * channels + offs_c, mask=mask_c, other=0.0)
        slope = share * rstd * tl.load(sums_ptr + offs_c, mask=mask_c, other=0.0)
        constant = share * tl.load(sums_ptr + channels + offs_c, mask=mask_c, other=0.0)
        through = (dx - constant) - (x - batch_mean) * slope
        if sample_mask_ptr is not None:
            through = tl.where(selected(sample_mask_ptr, image, offs_s, positions, per_sample), through, dx)
        dx = through
    factor = rstd
    if weight_ptr is not None:
        factor = rstd * tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0)
    tl.store(dx_ptr + offsets(image, offs_c, offs_s, strides[3]), dx * factor, mask=mask)

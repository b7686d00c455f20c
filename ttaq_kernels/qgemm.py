"""Product of activations with a packed low-bit weight, dequantized or re-quantized on the way out.

    acc[m, n] = sum_k (q_w[n, k] - zero_point_w[n]) (q_a[m, k] - zero_point_a)     exactly, in int32
    y[m, n]   = fp32(acc) * (scale_w[n] * scale_a) + bias[n]                        fp32, then the type of the output
    or          clamp(rint(y * (1 / out_scale)) + out_zero_point, qmin, qmax)       int8 codes

With floating activations a the sum is sum_k (q_w - zero_point_w) a in fp32, with the weight turned into their type
inside the kernel, and scale_a falls away.

The zero point of the weight is subtracted while unpacking (8 bits: afterwards, with the sums of the activations), that
of the activations afterwards, with the sums of the weight. The weight is the left operand: the product is computed as
its transpose, so that what is unpacked in registers goes into the tensor cores from there. Activations are read in the
slices that `ttaq_kernels.pack` describes. Symmetric codes are unpacked times 2^(8 - bits), and the sum is divided.

Bytes: x once per block of outputs, K * bits / 8 per output, y once. Called by `ttaq.nn.QuantLinear` when packed.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._gemm_tiles import gemm_config
from ttaq_kernels._launch import ceil_div, launch, next_power_of_2, tl, triton
from ttaq_kernels._library import register_op
from ttaq_kernels._math import round_half_even
from ttaq_kernels.errors import KernelError
from ttaq_kernels.pack import PackedWeight, code_index, unpack_signed, unpack_unsigned
from ttaq_kernels.reference import qgemm as reference

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["packed_linear", "packed_linear_input_gradient"]

_WHO = "packed_linear"


@triton.jit
def _sums_kernel(x_ptr, sums_ptr, rows, length, stride_xm, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """sums[m] = sum_k x[m, k]"""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    sums = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(0, length, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask = (offs_m < rows)[:, None] & (offs_k < length)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0)
        sums += tl.sum(x.to(tl.int32), axis=1)
    tl.store(sums_ptr + offs_m, sums, mask=offs_m < rows)


@triton.jit
def _gemm_kernel(
    x_ptr, weight_ptr, scale_ptr, zero_point_ptr, row_sum_ptr, input_scale_ptr, input_zero_point_ptr, sums_ptr,
    bias_ptr, out_ptr, out_scale_ptr, out_zero_point_ptr,
    rows, outputs, length, width, stride_xm, stride_scale, qmin, qmax,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out[m, n] = (sum_k w[n, k] x[m, k]) * scale[n] + bias[n], one tile per program, BLOCK_B bytes of w at a time"""
    INTEGER: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    # All outputs of a tile of rows follow each other, which then come from the cache.
    program = tl.program_id(0)
    blocks_n = tl.cdiv(outputs, BLOCK_N)
    offs_n = (program % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = (program // blocks_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n, mask_m = (offs_n < outputs)[:, None], (offs_m < rows)[None, :]
    if zero_point_ptr is not None:
        zero_point = tl.load(zero_point_ptr + offs_n, mask=offs_n < outputs, other=0)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if INTEGER else tl.float32)
    for first in range(0, width, BLOCK_B):
        offs_b = first + tl.arange(0, BLOCK_B)
        packed = tl.load(
            weight_ptr + offs_n[:, None] * width + offs_b[None, :], mask=mask_n & (offs_b < width)[None, :], other=0
        )
        for PART in tl.static_range(8 // BITS):
            offs_k = code_index(offs_b, PART, BITS)
            x = tl.load(
                x_ptr + offs_m[None, :] * stride_xm + offs_k[:, None],
                mask=mask_m & (offs_k < length)[:, None],
                other=0,
            )
            if zero_point_ptr is None or sums_ptr is not None:
                w = unpack_signed(packed, PART, BITS, ASM)
            elif BITS == 8:
                w = packed.to(tl.int8, bitcast=True).to(tl.int16) - zero_point
            else:
                w = unpack_unsigned(packed, zero_point, PART, BITS, ASM)
            acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee", out_dtype=acc.dtype)
    if zero_point_ptr is None:
        acc = acc >> (8 - BITS) if INTEGER else acc * (1.0 / (1 << (8 - BITS)))
    if sums_ptr is not None:
        acc -= zero_point.to(tl.int32) * tl.load(sums_ptr + offs_m, mask=offs_m < rows, other=0)[None, :]
    if input_zero_point_ptr is not None:
        row_sum = tl.load(row_sum_ptr + offs_n, mask=offs_n < outputs, other=0)[:, None]
        acc -= tl.load(input_zero_point_ptr) * row_sum
    scale = tl.load(scale_ptr + offs_n * stride_scale, mask=offs_n < outputs, other=0.0)
    if input_scale_ptr is not None:
        scale *= tl.load(input_scale_ptr)
    y = acc.to(tl.float32) * scale[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=offs_n < outputs, other=0.0).to(tl.float32)[:, None]
    if out_scale_ptr is not None:
        u = round_half_even(y * tl.div_rn(1.0, tl.load(out_scale_ptr))) + tl.load(out_zero_point_ptr).to(tl.float32)
        # The lower bound first: maximum drops NaN, which so becomes qmin.
        y = tl.minimum(tl.maximum(u, tl.cast(qmin, tl.float32)), tl.cast(qmax, tl.float32))
    tl.store(
        out_ptr + offs_m[None, :] * outputs + offs_n[:, None], y.to(out_ptr.dtype.element_ty), mask=mask_n & mask_m
    )


# Without Triton, or where it interprets, there is no inline assembly.
_COMPILED = isinstance(_gemm_kernel, getattr(triton, "JITFunction", ()))


def _launch_sums(x: Tensor) -> Tensor:
    rows, length = x.shape
    sums = x.new_empty(rows, dtype=torch.int32)
    blocks = {"BLOCK_M": 16, "BLOCK_K": min(256, next_power_of_2(length))}
    launch(_WHO, _sums_kernel, ceil_div(rows, 16), x, sums, rows, length, x.stride(0), **blocks)
    return sums


def _launch_gemm(
    x: Tensor,
    codes: Tensor,
    bits: int,
    scale: Tensor,
    zero_point: Tensor | None,
    row_sum: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    *,
    asm: bool = _COMPILED,
) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, length = x.shape
    outputs, width = codes.shape
    out = x.new_empty(rows, outputs, dtype=dtype)
    if out.numel() == 0:
        return out
    with_sums = x.dtype is torch.int8 and bits == 8 and zero_point is not None
    sums = _launch_sums(x) if with_sums else None
    config = gemm_config(rows, outputs, width, bits, x)
    programs = ceil_div(rows, config["BLOCK_M"]) * ceil_div(outputs, config["BLOCK_N"])
    tensors = (x, codes.contiguous(), scale, zero_point, row_sum, input_scale, input_zero_point, sums, bias, out)
    sizes = (rows, outputs, length, width, x.stride(0), 0 if scale.numel() == 1 else scale.stride(0), qmin, qmax)
    arguments = (*tensors, out_scale, out_zero_point, *sizes)
    launch(_WHO, _gemm_kernel, programs, *arguments, BITS=bits, ASM=asm, **config)
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, codes, bits, scale, zero_point = inputs[:5]
    ctx.save_for_backward(codes, scale, zero_point)
    ctx.bits, ctx.length, ctx.dtype = bits, x.shape[1], x.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, zero_point = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        grad_x = reference.packed_linear_input_gradient(grad, codes, ctx.bits, ctx.length, scale, zero_point)
        dx = grad_x.to(ctx.dtype)
    if ctx.needs_input_grad[8]:
        dbias = grad.float().sum(0)
    return dx, *[None] * 7, dbias, *[None] * 5


_packed_linear = register_op(
    "packed_linear(Tensor x, Tensor codes, int bits, Tensor scale, Tensor? zero_point, Tensor row_sum, "
    "Tensor? input_scale, Tensor? input_zero_point, Tensor? bias, ScalarType dtype, Tensor? out_scale, "
    "Tensor? out_zero_point, int qmin, int qmax) -> Tensor",
    cpu=reference.packed_linear,
    cuda=_launch_gemm,
    fake=lambda x, codes, *rest: x.new_empty(x.shape[0], codes.shape[0], dtype=rest[7]),
    setup_context=_save,
    backward=_backward,
)


def _check_scalar(name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    _check.check_parameter(_WHO, name, tensor, x, ((), (1,)), "for one per tensor", dtype)


def _check_weight(who: str, weight: PackedWeight, x: Tensor, width: int, meaning: str) -> None:
    if not isinstance(weight, PackedWeight):
        raise KernelError(f"{who}: weight is a {type(weight).__name__}, expected what pack_weight returns")
    if weight.codes.ndim != 2:
        raise KernelError(f"{who}: weight has codes of shape {tuple(weight.codes.shape)}, expected those of [N, K]")
    if weight.codes.device != x.device:
        raise KernelError(f"{who}: weight is on {weight.codes.device}, expected {x.device} like {meaning}; move one")
    if x.ndim == 0 or x.shape[-1] != width:
        raise KernelError(f"{who}: {meaning} has shape {tuple(x.shape)}, expected [..., {width}] for this weight")


def _check_sum(weight: PackedWeight) -> None:
    """No sum of int8 codes can pass what int32 holds, with codes unpacked times 2^(8 - bits) and any zero points."""
    limit = min((1 << 17) - 1, ((1 << 31) - 1) // (255 * weight.largest))
    if weight.length > limit:
        raise KernelError(
            f"{_WHO}: weight has {weight.length} inputs, expected at most {limit} = what int32 can sum for integers up "
            f"to {weight.largest}; split the inputs into two layers"
        )


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    qmin: int = -128,
    qmax: int = 127,
) -> Tensor:
    """x times a packed weight, plus bias.

        int8 x:      y = fp32(sum_k (q_w - zero_point_w)(x - input_zero_point)) * (scale_w * input_scale) + bias
        floating x:  y = (sum_k (q_w - zero_point_w) x) * scale_w + bias
        out_scale:   clamp(rint(y * (1 / out_scale)) + out_zero_point, qmin, qmax) as int8 instead of y

    Args:
        x: [..., K], any layout, also empty: int8 codes (8-bit unsigned codes minus 128), or float32, bfloat16, float16.
        weight: of `pack_weight`, codes [N, K]; 2 to 8 bits.
        bias: float32 [N].
        input_scale: float32, shape () or (1,), with int8 x and only then. input_zero_point: int32, the same shape; None
            for 0.
        dtype: of the result: float32, bfloat16 or float16; by default that of x, float32 for int8 x.
        out_scale, out_zero_point: float32 and int32, shape () or (1,): the grid of the next layer.
        qmin, qmax: the smallest and the largest code of that grid, -128 <= qmin < qmax <= 127.

    Returns:
        [..., N], contiguous.

    Gradients: of a floating x, (grad * scale_w) @ (q_w - zero_point_w), and of bias; none through int8 codes on either
    side (the layer above passes them straight through) and none of the scales.

    Exactness: with int8 x equal to integer arithmetic bit for bit, on every device; with floating x the sums are
    float32, in the type of x.

    Raises:
        KernelError: a type, shape, device or grid that does not fit, or more inputs than int32 can sum.
    """
    integer = isinstance(x, Tensor) and x.dtype is torch.int8
    _check.check_input(_WHO, "x", x, (torch.int8, *_check.FLOAT_TYPES))
    _check_weight(_WHO, weight, x, getattr(weight, "length", 0), "x")
    if integer != (input_scale is not None):
        got = "has no input_scale" if integer else "has an input_scale"
        raise KernelError(
            f"{_WHO}: x of type {str(x.dtype).removeprefix('torch.')} {got}, expected one for int8 codes only"
        )
    if input_scale is not None:
        _check_sum(weight)
        _check_scalar("input_scale", input_scale, x, torch.float32)
    if input_zero_point is not None:
        if not integer:
            raise KernelError(f"{_WHO}: input_zero_point is given, expected none for floating x")
        _check_scalar("input_zero_point", input_zero_point, x, torch.int32)
    outputs = weight.codes.shape[0]
    if bias is not None:
        _check.check_parameter(_WHO, "bias", bias, x, ((outputs,),), "for one per output", torch.float32)
    if (out_scale is None) != (out_zero_point is None):
        raise KernelError(f"{_WHO}: got one of out_scale and out_zero_point, expected both or none")
    if out_scale is not None and out_zero_point is not None:
        _check_scalar("out_scale", out_scale, x, torch.float32)
        _check_scalar("out_zero_point", out_zero_point, x, torch.int32)
        if not -128 <= qmin < qmax <= 127:
            raise KernelError(f"{_WHO}: codes go from qmin={qmin} to qmax={qmax}, expected -128 <= qmin < qmax <= 127")
        if dtype is not None:
            raise KernelError(f"{_WHO}: dtype is {dtype}, expected None: with out_scale the result is int8")
        dtype = torch.int8
    elif dtype is None:
        dtype = torch.float32 if integer else x.dtype
    elif dtype not in _check.FLOAT_TYPES:
        raise KernelError(f"{_WHO}: dtype is {dtype}, expected float32, bfloat16 or float16")
    rows = x.reshape(math.prod(x.shape[:-1]), weight.length)
    grid = (input_scale, input_zero_point, bias, dtype, out_scale, out_zero_point, qmin, qmax)
    y: Tensor = _packed_linear(rows, weight.codes, weight.bits, weight.scale, weight.zero_point, weight.row_sum, *grid)
    return y.view(*x.shape[:-1], outputs)


def packed_linear_input_gradient(grad: Tensor, weight: PackedWeight) -> Tensor:
    """dx = (grad * scale) @ (q - zero_point), the gradient of `packed_linear` to activations before their rounding.

    Dequantizes the weight and multiplies with torch: at the batches of adaptation low-bit weights save no time there.

    Args:
        grad: float32, bfloat16 or float16, [..., N].
        weight: of `pack_weight`, codes [N, K].

    Returns:
        [..., K] in the type of `grad`. In bfloat16 and float16 the product grad * scale is rounded, the weight is not.

    Raises:
        KernelError: a type or a shape that does not fit.
    """
    who = "packed_linear_input_gradient"
    _check.check_input(who, "grad", grad)
    outputs = weight.codes.shape[0] if isinstance(weight, PackedWeight) else 0
    _check_weight(who, weight, grad, outputs, "grad")
    return reference.packed_linear_input_gradient(
        grad, weight.codes, weight.bits, weight.length, weight.scale, weight.zero_point
    )

"""Device functions that several kernels share. Everything is fp32; exact only when launched without FP fusion."""

from ttaq_kernels._launch import tl, triton

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["integer_within", "log2_of_hardware", "reciprocal", "round_half_even", "round_within", "rounds_within"]

# 1.5 * 2**23: adding it leaves no bits for a fraction, so the hardware's rounding of the sum rounds to an integer.
_MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def round_half_even(v):
    """rint(v), exact for |v| < 2**22 and monotone beyond, for 2 instructions in the interpreter and on every GPU."""
    return (v + _MAGIC) - _MAGIC


# The interpreter cannot run inline assembly.
_COMPILED = tl.constexpr(isinstance(round_half_even, getattr(triton, "JITFunction", ())))
_RECIPROCAL = tl.constexpr(
    "{ .reg .f32 n, r, e; neg.f32 n, $1; max.NaN.f32 n, n, 0fFF7FFFFF; rcp.approx.ftz.f32 r, $1;"
    " fma.rn.f32 e, n, r, 0f3F800000; fma.rp.f32 r, r, e, r;"
    " fma.rn.f32 e, n, r, 0f3F800000; fma.rn.f32 $0, r, e, r; }"
)


@triton.jit
def reciprocal(x):
    """1 / x as IEEE rounds it, for 2**-126 <= x <= 2**125; 0 or nearly for what is larger, NaN for 0 and NaN.

    Without the path for all other x, which is longer than the rest of many a kernel. The hardware's 1 / x is off by 1
    unit at most; a Newton step rounded up and one rounded to nearest make it right, which the tests show for every x.
    Of infinity the largest number is taken, which with an approximation of 0 stays 0.
    """
    if _COMPILED:
        inverse = tl.inline_asm_elementwise(_RECIPROCAL, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        inverse = tl.div_rn(1.0, x)
    return inverse


@triton.jit
def log2_of_hardware(x):
    """log2(x), x >= 0: off by 2**-22 where 0.5 < x < 2, else by 2**-22 of itself; -infinity below 2**-126.

    For penalties and gradients: a thirtieth of the instructions of `tl.log2`, which keeps its digits near 1.
    """
    if _COMPILED:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def _with_magic(bound):
    # An addition of bits instead of a conversion and an addition.
    return (bound + _MAGIC_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _above_magic(v, low, high):
    # Bounds are compared before the constant is taken off: then they may hold a zero point, which no element then adds.
    # The lower bound first: maximum drops NaN, which so becomes the lowest value.
    return tl.minimum(tl.maximum(v + _MAGIC, _with_magic(low)), _with_magic(high))


@triton.jit
def round_within(v, low, high):
    """clamp(rint(v), low, high) for int32 bounds between -2**22 and 2**22; NaN becomes low"""
    return _above_magic(v, low, high) - _MAGIC


@triton.jit
def integer_within(v, low, high):
    """The same as int32; read from the bits, which a GPU does 4 times as fast as it converts."""
    return _above_magic(v, low, high).to(tl.int32, bitcast=True) - _MAGIC_BITS


@triton.jit
def rounds_within(v, low, high):
    """Whether low <= rint(v) <= high"""
    u = v + _MAGIC
    return (u >= _with_magic(low)) & (u <= _with_magic(high))

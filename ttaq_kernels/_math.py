"""Device functions that several kernels share. Everything is fp32; exact only when launched without FP fusion."""

from ttaq_kernels._launch import tl, triton

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = ["integer_within", "round_half_even", "round_within", "rounds_within"]

# 1.5 * 2**23: adding it leaves no bits for a fraction, so the hardware's rounding of the sum rounds to an integer.
_MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def round_half_even(v):
    """rint(v), exact for |v| < 2**22 and monotone beyond, for 2 instructions in the interpreter and on every GPU."""
    return (v + _MAGIC) - _MAGIC


@triton.jit
def _above_magic(v, low, high):
    # Bounds are compared before the constant is taken off: then they may hold a zero point, which no element then adds.
    # The lower bound first: maximum drops NaN, which so becomes the lowest value.
    return tl.minimum(tl.maximum(v + _MAGIC, low + _MAGIC), high + _MAGIC)


@triton.jit
def round_within(v, low, high):
    """clamp(rint(v), low, high) for integers between -2**22 and 2**22 in fp32; NaN becomes low"""
    return _above_magic(v, low, high) - _MAGIC


@triton.jit
def integer_within(v, low, high):
    """The same as int32; read from the bits, which a GPU does 4 times as fast as it converts."""
    return _above_magic(v, low, high).to(tl.int32, bitcast=True) - _MAGIC_BITS


@triton.jit
def rounds_within(v, low, high):
    """Whether low <= rint(v) <= high"""
    u = v + _MAGIC
    return (u >= low + _MAGIC) & (u <= high + _MAGIC)

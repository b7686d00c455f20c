"""Device functions that several kernels share. Everything is fp32; exact only when launched without FP fusion."""

from ttaq_kernels._launch import tl, triton

__all__ = ["round_half_even"]

# 1.5 * 2**23: adding it leaves no bits for a fraction, so the hardware's rounding of the sum rounds to an integer.
_MAGIC = tl.constexpr(12582912.0)


@triton.jit
def round_half_even(v):  # type: ignore[no-untyped-def]
    """rint(v), exact for |v| < 2**22 and monotone beyond, for 2 instructions in the interpreter and on every GPU."""
    return (v + _MAGIC) - _MAGIC

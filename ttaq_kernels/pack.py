"""Low-bit codes in bytes: the order of files, which wastes no bit, and the order that kernels unpack at little cost.

Files (`pack_codes`): each row of K codes is one little-endian string of bits. Code k takes the bits
k * bits, ..., (k + 1) * bits - 1; bit i is bit i % 8 of byte i // 8; a row takes ceil(K * bits / 8) bytes, and the bits
beyond the last code are 0. Negative codes are stored in two's complement.

Kernels (`to_kernel_order`): rows of blocks of BLOCK_BYTES = 32 bytes, 2, 4 or 8 bits per code (3 bits take 4; 5, 6 and
7 take 8). Byte j of a block holds the codes j, j + 32, j + 64, ... of the block, the first in its lowest bits:

    4 bits: 64 codes per block,   byte j = code[j] | code[j + 32] << 4                      (half-blocks)
    2 bits: 128 codes per block,  byte j = code[j] | code[j + 32] << 2 | code[j + 64] << 4 | code[j + 96] << 6
    8 bits: 32 codes per block,   byte j = code[j]

So a tile of bytes unpacks, by a shift and a mask of whole 32-bit words, into tiles of codes that multiply contiguous
slices of the activations: nothing moves between threads. Rows are padded to whole blocks.

Packed 4-bit activations use the same order. A channels_last tensor [N, C, H, W] of codes 0, ..., 15 is, in memory,
one row of `kernel_bytes(C, 4)` = 32 * ceil(C / 64) bytes per pixel (uint8 [N * H * W, bytes], pixels in the order n, h,
w): channel c sits in byte 32 * (c // 64) + c % 32 of its pixel, in the low half of the byte if c % 64 < 32, else in
the high half. Channels beyond C are 0; the weights beside them must be codes that contribute 0.

Weights are padded with their zero point, which contributes 0 whatever the activations are. Called when a model is
saved or loaded; `unpack_signed` and `unpack_unsigned` by the kernels of packed weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ttaq_kernels import _check
from ttaq_kernels._launch import tl, triton
from ttaq_kernels.errors import KernelError
from ttaq_kernels.reference import pack as reference
from ttaq_kernels.reference.pack import BLOCK_BYTES, kernel_bits, kernel_bytes

# Device functions stay without types: Triton has none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

__all__ = [
    "BLOCK_BYTES",
    "PackedWeight",
    "code_index",
    "from_kernel_order",
    "kernel_bits",
    "kernel_bytes",
    "pack_codes",
    "pack_weight",
    "to_kernel_order",
    "unpack_codes",
    "unpack_signed",
    "unpack_unsigned",
]

_INTEGER_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_BLOCK = tl.constexpr(BLOCK_BYTES)


@triton.jit
def code_index(offs_b, PART: tl.constexpr, BITS: tl.constexpr):
    """Which codes of a row the unpacking finds in the bytes `offs_b`."""
    return (offs_b // _BLOCK) * (_BLOCK * (8 // BITS)) + PART * _BLOCK + offs_b % _BLOCK


@triton.jit
def unpack_signed(packed, PART: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Codes in two's complement, int8 and times 2^(8 - BITS): moved to the top of their byte they need no sign
    extension. Inline assembly works on four bytes at once, which the interpreter cannot run.
    """
    LEFT: tl.constexpr = 8 - BITS * (PART + 1)
    if BITS == 8:
        codes = packed.to(tl.int8, bitcast=True)
    elif ASM:
        MASK: tl.constexpr = 0xF0F0F0F0 if BITS == 4 else 0xC0C0C0C0
        codes = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shl.b32 t, $1, {LEFT}; and.b32 $0, t, {MASK}; }}",
            "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        codes = ((packed << LEFT) & (256 - (1 << (8 - BITS)))).to(tl.int8, bitcast=True)
    return codes


@triton.jit
def unpack_unsigned(packed, zero_point, PART: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Unsigned codes minus their zero points, int8: 2 or 4 bits; `zero_point` int8, 0, ..., 2^BITS - 1.

    In assembly bit 7, set before the subtraction and flipped after it, keeps the four bytes from borrowing.
    """
    if ASM:
        MASK: tl.constexpr = 0x0F0F0F0F if BITS == 4 else 0x03030303
        zero_points = tl.broadcast_to(zero_point, packed.shape)
        codes = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.u32 t, $1, {PART * BITS}; and.b32 t, t, {MASK}; or.b32 t, t, 0x80808080;"
            " sub.u32 t, t, $2; xor.b32 $0, t, 0x80808080; }",
            "=r,r,r", [packed, zero_points], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        codes = ((packed >> (PART * BITS)) & ((1 << BITS) - 1)).to(tl.int8) - zero_point
    return codes


class PackedWeight(NamedTuple):
    """A weight as a kernel reads it: `integers() = q - zero_point`, times `scale` per output.

    codes: uint8 [N, ..., kernel_bytes(K)] in kernel order. bits: 2, 4 or 8 per code. length: K.
    scale: float32 [N] or [1].
    zero_point: int8 [N] to subtract from the codes, which then are unsigned (8 bits: signed, q - 128); None where
        nothing is to subtract from codes in two's complement.
    row_sum: int32 [N], the sum of the integers of each output: what a zero point of the activations is multiplied by.
    largest: the largest magnitude of the integers that the grid allows, which bounds sums.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    row_sum: Tensor
    bits: int
    length: int
    largest: int

    def integers(self) -> Tensor:
        """q - zero_point, int16 [N, ..., K]."""
        return reference.integers(self.codes, self.zero_point, self.bits, self.length)

    def dequantized(self) -> Tensor:
        """(q - zero_point) * scale, float32 [N, ..., K]."""
        return self.integers().float() * self.scale.view(-1, *[1] * (self.codes.ndim - 1))


def _check_codes(who: str, codes: Tensor, bits: int, signed: bool | None = None) -> None:
    """Codes [..., K] of `bits` bits; `signed` None allows either kind, but not both at once. Waits for the device."""
    _check.check_input(who, "codes", codes, _INTEGER_TYPES)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise KernelError(f"{who}: bits is {bits!r}, expected 2 to 8")
    if codes.ndim == 0:
        raise KernelError(f"{who}: codes has no dimensions, expected [..., K]")
    if codes.numel():
        signed = bool(codes.amin() < 0) if signed is None else signed
        _check_range(who, "codes go", codes, bits, signed)


def _check_range(who: str, what: str, values: Tensor, bits: int, signed: bool) -> None:
    low = -(1 << (bits - 1)) if signed else 0
    high = low + (1 << bits) - 1
    least, most = (int(bound) for bound in values.aminmax())
    if least < low or most > high:
        raise KernelError(f"{who}: {what} from {least} to {most}, expected {low} to {high} for {bits} bits")


def _check_packed(who: str, packed: Tensor, width: int, meaning: str) -> None:
    _check.check_input(who, "packed", packed, (torch.uint8,))
    if packed.ndim == 0 or packed.shape[-1] != width:
        raise KernelError(f"{who}: packed has shape {tuple(packed.shape)}, expected [..., {width}] {meaning}")


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """`codes` as the bytes of a file.

    Args:
        codes: an integer type, [..., K], any layout, also empty; 0, ..., 2^bits - 1 or -2^(bits - 1), ...,
            2^(bits - 1) - 1. Reading their range waits for the device.
        bits: 2 to 8.

    Returns:
        uint8 [..., ceil(K * bits / 8)]; `unpack_codes` is the exact inverse.

    Raises:
        KernelError: a type, a number of bits or a code that does not fit.
    """
    _check_codes("pack_codes", codes, bits)
    return reference.pack_codes(codes, bits)


def unpack_codes(packed: Tensor, bits: int, length: int, *, signed: bool = False) -> Tensor:
    """The `length` codes of each row that `pack_codes` made: uint8, or int8 if they were signed.

    Raises:
        KernelError: `packed` is not uint8 [..., ceil(length * bits / 8)].
    """
    _check_packed("unpack_codes", packed, -(-length * bits // 8), f"for {length} codes of {bits} bits")
    return reference.unpack_codes(packed, bits, length, signed)


def to_kernel_order(codes: Tensor, bits: int, padding: Tensor | int = 0) -> Tensor:
    """`codes` [..., K] as rows of blocks, uint8 [..., kernel_bytes(K, bits)]; arguments and errors of `pack_codes`.

    padding: the code between the last one and the end of the last block, a number or a tensor that broadcasts to
        [..., 1]; a weight is padded with its zero point.
    """
    _check_codes("to_kernel_order", codes, bits)
    return reference.to_kernel_order(codes, bits, padding)


def from_kernel_order(packed: Tensor, bits: int, length: int, *, signed: bool = False) -> Tensor:
    """The `length` codes of each row that `to_kernel_order` made: uint8, or int8 if they were signed.

    Raises:
        KernelError: `packed` is not uint8 [..., kernel_bytes(length, bits)].
    """
    width = kernel_bytes(length, bits)
    _check_packed("from_kernel_order", packed, width, f"= kernel_bytes({length}, {bits})")
    return reference.from_kernel_order(packed, bits, length, signed)


def pack_weight(codes: Tensor, bits: int, scale: Tensor, zero_point: Tensor | None = None) -> PackedWeight:
    """A weight on the grid `(q - zero_point) * scale`, ready for `packed_linear`. Called once, when a model is loaded.

    Args:
        codes: q, an integer type, [N, ..., K]: 0, ..., 2^bits - 1, without a zero point -2^(bits - 1), ...,
            2^(bits - 1) - 1.
        bits: 2 to 8.
        scale: float32 [N] or [1].
        zero_point: int32, the shape of `scale`, 0, ..., 2^bits - 1; None for a symmetric grid.

    Raises:
        KernelError: a type, a shape or a value that does not fit (this waits for the device).
    """
    who = "pack_weight"
    _check_codes(who, codes, bits, signed=zero_point is None)
    if codes.ndim < 2:
        raise KernelError(f"{who}: codes has shape {tuple(codes.shape)}, expected [N, ..., K]")
    shapes = ((codes.shape[0],), (1,))
    _check.check_parameter(who, "scale", scale, codes, shapes, "for one scale per output or one in all", torch.float32)
    largest = 1 << (bits - 1)
    integers = codes = codes.to(torch.int16)
    padding: Tensor | int = 0
    if zero_point is not None:
        _check.check_parameter(who, "zero_point", zero_point, codes, (tuple(scale.shape),), "like scale", torch.int32)
        if zero_point.numel():
            _check_range(who, "zero_point goes", zero_point, bits, signed=False)
        largest = (1 << bits) - 1
        zero_point = zero_point.to(torch.int16).expand(codes.shape[0])
        padding = zero_point.view(-1, *[1] * (codes.ndim - 1))
        integers = codes - padding
        if bits == 8:
            codes, padding, zero_point = codes - 128, padding - 128, zero_point - 128
        elif kernel_bits(bits) == 8:  # the difference fits the byte that it takes anyway
            codes, padding, zero_point = integers, 0, None
    row_sum = integers.flatten(1).sum(1, dtype=torch.int32)
    if zero_point is not None:
        zero_point = zero_point.to(torch.int8)
    packed = reference.to_kernel_order(codes, bits, padding)
    return PackedWeight(packed, scale, zero_point, row_sum, kernel_bits(bits), codes.shape[-1], largest)

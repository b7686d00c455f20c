"""Low-bit codes in bytes, in plain PyTorch on any device: what `ttaq_kernels.pack` offers and the CPU path reads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "from_kernel_order",
    "integers",
    "kernel_bits",
    "kernel_bytes",
    "pack_codes",
    "to_kernel_order",
    "unpack_codes",
]

BLOCK_BYTES = 32
_GROUP = 8  # codes of `bits` bits fill `bits` bytes


def kernel_bits(bits: int) -> int:
    """Bits of a code in kernel order: what divides a byte."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def kernel_bytes(length: int, bits: int) -> int:
    """Bytes of a row of `length` codes in kernel order."""
    block = 8 // kernel_bits(bits) * BLOCK_BYTES
    return -(-length // block) * BLOCK_BYTES


def _steps(count: int, step: int, like: Tensor) -> Tensor:
    return torch.arange(0, count * step, step, dtype=like.dtype, device=like.device)


def _typed(unsigned: Tensor, bits: int, signed: bool) -> Tensor:
    """int8 or uint8 of the lowest `bits` bits."""
    if not signed:
        return unsigned.to(torch.uint8)
    half = 1 << (bits - 1)
    return ((unsigned ^ half) - half).to(torch.int8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    length = codes.shape[-1]
    groups = -(-length // _GROUP)
    grouped = functional.pad(codes.long() & ((1 << bits) - 1), (0, groups * _GROUP - length))
    grouped = grouped.reshape(*codes.shape[:-1], groups, _GROUP)
    words = (grouped << _steps(_GROUP, bits, grouped)).sum(-1, keepdim=True)
    packed = ((words >> _steps(bits, 8, words)) & 255).to(torch.uint8)
    return packed.flatten(-2)[..., : -(-length * bits // 8)].contiguous()


def unpack_codes(packed: Tensor, bits: int, length: int, signed: bool) -> Tensor:
    groups = -(-length // _GROUP)
    grouped = functional.pad(packed.long(), (0, groups * bits - packed.shape[-1]))
    grouped = grouped.reshape(*packed.shape[:-1], groups, bits)
    words = (grouped << _steps(bits, 8, grouped)).sum(-1, keepdim=True)
    codes = (words >> _steps(_GROUP, bits, words)) & ((1 << bits) - 1)
    return _typed(codes.flatten(-2)[..., :length], bits, signed)


def to_kernel_order(codes: Tensor, bits: int, padding: Tensor | int = 0) -> Tensor:
    bits = kernel_bits(bits)
    length, width = codes.shape[-1], kernel_bytes(codes.shape[-1], bits)
    padded = codes.new_empty((*codes.shape[:-1], width * 8 // bits), dtype=torch.uint8)
    padded[..., :length] = codes
    padded[..., length:] = padding
    parts = padded.bitwise_and_((1 << bits) - 1).view(*codes.shape[:-1], width // BLOCK_BYTES, 8 // bits, BLOCK_BYTES)
    blocks = parts[..., 0, :].clone(memory_format=torch.contiguous_format)
    for part in range(1, 8 // bits):
        blocks |= parts[..., part, :] << part * bits
    return blocks.flatten(-2)


def from_kernel_order(packed: Tensor, bits: int, length: int, signed: bool) -> Tensor:
    bits = kernel_bits(bits)
    blocks = packed.reshape(*packed.shape[:-1], packed.shape[-1] // BLOCK_BYTES, 1, BLOCK_BYTES).to(torch.int16)
    parts = (blocks >> _steps(8 // bits, bits, blocks)[:, None]) & ((1 << bits) - 1)
    return _typed(parts.flatten(-3)[..., :length], bits, signed)


def integers(packed: Tensor, zero_point: Tensor | None, bits: int, length: int) -> Tensor:
    """q - zero_point of a packed weight, int16; unsigned codes of 2 and 4 bits where there is a zero point."""
    codes = from_kernel_order(packed, bits, length, zero_point is None or bits == 8).to(torch.int16)
    return codes if zero_point is None else codes - zero_point.view(-1, *[1] * (codes.ndim - 1))

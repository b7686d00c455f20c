"""Packing: both orders worked by hand, each direction the inverse of the other, every error message."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ttaq_kernels import KernelError, pack_codes, pack_weight, unpack_codes
from ttaq_kernels.pack import BLOCK_BYTES, from_kernel_order, kernel_bits, kernel_bytes, to_kernel_order

GRIDS = st.tuples(st.integers(2, 8), st.booleans())  # bits, signed
TYPES = {False: [torch.int16, torch.int32, torch.int64], True: [torch.int8, torch.int16, torch.int64]}


def grid(bits: int, signed: bool) -> tuple[int, int]:
    low = -(1 << (bits - 1)) if signed else 0
    return low, low + (1 << bits) - 1


@st.composite
def codes_of(draw: st.DrawFn) -> tuple[Tensor, int, bool]:
    """Codes of any shape, type and layout, with their bits and whether they are signed."""
    bits, signed = draw(GRIDS)
    low, high = grid(bits, signed)
    shape = (*draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.one_of(st.integers(0, 20), st.integers(0, 300))))
    torch.manual_seed(draw(st.integers(0, 1000)))
    codes = torch.randint(low, high + 1, shape).to(draw(st.sampled_from(TYPES[signed])))
    if draw(st.booleans()):
        codes = torch.stack([codes, codes.flip(-1)], -1)[..., 0]  # every second element
    return codes, bits, signed


def test_file_order_by_hand() -> None:
    """3 bits: 001 010 011 100 101 from the low end are the bytes 11010001 and 01011000."""
    packed = pack_codes(torch.tensor([1, 2, 3, 4, 5]), 3)
    assert packed.tolist() == [0b11_010_001, 0b0_101_100_0]
    assert packed.dtype == torch.uint8
    assert pack_codes(torch.tensor([[-1, -8, 7]]), 4).tolist() == [[0x8F, 0x07]]
    assert pack_codes(torch.tensor([255, 128]), 8).tolist() == [255, 128]
    assert pack_codes(torch.tensor([3, 2, 1, 0, 3]), 2).tolist() == [0b00_01_10_11, 3]


def test_kernel_order_by_hand() -> None:
    """Byte j of a block: codes j, j + 32, ...; the last block is filled up."""
    codes = torch.arange(70) % 16
    packed = to_kernel_order(codes, 4, padding=9)
    assert packed.shape == (2 * BLOCK_BYTES,)
    assert packed[:32].tolist() == [int(codes[j]) | int(codes[j + 32]) << 4 for j in range(32)]
    assert packed[32:38].tolist() == [int(codes[64 + j]) | 0x90 for j in range(6)]
    assert packed[38:].eq(0x99).all()
    codes = torch.arange(128) % 4
    expected = [sum(int(codes[j + 32 * part]) << 2 * part for part in range(4)) for j in range(32)]
    assert to_kernel_order(codes, 2).tolist() == expected
    assert to_kernel_order(torch.tensor([-1, 5]), 8).tolist() == [255, 5] + [0] * 30
    # 3 bits become 4 with their sign: -4 is 1100.
    assert to_kernel_order(torch.tensor([-4, 3]), 3).tolist() == [12, 3] + [0] * 30


def test_packed_activations_lie_as_documented() -> None:
    """Channel c: byte 32 * (c // 64) + c % 32 of its pixel, low half if c % 64 < 32."""
    x = torch.randint(0, 16, (2, 80, 3, 3), dtype=torch.uint8).to(memory_format=torch.channels_last)
    pixels = to_kernel_order(x.permute(0, 2, 3, 1).reshape(-1, 80), 4)
    assert pixels.shape == (18, kernel_bytes(80, 4)) == (18, 64)
    for c in (0, 31, 32, 63, 64, 79):
        byte = pixels[:, 32 * (c // 64) + c % 32]
        half = byte & 15 if c % 64 < 32 else byte >> 4
        assert torch.equal(half.view(2, 3, 3), x[:, c])


@settings(deadline=None)
@given(codes_of())
def test_packing_and_unpacking_are_inverse(case: tuple[Tensor, int, bool]) -> None:
    codes, bits, signed = case
    length = codes.shape[-1]
    packed = pack_codes(codes, bits)
    assert packed.shape == (*codes.shape[:-1], -(-length * bits // 8))
    assert packed.is_contiguous()
    unpacked = unpack_codes(packed, bits, length, signed=signed)
    assert unpacked.dtype == (torch.int8 if signed else torch.uint8)
    assert torch.equal(unpacked.to(codes.dtype), codes)
    assert torch.equal(pack_codes(unpacked, bits), packed)
    ordered = to_kernel_order(codes, bits)
    assert ordered.shape == (*codes.shape[:-1], kernel_bytes(length, bits))
    assert torch.equal(from_kernel_order(ordered, bits, length, signed=signed).to(codes.dtype), codes)
    assert torch.equal(to_kernel_order(from_kernel_order(ordered, bits, length, signed=signed), bits), ordered)


@settings(deadline=None)
@given(GRIDS, st.integers(0, 4), st.integers(0, 150), st.booleans())
def test_packed_weight(bits_and_sign: tuple[int, bool], outputs: int, length: int, shared: bool) -> None:
    """The integers are q - zero_point, and the padding of each row contributes 0."""
    bits, signed = bits_and_sign
    low, high = grid(bits, signed)
    q = torch.randint(low, high + 1, (outputs, 2, length))
    scale = torch.rand(1 if shared else outputs) + 0.1
    zero_point = None if signed else torch.randint(0, high + 1, scale.shape, dtype=torch.int32)
    weight = pack_weight(q, bits, scale, zero_point)
    integers = q if zero_point is None else q - zero_point.view(-1, 1, 1)
    assert torch.equal(weight.integers().long(), integers)
    assert torch.equal(weight.row_sum.long(), integers.sum((1, 2)))
    assert torch.equal(weight.dequantized(), integers.float() * scale.view(-1, 1, 1))
    assert weight.bits == kernel_bits(bits)
    whole = weight._replace(length=weight.codes.shape[-1] * 8 // weight.bits).integers()
    assert whole[..., length:].eq(0).all()
    assert not integers.numel() or integers.abs().max() <= weight.largest


def test_sizes() -> None:
    """Files waste no bit; kernels pad 160 inputs to 192 at 4 bits and to 256 at 2 bits."""
    codes = torch.zeros(640, 160, dtype=torch.int8)
    in_files = [pack_codes(codes, bits).shape[1] for bits in (2, 3, 4, 6, 8)]
    in_kernels = [pack_weight(codes, bits, torch.ones(1)).codes.shape[1] for bits in (2, 3, 4, 6, 8)]
    assert in_files == [40, 60, 80, 120, 160]
    assert in_kernels == [64, 96, 96, 160, 160]


FOUR, ONES = torch.arange(4).view(2, 2), torch.ones(2)
ZEROS = torch.zeros(2, dtype=torch.int32)
ERRORS = [
    (lambda: pack_codes(FOUR.float(), 4), "pack_codes: codes has dtype float32, expected uint8 or int8 or int16"),
    (lambda: pack_codes(FOUR, 1), "pack_codes: bits is 1, expected 2 to 8"),
    (lambda: pack_codes(FOUR, True), "pack_codes: bits is True, expected 2 to 8"),
    (lambda: pack_codes(FOUR[0, 0], 4), "pack_codes: codes has no dimensions, expected [..., K]"),
    (lambda: pack_codes(FOUR + 13, 4), "pack_codes: codes go from 13 to 16, expected 0 to 15 for 4 bits"),
    (lambda: pack_codes(FOUR - 1, 2), "pack_codes: codes go from -1 to 2, expected -2 to 1 for 2 bits"),
    (lambda: to_kernel_order(FOUR, 9), "to_kernel_order: bits is 9, expected 2 to 8"),
    (
        lambda: unpack_codes(torch.zeros(2, 3, dtype=torch.uint8), 4, 7),
        "unpack_codes: packed has shape (2, 3), expected [..., 4] for 7 codes of 4 bits",
    ),
    (
        lambda: unpack_codes(torch.zeros(4, dtype=torch.int8), 4, 7),
        "unpack_codes: packed has dtype int8, expected uint8",
    ),
    (
        lambda: from_kernel_order(torch.zeros(2, 32, dtype=torch.uint8), 4, 65),
        "from_kernel_order: packed has shape (2, 32), expected [..., 64] = kernel_bytes(65, 4)",
    ),
    (lambda: pack_weight(FOUR, 2, ONES), "pack_weight: codes go from 0 to 3, expected -2 to 1 for 2 bits"),
    (lambda: pack_weight(FOUR - 1, 4, ONES, ZEROS), "pack_weight: codes go from -1 to 2, expected 0 to 15 for 4 bits"),
    (lambda: pack_weight(FOUR[0], 4, ONES), "pack_weight: codes has shape (2,), expected [N, ..., K]"),
    (lambda: pack_weight(FOUR, 4, torch.ones(3)), "pack_weight: scale has shape (3,), expected (2,) or (1,)"),
    (lambda: pack_weight(FOUR, 4, ONES.double()), "pack_weight: scale has dtype float64, expected float32"),
    (lambda: pack_weight(FOUR, 4, ONES, ZEROS[:1]), "pack_weight: zero_point has shape (1,), expected (2,) like scale"),
    (
        lambda: pack_weight(FOUR, 4, ONES, ZEROS + 16),
        "pack_weight: zero_point goes from 16 to 16, expected 0 to 15 for 4 bits",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(call: object, message: str) -> None:
    with pytest.raises(KernelError) as caught:
        call()  # type: ignore[operator]
    assert str(caught.value).startswith(message)

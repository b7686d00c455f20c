"""packed_linear with 8-bit activation codes at the linear layers of ViT-B and the 1x1 convolutions of ResNet-50.

Baselines: the float layer (eager and compiled), `torch._int_mm` on unpacked int8 weights, and torchao's int8 kernel,
which is given its scales and a bias with the zero points folded in. Packing is not timed. The scales are powers of two,
so that the floating operands lie on the grids exactly and all implementations compute the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.networks import NETWORKS
from benchmarks.registry import Case, Op
from ttaq_kernels import pack_weight, packed_linear
from ttaq_kernels.pack import PackedWeight

# The other networks have 4 bits: weight bits change the bytes of a layer, which only matters where it is short of them.
_BITS = {"tiny": (4, 8), "ViT-S": (4, 8), "ViT-B": (2, 4, 8)}
_INPUT_SCALE, _INPUT_ZERO_POINT = 2.0**-5, 7


def _cases(suite: str) -> list[Case]:
    dtype = torch.bfloat16 if suite == "cuda" else torch.float32
    return [
        Case("packed_linear", network.label, (network.batch * rows, length), dtype, variant=f"W{bits}A8 N{outputs}")
        for network in NETWORKS[suite]
        for rows, length, outputs in network.linears
        for bits in _BITS.get(network.name, (4,))
    ]


def _bits_and_outputs(case: Case) -> tuple[int, int]:
    weights, outputs = case.variant.split()
    return int(weights[1]), int(outputs[1:])


def _inputs(case: Case, draw: torch.Generator) -> tuple[Tensor, ...]:
    """Floating x, weight and bias on the grids; the codes of x; int8 weight and bias with x's zero point; the packed
    weight."""
    bits, outputs = _bits_and_outputs(case)
    (rows, length), device = case.shape, draw.device
    codes = torch.randint(-128, 128, (rows, length), generator=draw, device=device, dtype=torch.int8)
    # Around the middle, so that a difference of 8 bits fits an int8 weight for the other kernels.
    q = torch.randint(0, 1 << bits, (outputs, length), generator=draw, device=device)
    zero_point = torch.full((outputs,), 1 << (bits - 1), device=device, dtype=torch.int32)
    scale = 2.0 ** torch.randint(-8, -5, (outputs,), generator=draw, device=device)
    weight = pack_weight(q, bits, scale, zero_point)
    bias = torch.randn(outputs, generator=draw, device=device)
    folded = bias - _INPUT_ZERO_POINT * weight.row_sum * scale * _INPUT_SCALE
    x = ((codes.float() - _INPUT_ZERO_POINT) * _INPUT_SCALE).to(case.dtype)
    int8 = weight.integers().to(torch.int8)
    grid = (torch.tensor([_INPUT_SCALE], device=device), torch.tensor([_INPUT_ZERO_POINT], device=device).int())
    packed = (weight.codes, scale, weight.zero_point, weight.row_sum)
    return (
        x,
        weight.dequantized().to(case.dtype),
        bias,
        codes,
        int8,
        folded,
        *grid,
        *(t for t in packed if t is not None),
    )


def _ours(
    x: Tensor, _weight: Tensor, bias: Tensor, codes: Tensor, _int8: Tensor, _folded: Tensor, *packed: Tensor
) -> Tensor:
    input_scale, input_zero_point, packed_codes, scale, zero_point, row_sum = packed
    length = codes.shape[1]
    bits = packed_codes.shape[1] * 8 // length  # no layer here has padded rows
    weight = PackedWeight(packed_codes, scale, zero_point, row_sum, bits, length, (1 << bits) - 1)
    return packed_linear(codes, weight, bias, input_scale=input_scale, input_zero_point=input_zero_point, dtype=x.dtype)


def _composition(x: Tensor, weight: Tensor, bias: Tensor, *_: Tensor) -> Tensor:
    return F.linear(x, weight, bias.to(x.dtype))


def _int_mm(
    x: Tensor, _weight: Tensor, _bias: Tensor, codes: Tensor, int8: Tensor, folded: Tensor, *packed: Tensor
) -> Tensor:
    input_scale, _, _, scale, *_ = packed
    return (torch._int_mm(codes, int8.T) * (scale * input_scale) + folded).to(x.dtype)


def _torchao(
    x: Tensor, _weight: Tensor, _bias: Tensor, codes: Tensor, int8: Tensor, folded: Tensor, *packed: Tensor
) -> Tensor:
    from torchao.prototype.quantized_training.int8_mm import scaled_int8_mm

    input_scale, _, _, scale, *_ = packed
    rows = input_scale.to(x.dtype).expand(len(codes)).contiguous()
    return scaled_int8_mm(codes, int8.T, rows, scale.to(x.dtype)) + folded.to(x.dtype)


def _bytes(case: Case) -> int:
    """Codes, packed weight and result."""
    bits, outputs = _bits_and_outputs(case)
    rows, length = case.shape
    return rows * length + outputs * length * bits // 8 + rows * outputs * case.dtype.itemsize


OP = Op(
    name="packed_linear",
    cases=_cases,
    inputs=_inputs,
    ours=_ours,
    composition=_composition,
    single=_int_mm,
    public=_torchao,
    bytes_moved=_bytes,
    tolerances=lambda case: [(torch.finfo(case.dtype).eps, 1e-4)],
)

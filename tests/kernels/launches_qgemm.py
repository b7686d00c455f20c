"""packed_linear: every number of bits and kind of zero point at a layer of ViT-B, every tile, every type."""

import torch
from kernel_launch import Launch

from ttaq_kernels import qgemm
from ttaq_kernels.pack import kernel_bytes

_VIT_FC1, _HEAD, _RESNET_L1, _ONE = (12608, 3072, 768), (64, 1000, 768), (200704, 64, 64), (1, 1, 1)
_INTEGER_MMA = r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8\.s32"
_INTEGER = {80: _INTEGER_MMA, 89: _INTEGER_MMA, 90: r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8"}
_FLOAT = {90: r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(bf16\.bf16|f16\.f16)"}
# Of the whole kernel. Without inline assembly symmetric codes take 56 PRMT and 85 LOP3, zero points 134 and 119.
_UNPACKED = {"PRMT": 4, "LOP3": 72}
_SUBTRACTED = {"PRMT": 8, "LOP3": 100}


def _packed_linear(
    bits: int, zero_points: bool, dtype: torch.dtype, shape: tuple[int, int, int], out_dtype: torch.dtype
) -> None:
    rows, outputs, length = shape
    x = torch.empty(rows, length, dtype=dtype)
    codes = torch.empty(outputs, kernel_bytes(length, bits), dtype=torch.uint8)
    scale, zero_point = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    integer, requantized = dtype is torch.int8, out_dtype is torch.int8
    qgemm._launch_gemm(
        x,
        codes,
        bits,
        torch.ones(outputs),
        torch.zeros(outputs, dtype=torch.int8) if zero_points else None,
        torch.zeros(outputs, dtype=torch.int32),
        scale if integer else None,
        zero_point if integer else None,
        torch.zeros(outputs),
        out_dtype,
        scale if requantized else None,
        zero_point if requantized else None,
        0,
        1,  # which Triton makes a constant
        asm=True,
    )


def _launches() -> list[Launch]:
    int8, bf16, fp16, fp32 = torch.int8, torch.bfloat16, torch.float16, torch.float32
    kinds = [
        (2, False, int8, _VIT_FC1, bf16, 192, _UNPACKED),
        (2, True, int8, _VIT_FC1, bf16, 192, _SUBTRACTED),
        (4, False, int8, _VIT_FC1, bf16, 192, _UNPACKED),
        (4, True, int8, _VIT_FC1, bf16, 192, _SUBTRACTED),
        (8, False, int8, _VIT_FC1, bf16, 255, _UNPACKED),
        (8, True, int8, _VIT_FC1, bf16, 255, {}),
        (4, True, int8, _VIT_FC1, int8, 192, {}),
        (4, True, int8, _RESNET_L1, bf16, 192, _SUBTRACTED),
        (8, True, int8, _ONE, fp32, 96, {}),
        (4, False, int8, _HEAD, fp16, 192, _UNPACKED),
        (4, True, fp16, _VIT_FC1, fp16, 192, {}),
        (8, True, bf16, _VIT_FC1, bf16, 255, {}),
        (2, True, fp32, _HEAD, fp32, 128, {}),
    ]
    return [
        Launch(
            f"packed_linear-W{bits}{'-zero_points' * zero_points}-{str(dtype).removeprefix('torch.')}"
            f"-{'x'.join(map(str, shape))}-{str(out_dtype).removeprefix('torch.')}",
            lambda arguments=(bits, zero_points, dtype, shape, out_dtype): _packed_linear(*arguments),
            registers=registers,
            rounds=dtype is int8,
            required=_INTEGER if dtype is int8 else {} if dtype is fp32 else _FLOAT,
            sass_limits=limits,
        )
        for bits, zero_points, dtype, shape, out_dtype, registers, limits in kinds
    ]


LAUNCHES = _launches()

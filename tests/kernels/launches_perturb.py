"""perturb: the norm parameters of a ViT and of a ResNet-50, and what does not fit one launch."""

import importlib

import torch
from kernel_launch import Launch

# The package exports a function of the same name.
perturb = importlib.import_module("ttaq_kernels.perturb")


def _perturb(sizes: list[int], dtype: torch.dtype, distribution: str, inverse: bool) -> None:
    bases = [torch.zeros(size, dtype=dtype) for size in sizes]
    perturb._launch_perturb(bases, torch.zeros(2), torch.zeros(2, dtype=torch.int64), distribution, inverse)


def _launches() -> list[Launch]:
    kinds: dict[str, tuple[list[int], torch.dtype, str, bool]] = {
        "vit": ([768] * 32, torch.float32, "half_to_one", False),
        "vit-inverse": ([768] * 32, torch.float32, "half_to_one", True),
        "vit-normal-bfloat16": ([768] * 32, torch.bfloat16, "normal", False),
        "resnet50-signs": ([64, 64, 256, 512, 63] * 15, torch.float32, "signs", False),
    }
    return [
        Launch(f"perturb-{name}", lambda kind=kind: _perturb(*kind), registers=64, rounds=True)
        for name, kind in kinds.items()
    ]


LAUNCHES = _launches()

"""Triton kernels of ttaq, with a CPU path in plain PyTorch: tensors and integers only.

An op runs its kernel for CUDA tensors and `ttaq_kernels.reference` for CPU tensors; both give the same numbers.
"""

from ttaq_kernels.batch_norm import batch_norm
from ttaq_kernels.errors import KernelError
from ttaq_kernels.fake_quant import fake_quantize
from ttaq_kernels.losses import softmax_entropy
from ttaq_kernels.moments import batch_norm_moments
from ttaq_kernels.scale_search import search_scale

__all__ = ["KernelError", "batch_norm", "batch_norm_moments", "fake_quantize", "search_scale", "softmax_entropy"]

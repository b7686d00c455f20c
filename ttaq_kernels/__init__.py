"""Triton kernels of ttaq, with a CPU path in plain PyTorch: tensors and integers only.

An op runs its kernel for CUDA tensors and `ttaq_kernels.reference` for CPU tensors; both give the same numbers.
"""

from ttaq_kernels.batch_norm import batch_norm, batch_norm_ema
from ttaq_kernels.cross_entropy import softmax_cross_entropy
from ttaq_kernels.errors import KernelError
from ttaq_kernels.fake_quant import fake_quantize
from ttaq_kernels.gather_mix import gather_mix
from ttaq_kernels.group_affine import group_affine
from ttaq_kernels.layer_norm import layer_norm, layer_norm_codes
from ttaq_kernels.losses import soft_likelihood_ratio, softmax_entropy
from ttaq_kernels.moments import batch_norm_moments
from ttaq_kernels.norm_act_quant import norm_act_codes, norm_act_quant
from ttaq_kernels.pack import pack_codes, pack_weight, unpack_codes
from ttaq_kernels.perturb import perturb
from ttaq_kernels.qgemm import packed_linear
from ttaq_kernels.reconstruction import reconstruction_loss
from ttaq_kernels.scale_search import search_scale
from ttaq_kernels.soft_round import rounding_penalty, soft_round
from ttaq_kernels.soft_round_step import SoftRounding, soft_round_step_

__all__ = [
    "KernelError",
    "SoftRounding",
    "batch_norm",
    "batch_norm_ema",
    "batch_norm_moments",
    "fake_quantize",
    "gather_mix",
    "group_affine",
    "layer_norm",
    "layer_norm_codes",
    "norm_act_codes",
    "norm_act_quant",
    "pack_codes",
    "pack_weight",
    "packed_linear",
    "perturb",
    "reconstruction_loss",
    "rounding_penalty",
    "search_scale",
    "soft_likelihood_ratio",
    "soft_round",
    "soft_round_step_",
    "softmax_cross_entropy",
    "softmax_entropy",
    "unpack_codes",
]

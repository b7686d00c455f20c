"""A name for the values of a model: equal exactly when names, types, shapes and bytes are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["hash_tensors"]


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over, for each name in sorted order, the line `["name", "dtype", [shape]]` in JSON, a newline, and
    the little-endian bytes of the tensor in row-major order.

    Device, strides, storage and requires_grad do not count. Reads every value once, at about 1 GB/s.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().resolve_conj().resolve_neg()
        digest.update(json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]).encode() + b"\n")
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))  # view() wants stride 1
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()

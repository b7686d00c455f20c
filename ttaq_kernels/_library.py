"""Registration of the ops with torch: every op is opaque to torch.compile and has a CPU, a CUDA and a fake version."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["register_op"]

_NAMESPACE = "ttaq_kernels"
_LIBRARY = torch.library.Library(_NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def register_op(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define the op of `schema` and return it.

    `fake` says what the result looks like (shape, type, strides, device) without computing it. The function `backward`
    must call registered ops only: a raw launch inside it would be invisible to torch.compile.
    """
    name = schema.partition("(")[0]
    qualified = f"{_NAMESPACE}::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, cpu, "CPU")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, cuda, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(getattr(torch.ops, _NAMESPACE), name).default
    return op

"""Single images for methods that need several: a window over the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ttaq.errors import CheckpointError, InputError
from ttaq.tta.adapter import Adapter
from ttaq.tta.guards import Guarded

__all__ = ["SlidingWindow"]


class SlidingWindow:
    """`logits = window(x)` for one image x [1, C, H, W]: the adapter sees it together with the `length` - 1 before it.

    Every `length`-th image the adapter answers and learns from the whole window; in between it only predicts, on the
    window as it is, shorter at the beginning. So each image is learned from once, and batch statistics are always those
    of up to `length` images. Every image costs a forward pass over the window.

    Args:
        adapter: any method, guarded or not.
        length: images in the window, at least 2.

    State: that of the adapter, the images in the window and how many came.

    Raises:
        InputError: a length below 2, more or less than one image, or one of another shape than those in the window.

    Source: the single-sample setting of Marsden et al., ROID (arXiv 2306.00650).
    """

    def __init__(self, adapter: Adapter | Guarded, length: int) -> None:
        if type(length) is not int or length < 2:
            raise InputError(f"SlidingWindow: length is {length!r}, expected an integer of at least 2")
        self.adapter = adapter
        self.length = length
        self._images: Tensor | None = None
        self._seen = 0

    def __call__(self, x: Tensor) -> Tensor:
        """The logits [1, classes] of the newest image."""
        if not isinstance(x, Tensor) or x.ndim != 4 or len(x) != 1:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"SlidingWindow: got {got}, expected one image [1, C, H, W]; batches need no window")
        if self._images is not None and self._images.shape[1:] != x.shape[1:]:
            raise InputError(
                f"SlidingWindow: the image has shape {tuple(x.shape)}, those in the window "
                f"{tuple(self._images.shape[1:])}; reset the window to change the size"
            )
        images = x if self._images is None else torch.cat([self._images, x])[-self.length :]
        learns = (self._seen + 1) % self.length == 0
        logits = (self.adapter(images) if learns else self.adapter.predict(images))[-1:]
        self._images, self._seen = images.detach(), self._seen + 1
        return logits

    @property
    def counters(self) -> dict[str, int]:
        """Those of the adapter, and `images` that came."""
        return {**self.adapter.counters, "images": self._seen}

    def reset(self) -> None:
        """An empty window on a reset adapter."""
        self.adapter.reset()
        self._images, self._seen = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Everything mutable, in copies."""
        images = None if self._images is None else self._images.clone()
        return {"adapter": self.adapter.state_dict(), "length": self.length, "seen": self._seen, "images": images}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was called. CheckpointError, nothing changed, for a state of another window."""
        if not isinstance(state, Mapping) or set(state) != {"adapter", "length", "seen", "images"}:
            raise CheckpointError(
                "SlidingWindow: the state is not one of a window; it is damaged or was saved without a window"
            )
        if state["length"] != self.length:
            raise CheckpointError(
                f"SlidingWindow: the state is that of a window of {state['length']!r} images, expected {self.length}; "
                f"use the length it was saved with"
            )
        images, seen = state["images"], state["seen"]
        kept = 0 if images is None else len(images) if isinstance(images, Tensor) and images.ndim == 4 else -1
        if type(seen) is not int or kept != min(seen, self.length):
            raise CheckpointError(
                f"SlidingWindow: the state is damaged: {kept if kept >= 0 else 'no'} images in the window after "
                f"{seen!r}, expected the last ones, at most {self.length}, [N, C, H, W]"
            )
        self.adapter.load_state_dict(state["adapter"])
        device = next(self.adapter.model.parameters()).device
        self._images = None if state["images"] is None else state["images"].to(device)
        self._seen = state["seen"]

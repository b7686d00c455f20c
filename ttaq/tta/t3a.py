"""T3A: a classifier whose prototypes move with the images that the source classifier is surest of."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttaq.errors import InputError
from ttaq.nn.classifier import find_classifier, logits_and_features
from ttaq.tta.adapter import Adapter
from ttaq_kernels import softmax_entropy

__all__ = ["T3A"]


class T3A(Adapter):
    """Nearest prototypes in place of the last linear layer, whose rows W_k are the first support of each class.

    With features h [B, d], logits z = W h + b of the source model and the entropy H of their softmax::

        S_k = {W_k / |W_k|}                     in the beginning, with the entropy of softmax(W W_k / |W_k| + b)
        S_k <- S_k + {h_i / |h_i|}              for k = argmax_c z_ic, with H_i, before the batch is answered
        S_k <- the `keep` of lowest entropy     the older ones where two are alike
        logits_ik = h_i . mean S_k

    Args:
        keep: M, how many supports a class keeps. The paper chooses from 1, 5, 20, 50, 100 and all; all of them (its -1)
            would need memory without bound. The bank takes classes * keep * d * 4 bytes, 164 MB for 1,000 classes of
            2,048 features and keep 20, and what `reset` returns to as much again.

    Errors: `InputError` for a keep that is no count, and for a model that does not end with a linear layer.

    State: the supports [classes, keep, d] and their entropies, infinite for places that are empty; counters. Weights
    and statistics never change: batch norm keeps those of the source.

    Differs from the paper: in nothing; its code scales the prototypes to length 1, and lets a row W_k join the class
    that the classifier takes it for.

    Source: Iwasawa and Matsuo, "Test-time classifier adjustment module for model-agnostic domain generalization",
    NeurIPS 2021.
    """

    method: ClassVar[str] = "t3a"
    supports: Tensor
    entropies: Tensor

    @torch.inference_mode(False)
    def __init__(self, model: nn.Module, *, keep: int = 20, check_finite: bool = True) -> None:
        if type(keep) is not int or keep < 1:
            todo = "; keeping all would need memory without bound, take a large number" if keep == -1 else ""
            raise InputError(f"T3A: keep is {keep!r}, expected an integer >= 1, the supports of a class{todo}")
        super().__init__(model, options={"keep": keep}, check_finite=check_finite)
        self._classifier = find_classifier(self.model, "T3A")
        first, entropy = self._first_supports()
        supports = first.new_zeros(len(first), keep, first.shape[1])
        supports[:, 0] = first
        entropies = entropy.new_full((len(first), keep), torch.inf)
        entropies[:, 0] = entropy
        self.register_buffer("supports", supports)
        self.register_buffer("entropies", entropies)
        self.adapt()

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """Logits by the prototypes that this batch has moved."""
        return self._answer(x, self.supports, self.entropies)

    def answer(self, x: Tensor) -> Tensor:
        """The same with a bank that is dropped."""
        return self._answer(x, self.supports.clone(), self.entropies.clone())

    def _first_supports(self) -> tuple[Tensor, Tensor]:
        """W_k / |W_k| and their entropies. W is read off the layer's outputs: a quantized layer may not hold it."""
        layer = self._classifier
        some = next((t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()), torch.zeros(()))
        with torch.no_grad():
            bias = layer(some.new_zeros(1, layer.in_features)).float()
            weight = layer(torch.eye(layer.in_features, dtype=some.dtype, device=some.device)).float() - bias
            rows = functional.normalize(weight.T, dim=1)
            return rows, softmax_entropy(rows @ weight + bias)

    def _answer(self, x: Tensor, supports: Tensor, entropies: Tensor) -> Tensor:
        logits, features = logits_and_features(self.model, x, self._classifier, "T3A")
        with torch.autocast(x.device.type, enabled=False):
            h = features.to(supports.dtype)
            entropy = softmax_entropy(logits).to(entropies.dtype)
            _join(supports, entropies, functional.normalize(h, dim=1), entropy, logits.argmax(1))
            prototypes = supports.sum(1) / entropies.isfinite().sum(1, keepdim=True)
            return h @ prototypes.T


def _join(supports: Tensor, entropies: Tensor, new: Tensor, entropy: Tensor, label: Tensor) -> None:
    """In place: [C, K, d] supports and [C, K] entropies, with those of [B, d] new ones that are better."""
    classes, keep = entropies.shape
    own = label == torch.arange(classes, device=label.device).unsqueeze(1)
    candidates = torch.cat([entropies, torch.where(own, entropy, torch.inf)], 1)
    best = candidates.argsort(dim=1, stable=True)[:, :keep]  # the bank comes first: no stranger outdoes an empty place
    kept = torch.zeros_like(candidates, dtype=torch.bool).scatter_(1, best, True)
    staying, sample = kept[:, :keep], torch.arange(len(label), device=label.device)
    entering = kept[label, keep + sample].unsqueeze(1)
    # In each class as many enter as places fall free: the n-th of them takes the n-th free place.
    turn = (kept[:, keep:].cumsum(1) - 1)[label, sample].clamp(min=0, max=keep - 1)
    place = label * keep + staying.to(torch.int8).argsort(dim=1, stable=True)[label, turn]
    for bank, rows in ((supports, new), (entropies.unsqueeze(2), entropy.unsqueeze(1))):
        flat = bank.view(classes * keep, -1).masked_fill_(~staying.reshape(-1, 1), 0.0)
        flat.index_add_(0, place, torch.where(entering, rows, 0.0))

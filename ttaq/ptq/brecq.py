"""BRECQ (Li et al., arXiv 2102.05426): AdaRound block by block, with learned scales of the activations.

Differs from the paper: weights and scales learn together, on quantized activations, as the comparison in QDrop and
TTAQ runs it; the loss is not weighted by the Fisher information, as in the authors' own script.
"""

from __future__ import annotations

from ttaq.ptq.settings import Reconstruction

__all__ = ["BRECQ"]

BRECQ = Reconstruction(keep_quantized=1.0)

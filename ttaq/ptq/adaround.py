"""AdaRound (Nagel et al., arXiv 2004.10568): layer by layer, every weight learns whether it is rounded down or up.

Input of a layer: what the quantized layers before it give. Target: the float layer on the float input, its norm and
activation function included. 10,000 steps. Differs from the paper: weights on the asymmetric grid of the scheme, layers
inside a residual block are trained together with it, and activations are quantized while the weights learn.
"""

from __future__ import annotations

from ttaq.ptq.settings import Reconstruction

__all__ = ["ADAROUND"]

ADAROUND = Reconstruction(single_layers=True, iterations=10_000, keep_quantized=1.0, scale_lr=0.0)

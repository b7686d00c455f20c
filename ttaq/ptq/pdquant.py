"""PD-Quant (Liu et al., arXiv 2212.07048): QDrop that also watches the prediction of the whole model.

Adds 10 KL(p_float || p) at temperature 4, for the unit followed by the float rest of the model. Differs from the
paper: without distribution correction, unless `correction` is set.
"""

from __future__ import annotations

from ttaq.ptq.settings import Reconstruction

__all__ = ["PDQUANT"]

PDQUANT = Reconstruction(weight_lr=3e-3, prediction=10.0)

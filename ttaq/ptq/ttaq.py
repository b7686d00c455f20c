"""TTAQ (Xiao et al., arXiv 2412.09899): QDrop for a model that will have to adapt.

The units are trained with the statistics of the batch, the mode that adaptation runs in, without drop, and weight and
bias of the norms learn along; afterwards the norms of the whole model learn the predictions of the float model
(`distillation`). That was chosen on the validation corruptions (docs/quantization.md).
PEM (`pem`; `centring`, `mean_penalty`) takes the mean out of the weights, PCR (`prediction`; `prediction`,
`perturbation`) keeps the prediction of the model where it was when the input of a unit is disturbed.
Differs from the paper: its equations are not public, so both are readings of its text, each behind a switch, and off:
what they brought is in docs/quantization.md too.
"""

from __future__ import annotations

from ttaq.ptq.settings import Reconstruction

__all__ = ["TTAQ"]

TTAQ = Reconstruction(norm_statistics="batch", affine_lr=4e-5, keep_quantized=1.0, distillation=4_000)

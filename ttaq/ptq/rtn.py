"""Round to nearest: every weight and tensor on the grid that fits it best, nothing trained.

The grids of the activations fit the float model on its source statistics: 256 images, error |x - x_hat|^2.4, as in
QDrop (arXiv 2203.05740), behind a LayerNorm to the power 3. State: the grids.
"""

from __future__ import annotations

from torch import Tensor

from ttaq.errors import InputError
from ttaq.nn import QuantizedModel, activation_quantizers, quantized_layers
from ttaq.ptq.observe import Progress, observe

__all__ = ["rtn"]


def rtn(
    model: QuantizedModel, images: Tensor, *, search: str, seed: int, batch_size: int, progress: Progress | None
) -> None:
    """Calibrate the activation quantizers on the float model, then the weights, in place."""
    quantizers, layers = activation_quantizers(model), quantized_layers(model)
    batches = -(-min(len(images), 256) // batch_size)
    total = batches + len(quantizers) + len(layers)
    done = 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, what)

    samples = observe(model, images, seed=seed, batch_size=batch_size, progress=step)
    for name, quantizer in quantizers.items():
        quantizer.calibrate(samples.pop(name), search=search)
        step(name)
    for name, layer in layers.items():
        if not bool(layer.weight.isfinite().all()):
            raise InputError(f"quantize: the weight of {name} has NaN or Inf values, expected finite ones")
        layer.calibrate_weight(search)
        step(name)

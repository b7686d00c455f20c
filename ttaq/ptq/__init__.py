"""Post-training quantization: grids for the weights and tensors of a model, from a few unlabelled images."""

from ttaq.ptq.entry import METHODS, quantize

__all__ = ["METHODS", "quantize"]

"""Layers of a model that runs on few bits and adapts, and the conversion of a float model to them."""

from ttaq.nn.adapt_norms import adapt_norms
from ttaq.nn.batch_norm import AdaptiveBatchNorm2d
from ttaq.nn.conv import QuantConv2d
from ttaq.nn.convert import convert
from ttaq.nn.graph_model import QuantizedModel, activation_quantizers, quantized_layers
from ttaq.nn.linear import QuantLinear
from ttaq.nn.matmul import QuantMatmul
from ttaq.nn.quantizer import Quantizer
from ttaq.nn.report import LayerReport, Report
from ttaq.nn.twin import TwinQuantizer

__all__ = [
    "AdaptiveBatchNorm2d",
    "LayerReport",
    "QuantConv2d",
    "QuantLinear",
    "QuantMatmul",
    "QuantizedModel",
    "Quantizer",
    "Report",
    "TwinQuantizer",
    "activation_quantizers",
    "adapt_norms",
    "convert",
    "quantized_layers",
]

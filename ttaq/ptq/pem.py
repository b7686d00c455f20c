"""PEM: weights without a mean, so that a shift common to the inputs of a layer does not reach its output.

    w' = w - mean(w)        over each output channel (SymReg, arXiv 2208.00338), or over the whole tensor
    y  = conv(w', x) + mean(w) window(x)        "compensated": window(x) sums the input over the kernel window

TTAQ (arXiv 2412.09899, section 3.2) normalises the weights before they are quantized: a noise of the input with mean m
enters the output as n m mean(w_hat), which is 0 then. Its scale part changes nothing under a batch norm and is left
out. The function of the model changes by mean(w) window(x), which batch statistics and reconstruction have to make up
for; compensated it stays what it was, and what is gained is a grid of the weights that need not hold zero.

Only dense convolutions directly in front of a batch norm are centred: a depthwise kernel would lose its whole response,
and elsewhere nothing takes the shift away. A kernel that is nearly constant (deviation below 1 % of the layer's median)
is left alone: what little it does is done by its mean.
"""

from __future__ import annotations

import torch

from ttaq.nn import AdaptiveBatchNorm2d, QuantConv2d, QuantizedModel

__all__ = ["centre"]


def centre(model: QuantizedModel, how: str) -> list[str]:
    """Centre the weights of `model` in place, per "channel", per "tensor" or "compensated"; returns the names of the
    layers."""
    modules = dict(model.named_modules())
    centred = []
    for node in model.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        followers = [modules.get(str(user.target)) for user in node.users if user.op == "call_module"]
        before_norm = len(node.users) == len(followers) == 1 and isinstance(followers[0], AdaptiveBatchNorm2d)
        dense = isinstance(layer, QuantConv2d) and layer.groups < layer.in_channels
        if isinstance(layer, QuantConv2d) and dense and before_norm and node.target not in centred:
            with torch.no_grad():
                _centre(layer, how)
            centred.append(str(node.target))
    return centred


def _centre(layer: QuantConv2d, how: str) -> None:
    rows = layer.weight.flatten(1)
    means = rows.mean().expand(len(rows)) if how == "tensor" else rows.mean(1)
    deviations = rows.std(1)
    alive = deviations > 0.01 * deviations.median()
    means = torch.where(alive, means, 0)
    layer.weight.sub_(means.view(-1, 1, 1, 1))
    if how == "compensated":
        layer.weight_offset = means

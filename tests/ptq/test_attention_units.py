"""Transformer blocks as units: products of activations and twin grids in training, and calibration on few images."""

from __future__ import annotations

import pytest
import torch
from ptq_nets import images, net, pair
from torch import nn

from ttaq.nn import QuantMatmul, TwinQuantizer, activation_quantizers, convert
from ttaq.ptq import quantize
from ttaq.ptq.student import Student
from ttaq.ptq.units import find_units


def test_products_and_twin_grids_belong_to_their_block() -> None:
    model, _ = pair("vit", "W4A4")
    block = find_units(model)[1]
    grids = activation_quantizers(model)
    kinds = [grids[name].kind for name in block.quantizers if isinstance(grids[name], TwinQuantizer)]
    assert kinds == ["softmax", "gelu"]
    assert len(block.quantizers) == 8  # four inputs of layers, four operands
    called = [model.get_submodule(str(node.target)) for node in block.nodes if node.op == "call_module"]
    assert sum(isinstance(module, QuantMatmul) for module in called) == 2


def test_in_training_products_read_their_tensors_alone() -> None:
    """With drop the operands lie on no grid, so the integer product would round them once more."""
    model, _ = pair("vit", "W4A4")
    student = Student(model, find_units(model)[1], 0.5)
    scales: list[object] = []
    for module in student.module.modules():
        if isinstance(module, QuantMatmul):
            module.register_forward_pre_hook(lambda _, args: scales.append(args[2:]))
    student.output(torch.randn(2, 5, 8))
    assert scales == [(), ()]


def test_all_scales_learn_and_ratios_stay() -> None:
    model, _ = pair("vit", "W4A4")
    unit = find_units(model)[1]
    student = Student(model, unit, 1.0)
    x = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        grads = torch.autograd.grad(student.loss(x, torch.zeros(8, 5, 8)), student.scales)
    assert len(grads) == 8
    assert all(bool(grad.abs() > 0) for grad in grads)
    grids = activation_quantizers(model)
    twins = [grids[name] for name in unit.quantizers if isinstance(grids[name], TwinQuantizer)]
    before = [(float(twin.scale), int(twin.ratio)) for twin in twins]
    with torch.no_grad():
        for scale in student.scales:
            scale.mul_(1.5)
    student.finish()
    assert [float(twin.scale) for twin in twins] == pytest.approx([1.5 * scale for scale, _ in before])
    assert [int(twin.ratio) for twin in twins] == [ratio for _, ratio in before]


@pytest.mark.parametrize("method", ["qdrop", "adaround"])
def test_trained_models_can_be_saved_and_run(method: str) -> None:
    """AdaRound has units that end with a twin grid, whose integers fill no byte."""
    settings = {"iterations": 3, "batch_size": 4}
    model = quantize(net("vit"), images("vit"), "W4A4", method, preset="fast", settings=settings)
    fresh = convert(net("vit"), "W4A4").eval()
    fresh.load_state_dict(model.state_dict())
    x = images("vit", 5, seed=2)
    assert torch.equal(fresh(x), model(x))
    assert model(x).isfinite().all()


@pytest.mark.parametrize("search", ["mse", "minmax"])
def test_few_images_calibrate_every_grid(search: str) -> None:
    x = images("vit", 2)
    model = quantize(net("vit"), x, "W8A8", search=search)
    assert all(grid.scale is not None and float(grid.scale) > 0 for grid in activation_quantizers(model).values())
    y, expected = model(x), net("vit")(x)
    assert (y - expected).abs().max() < 0.1 * expected.abs().max()


def test_products_and_twins_can_stay_out() -> None:
    model = quantize(net("vit"), images("vit"), "W4A4,float_matmul,uniform_softmax,uniform_gelu")
    assert not any(isinstance(module, (QuantMatmul, TwinQuantizer)) for module in model.modules())
    assert len(activation_quantizers(model)) == 9
    assert isinstance(model.norm, nn.LayerNorm), "LayerNorm stays a live layer"

"""The trainer: better than nearest rounding, touches what it may, and goes on after an interruption."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from ptq_nets import images, net, pair
from torch import Tensor, nn

from ttaq.errors import CheckpointError, InputError
from ttaq.nn import AdaptiveBatchNorm2d, QuantizedModel, activation_quantizers, quantized_layers
from ttaq.nn.adapt_norms import norm_affine
from ttaq.ptq import METHODS, quantize, settings_of
from ttaq.ptq.student import unit_module
from ttaq.ptq.units import find_units

TRAINED = [name for name, settings in METHODS.items() if settings is not None]
SHORT = {"iterations": 3, "batch_size": 4}


def short(method: str = "qdrop", name: str = "resnet", scheme: str = "W2A4", **options: object) -> QuantizedModel:
    own = {"distillation": 10} if method == "ttaq" else {}
    settings = {**SHORT, **own, **options.pop("settings", {})}
    return quantize(net(name), images(name), scheme, method, preset="fast", settings=settings, **options)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(value, theirs) for (name, value), (other, theirs) in pairs)


def unit_errors(model: QuantizedModel, teacher: QuantizedModel, x: Tensor) -> list[float]:
    """Of each unit, on the input that the quantized prefix gives, against the float output."""
    errors = []
    x_q = x_fp = x
    with torch.no_grad():
        for unit, twin in zip(find_units(model), find_units(teacher), strict=True):
            x_q, x_fp = unit_module(model, unit)(x_q), unit_module(teacher, twin)(x_fp)
            errors.append((x_q - x_fp).square().mean().item())
    return errors


@pytest.mark.parametrize("name", ["resnet", "wide", "vit"])
def test_every_unit_ends_nearer_to_the_float_model_than_nearest_rounding(name: str) -> None:
    nearest, teacher = pair(name, "W2A8")
    trained = quantize(
        net(name), images(name), "W2A8", "brecq", preset="fast", settings={"iterations": 150, "batch_size": 8}
    )
    before, after = (unit_errors(model, teacher, images(name)) for model in (nearest, trained))
    assert all(new < old for new, old in list(zip(after, before, strict=True))[1:])


@pytest.mark.parametrize("method", TRAINED)
def test_changes_what_it_trains_and_nothing_else(method: str) -> None:
    settings = settings_of(method, "fast", SHORT)
    nearest, float_model = pair()[0], net()
    before = copy.deepcopy(float_model.state_dict())
    trained = quantize(float_model, images(), "W2A4", method, preset="fast", settings=SHORT)
    assert same(float_model, net())
    assert float_model.state_dict().keys() == before.keys()
    for name, layer in quantized_layers(trained).items():
        theirs = quantized_layers(nearest)[name]
        quantizer = layer.weight_quantizer
        assert torch.equal(quantizer(layer.weight), layer.weight), "not on its grid"
        assert torch.equal(quantizer.scale, theirs.weight_quantizer.scale)
        assert torch.equal(quantizer.zero_point, theirs.weight_quantizer.zero_point)
        assert (layer.bias is None) or torch.equal(layer.bias, theirs.bias)
    scales = [
        torch.equal(grid.scale, activation_quantizers(nearest)[name].scale)
        for name, grid in activation_quantizers(trained).items()
    ]
    if settings.norm_statistics == "source":
        assert all(scales) if settings.scale_lr == 0 else not any(scales)
    norms = {name: module for name, module in trained.named_modules() if isinstance(module, AdaptiveBatchNorm2d)}
    for name, norm in norms.items():
        theirs = nearest.get_submodule(name)
        assert torch.equal(norm.running_mean, theirs.running_mean) == (settings.norm_statistics == "source")
        assert torch.equal(norm.weight, theirs.weight) == (settings.affine_lr == 0)
        assert (norm.alpha, norm.prior_n) == (None, None)
    assert all(parameter.grad is None for parameter in trained.parameters())
    assert all(parameter.requires_grad for parameter in trained.parameters())


@pytest.mark.parametrize("method", TRAINED)
def test_the_seed_decides(method: str) -> None:
    assert same(short(method), short(method))
    assert not same(short(method, settings={"weight_lr": 3.0}), short(method, settings={"weight_lr": 3.0}, seed=1))


def test_random_versions_of_the_images_train_and_leave_the_running_statistics_to_the_images_themselves() -> None:
    batch = {"norm_statistics": "batch"}
    plain, none, all_of_them = (short(settings={**batch, **extra}) for extra in ({}, {"augment": 0}, {"augment": 1.0}))
    assert same(plain, none)
    scales = [[grid.scale for grid in activation_quantizers(model).values()] for model in (plain, all_of_them)]
    assert not any(torch.equal(one, other) for one, other in zip(*scales, strict=True))
    first = [
        next(module for module in model.modules() if isinstance(module, AdaptiveBatchNorm2d))
        for model in (plain, all_of_them, short(settings={**batch, "augment": 1.0}, seed=1))
    ]
    # Behind one layer whose weights are of 8 bits: the statistics of the same images.
    torch.testing.assert_close(first[1].running_mean, first[0].running_mean, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(first[2].running_mean, first[0].running_mean, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_distillation_brings_the_predictions_nearer_and_moves_the_norms_alone(name: str) -> None:
    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            p, q = (each(images(name)).log_softmax(1) for each in (net(name), model))
        return float((p.exp() * (p - q)).sum(1).mean())

    settings = {"distillation": 40, "distillation_lr": 3e-3, "distillation_batch": 8}
    plain, distilled = (short(name=name, settings=extra) for extra in ({}, settings))
    assert distance(distilled) < 0.9 * distance(plain)
    norms = set(norm_affine(plain, "test"))
    for (key, before), after in zip(plain.state_dict().items(), distilled.state_dict().values(), strict=True):
        assert torch.equal(before, after) == (key not in norms), key
    assert all(parameter.grad is None for parameter in distilled.parameters())
    assert [p.requires_grad for p in distilled.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert same(distilled, short(name=name, settings=settings))
    assert not same(distilled, short(name=name, settings=settings, seed=1))


@pytest.mark.parametrize("name", ["resnet", "wide", "mobilenet", "vit"])
def test_inputs_on_disk_give_the_same_bits(name: str) -> None:
    assert same(short(name=name), short(name=name, cache_mb=0))


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = short("ttaq")

    def stop(done: int, total: int, what: str) -> None:
        if what.startswith("layer2.0 loss"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        short("ttaq", checkpoint=tmp_path, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unit_000.safetensors", "unit_001.safetensors"]
    seen = []
    resumed = short("ttaq", checkpoint=tmp_path, progress=lambda *step: seen.append(step[2]))
    assert same(resumed, whole)
    assert not any(what.startswith(("conv1 loss", "layer1.0 loss")) for what in seen)


KILLED = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_reconstruct import short
short(settings={{"iterations": 400}}, checkpoint={folder!r})
"""


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    folder = tmp_path / "units"
    code = textwrap.dedent(KILLED.format(tests=str(Path(__file__).parent), folder=str(folder)))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "unit_001.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        settings = {"iterations": 400}
        assert same(short(settings=settings, checkpoint=folder), short(settings=settings))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"scheme": "W3A3"}, {"settings": {"iterations": 4}}, {"search": "minmax"}, {"method": "brecq"}],
    ids=lambda other: next(iter(other)),
)
def test_units_of_another_run_are_refused(other: dict[str, object], tmp_path: Path) -> None:
    short(checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="is of another run"):
        short(**{"checkpoint": tmp_path, **other})


def test_a_damaged_unit_is_refused(tmp_path: Path) -> None:
    short(checkpoint=tmp_path)
    path = tmp_path / "unit_002.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="unit_002"):
        short(checkpoint=tmp_path)


def test_a_model_that_adapts_runs_on_its_new_statistics() -> None:
    """The running statistics are those of the calibration images in the mode that they were trained in."""
    model = short("ttaq")
    found = {}
    norms = {name: module for name, module in model.named_modules() if isinstance(module, AdaptiveBatchNorm2d)}
    for name, norm in norms.items():
        norm.alpha = 1.0
        norm.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
    with torch.no_grad():
        model(images())
    for name, norm in norms.items():
        values = found[name].transpose(0, 1).flatten(1).double()
        torch.testing.assert_close(norm.running_mean.double(), values.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), values.var(1), rtol=1e-4, atol=1e-5)


def test_a_layer_of_two_units_keeps_its_nearest_rounding() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.a(self.b(self.a(x)).relu()).mean((2, 3)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Twice().eval()
    trained = quantize(model, images(), "W4A4", "qdrop", preset="fast", settings={**SHORT, "weight_lr": 3.0})
    assert torch.equal(trained.a.weight, model.a.weight)
    assert not torch.equal(trained.b.weight, model.b.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "method is 'magic'"),
        ({"preset": "slow"}, "preset is 'slow'"),
        ({"settings": {"speed": 1}}, "no setting is named 'speed'"),
        ({"settings": {"iterations": 0}}, "iterations is 0"),
        ({"settings": {"batch_size": 1}}, "batch_size is 1"),
        ({"settings": {"weight_lr": -1.0}}, "weight_lr is -1.0"),
        ({"settings": {"keep_quantized": 2}}, "keep_quantized is 2"),
        ({"settings": {"temperature": 0}}, "temperature is 0"),
        ({"settings": {"norm_statistics": "none"}}, "norm_statistics is 'none'"),
        ({"settings": {"norm_statistics": "batch", "correction": 0.02}}, "correction fits the inputs"),
        ({"settings": {"single_layers": True, "prediction": 1.0}}, "need the output of a whole block"),
        ({"settings": {"units": ["nowhere"]}}, "'nowhere' holds no quantized layer"),
        ({"method": "rtn", "settings": {"iterations": 5}}, "rtn has no settings"),
        ({"cache_mb": -1}, "cache_mb is -1"),
    ],
)
def test_what_cannot_be_used(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize(net(), images(), "W4A4", **{"method": "qdrop", "preset": "fast", **change})


def test_another_type_than_float32_is_refused() -> None:
    with pytest.raises(InputError, match=r"bfloat16, expected float32"):
        quantize(net().bfloat16(), images(), "W4A4", "qdrop", preset="fast", settings=SHORT)


def test_progress_reaches_the_end() -> None:
    seen = []
    short(settings={"iterations": 25}, progress=lambda *step: seen.append(step))
    units = [step for step in seen if "loss" in step[2]]
    assert [(done, total) for done, total, _ in units][-1] == (125, 125)
    assert [done for done, _, _ in units] == sorted(done for done, _, _ in units)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["qdrop", "ttaq"])
def test_replayed_steps_are_the_steps(method: str) -> None:
    """Inputs that lie on the GPU are trained on through a CUDA graph, inputs on disk step by step."""

    def trained(cache_mb: float) -> QuantizedModel:
        settings = {"iterations": 40, "batch_size": 8, "perturbation": 1.0, "distillation": 0}
        return quantize(net().cuda(), images(), "W2A4", method, preset="fast", settings=settings, cache_mb=cache_mb)

    captured, eager = (quantized_layers(trained(cache_mb)) for cache_mb in (100, 0))
    for name, layer in captured.items():
        same_codes = (layer.weight - eager[name].weight).abs() < 1e-6
        assert same_codes.float().mean() > 0.98, name

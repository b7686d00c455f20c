"""`quantize`: from any traceable model and any images, to a calibrated copy or to an error that helps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.nn import activation_quantizers, quantized_layers
from ttaq.ptq import METHODS, quantize
from ttaq.ptq.calibration import gather_images
from ttaq.ptq.observe import observe


class Net(nn.Module):
    """A user's own model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.conv3 = nn.Conv2d(8, 16, 3, stride=2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = x + nn.functional.silu(self.conv2(x))
        return self.fc(self.conv3(x).relu().mean((2, 3)))


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def images(count: int = 40, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize(("scheme", "tolerance"), [("W8A8", 0.01), ("W4A4", 0.1), ("W4A4,first_last=none", 0.3)])
def test_stays_near_the_float_model(scheme: str, tolerance: float, search: str) -> None:
    model, x = net(), images(20, seed=1)
    quantized = quantize(model, images(), scheme, search=search)
    with torch.no_grad():
        error = (quantized(x) - model(x)).abs().max() / model(x).abs().max()
    assert 0 < error < tolerance
    assert not quantized.training
    assert str(quantized.scheme) == scheme
    for quantizer in (
        *activation_quantizers(quantized).values(),
        *(q.weight_quantizer for q in quantized_layers(quantized).values()),
    ):
        assert (quantizer.scale > 0).all()
        assert (quantizer.zero_point >= quantizer.qmin).all()
        assert (quantizer.zero_point <= quantizer.qmax).all()


def test_one_sided_tensors_have_zero_at_the_end_and_others_do_not() -> None:
    quantizers = activation_quantizers(quantize(net(), images(), "W4A4"))
    zero_points = {name: q.zero_point.item() for name, q in quantizers.items()}
    assert [q for q in zero_points.values() if q == 0] == [0, 0]
    assert zero_points["after_add"] > 0


def test_the_model_the_images_and_the_random_state_are_left_alone() -> None:
    model, x = net().train(), images()
    before, images_before, state = copy.deepcopy(model.state_dict()), x.clone(), torch.get_rng_state()
    quantize(model, x, "W4A4")
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert torch.equal(x, images_before)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_draws_the_images_and_nothing_else_does() -> None:
    def scales(seed: int, batch_size: int = 64) -> Tensor:
        quantized = quantize(net(), many, "W4A4", seed=seed, batch_size=batch_size)
        return torch.cat([quantizer.scale for quantizer in activation_quantizers(quantized).values()])

    many = images(400) * torch.linspace(0.2, 1, 400)[:, None, None, None]
    assert torch.equal(scales(3), scales(3))
    assert not torch.equal(scales(3), scales(4))
    torch.testing.assert_close(scales(3, 7), scales(3, 300), rtol=0.1, atol=0)


def loader(count: int = 40) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(count), torch.zeros(count)), batch_size=16)


SOURCES = {
    "tensor": lambda: images(),
    "loader with labels": loader,
    "list of tensors": lambda: list(images().split(9)),
    "generator of pairs": lambda: ((batch, None) for batch in images().split(9)),
    "float64": lambda: images().double(),
}


@pytest.mark.parametrize("source", SOURCES)
def test_sources_of_images(source: str) -> None:
    quantized, reference = quantize(net(), SOURCES[source](), "W4A4"), quantize(net(), images(), "W4A4")
    assert all(torch.equal(value, reference.state_dict()[key]) for key, value in quantized.state_dict().items())


def test_a_long_loader_is_read_as_far_as_needed() -> None:
    taken = []

    def batches() -> object:
        for index in range(10_000):
            taken.append(index)
            yield images(100)

    assert gather_images(batches(), "test").shape == (1024, 3, 10, 10)
    assert len(taken) == 11


def test_progress_counts_to_the_end() -> None:
    steps = []
    quantize(net(), images(), "W4A4", batch_size=16, progress=lambda *step: steps.append(step))
    assert [done for done, _, _ in steps] == list(range(1, len(steps) + 1))
    assert {total for _, total, _ in steps} == {len(steps)}
    assert steps[0][2] == "observing activations"
    assert steps[-1][2] == "fc"


def test_other_types_and_devices_of_the_model() -> None:
    quantized = quantize(net().bfloat16(), images(), "W8A8")
    assert quantized(images(2).bfloat16()).dtype == torch.bfloat16


def test_works_in_inference_mode_and_can_learn_afterwards() -> None:
    with torch.inference_mode():
        quantized = quantize(net(), images(), "W4A4")
    quantized(images(2)).sum().backward()
    assert quantized.bn1.weight.grad is not None


def test_dead_channels_and_tensors() -> None:
    model = net()
    with torch.no_grad():
        model.conv1.weight[2] = 0
        model.conv1.bias[2] = 0
        model.conv2.weight.zero_()
        model.conv3.weight.zero_()
        model.conv3.bias.fill_(-1)
    for search in ("mse", "minmax"):
        quantized = quantize(model, images(), "W2A2", search=search)
        assert torch.isfinite(quantized(images(4))).all()
        assert all((layer.weight_quantizer.scale >= 1e-8).all() for layer in quantized_layers(quantized).values())


def test_observed_values_hold_the_extremes_and_look_like_the_tensor() -> None:
    quantized = quantize(net(), images(), "W8A8")
    for quantizer in activation_quantizers(quantized).values():
        quantizer.set_grid(None, None)
    for layer in quantized_layers(quantized).values():
        layer.weight_quantizer.set_grid(None, None)
    x = images(300)
    seen: list[Tensor] = []
    first = next(iter(activation_quantizers(quantized)))
    handle = activation_quantizers(quantized)[first].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    values = observe(quantized, x, seed=0)[first]
    handle.remove()
    everything = torch.cat(seen)
    assert len(everything) == 256
    assert 65_000 < len(values) <= 65_536
    assert values.amin() == everything.amin()
    assert values.amax() == everything.amax()
    assert values.mean() == pytest.approx(everything.mean().item(), rel=0.02)
    assert values.std() == pytest.approx(everything.std().item(), rel=0.02)


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def broken_weight() -> Net:
    model = net()
    model.fc.weight.data[0, 0] = torch.nan
    return model


def broken_statistics() -> Net:
    model = net()
    model.bn1.running_var.fill_(torch.inf).neg_()
    return model


NAN = images(3)
NAN[1, 0, 0, 0] = torch.nan
ERRORS = {
    "method": ({"method": "magic"}, "method is 'magic', expected 'rtn' or 'adaround'"),
    "search": ({"search": "mean"}, "search is 'mean', expected 'mse' or 'minmax'"),
    "batch size": ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
    "scheme": ({"scheme": "W4A"}, "got 'W4A', expected W<weight bits>A<activation bits>"),
    "layer name": (
        {"scheme": "W4A4,layer1.*=W8A8"},
        "override 'layer1.*' matches no layer, expected a pattern for some of conv1",
    ),
    "untraceable": ({"model": Branching()}, "torch.fx cannot trace Branching"),
    "no layer": ({"model": nn.Sequential(nn.BatchNorm2d(3))}, "calls no Conv2d or Linear"),
    "not a model": ({"model": "resnet20"}, "got a str and a Scheme"),
    "no images": ({"calibration": images(0)}, "calibration has 0 images, expected at least 2"),
    "no batches": ({"calibration": []}, "calibration has 0 images"),
    "one image": ({"calibration": images(1)}, "calibration has 1 image, expected at least 2"),
    "one image in a loader": ({"calibration": [(images(1), 0)]}, "calibration has 1 image,"),
    "nan": ({"calibration": NAN}, "calibration has NaN or Inf values"),
    "nan in a batch": ({"calibration": [images(2), NAN]}, "calibration batch 1 has NaN or Inf values"),
    "uint8": ({"calibration": (images(3) * 255).byte()}, "calibration has dtype torch.uint8, expected float images"),
    "three dimensions": (
        {"calibration": images(3)[0]},
        "calibration has shape (3, 10, 10), expected float images [N, C, H, W]",
    ),
    "data set": ({"calibration": loader().dataset}, "put a data set into a torch.utils.data.DataLoader"),
    "batch of dicts": ({"calibration": [{"image": images(2)}]}, "calibration batch 0 is a dict"),
    "empty tuple": ({"calibration": [()]}, "calibration batch 0 is a tuple"),
    "sizes differ": ({"calibration": [images(2), images(2)[..., :8]]}, "calibration batch 1 has shape (2, 3, 10, 8)"),
    "path": ({"calibration": "images/"}, "calibration is a str"),
    "number": ({"calibration": 64}, "calibration is a int"),
    "wrong channels": (
        {"calibration": images(3)[:, :1]},
        "the model fails on calibration images of shape (3, 1, 10, 10)",
    ),
    "weights with nan": ({"model": broken_weight()}, "the weight of fc has NaN or Inf values"),
    "activations with nan": ({"model": broken_statistics()}, "the values at after_relu have NaN or Inf"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    change, message = ERRORS[case]
    arguments = {"model": net(), "calibration": images(4), "scheme": "W4A4", **change}
    with pytest.raises(InputError) as caught:
        quantize(**arguments)
    assert message in str(caught.value)


def test_methods_are_named() -> None:
    assert list(METHODS) == ["rtn", "adaround", "brecq", "qdrop", "pdquant", "ttaq"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_follow_the_model_to_its_device() -> None:
    quantized = quantize(net().cuda(), images(), "W8A8")
    assert all(tensor.is_cuda for tensor in quantized.state_dict().values())
    assert quantized(images(2).cuda()).is_cuda

"""AdaptiveBatchNorm2d: torch's layer until told otherwise, then a mix of source and batch statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.nn import AdaptiveBatchNorm2d
from ttaq_kernels import KernelError


def source(**options: object) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(0)
    layer = nn.BatchNorm2d(3, **options)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2, generator=generator)
    return layer


def images(count: int = 5) -> Tensor:
    return 2 * torch.randn(count, 3, 4, 5, generator=torch.Generator().manual_seed(1)) + 1


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}])
@pytest.mark.parametrize("training", [False, True])
def test_without_alpha_it_is_torchs_layer(options: dict, training: bool) -> None:
    reference = source(**options).train(training)
    layer = AdaptiveBatchNorm2d.from_float(copy.deepcopy(reference))
    assert layer.training == training
    for _ in range(2):
        assert torch.equal(layer(images()), reference(images()))
    for key, value in reference.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value)
    assert list(layer.state_dict()) == list(reference.state_dict())


def test_from_float_shares_parameters_and_buffers() -> None:
    reference = source()
    layer = AdaptiveBatchNorm2d.from_float(reference)
    assert layer.weight is reference.weight
    assert layer.running_var is reference.running_var


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_mixes_and_leaves_the_buffers(alpha: float, training: bool) -> None:
    layer = AdaptiveBatchNorm2d.from_float(source()).train(training)
    before = copy.deepcopy(layer.state_dict())
    layer.alpha = alpha
    x = images()
    mean = (1 - alpha) * layer.running_mean + alpha * x.mean((0, 2, 3))
    var = (1 - alpha) * layer.running_var + alpha * x.var((0, 2, 3), correction=0)
    expected = (x - mean[:, None, None]) / (var[:, None, None] + layer.eps).sqrt()
    expected = expected * layer.weight[:, None, None] + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize(("count", "prior_n", "alpha"), [(1, 3, 0.25), (4, 4, 0.5), (6, 0, 1.0), (0, 4, 0.0)])
def test_prior_is_an_alpha_that_depends_on_the_batch(count: int, prior_n: int, alpha: float) -> None:
    layer = AdaptiveBatchNorm2d.from_float(source())
    layer.prior_n = prior_n
    got = layer(images(count))
    layer.prior_n, layer.alpha = None, alpha
    assert torch.equal(got, layer(images(count)))


def test_one_value_per_channel_becomes_the_bias() -> None:
    layer = AdaptiveBatchNorm2d.from_float(source())
    layer.alpha = 1.0
    assert torch.equal(layer(images(1)[:, :, :1, :1])[0, :, 0, 0], layer.bias)


@pytest.mark.parametrize(
    ("alpha", "prior_n", "message"),
    [
        (-0.1, None, "alpha is -0.1"),
        (1.5, None, "alpha is 1.5"),
        (0.5, 4, "are both|set one"),
        (None, -1, "prior_n is -1"),
    ],
)
def test_bad_settings(alpha: float | None, prior_n: int | None, message: str) -> None:
    layer = AdaptiveBatchNorm2d(3)
    layer.alpha, layer.prior_n = alpha, prior_n
    with pytest.raises(InputError, match=message):
        layer(images())


def test_no_source_to_mix_with() -> None:
    layer = AdaptiveBatchNorm2d.from_float(source(track_running_stats=False))
    layer.alpha = 0.5
    with pytest.raises(KernelError):
        layer(images())
    layer.alpha = 1.0
    assert layer(images()).shape == images().shape


@pytest.mark.parametrize("setting", [{"alpha": 1.0}, {"alpha": 0.3}, {"prior_n": 5}])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_statistics_of_selected_images(dtype: torch.dtype, setting: dict) -> None:
    """The selected images come out as from a batch of their own; the others are normalised with them."""
    layer = AdaptiveBatchNorm2d.from_float(source())
    layer.alpha, layer.prior_n = setting.get("alpha"), setting.get("prior_n")
    x, mask = images(), torch.tensor([True, False, True, True, False])
    share = layer.batch_share(len(x))
    layer.sample_mask = mask.to(dtype)
    got = layer(x)
    assert got.shape == x.shape
    layer.alpha, layer.prior_n, layer.sample_mask = share, None, None
    torch.testing.assert_close(got[mask], layer(x[mask]))
    mean = x[mask].mean((0, 2, 3))
    var = x[mask].var((0, 2, 3), correction=0)
    mixed = [(1 - share) * old + share * new for old, new in ((layer.running_mean, mean), (layer.running_var, var))]
    expected = nn.functional.batch_norm(x, *mixed, layer.weight, layer.bias, eps=layer.eps)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_without_a_selected_image_the_source_is_used() -> None:
    layer = AdaptiveBatchNorm2d.from_float(source())
    layer.alpha, layer.sample_mask = 1.0, torch.zeros(5, dtype=torch.bool)
    got = layer(images())
    layer.alpha, layer.sample_mask = 0.0, None
    assert torch.equal(got, layer(images()))


def test_mask_is_no_part_of_the_state() -> None:
    layer = AdaptiveBatchNorm2d.from_float(source())
    keys = list(layer.state_dict())
    layer.alpha, layer.sample_mask = 1.0, torch.ones(5, dtype=torch.bool)
    assert list(layer.state_dict()) == keys


def test_bad_masks() -> None:
    layer = AdaptiveBatchNorm2d.from_float(source())
    layer.sample_mask = torch.ones(5, dtype=torch.bool)
    with pytest.raises(InputError, match="sample_mask needs statistics of the batch; set alpha or prior_n"):
        layer(images())
    layer.alpha = 1.0
    with pytest.raises(KernelError, match=r"sample_mask has shape \(5,\), expected \(4,\)"):
        layer(images(4))


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True, True, False])])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_keeps_the_statistics_that_it_used(alpha: float, mask: Tensor | None) -> None:
    layer = AdaptiveBatchNorm2d.from_float(source())
    layer.alpha, layer.sample_mask = alpha, mask
    x = images()
    expected = layer(x)
    assert layer.statistics is None
    before = copy.deepcopy(layer.state_dict())
    layer.keep_statistics = True
    assert torch.equal(layer(x), expected)
    mean, var = layer.statistics
    used = x if mask is None else x[mask]
    torch.testing.assert_close(mean, (1 - alpha) * layer.running_mean + alpha * used.mean((0, 2, 3)))
    torch.testing.assert_close(var, (1 - alpha) * layer.running_var + alpha * used.var((0, 2, 3), correction=0))
    assert not mean.requires_grad
    assert not var.requires_grad
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())


def test_statistics_to_keep_need_a_share_of_the_batch_and_running_statistics() -> None:
    layer = AdaptiveBatchNorm2d.from_float(source())
    layer.keep_statistics = True
    with pytest.raises(InputError, match="keep_statistics needs statistics of the batch; set alpha or prior_n"):
        layer(images())
    layer = AdaptiveBatchNorm2d.from_float(source(track_running_stats=False))
    layer.keep_statistics, layer.alpha = True, 1.0
    with pytest.raises(InputError, match="keep_statistics needs running statistics"):
        layer(images())


def renormalising(moving_mean: list[float], moving_std: list[float], **options: object) -> AdaptiveBatchNorm2d:
    layer = AdaptiveBatchNorm2d.from_float(source(**options))
    layer.start_renormalising()
    layer.moving_mean.copy_(torch.tensor(moving_mean))
    layer.moving_std.copy_(torch.tensor(moving_std))
    return layer


@pytest.mark.parametrize("affine", [True, False])
def test_renormalises_values_with_the_moving_and_gradients_with_the_batch_statistics(affine: bool) -> None:
    layer = renormalising([0.5, -1, 2], [0.7, 1.5, 3], affine=affine)
    x, towards = images(), torch.randn(5, 3, 4, 5, generator=torch.Generator().manual_seed(2))
    got_x = x.clone().requires_grad_()
    got = layer(got_x)
    (got * towards).sum().backward()

    def column(vector: Tensor) -> Tensor:
        return vector.double()[:, None, None]

    want_x = x.double().requires_grad_()
    weight, bias = (
        (t.detach().double().requires_grad_() for t in (layer.weight, layer.bias)) if affine else (None, None)
    )
    mean = want_x.mean((0, 2, 3), keepdim=True)
    std = (want_x.var((0, 2, 3), correction=0, keepdim=True) + layer.eps).sqrt()
    moving_mean, moving_std = column(layer.moving_mean), column(layer.moving_std)
    want = (want_x - mean) / std * (std / moving_std).detach() + ((mean - moving_mean) / moving_std).detach()
    if affine:
        want = want * weight[:, None, None] + bias[:, None, None]
    (want * towards).sum().backward()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_x.grad.double(), want_x.grad, rtol=1e-4, atol=1e-5)
    if affine:
        torch.testing.assert_close(layer.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.bias.grad.double(), bias.grad, rtol=1e-4, atol=1e-4)
    kept_mean, kept_std = layer.statistics
    torch.testing.assert_close(kept_mean.double(), mean.detach().flatten(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept_std.double(), std.detach().flatten(), rtol=1e-5, atol=1e-5)


def test_renormalising_begins_as_batch_statistics_channel_by_channel() -> None:
    layer = renormalising([7, 7, 0], [0, 0, 2])
    x = images()
    got = layer(x)
    reference = AdaptiveBatchNorm2d.from_float(source())
    reference.alpha = 1.0
    torch.testing.assert_close(got[:, :2], reference(x)[:, :2])
    torch.testing.assert_close(got[:, 2], x[:, 2] / 2 * layer.weight[2] + layer.bias[2])


def test_moving_statistics_move_with_the_layer_and_are_no_part_of_the_state() -> None:
    layer = renormalising([1, 2, 3], [1, 2, 3])
    assert list(layer.state_dict()) == list(source().state_dict())
    assert copy.deepcopy(layer).double().moving_std.tolist() == [1, 2, 3]
    assert layer.double().moving_mean.dtype == torch.float64


def test_renormalising_takes_all_images() -> None:
    layer = renormalising([1, 2, 3], [1, 2, 3])
    layer.sample_mask = torch.ones(5, dtype=torch.bool)
    with pytest.raises(InputError, match="renormalise takes all images"):
        layer(images())

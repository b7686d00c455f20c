"""Model files: what comes back is what was saved, and the wrong file is refused with its reason."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ttaq.errors import CheckpointError, InputError
from ttaq.io import load_model, load_weights, model_hash, save_model
from ttaq.models import CifarResNet, build
from ttaq.nn import QuantizedModel, activation_quantizers, convert, quantized_layers
from ttaq.scheme import Scheme

SMALL = {"num_classes": 5, "width": 4}
X = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small(**kwargs: object) -> nn.Module:
    """A net with running statistics that are not those of a fresh one."""
    model = build("cifar_resnet8", **(SMALL | kwargs))
    with torch.no_grad():
        model(X)
    return model.eval()


def quantized(model: nn.Module, scheme: str) -> QuantizedModel:
    """Every grid set by hand."""
    result = convert(model, Scheme.parse(scheme)).eval()
    for layer in quantized_layers(result).values():
        layer.weight_quantizer.calibrate(layer.weight)
    for index, quantizer in enumerate(activation_quantizers(result).values()):
        quantizer.set_grid(torch.tensor([0.04 + 0.01 * index]), torch.tensor([index % 3], dtype=torch.int32))
    return result


def own() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), head=nn.Conv2d(4, 2, 1))).eval()


def test_float_model(tmp_path: Path) -> None:
    model = small()
    save_model(tmp_path / "model", model, architecture="cifar_resnet8", kwargs=SMALL)
    loaded, header = load_model(tmp_path / "model")
    assert torch.equal(loaded(X), model(X))
    assert not loaded.training
    assert header["hash"] == model_hash(model) == model_hash(loaded)
    assert (header["architecture"], header["kwargs"]) == ("cifar_resnet8", SMALL)
    assert (header["scheme"], header["method"], header["extra"]) == (None, None, {})


def test_options_that_no_tensor_tells(tmp_path: Path) -> None:
    kwargs = SMALL | {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}
    model = small(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    save_model(tmp_path / "model", model, architecture="cifar_resnet8", kwargs=kwargs)
    assert torch.equal(load_model(tmp_path / "model").model(X), model(X))
    with pytest.raises(InputError, match=r"normalize.mean of the model is \[0.1.*put the model's value into kwargs"):
        save_model(tmp_path / "other", model, architecture="cifar_resnet8", kwargs=SMALL)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A4,first_last=none", "W3A8,layer2.*=W8A8,linear=float"])
def test_quantized_model(tmp_path: Path, scheme: str) -> None:
    model = quantized(small(), scheme)
    save_model(tmp_path / "model", model, architecture="cifar_resnet8", kwargs=SMALL, method="rtn")
    loaded, header = load_model(tmp_path / "model")
    assert torch.equal(loaded(X), model(X))
    assert not torch.equal(loaded(X), small()(X))
    assert header["hash"] == model_hash(model) == model_hash(loaded)
    assert Scheme.from_dict(header["scheme"]) == Scheme.parse(scheme) == loaded.scheme
    assert header["method"] == "rtn"


def test_converted_but_not_calibrated_model(tmp_path: Path) -> None:
    model = convert(small(), Scheme.parse("W4A4")).eval()
    save_model(tmp_path / "model", model, architecture="cifar_resnet8", kwargs=SMALL)
    loaded = load_model(tmp_path / "model").model
    assert torch.equal(loaded(X), model(X))
    assert loaded.scheme == model.scheme


@pytest.mark.parametrize("scheme", [None, "W4A8"])
def test_own_architecture(tmp_path: Path, scheme: str | None) -> None:
    model = own() if scheme is None else quantized(own(), scheme)
    save_model(tmp_path / "model", model, architecture=None, kwargs={})
    mine = own().train()
    before = model_hash(mine)
    loaded = load_model(tmp_path / "model", model=mine).model
    assert torch.equal(loaded(X), model(X))
    assert not loaded.training
    assert mine.training
    assert model_hash(mine) == before


def test_types_and_ties_survive(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)
    model[2].float()
    model[1].weight = model[0].weight
    save_model(tmp_path / "model", model, architecture=None, kwargs={})
    mine = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    mine[1].weight = mine[0].weight
    loaded, header = load_model(tmp_path / "model", model=mine)
    assert model_hash(loaded) == header["hash"]
    assert loaded[1].weight is loaded[0].weight
    assert (loaded[0].weight.dtype, loaded[2].weight.dtype) == (torch.bfloat16, torch.float32)
    assert mine[0].weight.dtype is torch.float32


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    model = small()
    save_file(model.state_dict(), tmp_path / "weights")
    before = torch.get_rng_state()
    save_model(tmp_path / "model", model, architecture="cifar_resnet8", kwargs=SMALL)
    load_model(tmp_path / "model")
    load_weights("cifar_resnet8", tmp_path / "weights")
    assert torch.equal(torch.get_rng_state(), before)


def test_hash_tells_models_apart() -> None:
    model, other = small(), small()
    other.load_state_dict(model.state_dict())
    assert model_hash(other) == model_hash(model) == model_hash(model.to(memory_format=torch.channels_last))
    with torch.no_grad():
        other.linear.bias[0] += 1e-3
    assert model_hash(other) != model_hash(model)
    assert model_hash(nn.Linear(2, 3)) != model_hash(nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: load_model(p, model=small(num_classes=7)), r"weight has shape \(5, .*expected \(7.*5 outputs"),
        (lambda p: load_model(p, model=small(width=8)), r"conv1.weight has shape \(4, 3.*expected \(8, 3"),
        (lambda p: load_model(p, model=CifarResNet(14, **SMALL)), "another architecture; .* lacks: layer1.1.conv1"),
        (lambda p: load_model(p, model=own()), "it lacks: conv.weight, .* not have: bn1.bias, .* and 39 more"),
        (lambda p: load_model(p, model=nn.Identity()), "it lacks: none; tensors the model does not have: bn1.bias"),
    ],
)  # fmt: skip
def test_a_file_for_another_model(tmp_path: Path, call, message: str) -> None:
    save_model(tmp_path / "model", small(), architecture="cifar_resnet8", kwargs=SMALL)
    with pytest.raises(CheckpointError, match=message) as caught:
        call(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architecture": "resnet_of_tomorrow"},
            "needs an architecture that this ttaq cannot build.*resnet_of_tomorrow",
        ),
        ({"architecture": 3}, "needs an architecture that this ttaq cannot build"),
        ({"kwargs": {"groups": 2}}, "cannot build.*no option groups"),
        ({"kwargs": [1]}, "cannot build"),
        ({"kwargs": {}}, r"conv1.weight has shape \(4, 3, 3, 3\), expected \(16, 3, 3, 3\)"),
        ({"kwargs": {"width": 4}}, r"linear.weight has shape \(5, 16\), expected \(10, 16\); the file has 5 outputs"),
        ({"architecture": None}, r"names no architecture; hand over the float model .* load_model\(path, model=...\)"),
        ({"scheme": {"weight_bits": 99}}, "has a scheme that this ttaq cannot apply"),
        ({"scheme": {"colour": "red"}}, "has a scheme that this ttaq cannot apply"),
        ({"scheme": "W4A4"}, "has a scheme that this ttaq cannot apply"),
    ],
)
def test_a_header_that_cannot_be_followed(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    """As another version, or somebody's script, may write it: the hashes fit."""
    from ttaq.io.container import write

    save_model(tmp_path / "model", small(), architecture="cifar_resnet8", kwargs=SMALL)
    rest = {"architecture": "cifar_resnet8", "kwargs": SMALL, "scheme": None, "method": None, "extra": {}}
    write("test", tmp_path / "model", "model", rest | fields, small().state_dict())
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"architecture": "cifar_resnet20", "kwargs": SMALL},
            "the model is not what build.*differs in layer1.1.bn1.bias",
        ),
        ({"architecture": "cifar_resnet8", "kwargs": {"width": 4}}, "differs in linear.bias, linear.weight"),
        ({"architecture": "resnet", "kwargs": {}}, "no architecture is named 'resnet'"),
        ({"architecture": "cifar_resnet8", "kwargs": {"depth": 8}}, "has no option depth"),
        ({"architecture": "cifar_resnet8", "kwargs": {"mean": torch.ones(3)}}, "are not JSON values"),
        ({"architecture": None, "kwargs": {"a": {1, 2}}}, "cannot hold this.*JSON"),
        ({"architecture": None, "kwargs": {}, "extra": {"a": float("nan")}}, "cannot hold this.*JSON"),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises((InputError, CheckpointError), match=message):
        save_model(tmp_path / "model", small(), **arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_plain_weights_tell_their_options(tmp_path: Path) -> None:
    model = small()
    state = {name: tensor for name, tensor in model.state_dict().items() if "num_batches" not in name}
    save_file(state, tmp_path / "weights")
    loaded = load_weights("cifar_resnet8", tmp_path / "weights")
    assert torch.equal(loaded(X), model(X))
    assert not loaded.training
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half")
    assert load_weights("cifar_resnet8", tmp_path / "half").linear.weight.dtype is torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: load_weights("cifar_resnet8", p, num_classes=7), CheckpointError, r"as cifar_resnet8: .*\(7, 16\)"),
        (lambda p: load_weights("cifar_resnet14", p), InputError, "no architecture is named 'cifar_resnet14'"),
        (lambda p: load_weights("cifar_resnet20", p), CheckpointError, "as cifar_resnet20: .*another architecture"),
        (lambda p: load_weights("cifar_resnet8", p, groups=2), InputError, "has no option groups"),
        (lambda p: load_weights("cifar_resnet8", p / "x"), CheckpointError, "weights/x"),
        (lambda p: load_weights("cifar_resnet8", p.parent / "x"), CheckpointError, "there is no file"),
        (lambda p: load_weights("cifar_resnet8", p.parent), CheckpointError, "is a folder"),
    ],
)  # fmt: skip
def test_plain_weights_that_do_not_fit(tmp_path: Path, call, error: type[Exception], message: str) -> None:
    save_file(small().state_dict(), tmp_path / "weights")
    with pytest.raises(error, match=message):
        call(tmp_path / "weights")


@pytest.mark.skipif("TTAQ_DATA" not in os.environ, reason="TTAQ_DATA is not set: it names the folder with real weights")
def test_real_weights_of_another_net() -> None:
    with pytest.raises(CheckpointError, match="another architecture"):
        load_weights("cifar_resnet20", Path(os.environ["TTAQ_DATA"]) / "models" / "imagenet_deit_tiny.safetensors")

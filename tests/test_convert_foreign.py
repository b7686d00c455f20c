"""Files of other projects: every nesting in use comes in, code in them does not."""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ttaq.convert_foreign import convert_foreign
from ttaq.errors import CheckpointError, InputError
from ttaq.io import load_model
from ttaq.models import build, classifier_name

KWARGS = {"num_classes": 5, "width": 4}
X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    model = build("cifar_resnet8", **KWARGS)
    with torch.no_grad():
        model(X)
    return model.eval()


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def with_head(name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("linear.", f"{name}."): tensor for key, tensor in state.items()}


OTHER = {"epoch": 200, "best_prec1": 91.7, "optimizer": {"state": {0: {"step": 3}}}, "args": argparse.Namespace(lr=0.1)}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda s: s, ""),
        (lambda s: {"state_dict": s, **OTHER}, "state_dict"),
        (lambda s: {"model": s, **OTHER}, "model"),
        (lambda s: {"net": prefixed("module.", s), "acc": 91.7, "epoch": 3}, "net"),
        (lambda s: {"ema": s}, "ema"),
        (lambda s: {"model": {"state_dict": prefixed("module.model.", s), "epoch": 1}}, "model.state_dict"),
        (lambda s: {"state_dict": s, "state_dict_ema": {k: v * 0 for k, v in s.items()}}, "state_dict"),
        (lambda s: {"model_ema": s, "model": None}, "model_ema"),
        (lambda s: prefixed("_orig_mod.", s), ""),
        (lambda s: {"n_averaged": torch.tensor(3), **prefixed("module.", s)}, ""),
        (lambda s: with_head("fc", s), ""),
        (lambda s: {"state_dict": prefixed("module.", with_head("classifier", s))}, "state_dict"),
        (lambda s: {k: v for k, v in s.items() if "num_batches_tracked" not in k}, ""),
        (lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()}, ""),
    ],
)
def test_nestings_prefixes_and_names(tmp_path: Path, wrap, place: str, zipped: bool) -> None:
    model, source = net(), tmp_path / "old.pth.tar"
    torch.save(wrap(dict(model.state_dict())), source, _use_new_zipfile_serialization=zipped)
    header = convert_foreign(source, tmp_path / "new", "cifar_resnet8")
    loaded = load_model(tmp_path / "new")
    assert torch.equal(loaded.model(X), model(X))
    assert loaded.header == header
    assert (header["architecture"], header["kwargs"], header["scheme"]) == ("cifar_resnet8", KWARGS, None)
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    assert header["extra"] == {"source": {"file": "old.pth.tar", "sha256": sha256, "entry": place}}


@pytest.mark.parametrize(
    ("name", "options", "called"),
    [
        ("resnet18", {"width": 4, "num_classes": 3}, "fc"),
        ("resnet18", {"width": 4, "num_classes": 3}, "classifier"),
        ("cifar_resnet8", {"width": 4, "num_classes": 3}, "fc"),
        ("mobilenet_v1", {"width": 8, "num_classes": 3}, "head"),
    ],
)
def test_every_architecture_keeps_the_name_of_its_last_layer(
    tmp_path: Path, name: str, options: dict[str, int], called: str
) -> None:
    model = build(name, **options)
    own = classifier_name(name)
    state = {key.replace(f"{own}.", f"{called}."): value for key, value in model.state_dict().items()}
    # As RobustBench keeps the normalisation beside the weights.
    torch.save(state | {"mu": torch.zeros(3, 1, 1), "sigma": torch.ones(3, 1, 1)}, tmp_path / "theirs.pth")
    header = convert_foreign(tmp_path / "theirs.pth", tmp_path / "ours", name)
    assert header["kwargs"] == options
    loaded = load_model(tmp_path / "ours").model
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


def test_plain_safetensors(tmp_path: Path) -> None:
    model = net()
    save_file(prefixed("module.", model.state_dict()), tmp_path / "old.safetensors")
    convert_foreign(tmp_path / "old.safetensors", tmp_path / "new", "cifar_resnet8")
    assert torch.equal(load_model(tmp_path / "new").model(X), model(X))


def test_entry_and_options_can_be_named(tmp_path: Path) -> None:
    one, two = net(), net()
    torch.save({"state_dict": one.state_dict(), "teacher": {"state_dict": two.state_dict()}}, tmp_path / "old")
    header = convert_foreign(tmp_path / "old", tmp_path / "new", "cifar_resnet8", entry="teacher", mean=[0.5, 0.5, 0.5])
    assert header["extra"]["source"]["entry"] == "teacher.state_dict"
    assert header["kwargs"] == KWARGS | {"mean": [0.5, 0.5, 0.5]}
    loaded = load_model(tmp_path / "new").model
    assert torch.equal(loaded.linear.weight, two.linear.weight)
    assert loaded.normalize.mean.flatten().tolist() == [0.5, 0.5, 0.5]


class Hostile:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_is_refused_and_not_executed(tmp_path: Path, zipped: bool) -> None:
    trap, source = tmp_path / "executed", tmp_path / "old.pth"
    torch.save({"state_dict": net().state_dict(), "x": Hostile(trap)}, source, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"asks to run \w+\.mkdir, which was refused.*torch.save") as caught:
        convert_foreign(source, tmp_path / "new", "cifar_resnet8")
    assert "\n" not in str(caught.value)
    assert not trap.exists()
    torch.load(source, weights_only=False)
    assert trap.exists(), "the file would not have done anything: the test proves nothing"
    assert not (tmp_path / "new").exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match=r"asks to run ttaq.models.cifar_resnet.CifarResNet, which was refused"):
        convert_foreign(tmp_path / "old.pth", tmp_path / "new", "cifar_resnet8")


def spoiled(change):
    def make(path: Path) -> None:
        state = dict(net().state_dict())
        change(state)
        torch.save(state, path)

    return make


def cut(count: int, zipped: bool):
    def make(path: Path) -> None:
        torch.save(net().state_dict(), path, _use_new_zipfile_serialization=zipped)
        path.write_bytes(path.read_bytes()[:count])

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no file"),
        (lambda p: p.mkdir(), "there is no file"),
        (lambda p: p.write_bytes(b""), "truncated, damaged or not a PyTorch or safetensors file"),
        (lambda p: p.write_text("hello, hello, hello"), "truncated, damaged or not a PyTorch or safetensors file"),
        *[(cut(count, zipped), "truncated, damaged or not") for count in (5, 100, 20_000) for zipped in (True, False)],
        (lambda p: p.write_bytes(b"\x40\0\0\0\0\0\0\0{}"), "not a safetensors file"),
        (lambda p: torch.save([1, 2], p), "no weights where they usually lie; its top level is a list"),
        (lambda p: torch.save({}, p), "no weights where they usually lie; its top level is empty"),
        (lambda p: torch.save({"epoch": 3, "weight_ih": torch.ones(1)}, p), "top level is epoch, weight_ih; name"),
        (spoiled(lambda s: s.pop("bn1.weight")), "another architecture; tensors it lacks: bn1.weight; .* have: none"),
        (spoiled(lambda s: s.update(extra=torch.ones(1))), "lacks: none; tensors the model does not have: extra$"),
        (spoiled(lambda s: s.update({"fc.weight": torch.ones(1)})), "tensors the model does not have: fc.weight$"),
        (spoiled(lambda s: s.update({"bn1.weight": torch.ones(9)})), r"bn1.weight has shape \(9,\), expected \(4,\)"),
    ],
)  # fmt: skip
def test_files_that_do_not_come_in(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        convert_foreign(tmp_path / "old.pth", tmp_path / "new", "cifar_resnet8")
    assert str(caught.value).startswith("convert_foreign: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_unknown_names(tmp_path: Path) -> None:
    torch.save({"state_dict": net().state_dict()}, tmp_path / "old")
    with pytest.raises(CheckpointError, match="no weights under 'ema'; its top level is state_dict"):
        convert_foreign(tmp_path / "old", tmp_path / "new", "cifar_resnet8", entry="ema")
    with pytest.raises(InputError, match="no architecture is named 'resnet8'"):
        convert_foreign(tmp_path / "old", tmp_path / "new", "resnet8")
    with pytest.raises(InputError, match="has no option groups"):
        convert_foreign(tmp_path / "old", tmp_path / "new", "cifar_resnet8", groups=3)
    with pytest.raises(CheckpointError, match=r"linear.weight has shape \(5, 16\), expected \(7, 16\)"):
        convert_foreign(tmp_path / "old", tmp_path / "new", "cifar_resnet8", num_classes=7)

"""Architectures of other packages: with small packages of the same interface, with broken ones, and with none."""

from __future__ import annotations

import copy
import importlib
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.fx
from safetensors.torch import save_file
from torch import nn

from ttaq.errors import InputError, MissingPackageError
from ttaq.io import load_model, load_weights, save_model
from ttaq.models import build, infer_kwargs
from ttaq.nn import convert
from ttaq.scheme import Scheme

NET = """
    import torch
    class Net(torch.nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)
            self.fc = torch.nn.Linear(4, num_classes)
        def forward(self, x):
            return self.fc(self.conv(x).mean((2, 3)))
    class Taken(Net):
        normalize = None
"""
TIMM = """
    from torch_net import Net, Taken
    __version__ = "1.2.3"
    def is_model(name):
        return name.split(".")[0] in ("net", "plain", "taken", "picky")
    def create_model(name, *, pretrained, num_classes):
        assert pretrained is False
        if name == "picky":
            raise RuntimeError("num_classes must be even")
        model = Taken(num_classes) if name == "taken" else Net(num_classes)
        if name != "plain":
            model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
        return model
"""
TORCHVISION = """
    from torch_net import Net
    def list_models(module):
        import torchvision.models
        assert module is torchvision.models
        return ["net"]
    def get_model(name, *, weights, num_classes):
        assert weights is None
        return Net(num_classes)
"""
NMS = "raise RuntimeError('operator torchvision::nms does not exist')"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes packages that come before installed ones and are forgotten afterwards."""

    def write(sources: dict[str, str]) -> None:
        for name, source in sources.items():
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(source))
        importlib.invalidate_caches()

    before = dict(sys.modules)
    for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision", "torch_net")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in ("timm", "torchvision", "torch_net"):
            del sys.modules[name]


@pytest.fixture
def working(packages) -> None:
    packages(
        {
            "torch_net": NET,
            "timm": TIMM,
            "torchvision/__init__": "from torchvision import models",
            "torchvision/models": TORCHVISION,
        }
    )


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("timm:net", [0.5] * 3, [0.25] * 3),
        ("timm:net.tag", [0.5] * 3, [0.25] * 3),
        ("timm:plain", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("torchvision:net", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ],
)
def test_names_are_those_of_the_package_and_normalisation_is_in_front(working, name: str, mean, std) -> None:
    model = build(name, num_classes=5).eval()
    assert list(model.state_dict()) == ["conv.weight", "conv.bias", "fc.weight", "fc.bias"]
    plain = nn.Module.__new__(type(model).__bases__[0])
    plain.__dict__ = model.__dict__
    x = torch.rand(2, 3, 8, 8)
    expected = plain.forward((x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    raw = build(name, num_classes=5, mean=[0.0] * 3, std=[1.0] * 3)
    raw.load_state_dict(model.state_dict())
    torch.testing.assert_close(raw(x), plain.forward(x))


def test_weights_come_from_a_local_file_and_a_quantized_model_keeps_their_names(working, tmp_path: Path) -> None:
    source = build("timm:net", num_classes=7).eval()
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    model = load_weights("timm:net", tmp_path / "net.safetensors")
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model(x), source(x))
    quantized = convert(model, Scheme.parse("W8A8"))
    assert set(quantized.state_dict()) == set(source.state_dict())
    save_model(tmp_path / "net.ttaq", quantized, architecture="timm:net", kwargs={"num_classes": 7})
    assert torch.equal(load_model(tmp_path / "net.ttaq").model(x), quantized(x))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["stem.weight", "head.weight"], {"num_classes": 6}),
        (["head.fc.weight"], {"num_classes": 6}),
        (["heads.head.weight"], {"num_classes": 6}),
        (["classifier.1.weight"], {"num_classes": 6}),
        (["blocks.fc.weight", "head.norm.weight"], {}),
        ([], {}),
    ],
)
def test_last_layer_tells_the_classes(keys: list[str], expected: dict[str, int]) -> None:
    assert infer_kwargs("timm:any", {key: torch.zeros(6, 2) for key in keys}) == expected


def test_last_of_numbered_classifiers_tells_the_classes() -> None:
    state = {"classifier.0.weight": torch.zeros(9, 2), "classifier.10.weight": torch.zeros(4, 9)}
    state |= {"classifier.9.weight": torch.zeros(9, 9), "classifier.11.weight": torch.zeros(9)}
    assert infer_kwargs("torchvision:any", state) == {"num_classes": 4}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm:other", {}, "timm 1.2.3 has no architecture 'other'; timm.list_models"),
        ("timm:", {}, "has no architecture ''"),
        ("timm:hf-hub:owner/net", {}, "has no architecture 'hf-hub:owner/net'"),
        ("torchvision:other", {}, "torchvision has no classification architecture 'other'"),
        ("timm:picky", {}, "picky cannot be built with .*: num_classes must be even"),
        ("timm:taken", {}, "timm:taken has an attribute `normalize` of its own"),
        ("timm:net", {"num_classes": 0}, "num_classes is 0"),
        ("timm:net", {"num_classes": "ten"}, "timm:net cannot be built with"),
        ("timm:net", {"width": 3}, "timm:net has no option width; its options are num_classes, mean, std"),
        ("timm:net", {"mean": [0.5]}, "got 1 means and 3 standard deviations"),
        ("keras:net", {}, "no architecture is named 'keras:net'"),
        ("timm", {}, "no architecture is named 'timm'"),
    ],
)
def test_errors(working, name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(name, **options)


@pytest.mark.parametrize(
    ("name", "sources", "message"),
    [
        ("torchvision:net", {"torchvision": NMS}, "torchvision cannot be imported .RuntimeError: operator torchvision"),
        ("timm:net", {"timm": "import torchvision", "torchvision": NMS}, "timm cannot be imported .RuntimeError: oper"),
        (
            "timm:net",
            {"timm": "import torchvision", "torchvision": NMS},
            f"torchvision made for torch {torch.__version__}",
        ),
        ("timm:net", {"timm": "import no_such_package"}, "it needs no_such_package, .* pip install no_such_package"),
        ("timm:net", {"timm": "raise OSError('libcudart.so.13')"}, "timm cannot be imported .OSError: libcudart"),
    ],
)
def test_packages_that_do_not_import(packages, name: str, sources: dict[str, str], message: str) -> None:
    packages(sources)
    with pytest.raises(MissingPackageError, match=message.replace("+", r"\+")):
        build(name)


@pytest.mark.parametrize(
    ("name", "absent", "message"),
    [
        (
            "timm:net",
            ["timm"],
            "timm cannot be imported .it is not installed.; install it with: pip install 'ttaq.timm",
        ),
        (
            "timm:net",
            ["torchvision"],
            "it needs torchvision, .* pip install torchvision .the torchvision made for torch",
        ),
        ("torchvision:net", ["torchvision"], "it is not installed.; install it with: pip install torchvision"),
    ],
)
def test_packages_that_are_not_there(packages, monkeypatch, name: str, absent: list[str], message: str) -> None:
    packages({"timm": "import torchvision"})
    for package in absent:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=message):
        build(name)


@pytest.mark.parametrize("name", ["timm:deit_tiny_patch16_224", "timm:resnet18", "torchvision:resnet18"])
def test_installed_packages_agree_with_the_own_architecture(name: str) -> None:
    try:
        theirs = build(name).eval()
    except MissingPackageError as error:
        pytest.skip(str(error))
    own = build("deit_tiny" if "deit" in name else "resnet18").eval()
    own.load_state_dict(theirs.state_dict())
    x = torch.rand(1, 3, 224, 224)
    torch.testing.assert_close(theirs(x), own(x), rtol=1e-4, atol=1e-5)
    assert infer_kwargs(name, theirs.state_dict()) == {"num_classes": 1000}

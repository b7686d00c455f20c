"""Small networks of each family with norms that were used, and images for them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ttaq.models.cifar_resnet import CifarResNet
from ttaq.models.mobilenet_v1 import MobileNetV1
from ttaq.models.vit import VisionTransformer
from ttaq.models.wide_resnet import WideResNet
from ttaq.nn import QuantizedModel, convert
from ttaq.ptq.rtn import rtn

NETS = {
    "resnet": lambda: CifarResNet(8, width=4),
    "wide": lambda: WideResNet(10, 1),
    "mobilenet": lambda: MobileNetV1(10, width=2),
    "vit": lambda: VisionTransformer(8, 2, 2, num_classes=10, image_size=8, patch_size=4),
}
SIZES = {"resnet": 8, "wide": 8, "mobilenet": 32, "vit": 8}


def images(name: str = "resnet", count: int = 12, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, SIZES[name], SIZES[name], generator=torch.Generator().manual_seed(seed))


def net(name: str = "resnet") -> nn.Module:
    """The float model in eval mode; its running statistics fit `images`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETS[name]()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None
        model.train()(images(name, 64))
        for norm in norms:
            norm.momentum = 0.1
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.5)
    return model.eval()


def pair(name: str = "resnet", scheme: str = "W2A4") -> tuple[QuantizedModel, QuantizedModel]:
    """A calibrated model, and its float twin."""
    teacher = convert(net(name), scheme).eval()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        rtn(model, images(name), search="mse", seed=0, batch_size=64, progress=None)
    return model, teacher

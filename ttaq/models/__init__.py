"""Architectures that ttaq can build by name; all of them take images in [0, 1] and return logits."""

from ttaq.models.cifar_resnet import CifarResNet
from ttaq.models.normalize import Normalize
from ttaq.models.registry import NAMES, build, classifier_name, infer_kwargs

__all__ = ["NAMES", "CifarResNet", "Normalize", "build", "classifier_name", "infer_kwargs"]

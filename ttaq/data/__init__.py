"""Labelled images from folders the user names, as uint8; which of them serve for what; and their corruptions."""

from ttaq.data.cifar import read_cifar10, read_cifar100, read_cifar_c
from ttaq.data.cifar10_1 import read_cifar10_1
from ttaq.data.digits import load_digits
from ttaq.data.image_folder import ImageFolder, open_image_folder
from ttaq.data.imagenet import open_imagenet_c, open_imagenet_sketch
from ttaq.data.images import Images, to_float
from ttaq.data.splits import SPLITS, calibration_indices, cifar_split, imagenet_split

__all__ = [
    "SPLITS",
    "ImageFolder",
    "Images",
    "calibration_indices",
    "cifar_split",
    "imagenet_split",
    "load_digits",
    "open_image_folder",
    "open_imagenet_c",
    "open_imagenet_sketch",
    "read_cifar10",
    "read_cifar10_1",
    "read_cifar100",
    "read_cifar_c",
    "to_float",
]

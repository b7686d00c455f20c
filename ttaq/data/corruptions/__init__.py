"""The 15 corruptions of ImageNet-C and CIFAR-10-C and their four validation corruptions, at five severities, in torch.

Source of all of them: Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and
perturbations", arXiv 1903.12261, with the parameters and steps of its repository hendrycks/robustness
(`ImageNet-C/create_c/make_imagenet_c.py` and `make_cifar_c.py`). Each function says where it differs.
"""

from ttaq.data.corruptions.apply import CORRUPTIONS, VALIDATION_CORRUPTIONS, corrupt
from ttaq.data.corruptions.frost import frost_source

__all__ = ["CORRUPTIONS", "VALIDATION_CORRUPTIONS", "corrupt", "frost_source"]

"""Keep a low-bit vision model accurate while the world around it changes.

`quantize` turns a float model into a low-bit one, `tta.build` wraps either in an adapter that learns from the images it
predicts, `save_model` and `load_model` keep it in one file. The subpackages hold the parts: `nn` layers and conversion,
`ptq` methods of quantization, `tta` methods of adaptation, `io` files; `models`, `data` and `eval` serve the command
line and the experiments.
"""

from ttaq import io, nn, ptq, tta
from ttaq.errors import CheckpointError, DataError, InputError, MissingPackageError, TtaqError
from ttaq.io import load_model, save_model
from ttaq.ptq import quantize
from ttaq.scheme import Scheme
from ttaq.version import __version__

__all__ = [
    "CheckpointError",
    "DataError",
    "InputError",
    "MissingPackageError",
    "Scheme",
    "TtaqError",
    "__version__",
    "io",
    "load_model",
    "nn",
    "ptq",
    "quantize",
    "save_model",
    "tta",
]

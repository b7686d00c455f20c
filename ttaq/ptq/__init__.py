"""Post-training quantization: grids for the weights and tensors of a model, from a few unlabelled images."""

from ttaq.ptq.entry import METHODS, quantize, settings_of
from ttaq.ptq.settings import PRESETS, Reconstruction
from ttaq.ptq.unit_store import clear_units
from ttaq.ptq.units import find_units

__all__ = ["METHODS", "PRESETS", "Reconstruction", "clear_units", "find_units", "quantize", "settings_of"]

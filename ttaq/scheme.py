"""How many bits the weights and activations of a model get, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal

from ttaq.errors import InputError

__all__ = ["PRESETS", "LayerBits", "Position", "Scheme"]

PRESETS = ("W8A8", "W6A6", "W4A8", "W4A4", "W3A3", "W2A4", "W2A2")
Position = Literal["first", "inner", "last"]
_FLOAT = 32  # how a name writes "stays float": W4A32 has 4-bit weights and float activations
# How a name writes a field that has not its usual value.
_FLAGS = {
    "weight_symmetric": ("weight_symmetric", True),
    "activation_symmetric": ("activation_symmetric", True),
    "weight_per_tensor": ("weight_per_channel", False),
    "float_matmul": ("quantize_matmul", False),
    "uniform_softmax": ("twin_softmax", False),
    "uniform_gelu": ("twin_gelu", False),
}
_BITS_OPTIONS = {"first_last": "first_last_bits", "image": "image_bits"}


def _check_bits(who: str, name: str, bits: object) -> None:
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8):
        raise InputError(f"{who}: {name} is {bits!r}, expected 2 to 8, or None for float")


@dataclass(frozen=True)
class LayerBits:
    """Bits of a layer's weight and of its input; None stays float."""

    weight_bits: int | None
    activation_bits: int | None

    def __post_init__(self) -> None:
        _check_bits("LayerBits", "weight_bits", self.weight_bits)
        _check_bits("LayerBits", "activation_bits", self.activation_bits)

    @classmethod
    def parse(cls, text: str) -> LayerBits:
        """Read `W4A8`, `W4A32` (32 stays float) or `float`."""
        if text.lower() == "float":
            return cls(None, None)
        match = re.fullmatch(r"W(\d+)A(\d+)", text, re.IGNORECASE)
        bits = [int(digits) for digits in match.groups()] if match else []
        if not bits or any(b != _FLOAT and not 2 <= b <= 8 for b in bits):
            raise InputError(
                f"Scheme: got {text!r}, expected W<weight bits>A<activation bits> with 2 to 8 bits each, or 32 to stay "
                f"float, such as {', '.join(PRESETS)}; or 'float'"
            )
        return cls(*(None if b == _FLOAT else b for b in bits))

    def __str__(self) -> str:
        if self.weight_bits is None and self.activation_bits is None:
            return "float"
        return f"W{self.weight_bits or _FLOAT}A{self.activation_bits or _FLOAT}"


@dataclass(frozen=True)
class Scheme:
    """The bits and grids of a quantized model; a name such as `W4A4,first_last=none,layer3.*=W8A8` says all of it.

    weight_bits, activation_bits: 2 to 8, None (in names 32) for float.
    weight_symmetric, activation_symmetric: signed grid around zero instead of an unsigned grid with a zero point.
    weight_per_channel: one scale per output channel, else one per weight tensor.
    first_last_bits: bits of the weights of the first and the last layers and of the last layers' input, where they are
        not float anyway; None treats these layers like the others. First are the layers that no other layer precedes,
        last those that none follows.
    overrides: (pattern, bits) pairs such as `("layer3.*", "W8A8")` or `("fc", "float")`; the pattern is matched against
        the full layer name (`*` and `?` as in file names), the last match wins, also over first_last_bits.
    image_bits: bits of the image, which feeds the first layers; None leaves it float whatever the overrides say.
    quantize_matmul: whether products of two activations (attention) get quantized operands, of activation_bits or of
        what an override for the product's name says; False leaves them float whatever the overrides say.
    twin_softmax, twin_gelu: a twin uniform grid (`ttaq.nn.TwinQuantizer`) for what a softmax or a GELU makes.
    """

    weight_bits: int | None = 8
    activation_bits: int | None = 8
    weight_symmetric: bool = False
    activation_symmetric: bool = False
    weight_per_channel: bool = True
    first_last_bits: int | None = 8
    overrides: tuple[tuple[str, str], ...] = ()
    image_bits: int | None = None
    quantize_matmul: bool = True
    twin_softmax: bool = True
    twin_gelu: bool = True

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "first_last_bits", "image_bits"):
            _check_bits("Scheme", name, getattr(self, name))
        for name, _ in _FLAGS.values():
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"Scheme: {name} is {getattr(self, name)!r}, expected True or False")
        canonical = []
        for pair in self.overrides:
            if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
                raise InputError(f"Scheme: override {pair!r}, expected a pair such as ('layer3.*', 'W8A8')")
            pattern, bits = pair
            if not re.fullmatch(r"[^,=\s]+", pattern) or pattern in _BITS_OPTIONS:
                raise InputError(
                    f"Scheme: override pattern {pattern!r}, expected a layer name or a pattern like layer3.*"
                )
            canonical.append((pattern, str(LayerBits.parse(bits))))
        object.__setattr__(self, "overrides", tuple(canonical))

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a name: `WxAy`, then, after commas, any of `first_last=BITS|none`, `image=BITS|none`,
        `weight_symmetric`, `activation_symmetric`, `weight_per_tensor`, `float_matmul`, `uniform_softmax`,
        `uniform_gelu` and `PATTERN=WxAy|float`. Raises `InputError`.

        It holds that `parse(str(s)) == s`.
        """
        if not isinstance(text, str):
            raise InputError(f"Scheme.parse: got a {type(text).__name__}, expected a name such as 'W4A4'")
        base, *rest = [part.strip() for part in text.split(",")]
        bits = LayerBits.parse(base)
        options: dict[str, Any] = {}
        overrides = []
        for part in rest:
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if key in _FLAGS and not equals:
                name, on = _FLAGS[key]
                options[name] = on
            elif key in _BITS_OPTIONS and re.fullmatch(r"\d+|none", value.lower()):
                options[_BITS_OPTIONS[key]] = None if value.lower() == "none" else int(value)
            elif key in _BITS_OPTIONS or not equals:
                raise InputError(
                    f"Scheme.parse: got {part!r} in {text!r}, expected {', '.join(_FLAGS)}, "
                    f"{' or '.join(f'{name}=BITS|none' for name in _BITS_OPTIONS)}, or LAYER=WxAy|float"
                )
            else:
                overrides.append((key, value))
        return cls(bits.weight_bits, bits.activation_bits, overrides=tuple(overrides), **options)

    def __str__(self) -> str:
        parts = [str(LayerBits(self.weight_bits, self.activation_bits))]
        if self.first_last_bits != 8:
            parts.append(f"first_last={self.first_last_bits or 'none'}")
        if self.image_bits is not None:
            parts.append(f"image={self.image_bits}")
        parts += [flag for flag, (name, value) in _FLAGS.items() if getattr(self, name) is value]
        parts += [f"{pattern}={bits}" for pattern, bits in self.overrides]
        return ",".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return {**asdict(self), "overrides": [list(pair) for pair in self.overrides]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scheme:
        """The inverse of `to_dict`; `InputError` for fields that are not known."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise InputError(
                f"Scheme.from_dict: unknown fields {', '.join(unknown)}; was this made by a newer version?"
            )
        return cls(**{**values, "overrides": tuple(tuple(pair) for pair in values.get("overrides", ()))})

    def layer(self, name: str, position: Position) -> LayerBits:
        """The bits of the layer `name`: of its weight and of the tensor that it reads."""
        bits = LayerBits(self.weight_bits, self.activation_bits)
        if position != "inner" and self.first_last_bits is not None:
            # What stays float everywhere stays float here too.
            bits = LayerBits(
                *(None if b is None else self.first_last_bits for b in (self.weight_bits, self.activation_bits))
            )
        for pattern, text in self.overrides:
            if fnmatchcase(name, pattern):
                bits = LayerBits.parse(text)
        return LayerBits(bits.weight_bits, self.image_bits) if position == "first" else bits

    def product(self, name: str) -> int | None:
        """The bits of both operands of the product of activations `name`."""
        return self.layer(name, "inner").activation_bits if self.quantize_matmul else None

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """The override patterns that none of the names of layers and products matches."""
        names = list(names)
        return [pattern for pattern, _ in self.overrides if not any(fnmatchcase(name, pattern) for name in names)]

"""Random images around an image: the augmentation that teachers and consistency losses average over."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ttaq.errors import InputError

__all__ = ["augment"]

_JITTER = {"brightness": (0.6, 1.4), "contrast": (0.7, 1.3), "saturation": (0.5, 1.5), "hue": (-0.06, 0.06)}
_JITTER |= {"gamma": (0.7, 1.3)}
_PLACE = {"degrees": (-15.0, 15.0), "right": (-1 / 16, 1 / 16), "down": (-1 / 16, 1 / 16), "scale": (0.9, 1.1)}
_SIGMA = (0.001, 0.5)
_TAPS = 2  # of the blur, on either side of a pixel
_MODES = {"replicate": "border", "reflect": "reflection"}
_GRAY = (0.2989, 0.587, 0.114)


class Change(NamedTuple):
    """What happens to a batch. Its default values change nothing.

    colours: (kind, strength) in the order of application; a strength of 1, for "hue" 0, changes nothing.
    degrees: counter-clockwise. right, down: as shares of the padded image, which has twice the size of the image.
    scale: above 1 magnifies. sigma: of the blur, in pixels. flip: left and right. noise_seed: of the noise alone.
    """

    colours: tuple[tuple[str, float], ...] = ()
    degrees: float = 0.0
    right: float = 0.0
    down: float = 0.0
    scale: float = 1.0
    sigma: float = _SIGMA[0]
    flip: bool = False
    noise_seed: int = 0

    @classmethod
    def draw(cls, generator: torch.Generator) -> Change:
        """Every value uniform over its range, the colours in random order."""
        ranges = {**_JITTER, **_PLACE, "sigma": _SIGMA, "flip": (0.0, 1.0)}
        shares = torch.rand(len(ranges), dtype=torch.float64, generator=generator).tolist()
        drawn = {k: low + s * (high - low) for (k, (low, high)), s in zip(ranges.items(), shares, strict=True)}
        order = torch.randperm(len(_JITTER), generator=generator).tolist()
        colours = tuple((kind, drawn.pop(kind)) for kind in [list(_JITTER)[index] for index in order])
        flip = drawn.pop("flip") < 0.5
        return cls(colours, flip=flip, noise_seed=torch.randint(2**62, (1,), generator=generator).tolist()[0], **drawn)


@torch.no_grad()
def augment(
    x: Tensor,
    generator: torch.Generator,
    *,
    padding: str = "replicate",
    blur: bool = True,
    noise: float = 0.005,
) -> Tensor:
    """A random version of the images x [B, 3, H, W] in [0, 1], in the shape and type of x and in [0, 1] again.

    In this order, with values uniform over the ranges:

        colours   brightness 0.6 to 1.4, contrast 0.7 to 1.3, saturation 0.5 to 1.5, hue -0.06 to 0.06 turns (in HSV),
                  gamma 0.7 to 1.3, in random order, clipped to [0, 1] after each
        place     pad by half of the size; rotate by up to 15 degrees, shift by up to 1/16 of the padded image (which
                  is 1/8 of x) in either direction, scale by 0.9 to 1.1, bilinear
        blur      5 x 5 Gaussian, sigma 0.001 to 0.5 pixels; then the centre crop of size H x W
        flip      left and right, with probability 0.5
        noise     Gaussian with standard deviation `noise`, each value of its own; clipped to [0, 1]

    One version is drawn for the whole batch, on the host, from `generator` (a CPU generator); only the noise is drawn
    on the device, by a generator whose seed comes from the first. Nothing waits for the device. As many numbers are
    drawn whatever the arguments.

    Args:
        padding: what lies beyond the borders, "replicate" or "reflect".
        blur: False leaves the blur out. noise: 0 leaves the noise out.

    Raises `InputError` for a shape other than [B, 3, H, W], another padding, and a noise that is no number >= 0.

    Source: the augmentation of CoTTA (Wang et al., arXiv 2203.13591) on CIFAR-C, with the ranges of its experiments.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise InputError(f"augment: images have shape {tuple(x.shape)}, expected [B, 3, H, W]")
    if padding not in _MODES:
        raise InputError(f"augment: padding is {padding!r}, expected {' or '.join(_MODES)}")
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise < math.inf:
        raise InputError(f"augment: noise is {noise!r}, expected a number >= 0")
    change = Change.draw(generator)
    return apply(x, change, padding=padding, blur=blur, noise=noise)


def apply(x: Tensor, change: Change, *, padding: str, blur: bool, noise: float) -> Tensor:
    """The images after `change`."""
    with torch.autocast(x.device.type, enabled=False):
        y = x.float().clamp(0, 1)
        for kind, strength in change.colours:
            y = _COLOURS[kind](y, strength).clamp_(0, 1)
        y = _place(y, change, padding, margin=_TAPS if blur else 0)
        if blur:
            y = _blur(y, change.sigma)
        if noise > 0:
            generator = torch.Generator(x.device).manual_seed(change.noise_seed)
            y.add_(torch.randn(y.shape, generator=generator, device=y.device), alpha=noise)
        return y.clamp_(0, 1).to(x.dtype)


def _gray(x: Tensor) -> Tensor:
    red, green, blue = x.unbind(1)
    return (_GRAY[0] * red + _GRAY[1] * green + _GRAY[2] * blue).unsqueeze(1)


def _brightness(x: Tensor, strength: float) -> Tensor:
    return x * strength


def _contrast(x: Tensor, strength: float) -> Tensor:
    return torch.lerp(_gray(x).mean((1, 2, 3), keepdim=True), x, strength)


def _saturation(x: Tensor, strength: float) -> Tensor:
    return torch.lerp(_gray(x), x, strength)


def _hue(x: Tensor, turns: float) -> Tensor:
    """The colours turned in HSV: value and saturation stay."""
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    # In sixths of a turn; a gray has no hue, and chroma 0 keeps it gray below whatever this says.
    sixths = torch.where(
        value == red, green - blue, torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    )
    sixths = sixths / chroma.clamp(min=1e-12) + 6 * turns
    channels = []
    for offset in (5, 3, 1):
        k = (sixths + offset).remainder_(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1)


def _gamma(x: Tensor, strength: float) -> Tensor:
    return x**strength


_COLOURS = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue, "gamma": _gamma}


def _place(x: Tensor, change: Change, padding: str, margin: int) -> Tensor:
    """Rotated, shifted, scaled, flipped: the centre [H, W] with `margin` more pixels on every side.

    Nothing is padded or cropped: only this part is computed, and what it reads outside of the image comes from the
    padding modes of `grid_sample`, which have no end. In a square image it reaches less than half an image that far.
    """
    height, width = x.shape[2:]
    # Coordinates in pixels from the centre, as numbers of the host in operations of the device: no copies.
    across = torch.arange(-margin, width + margin, device=x.device) - (width - 1) / 2
    down = (torch.arange(-margin, height + margin, device=x.device) - (height - 1) / 2).unsqueeze(1)
    across = (-across if change.flip else across) - change.right * 2 * width
    down = down - change.down * 2 * height
    cosine, sine = (f(math.radians(change.degrees)) / change.scale for f in (math.cos, math.sin))
    grid_x = (cosine * across - sine * down) * (2 / max(width - 1, 1))
    grid_y = (sine * across + cosine * down) * (2 / max(height - 1, 1))
    grid = torch.stack([grid_x, grid_y], 2).expand(len(x), -1, -1, -1)
    return functional.grid_sample(x, grid, mode="bilinear", padding_mode=_MODES[padding], align_corners=True)


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian over 5 x 5 pixels; [B, 3, H + 4, W + 4] -> [B, 3, H, W]."""
    weights = [math.exp(-0.5 * (tap / sigma) ** 2) for tap in range(-_TAPS, _TAPS + 1)]
    for dim in (2, 3):
        size = x.shape[dim] - 2 * _TAPS
        y = torch.zeros_like(x.narrow(dim, 0, size))
        for tap, weight in enumerate(weights):
            y.add_(x.narrow(dim, tap, size), alpha=weight / sum(weights))
        x = y
    return x

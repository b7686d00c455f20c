"""The augmentation: each of its parts against an independent statement, and what one draw shares."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ttaq.data.augment import Change, apply, augment
from ttaq.errors import InputError

UNCHANGED = (("contrast", 1.0), ("hue", 0.0), ("gamma", 1.0), ("saturation", 1.0), ("brightness", 1.0))


def images(batch: int = 2, height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def changed(x: Tensor, padding: str = "replicate", blur: bool = False, noise: float = 0.0, **change: object) -> Tensor:
    return apply(x, Change(**change), padding=padding, blur=blur, noise=noise)  # type: ignore[arg-type]


@pytest.mark.parametrize("padding", ["replicate", "reflect"])
@pytest.mark.parametrize("blur", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 1), (2, 1)])
def test_identity_parameters_give_the_image_back(padding: str, blur: bool, size: tuple[int, int]) -> None:
    x = images(2, *size)
    torch.testing.assert_close(changed(x, padding, blur, colours=UNCHANGED), x, rtol=0, atol=1e-5)


def test_every_value_is_uniform_over_its_range() -> None:
    draws = [Change.draw(generator(seed)) for seed in range(400)]
    ranges = {"degrees": (-15, 15), "right": (-1 / 16, 1 / 16), "down": (-1 / 16, 1 / 16), "scale": (0.9, 1.1)}
    ranges["sigma"] = (0.001, 0.5)
    values = {name: [getattr(draw, name) for draw in draws] for name in ranges}
    for kind, limits in {"brightness": (0.6, 1.4), "contrast": (0.7, 1.3), "saturation": (0.5, 1.5)}.items():
        ranges[kind], values[kind] = limits, [dict(draw.colours)[kind] for draw in draws]
    for kind, limits in {"hue": (-0.06, 0.06), "gamma": (0.7, 1.3)}.items():
        ranges[kind], values[kind] = limits, [dict(draw.colours)[kind] for draw in draws]
    for name, (low, high) in ranges.items():
        got = sorted((value - low) / (high - low) for value in values[name])
        assert got[0] >= 0
        assert got[-1] < 1
        # Kolmogorov's distance for 400 draws: 0.095 is passed by chance once in a thousand.
        assert max(abs(value - (index + 0.5) / 400) for index, value in enumerate(got)) < 0.095, name
    assert 160 < sum(draw.flip for draw in draws) < 240
    assert len({tuple(kind for kind, _ in draw.colours) for draw in draws}) > 100  # of 120 orders
    assert len({draw.noise_seed for draw in draws}) == 400


def test_one_seed_is_one_result_and_another_seed_another() -> None:
    x = images()
    assert torch.equal(augment(x, generator(3)), augment(x, generator(3)))
    assert not torch.equal(augment(x, generator(3)), augment(x, generator(4)))
    again = generator(3)
    assert not torch.equal(augment(x, again), augment(x, again))


def test_as_many_numbers_are_drawn_whatever_the_arguments() -> None:
    plain, other = generator(), generator()
    augment(images(), plain)
    augment(images(5, 3, 9), other, padding="reflect", blur=False, noise=0)
    assert torch.equal(plain.get_state(), other.get_state())


def test_the_batch_shares_everything_but_the_noise() -> None:
    x = images(1).repeat(3, 1, 1, 1)
    one, two, three = augment(x, generator(), noise=0)
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    one, two, _ = augment(x, generator())
    assert not torch.equal(one, two)
    alone = augment(images(2), generator(), noise=0)[1:]
    assert torch.equal(augment(images(2)[1:], generator(), noise=0), alone)


def test_noise_has_the_deviation_asked_for() -> None:
    x = torch.full((4, 3, 32, 32), 0.5)
    noise = changed(x, noise=0.005, noise_seed=7) - x
    assert noise.std().item() == pytest.approx(0.005, rel=0.05)
    assert abs(noise.mean().item()) < 2e-4
    assert not torch.equal(noise, changed(x, noise=0.005, noise_seed=8) - x)


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 12), (12, 5), (1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("padding", ["replicate", "reflect"])
def test_every_size_keeps_shape_and_range(size: tuple[int, int], padding: str) -> None:
    x = images(2, *size) * 1.5 - 0.25  # beyond the range too
    kept = x.clone()
    for seed in range(20):
        y = augment(x, generator(seed), padding=padding)
        assert y.shape == x.shape
        assert y.min() >= 0
        assert y.max() <= 1
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_stays_and_autocast_does_not_matter(dtype: torch.dtype) -> None:
    x = images()
    y = augment(x, generator())
    assert augment(x.to(dtype), generator()).dtype == dtype
    torch.testing.assert_close(augment(x.to(dtype), generator()).float(), y, rtol=0, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment(x, generator()), y)


def test_no_graph_reaches_through_it() -> None:
    assert not augment(images().requires_grad_(), generator()).requires_grad


def test_colours_pixel_by_pixel() -> None:
    x = images(2, 3, 4)
    weights = (0.2989, 0.587, 0.114)
    for image, bright, vivid, turned, dark, stark in zip(
        x,
        changed(x, colours=(("brightness", 1.3),)),
        changed(x, colours=(("saturation", 1.4),)),
        changed(x, colours=(("hue", 0.05),)),
        changed(x, colours=(("gamma", 1.2),)),
        changed(x, colours=(("contrast", 0.8),)),
        strict=True,
    ):
        pixels = [(row, column) for row in range(3) for column in range(4)]
        grays = {at: sum(w * image[c][at].item() for c, w in enumerate(weights)) for at in pixels}
        mean = sum(grays.values()) / len(pixels)
        for at in pixels:
            rgb = [image[c][at].item() for c in range(3)]
            h, s, v = colorsys.rgb_to_hsv(*rgb)
            expected = {
                "brightness": (bright, [1.3 * value for value in rgb]),
                "saturation": (vivid, [1.4 * value - 0.4 * grays[at] for value in rgb]),
                "hue": (turned, list(colorsys.hsv_to_rgb((h + 0.05) % 1, s, v))),
                "gamma": (dark, [value**1.2 for value in rgb]),
                "contrast": (stark, [0.8 * value + 0.2 * mean for value in rgb]),
            }
            for kind, (got, values) in expected.items():
                clipped = [min(max(value, 0.0), 1.0) for value in values]
                assert [got[c][at].item() for c in range(3)] == pytest.approx(clipped, abs=2e-6), kind


def test_hue_of_gray_black_and_white_stays() -> None:
    x = torch.tensor([0.0, 0.3, 1.0]).view(1, 1, 1, 3).expand(1, 3, 2, 3).contiguous()
    torch.testing.assert_close(changed(x, colours=(("hue", 0.06),)), x, rtol=0, atol=1e-6)


def test_colours_are_applied_in_the_order_drawn_and_clipped_in_between() -> None:
    x = torch.full((1, 3, 1, 1), 0.9)
    assert changed(x, colours=(("brightness", 1.4), ("gamma", 1.3))).max() == 1
    torch.testing.assert_close(
        changed(x, colours=(("gamma", 1.3), ("brightness", 0.6))), torch.full_like(x, 0.6 * 0.9**1.3)
    )


@pytest.mark.parametrize(("padding", "mode"), [("replicate", "replicate"), ("reflect", "reflect")])
@pytest.mark.parametrize("size", [(8, 8), (7, 11)])
def test_shifts_read_the_padding(padding: str, mode: str, size: tuple[int, int]) -> None:
    x = images(2, *size)
    height, width = size
    padded = functional.pad(x, (2, 2, 2, 2), mode=mode)
    # By whole pixels: two to the right and one up shows what lies two to the left and one below.
    got = changed(x, padding, right=2 / (2 * width), down=-1 / (2 * height))
    torch.testing.assert_close(got, padded[:, :, 3 : 3 + height, 0:width], rtol=0, atol=1e-5)


def test_quarter_turn_flip_and_scale() -> None:
    x = images(1, 6, 6)
    torch.testing.assert_close(changed(x, degrees=90.0), torch.rot90(x, 1, (2, 3)), rtol=0, atol=1e-5)
    torch.testing.assert_close(changed(x, flip=True), x.flip(3), rtol=0, atol=1e-5)
    shifted = changed(x, right=1 / 12)
    torch.testing.assert_close(changed(x, right=1 / 12, flip=True), shifted.flip(3), rtol=0, atol=1e-5)
    ramp = (torch.arange(6.0) / 10).expand(1, 3, 6, 6)
    slopes = changed(ramp, scale=2.0).diff(dim=3)
    torch.testing.assert_close(slopes, torch.full_like(slopes, 0.05), rtol=0, atol=1e-5)


def test_blur_is_a_gaussian_with_the_padding_around() -> None:
    x = images(2, 5, 6)
    taps = torch.tensor([math.exp(-0.5 * (tap / 0.5) ** 2) for tap in range(-2, 3)], dtype=torch.float64)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    padded = functional.pad(x.double(), (2, 2, 2, 2), mode="replicate")
    expected = functional.conv2d(padded, kernel.expand(3, 1, 5, 5), groups=3)
    torch.testing.assert_close(changed(x, blur=True, sigma=0.5).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(changed(x, blur=False, sigma=0.5), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.rand(2, 1, 4, 4)}, r"shape \(2, 1, 4, 4\), expected \[B, 3, H, W\]"),
        ({"x": torch.rand(3, 4, 4)}, r"shape \(3, 4, 4\)"),
        ({"padding": "zeros"}, "padding is 'zeros', expected replicate or reflect"),
        ({"noise": -0.1}, "noise is -0.1, expected a number >= 0"),
        ({"noise": "much"}, "noise is 'much'"),
    ],
)
def test_refuses_what_it_cannot_do(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        augment(**{"x": images(), "generator": generator(), **arguments})  # type: ignore[arg-type]

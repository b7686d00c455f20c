"""The corruptions once more, one image at a time, in NumPy, SciPy and PIL: what the torch versions are compared with.

Written from the published recipe, on float64 images (H, W, 3) in 0..1 that lie on the levels k/255; the results are
uint8. Random kinds take a NumPy generator, so they agree with the torch versions in distribution only.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from published_parameters import published
from scipy import ndimage
from spatter_oracle import film

Array = np.ndarray


def stored(image: Array) -> Array:
    return np.uint8(np.clip(image, 0, 1) * 255)


def picture(image: Array) -> Image.Image:
    return Image.fromarray(np.uint8(np.rint(image * 255)))


def blurred(image: Array, sigma: float, **rule: object) -> Array:
    deviations = (sigma, sigma, 0)[: image.ndim]
    return ndimage.gaussian_filter(image, deviations, **({"mode": "nearest", "truncate": 4.0} | rule))


def gaussian_noise(image: Array, rng: np.random.Generator, sigma: float) -> Array:
    return stored(image + rng.normal(0, sigma, image.shape))


def shot_noise(image: Array, rng: np.random.Generator, photons: float) -> Array:
    return stored(rng.poisson(image * photons) / photons)


def impulse_noise(image: Array, rng: np.random.Generator, share: float) -> Array:
    hit, white = rng.random(image.shape) < share, rng.random(image.shape) < 0.5
    return stored(np.where(hit, white, image))


def speckle_noise(image: Array, rng: np.random.Generator, sigma: float) -> Array:
    return stored(image * (1 + rng.normal(0, sigma, image.shape)))


def gaussian_blur(image: Array, rng: np.random.Generator, sigma: float) -> Array:
    return stored(blurred(image, sigma))


def scatter(image: Array, offsets: Array, delta: int) -> Array:
    """In place: the scan from the last pixel to the first, each overwritten by its neighbour. offsets: (2, H, W)."""
    height, width = image.shape[:2]
    for row in range(height - delta, delta, -1):
        for column in range(width - delta, delta, -1):
            image[row, column] = image[row + offsets[0, row, column], column + offsets[1, row, column]]
    return image


def glass_blur(image: Array, rng: np.random.Generator, sigma: float, delta: float, passes: float) -> Array:
    levels = stored(blurred(image, sigma))
    for _ in range(int(passes)):
        scatter(levels, rng.integers(-int(delta), int(delta), (2, *image.shape[:2])), int(delta))
    return stored(blurred(levels / 255, sigma))


def defocus_blur(image: Array, rng: np.random.Generator, radius: float, softness: float) -> Array:
    reach, half = (8, 1) if radius <= 8 else (int(radius), 2)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    kernel = (np.hypot(x, y) <= radius + 1e-9).astype(float)
    taps = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * softness**2))
    for axis in (0, 1):
        kernel = ndimage.convolve1d(kernel, taps / taps.sum(), axis, mode="mirror")
    kernel /= (np.hypot(x, y) <= radius + 1e-9).sum()
    return stored(np.stack([ndimage.convolve(plane, kernel, mode="mirror") for plane in np.moveaxis(image, 2, 0)], 2))


def dragged(image: Array, radius: float, sigma: float, angle: float) -> Array:
    taps = np.arange(2 * int(radius) + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    rows, columns = (np.arange(size) for size in image.shape[:2])
    total = np.zeros_like(image)
    for tap, weight in zip(taps, weights / weights.sum(), strict=True):
        row = rows + int(np.ceil(tap * np.sin(np.radians(angle)) - 0.5))
        column = columns + int(np.ceil(tap * np.cos(np.radians(angle)) - 0.5))
        total += weight * image[row.clip(0, len(image) - 1)][:, column.clip(0, image.shape[1] - 1)]
    return total


def motion_blur(image: Array, rng: np.random.Generator, radius: float, sigma: float) -> Array:
    return stored(dragged(image, radius, sigma, rng.uniform(-45, 45)) + 1e-9)


def enlarged(image: Array, factor: float) -> Array:
    side = len(image)
    part = int(np.ceil(side / factor))
    start = (side - part) // 2
    large = ndimage.zoom(image[start : start + part, start : start + part], (factor, factor, 1), order=1)
    start = (len(large) - side) // 2
    return large[start : start + side, start : start + side]


def zoom_blur(image: Array, rng: np.random.Generator, end: float, step: float) -> Array:
    layers = [image, *(enlarged(image, factor) for factor in np.arange(1, end, step))]
    return stored(np.mean(layers, axis=0))


def snow(
    image: Array,
    rng: np.random.Generator,
    mean: float,
    deviation: float,
    zoom: float,
    threshold: float,
    radius: float,
    sigma: float,
    keep: float,
) -> Array:
    flakes = enlarged(rng.normal(mean, deviation, (*image.shape[:2], 1)), zoom)
    flakes[flakes < threshold] = 0
    flakes = stored(dragged(stored(flakes) / 255, radius, sigma, rng.uniform(-135, -45)) + 1e-9) / 255
    luma = image @ np.array([0.299, 0.587, 0.114])
    white = keep * image + (1 - keep) * np.maximum(image, 1.5 * luma[..., None] + 0.5)
    return stored(white + flakes + np.rot90(flakes, 2))


def plasma(side: int, decay: float, rng: np.random.Generator) -> Array:
    heights = np.zeros((side, side))
    step, amplitude = side, 100.0**2
    while step > 1:
        half = step // 2
        # The grid of this step; no point reads another one that is new.
        i, j = half * np.indices((side // half, side // half)).reshape(2, -1)
        middles = (i // half % 2 == 1) & (j // half % 2 == 1)
        edges = (i + j) // half % 2 == 1
        for points, away in (
            (middles, ((-1, -1), (-1, 1), (1, -1), (1, 1))),
            (edges, ((-1, 0), (1, 0), (0, -1), (0, 1))),
        ):
            row, column = i[points], j[points]
            around = [heights[(row + a * half) % side, (column + b * half) % side] for a, b in away]
            heights[row, column] = np.sum(around, 0) / 4 + rng.uniform(-amplitude, amplitude, len(row))
        step, amplitude = half, amplitude / decay**2
    return (heights - heights.min()) / np.ptp(heights)


def fog(image: Array, rng: np.random.Generator, thickness: float, decay: float) -> Array:
    side = len(image)
    clouds = plasma(int(2 ** np.ceil(np.log2(side))), decay, rng)[:side, :side, None]
    return stored((image + thickness * clouds) * image.max() / (image.max() + thickness))


def spatter(
    image: Array,
    rng: np.random.Generator,
    mean: float,
    deviation: float,
    blur: float,
    threshold: float,
    amount: float,
    kind: float,
) -> Array:
    liquid = blurred(rng.normal(mean, deviation, image.shape[:2]), blur)
    liquid[liquid < threshold] = 0
    if kind == 0:
        return stored(image + amount * film(liquid)[..., None] * np.array([175, 238, 238]) / 255)
    mud = blurred((liquid > threshold).astype(float), amount)
    mud[mud < 0.8] = 0
    return stored(image + mud[..., None] * (np.array([63, 42, 20]) / 255 - image))


def brightness(image: Array, rng: np.random.Generator, amount: float) -> Array:
    colours = rgb_to_hsv(image)
    colours[..., 2] = np.clip(colours[..., 2] + amount, 0, 1)
    return stored(hsv_to_rgb(colours) + 1e-9)


def saturate(image: Array, rng: np.random.Generator, factor: float, offset: float) -> Array:
    colours = rgb_to_hsv(image)
    colours[..., 1] = np.clip(colours[..., 1] * factor + offset, 0, 1)
    return stored(hsv_to_rgb(colours) + 1e-9)


def contrast(image: Array, rng: np.random.Generator, factor: float) -> Array:
    mean = image.mean((0, 1))
    return stored(mean + factor * (image - mean) + 1e-9)


def pixelate(image: Array, rng: np.random.Generator, share: float) -> Array:
    height, width = image.shape[:2]
    small = picture(image).resize((int(width * share), int(height * share)), Image.Resampling.BOX)
    return np.array(small.resize((width, height), Image.Resampling.BOX))


def jpeg_compression(image: Array, rng: np.random.Generator, quality: float) -> Array:
    file = io.BytesIO()
    picture(image).save(file, "JPEG", quality=int(quality))
    return np.array(Image.open(file))


def elastic_transform(
    image: Array, rng: np.random.Generator, strength: float, smoothness: float, jitter: float
) -> Array:
    side = len(image)
    middle, third = side // 2, side // 3
    points = middle + third * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    moved = points + rng.uniform(-jitter, jitter, points.shape)
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), points)
    rows, columns = np.indices(image.shape[:2])
    source = np.stack([columns, rows, np.ones_like(rows)], -1) @ back
    warped = [
        ndimage.map_coordinates(plane, [source[..., 1], source[..., 0]], order=1, mode="mirror")
        for plane in np.moveaxis(image, 2, 0)
    ]
    dx, dy = (
        strength * blurred(rng.uniform(-1, 1, image.shape[:2]), smoothness, mode="reflect", truncate=3.0)
        for _ in range(2)
    )
    moved_planes = [ndimage.map_coordinates(p, [rows + dy, columns + dx], order=1, mode="reflect") for p in warped]
    return stored(np.stack(moved_planes, 2))


def frost(image: Array, rng: np.random.Generator, share: float, weight: float, textures: list[Array]) -> Array:
    """textures: float64 (H, W, 3) in 0..1, at the size at which they are laid over the image."""
    texture = textures[rng.integers(len(textures))]
    top, left = (rng.integers(0, whole - part) for whole, part in zip(texture.shape[:2], image.shape[:2], strict=True))
    crop = texture[top : top + image.shape[0], left : left + image.shape[1]]
    return stored(share * image + weight * crop + 1e-9)


def shrunk_texture(texture: Array) -> Array:
    """At a fifth of its size, bilinear with the centres of the pixels aligned: the textures of CIFAR-10-C."""
    rows, columns = (5 * np.arange(size // 5) + 2 for size in texture.shape[:2])
    places = np.meshgrid(rows, columns, indexing="ij")
    return np.stack([ndimage.map_coordinates(plane, places, order=1) for plane in np.moveaxis(texture, 2, 0)], 2)


RECIPES: dict[str, Callable[..., Array]] = {
    recipe.__name__: recipe
    for recipe in (
        *(gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, fog),
        *(brightness, contrast, elastic_transform, pixelate, jpeg_compression),
        *(speckle_noise, gaussian_blur, spatter, saturate),
    )
}


def corrupt_images(images: Array, name: str, severity: int, seed: int, **options: object) -> Array:
    """uint8 (N, H, W, 3) to uint8 of the same shape."""
    rng = np.random.default_rng(seed)
    numbers = published(name, severity, images.shape[1])
    recipe = (RECIPES | {"frost": frost})[name]
    return np.stack([recipe(image / 255, rng, *numbers, **options) for image in images])

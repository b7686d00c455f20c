"""The parts that the corruptions are made of, each against a plain statement of the same thing."""

from __future__ import annotations

import io
from pathlib import Path

import corruption_oracle as oracle
import numpy as np
import pytest
import spatter_oracle
import torch
from corruption_images import pictures
from PIL import Image
from scipy import ndimage

from ttaq.data.corruptions import apply, corrupt, edges, elastic, frost, jpeg, motion, noise, smooth, weather
from ttaq.data.corruptions.draw import Draw
from ttaq.data.corruptions.glass import scatter_pixels
from ttaq.data.corruptions.ice import ice_crystals
from ttaq.data.corruptions.levels import nearest_level, truncate_to_level
from ttaq.data.corruptions.parameters import TABLES, table_of
from ttaq.data.corruptions.spatter import water_layer


def draw(seed: int = 0) -> Draw:
    return Draw(torch.Generator().manual_seed(seed), torch.device("cpu"))


def test_scattering_by_hand() -> None:
    """One row of a 5 x 5 image, delta 1: columns 4, 3, 2 are visited in this order (and rows 4, 3, 2, of which only
    row 2 moves here)."""
    image = torch.arange(25.0).view(1, 1, 5, 5)
    offsets = torch.zeros(1, 2, 5, 5, dtype=torch.int64)
    offsets[0, 1, 2, 2:5] = torch.tensor([0, 0, -1])
    offsets[0, 0, 2, 3] = -1
    # (2, 4) takes 13 from (2, 3); then (2, 3) takes 8 from (1, 3); (2, 2) stays.
    expected = image.clone()
    expected[0, 0, 2, 4], expected[0, 0, 2, 3] = 13, 8
    assert torch.equal(scatter_pixels(image, offsets, 1), expected)


@pytest.mark.parametrize(("height", "width", "delta"), [(32, 32, 1), (17, 23, 2), (24, 16, 4), (40, 40, 3)])
def test_scattering_is_the_sequential_scan(height: int, width: int, delta: int) -> None:
    generator = torch.Generator().manual_seed(delta)
    images = torch.rand(5, 3, height, width, generator=generator)
    offsets = torch.randint(-delta, delta, (5, 2, height, width), generator=generator)
    before = images.clone()
    got = scatter_pixels(images, offsets, delta)
    assert torch.equal(images, before)
    for image, offset, result in zip(images, offsets, got, strict=True):
        expected = oracle.scatter(image.permute(1, 2, 0).numpy().copy(), offset.numpy(), delta)
        assert np.array_equal(result.permute(1, 2, 0).numpy(), expected)


def test_scattering_follows_a_chain_through_the_whole_image() -> None:
    """All point to the pixel visited just before: everything becomes the first pixel's neighbour."""
    image = torch.arange(64.0 * 64).view(1, 1, 64, 64)
    offsets = torch.zeros(1, 2, 64, 64, dtype=torch.int64)
    offsets[:, 1] = 1
    with_end = scatter_pixels(image, offsets, 2)
    assert torch.equal(with_end[0, 0, 10, 3:63], torch.full((60,), image[0, 0, 10, 63].item()))


@pytest.mark.parametrize(("radius", "sigma"), [(6, 1.0), (9, 2.5), (20, 15.0)])
def test_smearing(radius: int, sigma: float) -> None:
    images = torch.rand(16, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    angles = torch.linspace(-180, 180, 16, dtype=torch.float64) + 0.123
    got = motion.smear(images, radius, sigma, angles)
    for image, angle, result in zip(images, angles, got, strict=True):
        expected = oracle.dragged(image.permute(1, 2, 0).double().numpy(), radius, sigma, float(angle))
        np.testing.assert_allclose(result.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_a_smeared_point_by_hand() -> None:
    """A point of light at column 5, dragged at 0 degrees: pixel j reads columns j, j+1, ..."""
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 5] = 1
    weights = np.exp(-(np.arange(3) ** 2) / 2)
    row = motion.smear(image, 1, 1.0, torch.zeros(1))[0, 0, 4]
    np.testing.assert_allclose(row[3:6].numpy(), weights[::-1] / weights.sum(), rtol=1e-6)
    assert row[6:].sum() == 0


@pytest.mark.parametrize(
    ("sigma", "border", "truncate"),
    [
        (0.0, "nearest", 4),
        (0.05, "nearest", 4),
        (0.4, "nearest", 4),
        (6, "nearest", 4),
        (6.4, "reflect", 3),
        (90, "reflect", 3),
    ],
)
def test_smoothing(sigma: float, border: str, truncate: float) -> None:
    planes = torch.rand(2, 3, 33, 20, generator=torch.Generator().manual_seed(0))
    expected = ndimage.gaussian_filter(planes.double().numpy(), (0, 0, sigma, sigma), mode=border, truncate=truncate)
    np.testing.assert_allclose(smooth.gaussian_smooth(planes, sigma, border, truncate).numpy(), expected, atol=2e-6)


def test_plasma() -> None:
    """Range 0..1, each map its own; heights spread as in the recursion point by point."""
    maps = weather.plasma(1000, 32, 2.0, draw())
    assert torch.equal(maps.amin((1, 2)), torch.zeros(1000))
    assert torch.equal(maps.amax((1, 2)), torch.ones(1000))
    rng = np.random.default_rng(0)
    expected = np.stack([oracle.plasma(32, 2.0, rng) for _ in range(100)])
    for step in (1, 4, 16):
        got = (maps - maps.roll(step, 2)).abs().mean()
        wanted = np.abs(expected - np.roll(expected, step, 2)).mean()
        assert float(got) == pytest.approx(wanted, rel=0.08)
    assert float(maps.mean()) == pytest.approx(expected.mean(), abs=0.03)


def liquids(side: int, deviation: float, blur: float) -> torch.Tensor:
    rng = np.random.default_rng(side)
    planes = ndimage.gaussian_filter(rng.normal(0.65, deviation, (8, side, side)), (0, blur, blur), mode="nearest")
    planes[planes < 0.69] = 0
    return torch.from_numpy((np.floor(planes.clip(0, 1) * 255) / 255).astype(np.float32))


@pytest.mark.parametrize(("side", "deviation", "blur"), [(32, 0.1, 0.7), (32, 0.3, 1.0), (64, 0.3, 3.0)])
def test_water(side: int, deviation: float, blur: float) -> None:
    liquid = liquids(side, deviation, blur)
    depth = (liquid * 255).round()
    edge = edges.canny_edges(depth, 50, 150)
    distance = edges.distance_to(edge, 20)
    levels = (distance * 12).floor()
    flat = edges.equalize_histogram(levels)
    for i in range(len(liquid)):
        assert np.array_equal(edge[i].numpy(), spatter_oracle.canny(depth[i].double().numpy(), 50, 150))
        np.testing.assert_allclose(distance[i].numpy(), spatter_oracle.chamfer(edge[i].numpy(), 20), atol=1e-5)
        assert np.array_equal(flat[i].numpy(), spatter_oracle.equalized(levels[i].int().numpy()))
        expected = spatter_oracle.film(depth[i].double().numpy() / 255 + 1e-9)
        np.testing.assert_allclose(water_layer((depth[i : i + 1] + 0.01) / 255)[0].numpy(), expected, atol=1e-6)
    assert edge.any()


def test_water_without_liquid() -> None:
    assert torch.equal(water_layer(torch.zeros(2, 32, 32)), torch.zeros(2, 32, 32))
    flat = torch.full((1, 4, 4), 7.0)
    assert torch.equal(edges.equalize_histogram(flat), flat)


def test_quantization_tables_are_libjpegs() -> None:
    for quality in (7, 25, 49, 50, 80, 100):
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality)
        tables = Image.open(file).quantization
        assert sorted(jpeg.quantization_table(jpeg.LUMINANCE, quality)) == sorted(tables[0])
        assert sorted(jpeg.quantization_table(jpeg.CHROMINANCE, quality)) == sorted(tables[1])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (45, 37), (17, 64)])
@pytest.mark.parametrize("quality", [7, 40, 80])
def test_jpeg_against_pil(height: int, width: int, quality: int) -> None:
    images = pictures(224, 6)[:, :height, :width]
    levels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
    got = jpeg.compress(levels, quality).permute(0, 2, 3, 1).numpy()
    expected = np.stack([oracle.jpeg_compression(image / 255, None, quality) for image in images])
    error = ((got - expected) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 51


def test_affine_sources_by_hand() -> None:
    """The triangle moves by (+2, -1): every pixel comes from (x - 2, y + 1)."""
    corners = torch.tensor([[[6.0, 6.0], [6.0, 2.0], [2.0, 2.0]]])
    x, y = elastic.affine_sources(corners, corners + torch.tensor([2.0, -1.0]), 4, 5)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    torch.testing.assert_close(x[0], columns - 2)
    torch.testing.assert_close(y[0], rows + 1)


@pytest.mark.parametrize(("mirror_pixels", "mode"), [(True, "mirror"), (False, "reflect")])
def test_sampling(mirror_pixels: bool, mode: str) -> None:
    images = torch.rand(2, 3, 12, 17, generator=torch.Generator().manual_seed(0))
    x, y = draw().uniform(-8, 25, 2, 12, 17), draw(1).uniform(-8, 20, 2, 12, 17)
    got = elastic.sample(images, x, y, mirror_pixels).numpy()
    for n in range(2):
        for c in range(3):
            expected = ndimage.map_coordinates(
                images[n, c].double(), [y[n].double(), x[n].double()], order=1, mode=mode
            )
            np.testing.assert_allclose(got[n, c], expected, atol=1e-5)


def test_levels() -> None:
    levels = torch.arange(256) / 255
    for to_level in (truncate_to_level, nearest_level):
        assert torch.equal(to_level(levels), levels)
        assert torch.equal(to_level(torch.tensor([-0.5, 1.5])), torch.tensor([0.0, 1.0]))
    between = torch.tensor([10.9, 10.4]) / 255
    assert torch.equal(truncate_to_level(between) * 255, torch.tensor([10.0, 10.0]))
    assert torch.equal((nearest_level(between) * 255).round(), torch.tensor([11.0, 10.0]))


@pytest.mark.parametrize(
    ("height", "width", "table"),
    [(32, 32, "cifar"), (64, 64, "cifar"), (64, 65, "imagenet"), (96, 20, "imagenet"), (224, 224, "imagenet")],
)
def test_table(height: int, width: int, table: str) -> None:
    assert table_of(height, width) == table


@pytest.mark.parametrize("name", sorted(apply.KINDS))
def test_docstring_states_the_parameters(name: str) -> None:
    text = apply.KINDS[name].__doc__ or ""
    for table, factor in (("cifar", 1), ("imagenet", 224 / 244 if name == "elastic_transform" else 1)):
        for row in TABLES[table][name]:
            numbers = [f"{value * factor:.6g}" for value in row]
            assert (f"({', '.join(numbers)})" if len(numbers) > 1 else numbers[0]) in " ".join(text.split())
    assert "Differs from the original" in text


def test_impulses_are_black_and_white_alike() -> None:
    result = noise.impulse_noise(torch.full((4, 3, 64, 64), 0.5), (0.27,), draw())
    share = [float((result == value).float().mean()) for value in (0, 1)]
    assert share == pytest.approx([0.135, 0.135], abs=0.01)


@pytest.mark.parametrize(("stride", "side"), [(5, 32), (1, 200)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_texture_crops_are_pieces_of_all_textures(stride: int, side: int, mode: str, tmp_path: Path) -> None:
    """In these textures red tells the file, green the row, blue the column."""
    rows, columns = np.indices((220, 250))
    for number in range(1, 6):
        pixels = np.stack((np.full_like(rows, number), rows, columns, rows)[: len(mode)], -1)
        Image.fromarray(np.uint8(pixels)).save(tmp_path / f"frost{number}.png")
    crops = (frost.texture_crops(60, side, side, stride, frost.texture_files(tmp_path), draw()) * 255).round().long()
    assert set(crops[:, 0].unique().tolist()) == {1, 2, 3, 4, 5}
    steps = stride * torch.arange(side)
    top, left = crops[:, 1, 0, 0], crops[:, 2, 0, 0]
    assert torch.equal(crops[:, 1], (top[:, None] + steps)[:, :, None].expand(-1, -1, side))
    assert torch.equal(crops[:, 2], (left[:, None] + steps)[:, None, :].expand(-1, side, -1))
    assert set(((top - stride // 2) % stride).tolist()) == {0}
    assert len(set(zip(top.tolist(), left.tolist(), strict=True))) > 30


def test_drawn_frost() -> None:
    ice = ice_crystals(64, 32, 32, 5, draw())
    assert ice.shape == (64, 3, 32, 32)
    assert ice.min() >= 0
    assert ice.max() <= 1
    assert ice.mean((0, 2, 3)).tolist() == pytest.approx([0.55, 0.63, 0.68], abs=0.05)
    assert len({tuple(image.flatten()[:9].tolist()) for image in ice}) == 64


def test_drawn_frost_is_as_bright_as_the_real(data_folder: Path) -> None:
    real = frost.texture_crops(128, 32, 32, 5, frost.texture_files(data_folder / "frost"), draw())
    drawn = ice_crystals(128, 32, 32, 5, draw())
    for figure in (torch.mean, torch.std):
        assert float(figure(drawn)) == pytest.approx(float(figure(real)), abs=0.03)
    clean = torch.from_numpy(np.ascontiguousarray(pictures(32, 192)[:64].transpose(0, 3, 1, 2)))
    damage = [
        (corrupt(clean, "frost", 5, torch.Generator().manual_seed(0), frost_textures=folder) - clean / 255).abs().mean()
        for folder in (None, data_folder / "frost")
    ]
    assert float(damage[0]) == pytest.approx(float(damage[1]), rel=0.2)

"""Corrupted sets on the disk: what is in them, that they are always the same, and what is refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corruption_images import pictures
from PIL import Image

from ttaq.data import ImageFolder, Images, open_image_folder, open_imagenet_c, read_cifar_c
from ttaq.data.corrupted_sets import Noise, write_cifar_c, write_imagenet_c
from ttaq.data.corrupted_sets_jobs import Workers
from ttaq.data.corruptions import corrupt
from ttaq.errors import DataError, InputError

NOISE = Noise(3)
KINDS = ("gaussian_noise", "contrast")
# With a last chunk that is not full, and rows of every chunk that are left out.
CHUNK, COUNT = 16, 40
ROWS = torch.tensor([1, 2, 5, 15, 16, 30, 39])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttaq.data.corrupted_sets._CHUNK", CHUNK)


def cifar() -> Images:
    pixels = torch.from_numpy(np.ascontiguousarray(pictures(32, 192)[:COUNT].transpose(0, 3, 1, 2)))
    return Images(pixels, torch.arange(COUNT) % 10)


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    """Three photographs of 227 pixels in two of three classes."""
    root = tmp_path / "clean"
    for name, image in zip(("bee/one.jpg", "bee/two.png", "ant/one.png"), pictures(227, 3), strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name)
    (root / "wnids.txt").write_text("dog\nbee yellow and black\nant\n")
    return open_image_folder(root, "crop")


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_cifar_c_is_what_corrupt_gives(tmp_path: Path) -> None:
    images = cifar()
    written = write_cifar_c(tmp_path, images, ROWS, KINDS, NOISE, num_classes=10)
    assert (written.folder, written.made, written.kept) == (tmp_path / "CIFAR-10-C", 2 * 5 * len(ROWS), 0)
    assert sorted(content(written.folder)) == ["contrast.npy", "gaussian_noise.npy", "labels.npy", "settings.json"]
    assert np.load(written.folder / "labels.npy").tolist() == images.labels[ROWS].tolist() * 5
    for severity in (1, 3, 5):
        read = read_cifar_c(tmp_path, "contrast", severity)
        expected = corrupt(images.images[ROWS], "contrast", severity, torch.Generator())
        assert torch.equal(read.images, (expected * 255).round().byte())
        assert torch.equal(read.labels, images.labels[ROWS])
        noisy = read_cifar_c(tmp_path, "gaussian_noise", severity).images
        chunks = [NOISE.corrupt(part, "gaussian_noise", severity, str(CHUNK * place))
                  for place, part in enumerate(images.images.split(CHUNK))]  # fmt: skip
        assert np.array_equal(noisy.permute(0, 2, 3, 1).numpy(), np.concatenate(chunks)[ROWS.numpy()])


def test_noise_is_that_of_corrupt_and_differs_where_it_should() -> None:
    images = cifar().images[:1]
    base = (images, "gaussian_noise", 5, "0")
    result = NOISE.corrupt(*base)
    assert np.array_equal(result, NOISE.corrupt(*base))
    spread = (result.astype(float) - images.permute(0, 2, 3, 1).numpy()).std()
    assert 20 < spread < 25.5  # sigma is 0.1, which is 25.5 levels before clipping
    for other in (Noise(4).corrupt(*base), NOISE.corrupt(*base[:3], "16"), NOISE.corrupt(*base[:2], 4, "0")):
        assert not np.array_equal(result, other)


def test_an_image_does_not_depend_on_the_others(tmp_path: Path) -> None:
    write_cifar_c(tmp_path / "some", cifar(), ROWS, KINDS, NOISE, num_classes=100)
    write_cifar_c(tmp_path / "all", cifar(), torch.arange(COUNT), KINDS, NOISE, num_classes=100)
    for kind in KINDS:
        whole = read_cifar_c(tmp_path / "all", kind, 4, num_classes=100)
        some = read_cifar_c(tmp_path / "some", kind, 4, num_classes=100)
        assert torch.equal(whole.images[ROWS], some.images)
        assert torch.equal(whole.labels[ROWS], some.labels)


def test_imagenet_c_is_what_corrupt_gives(folder: ImageFolder, tmp_path: Path) -> None:
    written = write_imagenet_c(tmp_path, folder, KINDS, NOISE, severities=(2, 5))
    assert (written.made, written.kept) == (2 * 2 * 3, 0)
    clean = folder.read()
    for severity in (2, 5):
        for kind in KINDS:
            stored = open_imagenet_c(tmp_path, kind, severity)
            assert stored.classes == ("dog", "bee", "ant")
            assert [f"{file.parent.name}/{file.name}" for file in stored.files] == [
                *("bee/one.png", "bee/two.png", "ant/one.png")
            ]
            read = stored.read()
            assert torch.equal(read.labels, clean.labels)
            names = ("bee/one", "bee/two", "ant/one")
            for image, source, name in zip(read.images, clean.images, names, strict=True):
                expected = NOISE.corrupt(source[None], kind, severity, name)[0]
                assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_jpeg_on_request(folder: ImageFolder, tmp_path: Path) -> None:
    write_imagenet_c(tmp_path, folder, ("contrast",), NOISE, severities=(1,), format="jpeg")
    files = sorted((tmp_path / "ImageNet-C" / "contrast" / "1").rglob("*.*"))
    assert [file.name for file in files] == ["one.JPEG", "one.JPEG", "two.JPEG"]
    expected = NOISE.corrupt(folder.read().images[1:2], "contrast", 1, "bee/two")[0]
    again = tmp_path / "again.jpg"
    Image.fromarray(expected).save(again, quality=85)
    with Image.open(files[-1]) as image, Image.open(again) as wanted:
        assert image.format == "JPEG"
        assert image.quantization == wanted.quantization
        assert np.array_equal(np.asarray(image), np.asarray(wanted))
    assert open_imagenet_c(tmp_path, "contrast", 1).read().images.shape == (3, 3, 224, 224)


def test_frost_takes_the_textures(tmp_path: Path) -> None:
    for number in range(1, 6):
        Image.new("RGB", (200, 200), (40 * number,) * 3).save(tmp_path / f"frost{number}.png")
    textures = Noise(0, tmp_path)
    write_cifar_c(tmp_path / "a", cifar(), ROWS, ("fog",), Noise(0))
    write_cifar_c(tmp_path / "a", cifar(), ROWS, ("frost",), textures)  # There was no frost to disagree with.
    write_cifar_c(tmp_path / "a", cifar(), ROWS, ("contrast",), Noise(0))
    mean = read_cifar_c(tmp_path / "a", "frost", 1).images.float().mean()
    assert mean > cifar().images[ROWS].float().mean() + 5
    with pytest.raises(DataError, match=r"made with other settings: frost \(there textures \w+, now procedural\)"):
        write_cifar_c(tmp_path / "a", cifar(), ROWS, ("frost",), Noise(0))
    with pytest.raises(DataError, match="has no frost1"):
        write_cifar_c(tmp_path / "a", cifar(), ROWS, ("frost",), Noise(0, tmp_path / "a"))


def write_all(out: Path, folder: ImageFolder) -> None:
    """Both layouts."""
    write_cifar_c(out, cifar(), ROWS, KINDS, NOISE)
    write_imagenet_c(out, folder, KINDS, NOISE, severities=(1, 5))


def test_any_number_of_workers_makes_the_same(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    for workers in (1, 2):
        write_cifar_c(tmp_path / str(workers), cifar(), ROWS, KINDS, NOISE, workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert torch.get_num_threads() == threads


class Interruption(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 4, 9, 13])
def test_interrupted_anywhere_and_continued(
    after: int, folder: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of number `after` is written halfway."""
    write_all(tmp_path / "whole", folder)
    replace, left = os.replace, [after]

    def stop(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            Path(source).rename(Path(source).with_name(".half.tmp"))
            raise Interruption
        replace(source, target)

    for write in (
        lambda: write_cifar_c(tmp_path / "parts", cifar(), ROWS, KINDS, NOISE),
        lambda: write_imagenet_c(tmp_path / "parts", folder, KINDS, NOISE, severities=(1, 5)),
    ):
        left[0] = after
        monkeypatch.setattr(os, "replace", stop)
        with pytest.raises(Interruption):
            write()
        monkeypatch.setattr(os, "replace", replace)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.[pn][np][gy]")}
        written = write()
        assert written.made + written.kept in (2 * 5 * len(ROWS), 2 * 2 * 3)
        assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.exists())
        again = write()
        assert (again.made, again.kept) == (0, written.made + written.kept)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_set_grows(folder: ImageFolder, tmp_path: Path) -> None:
    """Corruptions and severities may come in any order and number."""
    write_all(tmp_path / "once", folder)
    for kind in reversed(KINDS):
        write_cifar_c(tmp_path / "grown", cifar(), ROWS, (kind,), NOISE)
        for severity in (5, 1):
            write_imagenet_c(tmp_path / "grown", folder, (kind,), NOISE, severities=(severity,))
    assert content(tmp_path / "grown") == content(tmp_path / "once")


def test_progress_counts_what_is_left(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    write_cifar_c(tmp_path, cifar(), ROWS, ("fog",), NOISE)
    write_cifar_c(tmp_path, cifar(), ROWS, ("fog", "contrast"), NOISE, progress=lambda *step: seen.append(step))
    assert seen[0] == (4, 35, "contrast")  # four of the rows lie in the first chunk
    assert seen[-1] == (35, 35, "contrast")
    assert len(seen) == 5 * 3


def test_another_set_is_not_continued(folder: ImageFolder, tmp_path: Path) -> None:
    def cifar_with(images: Images | None = None, rows: Any = ROWS, seed: int = 0, **settings: Any) -> None:
        write_cifar_c(tmp_path, images or cifar(), rows, ("contrast",), Noise(seed), settings=settings)

    def folder_with(images: ImageFolder, format: str = "png", **settings: Any) -> None:
        write_imagenet_c(tmp_path, images, ("contrast",), Noise(), severities=(1,), format=format, settings=settings)

    cifar_with(images=None, split="all")
    folder_with(folder, split="all")
    before = content(tmp_path)
    darker = Images(cifar().images // 2, cifar().labels)
    resized = open_image_folder(tmp_path / "clean", "resize256crop224")
    for attempt, name in (
        (lambda: cifar_with(seed=1, split="all"), r"seed \(there 0, now 1\)"),
        (lambda: cifar_with(split="report"), r"split \(there all, now report\)"),
        (lambda: cifar_with(darker, split="all"), r"data \(there \w+, now \w+\)"),
        (lambda: folder_with(folder.take(torch.tensor([0])), split="all"), r"data \("),
        (lambda: folder_with(folder, "jpeg", split="all"), r"format \(there png, now jpeg\)"),
        (lambda: folder_with(resized, split="all"), r"preprocessing \(there crop, now resize256crop224\)"),
    ):
        with pytest.raises(DataError, match=rf"-C was made with other settings: {name}.*; give the same ones"):
            attempt()
    assert content(tmp_path) == before
    (tmp_path / "CIFAR-10-C" / "settings.json").unlink()
    with pytest.raises(DataError, match=r"holds contrast.npy but no settings.json, so it was not made by this command"):
        cifar_with()
    for text, message in (("{", "is not JSON"), ("[]", "holds no settings")):
        (tmp_path / "CIFAR-10-C" / "settings.json").write_text(text)
        with pytest.raises(DataError, match=message):
            cifar_with()


REFUSED: list[tuple[Callable[[Path, ImageFolder], Any], type[Exception], str]] = [
    (lambda out, _: write_cifar_c(out, cifar(), ROWS, ("fog", "smog"), NOISE), InputError, "unknown corruption 'smog'"),
    (lambda out, _: write_cifar_c(out, cifar(), ROWS, (), NOISE), InputError, "expected some of: gaussian_noise"),
    (lambda out, _: write_cifar_c(out, cifar(), ROWS[:0], KINDS, NOISE), InputError, "expected at least one"),
    (lambda out, _: write_cifar_c(out, cifar(), ROWS.flip(0), KINDS, NOISE), InputError, r"rows \[39, 30.*ascending"),
    (lambda out, _: write_cifar_c(out, cifar(), ROWS + 1, KINDS, NOISE), InputError, "of 0 to 39"),
    (lambda out, _: write_cifar_c(out, cifar(), ROWS, KINDS, NOISE, workers=0), InputError, "workers is 0"),
    (
        lambda out, _: write_cifar_c(out, Images(torch.zeros(1, 3, 8, 8).byte(), torch.zeros(1)), ROWS, KINDS, NOISE),
        *(InputError, r"shape \(1, 3, 8, 8\), expected \(N, 3, 32, 32\)"),
    ),
    (lambda out, f: write_imagenet_c(out, f, KINDS, NOISE, severities=(6,)), InputError, r"severities are \[6\]"),
    (lambda out, f: write_imagenet_c(out, f, KINDS, NOISE, severities=()), InputError, "expected some of 1 to 5"),
    (lambda out, f: write_imagenet_c(out, f, KINDS, NOISE, format="gif"), InputError, "'gif', expected png or jpeg"),
    (
        lambda out, f: write_imagenet_c(out, open_image_folder(out / "clean", "crop", size=64), KINDS, NOISE),
        *(InputError, "3 images of size 64, expected at least 1 of size 224"),
    ),
    (lambda out, f: write_imagenet_c(out, f.take(torch.tensor([]).long()), KINDS, NOISE), InputError, "got 0 images"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[row[2] for row in REFUSED])
def test_refused(
    call: Callable[[Path, ImageFolder], Any], error: type, message: str, folder: ImageFolder, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        call(tmp_path, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["clean"]


def test_names_that_the_layout_cannot_hold(folder: ImageFolder, tmp_path: Path) -> None:
    twin = tmp_path / "clean" / "bee" / "deeper" / "two.jpg"
    twin.parent.mkdir()
    Image.new("RGB", (227, 227)).save(twin)
    with pytest.raises(DataError, match=r"two\.(png|jpg) and .*two\.(png|jpg) would both become bee/two; rename one"):
        write_imagenet_c(tmp_path, open_image_folder(tmp_path / "clean", "crop"), KINDS, NOISE)
    (tmp_path / "clean" / "wnids.txt").unlink()
    (tmp_path / "clean" / "bee").rename(tmp_path / "clean" / "bumble bee")
    with pytest.raises(DataError, match=r"the class 'bumble bee' has a space"):
        write_imagenet_c(tmp_path, open_image_folder(tmp_path / "clean", "crop"), KINDS, NOISE)


def test_damaged_image_is_named_and_the_rest_kept(folder: ImageFolder, tmp_path: Path) -> None:
    damaged = folder.files[1]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-2000])
    with pytest.raises(DataError, match=r"decode_image: cannot read .*bee/two\.png.*replace the file or remove it"):
        write_imagenet_c(tmp_path, folder, ("contrast",), NOISE, severities=(1,))
    damaged.write_bytes(whole)
    written = write_imagenet_c(tmp_path, folder, ("contrast",), NOISE, severities=(1,))
    assert (written.made, written.kept) == (2, 1)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, arrays: Any, length: int | None = None) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("ttaq.data.corrupted_sets_jobs.write_array", full)
        with pytest.raises(DataError, match=r"cannot write .*CIFAR-10-C: No space left on device; what is finished st"):
            write_cifar_c(tmp_path, cifar(), ROWS, KINDS, NOISE)
    assert not list(tmp_path.rglob("*.tmp"))
    assert write_cifar_c(tmp_path, cifar(), ROWS, KINDS, NOISE).made == 2 * 5 * len(ROWS)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write .*file/CIFAR-10-C: Not a directory"):
        write_cifar_c(tmp_path / "file", cifar(), ROWS, KINDS, NOISE)


class Task:
    """A job that fails in the way its name says."""

    def __init__(self, how: str, count: int = 1) -> None:
        self.how, self.count = how, count

    def run(self) -> None:
        if self.how == "threads":
            assert torch.get_num_threads() == 1
        if self.how == "data":
            raise DataError("this image")
        if self.how == "disk":
            raise OSError(errno.ENOSPC, "full", "somewhere")
        if self.how == "killed":
            os._exit(9)


def test_what_happens_in_a_worker_is_heard() -> None:
    with Workers(2) as pool:
        assert sorted(pool.run([Task("threads", count) for count in range(20)])) == list(range(20))
        with pytest.raises(DataError, match="this image"):
            list(pool.run([Task("fine"), Task("data"), Task("fine")]))
        with pytest.raises(OSError, match="somewhere") as error:
            list(pool.run([Task("disk")]))
        assert error.value.errno == errno.ENOSPC
        with pytest.raises(DataError, match=r"worker process was ended from outside.*run the same command again"):
            list(pool.run([Task("killed"), Task("fine")]))

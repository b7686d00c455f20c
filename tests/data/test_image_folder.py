"""Folders of images: labels, order, subsets, batches in threads, and folders that are no use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from ttaq.data import ImageFolder, Images, calibration_indices, imagenet_split, open_image_folder
from ttaq.data.image_batches import ImageBatches
from ttaq.errors import DataError, InputError


def put(path: Path, level: int = 0, size: tuple[int, int] = (6, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes, seven images; the grey level of each is its place."""
    names = ["ant/b.png", "ant/deep/er.jpeg", "bee/A.PNG", "bee/b.png", "bee/c.bmp", "cat/1.png", "cat/2.png"]
    for level, name in enumerate(names):
        put(tmp_path / "set" / name, level)
    for name in ("set/readme.txt", "set/bee/list.csv", "set/cat/.hidden.png"):
        (tmp_path / name).write_text("not an image")
    (tmp_path / "set" / ".cache").mkdir()
    return tmp_path / "set"


def open_small(root: Path, **options) -> ImageFolder:
    return open_image_folder(root, "none", size=6, **options)


def levels(batches) -> list[list[int]]:
    return [images[:, 0, 0, 0].tolist() for images, _ in batches]


def test_folders_in_alphabetical_order_are_the_classes(root: Path) -> None:
    folder = open_small(root)
    assert folder.classes == ("ant", "bee", "cat")
    assert folder.labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert folder.labels.dtype == torch.int64
    assert len(folder) == 7
    assert [file.relative_to(root).as_posix() for file in folder.files][:3] == [
        "ant/b.png",
        "ant/deep/er.jpeg",
        "bee/A.PNG",
    ]


@pytest.mark.parametrize("where", ["root", "parent", "argument", "names"])
def test_index_gives_the_order_of_the_classes(root: Path, where: str) -> None:
    names = ["dog", "cat", "ant", "bee"]
    home = {"root": root, "parent": root.parent}.get(where, root.parent)
    file = home / ("order.txt" if where == "argument" else "wnids.txt")
    if where != "names":
        file.write_text("".join(f"{name} a comment\n" for name in names) + "\n")
    classes = {"argument": file, "names": names}.get(where)
    folder = open_small(root, classes=classes)
    assert folder.classes == tuple(names)
    assert folder.labels.tolist() == [1, 1, 2, 2, 3, 3, 3]
    assert levels(folder.batches(7)) == [[5, 6, 0, 1, 2, 3, 4]]


def test_batches_keep_the_order_with_any_number_of_threads(root: Path) -> None:
    folder = open_small(root)
    for workers in (1, 4):
        for batch_size, expected in ((3, [[0, 1, 2], [3, 4, 5], [6]]), (7, [[*range(7)]]), (100, [[*range(7)]])):
            batches = folder.batches(batch_size, workers=workers)
            assert len(batches) == len(expected)
            assert levels(batches) == expected
            assert levels(batches) == expected
    images, labels = next(iter(folder.batches(3)))
    assert images.shape == (3, 3, 6, 6)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 1]
    whole = folder.read()
    assert isinstance(whole, Images)
    assert torch.equal(whole.labels, folder.labels)


def test_subsets(root: Path) -> None:
    folder = open_small(root)
    taken = folder.take(torch.tensor([6, 0]))
    assert (levels(taken.batches(2)), taken.labels.tolist()) == ([[6, 0]], [2, 0])
    drawn = folder.sample(4, seed=5)
    assert levels(drawn.batches(4)) == [calibration_indices(7, 4, 5).tolist()]
    assert levels(folder.sample(4, seed=6).batches(4)) != levels(drawn.batches(4))
    some = [file for file in folder.files if file.stem != "b"]
    chosen = folder.choose(imagenet_split(some, "report"))
    assert sorted(chosen.files) == sorted(imagenet_split(some, "report"))
    assert chosen.labels.tolist() == [folder.classes.index(file.relative_to(root).parts[0]) for file in chosen.files]
    assert len(folder.take(torch.tensor([], dtype=torch.int64)).batches(2)) == 0
    assert list(folder.take(torch.tensor([], dtype=torch.int64)).batches(2)) == []


def test_random_crops_depend_on_the_seed_and_the_image_only(tmp_path: Path) -> None:
    for place in range(5):
        path = tmp_path / "set" / "only" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").save(path)
    folder = open_image_folder(tmp_path / "set", "crop", size=10)
    first = folder.read(crop_seed=1).images
    assert torch.equal(torch.cat([images for images, _ in folder.batches(2, workers=3, crop_seed=1)]), first)
    assert not torch.equal(folder.read(crop_seed=2).images, first)
    tops = first[:, 0, 0, 0]
    assert len(tops.unique()) > 1
    centre = folder.read().images
    assert (centre[:, 0, 0, 0] == 123).all()


class Counted:
    """A decoder that notes what was asked for."""

    def __init__(self, fails_at: int = -1) -> None:
        self.asked: list[int] = []
        self.fails_at = fails_at

    def __call__(self, index: int) -> torch.Tensor:
        self.asked.append(index)
        if index == self.fails_at:
            raise DataError(f"cannot read image {index}")
        return torch.full((3, 1, 1), index % 256, dtype=torch.uint8)


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ttaq-decode")]


def test_decoding_stays_at_most_two_batches_ahead_and_ends_with_the_pass() -> None:
    decode = Counted()
    passing = iter(ImageBatches(decode, torch.zeros(1000, dtype=torch.int64), 10, workers=3))
    for seen in (1, 2, 3):
        next(passing)
        assert len(decode.asked) <= 10 * (seen + 1) + 10
    assert decoding_threads()
    passing.close()
    assert not decoding_threads()
    assert len(decode.asked) <= 50


def test_error_comes_in_its_batch_and_ends_the_threads() -> None:
    passing = iter(ImageBatches(Counted(fails_at=25), torch.arange(100), 10))
    assert [labels[0].item() for _, labels in (next(passing), next(passing))] == [0, 10]
    with pytest.raises(DataError, match="cannot read image 25"):
        next(passing)
    assert not decoding_threads()


def test_truncated_image_is_named(root: Path) -> None:
    path = root / "bee" / "b.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"cannot read .*bee/b\.png"):
        list(open_small(root).batches(2))


def clear(root: Path) -> None:
    for file in root.rglob("*.*"):
        if file.is_file():
            file.unlink()


def flatten(root: Path) -> Path:
    return put(root.parent / "flat" / "one.png").parent


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: open_small(root / "absent"), "there is no folder .*absent"),
        (lambda root: open_small(root / "ant" / "b.png"), "cannot list .*b.png"),
        (lambda root: open_small(flatten(root)), "is only files, such as one.png; expected one folder per class"),
        (lambda root: open_small((root / ".cache").resolve()), "is empty; expected one folder per class"),
        (
            lambda root: (clear(root), open_small(root)),
            "the 3 folders of .* hold no image; files of images end in .jpg",
        ),
        (
            lambda root: open_small(root, classes=["ant", "bee"]),
            "the folder cat of .* is not among the 2 classes of the cl",
        ),
        (lambda root: open_small(root, classes=[]), "the classes given has no names"),
        (lambda root: open_small(root, classes=["a", "b", "a"]), "names 'a' twice, as class 0 and as class 2"),
        (
            lambda root: open_small(root, classes=root / "none.txt"),
            "cannot read .*none.txt, expected text with one class",
        ),
    ],
)
def test_folders_of_no_use(root: Path, make: Callable[[Path], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ant\nbee\n", r"the folder cat of .*set is not among the 2 classes of .*wnids\.txt"),
        (b"ant\n\nbee\ncat\n", r"line 2 of .*wnids\.txt is empty"),
        (b"ant\nbee\ncat\nbee\n", "names 'bee' twice, as class 1 and as class 3"),
        (b"\n \n", r"wnids\.txt has no names"),
        (b"\xff\xfe\x00", r"cannot read .*wnids\.txt"),
    ],
)
def test_index_files_of_no_use(root: Path, content: bytes, message: str) -> None:
    (root / "wnids.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_small(root)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda root: open_image_folder(root, "resize"),
            "preprocessing is 'resize', expected one of none, crop, resize256",
        ),
        (lambda root: open_image_folder(root, "none", size=0), "size is 0"),
        (lambda root: open_small(root).batches(0), "batch_size is 0"),
        (lambda root: open_small(root).batches(1, workers=0), "workers is 0"),
        (lambda root: open_small(root).batches(1, crop_seed=0), "preprocessing 'none' crops nothing"),
        (lambda root: open_small(root).sample(8, seed=0), "count is 8, expected 1 to 7"),
        (lambda root: open_small(root).choose([root / "ant" / "z.png"]), "z.png is not one of its 7 files"),
        (lambda root: open_small(root).take(torch.tensor([], dtype=torch.int64)).read(), "there are no images to read"),
    ],
)
def test_options_of_no_use(root: Path, make: Callable[[Path], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(root)


def test_real_folders(data_folder: Path) -> None:
    images = open_image_folder(data_folder / "imagenet" / "val", "crop")
    assert (len(images), len(images.classes), len(images.labels.unique())) == (1300, 1000, 725)
    assert len(images.choose(imagenet_split(images.files, "validate"))) == 300
    calibration = open_image_folder(data_folder / "imagenet" / "train", "crop")
    assert calibration.labels.tolist() == list(range(1000))
    assert calibration.sample(8, seed=0).read(crop_seed=0).images.shape == (8, 3, 224, 224)

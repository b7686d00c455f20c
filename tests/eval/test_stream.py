"""Streams: what decides which images come, and that nothing else does."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ttaq.errors import DataError, InputError
from ttaq.eval.datasets import calibration_images, open_pool
from ttaq.eval.domains import Domains
from ttaq.eval.stream import Stream, differing_flags, parse_description

SMALL = Stream("digits", corruptions=("gaussian_noise", "fog"), images=30, batch_size=8)


def changed(**flags: object) -> Stream:
    return replace(SMALL, **flags)  # type: ignore[arg-type]


def all_of(domains: Domains, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels, _ = zip(*domains.batches(index), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_the_description_holds_every_flag_and_reads_back() -> None:
    flags = parse_description(str(SMALL))
    assert list(flags) == [field.name for field in fields(Stream)]
    assert flags["corruptions"] == "gaussian_noise,fog"
    assert flags["frost"] == "unused"
    assert parse_description(str(changed(corruptions=("frost",), images=None)))["frost"] == "procedural"
    assert (
        parse_description(str(changed(dataset="cifar10", source="stored", corruptions=("frost",))))["frost"] == "stored"
    )
    with pytest.raises(InputError, match="not a stream description"):
        parse_description("nothing of the kind")


@pytest.mark.parametrize(
    "flags",
    [
        {"dataset": "cifar10"},
        {"corruptions": ("fog",)},
        {"severity": 1},
        {"images": 3},
        {"split": "validate"},
        {"batch_size": 2},
        {"setting": "reset_each_shift"},
        {"dataset": "cifar100", "source": "stored"},
        {"rounds": 2},
        {"delta": 0.1},
        {"tail": 0.5},
        {"batch_size": 1, "window": 4},
        {"setting": "ccc", "length": 3},
        {"dataset": "imagenet", "preprocessing": "resize256crop224"},
    ],
)
def test_every_flag_but_the_seed_makes_another_stream(flags: dict[str, object]) -> None:
    assert {text.split(" ")[0] for text in differing_flags(str(SMALL), str(changed(**flags)))} >= flags.keys()
    assert differing_flags(str(SMALL), str(changed(seed=5))) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"dataset": "mnist"}, "unknown dataset 'mnist', expected one of: digits"),
        ({"corruptions": ("smoke",)}, "unknown corruption 'smoke'"),
        ({"corruptions": ()}, "corruptions is empty"),
        ({"corruptions": ("fog", "fog")}, "at most once"),
        ({"severity": 6}, "severity is 6"),
        ({"images": 0}, "images is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1.5}, "batch_size is 1.5, expected a whole number"),
        ({"split": "test"}, "unknown split"),
        ({"setting": "shuffled"}, "unknown setting 'shuffled', expected one of: continual"),
        ({"source": "elsewhere"}, "unknown source"),
        ({"frost": "snow"}, "unknown frost"),
        ({"source": "stored"}, "digits has no stored"),
        ({"dataset": "cifar10", "source": "stored", "corruptions": ("clean",)}, "stored sets hold no clean images"),
        ({"dataset": "cifar10", "source": "stored", "setting": "ccc", "length": 2}, "no mixtures"),
        ({"rounds": 0}, "rounds is 0"),
        ({"delta": -0.1}, "delta is -0.1"),
        ({"delta": float("nan")}, "delta is nan"),
        ({"tail": 0.0}, "tail is 0.0"),
        ({"tail": 1.0}, "tail is 1.0"),
        ({"window": 4}, "window of 4 needs single images"),
        ({"length": 4}, "expected a length"),
        ({"setting": "ccc"}, "expected a length"),
        ({"setting": "ccc", "length": 2, "corruptions": ("fog",)}, "from one corruption to another"),
        ({"setting": "ccc", "length": 2, "rounds": 2}, "goes on by itself"),
        ({"setting": "ccc", "length": 2, "images": 4}, "at least 5, one for each step"),
        ({"preprocessing": "squeeze"}, "unknown preprocessing"),
    ],
)
def test_impossible_streams(flags: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        changed(**flags)


def test_two_openings_and_two_passes_give_the_same_batches() -> None:
    domains = Domains(SMALL)
    assert (domains.batches_per_domain, domains.images_per_domain) == (4, 30)
    assert [len(labels) for _, labels, _ in domains.batches(0)] == [8, 8, 8, 6]
    for index in range(2):
        first = all_of(domains, index)
        for again in (all_of(domains, index), all_of(Domains(SMALL), index)):
            assert torch.equal(first[0], again[0])
            assert torch.equal(first[1], again[1])


def test_batch_size_and_neighbouring_domains_change_nothing() -> None:
    fog = all_of(Domains(SMALL), 1)[0]
    assert torch.equal(fog, all_of(Domains(changed(corruptions=("fog",))), 0)[0])
    assert torch.equal(fog, all_of(Domains(changed(batch_size=30)), 1)[0])


def test_a_seed_draws_order_and_noise_but_not_which_images() -> None:
    one, other = (all_of(Domains(changed(seed=seed)), 0) for seed in (0, 1))
    assert not torch.equal(one[1], other[1])
    assert torch.equal(one[1].sort().values, other[1].sort().values)
    assert not torch.equal(one[0].mean((1, 2, 3)).sort().values, other[0].mean((1, 2, 3)).sort().values)
    clean = open_pool("digits", None, "report", "none").labels[:30]
    assert torch.equal(one[1].sort().values, clean.sort().values)


def test_domains_differ_in_order_and_hold_stored_grey_levels() -> None:
    domains = Domains(SMALL)
    (noise, labels), (_, others) = all_of(domains, 0), all_of(domains, 1)
    assert not torch.equal(labels, others)
    assert torch.equal(noise, (noise * 255).round() / 255)


def test_stored_sets_are_read_unchanged(tmp_path: Path) -> None:
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    np.save(folder / "fog.npy", pixels)
    np.save(folder / "labels.npy", np.tile(np.arange(10), 5))
    stream = Stream("cifar10", corruptions=("fog",), severity=3, images=10, source="stored")
    images, labels = all_of(Domains(stream, tmp_path), 0)
    order = labels.argsort()
    assert torch.equal(images[order], torch.from_numpy(pixels[20:30]).permute(0, 3, 1, 2) / 255)


def test_folders_that_hold_too_little(tmp_path: Path) -> None:
    stream = Stream("cifar10", corruptions=("fog",), images=10)
    with pytest.raises(DataError, match="TTAQ_DATA"):
        Domains(stream)
    with pytest.raises(DataError, match="no test_batch"):
        Domains(stream, tmp_path)
    np.zeros((5, 3073), dtype=np.uint8).tofile(tmp_path / "test_batch.bin")
    with pytest.raises(InputError, match="10 images asked for, but split 'report' of cifar10 has 5"):
        Domains(stream, tmp_path)
    with pytest.raises(DataError, match="split 'validate' of cifar10 has no images"):
        Domains(Stream("cifar10", corruptions=("fog",), split="validate"), tmp_path)
    with pytest.raises(InputError, match="481 images asked for, but split 'report' of digits has 480"):
        Domains(changed(images=481))
    with pytest.raises(InputError, match="frost=textures"):
        Domains(changed(corruptions=("frost",), frost="textures"))


@pytest.mark.parametrize("flags", [{}, {"setting": "mixed"}, {"setting": "ccc", "length": 2}, {"delta": 0.1}])
def test_any_batch_can_be_made_without_those_before_it(
    flags: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package exports names of the same kind; chunks of 7 images make batches cross their borders.
    monkeypatch.setattr("ttaq.eval.domains._CHUNK", 7 * 32 * 32)
    whole = list(Domains(changed(**flags)).batches(0))
    for start in range(len(whole)):
        alone = next(Domains(changed(**flags), keep_mb=0).batches(0, start))
        assert all(map(torch.equal, alone, whole[start]))


def test_what_does_not_fit_is_made_again_and_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttaq.eval.domains._CHUNK", 7 * 32 * 32)
    kept, made = Domains(SMALL), Domains(SMALL, keep_mb=0.1)
    for _ in range(2):
        assert torch.equal(all_of(kept, 1)[0], all_of(made, 1)[0])
    assert (len(kept._chunks), len(made._chunks)) == (5, 1)


def test_calibration_images_are_drawn_by_seed() -> None:
    one, again, other = (calibration_images("digits", None, 20, seed) for seed in (0, 0, 1))
    assert one.shape == (20, 3, 32, 32)
    assert 0 <= float(one.min()) <= float(one.max()) <= 1
    assert torch.equal(one, again)
    assert not torch.equal(one, other)

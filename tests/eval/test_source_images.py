"""Images of the training data, for the methods that want some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import STREAM, repeatable, small_model

import ttaq.eval.domains
from ttaq.errors import InputError
from ttaq.eval import Domains, RowFile, Stream, calibration_images, read_rows, run
from ttaq.eval.datasets import DATASETS, Dataset
from ttaq.tta import METHODS

DIGITS = 1197  # training images


def make(path: Path, domains: Domains, method: str = "eata", **flags: Any) -> list[dict[str, Any]]:
    with RowFile(path) as rows:
        return run(small_model(), method, domains, rows, **flags)


@pytest.mark.parametrize("seed", [0, 1])
def test_are_those_that_quantization_would_draw(seed: int) -> None:
    domains = Domains(Stream("digits", ("fog",), seed=seed))
    assert torch.equal(domains.source_images(50), calibration_images("digits", None, 50, seed))
    assert len(domains.source_images(2000)) == DIGITS  # all there are
    assert torch.equal(domains.source_images(20), calibration_images("digits", None, 20, seed))


def test_are_drawn_once_for_all_methods_and_models(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def draw(dataset: str, data: object, count: int, *args: Any, **flags: Any) -> torch.Tensor:
        drawn.append(count)
        return calibration_images(dataset, None, count, *args, **flags)

    monkeypatch.setattr(ttaq.eval.domains, "calibration_images", draw)
    domains = Domains(STREAM)
    for most in (50, 50, 20, 60, 2000, 3):
        domains.source_images(most)
    assert drawn == [50, 60, 2000]


def test_a_run_draws_what_the_method_wants_and_rows_say_how_many(tmp_path: Path) -> None:
    domains = Domains(STREAM)
    new = make(tmp_path / "rows.jsonl", domains)
    assert {row["options"]["source_images"] for row in new} == {DIGITS}  # of the 2000 it wants
    given = make(tmp_path / "given.jsonl", domains, source_images=calibration_images("digits", None, DIGITS, 0))
    assert repeatable(given) == repeatable(new)
    assert "source_images" not in make(tmp_path / "tent.jsonl", domains, "tent")[0]["options"]


def test_another_number_is_another_run(tmp_path: Path) -> None:
    path, domains = tmp_path / "rows.jsonl", Domains(STREAM)
    for count in (30, 40):
        assert len(make(path, domains, source_images=domains.source_images(count))) == 4
    assert make(path, domains, source_images=domains.source_images(30)) == []
    assert {row["options"]["source_images"] for row in read_rows(path)} == {30, 40}


def test_without_training_images_methods_that_need_none_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "digits", Dataset(train=False))
    with pytest.raises(
        InputError, match=r"but digits has none; choose a method that works without: .*\beta\b"
    ) as error:
        make(tmp_path / "rows.jsonl", Domains(STREAM))
    assert not any(f" {name}," in str(error.value) for name in METHODS if METHODS[name].source_images)
    assert (tmp_path / "rows.jsonl").read_bytes() == b""
    assert len(make(tmp_path / "rows.jsonl", Domains(STREAM), "eta")) == 4

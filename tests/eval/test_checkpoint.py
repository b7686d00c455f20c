"""States inside a domain, runs that may not be resumed, and disks that are full."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import OPTIONS, STREAM, repeatable, small_model
from torch import nn

from ttaq.errors import CheckpointError, InputError
from ttaq.eval import Domains, RowFile, Stream, read_rows, run
from ttaq.io import load_state, save_state
from ttaq.tta import METHODS, build

STREAMS = {
    "continual": STREAM,
    "reset": Stream("digits", ("fog", "contrast"), images=40, batch_size=16, setting="reset_each_shift"),
    "mixed": Stream("digits", ("fog", "contrast"), images=40, batch_size=16, setting="mixed"),
    "window": Stream("digits", ("fog", "contrast"), images=7, batch_size=1, window=3),
}


def make(path: Path, stream: Stream = STREAM, method: str = "tent", **flags: Any) -> list[dict[str, Any]]:
    with RowFile(path) as rows:
        return run(small_model(), method, Domains(stream), rows, **{"options": OPTIONS, **flags})


def stop_at(batch: int) -> Any:
    def stop(done: int, total: int, what: str) -> None:
        if done == batch:
            raise KeyboardInterrupt

    return stop


def interrupted(path: Path, batch: int, stream: Stream = STREAM, **flags: Any) -> Path:
    """A run that stopped after this batch, saving at every second one; returns its state file."""
    with pytest.raises(KeyboardInterrupt):
        make(path, stream, progress=stop_at(batch), **{"checkpoint_every": 2, **flags})
    (state,) = path.with_name(path.name + ".state").iterdir()
    return state


@pytest.mark.parametrize("shadow", [False, True], ids=["alone", "in shadow"])
@pytest.mark.parametrize("name", sorted(STREAMS))
def test_goes_on_inside_a_domain_with_the_same_rows(tmp_path: Path, name: str, shadow: bool) -> None:
    stream = STREAMS[name]
    whole = make(tmp_path / "whole.jsonl", stream, shadow=shadow)
    per_domain = Domains(stream).batches_per_domain
    batch = per_domain + 2 if name != "mixed" else 2
    path = tmp_path / "cut.jsonl"
    state = load_state(interrupted(path, batch, stream, shadow=shadow))
    assert (state["index"], state["measured"]["batches"]) == (batch // per_domain, 2)
    seen: list[int] = []
    make(path, stream, shadow=shadow, progress=lambda done, total, what: seen.append(done))
    assert seen[0] == batch + 1  # from the state, not from the beginning of the domain
    assert repeatable(read_rows(path)) == repeatable(whole)
    for cut, row in zip(read_rows(path), whole, strict=True):
        assert cut["latency_ms"].get("batches") == row["latency_ms"].get("batches")
        for part in ("weights_mb", "optimizer_mb", "state_mb", "activations_mb"):
            assert cut["memory"][part] == row["memory"][part]
    assert not path.with_name("cut.jsonl.state").exists()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_goes_on_inside_a_domain(tmp_path: Path, method: str) -> None:
    stream = Stream("digits", ("fog", "contrast"), images=72, batch_size=24)
    flags: dict[str, Any] = {"method": method, "options": {"augmentations": 2} if method == "cotta" else {}}
    if METHODS[method].source_images:
        flags["source_images"] = Domains(stream).source_images(70)
    whole = make(tmp_path / "whole.jsonl", stream, **flags)
    interrupted(tmp_path / "cut.jsonl", 5, stream, **flags)
    make(tmp_path / "cut.jsonl", stream, **flags)
    assert repeatable(read_rows(tmp_path / "cut.jsonl")) == repeatable(whole)
    learns = bool(build(method, small_model(), source_images=flags.get("source_images")).parameters_adapted())
    assert (whole[0]["memory"]["activations_mb"] > 0) == learns


def test_how_often_a_state_is_saved_changes_nothing(tmp_path: Path) -> None:
    rows = [repeatable(make(tmp_path / f"{every}.jsonl", checkpoint_every=every)) for every in (None, 1, 2, 100)]
    assert all(each == rows[0] for each in rows)


class Noisy(nn.Module):
    """A model that draws from torch's own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(x)
        return logits + torch.rand(()) * torch.arange(10.0)


def test_random_numbers_of_the_model_go_on_too(tmp_path: Path) -> None:
    def go(path: Path, **flags: Any) -> Any:
        with RowFile(path) as rows:
            return run(Noisy(), "source", Domains(STREAM), rows, **flags)

    whole = go(tmp_path / "whole.jsonl")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut.jsonl", checkpoint_every=2, progress=stop_at(5))
    state = load_state(next((tmp_path / "cut.jsonl.state").iterdir()))
    assert state["measured"]["random"].dtype == torch.uint8
    go(tmp_path / "cut.jsonl")
    assert repeatable(read_rows(tmp_path / "cut.jsonl")) == repeatable(whole)


@pytest.mark.parametrize("batch", [2, 5], ids=["first domain", "second domain"])
def test_without_resumption_what_is_there_is_refused(tmp_path: Path, batch: int) -> None:
    path = tmp_path / "rows.jsonl"
    state = interrupted(path, batch)
    before = path.read_bytes(), state.read_bytes()
    with pytest.raises(CheckpointError, match=f"already holds {batch // 3} rows and the state {state} of this run"):
        make(path, resume=False)
    assert (path.read_bytes(), state.read_bytes()) == before
    make(path, method="source", options={}, resume=False)  # another run
    make(path)
    with pytest.raises(CheckpointError, match="already holds 4 rows of this run"):
        make(path, resume=False)


def test_a_run_in_shadow_is_another_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    plain = make(path)
    shadow = make(path, shadow=True, resume=False)
    source = make(path, method="source", options={})
    for row, own, answered in zip(shadow, plain, source, strict=True):
        assert row["shadow"] is True
        assert "shadow" not in own
        assert row["error"] == answered["error"]
        assert row["ece"] == answered["ece"]
        assert row["shadow_error"] == own["error"]
        assert row["counters"] == own["counters"]
    assert shadow[-1]["shadow_error"] == pytest.approx(sum(row["error"] for row in plain[:-1]) / 3)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_leaves_the_last_state_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    whole = make(tmp_path / "whole.jsonl")
    path = tmp_path / "rows.jsonl"
    state = interrupted(path, 5)
    before = path.read_bytes(), state.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(f"ttaq.io.atomic.os.{call}", full)
        with pytest.raises(CheckpointError, match=r"No space left on device; .* make room .* goes on from there"):
            make(path, checkpoint_every=1)
    assert (path.read_bytes(), state.read_bytes()) == before
    assert [*state.parent.iterdir()] == [state]
    make(path)
    assert repeatable(read_rows(path)) == repeatable(whole)


def test_a_full_disk_leaves_the_rows_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(tmp_path / "whole.jsonl")
    path, write = tmp_path / "rows.jsonl", os.write
    interrupted(path, 5)
    before = path.read_bytes()

    def half(fd: int, content: bytes) -> int:
        if content.startswith(b"{"):
            return write(fd, content[:100])
        return full() or 0

    with monkeypatch.context() as patch:
        patch.setattr("ttaq.eval.rows.os.write", half)
        with pytest.raises(CheckpointError, match="No space left on device; the rows before are unchanged"):
            make(path)
    assert path.read_bytes() == before
    make(path)
    assert repeatable(read_rows(path)) == repeatable(whole)


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.with_name("rows.jsonl.state").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write .*rows\.jsonl\.state"):
        make(path)
    assert path.read_bytes() == b""


def other_cell(state: dict[str, Any]) -> None:
    state["cell"] = state["cell"].replace("tent", "norm")


def other_model(state: dict[str, Any]) -> None:
    state["adapter"]["source"] = "0" * 64


def other_method(state: dict[str, Any]) -> None:
    state["adapter"]["method"] = "sar"


def other_options(state: dict[str, Any]) -> None:
    state["adapter"]["options"]["lr"] = 0.5


def missing_tensor(state: dict[str, Any]) -> None:
    state["adapter"]["adapted"].popitem()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_cell, "belongs to another run; delete it"),
        (other_model, "saved with source '0000"),
        (other_method, "saved with method 'sar'"),
        (other_options, "saved with option lr 0.5, expected 0.01"),
        (missing_tensor, "adapted lacks"),
    ],
)
def test_a_state_of_something_else_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    file = interrupted(path, 5)
    state = load_state(file)
    change(state)
    save_state(file, state)
    rows = path.read_bytes()
    with pytest.raises(CheckpointError, match=says):
        make(path)
    assert path.read_bytes() == rows


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_refuses_other_intervals(tmp_path: Path, every: Any) -> None:
    with pytest.raises(InputError, match="checkpoint_every is"):
        make(tmp_path / "rows.jsonl", checkpoint_every=every)

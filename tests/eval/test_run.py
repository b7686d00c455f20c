"""The engine: what a row says, and that no kill changes it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_cases import OPTIONS, STREAM, repeatable, small_model

from ttaq.errors import CheckpointError, InputError
from ttaq.eval import Domains, RowFile, Stream, read_rows, run
from ttaq.eval.checkpoint import Checkpoint
from ttaq.tta import METHODS, build


def make(path: Path, method: str = "tent", **options: object) -> list[dict[str, object]]:
    with RowFile(path) as rows:
        return run(small_model(), method, Domains(STREAM), rows, options=options or None)


def test_rows_say_what_was_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    new = make(path, **OPTIONS)
    assert read_rows(path) == new
    *domains, summary = new
    assert [row["domain"] for row in domains] == list(STREAM.corruptions)
    assert [row["index"] for row in domains] == [0, 1, 2]
    for row in domains:
        assert row["kind"] == "domain"
        assert (row["method"], row["options"]["lr"], row["stream"], row["seed"]) == ("tent", 0.01, str(STREAM), 0)
        assert (row["scheme"], row["n"], row["frost"], row["threads"]) == (
            "float",
            40,
            "unused",
            torch.get_num_threads(),
        )
        assert row["versions"]["torch"] == torch.__version__
        assert row["latency_ms"]["batches"] == 3
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p95"]
        assert row["memory"]["peak_mb"] > 10
        assert "resident set" in row["memory"]["of"]
    assert [row["counters"]["samples"] for row in domains] == [40, 80, 120]
    assert summary["kind"] == "summary"
    assert summary["error"] == pytest.approx(sum(row["error"] for row in domains) / 3)
    assert not path.with_name("rows.jsonl.state").exists()


def test_errors_are_those_of_the_adapter(tmp_path: Path) -> None:
    new = make(tmp_path / "rows.jsonl", "norm")
    adapter = build("norm", small_model())
    for index, row in enumerate(new[:-1]):
        wrong = [int((adapter(x).argmax(1) != y).sum()) for x, y, _ in Domains(STREAM).batches(index)]
        assert row["error"] == pytest.approx(100 * sum(wrong) / 40)
        assert row["trace"] == {"n": [16, 16, 8], "wrong": wrong}
        assert row["parts"] == {}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_labels_never_reach_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """With other labels the adapter ends in the same state, and only the scores differ."""
    options = {"cotta": {"augmentations": 2}, "rotta": {"update_every": 16}}.get(method, {})
    stream = replace(STREAM, corruptions=("fog",))
    found = []
    for keep in (1, 0):
        states: list[dict[str, object]] = []
        domains = Domains(stream)
        batches = domains.batches
        monkeypatch.setattr(
            domains,
            "batches",
            lambda *at, batches=batches, keep=keep: ((x, keep * y, recipe) for x, y, recipe in batches(*at)),
        )
        with RowFile(tmp_path / f"{keep}.jsonl") as rows, monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "save", lambda _, state, states=states: states.append(state["adapter"]))
            made = run(small_model(), method, domains, rows, options=options)
        found.append((states, made[-1]["error"], made[-1]["ece"]))
    (one, *scores), (other, *other_scores) = found
    assert len(one) == 1
    assert torch.equal(flat(one), flat(other))
    assert scores != other_scores


def flat(value: object) -> torch.Tensor:
    """Every tensor in a state, one behind the other."""
    if isinstance(value, torch.Tensor):
        return value.double().flatten()
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    parts = [flat(item) for item in items]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def test_a_mixed_domain_says_how_each_corruption_went(tmp_path: Path) -> None:
    stream = Stream("digits", corruptions=("clean", "contrast"), images=40, batch_size=16, setting="mixed")
    with RowFile(tmp_path / "rows.jsonl") as rows:
        row, _ = run(small_model(), "norm", Domains(stream), rows)
    assert row["domain"] == "mixed"
    assert row["parts"].keys() == {"clean", "contrast@5"}
    assert [part["n"] for part in row["parts"].values()] == [40, 40]
    assert row["error"] == pytest.approx(sum(part["error"] for part in row["parts"].values()) / 2)


def test_single_images_with_a_window_continue_after_a_kill(tmp_path: Path) -> None:
    stream = Stream("digits", corruptions=("fog", "contrast"), images=11, batch_size=1, window=4)

    def stop(done: int, total: int, what: str) -> None:
        if done == 15:
            raise KeyboardInterrupt

    with RowFile(tmp_path / "whole.jsonl") as rows:
        whole = run(small_model(), "tent", Domains(stream), rows, options=OPTIONS)
    assert whole[-2]["counters"] == {"batches": 5, "samples": 20, "updates": 5, "images": 22}
    with RowFile(tmp_path / "cut.jsonl") as rows:
        with pytest.raises(KeyboardInterrupt):
            run(small_model(), "tent", Domains(stream), rows, options=OPTIONS, progress=stop)
        run(small_model(), "tent", Domains(stream), rows, options=OPTIONS)
    assert repeatable(read_rows(tmp_path / "cut.jsonl")) == repeatable(whole)


def test_a_complete_cell_does_nothing_and_another_option_is_another_cell(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    make(path, **OPTIONS)
    before = path.read_bytes()
    assert make(path, **OPTIONS) == []
    assert path.read_bytes() == before
    assert len(make(path, lr=0.02)) == 4


@pytest.mark.parametrize("every", [None, 1], ids=["domains", "batches"])
def test_killed_at_every_place_and_continued_makes_the_same_rows(tmp_path: Path, every: int | None) -> None:
    make(tmp_path / "whole.jsonl", **OPTIONS)
    script = Path(__file__).with_name("run_and_die.py")
    path = tmp_path / "killed.jsonl"
    flags = [] if every is None else [str(every)]
    done = subprocess.run([sys.executable, script, path, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ends = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert ends.pop("finished") == "0", done.stderr
    assert set(ends.values()) == {"-9"}, done.stdout
    assert repeatable(read_rows(path)) == repeatable(read_rows(tmp_path / "whole.jsonl"))
    assert not path.with_name("killed.jsonl.state").exists()


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_rows_without_a_state_are_completed_by_running_again(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "rows.jsonl"
    new = make(path, **OPTIONS)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:kept]) + lines[kept][:30])
    make(path, **OPTIONS)
    assert path.read_text().splitlines(keepends=True)[:kept] == lines[:kept]
    assert repeatable(read_rows(path)) == repeatable(new)


def interrupted(path: Path) -> Path:
    """A run that stopped behind its first domain; returns its state file."""

    def stop(done: int, total: int, what: str) -> None:
        if what == STREAM.corruptions[1]:
            raise KeyboardInterrupt

    with RowFile(path) as rows, pytest.raises(KeyboardInterrupt):
        run(small_model(), "tent", Domains(STREAM), rows, options=OPTIONS, progress=stop)
    assert len(read_rows(path)) == 1
    (state,) = path.with_name(path.name + ".state").iterdir()
    return state


def test_a_summary_without_its_domains_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    make(path, **OPTIONS)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="has the summary of tent on float, but lacks 1 of its 3 domains"):
        make(path, **OPTIONS)
    assert path.read_bytes() == before


def test_a_state_whose_rows_were_removed_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    interrupted(path)
    path.unlink()
    assert len(make(path, **OPTIONS)) == 4
    assert [row["index"] for row in read_rows(path)[:-1]] == [0, 1, 2]


def test_a_damaged_state_says_what_to_delete(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    state = interrupted(path)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"delete {state}"):
        make(path, **OPTIONS)


def test_reset_each_shift_makes_domains_independent(tmp_path: Path) -> None:
    errors = {}
    for setting in ("continual", "reset_each_shift"):
        for corruptions in (("contrast",), ("gaussian_noise", "contrast")):
            stream = Stream("digits", corruptions=corruptions, images=40, batch_size=8, setting=setting)
            with RowFile(tmp_path / f"{setting}{len(corruptions)}.jsonl") as rows:
                new = run(small_model(), "tent", Domains(stream), rows, options={"lr": 0.1})
            errors[setting, len(corruptions)] = (new[-2]["error"], new[-2]["ece"])
    assert errors["reset_each_shift", 1] == errors["reset_each_shift", 2]
    assert errors["continual", 1] != errors["continual", 2]


def test_what_cannot_be_run_leaves_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    from ttaq.models import build as build_model

    with RowFile(path) as rows:
        with pytest.raises(InputError, match=r"logits of shape \(16, 7\), expected \[B, 10\] for digits"):
            run(build_model("cifar_resnet8", width=4, num_classes=7), "source", Domains(STREAM), rows)
        with pytest.raises(InputError, match="unknown method"):
            run(small_model(), "wish", Domains(STREAM), rows)
    assert path.read_bytes() == b""


def test_rows_of_another_stream_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    make(path, "source")
    other = Stream("digits", corruptions=STREAM.corruptions, images=40, batch_size=20)
    with RowFile(path) as rows, pytest.raises(CheckpointError, match=r"batch_size \(16 against 20\)"):
        run(small_model(), "source", Domains(other), rows)
    assert all(json.loads(line)["stream"] == str(STREAM) for line in path.read_text().splitlines())

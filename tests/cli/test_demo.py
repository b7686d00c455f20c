"""The demo: what it shows, and its cached network."""

import re
from pathlib import Path

import pytest
import torch

from ttaq.cli import demo_model as cached
from ttaq.cli import main
from ttaq.eval import read_rows
from ttaq.io import model_hash, save_model
from ttaq.models import build

pytest.importorskip("sklearn")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a narrow network that trains for a single epoch."""
    monkeypatch.setenv("TTAQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cached, "_EPOCHS", 1)
    monkeypatch.setattr(cached, "KWARGS", {**cached.KWARGS, "width": 4})
    return tmp_path / "cache" / "demo_digits.safetensors"


def test_demo_shows_a_table_and_writes_rows_and_plot(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), "--images", "20", "--threads", str(torch.get_num_threads())]) == 0
    said = capsys.readouterr().out
    methods = [
        f"{quantization} {method}" for quantization in ("float", "rtn", "ttaq") for method in ("source", "norm", "tent")
    ]
    assert f"| error %           | {' | '.join(methods)} |" in said
    assert len(re.findall(r"^\| [a-z_]+ +(\| +\d+\.\d ){9}\|$", said, re.MULTILINE)) == 16
    assert "20 test images per corruption" in said
    assert "one seed" in said
    assert f"plot: {(out / 'demo.png').resolve()}" in said
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_rows(out / "demo.jsonl")) == 3 * 3 * 16
    assert cache.is_file()


def test_the_network_is_trained_once_and_again_when_its_file_is_damaged(cache: Path) -> None:
    first, origin = cached.demo_model()
    assert "trained now, kept in" in origin
    again, origin = cached.demo_model()
    assert origin == f"from {cache}"
    assert model_hash(again) == model_hash(first)
    cache.write_bytes(cache.read_bytes()[:500])
    third, origin = cached.demo_model()
    assert "trained now" in origin
    assert model_hash(third) == model_hash(first)


def test_a_network_of_another_recipe_is_not_used(cache: Path) -> None:
    model = build(cached.ARCHITECTURE, **cached.KWARGS)
    save_model(cache, model, architecture=cached.ARCHITECTURE, kwargs=cached.KWARGS, extra={"epochs": 99})
    assert "trained now" in cached.demo_model()[1]


def test_a_cache_that_cannot_be_written_only_costs_time(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TTAQ_CACHE", str(tmp_path / "file"))
    assert "trained now, not kept" in cached.demo_model()[1]


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"TTAQ_CACHE": "/one", "XDG_CACHE_HOME": "/two"}, Path("/one")),
        ({"XDG_CACHE_HOME": "/two"}, Path("/two/ttaq")),
        ({"HOME": "/three"}, Path("/three/.cache/ttaq")),
    ],
)
def test_where_the_cache_is(variables: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TTAQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cached.cache_file() == folder / "demo_digits.safetensors"

"""The scripts for a machine with a GPU, as far as they can run without one: tuner, check list and slices."""

import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ttaq_kernels import _config

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ON_CPU = ("packed_products", "rounding", "narrow_types", "no_atomics", "random_numbers", "every_op", "repeatable")


@pytest.fixture(scope="module")
def script() -> Iterator[Callable[[str], ModuleType]]:
    sys.path.insert(0, str(ROOT))
    yield lambda name: importlib.import_module(f"benchmarks.{name}")
    sys.path.remove(str(ROOT))


@pytest.mark.parametrize("name", ["gpu", "gpu_checklist", "tune"])
def test_without_a_gpu(
    script: Callable[[str], ModuleType],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script(name).main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("no CUDA device: nothing was ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ON_CPU)
def test_check(script: Callable[[str], ModuleType], name: str) -> None:
    row = script("gpu_checklist").check(name, CPU)
    assert row["right"], row["figure"]


def test_what_is_wrong_is_said(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    checklist = script("gpu_checklist")

    def divides(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, *grid: int) -> torch.Tensor:
        codes = (x / scale).round() + zero_point
        return (codes.nan_to_num(0).clamp(*grid) - zero_point) * scale

    monkeypatch.setattr(checklist, "fake_quantize", divides)
    row = checklist.check("rounding", CPU)
    assert not row["right"]
    assert "elements differ" in row["figure"]
    row = checklist.check("cuda_graphs", CPU)
    assert not row["right"]
    assert row["figure"] == "WrongError: graphs are captured on a CUDA device, not on cpu"


def test_search_keeps_what_beats_the_default_by_more_than_noise(script: Callable[[str], ModuleType]) -> None:
    search = script("tune").search
    times = {1: 100.0, 2: 98.0, 3: 90.0, 4: 95.0, 5: None}

    def time_of(config: dict[str, int]) -> float | None:
        return times[config["TILE"]]

    candidates = [{"TILE": tile} for tile in times]
    assert search({"TILE": 1}, candidates, time_of) == {"TILE": 3}
    assert search({"TILE": 1}, candidates[:2], time_of) is None
    assert search({"TILE": 3}, candidates, time_of) is None
    with pytest.raises(ValueError, match="gave no time"):
        search({"TILE": 5}, candidates, time_of)


@pytest.fixture
def asking(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tuner, with a fake_quantize that asks for a configuration on the CPU and is wrong for one of them."""
    tune = script("tune")
    op, module, _ = tune.TUNABLE["fake_quantize"]

    def ours(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        config = module.tuned("fake_quantize", f"key {x.ndim}", {"TILE": 2048, "num_warps": 4}, x)
        if config["TILE"] == 8192:
            raise RuntimeError("out of resource: shared memory")
        return op.ours(x, *rest) + (config["TILE"] == 1024)

    entry = (dataclasses.replace(op, ours=ours), module, tune.TUNABLE["fake_quantize"][2])
    monkeypatch.setitem(tune.TUNABLE, "fake_quantize", entry)
    return tune


def test_tuning_leaves_out_wrong_and_failing_candidates_and_goes_on(asking: ModuleType, tmp_path: Path) -> None:
    said: list[str] = []

    def timer(run: Callable[[], None]) -> float:
        run()
        config = _config._forced["fake_quantize"]
        # A wrong candidate would be the fastest.
        return {1024: 1.0, 2048: 10.0, 4096: 5.0}[config.get("TILE", 2048)] + config.get("num_warps", 4) / 8

    path = tmp_path / "table.json"
    table = asking.read_table(path)
    assert not asking.tune(table, ["fake_quantize"], CPU, "tiny", lambda: -1.0, timer, said.append)
    assert table["configs"] == {}
    assert asking.tune(table, ["fake_quantize"], CPU, "tiny", lambda: 1.0, timer, said.append)
    assert table["configs"] == {"fake_quantize": {"key 4": {"TILE": 4096, "num_warps": 2}}}
    assert any("out of resource" in line for line in said)
    path.write_text(json.dumps(table))
    assert _config._shape_error(json.loads(path.read_text())) is None

    def never(run: Callable[[], None]) -> float:
        raise AssertionError("timed again")

    assert asking.tune(asking.read_table(path), ["fake_quantize"], CPU, "tiny", lambda: 1.0, never, said.append)


def test_slices_go_on_and_remember_only_what_was_right(
    script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = script("gpu")
    runs = tmp_path / "runs"
    command = [sys.executable, "-c", f"open({str(runs)!r}, 'a').write('x'); raise SystemExit(3)"]

    def slice_() -> gpu.Slice:
        return gpu.Slice(tmp_path, 60.0, CPU)

    first = slice_()
    first.run("name", "a", command, {0})
    assert not first.right
    second = slice_()
    second.run("name", "a", command, {3})
    second.run("name", "a", command, {3})
    assert second.right
    third = slice_()
    third.run("name", "a", command, {3})
    assert runs.read_text() == "xx"
    third.run("name", "b", command, {3})
    assert runs.read_text() == "xxx"
    third.end = time.perf_counter() - 1
    third.run("other", "a", command, {3})
    assert not third.finished
    assert runs.read_text() == "xxx"
    assert "FAILED   name" in capsys.readouterr().out


def test_what_the_sanitizer_does_not_support_is_no_failure(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    gpu = script("gpu")
    part = gpu.Slice(tmp_path, 60.0, CPU)
    command = [sys.executable, "-c", "print('Error: Device not supported'); raise SystemExit(9)"]
    part.run("compute-sanitizer memcheck", "", command, {0})
    assert part.right
    part.run("check list", "", command, {0})
    assert not part.right


def test_the_files_with_gpu_tests_are_found(script: Callable[[str], ModuleType]) -> None:
    names = {path.name for path in script("gpu").test_files()}
    assert names >= {"test_fake_quant_kernel.py", "test_batch_norm_kernel.py", "test_config.py"}
    assert "test_kernel_aot.py" not in names

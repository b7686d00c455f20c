"""Tuned configurations: found by GPU, op and key; without a table the default; a broken table is one clear error."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ttaq_kernels import KernelError, _config, _gemm_tiles

DEFAULT = {"BLOCK_M": 64, "num_warps": 4}
TUNED = {"BLOCK_M": 128, "num_warps": 8}
NAME = "nvidia_h200_sm90.json"
ON_GPU: Any = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the tables, as seen by a process on an H200."""
    monkeypatch.setenv(_config.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    _forget()
    yield tmp_path
    _forget()


def _forget() -> None:
    _config._table.cache_clear()
    _config._name_of.cache_clear()


def write(folder: Path, content: object) -> None:
    (folder / NAME).write_text(content if isinstance(content, str) else json.dumps(content))


def test_table_name() -> None:
    assert _config.table_name("NVIDIA H200", (9, 0)) == NAME
    assert _config.table_name("NVIDIA A100-SXM4-80GB", (8, 0)) == "nvidia_a100_sxm4_80gb_sm80.json"


def test_lookup_and_fallback(folder: Path) -> None:
    write(folder, {"gpu": "NVIDIA H200", "capability": [9, 0], "configs": {"op": {"key": TUNED}}})
    assert _config.tuned("op", "key", DEFAULT, ON_GPU) == TUNED
    assert _config.tuned("op", "other key", DEFAULT, ON_GPU) == DEFAULT
    assert _config.tuned("other op", "key", DEFAULT, ON_GPU) == DEFAULT
    assert _config.tuned("op", "key", DEFAULT, torch.zeros(1)) == DEFAULT


def test_without_a_table_for_this_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, {"configs": {"op": {"key": TUNED}}})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    assert _config.tuned("op", "key", DEFAULT, ON_GPU) == DEFAULT


def test_the_table_is_read_once_and_cannot_be_changed_by_a_caller(folder: Path) -> None:
    write(folder, {"configs": {"op": {"key": TUNED}}})
    _config.tuned("op", "key", DEFAULT, ON_GPU)["BLOCK_M"] = 1
    (folder / NAME).unlink()
    assert _config.tuned("op", "key", DEFAULT, ON_GPU) == TUNED


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("{", "Expecting property name"),
        ([], "no object configs"),
        ({"configs": {"op": 3}}, "3 for op"),
        ({"configs": {"op": {"key": {"BLOCK_M": "128"}}}}, "{'BLOCK_M': '128'} for op, key"),
        ({"configs": {"op": {"key": {"BLOCK_M": 0}}}}, "{'BLOCK_M': 0} for op, key"),
        ({"configs": {"op": {"key": {"BLOCK_M": True}}}}, "{'BLOCK_M': True} for op, key"),
        ({"configs": {"op": {"key": []}}}, "[] for op, key"),
    ],
)
def test_a_table_that_is_none(folder: Path, content: object, wrong: str) -> None:
    write(folder, content)
    with pytest.raises(KernelError) as error:
        _config.tuned("op", "key", DEFAULT, ON_GPU)
    assert str(error.value).startswith(f"op: the table of configurations {folder / NAME} has {wrong}")
    assert "{configs: {op: {key: {name: positive integer}}}}; write it anew with python -m benchmarks.tune" in str(
        error.value
    )


def test_an_entry_with_other_names(folder: Path) -> None:
    write(folder, {"configs": {"op": {"key": {"BLOCK_M": 128}}}})
    with pytest.raises(KernelError, match=r"has \['BLOCK_M'\] for key, expected \['BLOCK_M', 'num_warps'\]; write it"):
        _config.tuned("op", "key", DEFAULT, ON_GPU)


def test_forced_configurations_end_with_their_block() -> None:
    with _config.forced("op", {"BLOCK_M": 16}):
        with _config.forced("op", {"num_warps": 2}):
            assert _config.tuned("op", "key", DEFAULT, torch.zeros(1)) == {"BLOCK_M": 64, "num_warps": 2}
        assert _config.tuned("op", "key", DEFAULT, torch.zeros(1)) == {"BLOCK_M": 16, "num_warps": 4}
    assert _config.tuned("op", "key", DEFAULT, torch.zeros(1)) == DEFAULT


def test_products_of_nearly_the_same_size_share_an_entry_and_keep_their_step(folder: Path) -> None:
    x, default = torch.zeros(100, 96, dtype=torch.int8), {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"}
    keys: dict[str, set[str]] = {}

    def asked(op: str, key: str, built_in: dict[str, int], _: torch.Tensor) -> dict[str, int]:
        keys[f"{op} {key}"] = set(built_in)
        return {"BLOCK_M": 16}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_gemm_tiles, "tuned", asked)
        configs = [_gemm_tiles.gemm_config(rows, 256, 64, 4, x) for rows in (100, 128)]
    assert keys == {"packed_linear W4 int8 128x256x96": default}
    assert configs == [{"BLOCK_M": 16, "BLOCK_B": 64}] * 2


@pytest.mark.parametrize("config", [{"TILE": 128, "num_warps": 1}, {"TILE": 4096, "num_warps": 8}])
@pytest.mark.parametrize(("axis", "keep"), [(None, 0.5), (None, 0.25), (0, 1.0), (1, 1.0)])
def test_a_configuration_changes_no_number(
    kernel_device: torch.device, config: dict[str, int], axis: int | None, keep: float
) -> None:
    from ttaq_kernels import fake_quant
    from ttaq_kernels._philox import Drop

    x = torch.randn(3, 5, 7, 11, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    channels = 1 if axis is None else x.shape[axis]
    grid = (torch.full((channels,), 0.3), torch.full((channels,), 3, dtype=torch.int32))
    arguments = (x, *(tensor.to(kernel_device) for tensor in grid), 0, 15, axis, None)
    drawn = (Drop.of(keep), torch.tensor(7, device=kernel_device))
    expected = fake_quant._launch_forward(*arguments, *drawn)
    with _config.forced("fake_quantize", config):
        assert torch.equal(fake_quant._launch_forward(*arguments, *drawn), expected)

"""Nested states come back as they were."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ttaq.errors import CheckpointError
from ttaq.io import load_state, save_state


def same(one: object, other: object) -> bool:
    """Equal in type, value, dtype and shape, NaN and -0.0 included."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        plain = [tensor.detach().resolve_conj().resolve_neg() for tensor in (one, other)]
        raw = [tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for tensor in plain]
        return torch.equal(*raw)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(other)) or one.hex() == other.hex()
    return one == other


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64),
)
SHARED = torch.arange(12.0).view(3, 4)
STATES = {
    "empty": {},
    "scalars": {"n": None, "t": True, "i": -(10**30), "f": 0.1, "tiny": 5e-324, "minus": -0.0, "text": 'ü\n"\ud800'},
    "bool and int stay apart": {"a": [True, 1, 1.0, "1", None, False, 0]},
    "not finite": {"nan": math.nan, "list": [math.inf, -math.inf, [math.nan]]},
    "nested": {"a": {"b": [{"c": []}, [], {}, [[1, [2]]]]}, "order": {"z": 1, "a": 2}},
    "keys that look like marks": {"$tensor": "x", "$$float": {"$float": [1]}, "$": 0, "": {"": {"": torch.ones(1)}}},
    "places that look alike": {
        "a/b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
        "a~1b": torch.full((1,), 2.0),
        "l": [SHARED],
    },
    "names of the format": {"__metadata__": torch.ones(1), "ttaq": "x", "state": {"$tensor": torch.ones(2)}},
    "random number generators": {"cpu": torch.Generator().manual_seed(3).get_state()},
    "sizes": {"0-d": torch.tensor(3), "empty": torch.zeros(0), "empty 2-d": torch.zeros(3, 0, dtype=torch.int64)},
    "shared and strided": {"all": SHARED, "row": SHARED[1], "t": SHARED.t(), "odd": SHARED[::2, 1::2], "again": SHARED},
    "expanded": {"e": torch.ones(1).expand(1000), "grad": torch.ones(2, requires_grad=True) * 2},
    "channels_last": {"c": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)},
    "lazy": {"conj": torch.tensor([1 + 2j], dtype=torch.complex64).conj(), "neg": torch.tensor([1 + 2j]).conj().imag},
    "special values": {"x": torch.tensor([math.nan, math.inf, -math.inf, -0.0, 5e-324], dtype=torch.float64)},
    **{str(dtype): {"x": torch.tensor([0.0, 1.0, 2.0]).to(dtype)} for dtype in DTYPES},
}


@pytest.mark.parametrize("name", STATES)
def test_round_trip(tmp_path: Path, name: str) -> None:
    save_state(tmp_path / "state", STATES[name])
    loaded = load_state(tmp_path / "state")
    assert same(loaded, STATES[name])
    save_state(tmp_path / "again", loaded)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "state").read_bytes()


def test_loaded_tensors_are_plain_and_separate(tmp_path: Path) -> None:
    save_state(tmp_path / "state", {"a": SHARED, "b": SHARED, "p": torch.nn.Parameter(torch.ones(2))})
    loaded = load_state(tmp_path / "state")
    loaded["a"].zero_()
    assert torch.equal(loaded["b"], SHARED)
    assert type(loaded["p"]) is torch.Tensor
    assert not loaded["p"].requires_grad
    assert loaded["a"].untyped_storage().nbytes() == SHARED.numel() * 4


def test_an_optimizer_continues_exactly(tmp_path: Path) -> None:
    def run(steps: int, weight: torch.Tensor, state: dict | None = None) -> tuple[torch.Tensor, dict]:
        parameter = torch.nn.Parameter(weight.clone())
        optimizer = torch.optim.Adam([parameter], lr=0.1)
        if state is not None:
            optimizer.load_state_dict({"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]})
        for _ in range(steps):
            optimizer.zero_grad()
            parameter.square().sum().backward()
            optimizer.step()
        return parameter.detach(), optimizer.state_dict()["state"][0]

    start = torch.tensor([1.0, -2.0])
    half, state = run(3, start)
    save_state(tmp_path / "state", {"weight": half, "adam": state})
    loaded = load_state(tmp_path / "state")
    assert torch.equal(run(3, loaded["weight"], loaded["adam"])[0], run(6, start)[0])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([1], "the state is a list, expected a dict"),
        ({"a": {"b": (1, 2)}}, "/a/b is a tuple, expected dict, list"),
        ({"a": [1, {2}]}, "/a/1 is a set"),
        ({"a": {0: 1}}, "the key 0 at /a is a int, expected text"),
        ({None: 1}, "the key None at / is a NoneType"),
        ({"a": 1j}, "/a is a complex"),
        ({"a": b"x"}, "/a is a bytes"),
        ({"a": torch.float32}, "/a is a dtype"),
        ({"a": torch.ones(2).numpy()}, "/a is a ndarray"),
        ({"a": torch.ones(1).numpy()[0]}, "/a is a float32"),
        ({"a": torch.ones(1, dtype=torch.float64).numpy()[0]}, "/a is a float64"),
        (
            {"a": torch.ones(2, dtype=torch.complex128)},
            "/a is a torch.strided tensor of torch.complex128.*cannot be stored",
        ),
        ({"a": torch.eye(2).to_sparse()}, "/a is a torch.sparse_coo tensor"),
        ({"a": torch.ones(2, device="meta")}, "/a is a .* on meta, which cannot be stored"),
        ({"\ud800": torch.ones(1)}, "cannot hold this"),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, state: object, message: str) -> None:
    save_state(tmp_path / "state", {"old": 1})
    with pytest.raises(CheckpointError, match=message):
        save_state(tmp_path / "state", state)  # type: ignore[arg-type]
    assert load_state(tmp_path / "state") == {"old": 1}


def test_a_state_that_contains_itself(tmp_path: Path) -> None:
    state: dict[str, object] = {}
    state["self"] = state
    with pytest.raises(CheckpointError, match="nested deeper than"):
        save_state(tmp_path / "state", state)


def test_tensor_names_can_be_read_by_others(tmp_path: Path) -> None:
    save_state(tmp_path / "state", {"a/b": {"x": [torch.ones(1)]}})
    with safe_open(tmp_path / "state", framework="np") as file:
        assert list(file.keys()) == ["/a~1b/x/0"]
        assert json.loads(file.metadata()["ttaq"])["state"] == {"a/b": {"x": [{"$tensor": "/a~1b/x/0"}]}}

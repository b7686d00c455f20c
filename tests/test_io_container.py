"""The file format: what is refused, what a crash leaves behind, and that nothing in a file is ever executed."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ttaq.errors import CheckpointError
from ttaq.io import FORMAT_VERSION, load_model, load_state, read_header, save_model, save_state
from ttaq.models import build

ROOT = Path(__file__).parent.parent
DAMAGED_HEADER = "is damaged: its header and their hash do not match"
STATE = {"adapted": {"w": torch.arange(100.0)}, "lr": 0.1}


def header_text(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return file.metadata()["ttaq"]


def with_text(path: Path, text: str | None) -> None:
    """The same tensors under another header."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=None if text is None else {"ttaq": text})


def with_fields(path: Path, **fields: object) -> None:
    """Other values of some fields under a hash that fits them; a field that is None is left out."""
    header = {key: value for key, value in (json.loads(header_text(path)) | fields).items() if value is not None}
    if header.pop("header_hash", None) is not None:
        header["header_hash"] = hashlib.sha256(json.dumps(header).encode()).hexdigest()
    with_text(path, json.dumps(header))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count])


def test_the_documented_layout(tmp_path: Path) -> None:
    """Read without any of ttaq's code."""
    path = tmp_path / "state"
    save_state(path, STATE)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    outer = json.loads(content[8 : 8 + length])
    text = outer["__metadata__"]["ttaq"]
    header = json.loads(text)
    body, seal = text.rsplit(', "header_hash": ', 1)
    assert seal == f'"{hashlib.sha256((body + "}").encode()).hexdigest()}"}}'
    assert header["kind"] == "state"
    assert header["format_version"] == FORMAT_VERSION == 1
    assert header["state"] == {"adapted": {"w": {"$tensor": "/adapted/w"}}, "lr": 0.1}
    assert set(header["versions"]) == {"ttaq", "torch"}
    begin, end = outer["/adapted/w"]["data_offsets"]
    body = content[8 + length :][begin:end]
    assert header["hash"] == hashlib.sha256(b'["/adapted/w", "float32", [100]]\n' + body).hexdigest()
    del header["header_hash"]
    assert read_header(path) == header


@pytest.mark.parametrize("read", [load_state, load_model, read_header], ids=lambda read: read.__name__)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        *[(lambda p, n=n: cut(p, n), "truncated, damaged or not a safetensors") for n in (0, 7, 8, 9, 100, -1, -400)],
        (lambda p: p.write_bytes(p.read_bytes() + b"more"), "truncated, damaged or not a safetensors file"),
        (lambda p: p.write_text("model = 3\n"), "truncated, damaged or not a safetensors file.*ttaq convert"),
        (lambda p: torch.save({}, p), "truncated, damaged or not a safetensors file.*ttaq convert"),
        (lambda p: with_text(p, None), "plain safetensors file without the header of ttaq.*NAME:PATH.*ttaq convert"),
        (lambda p: with_fields(p, format_version=FORMAT_VERSION + 1), "version 2, .* reads up to version 1; update"),
        (lambda p: with_fields(p, format_version=2, header_hash=None), "has format version 2, .*; update ttaq"),
        (lambda p: with_text(p, header_text(p).replace('"torch": "', '"torch": "1')), DAMAGED_HEADER),
        (lambda p: with_text(p, "{not json"), DAMAGED_HEADER),
        (lambda p: with_text(p, "[]"), DAMAGED_HEADER),
        (lambda p: with_text(p, "[" * 100_000), DAMAGED_HEADER),
        (lambda p: with_text(p, "{}"), "not one that ttaq wrote"),
        (lambda p: with_fields(p, header_hash=None), "not one that ttaq wrote"),
        (lambda p: with_fields(p, format_version="1"), "not one that ttaq wrote"),
        (lambda p: with_fields(p, format_version=True), "not one that ttaq wrote"),
        (lambda p: with_fields(p, hash=None), "not one that ttaq wrote"),
        (lambda p: with_fields(p, kind=3), "not one that ttaq wrote"),
        (lambda p: p.unlink(), "there is no file"),
        (lambda p: (p.unlink(), p.mkdir()), "is a folder, expected a file"),
    ],
)  # fmt: skip
def test_files_that_are_refused(tmp_path: Path, read, spoil, message: str) -> None:
    path = tmp_path / "file"
    if read is load_model:
        save_model(path, torch.nn.Linear(10, 20), architecture=None, kwargs={})
    else:
        save_state(path, STATE)
    spoil(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{read.__name__}: ")
    assert "\n" not in str(caught.value)


def test_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    state, model = tmp_path / "state", tmp_path / "model"
    save_state(state, STATE)
    save_model(model, torch.nn.Linear(1, 1), architecture=None, kwargs={})
    with pytest.raises(CheckpointError, match="is a state file, expected a model file"):
        load_model(state)
    with pytest.raises(CheckpointError, match="is a model file, expected a state file"):
        load_state(model)


@pytest.mark.parametrize(
    "tree", [{"a": {"$tensor": "/b"}}, {"a": {"$tensor": []}}, {"a": {"$float": "x"}}, [], {"$tensor": "/a"}, None]
)
def test_a_tree_that_save_state_never_writes(tmp_path: Path, tree: object) -> None:
    save_state(tmp_path / "state", {"a": torch.ones(1)})
    with_fields(tmp_path / "state", state=tree)
    with pytest.raises(CheckpointError, match="load_state: "):
        load_state(tmp_path / "state")


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    """Wherever it is: refused, or (in the padding of the safetensors header) without any effect."""
    path = tmp_path / "state"
    save_state(path, STATE)
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        flip(path, place)
        with pytest.raises(CheckpointError):
            load_state(path)
        path.write_bytes(content)
    assert torch.equal(load_state(path)["adapted"]["w"], STATE["adapted"]["w"])


def test_a_flipped_bit_in_a_tensor_is_a_hash_mismatch(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_state(path, STATE)
    flip(path, path.stat().st_size - 5)
    with pytest.raises(CheckpointError, match="its tensors and their hash do not match"):
        load_state(path)
    assert read_header(path)["kind"] == "state"


def test_header_is_read_without_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    model = build("cifar_resnet8")
    save_model(path, model, architecture="cifar_resnet8", kwargs={}, method="rtn", extra={"note": [1, "ü"]})
    monkeypatch.setattr("ttaq.io.container.read_tensors", None)
    monkeypatch.setattr("ttaq.io.container.hash_tensors", None)
    header = read_header(path)
    assert (header["architecture"], header["kwargs"], header["method"]) == ("cifar_resnet8", {}, "rtn")
    assert header["extra"] == {"note": [1, "ü"]}


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_state(path, STATE)
    state = load_state(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(state["adapted"]["w"], STATE["adapted"]["w"])
    state["adapted"]["w"].add_(1)


def test_permissions_links_and_folders(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        save_state(tmp_path / "new" / "folder" / "state", STATE)
    finally:
        os.umask(mask)
    target = tmp_path / "new" / "folder" / "state"
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    link = tmp_path / "link"
    link.symlink_to(target)
    save_state(link, {"a": 1})
    assert link.is_symlink()
    assert load_state(target) == {"a": 1}
    assert [path.name for path in target.parent.iterdir()] == ["state"]


def test_failed_writes_leave_the_old_file(tmp_path: Path) -> None:
    """The limit on the size of a file stands for a full disk: the write stops half-way."""
    path = tmp_path / "state"
    save_state(path, STATE)
    before = path.read_bytes()
    probe = """
import resource, sys, torch
from ttaq.errors import CheckpointError
from ttaq.io import save_state
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_state(sys.argv[1], {"big": torch.zeros(100_000)})
except CheckpointError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", probe, str(path)], capture_output=True, text=True, check=True)
    assert "cannot write" in result.stdout
    assert "unchanged" in result.stdout
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_interrupted_writes_leave_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "state"
    save_state(path, STATE)
    before = path.read_bytes()

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_state(path, {"a": 1})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "state", tmp_path / "folder"):
        with pytest.raises(CheckpointError, match="save_state: cannot write"):
            save_state(path, STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", sorted(ROOT.glob("ttaq*/**/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_in_a_file_is_executed(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {name.split(".")[0] for name in names} & {
                "pickle",
                "dill",
                "cloudpickle",
                "joblib",
                "shelve",
                "marshal",
            }
    for name, call in calls(tree):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load":
            assert path.name == "convert_foreign.py"
            assert options["weights_only"] == "True"
        if name in ("np.load", "numpy.load"):
            assert options["allow_pickle"] == "False"
        assert name not in ("eval", "exec", "torch.save", "torch.jit.load", "torch.hub.load")

"""Row files: what a kill can leave behind, foreign files, and two writers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ttaq.errors import CheckpointError
from ttaq.eval.rows import FORMAT, RowFile, read_rows

ROW = {
    "kind": "domain",
    "method": "source",
    "options": {},
    "model": "net",
    "scheme": "float",
    "model_hash": "0",
    "stream": "dataset=digits seed=0",
    "seed": 0,
    "versions": {},
    "device": "cpu",
    "domain": "fog",
    "index": 0,
    "domains": 1,
    "n": 1,
    "error": 1.5,
    "class_error": 1.5,
    "ece": 0.5,
    "parts": {},
    "trace": {},
    "latency_ms": {},
    "memory": {},
    "counters": {},
}


def line(**changes: object) -> str:
    return json.dumps({"format": FORMAT, **ROW, **changes}) + "\n"


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for index in range(2):
        with RowFile(path) as rows:
            rows.append({**ROW, "index": index})
    assert [row["index"] for row in read_rows(path)] == [0, 1]
    assert path.read_text() == line(index=0) + line(index=1)


@pytest.mark.parametrize("cut", [1, 5, 20, 200])
def test_an_unfinished_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line(index=0) + line(index=1)[:cut])
    assert [row["index"] for row in read_rows(path)] == [0]
    with RowFile(path) as rows:
        assert [row["index"] for row in rows.rows] == [0]
        rows.append({**ROW, "index": 1})
    assert path.read_text() == line(index=0) + line(index=1)


def test_a_last_line_that_only_lacks_its_newline_is_dropped_too(tmp_path: Path) -> None:
    # It cannot be told from a number that was cut, such as 12.34 written as 12.3.
    path = tmp_path / "rows.jsonl"
    path.write_text(line(index=0) + line(index=1)[:-1])
    assert [row["index"] for row in read_rows(path)] == [0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PK\x03\x04 no newline at all", "not a row file"),
        (b"some notes\nmore notes\n", "line 1 of .* is not JSON"),
        (b"[1, 2]\n", "line 1 of .* is not a row"),
        (line().encode() + b"{}\n", "line 2 of .* is not a row"),
        (line(format=FORMAT + 1).encode(), "install a newer ttaq"),
        (line(format=FORMAT - 1).encode(), "run it again"),
        (line(seed="zero").encode(), "no usable 'seed'"),
        (line(error=None).encode(), "no usable 'error'"),
    ],
)
def test_foreign_content_is_refused_and_kept(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_rows(path)
    with pytest.raises(CheckpointError, match=says), RowFile(path):
        pass
    assert path.read_bytes() == content


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "rows.jsonl"
    hold = f"""
import sys
from ttaq.eval.rows import RowFile
with RowFile({str(path)!r}):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="another process is writing"), RowFile(path):
            pass
        other.kill()
        other.wait()
    with RowFile(path) as rows:
        rows.append(ROW)
    assert len(read_rows(path)) == 1


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "rows.jsonl", tmp_path):
        with pytest.raises(CheckpointError, match="cannot write"), RowFile(path):
            pass
    with pytest.raises(CheckpointError, match="not a file"):
        read_rows(tmp_path / "absent.jsonl")
    with pytest.raises(CheckpointError, match="not open"):
        RowFile(tmp_path / "rows.jsonl").append(ROW)

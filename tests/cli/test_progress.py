"""The progress line: on a terminal, piped, and without tqdm."""

import contextlib
import os
import subprocess
import sys

import pytest

from ttaq.cli.progress import ProgressLine

CALLS = """
from ttaq.cli.progress import ProgressLine
with ProgressLine("tent") as progress:
    for done in range(1, 5):
        progress(done, 4, "fog")
"""


def test_piped_it_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("tent") as progress:
        for done in range(1, 5):
            progress(done, 4, "fog")
    assert capsys.readouterr() == ("", "")


def test_without_tqdm_it_is_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with ProgressLine("tent") as progress:
        progress(1, 2, "fog")
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_it_names_what_is_done() -> None:
    pytest.importorskip("tqdm")
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    environment = {**os.environ, "TQDM_MININTERVAL": "0"}
    said = b""
    with subprocess.Popen([sys.executable, "-c", CALLS], stderr=terminal, env=environment) as process:
        os.close(terminal)
        with contextlib.suppress(OSError):  # Raised at the end, when the child has closed its side.
            while part := os.read(reader, 4096):
                said += part
        assert process.wait() == 0
    os.close(reader)
    assert b"tent:" in said
    assert b"4/4" in said
    assert b"fog" in said

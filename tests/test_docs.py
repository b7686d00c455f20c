"""Tables in the documentation are what the committed rows say, and its links lead somewhere."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from ttaq.cli import main

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


# The commands that pages give for their tables.
REPORTS = [
    line.split()[1:]
    for page in sorted(ROOT.glob("docs/*.md"))
    for line in page.read_text().splitlines()
    if line.startswith("ttaq report benchmarks/")
]


@pytest.mark.parametrize("command", REPORTS, ids=lambda command: Path(command[1]).stem)
def test_tables_are_made_from_the_rows_by_the_command_beside_them(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    out = command.index("--out") + 1
    table = tmp_path / "table.md"
    drawn = [tmp_path / "plot.png" if word.endswith(".png") else word for word in command]
    assert main([*map(str, drawn[:out]), str(table), *map(str, drawn[out + 1 :])]) == 0
    assert table.read_text() == (ROOT / command[out]).read_text()


# What of `benchmarks` prints tables of rows: module and arguments.
TABLES = [
    (match[1], match[2].split(), page)
    for page in sorted(ROOT.glob("docs/*.md"))
    for match in re.finditer(r"^python -m benchmarks\.(\w+_(?:result|choice)) (.*[^\\])$", page.read_text(), re.M)
]


@pytest.mark.parametrize(("module", "arguments", "page"), TABLES, ids=[f"{m} {' '.join(a)}" for m, a, _ in TABLES])
def test_tables_are_what_the_command_beside_them_prints(
    module: str,
    arguments: list[str],
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    drawn = [str(tmp_path / "plot.png") if word.endswith(".png") else word for word in arguments]
    monkeypatch.setattr("sys.argv", [module, *drawn])
    importlib.import_module(f"benchmarks.{module}").main()
    assert capsys.readouterr().out in page.read_text()


def test_there_are_tables_of_every_kind() -> None:
    kinds = {"quantization_choice", "quantization_result", "adaptation_choice", "adaptation_result", "rounds_result"}
    assert {module for module, _, _ in TABLES} == kinds


@pytest.mark.parametrize("rows", sorted(ROOT.glob("benchmarks/results/*.jsonl")), ids=lambda path: path.name)
def test_rows_are_explained(rows: Path) -> None:
    assert any(f"benchmarks/results/{rows.name}" in page.read_text() for page in ROOT.glob("docs/**/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"

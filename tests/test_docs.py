"""Tables in the documentation are what the committed rows say, and its links lead somewhere."""

from __future__ import annotations

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


@pytest.mark.parametrize("rows", sorted(ROOT.glob("benchmarks/results/*.jsonl")), ids=lambda path: path.name)
def test_rows_are_explained(rows: Path) -> None:
    assert any(f"benchmarks/results/{rows.name}" in page.read_text() for page in ROOT.glob("docs/**/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"

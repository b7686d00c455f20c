"""Tables in the documentation are what the committed rows say, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ttaq.cli import main

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("rows", sorted(ROOT.glob("benchmarks/results/*_rtn.jsonl")), ids=lambda path: path.stem)
def test_tables_are_made_from_the_rows(rows: Path, tmp_path: Path) -> None:
    assert main(["report", str(rows), "--out", str(tmp_path / "table.md")]) == 0
    assert (tmp_path / "table.md").read_text() == (ROOT / "docs/results" / f"{rows.stem}.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"

"""Writes the tables of `docs/results/` from the recorded results in `eval/results/`.

    python eval/results_pages.py

Only the text between `<!-- table: NAME -->` and `<!-- end -->` is generated; a test fails if it is
stale.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

import families
import study_recovery
import study_solvers
from tables import RESULTS, ROOT

DOCS = ROOT / "docs" / "results"
PAGES = ("solvers.md", "recovery.md", "families.md")
PICTURES = {RESULTS / "study_solvers.png": DOCS / "study_solvers.png"}
MARKED = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """The page with its generated parts updated."""
    return MARKED.sub(lambda m: f"{m[1]}\n{generated(m[2])}\n\n{m[3]}", page)


def generated(name: str) -> str:
    """The generated part NAME."""
    if name == "solvers":
        lines = study_solvers.summary()
    elif name in study_solvers.PATTERNS:
        lines = study_solvers.details(name)[1:]  # without the heading
    elif name == "recovery: scores":
        lines = study_recovery.quality(screen())
    elif name == "recovery: costs":
        lines = study_recovery.costs(screen())
    elif name == "families":
        lines = family_tables()
    else:
        raise SystemExit(f"docs/results has an unknown table {name!r}")
    return "\n".join(lines).strip()


def screen() -> study_recovery.Study:
    """The recovery study with default arguments, whose rows the page shows."""
    defaults = {"work": Path("runs"), "tokens": 8 * study_recovery.UNIT}
    args = argparse.Namespace(**defaults, whole=False, model=None)
    return study_recovery.Study(args, Path("model"), {})


def family_tables() -> list[str]:
    """The page of `families.py` without its title and the parts that are equal in all rows."""
    lines = families.PAGE.read_text(encoding="utf-8").splitlines()[2:]
    works = re.compile(r"(\| \S+ \| .+) \| (\d+ matrices of \d+ blocks), [\d.]+ ?% zeros, .* \|")
    return [works.sub(r"\1 | \2 |", line) for line in lines]


def main() -> int:
    """Updates the pages and copies the pictures; returns the exit code."""
    for page in (DOCS / name for name in PAGES):
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    for source, copy in PICTURES.items():
        shutil.copyfile(source, copy)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One report over any runs: tables, pictures, a page that can be passed on, CSV.

    python eval/compare.py RUN [RUN ...] [-o DIR] [--title TITLE]

RUN is a run's output_dir, or a folder of them. DIR (default: comparison) gets `report.html` (one
file, pictures inside), `report.md`, `report.csv` and `figures/`. Needs no GPU and no network.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from cap_llm.report.runs import collect, run_directories  # noqa: E402
from cap_llm.report.write import write_report  # noqa: E402
from cap_llm.runtime.console import Console  # noqa: E402
from cap_llm.runtime.errors import UserError  # noqa: E402


def main() -> int:
    """Writes the report; returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="RUN is an output_dir or a folder of them."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--out", type=Path, default=Path("comparison"), metavar="DIR")
    parser.add_argument("--title", default="Comparison of runs")
    options = parser.parse_args()
    console = Console()
    try:
        results = [r for run in run_directories(options.runs, console) for r in collect(run)]
        page = write_report(results, options.out, options.title, console)
    except UserError as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    console.say(f"report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

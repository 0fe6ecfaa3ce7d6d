"""Recorded results, tables and arguments, shared by the scripts of eval/.

Scripts import this module before cap_llm, which then need not be installed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from cap_llm.runtime.console import quiet_libraries  # noqa: E402
from cap_llm.runtime.files import read_json, write_json  # noqa: E402

quiet_libraries()

RESULTS = ROOT / "eval" / "results"


def read_results(path: Path) -> dict[str, dict]:
    """The recorded results by row; `50 %` in names of earlier versions becomes `50%`."""
    recorded = read_json(path) if path.exists() else {}
    return {name.replace(" %", "%"): figures for name, figures in recorded.items()}


def record(path: Path, name: str, figures: dict) -> None:
    """Adds or replaces a row of a results file."""
    path.parent.mkdir(exist_ok=True)
    write_json(path, read_results(path) | {name: figures})


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def mean_and_spread(values: Iterable[float], form: str = ".2f") -> str:
    """Mean ± standard deviation; only the mean for one value, empty for none."""
    values = list(values)
    more = f" ± {statistics.stdev(values):{form.strip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{more}" if values else ""


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def arguments(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, with the default of each option."""
    return argparse.ArgumentParser(description=doc, formatter_class=_Help)

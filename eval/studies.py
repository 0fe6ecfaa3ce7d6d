"""What the studies share: a run of the entry as a cell of a study, and tables."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from cap_llm.runtime.interrupt import held_back

TRAIN = Path(__file__).resolve().parent.parent / "cap_llm" / "train.py"
STOPS = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of an entry that was stopped


def entry(options: list[str], ranks: int = 1) -> int:
    """Runs the entry, under a launcher where it takes several ranks; the exit code.

    A signal that asks this process to stop is the entry's: it ends at its next safe point.
    """
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(TRAIN), *options]
    with held_back() as request:
        process, told = subprocess.Popen(command, env=environment), False
        while True:
            try:
                code = process.wait(1)
                break
            except subprocess.TimeoutExpired:
                if request.number == signal.SIGTERM and not told:  # a terminal's Ctrl-C is for all
                    process.terminate()
                    told = True
    if request.number:
        return 128 + request.number
    return 128 - code if code < 0 else code  # as a shell says it


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table's lines."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def spread(values: Iterable[float], form: str = ".2f") -> str:
    """Mean ± standard deviation, where there are several values; nothing where there is none."""
    values = list(values)
    more = f" ± {statistics.stdev(values):{form.strip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{more}" if values else ""

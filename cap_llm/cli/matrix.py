"""A matrix of runs, used by the demo, the acceptance check, the studies and a benchmark.

Each row is a run of the entry point in its own run directory. Finished rows are skipped, an
interrupted row resumes, and a row that starts from another row's model runs after it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cap_llm.runtime.console import Console
from cap_llm.runtime.interrupt import defer_signals

DENSE = "dense"  # the stage of a row that only scores the dense model
STOPS = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of an interrupted run


@dataclass
class Row:
    """One run of the entry point.

    Attributes:
        name: identifies the row in tables, logs and result files.
        options: options by name; a row as a value stands for that row's model.
        stage: the stage that writes this row's model.
        ranks: number of processes.
    """

    name: str
    options: dict[str, object] = field(default_factory=dict)
    stage: str = "oneshot"
    ranks: int = 1

    @property
    def needs(self) -> list[Row]:
        """The rows whose models this row reads."""
        return [value for value in self.options.values() if isinstance(value, Row)]


@dataclass
class Matrix:
    """Runs rows that start from one dense model.

    Attributes:
        work: folder of the run directories.
        model: the dense model, a directory or a name on the hub.
        common: options of all rows.
    """

    work: Path
    model: Path | str
    common: dict[str, object] = field(default_factory=dict)

    def folder(self, row: Row) -> Path:
        """The row's run directory."""
        name = re.sub(r"\W+", "-", row.name.replace(":", "of"))
        return self.work / name.strip("-").lower()

    def model_of(self, row: Row) -> Path:
        """The directory of the row's model."""
        return self.folder(row) / row.stage

    def has_model(self, row: Row) -> bool:
        """Whether the row's model is complete and still has its weights."""
        from cap_llm.models.files import INDEX

        files = (self.model_of(row) / name for name in ("done.json", INDEX))
        return row.stage == DENSE or all(file.exists() for file in files)

    def command(self, row: Row, scores: dict | None = None, ranks: int = 0) -> list[str]:
        """The command that builds the row's model and, with `scores`, evaluates it."""
        start = {"model.path": self.model}
        if isinstance(row.options.get("model.path"), Row):
            start["model.dense"] = self.model
        output = {"output_dir": self.folder(row), "name": row.name}
        stages = [row.stage] * (row.stage != DENSE) + ["evaluate"] * (scores is not None)
        options = self.common | output | start | row.options | (scores or {}) | {"stages": stages}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        ranks = ranks or row.ranks
        command = [sys.executable, *([*launcher, str(ranks)] if ranks > 1 else [])]
        command.append(str(Path(__file__).parents[1] / "train.py"))
        for name, value in options.items():
            value = self.model_of(value) if isinstance(value, Row) else value
            command += [f"--{name}", _text(value)]
        return command

    def run(self, row: Row, scores: dict | None = None, ranks: int = 0) -> int:
        """Builds the models that the row needs, then runs the row; returns an exit code."""
        for need in row.needs:
            if not self.has_model(need) and (code := self.run(need)):
                return code
        if not self.has_model(row):  # without weights, `done.json` describes a deleted model
            (self.model_of(row) / "done.json").unlink(missing_ok=True)
        return call(self.command(row, scores, ranks), ranks or row.ranks)

    def run_all(self, rows: list[Row], work: Callable[[Row], int], console: Console) -> int:
        """Calls `work`, which returns an exit code, on each row; returns an exit code for all.

        A failed row does not stop the others, except those that need it. An interrupt or a failed
        dense row stops all.
        """
        failed: dict[str, str] = {}
        for n, row in enumerate(rows, 1):
            console.say(f"\n[{n}/{len(rows)}] {row.name}", style="bold")
            if missing := [need.name for need in row.needs if need.name in failed]:
                failed[row.name] = f"needs {missing[0]}"
            elif code := work(row):
                if code in STOPS or row.stage == DENSE:
                    return code
                failed[row.name] = f"exit code {code}, see {self.folder(row)}/log.txt"
        for name, why in failed.items():
            console.say(f"failed: {name}: {why}", style="red")
        return 1 if failed else 0


def call(command: list[str], ranks: int = 1) -> int:
    """Runs a command on all cores, forwards SIGTERM to it, and returns its exit code."""
    import torch

    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    with defer_signals() as request:
        process, forwarded = subprocess.Popen(command, env=environment), False
        while True:
            try:
                code = process.wait(1)
                break
            except subprocess.TimeoutExpired:  # Ctrl-C reaches the whole process group
                if request.number == signal.SIGTERM and not forwarded:
                    process.terminate()
                    forwarded = True
    if request.number:
        return 128 + request.number
    return 128 - code if code < 0 else code  # the shell's convention


def _text(value) -> str:
    """Formats an option's value for the command line."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)

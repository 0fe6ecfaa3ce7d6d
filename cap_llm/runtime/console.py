"""Console output: progress bar, one row per block, final table; also written to `log.txt`.

Only rank 0 prints, so callers need not check their rank. Without a terminal (a SLURM log), the
output has no progress bar and no control characters.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from cap_llm.runtime.interrupt import Stopped

PLAIN_WIDTH = 120  # columns of a log file


class Bar:
    """The progress of one stage; its methods do nothing on ranks other than 0."""

    def __init__(self, progress: Progress | None, task):
        self._progress, self._task = progress, task

    def phase(self, text: str) -> None:
        """Shows the current activity behind the bar."""
        if self._progress:
            self._progress.update(self._task, phase=text)

    def advance(self, n: int = 1) -> None:
        """Advances the bar by `n` units."""
        if self._progress:
            self._progress.advance(self._task, n)


class _Plain(RichConsole):
    """Prints text without interpreting markup, because names and paths may look like it."""

    def __init__(self, **options):
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """Ends the run if the reader of its output is gone (`| head`)."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Stopped(signal.SIGPIPE)


class _TimestampedFile(io.TextIOBase):
    """A log file that prefixes each line with the time."""

    def __init__(self, path: Path):
        # open until the process ends
        self._file = open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115

    def write(self, text: str) -> int:
        """Writes complete lines."""
        now = time.strftime("%H:%M:%S ")
        return self._file.write(re.sub("^(?!\\Z)", now, text, flags=re.MULTILINE))

    def flush(self) -> None:
        self._file.flush()


class Console:
    """Prints on rank 0 only.

    Attributes:
        quiet: print only warnings, errors and `loud` lines; the log still has all lines.
    """

    def __init__(self, enabled: bool = True):
        self._enabled, self.quiet = enabled, False
        if isinstance(sys.stdout, io.TextIOWrapper):  # file names may not be valid text
            sys.stdout.reconfigure(errors="backslashreplace")
        self._out = _Plain()
        if not self._out.is_terminal:
            self._out = _Plain(width=PLAIN_WIDTH)
        self._log: RichConsole | None = None

    def log_to(self, path: Path) -> None:
        """Also writes all further output to `path`, with times and without colors."""
        if self._enabled:
            self._log = _Plain(file=_TimestampedFile(path), width=PLAIN_WIDTH)

    @property
    def width(self) -> int:
        """Columns available to a table, on the screen and in the log."""
        return min(out.width for out in (self._out, self._log) if out)

    def say(self, text: str, style: str | None = None, loud: bool = False) -> None:
        """Prints a line of plain text; yellow marks warnings, red marks failures."""
        self._print(printable(text), style=style, loud=loud or style in ("yellow", "red"))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table; the first column is text, the others are numbers."""
        table = Table(title=printable(title), title_justify="left", title_style="bold")
        for i, name in enumerate(columns):
            justify = "left" if i == 0 else "right"
            table.add_column(printable(name), justify=justify, no_wrap=True)
        for row in rows:
            table.add_row(*map(printable, row))
        self._print(table)

    @contextlib.contextmanager
    def bar(self, title: str, total: int, unit: str) -> Iterator[Bar]:
        """Shows a progress bar over `total` units during the body."""
        if self.quiet or not (self._enabled and self._out.is_terminal):
            yield _LogBar(self, title, total, unit) if self._enabled else Bar(None, None)
            return
        columns = (
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(compact=True),
            # truncated first if the line is full, so that the count and the time stay visible
            TextColumn(
                "{task.fields[phase]}", markup=False, table_column=Column(ratio=1, no_wrap=True)
            ),
        )
        with Progress(*columns, console=self._out, transient=True, expand=True) as progress:
            yield Bar(progress, progress.add_task(printable(title), total=total, phase=""))

    def _print(self, *args, loud: bool = False, **options) -> None:
        if not self._enabled:
            return
        for out in filter(None, (None if self.quiet and not loud else self._out, self._log)):
            with contextlib.suppress(OSError):  # a full disk is reported when results are written
                out.print(*args, **options)


SILENT = Console(enabled=False)


class _LogBar(Bar):
    """Prints a line every `INTERVAL` seconds instead of a bar, for log files."""

    INTERVAL = 30.0

    def __init__(self, console: Console, title: str, total: int, unit: str):
        self._console, self._title, self._total, self._unit = console, title, total, unit
        self._done, self._start, self._last = 0, time.monotonic(), time.monotonic()

    def phase(self, text: str) -> None:
        pass

    def advance(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._last >= self.INTERVAL and self._done < self._total:
            self._last = now
            left = (now - self._start) / self._done * (self._total - self._done)
            self._console.say(
                f"{self._title}: {self._done}/{self._total} {self._unit}, "
                f"about {format_duration(left)} left"
            )


def printable(text: str) -> str:
    """Escapes control characters and the bytes of file names that are not valid text."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda c: ascii(c.group())[1:-1], text
    )


def format_duration(seconds: float) -> str:
    """Formats seconds: 8.1 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    return f"{int(minutes // 60)} h {int(minutes % 60)} min"


def format_bytes(n_bytes: float) -> str:
    """Formats bytes in binary units: 3.2 GiB, 512 MiB, 40 KiB."""
    if n_bytes >= 2**30:
        return f"{n_bytes / 2**30:.1f} GiB"
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.0f} KiB"


def quiet_libraries() -> None:
    """Silences the libraries and sets their thread policy; call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")

    # Otherwise OpenMP threads spin at barriers: if another process uses one of their cores, two
    # threads are then many times slower than one.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

"""What the user sees: one bar, one row a block, a closing table, and the same text in `log.txt`.

Only the first rank speaks; the guard lives here, so that no caller asks which rank it is. Without
a terminal (a SLURM log) there is no bar and no control character, only the rows.
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
    """One stage's progress. Its methods do nothing on silent ranks."""

    def __init__(self, progress: Progress | None, task):
        self._progress, self._task = progress, task

    def phase(self, text: str) -> None:
        """Says what is being done now, behind the bar."""
        if self._progress:
            self._progress.update(self._task, phase=text)

    def advance(self, n: int = 1) -> None:
        """Moves the bar by n of its units."""
        if self._progress:
            self._progress.advance(self._task, n)


class _Plain(RichConsole):
    """Prints names and paths as they are: what looks like markup in them is none."""

    def __init__(self, **options):
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """Ends the run, as the tools do whose reader has gone (`| head`)."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Stopped(signal.SIGPIPE)


class _Stamped(io.TextIOBase):
    """A log file that writes the time before each line."""

    def __init__(self, path: Path):
        # open as long as the process
        self._file = open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115

    def write(self, text: str) -> int:
        """Writes whole lines."""
        now = time.strftime("%H:%M:%S ")
        return self._file.write(re.sub("^(?!\\Z)", now, text, flags=re.MULTILINE))

    def flush(self) -> None:
        self._file.flush()


class Console:
    """Prints on the first rank only.

    Attributes:
        quiet: print only what has the style of a warning, and what is `loud`; the log has all.
    """

    def __init__(self, speaks: bool = True):
        self._speaks, self.quiet = speaks, False
        if isinstance(sys.stdout, io.TextIOWrapper):  # file names may hold what is no text
            sys.stdout.reconfigure(errors="backslashreplace")
        self._out = _Plain()
        if not self._out.is_terminal:
            self._out = _Plain(width=PLAIN_WIDTH)
        self._log: RichConsole | None = None

    def log_to(self, path: Path) -> None:
        """Also writes everything that is said from now on to `path`, with times, without colors."""
        if self._speaks:
            self._log = _Plain(file=_Stamped(path), width=PLAIN_WIDTH)

    @property
    def width(self) -> int:
        """Columns that a table may take, on the screen and in the log."""
        return min(out.width for out in (self._out, self._log) if out)

    def say(self, text: str, style: str | None = None, loud: bool = False) -> None:
        """Prints a line of plain text; yellow and red are for warnings and failures."""
        self._print(printable(text), style=style, loud=loud or style in ("yellow", "red"))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table; the first column is text, the others are figures."""
        table = Table(title=printable(title), title_justify="left", title_style="bold")
        for i, name in enumerate(columns):
            justify = "left" if i == 0 else "right"
            table.add_column(printable(name), justify=justify, no_wrap=True)
        for row in rows:
            table.add_row(*map(printable, row))
        self._print(table)

    @contextlib.contextmanager
    def bar(self, title: str, total: int, unit: str) -> Iterator[Bar]:
        """A bar over `total` units, for the body of the `with`."""
        if self.quiet or not (self._speaks and self._out.is_terminal):
            yield _LoggedBar(self, title, total, unit) if self._speaks else Bar(None, None)
            return
        columns = (
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(compact=True),
            # cut short where a line is full, so that the count and the time stay whole
            TextColumn(
                "{task.fields[phase]}", markup=False, table_column=Column(ratio=1, no_wrap=True)
            ),
        )
        with Progress(*columns, console=self._out, transient=True, expand=True) as progress:
            yield Bar(progress, progress.add_task(printable(title), total=total, phase=""))

    def _print(self, *args, loud: bool = False, **options) -> None:
        if not self._speaks:
            return
        for out in filter(None, (None if self.quiet and not loud else self._out, self._log)):
            with contextlib.suppress(OSError):  # a full disk is reported where results are written
                out.print(*args, **options)


SILENT = Console(speaks=False)


class _LoggedBar(Bar):
    """The bar of a log file: a line now and then instead of a moving picture."""

    SECONDS = 30.0

    def __init__(self, console: Console, title: str, total: int, unit: str):
        self._console, self._title, self._total, self._unit = console, title, total, unit
        self._done, self._start, self._said = 0, time.monotonic(), time.monotonic()

    def phase(self, text: str) -> None:
        pass

    def advance(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._said >= self.SECONDS and self._done < self._total:
            self._said = now
            left = (now - self._start) / self._done * (self._total - self._done)
            self._console.say(
                f"{self._title}: {self._done} of {self._total} {self._unit}, "
                f"about {format_duration(left)} left"
            )


def printable(text: str) -> str:
    """`text` with backslashes in place of control characters, which a terminal would obey, and of
    bytes of file names that are not text, which no file takes."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda c: ascii(c.group())[1:-1], text
    )


def format_duration(seconds: float) -> str:
    """Seconds as a person writes them: 8.1 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    return f"{int(minutes // 60)} h {int(minutes % 60)} min"


def format_bytes(n_bytes: float) -> str:
    """Bytes in binary units: 3.2 GiB, 512 MiB, 40 KiB."""
    if n_bytes >= 2**30:
        return f"{n_bytes / 2**30:.1f} GiB"
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.0f} KiB"


def quiet_libraries() -> None:
    """Turns off the chatter of the libraries and makes their threads good neighbors; call before
    they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")

    # OpenMP's threads would spin at barriers: with another busy process on one of their cores, two
    # threads are then many times slower than one.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

"""What the user sees: one bar, one row a block, a closing table, and the same text in `log.txt`.

Only the first rank speaks; the guard lives here, so that no caller asks which rank it is. Without
a terminal (a SLURM log) there is no bar and no control character, only the rows.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

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


class Console:
    """Prints on the first rank, keeps quiet on the others."""

    def __init__(self, speaks: bool = True):
        self._speaks = speaks
        self._out = RichConsole(highlight=False, soft_wrap=True)
        if not self._out.is_terminal:
            self._out = RichConsole(highlight=False, soft_wrap=True, width=PLAIN_WIDTH)
        self._log: RichConsole | None = None

    def log_to(self, path: Path) -> None:
        """Also writes everything that is said from now on to `path`, without colours."""
        if self._speaks:
            # open as long as the process; a file's name may be no Unicode text
            file = open(path, "a", 1, "utf-8", "backslashreplace")  # noqa: SIM115
            self._log = RichConsole(file=file, width=PLAIN_WIDTH, highlight=False, soft_wrap=True)

    @property
    def width(self) -> int:
        """Columns that a table may take, on the screen and in the log."""
        return min(out.width for out in (self._out, self._log) if out)

    def say(self, text: str, style: str | None = None) -> None:
        """Prints a line of plain text."""
        self._print(text, style=style, markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table; the first column is text, the others are figures."""
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, name in enumerate(columns):
            table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self._print(table)

    @contextlib.contextmanager
    def bar(self, title: str, total: int, unit: str) -> Iterator[Bar]:
        """A bar over `total` units, for the body of the `with`."""
        if not (self._speaks and self._out.is_terminal):
            yield _LoggedBar(self, title, total, unit) if self._speaks else Bar(None, None)
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(compact=True),
            # cut short where a line is full, so that the count and the time stay whole
            TextColumn("{task.fields[phase]}", table_column=Column(ratio=1, no_wrap=True)),
        )
        with Progress(*columns, console=self._out, transient=True, expand=True) as progress:
            yield Bar(progress, progress.add_task(title, total=total, phase=""))

    def _print(self, *args, **options) -> None:
        if not self._speaks:
            return
        self._out.print(*args, **options)
        if self._log:
            with contextlib.suppress(OSError):  # a full disk is reported where results are written
                self._log.print(*args, **options)


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
                f"about {duration(left)} left"
            )


def duration(seconds: float) -> str:
    """Seconds as a person writes them: 8.1 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    return f"{int(minutes // 60)} h {int(minutes % 60)} min"


def size(n_bytes: float) -> str:
    """Bytes in binary units: 3.2 GiB, 512 MiB, 40 KiB."""
    if n_bytes >= 2**30:
        return f"{n_bytes / 2**30:.1f} GiB"
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.0f} KiB"


def quiet_libraries() -> None:
    """Turns off the chatter of the libraries; call before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")

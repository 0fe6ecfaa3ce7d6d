"""Signals that stop a job, at once or at the next safe point.

A signal raises `Stopped`, a `BaseException`, so that no `except Exception` catches it. Training has
a safe point every few seconds: it defers signals (`defer_signals`) until all ranks have written a
checkpoint together.

SIGTERM, SIGINT and SIGHUP come from a user or the cluster. A batch file sends SIGUSR2 shortly
before its time limit (NCCL uses SIGUSR1). SIGALRM is this process's own timer
(`stop_before_limit`). After SIGUSR2 and SIGALRM the job is requeued.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

from cap_llm.runtime.errors import RankLost, UserError

REQUEUE_SIGNALS = (signal.SIGUSR2, signal.SIGALRM)
# `nohup` ignores SIGHUP, and so does this process then.
_HANGUP = (signal.SIGHUP,) if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else ()
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *_HANGUP)
SIGNALS = (*STOP_SIGNALS, *REQUEUE_SIGNALS)


class Stopped(BaseException):
    """A signal arrived; `args[0]` is its number. SIGPIPE means that the output has no reader."""


def raise_on_signals() -> None:
    """Makes signals raise `Stopped`, also SIGINT, which a shell's background jobs ignore.

    Raises:
        UserError: SLURM_JOB_END_TIME is not a time.
    """
    _raised.clear()
    for number in SIGNALS:
        signal.signal(number, _raise)
    stop_before_limit(60.0, share=0.1)


def stop_before_limit(seconds: float, share: float = 1.0) -> None:
    """Sets a timer that raises SIGALRM before the job's time limit, if it has one.

    Args:
        seconds: time between the signal and the limit.
        share: upper bound of that time, as a fraction of the time left.
    """
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        try:
            left = float(end) - time.time()
            after = max(1.0, left - min(seconds, share * left))
            if left > 0:  # otherwise the variable is from an earlier job
                signal.setitimer(signal.ITIMER_REAL, after)
        except (ValueError, OverflowError, OSError):
            raise UserError(
                f"SLURM_JOB_END_TIME is {end!r}; it must be a Unix time in seconds. Unset it."
            ) from None


def ignore_signals() -> None:
    """Ignores further signals, because the run is already ending."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


_raised: list[int] = []


def _raise(number, frame) -> None:
    _raised.append(number)
    raise Stopped(number)


def stopped_by(error: BaseException) -> int | None:
    """The signal that caused an exception, or None.

    Compiled code of a library may turn `Stopped` into another exception. When a rank dies, its
    launcher stops the other ranks; that signal is not the cause.
    """
    if isinstance(error, RankLost):
        return None
    return error.args[0] if isinstance(error, Stopped) else _raised[-1] if _raised else None


class Request:
    """The first signal that arrived while signals were deferred; 0 if none did."""

    def __init__(self):
        self.number = 0

    def _note(self, number, frame) -> None:
        self.number = self.number or number


@contextlib.contextmanager
def defer_signals() -> Iterator[Request]:
    """Records signals during the body instead of raising them."""
    request = Request()
    with _handler(SIGNALS, request._note):
        yield request


def default_signals() -> contextlib.AbstractContextManager:
    """Lets stop signals end the process at once during the body.

    The body waits in compiled code, where Python's signal handlers do not run.
    """
    return _handler(STOP_SIGNALS, signal.SIG_DFL)


@contextlib.contextmanager
def _handler(numbers: tuple[int, ...], handler: Callable | int) -> Iterator[None]:
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, previous in zip(numbers, before, strict=True):
            signal.signal(number, previous)


def exit_code(error: BaseException) -> int:
    """128 + the signal's number for a stop, 2 for bad input or out of memory, 1 otherwise."""
    if number := stopped_by(error):
        return 128 + number
    torch = sys.modules.get("torch")  # not imported here, so that `--help` stays fast
    full_gpu = torch.OutOfMemoryError if torch else MemoryError
    expected = isinstance(error, UserError | MemoryError | full_gpu)
    return 2 if expected or is_file_error(error) else 1


def is_file_error(error: BaseException) -> bool:
    """Whether the system rejects a file or folder: its permissions, name, type or disk."""
    return isinstance(error, OSError) and isinstance(error.filename, str | os.PathLike)

"""Signals that ask a job to stop: at once, or at the next safe point.

They end a run by the exception `Stopped`, which is no `Exception`, so that nothing on the way takes
it for an error. Training, which has a safe point every few seconds, holds them back (`held_back`)
until all ranks have written a checkpoint together.

SIGTERM, SIGINT and SIGHUP are a person's or the cluster's; SIGUSR2 is what a batch file sends when
its time is nearly up (not SIGUSR1, which NCCL uses), and SIGALRM is this process's own clock
(`stop_before_limit`). After the last two the job is meant to go on by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

from cap_llm.runtime.errors import RankLost, UserError

GOES_ON = (signal.SIGUSR2, signal.SIGALRM)
# `nohup` has SIGHUP ignored: then it stays so
_HANGUP = (signal.SIGHUP,) if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else ()
ENDS = (signal.SIGTERM, signal.SIGINT, *_HANGUP)
SIGNALS = (*ENDS, *GOES_ON)


class Stopped(BaseException):
    """A signal has come; `args[0]` is its number. SIGPIPE: nobody reads the output any more."""


def stop_at_once() -> None:
    """Makes the signals raise `Stopped`. SIGINT too: a shell's background job ignores it else.

    Raises:
        UserError: SLURM's time limit is not a time.
    """
    _raised.clear()
    for number in SIGNALS:
        signal.signal(number, _raise)
    stop_before_limit(60.0, share=0.1)


def stop_before_limit(seconds: float, share: float = 1.0) -> None:
    """Sets the clock: SIGALRM comes `seconds` before the job's time limit, where it has one, and
    leaves at most `share` of the time from now on unused."""
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        try:
            left = float(end) - time.time()
            after = max(1.0, left - min(seconds, share * left))
            if left > 0:  # else it is an earlier job's
                signal.setitimer(signal.ITIMER_REAL, after)
        except (ValueError, OverflowError, OSError):
            raise UserError(
                f"SLURM_JOB_END_TIME is {end!r}; it must be in seconds since 1970. Unset it."
            ) from None


def stop_no_more() -> None:
    """Further signals change nothing: the run is ending already."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


_raised: list[int] = []


def _raise(number, frame) -> None:
    _raised.append(number)
    raise Stopped(number)


def stopped_by(error: BaseException) -> int | None:
    """The signal behind an exception that ends the run, or None.

    A `Stopped` that comes up inside a library's compiled code may leave it as another exception.
    A lost rank's launcher has asked the others to stop: that is no reason of their own.
    """
    if isinstance(error, RankLost):
        return None
    return error.args[0] if isinstance(error, Stopped) else _raised[-1] if _raised else None


class Request:
    """Whether a signal has come while they were held back."""

    def __init__(self):
        self.number = 0

    def _note(self, number, frame) -> None:
        self.number = self.number or number


@contextlib.contextmanager
def held_back() -> Iterator[Request]:
    """For the body of the `with`, signals are noted instead of raised."""
    request = Request()
    with _handled(SIGNALS, request._note):
        yield request


def deadly() -> contextlib.AbstractContextManager:
    """For the body of the `with`, the signals that end a run end the process here and now: it waits
    in compiled code, where Python's handlers are not heard."""
    return _handled(ENDS, signal.SIG_DFL)


@contextlib.contextmanager
def _handled(numbers: tuple[int, ...], handler: Callable | int) -> Iterator[None]:
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, earlier in zip(numbers, before, strict=True):
            signal.signal(number, earlier)


def exit_code(error: BaseException) -> int:
    """128 + signal for a stop, 2 for bad input or too little memory, 1 for what went wrong."""
    if number := stopped_by(error):
        return 128 + number
    users = isinstance(error, UserError | MemoryError | torch_out_of_memory())
    return 2 if users or of_a_file(error) else 1


def of_a_file(error: BaseException) -> bool:
    """Whether the system refuses a file or folder: permissions, its name, its kind, the disk."""
    return isinstance(error, OSError) and isinstance(error.filename, str | os.PathLike)


def torch_out_of_memory() -> type[Exception]:
    """torch's error for a full GPU; torch is imported late, for a quick `--help`."""
    torch = sys.modules.get("torch")
    return torch.OutOfMemoryError if torch else MemoryError

"""Signals that ask a job to stop: at once, or at the next safe point.

They end a run by the exception `Stopped`, which is no `Exception`, so that nothing on the way takes
it for an error. Training, which has a safe point every few seconds, holds them back (`held_back`)
until all ranks have written a checkpoint together.

SIGTERM and SIGINT are a person's or the cluster's; SIGUSR2 is what a batch file sends when its time
is nearly up (not SIGUSR1, which NCCL uses), and SIGALRM is this process's own clock
(`stop_before_limit`). After the last two the job is meant to go on by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from cap_llm.runtime.errors import RankLost

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGALRM)
GOES_ON = (signal.SIGUSR2, signal.SIGALRM)


class Stopped(BaseException):
    """A signal has come; `args[0]` is its number."""


def stop_at_once() -> None:
    """Makes the signals raise `Stopped`. SIGINT too: a shell's background job ignores it else."""
    _raised.clear()
    for number in SIGNALS:
        signal.signal(number, _raise)
    stop_before_limit(60.0, share=0.1)


def stop_before_limit(seconds: float, share: float = 1.0) -> None:
    """Sets the clock: SIGALRM comes `seconds` before the job's time limit, where it has one, and
    leaves at most `share` of the time from now on unused."""
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        left = float(end) - time.time()
        signal.setitimer(signal.ITIMER_REAL, max(1.0, left - min(seconds, share * left)))


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
    before = [signal.signal(number, request._note) for number in SIGNALS]
    try:
        yield request
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)

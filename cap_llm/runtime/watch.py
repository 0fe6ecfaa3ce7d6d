"""Each rank's watch over the others: a job whose ranks cannot go on ends, and says which and why.

A thread of each rank gives a sign of life to the store of the process group, and reads the others'.
Three things end the job: a rank of this node whose process is gone, where that has not broken this
one's connections (gloo's break, a wait for a GPU goes on); a rank that is not heard of any more
(its node has vanished, its process is stopped); and work that has come to a halt, each rank waiting
for another one. What takes long but is being worked on, such as the conversion of a large model by
one rank, is none of them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

BEAT = 5.0  # seconds between two signs of life
GONE = 10.0  # seconds in which the others may end by themselves when a process has
LOST = 180.0  # seconds without a sign of life
HALT = 1200.0  # seconds in which no rank gets past what should take seconds


class Watch:
    """The watch of one rank, from now until `stop`.

    Attributes:
        on_failure: what to do with the reason before the process ends.
        gone: names the ranks whose processes have ended, as far as this one can see them.
    """

    def __init__(self, rank: int, size: int, address: tuple[str, int]):
        self.on_failure: Callable[[str], None] = lambda why: None
        self.gone: Callable[[], list[str]] = list
        self._rank, self._size = rank, size
        self._at, self._since = "", time.monotonic()
        self._over = threading.Event()
        self._store = dist.TCPStore(*address, is_master=False)
        self._names = [f"cap_llm/alive/{r}" for r in range(size)]
        self._store.set(self._names[rank], "0||0")
        self._silent = 0
        for task in (self._run, self._listen):
            threading.Thread(target=task, daemon=True).start()

    @contextlib.contextmanager
    def bounded(self, what: str) -> Iterator[None]:
        """The body of the `with` ends soon, or as soon as all other ranks come to it."""
        before = self._at
        self._at, self._since = what, time.monotonic()
        try:
            yield
        finally:
            self._at, self._since = before, time.monotonic()

    def stop(self) -> None:
        """Ends the watch."""
        self._over.set()

    def _run(self) -> None:
        beats, heard, complete = 0, {}, time.monotonic()
        while not self._over.wait(BEAT):
            beats, now = beats + 1, time.monotonic()
            if not (gone := self.gone()):
                complete = now
            elif now - complete > GONE:
                self._end(f"{' and '.join(gone)} has ended, and this one waits for it")
            waits = int(now - self._since) if self._at else 0
            try:
                self._store.set(self._names[self._rank], f"{beats}|{self._at}|{waits}")
                said = [value.decode() for value in self._store.multi_get(self._names)]
                self._silent = 0
            except Exception:  # the store lives in the first rank or in its launcher
                continue
            for rank, text in enumerate(said):
                if heard.get(rank, ("", 0))[0] != text:
                    heard[rank] = text, now
            lost = [str(r) for r, (_, when) in heard.items() if now - when > LOST]
            if lost:
                self._end(f"rank {', '.join(lost)} has not been heard of{_long(LOST)}")
            elif min(int(text.split("|")[2]) for text in said) > HALT:
                at = ", ".join(f"rank {r} at {t.split('|')[1]}" for r, t in enumerate(said))
                self._end(f"no rank gets on: {at}{_long(HALT)}")

    def _listen(self) -> None:
        """Ends the job once the store has gone: where its node vanishes, a call of it in `_run`
        never returns, whatever its timeout."""
        while not self._over.wait(BEAT):
            self._silent += 1
            if self._silent * BEAT > LOST:
                self._end(f"rank 0 has not been heard of{_long(LOST)}")

    def _end(self, why: str) -> None:
        if self._over.is_set():
            return
        why += "; the job ends: give the same command again to go on from what was finished"
        self.on_failure(why)
        print(f"cap-llm: rank {self._rank}: {why}", file=sys.stderr, flush=True)
        os._exit(1)


def _long(seconds: float) -> str:
    return f" for {seconds / 60:g} minutes"

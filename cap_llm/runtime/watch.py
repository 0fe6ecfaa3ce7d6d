"""Detects ranks that are dead or deadlocked, and ends the job with the reason.

A thread of each rank writes a heartbeat to the store of the process group and reads the others'.
Three conditions end the job:

- A rank of this node is dead, but this rank still waits for it. gloo connections break by
  themselves; a wait for a GPU does not.
- A rank's heartbeat stops, because its node is down or its process is stopped.
- All ranks wait for each other.

Long work of a single rank, such as converting a large model, does not end the job.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

HEARTBEAT = 5.0  # seconds between two heartbeats
DEAD_RANK_GRACE = 10.0  # seconds in which the other ranks may fail by themselves
HEARTBEAT_TIMEOUT = 180.0  # seconds without a heartbeat
DEADLOCK_TIMEOUT = 1200.0  # seconds in which no rank leaves a body that should take seconds


class Watch:
    """The watch of one rank, from now until `stop`.

    Attributes:
        on_failure: receives the reason before the process ends.
        dead_ranks: names the dead ranks that this rank can see.
    """

    def __init__(self, rank: int, size: int, address: tuple[str, int]):
        self.on_failure: Callable[[str], None] = lambda why: None
        self.dead_ranks: Callable[[], list[str]] = list
        self._rank, self._size = rank, size
        self._at, self._since = "", time.monotonic()
        self._stopped = threading.Event()
        self._store = dist.TCPStore(*address, is_master=False)
        self._keys = [f"cap_llm/alive/{r}" for r in range(size)]
        self._store.set(self._keys[rank], "0||0")
        self._missed_reads = 0
        for task in (self._run, self._watch_store):
            threading.Thread(target=task, daemon=True).start()

    @contextlib.contextmanager
    def bounded(self, what: str) -> Iterator[None]:
        """Marks a body that takes seconds once all ranks have reached it."""
        before = self._at
        self._at, self._since = what, time.monotonic()
        try:
            yield
        finally:
            self._at, self._since = before, time.monotonic()

    def stop(self) -> None:
        """Stops the watch."""
        self._stopped.set()

    def _run(self) -> None:
        count, heartbeats, last_complete = 0, {}, time.monotonic()
        while not self._stopped.wait(HEARTBEAT):
            count, now = count + 1, time.monotonic()
            if not (dead := self.dead_ranks()):
                last_complete = now
            elif now - last_complete > DEAD_RANK_GRACE:
                self._end(f"{' and '.join(dead)} died while this rank waits for it")
            waits = int(now - self._since) if self._at else 0
            try:
                self._store.set(self._keys[self._rank], f"{count}|{self._at}|{waits}")
                states = [value.decode() for value in self._store.multi_get(self._keys)]
                self._missed_reads = 0
            except Exception:  # rank 0 or its launcher hosts the store
                continue
            for rank, state in enumerate(states):
                if heartbeats.get(rank, ("", 0))[0] != state:
                    heartbeats[rank] = state, now
            silent = [
                str(rank)
                for rank, (_, when) in heartbeats.items()
                if now - when > HEARTBEAT_TIMEOUT
            ]
            if silent:
                self._end(f"no heartbeat from rank {', '.join(silent)}{_for(HEARTBEAT_TIMEOUT)}")
            elif min(int(state.split("|")[2]) for state in states) > DEADLOCK_TIMEOUT:
                at = ", ".join(f"rank {r} at {s.split('|')[1]}" for r, s in enumerate(states))
                self._end(f"all ranks are blocked{_for(DEADLOCK_TIMEOUT)}: {at}")

    def _watch_store(self) -> None:
        """Ends the job once the store is gone.

        If the store's node is down, its calls in `_run` never return, whatever their timeout.
        """
        while not self._stopped.wait(HEARTBEAT):
            self._missed_reads += 1
            if self._missed_reads * HEARTBEAT > HEARTBEAT_TIMEOUT:
                self._end(f"no heartbeat from rank 0{_for(HEARTBEAT_TIMEOUT)}")

    def _end(self, why: str) -> None:
        if self._stopped.is_set():
            return
        why += ". Rerun the same command to resume."
        self.on_failure(why)
        print(f"cap-llm: rank {self._rank}: {why}", file=sys.stderr, flush=True)
        os._exit(1)


def _for(seconds: float) -> str:
    return f" for {seconds / 60:g} minutes"

"""One job at a time in a run directory, and how the last one ended.

    run.lock     held by the job that works here: who that is, and the file's time as a sign of life
    ended.json   how the last job ended; not there while one works, nor after it was killed

`flock` tells two jobs apart where the file system carries it from node to node. Where it does not,
a job that finds the name of another one in the lock watches for a while whether that one lives.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import threading
import time
from pathlib import Path

from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError

FILE, ENDED = "run.lock", "ended.json"
BEAT = 15.0  # seconds between two signs of life
WATCH = 90.0  # seconds without one before a job of another node counts as dead
# the stages' folders of spilled activations, and the files of `files.atomic`
_HALF = re.compile(r"\.scratch-.*|\..+\.[0-9a-f]{8}\.tmp")


class Lock:
    """The right to write in `folder`, until `close`. Whatever a killed job has half written there
    is removed.

    Raises:
        UserError: another job has it, or the lock is not a file.
    """

    def __init__(self, folder: Path, console: Console):
        path, job = folder / FILE, os.environ.get("SLURM_JOB_ID")
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file. Remove it, or choose another output_dir.")
        self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held until the end)
        other = holder(folder)
        requeued = job and other and other["job"] == job
        patience = WATCH if requeued else 0.0  # what it left behind elsewhere goes by itself
        while not self._locked():
            if patience <= 0:
                raise _in_use(folder, other)
            time.sleep(1.0)
            patience -= 1.0
        moved = other and other["host"] != socket.gethostname()
        if moved and not requeued and not (folder / ENDED).exists():
            console.say(f"{folder} was left by {_name(other)}; looking whether that still lives")
            before, until = path.stat().st_mtime, time.monotonic() + WATCH
            while time.monotonic() < until:
                time.sleep(1.0)
                if path.stat().st_mtime != before:
                    raise _in_use(folder, other)
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": job}))
        self._file.flush()
        (folder / ENDED).unlink(missing_ok=True)
        _sweep(folder)
        self._over = threading.Event()
        threading.Thread(target=self._beat, args=[path], daemon=True).start()

    def _locked(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # of a file system without locks: the signs of life must do
            return error.errno not in (errno.EAGAIN, errno.EACCES)
        return True

    def _beat(self, path: Path) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(path)

    def close(self) -> None:
        """Lets another job have the directory."""
        self._over.set()
        with contextlib.suppress(OSError):
            self._file.truncate(0)
        self._file.close()


def holder(folder: Path) -> dict | None:
    """Who is named in the lock (`host`, `pid`, `job`): the job at work, or one that was killed."""
    try:
        who = json.loads((folder / FILE).read_text(encoding="utf-8"))
        sound = isinstance(who["host"], str) and 0 < who["pid"] < 2**31 and "job" in who
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return who if sound else None


def write_end(folder: Path, code: int, rank: int, why: str, goes_on: bool) -> None:
    """Says how a job ends, for the batch file and for `cap-llm status`. The first rank to end is
    the one with the reason; what others say later is dropped."""
    content = {"code": code, "rank": rank, "why": why, "goes_on": goes_on, "time": time.time()}
    with contextlib.suppress(OSError), open(folder / ENDED, "x", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


def _sweep(folder: Path) -> None:
    for place, folders, files in os.walk(folder):
        left = [Path(place, name) for name in (*folders, *files) if _HALF.fullmatch(name)]
        for path in left:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
        # a run inside of this one has a lock of its own
        folders[:] = [name for name in folders if not Path(place, name, FILE).exists()]


def _in_use(folder: Path, other: dict | None) -> UserError:
    return UserError(
        f"output_dir {folder} is in use by another job ({_name(other)}); wait for it or choose "
        "another one"
    )


def _name(other: dict | None) -> str:
    if not other:
        return "nameless"
    job = f"job {other['job']}" if other["job"] else f"process {other['pid']}"
    return f"{job} on {other['host']}"

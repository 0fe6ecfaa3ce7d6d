"""The lock of a run directory, and the exit status of its last job.

    run.lock     names the running job; its modification time is the job's heartbeat
    ended.json   exit status of the last job; missing while a job runs and after it was killed

`flock` excludes a second job if the file system shares locks between nodes. If it does not, a new
job watches the heartbeat of the job that the lock names before it takes over.
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
HEARTBEAT = 15.0  # seconds between two heartbeats
WATCH = 90.0  # seconds without a heartbeat after which a job of another node counts as dead
# folders of spilled activations, and the temporary files of `files.atomic`
_TEMPORARY = re.compile(r"\.scratch-.*|\..+\.[0-9a-f]{8}\.tmp")


class Lock:
    """The exclusive right to write in `folder`, until `close`.

    Removes the temporary files of a killed job.

    Raises:
        UserError: another job holds the lock, or the lock is not a file.
    """

    def __init__(self, folder: Path, console: Console):
        path, job = folder / FILE, os.environ.get("SLURM_JOB_ID")
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file. Remove it, or use another output_dir.")
        self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held until the end)
        other = holder(folder)
        requeued = job and other and other["job"] == job
        # The processes of a requeued job may take a moment to end on another node.
        deadline = time.monotonic() + (WATCH if requeued else 0.0)
        while not self._acquire():
            if time.monotonic() >= deadline:
                raise _locked(folder, other)
            time.sleep(1.0)
        moved = other and other["host"] != socket.gethostname()
        if moved and not requeued and not (folder / ENDED).exists():
            console.say(
                f"{folder} is locked by {_name(other)}. Checking whether it is still running..."
            )
            before, deadline = path.stat().st_mtime, time.monotonic() + WATCH
            while time.monotonic() < deadline:
                time.sleep(1.0)
                if path.stat().st_mtime != before:
                    raise _locked(folder, other)
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": job}))
        self._file.flush()
        (folder / ENDED).unlink(missing_ok=True)
        _remove_temporary(folder)
        self._closed = threading.Event()
        threading.Thread(target=self._update_heartbeat, args=[path], daemon=True).start()

    def _acquire(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # On a file system without locks, only the heartbeat protects the directory.
            return error.errno not in (errno.EAGAIN, errno.EACCES)
        return True

    def _update_heartbeat(self, path: Path) -> None:
        while not self._closed.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(path)

    def close(self) -> None:
        """Releases the directory."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._file.truncate(0)
        self._file.close()


def holder(folder: Path) -> dict | None:
    """The job that the lock names (`host`, `pid`, `job`): it is running or was killed."""
    try:
        job = json.loads((folder / FILE).read_text(encoding="utf-8"))
        valid = isinstance(job["host"], str) and 0 < job["pid"] < 2**31 and "job" in job
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return job if valid else None


def write_end(folder: Path, code: int, rank: int, why: str, goes_on: bool) -> None:
    """Writes `ended.json`, for the batch file and `cap-llm status`.

    The first rank to end knows the reason, so an existing file is kept.
    """
    content = {"code": code, "rank": rank, "why": why, "goes_on": goes_on, "time": time.time()}
    with contextlib.suppress(OSError), open(folder / ENDED, "x", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


def _remove_temporary(folder: Path) -> None:
    for parent, folders, files in os.walk(folder):
        names = [name for name in (*folders, *files) if _TEMPORARY.fullmatch(name)]
        for path in (Path(parent, name) for name in names):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
        # A nested run directory has its own lock.
        folders[:] = [name for name in folders if not Path(parent, name, FILE).exists()]


def _locked(folder: Path, other: dict | None) -> UserError:
    return UserError(
        f"output_dir {folder} is locked by {_name(other)}. Wait for it, or use another output_dir."
    )


def _name(other: dict | None) -> str:
    if not other:
        return "another job"
    job = f"job {other['job']}" if other["job"] else f"process {other['pid']}"
    return f"{job} on {other['host']}"

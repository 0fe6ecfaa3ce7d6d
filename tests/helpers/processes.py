"""Runs the entry in processes of its own, forked from a server that has imported everything."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from support import environment

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["cap_llm.train", "cap_llm.pipeline", "cap_llm.recovery.recover", "cap_llm.blockwise.sds"]
)


def nothing() -> None:
    """What is done before the entry, by default."""


@dataclass
class Ended:
    """How the processes ended: the first exit code that is not 0, and the output of all ranks."""

    returncode: int
    stdout: str
    stderr: str


def run(
    arguments: Iterable,
    ranks: int = 1,
    before: Callable[[], None] = nothing,
    timeout: float = 240,
) -> Ended:
    """Runs `cap-llm ARGUMENTS` on one or several ranks; `before` is called in each of them.

    Once a rank fails, the others are killed, as a launcher does.
    """
    words = ["cap-llm", *map(str, arguments)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        children = []
        for rank in range(ranks):
            launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            launch |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            work = (words, launch if ranks > 1 else {}, outputs, before)
            children.append(_FORKS.Process(target=_child, args=work))
            children[-1].start()
        code = _wait(children, time.monotonic() + timeout)
        return Ended(code, *(path.read_text(encoding="utf-8") for path in outputs))


def killed(arguments: Iterable, log: Path, word: str, number: int) -> Ended:
    """Runs the entry, which gets signal `number` as soon as `log` has `word`.

    The signal comes from within: a watcher in another process may be kept waiting until the end.
    """
    return run(arguments, before=functools.partial(_watch, log, word, number))


def _watch(log: Path, word: str, number: int) -> None:
    def watch() -> None:
        while not (log.exists() and word in log.read_text(encoding="utf-8")):
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


def _child(words: list[str], launch: dict, outputs: list[Path], before: Callable) -> None:
    code = 70
    try:
        for number, path in enumerate(outputs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.environ |= environment() | {name: str(value) for name, value in launch.items()}
        sys.argv = words
        before()
        from cap_llm import train

        code = train.main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(children: list, deadline: float) -> int:
    """The first exit code that is not 0; 124 after the deadline."""
    while True:
        codes = [child.exitcode for child in children]
        code = next((code for code in codes if code), 0)
        if code or None not in codes:
            break
        if time.monotonic() > deadline:
            code = 124
            break
        time.sleep(0.01)
    if None in codes and code != 124:
        time.sleep(0.5)  # for the other ranks to say what they know
    for child in children:
        child.kill()
        child.join()
    return code

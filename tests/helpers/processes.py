"""Runs the entry in processes of its own, forked so that nothing is imported again."""

from __future__ import annotations

import gc
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


@dataclass
class Ended:
    """How the processes ended: the first exit code that is not 0, and the output of all ranks."""

    returncode: int
    stdout: str
    stderr: str


def run(
    arguments: Iterable,
    ranks: int = 1,
    before: Callable[[], None] = lambda: None,
    timeout: float = 240,
) -> Ended:
    """Runs `cap-llm ARGUMENTS` on one or several ranks; `before` is called in each of them.

    Once a rank fails, the others are killed, as a launcher does.
    """
    import deepspeed  # noqa: F401  so that it is imported once
    import lm_eval  # noqa: F401

    from cap_llm import train  # noqa: F401

    words = ["cap-llm", *map(str, arguments)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gc.collect()
    gc.freeze()  # a collection in a child would copy all pages
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        children = {}
        for rank in range(ranks):
            launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            launch |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            if (pid := os.fork()) == 0:
                _child(words, launch if ranks > 1 else {}, outputs, before)
            children[pid] = rank
        code = _wait(children, time.monotonic() + timeout)
        return Ended(code, *(path.read_text(encoding="utf-8") for path in outputs))


def killed(arguments: Iterable, log: Path, word: str, number: int) -> Ended:
    """Runs the entry, which gets signal `number` as soon as `log` has `word`.

    The signal comes from within: a watcher in another process may be kept waiting until the end.
    """

    def watch() -> None:
        while not (log.exists() and word in log.read_text(encoding="utf-8")):
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    return run(arguments, before=lambda: threading.Thread(target=watch, daemon=True).start())


def _child(words: list[str], launch: dict, outputs: list[Path], before: Callable) -> None:
    code = 70
    try:
        for number, path in enumerate(outputs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.environ |= {name: str(value) for name, value in launch.items()}
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


def _wait(children: dict[int, int], deadline: float) -> int:
    """The first exit code that is not 0; 124 after the deadline."""
    code = 0
    while children and not code:
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del children[pid]
                code = code or os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            code = code or 124
        time.sleep(0.01)
    if children and code != 124:
        time.sleep(0.5)  # for the other ranks to say what they know
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return code

"""The entry point: runs a subcommand and returns its exit code.

    cap-llm --config opt-125m-50 --output_dir runs/opt
    deepspeed cap_llm/train.py --config opt-125m-50 --output_dir runs/opt
    torchrun --nproc_per_node 2 cap_llm/train.py --config my.yaml
    python -m cap_llm status runs/opt

The subcommands are listed in `cap_llm/cli/commands.py`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, Python puts the script's folder on the path instead of the project's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cap_llm.runtime.console import Console, quiet_libraries

quiet_libraries()

import contextlib  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable  # noqa: E402

from cap_llm.cli.commands import dispatch  # noqa: E402
from cap_llm.runtime.errors import RankLost, UserError, as_user_error  # noqa: E402
from cap_llm.runtime.interrupt import (  # noqa: E402
    exit_code,
    ignore_signals,
    is_file_error,
    raise_on_signals,
    stopped_by,
)
from cap_llm.runtime.launcher import read_launch  # noqa: E402


def main() -> int:
    """Runs the command; returns its exit code."""
    return guarded(lambda console: dispatch(sys.argv[1:], console), "cap-llm")


def guarded(work: Callable[[Console], None], program: str) -> int:
    """Runs `work` and returns an exit code; prints an exception as one line of `program`."""
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  a library's prompt would hang a job
    try:
        rank = read_launch().rank
    except UserError:  # raised again when the ranks start
        rank = 0
    console = Console(enabled=rank == 0)
    try:
        raise_on_signals()
        work(console)
    except SystemExit as error:  # from argparse, after a help or usage text
        return error.code or 0
    except BaseException as error:
        ignore_signals()
        error = as_user_error(error)
        code, number = exit_code(error), stopped_by(error)
        if number == signal.SIGPIPE:
            return code
        if number:
            text = f"{program}: interrupted; rerun the same command to resume"
        elif isinstance(error, UserError | RankLost):
            text = f"{program}: error: {error}"
        elif is_file_error(error):
            text = f"{program}: error: {error.filename}: {error.strerror}"
        elif code == 2:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            text = (
                f"{program}: error: out of memory ({reason}). Lower --runtime.activation_gib or "
                "--calibration.sequences; for recover, lower --recover.engine.micro_batch or set "
                "--recover.engine.gradient_checkpointing true."
            )
        else:
            text = traceback.format_exc()
        if rank == 0:
            print(text, file=sys.stderr, flush=True)
        elif not number:
            # The launcher ends rank 0 when another rank fails, so let rank 0 print first.
            time.sleep(2)
            with contextlib.suppress(BrokenPipeError):
                text = text.replace(f"{program}: error", f"{program}: rank {rank}")
                print(text, file=sys.stderr, flush=True)
        return code
    return 0


def script() -> None:
    """The command `cap-llm`, in Python's UTF-8 mode whatever the locale.

    Without it, tokenizers cannot open some files whose names are not ASCII.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    leave(main())


def leave(code: int) -> None:
    """Ends the process, without Python's shutdown if it is one of several ranks or used DeepSpeed.

    The shutdown would wait for ranks that are in a collective. After ZeRO-3 training it sometimes
    aborts (SIGABRT) although all work is done.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError) as error:  # closed, full, or missing
            code = 128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else code
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1 if stream is sys.stdout else 2)
    if os.environ.get("WORLD_SIZE", "1") != "1" or "deepspeed" in sys.modules:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    script()

"""The entry: runs a subcommand and turns what ends it into an exit code.

    cap-llm --config opt-125m-50 --output_dir runs/opt
    deepspeed cap_llm/train.py --config opt-125m-50 --output_dir runs/opt
    torchrun --nproc_per_node 2 cap_llm/train.py --config my.yaml
    python -m cap_llm status runs/opt

`cap_llm/cli/commands.py` has the subcommands.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Given this file, Python puts its folder first on the path; the project's belongs there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cap_llm.runtime.console import Console, quiet_libraries

quiet_libraries()

import contextlib  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable  # noqa: E402

from cap_llm.cli.commands import dispatch  # noqa: E402
from cap_llm.runtime.errors import RankLost, UserError, explained  # noqa: E402
from cap_llm.runtime.interrupt import (  # noqa: E402
    exit_code,
    of_a_file,
    stop_at_once,
    stop_no_more,
    stopped_by,
)
from cap_llm.runtime.launcher import launched  # noqa: E402


def main() -> int:
    """Runs the command; returns its exit code."""
    return guarded(lambda console: dispatch(sys.argv[1:], console), "cap-llm")


def guarded(work: Callable[[Console], None], program: str) -> int:
    """Does `work` and turns what ends it early into one line of `program` and an exit code."""
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  libraries ask on a terminal, and jobs would wait
    try:
        rank = launched().rank
    except UserError:  # whoever works with other ranks says it
        rank = 0
    console = Console(speaks=rank == 0)
    try:
        stop_at_once()
        work(console)
    except SystemExit as asked:  # argparse's, after a help text or a usage line
        return asked.code or 0
    except BaseException as error:
        stop_no_more()
        error = explained(error)
        code, number = exit_code(error), stopped_by(error)
        if number == signal.SIGPIPE:
            return code
        if number:
            text = f"{program}: stopped; give the same command again to go on"
        elif isinstance(error, UserError | RankLost):
            text = f"{program}: error: {error}"
        elif of_a_file(error):
            text = f"{program}: error: {error.filename}: {error.strerror}"
        elif code == 2:
            said = str(error).strip().partition("\n")[0]
            text = (
                f"{program}: error: out of memory ({said or type(error).__name__}): lower "
                "--runtime.activation_gib or --calibration.sequences; while recover trains, "
                "--recover.engine.micro_batch, or set --recover.engine.gradient_checkpointing true"
            )
        else:
            text = traceback.format_exc()
        if rank == 0:
            print(text, file=sys.stderr, flush=True)
        elif not number:
            # The launcher ends the first rank when another one fails: let it speak before that.
            time.sleep(2)
            with contextlib.suppress(BrokenPipeError):
                text = text.replace(f"{program}: error", f"{program}: rank {rank}")
                print(text, file=sys.stderr, flush=True)
        return code
    return 0


def script() -> None:
    """The command `cap-llm`, in Python's UTF-8 mode whatever the locale: tokenizers open no file
    whose name is not UTF-8 to Python."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    leave(main())


def leave(code: int) -> None:
    """Ends the process; one of several ranks here and now, without Python's own end, and so does
    whoever has used DeepSpeed.

    To take leave of ranks that wait in a collective would wait for them. And after a ZeRO-3
    training, the end of the interpreter sometimes aborts (SIGABRT) though all work is done.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError) as error:  # closed, full, or none at all
            code = 128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else code
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1 if stream is sys.stdout else 2)
    if os.environ.get("WORLD_SIZE", "1") != "1" or "deepspeed" in sys.modules:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    script()

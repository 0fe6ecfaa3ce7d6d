"""The entry: reads a recipe and runs its pipeline, one call a stage.

    cap-llm --config opt-125m-50 --output_dir runs/opt
    deepspeed cap_llm/train.py --config opt-125m-50 --output_dir runs/opt
    torchrun --nproc_per_node 2 cap_llm/train.py --config my.yaml
    cap-llm status runs/opt
    cap-llm prefetch opt-125m-50 --to fetched

On one GPU, several, or CPUs; the same command goes on where an earlier one stopped.
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
from typing import TYPE_CHECKING  # noqa: E402

from cap_llm.command_line import read_config  # noqa: E402
from cap_llm.config import MODELS, Config  # noqa: E402
from cap_llm.runtime.errors import RankLost, UserError, explained  # noqa: E402
from cap_llm.runtime.interrupt import (  # noqa: E402
    held_back,
    stop_at_once,
    stop_no_more,
    stopped_by,
)
from cap_llm.runtime.launcher import launched  # noqa: E402

if TYPE_CHECKING:  # late, so that `--help` is quick
    from cap_llm.runtime.rundir import Run
    from cap_llm.runtime.world import World
    from cap_llm.text.reading import Texts


def pipeline(config: Config, config_yaml: str, console: Console) -> None:
    """Runs the stages that `config` names."""
    from cap_llm.evaluation.evaluate import evaluate, outside_models
    from cap_llm.evaluation.report import write_report
    from cap_llm.evaluation.runs import collect
    from cap_llm.evaluation.tasks import find_tasks
    from cap_llm.models.checkpoint import has_weights
    from cap_llm.models.source import contents, locate, prepare
    from cap_llm.runtime.rundir import Run, refuse_strangers
    from cap_llm.runtime.world import World
    from cap_llm.text.reading import read_texts

    world = World(config.runtime.device)
    run = None
    try:
        refuse_strangers(Path(config.output_dir))
        if note := world.crowded():
            console.say(note, style="yellow")
        located = locate(config.model)
        check(located, config, console, world)
        tasks = find_tasks(config.evaluate, console) if "evaluate" in config.stages else []
        texts = read_texts(config, located, console) if located.is_dir() else None
        run = Run(config.output_dir, world, console)
        known = contents(config, located) if world.first else None
        run.contents = world.gather(known)[0]
        for stage in ("dense", "given", *config.stages):
            run.stage(stage, config.recipe(stage))  # refused before anything is written
        run.describe(config.name, config_yaml)
        source = prepare(located, config.model, run)
        if source != located:
            check(source, config, console, world)
        texts = texts or read_texts(config, source, console)
        keep, models = config.runtime.keep_intermediate, {}
        for stage in [s for s in MODELS if s in config.stages]:
            folder = make(stage, source, texts, config, run)
            if models and not keep:
                earlier, path = models.popitem()  # what it came from
                if "evaluate" in config.stages and has_weights(path, world):
                    evaluate({earlier: path}, texts, tasks, config, run)
                drop(path, world)
            models[stage] = folder
        if "evaluate" in config.stages:
            for stage in MODELS:  # of earlier jobs, too
                folder, done = run.stage(stage, config.recipe(stage))
                models |= {stage: folder} if done and has_weights(folder, world) else {}
            wanted = config.evaluate.dense or not models
            scored = wanted and has_weights(source, world)
            outside = outside_models(source, config, run) if scored else {}
            evaluate(outside | models, texts, tasks, config, run)
        # jobs that come later, the scoring at the latest, need the dense model
        if source != located and models and not keep and "evaluate" in config.stages:
            drop(source, world)
        world.barrier()
        if world.first:
            results = collect(run.path)
            title = config.name or results[-1].name
            page = write_report(results, run.path, title, console)
            console.say(f"report: {page}")
    except BaseException as error:
        error = explained(error)
        with held_back():  # the launcher ends all ranks once one has failed
            if run:
                error = run.blame(error)
                run.close(exit_code(error), error)
            world.stop_watching()
        raise error
    run.close()
    world.close()


def check(
    model: Path | None, config: Config, console: Console, world: World, predict: bool = False
) -> None:
    """Refuses what would fail later; with `predict`, says what the work takes.

    Of a model on the hub that is not fetched (None), the config.json says that alone.
    """
    from cap_llm.blockwise.plan import check_everything
    from cap_llm.models.source import hub_config

    shapes = model or hub_config(config.model)
    check_everything(shapes, config, console, world, predict, fetched=bool(model))
    if "recover" in config.stages and shapes and shapes.is_dir():
        from cap_llm.recovery.check import check_recovery

        check_recovery(shapes, config, world, console, predict)


def make(stage: str, source: Path, texts: Texts, config: Config, run: Run) -> Path:
    """Runs a stage that makes a model; its folder."""
    if stage == "oneshot":
        from cap_llm.blockwise.oneshot import oneshot

        return oneshot(source, texts, config, run)
    if stage == "sds":
        from cap_llm.blockwise.sds import sds as work
    elif stage == "reconstruct":
        from cap_llm.blockwise.reconstruct import reconstruct as work
    else:
        from cap_llm.recovery.recover import recover as work
    from cap_llm.models.source import start_of

    return work(*start_of(stage, source, config, run), texts, config, run)


def drop(folder: Path, world: World) -> None:
    """Removes a model's weights, once no rank reads them any more."""
    from cap_llm.models.checkpoint import remove_weights

    world.barrier()
    if world.first:
        remove_weights(folder)
    world.barrier()


def dry_run(config: Config, console: Console) -> None:
    """Checks all that can be checked without the work, and predicts what it takes."""
    from cap_llm.evaluation.tasks import find_tasks
    from cap_llm.models.source import locate, refuse_another_run
    from cap_llm.runtime.rundir import refuse_strangers
    from cap_llm.runtime.world import World
    from cap_llm.text.reading import read_texts

    world = World(config.runtime.device)
    if not config.output_dir:  # one that is not there, on this file system
        config.output_dir = f"cap-llm-dry-run-{os.getpid()}"
    refuse_strangers(Path(config.output_dir))
    located = locate(config.model, download=False)
    refuse_another_run(config, located)
    check(located, config, console, world, predict=True)
    if "evaluate" in config.stages:
        find_tasks(config.evaluate, console, fetch=False)
    if located and located.is_dir():
        read_texts(config, located, console)
    console.say("dry run: nothing was written")
    world.close()


def main() -> int:
    """Runs the command; returns its exit code."""

    def work(console: Console) -> None:
        if sys.argv[1:2] == ["status"]:
            from cap_llm.status import main as show_status

            show_status(sys.argv[2:])
        elif sys.argv[1:2] == ["prefetch"]:
            from cap_llm.prefetch import main as prefetch

            prefetch(sys.argv[2:])
        else:
            config, config_yaml, only_check = read_config()
            config.check(makes_run=not only_check)
            if only_check:
                dry_run(config, console)
            else:
                pipeline(config, config_yaml, console)

    return guarded(work, "cap-llm")


def guarded(work: Callable[[Console], None], program: str) -> int:
    """Does `work` and turns what ends it early into one line of `program` and an exit code."""
    sys.stdin = open(os.devnull)  # noqa: SIM115  libraries ask on a terminal, and jobs would wait
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
        elif _is_of_a_file(error):
            text = f"{program}: error: {error.filename}: {error.strerror}"
        elif code == 2:
            said = str(error).strip().partition("\n")[0]
            text = (
                f"{program}: error: out of memory ({said or type(error).__name__}): lower "
                "--runtime.activation_gib or --calibration.sequences; while recover trains, "
                "--recover.micro_batch, or set --recover.gradient_checkpointing true"
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


def exit_code(error: BaseException) -> int:
    """128 + signal for a stop, 2 for bad input or too little memory, 1 for what went wrong."""
    if number := stopped_by(error):
        return 128 + number
    users = isinstance(error, UserError | MemoryError | torch_out_of_memory())
    return 2 if users or _is_of_a_file(error) else 1


def _is_of_a_file(error: BaseException) -> bool:
    """Whether the system refuses a file or folder: permissions, its name, its kind, the disk."""
    return isinstance(error, OSError) and isinstance(error.filename, str | os.PathLike)


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


def torch_out_of_memory() -> type[Exception]:
    """torch's error for a full GPU; torch is imported late, for a quick `--help`."""
    torch = sys.modules.get("torch")
    return torch.OutOfMemoryError if torch else MemoryError


if __name__ == "__main__":
    script()

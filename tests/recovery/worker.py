"""A rank of the distributed tests: many pipelines in one process, one case after another.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/recovery/worker.py FOLDER
    python tests/recovery/worker.py FOLDER

FOLDER/cases.json is a list of cases, FOLDER/results.json is what became of each, written anew after
every case. A case is the command's arguments and, where something shall go wrong:

    {"name": ..., "args": [...], "edits": [["copy", from, to]], "patches": [["stop", "recover", 5]]}

Edits are done by the first rank before the case; patches hold on all ranks for its duration.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from cap_llm.runtime.console import Console, quiet_libraries  # noqa: E402

quiet_libraries()

import datetime  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from cap_llm import preflight  # noqa: E402
from cap_llm.cli import command_line  # noqa: E402
from cap_llm.pipeline import pipeline  # noqa: E402
from cap_llm.runtime.errors import UserError  # noqa: E402
from cap_llm.runtime.interrupt import Stopped, raise_on_signals  # noqa: E402
from cap_llm.sparsity import keeper as zeros  # noqa: E402
from cap_llm.training import loop as training  # noqa: E402

RANK = int(os.environ.get("RANK", 0))
SIZE = int(os.environ.get("WORLD_SIZE", 1))
PATIENCE = datetime.timedelta(seconds=90)  # with a rank that does not come
LINEAR = torch.nn.functional.linear  # which DeepSpeed replaces


# what goes wrong; steps count from 1, `stage` is that of the metrics


def _before_step(stage: str, step: int, action):
    do = training.step_once

    def patched(engine, job, at, config, world):
        if job.stage == stage and at + 1 == step:
            action()
        return do(engine, job, at, config, world)

    return mock.patch.object(training, "step_once", patched)


def stop(stage: str, step: int):
    """The last rank alone gets SIGTERM in the middle of a step."""

    def action():
        if RANK == SIZE - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return _before_step(stage, step, action)


def crash(stage: str, step: int):
    """All ranks break off, and nothing is saved."""

    def action():
        raise RuntimeError("the plug was pulled")

    return _before_step(stage, step, action)


def spoil_loss(stage: str, step: int):
    """The last rank's loss is no number."""
    losses = training._losses

    def patched(engine, job, mine, everyone, place, *rest):
        loss, parts = losses(engine, job, mine, everyone, place, *rest)
        if job.stage == stage and place - job.before + 1 == step and RANK == SIZE - 1:
            loss = loss * torch.nan
            parts = parts | {"loss": loss}
        return loss, parts

    return mock.patch.object(training, "_losses", patched)


def spoil_gradient(stage: str, step: int):
    """The last rank's gradient is no number, though its loss is one."""
    losses = training._losses

    def patched(engine, job, mine, everyone, place, *rest):
        loss, parts = losses(engine, job, mine, everyone, place, *rest)
        if job.stage == stage and place - job.before + 1 == step and RANK == SIZE - 1:
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss, parts

    return mock.patch.object(training, "_losses", patched)


@contextlib.contextmanager
def without_hooks():
    """The keeper's hooks do nothing; its counting stays."""
    with (
        mock.patch.object(zeros._MaskedParameter, "mask_gradient", lambda self, gradient: gradient),
        mock.patch.object(zeros.ZeroKeeper, "apply", lambda *_: None),
    ):
        yield


@contextlib.contextmanager
def unchecked_disk():
    """The space is not looked at before the work."""
    with mock.patch.object(preflight, "check_disk", lambda *_: None):
        yield


PATCHES = {
    "unchecked_disk": unchecked_disk,
    "stop": stop,
    "crash": crash,
    "spoil_loss": spoil_loss,
    "spoil_gradient": spoil_gradient,
    "without_hooks": without_hooks,
}


# what is done to files before a case


def copy(source: str, target: str) -> None:
    """A run directory, to go on from more than once."""
    shutil.copytree(source, target)


def remove(path: str) -> None:
    """A file or a folder."""
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def replace(path: str, old: str, new: str) -> None:
    """Words of a text file."""
    text = Path(path).read_text(encoding="utf-8")
    assert old in text, f"{path} holds no {old}"
    Path(path).write_text(text.replace(old, new), encoding="utf-8")


def flip(path: str) -> None:
    """One bit of a file, in its middle."""
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(path).write_bytes(content)


def write(path: str, text: str) -> None:
    """A text instead of what the file held; lone surrogates are bytes."""
    Path(path).write_bytes(text.encode("utf-8", "surrogateescape"))


def disk(path: str, options: str) -> None:
    """A file system of its own, or another size of it."""
    Path(path).mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)


EDITS = {
    "copy": copy,
    "remove": remove,
    "replace": replace,
    "disk": disk,
    "flip": flip,
    "write": write,
}


def edit(case: dict) -> str | None:
    """Does a case's edits, on the first rank; all ranks know what goes wrong there."""
    problem = [None]
    if RANK == 0:
        try:
            for name, *args in case["edits"]:
                EDITS[name](*args)
        except Exception:
            problem = [traceback.format_exc()]
    if SIZE > 1:
        dist.broadcast_object_list(problem)
    return problem[0]


def run_case(case: dict, console: Console) -> dict:
    """What a case ends with: an error for users, a stop, or anything else (`traceback`)."""
    outcome = {"error": None, "stopped": None, "traceback": edit(case), "left": None}
    if outcome["traceback"]:
        return outcome
    zero3 = "zero3" in case["args"]  # whose engines DeepSpeed does not let go of by itself
    before = tensor_bytes() if zero3 else 0
    try:
        with contextlib.ExitStack() as patches:
            for name, *args in case["patches"]:
                patches.enter_context(PATCHES[name](*args))
            config, config_yaml, _ = command_line.read_config(case["args"])
            config.check()
            pipeline(config, config_yaml, console)
        outcome["left"] = tensor_bytes() - before if zero3 else None
        assert torch.nn.functional.linear is LINEAR  # or what is pruned next had other roundings
    except UserError as error:
        outcome["error"] = str(error)
    except Stopped as stopped:
        outcome["stopped"] = stopped.args[0]
    except Exception:
        outcome["traceback"] = traceback.format_exc()
    return outcome


def tensor_bytes() -> int:
    """Of all tensors of this process that anything still holds."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def main(folder: Path) -> None:
    """Runs all cases; every rank's outcome of each is kept."""
    torch.set_num_threads(1)
    raise_on_signals()
    if SIZE > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)
    command_line.make_parser = functools.cache(command_line.make_parser)  # for speed
    gc.freeze()  # what is imported by now takes a third of a second in each collection
    console = Console(enabled=RANK == 0)
    results = {}
    for case in json.loads((folder / "cases.json").read_text()):
        console.say(f"== {case['name']}")
        start = time.monotonic()
        outcome = run_case(case, console)
        outcomes = [outcome]
        if SIZE > 1:
            outcomes = [None] * SIZE
            dist.all_gather_object(outcomes, outcome)
        if RANK == 0:
            seconds = round(time.monotonic() - start, 2)
            console.say(f"== {case['name']}: {seconds} s, {outcomes}")
            results[case["name"]] = {"ranks": outcomes, "seconds": seconds}
            (folder / "results.json").write_text(json.dumps(results, indent=1))
    if SIZE > 1:
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the end of the interpreter may abort after ZeRO-3


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)

"""Checkpoints of a training: complete or not there, and resumed on any number of ranks.

    checkpoints/step-000200/...            DeepSpeed's own files, written by all ranks
    checkpoints/step-000200/complete.json  written last: step, ranks, ZeRO stage, recipe, and the
                                           sizes and checksums of the files

The same number of ranks loads these files; another number loads DeepSpeed's universal form of them,
made once where it is needed. Nothing random is stored: order, banks' rows and draws follow from the
seed and the step.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from cap_llm.config import RecoverConfig
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import (
    digests,
    flush_folder,
    holding,
    read_json,
    verify,
    write_json,
)
from cap_llm.runtime.launcher import number
from cap_llm.runtime.rundir import difference
from cap_llm.runtime.world import World
from cap_llm.training.ds_config import stage_of

COMPLETE = "complete.json"
FREE = ("lr", "clip")  # may change after a named checkpoint: the remedy where a loss diverged


@dataclass
class Found:
    """A complete checkpoint to go on from.

    Attributes:
        path: its folder; in the universal form, where that is needed.
        step: the steps that it has done.
        state: what else the training keeps in it.
    """

    path: Path
    step: int
    state: dict


def named(config: RecoverConfig) -> Path | None:
    """The checkpoint's folder that `recover.checkpoint.resume` names, if it names one.

    Raises:
        UserError: it is none.
    """
    if not _names_one(config):
        return None
    path = Path(str(config.checkpoint.resume))
    if not (path / COMPLETE).exists():
        raise UserError(
            f"recover.checkpoint.resume {path} is not a complete checkpoint: {COMPLETE} is missing."
        )
    _facts(path)
    return path


def _facts(path: Path) -> dict:
    """What a checkpoint's folder says of it.

    Raises:
        UserError: it is damaged.
    """
    kinds = {"step": int, "ranks": int, "zero_stage": int, "state": dict, "recipe": dict}
    try:
        # earlier versions wrote no files
        facts = {"files": {}} | read_json(path / COMPLETE, holding(**kinds))
        state = facts["state"]
        parts = [facts["files"], facts["recipe"]["settings"]["recover"], state.get("weights", {})]
        sound = all(isinstance(part, dict) for part in parts)
        sound = sound and {int(k): v + 0.0 for k, v in state["held_out"].items()}
        if sound and state["stage_seconds"] >= 0:
            return facts
        problem = f"{COMPLETE} is damaged"
    except UserError as error:
        problem = str(error)
    except (AttributeError, KeyError, TypeError, ValueError):
        problem = f"{COMPLETE} is damaged"
    raise _unusable(path, problem)


def _unusable(path: Path, problem: str) -> UserError:
    return UserError(
        f"the checkpoint {path} cannot be loaded ({problem}): remove that folder to resume from "
        "the one before it, or start anew with --recover.checkpoint.resume false"
    )


def level_of(asked: bool | str) -> int | str | None:
    """The level of the checkpoint that `resume` names; None if it names none."""
    path = Path(str(asked)) / COMPLETE
    return _facts(path.parent)["recipe"].get("level") if path.exists() else None


def find(
    folder: Path,
    settings: dict,
    recipe: dict,
    config: RecoverConfig,
    world: World,
    console: Console,
) -> Found | None:
    """The checkpoint to resume from by `recover.checkpoint.resume`; call before the engine is made.

    Where it names one, the latest in `folder` that has come from it is meant, if there is any: the
    same command goes on. From the named one itself it may go on with another rate or clip. Sets
    `checkpoint.load_universal` in the DeepSpeed `settings` where the ranks have changed.

    Raises:
        UserError: there is none where one must be, or it belongs to another recipe or ZeRO stage.
    """
    requeued = number("SLURM_RESTART_COUNT", 0) > 0  # the same job, which goes on
    if world.is_main and config.checkpoint.resume is False and not requeued:
        shutil.rmtree(folder, ignore_errors=True)
    if world.is_main and folder.exists():
        for path in folder.glob("*-*"):
            if not (path / COMPLETE).exists():
                shutil.rmtree(path)  # its writer was killed
    path = world.decide(lambda: _chosen(folder, config))
    if path is None:
        return None
    facts = _facts(path)
    if _names_one(config):
        facts["state"]["from"] = str(config.checkpoint.resume)
    made_with = facts["recipe"] | {"zero_stage": facts["zero_stage"]}
    now = recipe | {"zero_stage": stage_of(settings)}
    if _names_one(config) and path == Path(str(config.checkpoint.resume)):
        old = made_with["settings"]["recover"]["optimizer"]
        new = {name: getattr(config.optimizer, name) for name in FREE}
        for name in (name for name in FREE if old.get(name) != new[name]):
            console.say(
                f"recover.optimizer.{name} was {old.get(name)} up to {path} and is {new[name]} now"
            )
        old |= new
    if changed := difference(made_with, now):
        name, was, value = changed
        name = {"at_once": "ranks x recover.engine.micro_batch"}.get(name, name)
        raise UserError(
            f"the checkpoint {path} was made with another recipe: {name} was {was!r} and is "
            f"{value!r} now; bring that back, or start anew with --recover.checkpoint.resume false"
        )
    _check_files(path, world)
    if facts["ranks"] != world.size and stage_of(settings) > 0:
        console.say(
            f"the checkpoint of {facts['ranks']} ranks is converted for {world.size}", style="dim"
        )
        settings["checkpoint"] = {"load_universal": True}
        path = _universal(path, stage_of(settings), world)
        _check_files(path, world)
    return Found(path, facts["step"], facts["state"])


def _names_one(config: RecoverConfig) -> bool:
    return config.checkpoint.resume not in (True, False, "auto")


def _chosen(folder: Path, config: RecoverConfig) -> Path | None:
    """The complete checkpoint to go on from, if there is one."""
    complete = _complete(folder)
    if _names_one(config):
        complete = [
            p for p in complete if _begun_from(p) == Path(str(config.checkpoint.resume)).resolve()
        ]
    if complete:
        return complete[-1]
    if config.checkpoint.resume is True:
        raise UserError(
            f"recover.checkpoint.resume is true, but {folder} holds no complete checkpoint"
        )
    return named(config)


def save(
    engine, folder: Path, step: int, state: dict, recipe: dict, stage: int, keep: int, world: World
) -> None:
    """Writes a checkpoint with all ranks, marks it complete, and removes the oldest ones."""
    tag = f"step-{step:06d}"
    if world.is_main:
        _remove(folder / tag)
        folder.mkdir(parents=True, exist_ok=True)
    world.barrier()
    try:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        flush_folder(folder / tag)  # else a crash of the machine may leave a mark without its files
    except Exception as error:  # torch's zip writer has errors of its own for a full disk
        # at once: the other ranks may wait for this one inside DeepSpeed
        raise UserError(
            f"the checkpoint {folder / tag} cannot be written "
            f"({' '.join(str(error).split())[:160]}); the one before it is kept: free some space "
            "and give the same command again"
        ) from error
    world.barrier()
    names = _names(folder / tag)[world.rank :: world.size]
    files = {
        name: f for part in world.gather(digests(folder / tag, names)) for name, f in part.items()
    }
    if world.is_main:
        facts = {"step": step, "ranks": world.size, "zero_stage": stage, "state": state}
        write_json(folder / tag / COMPLETE, facts | {"recipe": recipe, "files": files})
        # of this training only: one started by `resume` may be behind an earlier one here
        own = [p for p in _complete(folder) if _begun_from(p) == _begun_from(folder / tag)]
        for path in own[:-keep]:
            _remove(path)
    world.barrier()


def latest(folder: Path) -> Path | None:
    """The last complete checkpoint of a folder."""
    return next(reversed(_complete(folder)), None)


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, by step."""
    found = (p.parent for p in folder.glob(f"step-*/{COMPLETE}"))
    numbered = (p for p in found if p.name.removeprefix("step-").isdecimal())
    return sorted(numbered, key=lambda p: int(p.name.removeprefix("step-")))


def _remove(path: Path) -> None:
    """Removes a checkpoint with its universal form; from the first moment on it is incomplete."""
    for folder in (path, path.with_name(f"universal-{path.name}")):
        (folder / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _begun_from(path: Path) -> Path | None:
    """The checkpoint that `resume` named when this training started, as a resolved path."""
    with contextlib.suppress(UserError):  # a damaged one is refused where it is resumed from
        name = read_json(path / COMPLETE, holding(state=dict))["state"].get("from")
        return Path(name).resolve() if isinstance(name, str) else None
    return None


def _names(path: Path) -> list[str]:
    """The files of a checkpoint's folder, but for the mark."""
    files = (p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    return sorted(name for name in files if name != COMPLETE)


def _check_files(path: Path, world: World) -> None:
    """Holds a checkpoint's files against their checksums; each rank reads its share of them.

    Raises:
        UserError: one has changed.
    """
    files = list(_facts(path)["files"].items())
    found = world.gather(verify(path, dict(files[world.rank :: world.size])))
    if problem := next(filter(None, found), None):
        raise _unusable(path, problem)


def check_weights(found: Found, weights: dict[str, list]) -> None:
    """Holds the checksums of an engine's weights against those that were saved.

    Other DeepSpeed settings may lay the same files out in another way.

    Raises:
        UserError: a parameter has other weights.
    """
    saved = found.state.get("weights", {})
    for name, (dtype, checksum) in weights.items():
        was = saved.get(name)  # of another type they cannot be compared
        if isinstance(was, list) and was[:1] == [dtype] and was != [dtype, checksum]:
            raise UserError(
                f"the checkpoint {found.path} gives {name} other weights than were saved: bring "
                "back the DeepSpeed settings that it was made with, or start anew with "
                "--recover.checkpoint.resume false"
            )


def load(engine, found: Found) -> None:
    """Brings weights and moments of a checkpoint into a fresh engine.

    Raises:
        UserError: its files are damaged.
    """
    problem = "DeepSpeed finds nothing there"
    try:
        path, _ = engine.load_checkpoint(
            str(found.path.parent), tag=found.path.name, load_lr_scheduler_states=False
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # assertions, torch's zip reader, missing files
        path, problem = None, " ".join(str(error).split())[:160] or type(error).__name__
    if path is None:
        # at once: the other ranks may wait for this one inside DeepSpeed
        raise _unusable(found.path, problem)
    # The universal form leaves Adam's count of steps on the CPU, where a fused step on a GPU does
    # not take it, and one tensor for all sub-groups of ZeRO-3, each of which would count on.
    for parameter, state in engine.basic_optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].to(parameter.device, copy=True)


def _universal(path: Path, stage: int, world: World) -> Path:
    """DeepSpeed's universal form of a checkpoint, beside it."""
    target = path.with_name(f"universal-{path.name}")
    problem = None
    if world.is_main and not (target / COMPLETE).exists():
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        command += ["--input_folder", str(path), "--output_folder", str(target)]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        if stage < 3:
            command.append("--inject_missing_state")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            problem = " ".join(done.stderr.split()[-40:])
        else:
            files = digests(target, _names(target))
            write_json(target / COMPLETE, _facts(path) | {"files": files})
    problem = world.gather(problem)[0]
    if problem:
        raise _unusable(path, f"conversion for {world.size} ranks: {problem}")
    return target

"""The run directory: config, log and metrics of one pipeline, and a folder per stage.

    config.yaml  environment.json  log.txt  metrics.jsonl  report.md  report.html
    run.lock  ended.json  the running job, and the exit status of the last one (see `lock.py`)
    <stage>/recipe.json   settings of the stage, written before its first result, with checksums of
                          the models and texts that they name
    <stage>/done.json     written last: the stage is finished and verified

A run directory belongs to one pipeline. Rerunning the same command resumes it. A stage with other
settings is rejected, never overwritten.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from cap_llm.runtime.console import Console
from cap_llm.runtime.environment import environment
from cap_llm.runtime.errors import RankLost, UserError
from cap_llm.runtime.files import (
    atomic,
    digests,
    disk_error,
    read_json,
    verify,
    write_json,
)
from cap_llm.runtime.interrupt import REQUEUE_SIGNALS, stopped_by
from cap_llm.runtime.lock import ENDED, Lock, write_end
from cap_llm.runtime.lock import FILE as LOCK_FILE
from cap_llm.runtime.world import World

CONTENTS = "contents"  # key of a recipe: checksums of the files that its options name


class Run:
    """An open run directory, with its console and its ranks.

    Attributes:
        contents: checksums of the models and texts, by the option that names them; a model is
            identified by its checksum, not by its path.
        name: what the user calls the run.

    Raises:
        UserError: the directory is not usable, or another job has locked it.
    """

    def __init__(self, path: str, world: World, console: Console):
        self.path, self.world, self.console = Path(path), world, console
        self.contents: dict[str, str] = {}
        self.name = ""
        self._metrics = self._lock = None
        self._verified: set[Path] = set()
        self._trackers: list = []
        world.decide(self._open)
        world.on_failure(lambda why: write_end(self.path, 1, world.rank, why, False))

    def _open(self) -> None:
        """Creates and locks the directory, and opens its files, on rank 0."""
        check_run_dir(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir {self.path} cannot be used: {error.strerror}") from None
        try:
            self._lock = Lock(self.path, self.console)
            self.console.log_to(self.path / "log.txt")
            self._metrics = open(self.path / "metrics.jsonl", "a", 1, "utf-8")  # noqa: SIM115
        except OSError as error:
            name = Path(error.filename or LOCK_FILE).name
            raise disk_error(self.path, name, error) from None

    def describe(self, name: str, config_yaml: str) -> None:
        """Names the run, and writes `config.yaml` and `environment.json`."""
        self.name = name
        if self.world.is_main:
            with atomic(self.path / "config.yaml") as temporary:
                temporary.write_text(config_yaml, encoding="utf-8")
            write_json(self.path / "environment.json", {"run": name} | environment(self.world))

    def metric(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Appends one line per value to `metrics.jsonl`."""
        if self._metrics:
            now = round(time.time(), 3)
            for name, value in values.items():
                line = {"stage": stage, "step": step, "name": name, "value": value, "time": now}
                try:
                    self._metrics.write(json.dumps(line) + "\n")
                except OSError as error:
                    raise disk_error(self.path, "metrics.jsonl", error) from None
            for tracker in self._trackers:
                tracker.log(stage, step, values)

    def add_tracker(self, tracker) -> None:
        """Also logs all further metrics to `tracker` (`log`, `close`)."""
        self._trackers.append(tracker)

    def stage(self, name: str, recipe: dict) -> tuple[Path, dict | None]:
        """The folder of stage `name`, and its `done.json` if it is finished.

        Writes nothing: a stage may change its recipe until its first result (`bind`).

        Raises:
            UserError: the stage has other settings there, or a file of the finished stage changed.
        """
        folder = self.path / name

        def read_done() -> dict | None:
            check_same_settings(folder, with_contents(recipe, self.contents))
            path = folder / "done.json"
            done = read_json(path, _parse_done) if path.exists() else None
            if done and (changed := self._changed(folder, done)):
                raise UserError(
                    f"{folder / changed}. Restore the file, or delete {folder} and rerun."
                )
            return done

        # This also synchronizes the ranks before rank 0 writes.
        return folder, self.world.decide(read_done)

    def _changed(self, folder: Path, done: dict) -> str | None:
        """The first problem of a finished stage's files; checked once per process."""
        if folder in self._verified:
            return None
        self._verified.add(folder)
        recorded = done["files"]
        # Weights may be deleted to save space; without their index, the rest is not a model either.
        missing = {name for name in recorded if not (folder / name).exists()}
        if any(name.endswith(".index.json") for name in missing):
            return None
        return verify(folder, {n: digest for n, digest in recorded.items() if n not in missing})

    def bind(self, folder: Path, recipe: dict) -> None:
        """Writes a stage's recipe, before its first result."""
        if self.world.is_main:
            self.record(folder, recipe)
        self.world.barrier()

    def record(self, folder: Path, recipe: dict) -> None:
        """Writes a stage's recipe, on rank 0 alone."""
        if not (folder / "recipe.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "recipe.json", with_contents(recipe, self.contents))

    def finish_stage(self, folder: Path, summary: dict, files: Iterable[str] = ()) -> None:
        """Writes `done.json` with the environment and checksums of `files`, as the last step.

        A later job checks `files` against these checksums.
        """
        self.world.barrier()
        if self.world.is_main:
            summary = summary | {"environment": environment(self.world)}
            write_json(folder / "done.json", summary | {"files": digests(folder, files)})
        self._verified.add(folder)
        self.world.barrier()

    def explain_failure(self, error: BaseException) -> BaseException:
        """Returns `error`, or a `RankLost` if a dead rank caused it.

        A dead rank's connections break, which may raise any error, and its launcher stops the other
        ranks. Neither names the cause.
        """
        if self.world.size > 1:
            time.sleep(1.0)  # lets a rank that knows the cause report it first
            dead = self.world.dead_ranks()
            if dead and not (self.path / ENDED).exists():
                return RankLost(
                    f"{' and '.join(dead)} died unexpectedly (out of memory? check dmesg or "
                    "sacct). Rerun the same command to resume."
                )
        return error

    def close(self, code: int = 0, error: BaseException | None = None) -> None:
        """Writes how the run ended, closes its files and releases the directory."""
        number = stopped_by(error) if error else None
        if number:
            why = f"stopped by {signal.Signals(number).name}"
        elif error:
            kind = "" if isinstance(error, UserError | RankLost) else f"{type(error).__name__}: "
            why = " ".join(f"{kind}{error}".split())[:500]
        else:
            why = "done"
        if error or self.world.is_main:
            write_end(self.path, code, self.world.rank, why, number in REQUEUE_SIGNALS)
        for file in (*self._trackers, self._metrics, self._lock):
            if file:
                file.close()


def _parse_done(done: dict) -> dict:
    """Checks that a `done.json` has the fields that `finish_stage` writes."""
    return done | {"environment": done["environment"], "files": dict(done.get("files", {}))}


def check_run_dir(path: Path) -> None:
    """Checks that `path` is a run directory, empty, or does not exist.

    Raises:
        UserError: it is not, or it is not readable and writable.
    """
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        names = []
    except (OSError, ValueError) as error:  # no permission, too long a name, a null byte
        if os.path.isfile(path):
            raise UserError(f"output_dir {path} is a file. Choose another directory.") from None
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"output_dir {str(path)!r} cannot be used: {reason}") from None
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"output_dir {path} is not writable ({parent} is read-only). Choose another directory."
        )
    if names and LOCK_FILE not in names:
        raise UserError(
            f"output_dir {path} is not empty and is not a cap-llm run directory (found "
            f"{names[0]}). Choose another directory."
        )


def with_contents(recipe: dict, contents: dict[str, str]) -> dict:
    """Adds the checksums of the files that a recipe names, unless it has them already."""
    own = {name: value for name, value in contents.items() if name.partition(".")[0] in recipe}
    return ({CONTENTS: own} if own else {}) | recipe


def check_same_settings(folder: Path, recipe: dict) -> None:
    """Checks that a stage's folder was created with the settings of `recipe`.

    Raises:
        UserError: a setting differs.
    """
    if not (folder / "recipe.json").exists():
        return
    if changed := difference(read_json(folder / "recipe.json", dict), recipe):
        field, old, new = changed
        raise UserError(
            f"{folder} was created with different settings ({field}: {old!r}, now {new!r}). Use "
            f"another output_dir, or delete {folder}."
        )


def difference(old: dict, new: dict) -> tuple[str, object, object] | None:
    """The first field in which two recipes differ, with both values; None if they are equal.

    A missing field counts as None, because versions may have different settings. Paths may differ
    if both recipes have the same checksum in `contents`.
    """
    return next(_differences(old, new), None)


def _differences(old: dict, new: dict) -> Iterator[tuple[str, object, object]]:
    old_sums, new_sums = old.get(CONTENTS) or {}, new.get(CONTENTS) or {}
    same = {name for name, checksum in new_sums.items() if old_sums.get(name) == checksum}
    for key in dict.fromkeys(key for key in (*old, *new) if key != CONTENTS):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changes = [(f"{key}.{name}", *values) for name, *values in _differences(a, b)]
        else:
            changes = [(key, a, b)] if a != b else []
        yield from (change for change in changes if change[0] not in same)

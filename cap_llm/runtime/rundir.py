"""The run directory: one pipeline's settings, log, metrics, and one folder a stage.

    config.yaml  environment.json  log.txt  metrics.jsonl  report.md  report.html
    run.lock  ended.json  who works here, and how the last job ended (see `lock.py`)
    <stage>/recipe.json   what the stage was asked to do, written before its first result, with
                          checksums of the models and texts that its settings name
    <stage>/done.json     written last: the stage is finished and verified

A run directory belongs to one pipeline. Giving the same command again goes on where it stopped; a
stage that was asked to do something else is refused, never overwritten.
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
from cap_llm.runtime.interrupt import GOES_ON, stopped_by
from cap_llm.runtime.lock import ENDED, Lock, write_end
from cap_llm.runtime.lock import FILE as LOCK_FILE
from cap_llm.runtime.world import World

CONTENTS = "contents"  # of a recipe: checksums of what its settings name, by option


class Run:
    """An open run directory, with the console and the ranks that work in it.

    Attributes:
        contents: checksums of the models and texts that the settings name, by option; the same
            model by another path is the same model.
    """

    def __init__(self, path: str, world: World, console: Console):
        self.path, self.world, self.console = Path(path), world, console
        self.contents: dict[str, str] = {}
        self._metrics = self._lock = None
        self._verified: set[Path] = set()
        self._trackers: list = []
        self._start = time.time()
        problem = self._open() if world.is_main else None
        problem = world.gather(problem)[0]
        if problem:
            raise problem
        world.on_failure(lambda why: write_end(self.path, 1, world.rank, why, False))

    def _open(self) -> UserError | None:
        """Makes the directory and takes its lock; the first rank's part."""
        try:
            check_run_dir(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
        except UserError as error:
            return error
        except OSError as error:
            return UserError(f"output_dir {self.path} cannot be used: {error.strerror}")
        try:
            self._lock = Lock(self.path, self.console)
            self.console.log_to(self.path / "log.txt")
            self._metrics = open(self.path / "metrics.jsonl", "a", 1, "utf-8")  # noqa: SIM115
        except UserError as error:
            return error
        except OSError as error:
            return disk_error(self.path, Path(error.filename or LOCK_FILE).name, error)
        return None

    def describe(self, name: str, config_yaml: str) -> None:
        """Records what runs, on what: `config.yaml` and `environment.json`."""
        if self.world.is_main:
            with atomic(self.path / "config.yaml") as temporary:
                temporary.write_text(config_yaml, encoding="utf-8")
            write_json(self.path / "environment.json", {"run": name} | environment(self.world))

    def metric(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Appends one line a value to `metrics.jsonl`."""
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

    def track_with(self, tracker) -> None:
        """Also gives all metrics from now on to `tracker` (`log`, `close`)."""
        self._trackers.append(tracker)

    def stage(self, name: str, recipe: dict) -> tuple[Path, dict | None]:
        """The folder of stage `name`, and its `done.json` if it is finished.

        Writes nothing: until the stage has something to keep (`bind`), its recipe may change.

        Raises:
            UserError: the folder holds this stage with other settings, or a file of it has changed
                since it was finished.
        """
        folder = self.path / name

        def look() -> dict | None:
            check_same_settings(folder, self._known(recipe))
            path = folder / "done.json"
            done = read_json(path, _whole) if path.exists() else None
            if done and (changed := self._changed(folder, done)):
                raise UserError(
                    f"{folder / changed}. Restore the file, or delete {folder} and rerun"
                )
            return done

        # all have met, too, before the first one writes
        return folder, self.world.decide(look)

    def _changed(self, folder: Path, done: dict) -> str | None:
        """What is wrong with the files of a finished stage; looked at once per process."""
        if folder in self._verified:
            return None
        self._verified.add(folder)
        recorded = done["files"]
        gone = {name for name in recorded if not (folder / name).exists()}  # perhaps to save space
        if any(name.endswith(".index.json") for name in gone):  # what is left of weights is none
            return None
        return verify(folder, {n: facts for n, facts in recorded.items() if n not in gone})

    def bind(self, folder: Path, recipe: dict) -> None:
        """Records what a stage was asked to do, before its first result is written."""
        if self.world.is_main:
            self.record(folder, recipe)
        self.world.barrier()

    def record(self, folder: Path, recipe: dict) -> None:
        """The same, by the first rank alone."""
        if not (folder / "recipe.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "recipe.json", self._known(recipe))

    def _known(self, recipe: dict) -> dict:
        """A recipe with what its settings name by paths."""
        return with_contents(recipe, self.contents)

    def finish_stage(self, folder: Path, summary: dict, files: Iterable[str] = ()) -> None:
        """Marks a stage as finished, and says by what command on which machine; its last write.

        A later job holds `files` of the folder against what they are now.
        """
        self.world.barrier()
        if self.world.is_main:
            summary = summary | {"environment": environment(self.world)}
            write_json(folder / "done.json", summary | {"files": digests(folder, files)})
        self._verified.add(folder)
        self.world.barrier()

    def explain_failure(self, error: BaseException) -> BaseException:
        """`error`, or what is behind it: a rank that has gone without a word.

        Its connections break, which may come up as any error, and its launcher asks the others to
        stop; neither says why.
        """
        if self.world.size > 1:
            time.sleep(1.0)  # for the one that knows more to say it
            lost = self.world.lost()
            if lost and not (self.path / ENDED).exists():
                return RankLost(
                    f"{' and '.join(lost)} ended without a word: killed, perhaps for its memory "
                    "(the kernel's log or sacct say), or crashed; give the same command again to "
                    "go on from what was finished"
                )
        return error

    def close(self, code: int = 0, error: BaseException | None = None) -> None:
        """Says how the run ends, closes its files and lets another job have the directory."""
        number = stopped_by(error) if error else None
        if number:
            why = f"stopped by {signal.Signals(number).name}"
        elif error:
            kind = "" if isinstance(error, UserError | RankLost) else f"{type(error).__name__}: "
            why = " ".join(f"{kind}{error}".split())[:500]
        else:
            why = "done"
        if error or self.world.is_main:
            write_end(self.path, code, self.world.rank, why, number in GOES_ON)
        for file in (*self._trackers, self._metrics, self._lock):
            if file:
                file.close()


def _whole(done: dict) -> dict:
    """A `done.json`, if it holds what `finish_stage` always writes."""
    return done | {"environment": done["environment"], "files": dict(done.get("files", {}))}


def check_run_dir(path: Path) -> None:
    """Refuses to work in a directory that is no run directory, unless it is empty or not there.

    Raises:
        UserError: it holds other files, is a file, or cannot be read or written.
    """
    try:
        strangers = os.listdir(path)
    except FileNotFoundError:
        strangers = []
    except (OSError, ValueError) as error:  # no permission, too long a name, a null byte
        if os.path.isfile(path):
            raise UserError(f"output_dir {path} is a file; choose a new directory") from None
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"output_dir {str(path)!r} cannot be used: {reason}") from None
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"output_dir {path} cannot be written: {place} is read-only for this user. Choose "
            "another directory."
        )
    if strangers and LOCK_FILE not in strangers:
        raise UserError(
            f"output_dir {path} holds other files ({strangers[0]}, ...); choose a new directory"
        )


def with_contents(recipe: dict, contents: dict[str, str]) -> dict:
    """A recipe with the checksums of what it names by paths, unless it has them already."""
    own = {name: known for name, known in contents.items() if name.partition(".")[0] in recipe}
    return ({CONTENTS: own} if own else {}) | recipe


def check_same_settings(folder: Path, recipe: dict) -> None:
    """Refuses to go on in a stage's folder that was begun with other settings.

    Raises:
        UserError: names the first one that differs.
    """
    if not (folder / "recipe.json").exists():
        return
    if changed := difference(read_json(folder / "recipe.json", dict), recipe):
        field, was, now = changed
        raise UserError(
            f"{folder} holds another run: {field} was {was!r} there and is {now!r} now; "
            "choose another output_dir or remove that folder"
        )


def difference(old: dict, new: dict) -> tuple[str, object, object] | None:
    """The first field in which two nested dicts differ, and its two values; None if none does.

    A field that one of them lacks is one that is None: versions of the settings may differ. A path
    may be another where both have the same `contents` for it.
    """
    return next(_differences(old, new), None)


def _differences(old: dict, new: dict) -> Iterator[tuple[str, object, object]]:
    known, now_known = old.get(CONTENTS) or {}, new.get(CONTENTS) or {}
    same = {name for name, checksum in now_known.items() if known.get(name) == checksum}
    for key in dict.fromkeys(key for key in (*old, *new) if key != CONTENTS):
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            found = [(f"{key}.{name}", *values) for name, *values in _differences(was, now)]
        else:
            found = [(key, was, now)] if was != now else []
        yield from (change for change in found if change[0] not in same)

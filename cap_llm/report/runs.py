"""The models of runs: what their `result.json` and `scores.json` say."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cap_llm.evaluation.scores import FILE, Score, Scores, read_scores
from cap_llm.models.result import Result, read_result
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError


@dataclass
class Model:
    """One model of one run.

    Attributes:
        run: the run directory.
        folder: its folder there.
        result: how it was made, and at what cost.
        scores: its scores.
        name: its name in tables.
    """

    run: Path
    folder: Path
    result: Result
    scores: list[Score]
    name: str = ""


def run_directories(paths: list[Path], console: Console) -> list[Path]:
    """The run directories among `paths` and directly inside them.

    Raises:
        UserError: there are none, or a path does not exist.
    """
    runs: dict[Path, Path] = {}
    others = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path} does not exist. Give the output_dir of a run, or its parent.")
        folders = [path, *sorted(path.iterdir())] if path.is_dir() else []
        inside = [f for f in folders if os.path.isfile(f / "environment.json")]
        runs |= {f.resolve(): f for f in inside[: 1 if path in inside else None]}
        others += [] if inside else [path]
    if not runs:
        raise UserError(
            f"{paths[0]} contains no run. Give the output_dir of a run (it has an "
            "environment.json), or its parent."
        )
    if others:
        console.say(f"skipping (not run directories): {', '.join(map(str, others))}")
    return list(runs.values())


def read_runs(runs: list[Path]) -> tuple[list[Model], list[str]]:
    """Reads the models of runs.

    Returns:
        The models, by run and in the order of the pipeline; a line for each folder that cannot be
        read or is not finished.
    """
    models: list[Model] = []
    problems: list[str] = []
    for run in runs:
        found = [m for folder in sorted(run.iterdir()) if (m := _read(run, folder, problems))]
        found.sort(key=lambda model: _n_stages(model.result))
        for model in found:
            model.name = model.result.name
        if found and found[-1].folder.name != "dense":
            found[-1].name = found[-1].result.run or found[-1].name
        models += found
    return models, problems


def _read(run: Path, folder: Path, problems: list[str]) -> Model | None:
    try:
        if result := read_result(folder):
            model = Model(run, folder, result, [])
            places = [folder, Path(result.dense)] if folder.name == "dense" else [folder]
            for path in (place / FILE for place in places):
                if path.exists():
                    _add_scores(model, read_scores(path), path, problems)
            return model
        if (folder / "recipe.json").exists():
            problems.append(f"{folder}: the stage is not finished")
    except (OSError, UserError) as error:
        problems.append(str(error))
    return None


def _add_scores(model: Model, content: Scores, path: Path, problems: list[str]) -> None:
    if content.fingerprint != model.result.weights:
        problems.append(f"{path}: the scores are of different weights")
        return
    names = {score.name for score in model.scores}
    model.scores += [score for score in content.scores if score.name not in names]


def _n_stages(result: Result) -> int:
    if result.stage == "dense":
        return 0
    return 1 + (_n_stages(result.before) if result.before else 0)

"""`scores.json`: all scores of a model, beside the model.

A score of other weights does not count and is measured again.
"""

from __future__ import annotations

from dataclasses import asdict, field
from pathlib import Path

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from cap_llm.models.directory import ModelDirectory
from cap_llm.runtime.console import Console
from cap_llm.runtime.environment import Environment, environment
from cap_llm.runtime.files import matching, read_json, write_json
from cap_llm.runtime.world import World

FILE = "scores.json"
_VALID = ConfigDict(allow_inf_nan=False)


@dataclass(config=_VALID)
class Score:
    """One score of a model.

    Attributes:
        measure: `ppl_token`, or a metric of lm-eval, such as `acc`.
        data: the corpus or task.
        value: the score; an accuracy is in [0, 1].
        n: predicted tokens, or items of the task.
        stderr: standard error, where the measure has one.
        facts: what two scores must share to be comparable.
        details: other facts, such as the origin of the data.
        job: the environment of the job that measured it.
    """

    measure: str
    data: str
    value: float
    n: int
    stderr: float | None = None
    facts: dict[str, str | int | float | None] = field(default_factory=dict)
    details: dict = field(default_factory=dict)
    job: Environment | None = None

    @property
    def name(self) -> str:
        """The data with its limits: `wikitext2@2048 first 32`, `piqa first 40`."""
        window, limit = self.facts.get("window"), self.facts.get("limit")
        return self.data + f"@{window}" * bool(window) + f" first {limit}" * bool(limit)


@dataclass(config=_VALID)
class Scores:
    """The content of the file; `fingerprint` and `weights_sha256` identify the weights."""

    model: str
    weights_sha256: str
    fingerprint: str | None
    scores: list[Score]


def read_scores(path: Path) -> Scores:
    """Reads a file of scores.

    Raises:
        UserError: it is missing or has other content.
    """
    return read_json(path, matching(Scores))


class ScoreFile:
    """The scores of one model directory, and the file that keeps them.

    Args:
        model: the model directory.
        path: the file; None: the scores are not saved.
        title: the model's name on the console.
        world: the ranks.
        console: where progress goes.

    Attributes:
        versions: releases of the libraries that compute scores.

    Raises:
        UserError: the file has other content.
    """

    def __init__(
        self,
        model: ModelDirectory,
        path: Path | None,
        title: str,
        world: World,
        console: Console,
    ):
        self.model, self.title, self.world, self.console = model, title, world, console
        self._path, self._job = path, environment(world)
        versions = self._job["versions"]  # 2.13.0+cpu is the release 2.13.0
        names = ("torch", "transformers", "lm_eval")
        self.versions = {name: (versions[name] or "").partition("+")[0] for name in names}
        # rank 0 decides: a shared file system may show other ranks an older file
        self._content = world.decide(self._read)

    def _read(self) -> Scores:
        digest = self.model.weights_digest
        if self._path and self._path.exists():
            content = read_scores(self._path)
            if content.weights_sha256 == digest:
                return content
            self.console.say(f"{self._path} was computed for different weights; recomputing")
        return Scores(str(self.model), digest, self.model.fingerprint, [])

    def find(self, data: str, **facts) -> list[Score]:
        """The scores on a corpus or task that have these facts."""
        return [
            score
            for score in self._content.scores
            if score.data == data and facts.items() <= score.facts.items()
        ]

    def add(self, scores: list[Score]) -> None:
        """Adds scores of this job, replaces earlier ones of the same name, and writes the file."""
        names = {score.name for score in scores}
        for score in scores:
            score.job = self._job
        self._content.scores = [s for s in self._content.scores if s.name not in names] + scores
        if self.world.is_main and self._path:
            write_json(self._path, asdict(self._content))

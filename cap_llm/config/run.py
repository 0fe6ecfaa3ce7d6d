"""The settings of a whole run, and the rules across its sections."""

from __future__ import annotations

import filecmp
from dataclasses import field
from pathlib import Path
from typing import Literal

from cap_llm.config.blockwise import (
    CalibrationConfig,
    OneshotConfig,
    ReconstructConfig,
    SdsConfig,
)
from cap_llm.config.evaluate import EvaluateConfig
from cap_llm.config.model import ModelConfig, RuntimeConfig
from cap_llm.config.recover import RecoverConfig
from cap_llm.config.section import Place, identity, section
from cap_llm.runtime.errors import UserError

STAGES = ("oneshot", "sds", "reconstruct", "recover", "evaluate")
MODELS = STAGES[:-1]  # the stages that make a model


@section("")
class Config:
    """A pipeline over one model."""

    output_dir: Place = ""
    """Run directory. The same command resumes where an earlier one stopped."""
    name: str = ""
    """Name of this run in the report. Default: the methods, as in "SparseGPT 50% + recovery"."""
    stages: list[Literal["oneshot", "sds", "reconstruct", "recover", "evaluate"]] = field(
        default_factory=lambda: ["oneshot", "evaluate"]
    )
    """Stages to run, in this order: oneshot, sds, reconstruct, recover, evaluate. The first one
    starts from the last finished stage in the run directory, or from the model."""
    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    oneshot: OneshotConfig = field(default_factory=OneshotConfig)
    sds: SdsConfig = field(default_factory=SdsConfig)
    reconstruct: ReconstructConfig = field(default_factory=ReconstructConfig)
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def check(self, makes_run: bool = True) -> None:
        """Checks the rules across sections. A dry run makes no run and needs no directory.

        Raises:
            UserError: a setting is missing or contradicts another.
        """
        if not self.model.path:
            raise UserError("model.path is missing. Give --model.path DIRECTORY_OR_HUB_NAME.")
        if makes_run and not self.output_dir:
            raise UserError("output_dir is missing. Give --output_dir DIRECTORY.")
        if not self.stages:
            raise UserError(f"stages is empty. Choose from {', '.join(STAGES)}.")
        if self.stages != [s for s in STAGES if s in self.stages]:
            raise UserError(
                f"stages is [{', '.join(self.stages)}]. Choose from {', '.join(STAGES)}, each once "
                "and in this order."
            )
        if "evaluate" in self.stages and not (self.evaluate.corpora or self.evaluate.tasks):
            raise UserError(
                "evaluate.corpora and evaluate.tasks are both empty. Name a corpus or a task, or "
                "leave evaluate out of stages."
            )
        if "recover" in self.stages and (levels := self.recover.levels):
            for level in levels:
                level.apply(self.oneshot)  # rejected now, not after the levels before it
            o = self.oneshot
            sparser = levels[0].sparsity > o.target_sparsity
            if "oneshot" in self.stages and not o.layers and not sparser:
                raise UserError(
                    f"recover.masks.schedule begins with {levels[0]}, but oneshot already prunes "
                    f"to {o.target_sparsity:g}, and masks only grow. Begin above that, or leave "
                    "oneshot out of stages."
                )
        names = [Path(name).name for name in self.evaluate.corpora]
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"evaluate.corpora has two files called {name}, which results cannot tell "
                    "apart. Rename one."
                )
        if "evaluate" in self.stages:
            # C4's training and validation documents differ: calibrating on one and scoring the
            # other is the papers' protocol. WikiText-2's splits share their style and topics.
            scored = [name for name in self.evaluate.corpora if name != "c4"]
            for option, corpus, remedy in self.not_to_be_scored:
                if any(same_text(corpus, name) for name in scored):
                    raise UserError(
                        f"{option} {corpus!r} is also scored by evaluate. Choose another text"
                        f"{remedy}."
                    )

    @property
    def not_to_be_scored(self) -> list[tuple[str, str, str]]:
        """The texts that the model is made with: the option, the corpus, and another remedy."""
        texts = []
        if self.uses_calibration and not self.calibration.allow_scored_corpus:
            remedy = ", or set calibration.allow_scored_corpus to true"
            texts.append(("calibration.corpus", self.calibration.corpus, remedy))
        if "recover" in self.stages:
            texts.append(("recover.corpus", self.recover.corpus, ""))
        return texts

    @property
    def uses_calibration(self) -> bool:
        """Whether any stage reads the calibration text."""
        prunes = "oneshot" in self.stages or ("recover" in self.stages and self.recover.levels)
        return self.holds_out or bool(prunes and self.oneshot.uses_calibration)

    @property
    def holds_out(self) -> bool:
        """Whether any stage selects its weights on held-out calibration sequences."""
        return "sds" in self.stages or "reconstruct" in self.stages

    def start(self, stage: str) -> str | None:
        """The stage that `stage` starts from, finished or still to run. None: the run's model."""
        for earlier in reversed(MODELS[: MODELS.index(stage)]):
            done = Path(self.output_dir) / earlier / "done.json"
            if earlier in self.stages or done.exists():
                return earlier
        return None

    def recipe(self, stage: str) -> dict:
        """All settings that the result of a stage depends on."""
        settings = {"model": identity(self.model)}
        if stage in ("dense", "given"):
            return settings
        prunes = stage in ("oneshot", "sds") or (stage == "recover" and self.recover.levels)
        holds_out = stage in ("sds", "reconstruct")
        if prunes:
            settings["oneshot"] = identity(self.oneshot)
            settings["oneshot"]["sparsity"] = self.oneshot.target_sparsity
        if holds_out or (prunes and self.oneshot.uses_calibration):
            settings["calibration"] = identity(self.calibration)
            if not holds_out:
                del settings["calibration"]["held_out"]
        if stage in MODELS[1:]:
            settings[stage] = identity(getattr(self, stage))
            settings["start"] = self.start(stage)
        return settings


def same_text(a: str | Path, b: str | Path) -> bool:
    """Whether two names of corpora are the same name, or files with the same content."""
    both = Path(a).is_file() and Path(b).is_file()
    return str(a) == str(b) or (both and filecmp.cmp(a, b, shallow=False))

"""The settings of a whole run, and the rules across its sections."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Literal, get_args

from cap_llm.config.blockwise import (
    CalibrationConfig,
    OneshotConfig,
    ReconstructConfig,
    SdsConfig,
)
from cap_llm.config.evaluate import EvaluateConfig
from cap_llm.config.model import ModelConfig, RuntimeConfig
from cap_llm.config.recover import RecoverConfig
from cap_llm.config.section import Place, section
from cap_llm.runtime.errors import UserError

StageName = Literal["oneshot", "sds", "reconstruct", "recover", "evaluate"]
STAGE_NAMES = get_args(StageName)  # in the order of `stages.STAGES`


@section("")
class Config:
    """A pipeline over one model."""

    output_dir: Place = ""
    """Run directory. The same command resumes where an earlier one stopped."""
    name: str = ""
    """Name of this run in the report. Default: the methods, as in "SparseGPT 50% + recovery"."""
    stages: list[StageName] = field(default_factory=lambda: ["oneshot", "evaluate"])
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
            raise UserError(f"stages is empty. Choose from {', '.join(STAGE_NAMES)}.")
        if self.stages != [s for s in STAGE_NAMES if s in self.stages]:
            raise UserError(
                f"stages is [{', '.join(self.stages)}]. Choose from {', '.join(STAGE_NAMES)}, each "
                "once and in this order."
            )
        if "evaluate" in self.stages and not (self.evaluate.corpora or self.evaluate.tasks):
            raise UserError(
                "evaluate.corpora and evaluate.tasks are both empty. Name a corpus or a task, or "
                "leave evaluate out of stages."
            )
        if "recover" in self.stages and self.recover.levels:
            for level in self.recover.levels:
                level.apply(self.oneshot)  # rejected now, not after the levels before it
            if "oneshot" in self.stages and not self.oneshot.layers:
                sparsity = self.oneshot.target_sparsity
                self.recover.check_first_level("the result of oneshot", sparsity)
        names = [Path(name).name for name in self.evaluate.corpora]
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"evaluate.corpora has two files called {name}, which results cannot tell "
                    "apart. Rename one."
                )

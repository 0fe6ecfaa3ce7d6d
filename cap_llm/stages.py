"""The table of the stages, in order, which everything that has to know all stages reads.

A stage is a module, imported when it is needed. Its functions are called with the config sections
that the result of the stage depends on, and no others:

    check(preview, **sections)  raises a UserError if the work cannot succeed, before any work
    cost(preview, **sections)   memory, disk and operations of the work
    run(inputs, **sections)     does the work, or nothing if it is done

`run` gets the calibration text in place of the section, and the stage's own text as `text`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cap_llm.config import Config, ModelConfig
from cap_llm.config.section import identity

if TYPE_CHECKING:
    import torch

    from cap_llm.models.blocks import BlockModel
    from cap_llm.models.directory import ModelDirectory
    from cap_llm.runtime.console import Console
    from cap_llm.runtime.rundir import Run
    from cap_llm.runtime.world import World
    from cap_llm.text.reading import TextReader


@dataclass(frozen=True)
class Stage:
    """A stage: its module, and the config sections that its result depends on besides `model`."""

    module: str
    sections: Callable[[Config], tuple[str, ...]]
    text: Callable[[TextReader, Config], Any] | None = None  # reads a text of its own
    holds_out: bool = False  # whether it reads held-out calibration sequences
    makes_model: bool = True
    job: str = "oneshot"  # its batch file in slurm/

    def load(self) -> Any:
        """Imports the module."""
        return importlib.import_module(self.module)


def _pruning(config: Config) -> tuple[str, ...]:
    return ("oneshot", "calibration") if config.oneshot.uses_calibration else ("oneshot",)


STAGES = {
    "oneshot": Stage("cap_llm.blockwise.oneshot", _pruning),
    "sds": Stage(
        "cap_llm.blockwise.sds", lambda _: ("oneshot", "calibration", "sds"), holds_out=True
    ),
    "reconstruct": Stage(
        "cap_llm.blockwise.reconstruct", lambda _: ("calibration", "reconstruct"), holds_out=True
    ),
    "recover": Stage(
        "cap_llm.recovery.recover",
        lambda c: (*(_pruning(c) if c.recover.levels else ()), "recover"),
        text=lambda reader, c: reader.packed(c.recover),
        job="recover",
    ),
    "evaluate": Stage(
        "cap_llm.evaluation.evaluate",
        lambda _: ("evaluate",),
        text=lambda reader, c: reader.scored(c.evaluate),
        makes_model=False,
        job="evaluate",
    ),
}
MODELS = tuple(name for name, stage in STAGES.items() if stage.makes_model)
# The options, besides model.path and evaluate.corpora, that name a model or a text.
MODEL_OPTIONS = ("model.dense", "recover.teacher", "recover.finetuned")
TEXT_OPTIONS = ("calibration.corpus", "recover.corpus")


def sections(stage: str, config: Config) -> dict[str, Any]:
    """The config sections that a stage's result depends on, by name."""
    return {name: getattr(config, name) for name in STAGES[stage].sections(config)}


def used_sections(config: Config) -> set[str]:
    """The names of the sections that some stage of `config.stages` depends on."""
    return {"model"}.union(*(STAGES[stage].sections(config) for stage in config.stages))


def named(config: Config, options: tuple[str, ...]) -> dict[str, str]:
    """The values of `options`, without those that are not set or that no stage depends on."""
    split = {option: option.split(".") for option in options}
    used = used_sections(config)
    values = {o: getattr(getattr(config, s), name) for o, (s, name) in split.items() if s in used}
    return {option: value for option, value in values.items() if value}


def further_models(config: Config) -> dict[str, str]:
    """The models besides `model.path`, by the option that names them."""
    return {o: path for o, path in named(config, MODEL_OPTIONS).items() if path != "train"}


def scored_corpora(config: Config) -> list[str]:
    """The corpora to measure perplexity on."""
    return config.evaluate.corpora if "evaluate" in used_sections(config) else []


def chain(config: Config) -> list[str]:
    """The stages whose models the run directory has, or will have. Reads the disk: rank 0 decides.

    A stage starts from the model of the one before it; the first starts from the run's model.
    """
    folder = Path(config.output_dir)
    return [s for s in MODELS if s in config.stages or (folder / s / "done.json").exists()]


def previous(stage: str, chain: list[str]) -> str | None:
    """The stage of a chain that `stage` starts from; None: the run's model."""
    order = list(STAGES)
    return max(
        (s for s in chain if order.index(s) < order.index(stage)), key=order.index, default=None
    )


def recipe(stage: str, config: Config, chain: list[str]) -> dict:
    """All settings that a result depends on: of a stage, or of the scores of an outside model."""
    settings = {"model": identity(config.model)}
    if stage not in MODELS:
        return settings
    settings |= {name: identity(section) for name, section in sections(stage, config).items()}
    if "oneshot" in settings:  # whether the sparsity is set or follows from the pattern
        settings["oneshot"]["sparsity"] = config.oneshot.target_sparsity
    if "calibration" in settings and not STAGES[stage].holds_out:
        del settings["calibration"]["held_out"]
    return settings | {"start": previous(stage, chain)}


@dataclass(frozen=True)
class Preview:
    """What `check` and `cost` know before the work."""

    model: BlockModel  # without its weights
    folder: ModelDirectory  # its directory, or one that only has its config.json
    has_weights: bool  # whether they can be read as they are
    n_bytes: int  # of the weights
    start: ModelDirectory  # what the stage starts from; it need not exist yet
    from_run: bool  # whether an earlier stage of this run makes `start`
    models: dict[str, ModelDirectory]  # further models by option, as far as they can be read
    n_models: int  # that this job makes
    run_dir: Path  # it need not exist
    download: bool  # whether missing data may be downloaded
    world: World
    console: Console


@dataclass
class Cost:
    """What the work of a stage takes: bytes per rank, and operations of all ranks together."""

    dtype: torch.dtype  # of the forward passes
    memory: float = 0  # besides activations
    cached: float = 0  # activations that spill to disk if they do not fit
    waiting: float = 0  # activations that are recomputed if they do not fit
    disk: float = 0  # bytes written, without what spills
    forwards: float = 0  # operations in `dtype`
    solving: float = 0  # operations in fp32


@dataclass(frozen=True)
class Inputs:
    """What `run` starts from; models are directories."""

    run: Run
    recipe: dict  # the settings that the result depends on
    model: ModelConfig
    keep_intermediate: bool  # see `RuntimeConfig`
    source: ModelDirectory  # the run's model
    start: ModelDirectory  # the model to start from
    dense: ModelDirectory  # the model that `start` was pruned from
    from_run: bool  # whether an earlier stage of this run made `start`
    models: dict[str, ModelDirectory]  # further models by option
    finished: dict[
        str, ModelDirectory
    ]  # models with weights by stage, for a stage that makes no model

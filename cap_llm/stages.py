"""The stages of the pipeline, in order, and what each of them depends on.

Everything that has to know all stages reads this table. A stage is a module, which is imported when
it is needed and defines three functions. Each of them gets the config sections that the result of
the stage depends on, and no others:

    check(preview, **sections)  rejects what cannot work, before any work
    cost(preview, **sections)   memory, disk and operations of the work
    run(inputs, **sections)     does the work, or nothing if it is done

`run` gets the calibration text in place of the section `calibration`, and the stage's own text, if
it has one, as `text`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cap_llm.config import Config, RuntimeConfig
from cap_llm.config.section import identity

if TYPE_CHECKING:
    import torch

    from cap_llm.models.blocks import BlockModel
    from cap_llm.runtime.console import Console
    from cap_llm.runtime.rundir import Run
    from cap_llm.runtime.world import World
    from cap_llm.text.reading import TextReader


@dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        module: implements it.
        sections: returns the config sections that its result depends on, besides `model`.
        text: reads the stage's own text; None if it has none.
        holds_out: whether it also reads the held-out sequences of the calibration text.
        makes_model: whether its result is a model.
        job: name of its batch file in `slurm/`.
    """

    module: str
    sections: Callable[[Config], tuple[str, ...]]
    text: Callable[[TextReader, Config], Any] | None = None
    holds_out: bool = False
    makes_model: bool = True
    job: str = "oneshot"

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
    """The names of the sections that any stage of `config.stages` depends on."""
    return {"model"}.union(*(STAGES[stage].sections(config) for stage in config.stages))


def named(config: Config, options: tuple[str, ...]) -> dict[str, str]:
    """The values of those options that are set, in sections that a stage depends on."""
    used, values = used_sections(config), {}
    for option in options:
        section, _, field = option.partition(".")
        if section in used and (value := getattr(getattr(config, section), field)):
            values[option] = value
    return values


def further_models(config: Config) -> dict[str, str]:
    """The models besides `model.path`, by the option that names them."""
    return {o: path for o, path in named(config, MODEL_OPTIONS).items() if path != "train"}


def scored_corpora(config: Config) -> list[str]:
    """The corpora to measure perplexity on."""
    return config.evaluate.corpora if "evaluate" in used_sections(config) else []


def n_held_out(config: Config) -> int:
    """Held-out calibration sequences to read."""
    holds_out = any(STAGES[stage].holds_out for stage in config.stages)
    return config.calibration.held_out if holds_out else 0


def chain(config: Config) -> list[str]:
    """The stages whose models the run directory has, or will have, in order. Reads the disk.

    Rank 0 should decide, because a shared file system may show ranks different states.
    """
    folder = Path(config.output_dir)
    return [s for s in MODELS if s in config.stages or (folder / s / "done.json").exists()]


def previous(stage: str, chain: list[str]) -> str | None:
    """The stage whose model `stage` starts from; None: the run's model."""
    order = list(STAGES)
    return next((s for s in reversed(chain) if order.index(s) < order.index(stage)), None)


def recipe(stage: str, config: Config, chain: list[str]) -> dict:
    """All settings that a stage's result depends on; a rerun with others is rejected.

    `dense` and `given` are the folders of the scores of models that no stage made.
    """
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
    """What `check` and `cost` know before the work.

    Attributes:
        model: the run's model, without its weights.
        folder: its directory, or one that only has its config.json.
        has_weights: whether its weights can be read as they are.
        n_bytes: size of its weights, in bytes.
        start: the directory that the stage starts from. It need not exist yet.
        from_run: whether an earlier stage of this run makes `start`.
        models: further models by option, where they can be read; see `further_models`.
        n_models: models that the stages of this job make.
        run_dir: the run directory. It need not exist.
        download: whether missing data may be downloaded.
    """

    model: BlockModel
    folder: Path
    has_weights: bool
    n_bytes: int
    start: Path
    from_run: bool
    models: dict[str, Path]
    n_models: int
    run_dir: Path
    download: bool
    world: World
    console: Console


@dataclass
class Cost:
    """What the work of a stage takes.

    Attributes:
        dtype: of the forward passes.
        memory: bytes per rank, without `cached` and `waiting`.
        cached: bytes of hidden states per rank; what does not fit in memory spills to disk.
        waiting: bytes of inputs of linears per rank; what does not fit is recomputed.
        disk: bytes written, without what spills.
        forwards: floating-point operations in `dtype`, over all ranks.
        solving: floating-point operations in fp32, over all ranks.
    """

    dtype: torch.dtype
    memory: float = 0
    cached: float = 0
    waiting: float = 0
    disk: float = 0
    forwards: float = 0
    solving: float = 0


@dataclass(frozen=True)
class Inputs:
    """What `run` starts from.

    Attributes:
        run: the run directory.
        recipe: the settings that the result depends on.
        runtime: how to work; the result does not depend on it.
        model_name: `model.path`.
        tokenizer: `model.tokenizer`.
        source: directory of the run's model.
        start: directory of the model to start from.
        dense: directory of the dense model that `start` was pruned from; `source` if unknown.
        from_run: whether an earlier stage of this run made `start`.
        models: directories of further models, by option; see `further_models`.
        finished: directories of the models of finished stages that have weights, by stage.
    """

    run: Run
    recipe: dict
    runtime: RuntimeConfig
    model_name: str
    tokenizer: str | None
    source: Path
    start: Path
    dense: Path
    from_run: bool
    models: dict[str, Path]
    finished: dict[str, Path]

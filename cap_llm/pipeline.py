"""The pipeline: runs the stages that a config names, in one run directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cap_llm.config import Config, ModelConfig
from cap_llm.models.directory import ModelDirectory
from cap_llm.models.files import has_weights, remove_weights
from cap_llm.models.hub import contents, further_model, hub_config, locate, prepare
from cap_llm.preflight import check_corpora, preflight
from cap_llm.report.card import write_cards
from cap_llm.report.runs import read_runs
from cap_llm.report.write import write_report
from cap_llm.runtime.console import SILENT, Console
from cap_llm.runtime.errors import UserError, as_user_error
from cap_llm.runtime.interrupt import defer_signals, exit_code
from cap_llm.runtime.rundir import Run, check_run_dir, check_same_settings, with_contents
from cap_llm.runtime.world import World
from cap_llm.stages import (
    MODELS,
    STAGES,
    Inputs,
    chain,
    further_models,
    previous,
    recipe,
    sections,
    used_sections,
)
from cap_llm.text.reading import TextReader

OUTSIDE = ("dense", "given")  # folders of the scores of models that no stage made


def pipeline(config: Config, config_yaml: str, console: Console) -> None:
    """Runs the stages that `config` names.

    Raises:
        UserError: a setting or an input is invalid. Whatever is finished remains on disk.
    """
    world = World(config.runtime.device, config.runtime.activation_gib)
    run = None
    try:
        check_run_dir(Path(config.output_dir))
        if note := world.cpu_contention():
            console.say(note, style="yellow")
        located = locate(config.model)
        further = further_models(config)
        for option, path in further.items():
            locate(ModelConfig(path=path), option=option)  # downloads it now
        preflight(located, config, console, world)
        texts = read_texts(config, located, console) if located.path.is_dir() else None
        run = Run(config.output_dir, world, console)
        run.contents = world.decide(lambda: contents(config, located))
        stages = world.decide(lambda: chain(config))
        for stage in (*OUTSIDE, *config.stages):
            run.stage(stage, recipe(stage, config, stages))  # rejected before anything is written
        run.describe(config.name, config_yaml)
        source = prepare(located, config.model, run)
        models = {option: further_model(option, path, run) for option, path in further.items()}
        if source != located or any(run.path in m.path.parents for m in models.values()):
            preflight(source, config, console, world, models=models)  # of what was converted
        texts = texts or read_texts(config, source, console)
        Stages(config, run, source, models, stages, texts).run_all()
        is_scored = "evaluate" in config.stages and len(config.stages) > 1
        if source != located and is_scored and not config.runtime.keep_intermediate:
            drop(source.path, world)
        world.barrier()
        if world.is_main:
            write_cards(run.path)
            models, problems = read_runs([run.path])
            title = config.name or (models[-1].name if models else run.path.name)
            page = write_report(models, problems, run.path, title, console)
            console.say(f"report: {page}", loud=True)
    except BaseException as error:
        error = as_user_error(error)
        with defer_signals():  # the launcher ends all ranks once one has failed
            if run:
                error = run.explain_failure(error)
                run.close(exit_code(error), error)
            world.stop_watching()
        raise error
    run.close()
    world.close()


def read_texts(config: Config, model: ModelDirectory, console: Console = SILENT) -> dict[str, Any]:
    """Reads the texts of `config.stages`, by the section that describes them.

    Raises:
        UserError: a corpus is missing, malformed or too short, or the tokenizer does not fit.
    """
    reader, texts = TextReader(model.path, config.model.tokenizer, console), {}
    if "calibration" in used_sections(config):
        holds_out = any(STAGES[stage].holds_out for stage in config.stages)
        n_held_out = config.calibration.held_out if holds_out else 0
        texts["calibration"] = reader.calibration(config.calibration, n_held_out)
    for stage in config.stages:
        if read := STAGES[stage].text:
            texts[stage] = read(reader, config)
    return texts


@dataclass
class Stages:
    """The work of a job.

    Attributes:
        config: settings of the run.
        run: the run directory.
        source: directory of the run's model.
        models: directories of further models, by option.
        chain: the stages whose models the run directory has or will have.
        texts: see `read_texts`.
    """

    config: Config
    run: Run
    source: ModelDirectory
    models: dict[str, ModelDirectory]
    chain: list[str]
    texts: dict[str, Any]

    def run_all(self) -> None:
        """Runs the stages one after the other."""
        before = None  # the stage before, if it ran in this job
        for stage in self.config.stages:
            settings = sections(stage, self.config)
            if "calibration" in settings:
                settings["calibration"] = self.texts["calibration"]
            if stage in self.texts:
                settings["text"] = self.texts[stage]
            inputs = self.inputs(stage)
            if not STAGES[stage].makes_model:
                STAGES[stage].load().run(inputs, **settings)
                continue
            if not self.run.stage(stage, inputs.recipe)[1] and self.run.world.is_main:
                (self.run.path / "evaluate" / "done.json").unlink(missing_ok=True)
            STAGES[stage].load().run(inputs, **settings)
            if self.run.world.is_main:
                write_cards(self.run.path)
            if before and not self.config.runtime.keep_intermediate:
                self.score_and_drop(before, inputs)
            before = stage

    def folder(self, stage: str) -> tuple[Path, dict | None]:
        """The folder of a stage, checked, and its `done.json` if it is finished."""
        return self.run.stage(stage, recipe(stage, self.config, self.chain))

    def inputs(self, stage: str) -> Inputs:
        """What a stage starts from."""
        config, before, finished = self.config, previous(stage, self.chain), {}
        start = ModelDirectory(self.folder(before)[0]) if before else self.source
        if not STAGES[stage].makes_model:
            for name in self.chain:
                folder, done = self.folder(name)
                if done and has_weights(folder, self.run.world):
                    finished[name] = ModelDirectory(folder)
        return Inputs(
            run=self.run,
            recipe=recipe(stage, config, self.chain),
            model=config.model,
            keep_intermediate=config.runtime.keep_intermediate,
            source=self.source,
            start=start,
            dense=self.dense(stage, start),
            from_run=bool(before),
            models=self.models,
            finished=finished,
        )

    def dense(self, stage: str, start: ModelDirectory) -> ModelDirectory:
        """The directory of the dense model that a stage's start was pruned from.

        That is `model.dense`, or the run's model if `start` was pruned from it here, or if it is
        itself dense and about to be pruned on a schedule. Otherwise the teacher of recover counts
        as dense.

        Raises:
            UserError: nothing says which model is the dense one.
        """
        source, world = self.source, self.run.world
        if "model.dense" in self.models:
            return self.models["model.dense"]
        if stage not in MODELS[1:]:
            return source
        teacher, levels = None, []
        if stage == "recover":
            teacher, levels = self.models.get("recover.teacher"), self.config.recover.levels
        if start != source:
            source_is_dense = has_weights(source.path, world)
        else:
            source_is_dense = bool(levels) and not source.masks(world)
        if teacher and not source_is_dense:
            return teacher
        if start == source and not source_is_dense:
            raise UserError(
                f"{stage} starts from {source}, and nothing says what it was pruned from. Name the "
                "dense model with --model.dense, or let --stages begin with oneshot."
            )
        return source

    def score_and_drop(self, stage: str, inputs: Inputs) -> None:
        """Scores the model of a stage if the run scores models, and deletes its weights."""
        folder = self.run.path / stage
        if "evaluate" in self.config.stages and has_weights(folder, self.run.world):
            score = STAGES["evaluate"].load().score
            score(
                {stage: ModelDirectory(folder)},
                inputs,
                self.config.evaluate,
                self.texts["evaluate"],
            )
        drop(folder, self.run.world)


def drop(folder: Path, world: World) -> None:
    """Deletes a model's weights, once no rank reads them any more."""
    world.barrier()
    if world.is_main:
        remove_weights(folder)
    world.barrier()


def check_recipes(config: Config, located: ModelDirectory | None = None) -> None:
    """Checks that the stages in output_dir were begun with the same settings. Writes nothing.

    `located` is the run's model, if that is on the hub.

    Raises:
        UserError: names the first setting that differs.
    """
    sums, stages = contents(config, located), chain(config)
    for stage in (*OUTSIDE, *config.stages):
        settings = with_contents(recipe(stage, config, stages), sums)
        check_same_settings(Path(config.output_dir) / stage, settings)


def check_settings(config: Config) -> None:
    """Checks a config before its jobs wait in a queue.

    Raises:
        UserError: a setting is missing, contradicts another, or differs from the run directory's.
    """
    config.check()
    check_corpora(config)
    check_recipes(config)


def dry_run(config: Config, console: Console) -> None:
    """Checks all that can be checked without the work, and predicts what it takes."""
    world = World(config.runtime.device, config.runtime.activation_gib)
    if not config.output_dir:  # one that does not exist, on this file system
        config.output_dir = f"cap-llm-dry-run-{os.getpid()}"
    check_run_dir(Path(config.output_dir))
    located = locate(config.model, download=False)
    check_recipes(config, located)
    folder = located or hub_config(config.model)
    preflight(folder, config, console, world, predict=True, fetched=bool(located))
    if located and located.path.is_dir():
        read_texts(config, located, console)
    console.say("dry run: nothing was written")
    world.close()

"""The pipeline: runs the stages that a config names, in one run directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cap_llm.config import Config, ModelConfig
from cap_llm.models.files import has_weights, remove_weights
from cap_llm.models.hub import contents, further_model, hub_config, locate, prepare
from cap_llm.models.masks import Masks
from cap_llm.preflight import check_corpora, preflight
from cap_llm.report.card import write_cards
from cap_llm.report.runs import collect
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
    n_held_out,
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
    world = World(config.runtime.device)
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
        texts = read_texts(config, located, console) if located.is_dir() else None
        run = Run(config.output_dir, world, console)
        run.contents = world.decide(lambda: contents(config, located))
        stages = world.decide(lambda: chain(config))
        for stage in (*OUTSIDE, *config.stages):
            run.stage(stage, recipe(stage, config, stages))  # rejected before anything is written
        run.describe(config.name, config_yaml)
        source = prepare(located, config.model, run)
        models = {option: further_model(option, path, run) for option, path in further.items()}
        if source != located or any(run.path in path.parents for path in models.values()):
            preflight(source, config, console, world, models=models)  # of what was converted
        texts = texts or read_texts(config, source, console)
        run_stages(source, models, stages, texts, config, run)
        is_scored = "evaluate" in config.stages and len(config.stages) > 1
        if source != located and is_scored and not config.runtime.keep_intermediate:
            drop(source, world)
        world.barrier()
        if world.is_main:
            write_cards(run.path)
            results = collect(run.path)
            page = write_report(results, run.path, config.name or results[-1].name, console)
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


def read_texts(config: Config, model: Path, console: Console = SILENT) -> dict[str, Any]:
    """Reads the texts of `config.stages`, by the section that describes them.

    Raises:
        UserError: a corpus is missing, malformed or too short, or the tokenizer does not fit.
    """
    reader, texts = TextReader(model, config.model.tokenizer, console), {}
    if "calibration" in used_sections(config):
        texts["calibration"] = reader.calibration(config.calibration, n_held_out(config))
    for stage in config.stages:
        if read := STAGES[stage].text:
            texts[stage] = read(reader, config)
    return texts


def run_stages(
    source: Path,
    models: dict[str, Path],
    stages: list[str],
    texts: dict[str, Any],
    config: Config,
    run: Run,
) -> None:
    """Runs the stages of a config, one after the other.

    Args:
        source: directory of the run's model.
        models: directories of further models, by option.
        stages: whose models the run directory has or will have; see `chain`.
        texts: see `read_texts`.
        config: settings of the run.
        run: the run directory.
    """
    earlier = None  # the stage before, if it ran in this job
    for name in config.stages:
        settings = sections(name, config)
        settings |= {"calibration": texts["calibration"]} if "calibration" in settings else {}
        settings |= {"text": texts[name]} if name in texts else {}
        inputs = _inputs(name, source, models, stages, config, run)
        if STAGES[name].makes_model and not run.stage(name, inputs.recipe)[1]:
            _invalidate_scores(run)
        STAGES[name].load().run(inputs, **settings)
        if STAGES[name].makes_model:
            if run.world.is_main:
                write_cards(run.path)
            if earlier and not config.runtime.keep_intermediate:
                _drop_scored(earlier, inputs, texts, config)
            earlier = name


def _inputs(
    stage: str,
    source: Path,
    models: dict[str, Path],
    stages: list[str],
    config: Config,
    run: Run,
) -> Inputs:
    start = previous(stage, stages)
    finished = {}
    if not STAGES[stage].makes_model:
        for name in stages:
            folder, done = run.stage(name, recipe(name, config, stages))
            finished |= {name: folder} if done and has_weights(folder, run.world) else {}
    elif start:
        run.stage(start, recipe(start, config, stages))
    folder = run.path / start if start else source
    return Inputs(
        run=run,
        recipe=recipe(stage, config, stages),
        runtime=config.runtime,
        model_name=config.model.path,
        tokenizer=config.model.tokenizer,
        source=source,
        start=folder,
        dense=_dense(stage, folder, source, models, config, run.world),
        from_run=bool(start),
        models=models,
        finished=finished,
    )


def _dense(
    stage: str, start: Path, source: Path, models: dict[str, Path], config: Config, world: World
) -> Path:
    """The directory of the dense model that a stage's start was pruned from.

    That is `model.dense`, or the run's model if `start` was pruned from it here, or if it is itself
    dense and about to be pruned on a schedule. Otherwise the teacher of recover counts as dense.

    Raises:
        UserError: nothing says which model is the dense one.
    """
    if "model.dense" in models:
        return models["model.dense"]
    if stage not in MODELS or stage == MODELS[0]:
        return source
    teacher = models.get("recover.teacher") if stage == "recover" else None
    if start != source:
        source_is_dense = has_weights(source, world)
    else:
        gradual = stage == "recover" and bool(config.recover.masks.schedule)
        source_is_dense = gradual and not Masks(source, world)
    if teacher and not source_is_dense:
        return teacher
    if start == source and not source_is_dense:
        raise UserError(
            f"{stage} starts from {source}, and nothing says what it was pruned from. Name the "
            "dense model with --model.dense, or let --stages begin with oneshot."
        )
    return source


def _invalidate_scores(run: Run) -> None:
    """Marks the stages that make no model as not done, because there will be another model."""
    for name, stage in STAGES.items():
        if not stage.makes_model and run.world.is_main:
            (run.path / name / "done.json").unlink(missing_ok=True)


def _drop_scored(stage: str, inputs: Inputs, texts: dict[str, Any], config: Config) -> None:
    """Scores the model of a stage if the run scores models, and deletes its weights."""
    folder, world = inputs.run.path / stage, inputs.run.world
    if "evaluate" in config.stages and has_weights(folder, world):
        evaluation = STAGES["evaluate"].load()
        evaluation.score({stage: folder}, inputs, config.evaluate, texts["evaluate"])
    drop(folder, world)


def drop(folder: Path, world: World) -> None:
    """Deletes a model's weights, once no rank reads them any more."""
    world.barrier()
    if world.is_main:
        remove_weights(folder)
    world.barrier()


def check_recipes(config: Config, located: Path | None = None) -> None:
    """Checks that the stages in output_dir were begun with the same settings. Writes nothing.

    `located` is the directory of the run's model, if that is on the hub.

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
    world = World(config.runtime.device)
    if not config.output_dir:  # one that does not exist, on this file system
        config.output_dir = f"cap-llm-dry-run-{os.getpid()}"
    check_run_dir(Path(config.output_dir))
    located = locate(config.model, download=False)
    check_recipes(config, located)
    folder = located or hub_config(config.model)
    preflight(folder, config, console, world, predict=True, fetched=bool(located))
    if located and located.is_dir():
        read_texts(config, located, console)
    console.say("dry run: nothing was written")
    world.close()

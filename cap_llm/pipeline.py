"""The pipeline: which stages there are, and a run of those that a recipe names."""

from __future__ import annotations

import os
from pathlib import Path

from cap_llm.config import MODELS, Config
from cap_llm.models.files import has_weights
from cap_llm.models.hub import further_model
from cap_llm.models.masks import Masks
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError, as_user_error
from cap_llm.runtime.interrupt import defer_signals, exit_code
from cap_llm.runtime.rundir import Run
from cap_llm.runtime.world import World
from cap_llm.text.reading import Texts


def start_of(stage: str, source: Path, config: Config, run: Run) -> tuple[Path, Path]:
    """The model that a stage starts from, and the dense one that it was pruned from.

    The first is what the stage before it made in this run directory, now or in an earlier job;
    without one, the run's model. The second is then `model.dense`, or the run's model where the
    first was made of it here (and is kept), or is still dense and about to be pruned on a schedule.
    Otherwise the teacher of recover counts as dense.

    Raises:
        UserError: nothing says which model is the dense one.
    """
    earlier = config.start(stage)
    start = run.stage(earlier, config.recipe(earlier))[0] if earlier else source
    if config.model.dense:
        return start, further_model("model.dense", config.model.dense, run)
    recovers = stage == "recover"
    if start is not source:
        dense_is_here = has_weights(source, run.world)
    else:
        climbs = recovers and bool(config.recover.masks.schedule)
        dense_is_here = climbs and not Masks(source, run.world)
    if recovers and config.recover.teacher and not dense_is_here:
        return start, further_model("recover.teacher", config.recover.teacher, run)
    if start is source and not dense_is_here:
        raise UserError(
            f"{stage} starts from {source}, and nothing says what it was pruned from: name the "
            f"dense model with --model.dense, or let --stages begin with oneshot"
        )
    return start, source


def pipeline(config: Config, config_yaml: str, console: Console) -> None:
    """Runs the stages that `config` names."""
    from cap_llm.evaluation.evaluate import evaluate, outside_models
    from cap_llm.evaluation.lm_eval_tasks import find_tasks
    from cap_llm.models.files import has_weights
    from cap_llm.models.hub import contents, locate, prepare
    from cap_llm.report.card import write_cards
    from cap_llm.report.runs import read_runs
    from cap_llm.report.write import write_report
    from cap_llm.runtime.rundir import Run, check_run_dir
    from cap_llm.runtime.world import World
    from cap_llm.text.reading import read_texts

    world = World(config.runtime.device)
    run = None
    try:
        check_run_dir(Path(config.output_dir))
        if note := world.cpu_contention():
            console.say(note, style="yellow")
        located = locate(config.model)
        check(located, config, console, world)
        tasks = find_tasks(config.evaluate, console) if "evaluate" in config.stages else []
        texts = read_texts(config, located, console) if located.is_dir() else None
        run = Run(config.output_dir, world, console)
        known = contents(config, located) if world.is_main else None
        run.contents = world.gather(known)[0]
        for stage in ("dense", "given", *config.stages):
            run.stage(stage, config.recipe(stage))  # refused before anything is written
        run.describe(config.name, config_yaml)
        source = prepare(located, config.model, run)
        if source != located:
            check(source, config, console, world)
        texts = texts or read_texts(config, source, console)
        keep, models = config.runtime.keep_intermediate, {}
        for stage in [s for s in MODELS if s in config.stages]:
            folder = make(stage, source, texts, config, run)
            if world.is_main:
                write_cards(run.path)
            if models and not keep:
                earlier, path = models.popitem()  # what it came from
                if "evaluate" in config.stages and has_weights(path, world):
                    evaluate({earlier: path}, texts, tasks, config, run)
                drop(path, world)
            models[stage] = folder
        if "evaluate" in config.stages:
            for stage in MODELS:  # of earlier jobs, too
                folder, done = run.stage(stage, config.recipe(stage))
                models |= {stage: folder} if done and has_weights(folder, world) else {}
            wanted = config.evaluate.dense or not models
            scored = wanted and has_weights(source, world)
            outside = outside_models(source, config, run) if scored else {}
            evaluate(outside | models, texts, tasks, config, run)
        # jobs that come later, the scoring at the latest, need the dense model
        if source != located and models and not keep and "evaluate" in config.stages:
            drop(source, world)
        world.barrier()
        if world.is_main:
            write_cards(run.path)  # again, with the scores
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


def check(
    model: Path | None, config: Config, console: Console, world: World, predict: bool = False
) -> None:
    """Refuses what would fail later; with `predict`, says what the work takes.

    Of a model on the hub that is not fetched (None), the config.json says that alone.
    """
    from cap_llm.models.hub import hub_config
    from cap_llm.preflight import check_everything

    shapes = model or hub_config(config.model)
    check_everything(shapes, config, console, world, predict, fetched=bool(model))
    if "recover" in config.stages and shapes and shapes.is_dir():
        from cap_llm.recovery.check import check_recovery

        check_recovery(shapes, config, world, console, predict)


def make(stage: str, source: Path, texts: Texts, config: Config, run: Run) -> Path:
    """Runs a stage that makes a model; its folder."""
    if stage == "oneshot":
        from cap_llm.blockwise.oneshot import oneshot

        return oneshot(source, texts, config, run)
    if stage == "sds":
        from cap_llm.blockwise.sds import sds as work
    elif stage == "reconstruct":
        from cap_llm.blockwise.reconstruct import reconstruct as work
    else:
        from cap_llm.recovery.recover import recover as work

    return work(*start_of(stage, source, config, run), texts, config, run)


def drop(folder: Path, world: World) -> None:
    """Removes a model's weights, once no rank reads them any more."""
    from cap_llm.models.files import remove_weights

    world.barrier()
    if world.is_main:
        remove_weights(folder)
    world.barrier()


def dry_run(config: Config, console: Console) -> None:
    """Checks all that can be checked without the work, and predicts what it takes."""
    from cap_llm.evaluation.lm_eval_tasks import find_tasks
    from cap_llm.models.hub import locate, refuse_another_run
    from cap_llm.runtime.rundir import check_run_dir
    from cap_llm.runtime.world import World
    from cap_llm.text.reading import read_texts

    world = World(config.runtime.device)
    if not config.output_dir:  # one that is not there, on this file system
        config.output_dir = f"cap-llm-dry-run-{os.getpid()}"
    check_run_dir(Path(config.output_dir))
    located = locate(config.model, download=False)
    refuse_another_run(config, located)
    check(located, config, console, world, predict=True)
    if "evaluate" in config.stages:
        find_tasks(config.evaluate, console, fetch=False)
    if located and located.is_dir():
        read_texts(config, located, console)
    console.say("dry run: nothing was written")
    world.close()

"""The stage `evaluate`: perplexity and zero-shot scores of the dense model and of each stage's.

The results lie beside the model they score: `<run>/<stage>/perplexity.json` and `zeroshot.json`,
for the dense model in `<run>/dense/`, for one that came pruned in `<run>/given/`. What is scored
already, on the same windows or rows, is not scored again; what was scored of other weights, a model
that has changed since, does not count.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path

import torch

from cap_llm.blockwise.perplexity import streamed_nll
from cap_llm.config import Config
from cap_llm.evaluation import zeroshot
from cap_llm.evaluation.lm_eval_tasks import Task
from cap_llm.evaluation.results import earlier, facts_of, job
from cap_llm.models.blocks import BlockModel
from cap_llm.models.directory import ModelDirectory, Row
from cap_llm.models.hub import found_here, further_model
from cap_llm.models.masks import count_zeros
from cap_llm.runtime.console import Console, format_duration
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import write_json
from cap_llm.runtime.memory import Memory
from cap_llm.runtime.rundir import Run
from cap_llm.runtime.world import World
from cap_llm.text.reading import ScoredText, Texts

FILE = "perplexity.json"


def outside_models(source: ModelDirectory, config: Config, run: Run) -> dict[str, ModelDirectory]:
    """The models that a run scores and did not make, by the folders of their scores.

    `dense` is the dense model, where it is known; `given` is the run's model where that is pruned
    or `model.dense` names another. Their weights tell, and are counted in their `sparsity.json`.

    Args:
        source: the run's model.
        config: the run's settings.
        run: the run directory.

    Raises:
        UserError: a model cannot be read.
    """
    world = run.world
    counts = {"dense": count_zeros(source, world)}
    models = {"dense": source}
    dense = _known_dense(source, counts["dense"][-1], config, run)
    if dense or counts["dense"][-1]:
        models, counts = {"given": source}, {"given": counts["dense"]}
    if dense:
        models["dense"], counts["dense"] = dense, count_zeros(dense, world)
    for name, folder in models.items():
        place, _ = run.stage(name, config.recipe(name))
        run.bind(place, config.recipe(name))
        if world.is_main:
            found, whole, _ = counts[name]
            rows = [Row(n, shape, "as found", zeros, zeros) for n, (shape, zeros) in found.items()]
            ModelDirectory(place).write_sparsity(folder.path.resolve().name, rows, whole)
    return models


def _known_dense(
    source: ModelDirectory, pruned: bool, config: Config, run: Run
) -> ModelDirectory | None:
    """The dense model of the run's model, where it is another one and the settings name it.

    The teacher of a model that came pruned is its dense model if all shapes are the same.
    """
    if not config.evaluate.dense:
        return None
    dense = None
    if config.model.dense:
        dense = further_model("model.dense", config.model.dense, run)
    elif pruned and not config.start("recover") and "recover" in config.stages:
        teacher = found_here("recover.teacher", config.recover.teacher, config, run.world)
        if teacher and _shapes(teacher) == _shapes(source):
            dense = further_model("recover.teacher", config.recover.teacher, run)
    other = bool(dense) and dense.fingerprint != source.fingerprint
    return dense if run.world.gather(other)[0] else None


def _shapes(model: ModelDirectory) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.skeleton.named_parameters()}


def evaluate(
    models: dict[str, ModelDirectory], texts: Texts, tasks: list[Task], config: Config, run: Run
) -> None:
    """Scores model directories.

    Args:
        models: by the name of the folder of the run that takes the result (`dense`, `given`,
            `oneshot`).
        texts: the windows to score.
        tasks: the zero-shot tasks to score.
        config: the run's settings.
        run: the run directory.

    Raises:
        UserError: a model has no perplexity, overflows, or does not fit.
    """
    for stage, folder in models.items():
        place, _ = run.stage(stage, config.recipe(stage))
        run.bind(place, config.recipe(stage))
        facts = facts_of(folder, config, run.world) | {"stage": stage}
        if stage == "dense" and "given" in models:
            facts["model"] = str(folder)
        if texts.scored:
            path = place / FILE
            corpora = score_corpora(
                folder, texts.scored, config, facts, path, run.path, run.world, run.console
            )
            for key, entry in corpora.items():
                run.metric("evaluate", 0, {f"{stage} {key}": entry["ppl_token"]})
        if tasks:
            path = place / zeroshot.FILE
            results = zeroshot.score_tasks(
                folder,
                tasks,
                config.evaluate,
                facts,
                path,
                run.world,
                run.console,
                config.model.tokenizer,
            )
            for key, entry in results["tasks"].items():
                run.metric(
                    "evaluate", 0, {f"{stage} {key}": entry["acc"]} if "acc" in entry else {}
                )
        run.world.barrier()


def score_corpora(
    folder: ModelDirectory,
    scored: list[ScoredText],
    config: Config,
    facts: dict,
    path: Path | None,
    scratch: Path | None,
    world: World,
    console: Console,
) -> dict[str, dict]:
    """Perplexity of a model directory on each text.

    Args:
        folder: the model.
        scored: the windows.
        config: the run's settings.
        facts: what the file says of the model besides, and of the job; see `results.facts_of`.
        path: the file that is written after each text, and read for what it holds already.
        scratch: where activations go that do not fit in memory; None: a temporary folder.
        world: the ranks.
        console: where progress goes.

    Returns:
        The asked texts' entries, by corpus and window.

    Raises:
        UserError: the model has no perplexity or overflows.
    """
    stage = facts.get("stage", folder.path.name)
    results = earlier(path, ("corpora",), facts, world, console)["corpora"]
    for text in scored:
        known = results.get(text.key)
        if not known or known.get("text_sha256") != text.digest:
            title = f"{stage} on {text.name}"
            known = _score(folder, title, text, config, scratch, world, console)
            results[text.key] = known = known | job(facts)
            if world.is_main and path:
                write_json(path, facts | {"corpora": results})
        console.say(
            f"{stage}: ppl_token@{known['window']} {known['ppl_token']:.4f} on {text.name} "
            f"({known['windows']} windows, BOS {known['bos']}, {format_duration(known['seconds'])})"
        )
    return {text.key: results[text.key] for text in scored}


def _score(
    folder: ModelDirectory,
    title: str,
    text: ScoredText,
    config: Config,
    scratch: Path | None,
    world: World,
    console: Console,
) -> dict:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".scratch-") as place:
        model = BlockModel.open(folder, world.device)
        with console.bar(title, len(model), "blocks") as bar:
            memory = Memory.plan(world.device, config.runtime.activation_gib)
            nll = streamed_nll(model, text.windows, world, memory, Path(place), bar.advance)
    if not math.isfinite(nll):
        raise UserError(
            f"the perplexity of {folder} is not finite: the model overflows; "
            "check its weights, or use one stored in bfloat16 or float32"
        )
    n_windows, window = text.windows.shape
    scored = n_windows * (window - 1)
    return {
        "ppl_token": math.exp(nll / scored),
        "window": window,
        "windows": n_windows,
        "tokens": scored,
        "nll": nll / scored,
        "bos": text.bos,
        "origin": text.origin,
        "text_sha256": text.digest,
        "computed_in": str(model.dtype).removeprefix("torch."),
        "seconds": round(time.monotonic() - start, 2),
    }

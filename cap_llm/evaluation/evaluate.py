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

from cap_llm.blockwise.estimate import streaming_cost
from cap_llm.blockwise.perplexity import streamed_nll
from cap_llm.config import EvaluateConfig
from cap_llm.evaluation import zeroshot
from cap_llm.evaluation.lm_eval_tasks import find_tasks
from cap_llm.evaluation.results import earlier, facts_of, job
from cap_llm.models.blocks import BlockModel
from cap_llm.models.directory import ModelDirectory, Row
from cap_llm.models.files import has_weights
from cap_llm.models.masks import count_zeros
from cap_llm.runtime.console import SILENT, Console, format_bytes, format_duration
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import write_json
from cap_llm.runtime.memory import Memory
from cap_llm.runtime.world import World
from cap_llm.stages import Cost, Inputs, Preview
from cap_llm.text.reading import ScoredText

STAGE = "evaluate"
FILE = "perplexity.json"
WINDOWS = 160  # of a corpus, for the estimate; about as many as WikiText-2 has of 2048 tokens


def check(preview: Preview, evaluate: EvaluateConfig) -> None:
    """Checks that the model has scores, and that the tasks exist and fit in memory."""
    if not preview.model.is_causal:
        raise UserError(
            f"{type(preview.model.model).__name__} gives no next-token logits, so it has no "
            "perplexity and no zero-shot scores; set --stages [oneshot]"
        )
    find_tasks(evaluate, preview.console, fetch=preview.download)
    if evaluate.tasks and preview.world.device.type == "cuda":
        card = torch.cuda.get_device_properties(preview.world.device).total_memory
        if preview.n_bytes > card:
            raise UserError(
                f"evaluate.tasks need the whole model on each GPU, but {preview.folder} has "
                f"{format_bytes(preview.n_bytes)} and a GPU {format_bytes(card)}. Set "
                "--evaluate.tasks [] to measure perplexity only, which streams the model."
            )


def cost(preview: Preview, evaluate: EvaluateConfig) -> Cost:
    """The cost of the perplexities; the time of the tasks is not known."""
    n_windows = evaluate.max_windows or WINDOWS
    n_models = preview.n_models + evaluate.dense or 1
    result = streaming_cost(
        preview,
        n_windows * evaluate.window * bool(evaluate.corpora),
        evaluate.window,
        passes=n_models * len(evaluate.corpora),
        writes=False,
    )
    vocabulary = preview.model.model.config.get_text_config().vocab_size
    result.memory += 2 * 4 * evaluate.window * vocabulary * bool(evaluate.corpora)
    if evaluate.tasks:  # they need the whole model
        result.memory = max(result.memory, preview.n_bytes)
    return result


def run(inputs: Inputs, evaluate: EvaluateConfig, text: list[ScoredText]) -> None:
    """Scores the models of all finished stages, and the model that the run starts from.

    Raises:
        UserError: a model has no perplexity, overflows, or does not fit.
    """
    run, start, models = inputs.run, time.monotonic(), inputs.finished
    if (evaluate.dense or not models) and has_weights(inputs.source.path, run.world):
        models = outside_models(inputs, evaluate) | models
    score(models, inputs, evaluate, text)
    if run.world.is_main:
        (run.path / STAGE).mkdir(exist_ok=True)
    # There is no recipe, because later jobs may score something else.
    run.finish_stage(run.path / STAGE, {"seconds": round(time.monotonic() - start, 2)})


def outside_models(inputs: Inputs, evaluate: EvaluateConfig) -> dict[str, ModelDirectory]:
    """The models that a run scores and did not make, by the folders of their scores.

    `dense` is the dense model, if it is known; `given` is the run's model if that is pruned or
    `model.dense` names another. Zeros are counted in the weights and written to `sparsity.json`.

    Raises:
        UserError: a model cannot be read.
    """
    run, world, source = inputs.run, inputs.run.world, inputs.source
    counts = {"dense": count_zeros(source, world)}
    models = {"dense": source}
    pruned = counts["dense"][-1]
    dense = _known_dense(inputs, pruned) if evaluate.dense else None
    if dense or pruned:
        models, counts = {"given": source}, {"given": counts["dense"]}
    if dense:
        models["dense"], counts["dense"] = dense, count_zeros(dense, world)
    for name, folder in models.items():
        place, _ = run.stage(name, inputs.recipe)
        run.bind(place, inputs.recipe)
        if world.is_main:
            matrices, whole, _ = counts[name]
            rows = [Row(n, shape, "as found", z, z) for n, (shape, z) in matrices.items()]
            ModelDirectory(place).write_sparsity(folder.path.resolve().name, rows, whole)
    return models


def _known_dense(inputs: Inputs, pruned: bool) -> ModelDirectory | None:
    """The dense model of the run's model, if it is another one and the settings name it.

    The teacher of a model that came pruned is its dense model if all shapes are the same.
    """
    source, dense = inputs.source, inputs.models.get("model.dense")
    teacher = inputs.models.get("recover.teacher")
    recovers_source = set(inputs.finished) == {"recover"}
    if not dense and pruned and teacher and recovers_source and _shapes(teacher) == _shapes(source):
        dense = teacher
    other = bool(dense) and dense.fingerprint != source.fingerprint
    return dense if inputs.run.world.gather(other)[0] else None


def _shapes(model: ModelDirectory) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.skeleton.named_parameters()}


def score(
    models: dict[str, ModelDirectory],
    inputs: Inputs,
    evaluate: EvaluateConfig,
    text: list[ScoredText],
) -> None:
    """Scores model directories, by the folder of the run that takes the result."""
    run = inputs.run
    tasks = find_tasks(evaluate, SILENT)
    n_scores, total = 0, len(models) * (len(text) + len(tasks))
    for stage, folder in models.items():
        place = run.path / stage
        facts = facts_of(folder, inputs.model.path, run.world) | {"stage": stage}
        if stage == "dense" and "given" in models:
            facts["model"] = str(folder)
        scores = {}
        if text:
            corpora = score_corpora(
                folder, text, facts, place / FILE, run.path, run.world, run.console
            )
            scores |= {key: entry["ppl_token"] for key, entry in corpora.items()}
        if tasks:
            results = zeroshot.score_tasks(
                folder,
                tasks,
                evaluate,
                facts,
                place / zeroshot.FILE,
                run.world,
                run.console,
                inputs.model.tokenizer,
            )["tasks"]
            scores |= {key: entry["acc"] for key, entry in results.items() if "acc" in entry}
        n_scores += len(text) + len(tasks)
        metrics = {f"{stage} {key}": value for key, value in scores.items()}
        run.metric(STAGE, n_scores, metrics | {"scores": total})
        run.world.barrier()


def score_corpora(
    folder: ModelDirectory,
    scored: list[ScoredText],
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
            known = _score(folder, title, text, scratch, world, console)
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
    scratch: Path | None,
    world: World,
    console: Console,
) -> dict:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".scratch-") as place:
        model = BlockModel.open(folder, world.device)
        with console.bar(title, len(model), "blocks") as bar:
            memory = Memory.plan(world.device, world.activation_gib)
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

"""The stage `evaluate`: perplexity and zero-shot scores of the dense model and of each stage's.

The scores are in `scores.json` beside each model; those of the dense model in `<run>/dense/`, those
of a model that came pruned in `<run>/given/`. What is scored already is not scored again.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from pathlib import Path

import torch

from cap_llm.blockwise.estimate import streaming_cost
from cap_llm.blockwise.perplexity import streamed_nll
from cap_llm.config import EvaluateConfig
from cap_llm.evaluation.lm_eval_tasks import find_tasks
from cap_llm.evaluation.scores import FILE, Score, ScoreFile
from cap_llm.evaluation.zeroshot import score_tasks
from cap_llm.models.blocks import BlockModel
from cap_llm.models.directory import ModelDirectory, Row
from cap_llm.models.files import has_weights
from cap_llm.models.masks import count_zeros
from cap_llm.models.result import result_of, write_result
from cap_llm.runtime.console import SILENT, format_bytes, format_duration
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.memory import Memory
from cap_llm.stages import Cost, Inputs, Preview
from cap_llm.text.reading import ScoredText

STAGE = "evaluate"
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
    settings = dataclasses.asdict(inputs.model)
    if dense:
        models["dense"], counts["dense"] = dense, count_zeros(dense, world)
        settings["dense"] = settings["dense"] or str(dense)
    for name, folder in models.items():
        place, _ = run.stage(name, inputs.recipe)
        run.bind(place, inputs.recipe)
        if world.is_main:
            matrices, whole, _ = counts[name]
            rows = [Row(n, shape, "as found", z, z) for n, (shape, z) in matrices.items()]
            ModelDirectory(place).write_sparsity(folder.path.resolve().name, rows, whole)
            write_result(place, result_of(folder.path, name, settings), folder.path)
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
    """Scores model directories, by the folder of the run that takes the scores."""
    run, tasks = inputs.run, find_tasks(evaluate, SILENT)
    n_scores, total = 0, len(models) * (len(text) + len(tasks))
    for stage, model in models.items():
        file = ScoreFile(model, run.path / stage / FILE, stage, run.world, run.console)
        scores = score_corpora(file, text, run.path)
        if tasks:
            scores += score_tasks(file, tasks, evaluate, inputs.model.tokenizer)
        n_scores += len(text) + len(tasks)
        values = {
            f"{stage} {score.name}": score.value
            for score in scores
            if score.measure in ("ppl_token", "acc")
        }
        run.metric(STAGE, n_scores, values | {"scores": total})
        run.world.barrier()


def score_corpora(
    file: ScoreFile,
    texts: list[ScoredText],
    scratch: Path | None = None,
) -> list[Score]:
    """Measures the perplexity of a model on each text, unless its file has it.

    Args:
        file: the model and its scores; written after each text.
        texts: the windows.
        scratch: folder to spill activations to; None: a temporary folder.

    Raises:
        UserError: the model has no perplexity or overflows.
    """
    scores = []
    for text in texts:
        data, (n, window) = Path(text.name).name, text.windows.shape
        facts = {"window": window, "limit": text.limit, "text_sha256": text.digest}
        if not (known := file.find(data, **facts)):
            known = [_score(file, data, facts, text, scratch)]
            file.add(known)
        (score,) = known
        file.console.say(
            f"{file.title}: ppl_token@{window} {score.value:.4f} on {text.name} ({n} windows, BOS "
            f"{score.facts['bos']}, {format_duration(score.details['seconds'])})"
        )
        scores.append(score)
    return scores


def _score(
    file: ScoreFile,
    data: str,
    facts: dict,
    text: ScoredText,
    scratch: Path | None,
) -> Score:
    start, world = time.monotonic(), file.world
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".scratch-") as place:
        model = BlockModel.open(file.model, world.device)
        with file.console.bar(f"{file.title} on {text.name}", len(model), "blocks") as bar:
            memory = Memory.plan(world.device, world.activation_gib)
            nll = streamed_nll(model, text.windows, world, memory, Path(place), bar.advance)
    if not math.isfinite(nll):
        raise UserError(
            f"{file.model}: the perplexity is not finite because the model overflows. Check its "
            "weights, or use weights stored in bfloat16 or float32."
        )
    n_windows, window = text.windows.shape
    tokens = n_windows * (window - 1)
    facts = facts | {
        "windows": n_windows,
        "bos": text.bos,
        "computed_in": str(model.dtype).removeprefix("torch."),
        "torch": file.versions["torch"],
        "transformers": file.versions["transformers"],
    }
    seconds = round(time.monotonic() - start, 2)
    details = {"nll": nll / tokens, "origin": text.origin, "seconds": seconds}
    return Score("ppl_token", data, math.exp(nll / tokens), tokens, None, facts, details)

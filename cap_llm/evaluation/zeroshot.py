"""Zero-shot scores of a model directory by lm-eval: all of its metrics, with standard errors.

A task whose scores are in the model's `scores.json`, of the same rows, prompts and version of
lm-eval, is skipped. Each rank holds the whole model and computes its share of the requests.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from pathlib import Path

from transformers import AutoModelForCausalLM

from cap_llm.config import EvaluateConfig
from cap_llm.evaluation.lm_eval_tasks import SETS, Task, members, prompts_digest
from cap_llm.evaluation.scores import Score, ScoreFile
from cap_llm.models.directory import ModelDirectory
from cap_llm.models.hub import load_whole
from cap_llm.runtime.console import format_duration
from cap_llm.runtime.errors import UserError
from cap_llm.text.tokenizers import load_tokenizer


def score_tasks(
    file: ScoreFile, tasks: list[Task], config: EvaluateConfig, tokenizer: str | None = None
) -> list[Score]:
    """Scores a model on tasks, unless its file has their scores.

    Args:
        file: the model and its scores; written after each task.
        tasks: the tasks to score, from `find_tasks`.
        config: the limit, the batch size and the sets to average.
        tokenizer: directory or file, for a model without a tokenizer.

    Returns:
        The scores of all tasks, one per metric of lm-eval.

    Raises:
        UserError: the model is not a causal LM, is damaged, or does not fit in memory.
    """
    check_causal(file.model)
    world, lm, result = file.world, None, {}
    with tempfile.TemporaryDirectory(prefix="cap-llm-tasks-") as scratch:
        for task in tasks:
            built = task.build(Path(scratch))
            if len(set(world.gather(task.digest))) > 1:
                raise UserError(
                    f"task {task.name}: the ranks read different rows. Use the same data on all "
                    "nodes."
                )
            facts = {
                "limit": config.limit,
                "rows_sha256": task.digest,
                "prompts_sha256": prompts_digest(built),
                "tokenizer": tokenizer and str(Path(tokenizer).resolve()),
                "lm_eval": file.versions["lm_eval"],
            }
            scores, when = file.find(task.name, **facts), "already scored"
            if not scores:
                lm = lm or _open(file, tokenizer, config.batch_size)
                lm.title = f"{file.title}: {task.name}"
                scores = _score(lm, task, built, facts, file.versions)
                file.add(scores)
                when = format_duration(scores[0].details["seconds"])
            file.console.say(f"{file.title}: {scores[0].name}: {describe(scores)}, {when}")
            result[task.name] = scores
    for name in (name for name in config.tasks if name in SETS):
        values = [
            score.value
            for task in SETS[name]
            for score in result.get(task, ())
            if score.measure == "acc"
        ]
        if values:
            missing = [task for task in SETS[name] if task not in result]
            part = f", partial: without {', '.join(missing)}" if missing else ""
            mean = statistics.fmean(values)
            file.console.say(
                f"{file.title}: {name}: mean acc {mean:.4f} of {len(values)} tasks{part}"
            )
    return [score for scores in result.values() for score in scores]


def describe(scores: list[Score]) -> str:
    """Formats a task's scores: `acc 0.4217 ± 0.0101, 2376 items`."""
    texts = [
        f"{s.measure} {s.value:.4f}" + ("" if s.stderr is None else f" ± {s.stderr:.4f}")
        for s in scores
    ]
    if truncated := scores[0].details["truncated"]:
        texts.append(f"{truncated} requests truncated to the model's positions")
    return ", ".join([*texts, f"{scores[0].n} items"])


def check_causal(directory: ModelDirectory) -> None:
    """Checks that a directory holds a causal language model.

    Raises:
        UserError: it does not.
    """
    kind = type(directory.skeleton)
    if kind not in AutoModelForCausalLM._model_mapping.values():
        raise UserError(
            f"{directory} is a {kind.__name__}, not a causal language model, so it has no "
            "zero-shot scores"
        )


def _open(file: ScoreFile, path: str | None, batch_size: int):
    """Loads the model for lm-eval."""
    from cap_llm.evaluation.lm_eval_model import DistributedHFLM, quiet

    quiet()
    world = file.world
    tokenizer = load_tokenizer(path or str(file.model), file.model.settings.get("vocab_size"))
    # directly onto the device: one copy per rank could fill a node's main memory
    dtype = "float32" if world.device.type == "cpu" else "auto"
    model = load_whole(file.model, dtype=dtype, device_map={"": world.device})
    return DistributedHFLM(model.eval(), tokenizer, batch_size, world, file.console)


def _score(lm, task: Task, built, facts: dict, versions: dict) -> list[Score]:
    from cap_llm.evaluation.lm_eval_model import evaluate_task

    start, n_truncated = time.monotonic(), lm.truncated
    results = evaluate_task(lm, built, members(built), facts["limit"])
    counts = results["n-samples"].values()
    facts = facts | {
        "shots": results["n-shot"].get(task.name),
        "version": results["versions"].get(task.name),
        "computed_in": str(lm.model.dtype).removeprefix("torch."),
        "torch": versions["torch"],
        "transformers": versions["transformers"],
    }
    details = {
        "of": sum(n["original"] for n in counts),
        "origin": task.origin,
        "positions": lm.max_length,
        "truncated": lm.truncated - n_truncated,
        "batch_size": lm.batch_size,
        "seconds": round(time.monotonic() - start, 2),
    }
    n, scores = sum(n["effective"] for n in counts), []
    metrics = results["results"].get(task.name, {})
    for key, value in metrics.items():
        metric, comma, filter_ = key.partition(",")  # `acc,none`, `acc_stderr,none`
        if not comma or metric.endswith("_stderr") or not _is_finite(value):
            continue
        error = metrics.get(f"{metric}_stderr,{filter_}")
        error = error if _is_finite(error) else None
        measure = metric if filter_ == "none" else f"{metric}@{filter_}"
        scores.append(Score(measure, task.name, value, n, error, facts, details))
    if not scores:
        parts = ", ".join(sorted(results["results"]))
        raise UserError(f"lm-eval's group {task.name} has no score. Name its tasks: {parts}.")
    return scores


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

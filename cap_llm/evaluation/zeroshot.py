"""Zero-shot scores of a model directory by lm-eval, in `zeroshot.json` beside the model.

Each task has lm-eval's metrics (`acc`, `acc_norm`, ...) with standard errors and the number of
items. A task already in the file with the same weights, rows and versions is skipped. Each rank
holds the whole model and computes its share of the requests.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import tempfile
import time
from pathlib import Path

from transformers import AutoModelForCausalLM

from cap_llm.config import EvaluateConfig
from cap_llm.evaluation.lm_eval_tasks import SETS, Task, members, prompts_digest
from cap_llm.evaluation.results import earlier, job
from cap_llm.models.directory import ModelDirectory
from cap_llm.models.hub import load_whole
from cap_llm.runtime.console import Console, format_duration
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import write_json
from cap_llm.runtime.world import World
from cap_llm.text.tokenizers import load_tokenizer

FILE = "zeroshot.json"


def score_tasks(
    folder: ModelDirectory,
    tasks: list[Task],
    config: EvaluateConfig,
    facts: dict,
    path: Path | None,
    world: World,
    console: Console,
    tokenizer: str | None = None,
) -> dict:
    """Scores a model directory on tasks.

    Args:
        folder: the model.
        tasks: the tasks to score, from `find_tasks`.
        config: the limit, the batch size and the sets to average.
        facts: further entries of the file, about model and job; see `results.facts_of`.
        path: the file, read for earlier scores and written after each task.
        tokenizer: directory or file, for a model without a tokenizer.

    Returns:
        `tasks` has one entry per task and limit (`piqa`, `piqa first 40`): its metrics, `items` and
        what determines them. `means` has the mean `acc` of each set.

    Raises:
        UserError: the model is not a causal LM, is damaged, or does not fit in memory.
    """
    check_causal(folder)
    results = earlier(path, ("tasks", "means"), facts, world, console)
    stage = f"{facts['stage']}: " if "stage" in facts else ""
    lm = None
    with tempfile.TemporaryDirectory(prefix="cap-llm-tasks-") as scratch:
        for task in tasks:
            built = task.build(Path(scratch))
            key = task.name + _suffix(config)
            if len(set(world.gather(task.digest))) > 1:
                raise UserError(
                    f"task {task.name}: the ranks read different rows. Use the same data on all "
                    "nodes."
                )
            recipe = {
                "task": task.name,
                "limit": config.limit,
                "rows_sha256": task.digest,
                "prompts_sha256": prompts_digest(built),
                "tokenizer": tokenizer and str(Path(tokenizer).resolve()),
                "lm_eval": importlib.metadata.version("lm_eval"),
            }
            entry = results["tasks"].get(key, {})
            if recipe.items() <= entry.items():
                console.say(f"{stage}{key}: {metrics_text(entry)}, already scored")
                continue
            lm = lm or _open(folder, tokenizer, config.batch_size, world, console)
            lm.title = f"{stage}{key}"
            entry = recipe | _score(lm, task, built, config.limit)
            entry |= job(facts)
            console.say(f"{stage}{key}: {metrics_text(entry)}, {format_duration(entry['seconds'])}")
            results["tasks"][key] = entry
            results["means"] |= means(results["tasks"], config)
            if world.is_main and path:
                write_json(path, facts | results)
    for name, mean in means(results["tasks"], config).items():
        note = f", partial: without {', '.join(mean['missing'])}" if mean["partial"] else ""
        console.say(
            f"{stage}{name}: mean acc {mean['acc']:.4f} of {len(mean['tasks'])} tasks{note}"
        )
    return results


def means(entries: dict[str, dict], config: EvaluateConfig) -> dict[str, dict]:
    """The mean `acc` of each set in `config.tasks` that has a score, and which tasks are missing.

    Args:
        entries: scored tasks by name and limit.
        config: the sets and the limit.
    """
    result = {}
    for name in (name for name in config.tasks if name in SETS):
        scored = [task for task in SETS[name] if task + _suffix(config) in entries]
        missing = [task for task in SETS[name] if task not in scored]
        if scored:
            scores = [entries[task + _suffix(config)]["acc"] for task in scored]
            mean = {"acc": statistics.fmean(scores), "tasks": scored, "missing": missing}
            result[name + _suffix(config)] = mean | {"partial": bool(missing)}
    return result


def metrics_text(entry: dict) -> str:
    """A task's metrics for messages: `acc 0.4217 ± 0.0101, 2376 items`."""
    texts = []
    for name in (name for name in entry if f"{name}_stderr" in entry):
        error = entry[f"{name}_stderr"]
        texts.append(f"{name} {entry[name]:.4f}" + ("" if error is None else f" ± {error:.4f}"))
    if entry["truncated"]:
        texts.append(f"{entry['truncated']} requests truncated to the model's positions")
    return ", ".join([*texts, f"{entry['items']} items"])


def check_causal(folder: ModelDirectory) -> None:
    """Checks that a directory holds a causal language model.

    Raises:
        UserError: it does not.
    """
    kind = type(folder.skeleton)
    if kind not in AutoModelForCausalLM._model_mapping.values():
        raise UserError(
            f"{folder} is a {kind.__name__}, not a causal language model, so it has no zero-shot "
            "scores"
        )


def _suffix(config: EvaluateConfig) -> str:
    return f" first {config.limit}" if config.limit else ""


def _open(
    folder: ModelDirectory, path: str | None, batch_size: int, world: World, console: Console
):
    """Loads the model for lm-eval."""
    from cap_llm.evaluation.lm_eval_model import DistributedHFLM, quiet

    quiet()
    tokenizer = load_tokenizer(path or str(folder), folder.settings.get("vocab_size"))
    # directly onto the device: one copy per rank could fill a node's main memory
    dtype = "float32" if world.device.type == "cpu" else "auto"
    model = load_whole(folder, dtype=dtype, device_map={"": world.device})
    return DistributedHFLM(model.eval(), tokenizer, batch_size, world, console)


def _score(lm, task: Task, built, limit: int | None) -> dict:
    from cap_llm.evaluation.lm_eval_model import evaluate_task

    start, n_truncated = time.monotonic(), lm.truncated
    results = evaluate_task(lm, built, members(built), limit)
    entry = {}
    for key, value in results["results"].get(task.name, {}).items():
        metric, comma, filtered = key.partition(",")  # `acc,none`, `acc_stderr,none`
        if not comma:
            continue
        base = metric.removesuffix("_stderr")
        name = base + ("" if filtered == "none" else f"@{filtered}")
        entry[name if metric == base else f"{name}_stderr"] = None if value == "N/A" else value
    if not entry:
        parts = ", ".join(sorted(results["results"]))
        raise UserError(f"lm-eval's group {task.name} has no score. Name its tasks: {parts}.")
    counts = results["n-samples"].values()
    return entry | {
        "items": sum(n["effective"] for n in counts),
        "of": sum(n["original"] for n in counts),
        "version": results["versions"].get(task.name),
        "shots": results["n-shot"].get(task.name),
        "origin": task.origin,
        "positions": lm.max_length,
        "truncated": lm.truncated - n_truncated,
        "computed_in": str(lm.model.dtype).removeprefix("torch."),
        "batch_size": lm.batch_size,
        "seconds": round(time.monotonic() - start, 2),
    }

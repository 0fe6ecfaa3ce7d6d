"""Zero-shot scores of a model directory by lm-eval, in `zeroshot.json` beside the model.

For each task lm-eval's metrics (`acc`, `acc_norm`, ...) with their standard errors and the number
of items. A task that is in the file already, of the same weights, rows and versions, is not scored
again. Each rank holds the whole model and takes its share of the requests.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import tempfile
import time
from pathlib import Path

from transformers import AutoModelForCausalLM

from cap_llm.config import EvaluateConfig
from cap_llm.evaluation.lm_eval_tasks import (
    SETS,
    Task,
    members,
    prompts_digest,
)
from cap_llm.evaluation.results import earlier, job
from cap_llm.models.files import text_settings
from cap_llm.models.hub import load_whole
from cap_llm.models.skeleton import model_class
from cap_llm.runtime.console import Console, format_duration
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import write_json
from cap_llm.runtime.world import World
from cap_llm.text.tokenizers import load_tokenizer

FILE = "zeroshot.json"


def score_tasks(
    folder: Path,
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
        tasks: what to score, see `find_tasks`.
        config: the limit, the batch size, and the sets that means are wanted of.
        facts: what the file says of the model besides, and of the job; see `results.facts_of`.
        path: the file that is written after each task, and read for what it holds already.
        world: the ranks.
        console: where progress goes.
        tokenizer: directory or file, where the model brings no tokenizer.

    Returns:
        `tasks`: for each, by name and limit (`piqa`, `piqa first 40`), its metrics, `items` and
        what must be known to compare them; `means`: for each set, of `acc`.

    Raises:
        UserError: the model gives no next-token logits, is damaged, or does not fit.
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
                    f"task {task.name}: the ranks read different rows; give all nodes the same data"
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
                console.say(f"{stage}{key}: {figures(entry)}, scored before")
                continue
            lm = lm or _open(folder, tokenizer, config.batch_size, world, console)
            lm.title = f"{stage}{key}"
            entry = recipe | _score(lm, task, built, config.limit)
            entry |= job(facts)
            console.say(f"{stage}{key}: {figures(entry)}, {format_duration(entry['seconds'])}")
            results["tasks"][key] = entry
            results["means"] |= means(results["tasks"], config)
            if world.is_main and path:
                write_json(path, facts | results)
    for name, mean in means(results["tasks"], config).items():
        part = f", partial: without {', '.join(mean['missing'])}" if mean["partial"] else ""
        console.say(
            f"{stage}{name}: mean acc {mean['acc']:.4f} of {len(mean['tasks'])} tasks{part}"
        )
    return results


def means(entries: dict[str, dict], config: EvaluateConfig) -> dict[str, dict]:
    """For each set that is asked for and begun: the mean of `acc`, and whether tasks are missing.

    Args:
        entries: scored tasks by name and limit.
        config: the sets and the limit.
    """
    found = {}
    for name in (name for name in config.tasks if name in SETS):
        there = [task for task in SETS[name] if task + _suffix(config) in entries]
        missing = [task for task in SETS[name] if task not in there]
        if there:
            scores = [entries[task + _suffix(config)]["acc"] for task in there]
            mean = {"acc": statistics.fmean(scores), "tasks": there, "missing": missing}
            found[name + _suffix(config)] = mean | {"partial": bool(missing)}
    return found


def figures(entry: dict) -> str:
    """A task's metrics as a person reads them: `acc 0.4217 ± 0.0101, 2376 items`."""
    texts = []
    for name in (name for name in entry if f"{name}_stderr" in entry):
        error = entry[f"{name}_stderr"]
        texts.append(f"{name} {entry[name]:.4f}" + ("" if error is None else f" ± {error:.4f}"))
    if entry["truncated"]:
        texts.append(f"{entry['truncated']} requests cut to the model's positions")
    return ", ".join([*texts, f"{entry['items']} items"])


def check_causal(folder: Path) -> None:
    """Raises:
    UserError: the model of a directory gives no next-token logits.
    """
    kind = model_class(folder)
    if kind not in AutoModelForCausalLM._model_mapping.values():
        raise UserError(
            f"{folder} is a {kind.__name__}, which gives no next-token logits and so has no "
            "zero-shot scores; give a causal language model"
        )


def _suffix(config: EvaluateConfig) -> str:
    return f" first {config.limit}" if config.limit else ""


def _open(folder: Path, tokenizer: str | None, batch_size: int, world: World, console: Console):
    """The model in memory, as lm-eval calls it."""
    from cap_llm.evaluation.lm_eval_model import SharedLM, quiet

    quiet()
    reader = load_tokenizer(tokenizer or str(folder), text_settings(folder).get("vocab_size"))
    # tensor by tensor to the device: several copies would fill a node's main memory
    dtype = "float32" if world.device.type == "cpu" else "auto"
    model = load_whole(folder, dtype=dtype, device_map={"": world.device})
    return SharedLM(model.eval(), reader, batch_size, world, console)


def _score(lm, task: Task, built, limit: int | None) -> dict:
    from cap_llm.evaluation.lm_eval_model import evaluate_task

    start, cut = time.monotonic(), lm.truncated
    found = evaluate_task(lm, task.name, built, members(built), limit)
    entry = {}
    for key, value in found["results"].get(task.name, {}).items():
        metric, comma, filtered = key.partition(",")  # as in `acc,none` and `acc_stderr,none`
        if not comma:
            continue
        base = metric.removesuffix("_stderr")
        name = base + ("" if filtered == "none" else f"@{filtered}")
        error = metric != base
        entry[f"{name}_stderr" if error else name] = None if value == "N/A" else value
    if not entry:
        parts = ", ".join(sorted(found["results"]))
        raise UserError(f"lm-eval's group {task.name} has no score of its own; name tasks: {parts}")
    counts = found["n-samples"].values()
    return entry | {
        "items": sum(n["effective"] for n in counts),
        "of": sum(n["original"] for n in counts),
        "version": found["versions"].get(task.name),
        "shots": found["n-shot"].get(task.name),
        "origin": task.origin,
        "positions": lm.max_length,
        "truncated": lm.truncated - cut,
        "computed_in": str(lm.model.dtype).removeprefix("torch."),
        "batch_size": lm.batch_size,
        "seconds": round(time.monotonic() - start, 2),
    }

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

from cap_llm.blockwise.perplexity import streamed_nll
from cap_llm.config import Config
from cap_llm.evaluation.lm_eval_tasks import Task
from cap_llm.evaluation.scores import FILE, Score, ScoreFile
from cap_llm.evaluation.zeroshot import score_tasks
from cap_llm.models.blocks import BlockModel
from cap_llm.models.directory import Row, write_sparsity
from cap_llm.models.files import fingerprint
from cap_llm.models.hub import found_here, further_model
from cap_llm.models.masks import count_zeros
from cap_llm.models.result import dense_name, outside_result, read_result, write_result
from cap_llm.models.skeleton import skeleton
from cap_llm.runtime.console import format_duration
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.memory import Memory
from cap_llm.runtime.rundir import Run
from cap_llm.text.reading import ScoredText, Texts


def outside_models(source: Path, config: Config, run: Run) -> dict[str, Path]:
    """The models that a run scores and did not make, by the folders of their scores.

    `dense` is the dense model, where it is known; `given` is the run's model where that is pruned
    or `model.dense` names another. Their weights tell, and are counted in their `sparsity.json`.

    Args:
        source: the directory of the run's model.
        config: the run's settings.
        run: the run directory.

    Raises:
        UserError: a model cannot be read.
    """
    world = run.world
    counts = {"dense": count_zeros(source, world)}
    models, settings = {"dense": source}, dataclasses.asdict(config.model)
    dense = _known_dense(source, counts["dense"][-1], config, run)
    if dense or counts["dense"][-1]:
        models, counts = {"given": source}, {"given": counts["dense"]}
    if dense:
        models["dense"], counts["dense"] = dense, count_zeros(dense, world)
        settings["dense"] = settings["dense"] or config.recover.teacher
    for name, folder in models.items():
        place, _ = run.stage(name, config.recipe(name))
        run.bind(place, config.recipe(name))
        if world.is_main:
            found, whole, _ = counts[name]
            rows = [
                Row(n, shape, "as found", zeros, zeros, None, None, 0.0)
                for n, (shape, zeros) in found.items()
            ]
            write_sparsity(place, folder.resolve().name, rows, whole)
            result = outside_result(folder, name, dense_name(settings))
            write_result(place, read_result(folder) or result, folder)
    return models


def _known_dense(source: Path, pruned: bool, config: Config, run: Run) -> Path | None:
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
    other = bool(dense) and fingerprint(dense) != fingerprint(source)
    return dense if run.world.gather(other)[0] else None


def _shapes(folder: Path) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in skeleton(folder).named_parameters()}


def evaluate(
    models: dict[str, Path], texts: Texts, tasks: list[Task], config: Config, run: Run
) -> None:
    """Scores model directories.

    Args:
        models: by the name of the folder of the run that takes the scores (`dense`, `given`,
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
        file = ScoreFile(folder, place / FILE, stage, run.world, run.console)
        scores = score_corpora(file, texts.scored, config.runtime.activation_gib, run.path)
        if tasks:
            scores += score_tasks(file, tasks, config.evaluate, config.model.tokenizer)
        for score in scores:
            if score.measure in ("ppl_token", "acc"):
                run.metric("evaluate", 0, {f"{stage} {score.name}": score.value})
        run.world.barrier()


def score_corpora(
    file: ScoreFile,
    texts: list[ScoredText],
    activation_gib: float | None = None,
    scratch: Path | None = None,
) -> list[Score]:
    """Measures the perplexity of a model on each text, unless its file has it.

    Args:
        file: the model and its scores; written after each text.
        texts: the windows.
        activation_gib: memory for activations per rank.
        scratch: folder to spill activations to; None: a temporary folder.

    Raises:
        UserError: the model has no perplexity or overflows.
    """
    scores = []
    for text in texts:
        data, (n, window) = Path(text.name).name, text.windows.shape
        facts = {"window": window, "limit": text.limit, "text_sha256": text.digest}
        if not (known := file.find(data, **facts)):
            known = [_score(file, data, facts, text, activation_gib, scratch)]
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
    activation_gib: float | None,
    scratch: Path | None,
) -> Score:
    start, world = time.monotonic(), file.world
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".scratch-") as place:
        model = BlockModel.open(file.folder, world.device)
        with file.console.bar(f"{file.title} on {text.name}", len(model), "blocks") as bar:
            memory = Memory.plan(world.device, activation_gib)
            nll = streamed_nll(model, text.windows, world, memory, Path(place), bar.advance)
    if not math.isfinite(nll):
        raise UserError(
            f"{file.folder}: the perplexity is not finite because the model overflows. Check its "
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

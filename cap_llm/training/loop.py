"""Training of one model: from a model directory to a trained engine.

All losses of a step come from one forward of the student and one of the teacher. The order of the
data, the banks' draws and the learning rate follow from the step alone, so that any number of ranks
sees the same batches and a resumed training is as if it had never stopped. A stage of a gradual
schedule continues in the data where the one before it ended.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cap_llm.config import ObjectiveConfig, RecoverConfig
from cap_llm.contrast.terms import ContrastiveObjective, NoContrast
from cap_llm.models.directory import ModelDirectory
from cap_llm.runtime.console import format_bytes
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.interrupt import Stopped, defer_signals, stop_before_limit
from cap_llm.runtime.memory import peaks
from cap_llm.runtime.rundir import Run
from cap_llm.runtime.world import World
from cap_llm.training import checkpoints, ds_config
from cap_llm.training import engine as engines
from cap_llm.training.masks import MaskPolicy
from cap_llm.training.task import Task

MAX_OVERFLOWS = 40  # steps in a row: more than DeepSpeed's scale can be halved from 2^32


@dataclass(frozen=True)
class Job:
    """What one training works on.

    Attributes:
        student: the model to train.
        task: data, losses and metric.
        masks: what its masks do.
        teacher: the frozen engine, or None where no term needs it.
        contrasts: the contrasts, their banks filled.
        folder: for checkpoints.
        recipe: that a checkpoint must have been made with.
        title: of the bar.
        stage: name of the metrics.
        before: steps that earlier stages of the schedule have taken from the data.
        began: when the work began, on `time.monotonic`'s clock.
    """

    student: ModelDirectory
    task: Task
    masks: MaskPolicy
    teacher: object | None
    contrasts: ContrastiveObjective | NoContrast
    folder: Path
    recipe: dict
    title: str
    stage: str
    before: int = 0
    began: float = 0.0


@dataclass
class Trained:
    """What a training gives.

    Attributes:
        engine: with the trained model as `engine.module.model`; None once it is released.
        held_out: the task's metric on held-out data, by step.
        began: when the work began, the time of earlier jobs included.
        summary: steps, units, throughput, and the step it resumed at.
    """

    engine: Any
    held_out: dict[int, float] = field(default_factory=dict)
    began: float = 0.0
    summary: dict = field(default_factory=dict)


def train(job: Job, config: RecoverConfig, run: Run) -> Trained:
    """Trains a student for `config.steps` steps.

    Raises:
        UserError: a loss is not finite, fp16 overflows at every scale, a weight regrows, or a
            checkpoint does not fit.
        Stopped: a signal came; a checkpoint has been written.
    """
    world, task = run.world, job.task
    settings = ds_config.student_settings(config, world)
    found = checkpoints.find(job.folder, settings, job.recipe, config, world, run.console)
    trained = Trained(engines.load_student(job.student, settings, config, world, task.student))
    engine, trained.began = trained.engine, job.began
    keeper = job.masks.attach(engine)
    first, resumed_from = 0, None
    run.metric(job.stage, 0, {"steps": config.steps})

    def evaluate(step: int, figures: dict) -> None:
        """Measures the held-out metric, counts the zeros, and logs how the training stands."""
        value = task.evaluate(engine, config.engine.micro_batch, world)
        trained.held_out[step] = value
        keeper.check()
        run.metric(job.stage, step, {task.metric: value})
        text = f"{job.title}: step {step:>5}/{config.steps}  {task.metric_label} {value:.3f}"
        text = f"{text}  {_line(figures, task)}".rstrip()
        run.console.say(f"{text}  {keeper.n_masked:,} zeros")

    def save(step: int) -> None:
        """Counts the zeros and writes a checkpoint."""
        keeper.check()
        run.metric(job.stage, step, {"zeros": keeper.n_masked})
        for term in job.contrasts.terms:
            for bank in term.banks:
                bank.flush()
        spent = round(time.monotonic() - trained.began, 2)
        state = {"held_out": trained.held_out, "stage_seconds": spent, "from": resumed_from}
        stage, keep = engines.stage_of(settings), config.checkpoint.keep
        state["weights"] = keeper.checksums()
        checkpoints.save(engine, job.folder, step, state, job.recipe, stage, keep, world)

    if found:
        checkpoints.load(engine, found)
        keeper.verify()
        checkpoints.check_weights(found, keeper.checksums())
        keeper.check()
        first, resumed_from = found.step, found.state.get("from")
        trained.began = time.monotonic() - found.state["stage_seconds"]
        trained.held_out = {int(k): v for k, v in found.state["held_out"].items()}
        where = f"resuming at step {first + 1}/{config.steps}"
        run.console.say(f"{job.title}: {where if first < config.steps else 'already trained'}")
    else:
        evaluate(0, {})
    # rows of the steps before, where the bank has been removed
    teacher_states = functools.partial(task.states, job.teacher)
    job.contrasts.refill(teacher_states, job.before + first, config.engine.micro_batch, run.console)
    seconds, units, overflows = 0.0, 0, 0
    longest = slowest = 0.0  # seconds of a step and of a checkpoint
    with defer_signals() as request, run.console.bar(job.title, config.steps, "steps") as bar:
        bar.advance(first)
        for step in range(first + 1, config.steps + 1):
            start = time.monotonic()
            with world.bounded(f"step {step}"):
                figures = step_once(engine, job, step - 1, config, world)
            overflows = count_overflows(overflows, step - 1, figures)
            seconds += time.monotonic() - start
            units += config.optimizer.batch * task.per_example
            figures["lr"] = learning_rate(step - 1, config)
            figures[f"{task.unit}_per_second"] = units / seconds
            figures |= peaks()
            run.metric(job.stage, step, figures)
            measured = max(trained.held_out)
            held_out = f"{task.metric_label} {trained.held_out[measured]:.2f} at step {measured}"
            bar.phase(f"{held_out}  {_line(figures, task)}  {keeper.n_masked:,} zeros")
            bar.advance()
            stop = max(world.gather(request.number))
            last = step == config.steps
            if last or step % config.log.evaluate_every == 0:
                evaluate(step, figures)
            longest = max(longest, time.monotonic() - start)
            if stop or last or step % config.checkpoint.every == 0:
                saving = time.monotonic()
                save(step)
                # A time limit must leave room for a last step and checkpoint.
                slowest = max(slowest, time.monotonic() - saving)
                stop_before_limit(60.0 + 2 * (slowest + longest))
                if stop := max(world.gather(request.number)):  # also since the step
                    run.console.say(f"{job.title}: checkpoint at step {step}/{config.steps}")
                    raise Stopped(stop)
    keeper.remove()
    trained.summary = {
        "steps": config.steps,
        task.unit: config.steps * config.optimizer.batch * task.per_example,
        f"{task.unit}_per_second": round(units / max(1e-9, seconds), 1),
        "resumed_at_step": first,
    }
    return trained


def learning_rate(step: int, config: RecoverConfig) -> float:
    """The rate of a step (from 0): a linear warm-up, then a cosine to a tenth of the peak.

    A share of few steps would be no warm-up: Adam's first steps are as large as the rate, whatever
    the gradient, and its second moments are new in each level.
    """
    least = min(5, config.steps // 4) if config.optimizer.warmup else 0
    warm = max(least, round(config.optimizer.warmup * config.steps))
    if step < warm:
        return config.optimizer.lr * (step + 1) / warm
    progress = (step - warm) / max(1, config.steps - warm)
    return config.optimizer.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def step_once(engine, job: Job, step: int, config: RecoverConfig, world: World) -> dict[str, float]:
    """One optimizer step.

    Returns:
        The loss and its parts, averaged over its micro-batches and all ranks, and the norm of the
        gradient before clipping, unless it overflowed in float16: then the step was left out.

    Raises:
        UserError: the loss or the gradient is not finite, or fp16 overflows at its least scale.
    """
    place = job.before + step  # in the data
    batch = job.task.draws(place * config.optimizer.batch, (place + 1) * config.optimizer.batch)
    each = world.size * config.engine.micro_batch
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    n_micro = config.accumulation(world.size)
    total, norm, parts = torch.zeros(()), None, {}
    for micro in range(n_micro):
        everyone = batch[micro * each : (micro + 1) * each]
        at = world.rank * config.engine.micro_batch
        mine = everyone[at : at + config.engine.micro_batch]
        loss, parts = _losses(engine, job, mine, everyone, place, micro)
        values = torch.stack([part.detach().double().cpu() for part in parts.values()])
        total = total + world.sum(values.to(world.device)).cpu() / world.size
        if not math.isfinite(total[0]):
            raise UserError(
                f"The loss of step {step + 1} is not finite (examples {everyone.tolist()}). "
                f"{_remedy(job)}"
            )
        try:
            engine.backward(loss)
            if micro + 1 == n_micro and isinstance(engine.optimizer, torch.optim.Optimizer):
                # stage 0 in fp32: DeepSpeed clips without saying what the norm was
                gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
                norm = torch.nn.utils.get_total_norm(gradients).item()
            engine.step()
        except Exception as error:
            if "scale" in str(error) and "minimum" in str(error):
                raise _overflow(step) from None
            raise
    norm = engine.get_global_grad_norm() if norm is None else norm
    figures = dict(zip(parts, (total / n_micro).tolist(), strict=True))
    if 0 <= norm < math.inf:
        return figures | {"grad_norm": float(norm)}
    if config.optimizer.dtype != "float16":
        raise UserError(
            f"The gradient of step {step + 1} is not finite, though its loss is (examples "
            f"{batch.tolist()}). {_remedy(job)}"
        )
    return figures


def _remedy(job: Job) -> str:
    """What helps where a number is not finite: this directory holds what its settings made."""
    last = checkpoints.latest(job.folder)
    there = f" and --recover.checkpoint.resume {last}" if last else ""
    return (
        f"Nothing of this step was saved. In another output_dir, lower "
        f"--recover.optimizer.lr{there}, or start over with --recover.optimizer.dtype float32."
    )


def count_overflows(before: int, step: int, figures: dict[str, float]) -> int:
    """Steps in a row that float16 has made nothing of, after a step with these figures.

    Raises:
        UserError: too many: DeepSpeed lowers its scale, but not a fixed one.
    """
    count = 0 if "grad_norm" in figures else before + 1
    if count >= MAX_OVERFLOWS:
        raise _overflow(step)
    return count


def _overflow(step: int) -> UserError:
    return UserError(
        f"Step {step + 1} overflows in float16 at every loss scale. Start over in another "
        "output_dir with --recover.optimizer.dtype bfloat16 or float32."
    )


def _losses(engine, job: Job, mine, everyone, place: int, micro: int):
    """The loss of this rank's examples, and its parts for the log."""
    losses = job.task.losses(engine, job.teacher, mine)
    loss, parts = losses.total, dict(losses.parts)
    contrasts = job.contrasts.losses(
        losses.states, losses.teacher_states, mine, everyone, place, micro
    )
    for term in job.contrasts.terms:
        parts[term.name] = contrasts[term.name]
        loss = loss + term.weight * contrasts[term.name]
    return loss, {"loss": loss} | parts


def _line(figures: dict[str, float], task: Task) -> str:
    """A step's figures as the bar and the log show them; empty before the first step."""
    if not figures:
        return ""
    speed = figures[f"{task.unit}_per_second"]
    shown = [f"loss {figures['loss']:.4f}", f"{speed:,.0f} {task.unit}/s"]
    norm = f"norm {figures['grad_norm']:.3f}" if "grad_norm" in figures else "overflow, skipped"
    shown += [f"lr {figures['lr']:.1e}", norm]
    shown += [format_bytes(figures.get("peak_cuda_bytes", figures["peak_memory_bytes"]))]
    parts = [f"{name} {figures[name]:.4f}" for name in ObjectiveConfig.TERMS if name in figures]
    return "  ".join(shown + parts)

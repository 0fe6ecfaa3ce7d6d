"""Training of one rung: from a pruned model directory to a recovered one.

All losses of a step come from one forward of the student and one of the teacher. The order of the
data, the banks' draws and the learning rate follow from the step alone, so that any number of ranks
sees the same batches and a resumed training goes on as if it had never stopped. A rung goes on in
the text where the one before it ended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cap_llm.config import ObjectiveConfig, RecoverConfig
from cap_llm.recovery import checkpoints, engines
from cap_llm.recovery.contrasts import Contrasts
from cap_llm.recovery.zeros import ZeroKeeper, keep_zeros
from cap_llm.runtime.console import size
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.interrupt import Stopped, held_back, stop_before_limit
from cap_llm.runtime.peaks import peaks
from cap_llm.runtime.rundir import Run
from cap_llm.text.packing import PackedText

MOST_OVERFLOWS = 40  # steps in a row: more than DeepSpeed's scale can be halved from 2^32


@dataclass
class Job:
    """What one training works on.

    Attributes:
        student: directory of the model to train.
        masks: parameters' names and masks, in their shape; taken one at a time.
        teacher: the frozen engine, or None where no term needs it.
        contrasts: the contrasts, their banks filled.
        text: sequences to train on, and the held-out ones.
        folder: for checkpoints.
        recipe: that a checkpoint must have been made with.
        title: of the bar.
        stage: name of the metrics.
        before: steps that the rungs before this one have taken from the text.
        began: when the stage began, on `time.monotonic`'s clock; moved back by a resume, so that
            the time of earlier jobs counts.
        held_out: perplexity of the held-out sequences, by step.
        resumed_from: the checkpoint that `recover.resume` named, if it was begun by one.
        overflows: steps in a row that float16 has made nothing of.
    """

    student: Path
    masks: Iterable[tuple[str, torch.Tensor]]
    teacher: Callable | None
    contrasts: Contrasts
    text: PackedText
    folder: Path
    recipe: dict
    title: str
    stage: str
    before: int = 0
    began: float = 0.0
    held_out: dict[int, float] = field(default_factory=dict)
    resumed_from: str | None = None
    overflows: int = 0


def train(job: Job, config: RecoverConfig, run: Run):
    """Trains a student for `config.steps` steps.

    Returns:
        The engine with the trained student, and the summary; `job.held_out` has the held-out
        perplexities by step.

    Raises:
        UserError: a loss is not finite, fp16 overflows at every scale, a weight regrows, or a
            checkpoint does not fit.
        Stopped: a signal came; a checkpoint has been written.
    """
    world = run.world
    settings = engines.student_settings(config, world)
    found = checkpoints.find(job.folder, settings, job.recipe, config, world, run.console)
    engine = engines.load_student(job.student, settings, config, world)
    keeper = keep_zeros(engine, ((f"model.{name}", mask) for name, mask in job.masks))
    first = 0
    if found:
        checkpoints.load(engine, found)
        keeper.verify()
        checkpoints.check_weights(found, keeper.checksums())
        keeper.check()
        first = found.step
        job.began = time.monotonic() - found.state["stage_seconds"]
        job.held_out = {int(k): v for k, v in found.state["held_out"].items()}
        job.resumed_from = found.state.get("from")
        where = f"going on at step {first + 1} of {config.steps}"
        run.console.say(f"{job.title}: {where if first < config.steps else 'trained already'}")
    else:
        _judge(engine, keeper, job, 0, {}, config, run)
    for term in job.contrasts.terms:
        if term.online:  # rows of the steps before, where the bank has been removed
            job.contrasts.fill(
                term.banks[0],
                lambda ids: job.teacher(ids, False)[0],
                job.contrasts.seen(job.before + first),
                config.micro_batch,
                f"{term.name}: banking again",
                run.console,
            )
    seconds, tokens = 0.0, 0
    longest = slowest = 0.0  # seconds of a step and of a checkpoint
    with held_back() as request, run.console.bar(job.title, config.steps, "steps") as bar:
        bar.advance(first)
        for step in range(first + 1, config.steps + 1):
            start = time.monotonic()
            with world.bounded(f"step {step}"):
                figures = step_once(engine, job, step - 1, config, run)
            seconds += time.monotonic() - start
            tokens += config.batch * config.length
            figures |= {"lr": learning_rate(step - 1, config), "tokens_a_second": tokens / seconds}
            figures |= peaks()
            run.metric(job.stage, step, figures)
            judged = max(job.held_out)
            held_out = f"ppl {job.held_out[judged]:.2f} at step {judged}"
            zeros = f"{keeper.n_masked:,} zeros"
            bar.phase(f"{held_out}  {_line(figures)}  {zeros}")
            bar.advance()
            stop = max(world.gather(request.number))
            last = step == config.steps
            if last or step % config.evaluate_steps == 0:
                _judge(engine, keeper, job, step, figures, config, run)
            longest = max(longest, time.monotonic() - start)
            if stop or last or step % config.checkpoint_steps == 0:
                saving = time.monotonic()
                _save(engine, keeper, job, step, settings, config, run)
                # A time limit must leave room for a last step and checkpoint.
                slowest = max(slowest, time.monotonic() - saving)
                stop_before_limit(60.0 + 2 * (slowest + longest))
                if stop := max(world.gather(request.number)):  # also since the step
                    run.console.say(f"{job.title}: checkpoint at step {step} of {config.steps}")
                    raise Stopped(stop)
    keeper.remove()
    summary = {
        "steps": config.steps,
        "tokens": config.steps * config.batch * config.length,
        "tokens_a_second": round(tokens / max(1e-9, seconds), 1),
        "resumed_at_step": first,
    }
    return engine, summary


def learning_rate(step: int, config: RecoverConfig) -> float:
    """The rate of a step (from 0): a linear warm-up, then a cosine to a tenth of the peak.

    A share of few steps would be no warm-up: Adam's first steps are as large as the rate, whatever
    the gradient, and its second moments are new in each rung.
    """
    least = min(5, config.steps // 4) if config.warmup else 0
    warm = max(least, round(config.warmup * config.steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = (step - warm) / max(1, config.steps - warm)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def step_once(engine, job: Job, step: int, config: RecoverConfig, run: Run) -> dict[str, float]:
    """One optimizer step.

    Returns:
        The loss and its parts, averaged over its micro-batches and all ranks, and the norm of the
        gradient before clipping, unless it overflowed in float16: then the step was left out.

    Raises:
        UserError: the loss or the gradient is not finite, or fp16 overflows at every scale.
    """
    world, text = run.world, job.text
    place = job.before + step  # in the text
    batch = text.batch(place, config.batch, config.seed)
    each = world.size * config.micro_batch
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    n_micro = config.accumulation(world.size)
    total, norm = 0.0, None
    for micro in range(n_micro):
        everyone = batch[micro * each : (micro + 1) * each]
        at = world.rank * config.micro_batch
        mine = everyone[at : at + config.micro_batch]
        loss, parts = _losses(engine, job, mine, everyone, place, micro, config, world)
        values = torch.stack([part.detach().double().cpu() for part in parts.values()])
        total = total + world.sum(values.to(world.device)).cpu() / world.size
        if not math.isfinite(total[0]):
            raise UserError(
                f"the loss of step {step + 1} is not finite; the sequences of this batch are "
                f"{everyone.tolist()}. {_remedy(job)}"
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
        job.overflows = 0
        return figures | {"grad_norm": float(norm)}
    if config.dtype != "float16":
        raise UserError(
            f"the gradient of step {step + 1} is not finite, though its loss is; the sequences of "
            f"this batch are {batch.tolist()}. {_remedy(job)}"
        )
    # DeepSpeed lowers its scale, but not a fixed one
    job.overflows += 1
    if job.overflows >= MOST_OVERFLOWS:
        raise _overflow(step)
    return figures


def _remedy(job: Job) -> str:
    """What helps where a number is not finite: this directory holds what its settings made."""
    last = checkpoints.latest(job.folder)
    there = f" and --recover.resume {last}" if last else ""
    return (
        f"Nothing of this step was kept: in another output_dir, give a lower --recover.lr{there}, "
        "or begin anew there with --recover.dtype float32"
    )


def _overflow(step: int) -> UserError:
    return UserError(
        f"step {step + 1} overflows in float16 at every loss scale; begin anew in another "
        "output_dir with --recover.dtype bfloat16 or float32"
    )


def _losses(engine, job: Job, mine, everyone, place, micro, config: RecoverConfig, world):
    ids = job.text.ids[mine].to(world.device)
    objective = config.objective
    teacher_out = head = None
    parameters = []
    if job.teacher is not None:
        with torch.no_grad():
            teacher_out = job.teacher(ids, bool(objective.feature))
        if objective.kl:
            head = job.teacher.module.head
            parameters = list(head.parameters())
    with engines.gathered(parameters):
        weights = (
            (head.weight.detach(), None if head.bias is None else head.bias.detach())
            if (head is not None)
            else None
        )
        total, ce, kl, feature, states = engine(ids, teacher_out, weights)
    loss = total + objective.feature * feature
    parts = {"loss": loss, "ce": ce}
    if objective.kl:
        parts["kl"] = kl
    if objective.feature:
        parts["feature"] = feature
    contrasts = job.contrasts.losses(
        states, teacher_out[0] if teacher_out else None, mine, everyone, place, micro
    )
    for term in job.contrasts.terms:
        parts[term.name] = contrasts[term.name]
        loss = loss + term.weight * contrasts[term.name]
    return loss, parts | {"loss": loss}


@torch.no_grad()
def held_out_perplexity(engine, text: PackedText, config: RecoverConfig, run: Run) -> float:
    """Perplexity of the held-out sequences under a student, on all ranks."""
    world = run.world
    each = world.size * config.micro_batch
    nll = torch.zeros((), dtype=torch.float64, device=world.device)
    engine.eval()
    for at in range(0, len(text.held_out), each):
        rows = text.held_out[at : at + each][world.rank :: world.size]
        ids = (rows if len(rows) else text.held_out[:1]).to(world.device)
        _, ce, *_ = engine(ids)
        nll += ce.double() * len(rows)
    engine.train()
    return math.exp(min(700.0, world.sum(nll).item() / len(text.held_out)))


def _judge(
    engine, keeper: ZeroKeeper, job: Job, step: int, figures: dict, config: RecoverConfig, run: Run
) -> None:
    """Measures the held-out perplexity, counts the zeros, and says how the training stands."""
    job.held_out[step] = ppl = held_out_perplexity(engine, job.text, config, run)
    keeper.check()
    run.metric(job.stage, step, {"held_out_ppl": ppl})
    text = f"{job.title}: step {step:>5}/{config.steps}  held-out ppl {ppl:.3f}  {_line(figures)}"
    run.console.say(f"{text.rstrip()}  {keeper.n_masked:,} zeros")


def _save(
    engine, keeper: ZeroKeeper, job: Job, step: int, settings: dict, config: RecoverConfig, run: Run
) -> None:
    """Counts the zeros and writes a checkpoint."""
    keeper.check()
    run.metric(job.stage, step, {"zeros": keeper.n_masked})
    for term in job.contrasts.terms:
        for bank in term.banks:
            bank.flush()
    spent = round(time.monotonic() - job.began, 2)
    state = {"held_out": job.held_out, "stage_seconds": spent, "from": job.resumed_from}
    stage, keep = engines.stage_of(settings), config.keep_checkpoints
    state["weights"] = keeper.checksums()
    checkpoints.save(engine, job.folder, step, state, job.recipe, stage, keep, run.world)


def _line(figures: dict[str, float]) -> str:
    """A step's figures as the bar and the log show them; nothing before the first step."""
    if not figures:
        return ""
    shown = [f"loss {figures['loss']:.4f}", f"{figures['tokens_a_second']:,.0f} tokens/s"]
    norm = f"norm {figures['grad_norm']:.3f}" if "grad_norm" in figures else "overflow, left out"
    shown += [f"lr {figures['lr']:.1e}", norm]
    shown += [size(figures.get("peak_cuda_bytes", figures["peak_memory_bytes"]))]
    parts = [f"{name} {figures[name]:.4f}" for name in ObjectiveConfig.TERMS if name in figures]
    return "  ".join(shown + parts)

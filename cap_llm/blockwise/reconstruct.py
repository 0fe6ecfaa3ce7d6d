"""The stage `reconstruct`: each pruned block is trained to give the dense block's output.

All weights that the mask leaves, biases and norms of a block are trained together (Shin et al.
2024, "BR + GP"; Guo et al. 2024, EBFT). With the student's own activations as input a block makes
good for those before it, for which it must wait; the ranks share the sequences of each step. With
the dense model's activations the blocks are independent: as many blocks as there are ranks make a
round, in which the ranks share the sequences on their way through the dense blocks, and then each
trains one block on all of them; what keeps W ranks from being W times as fast is that a round lasts
as long as its slowest block.

Adam's steps are a share of each tensor's root mean square, so that one rate fits models of any
scale, matrices and norms alike (as Adafactor's relative steps, Shazeer & Stern 2018). With the
papers' rate for all, 2e-4 in steps of 8 sequences, a small model's weights move too little.

The error is relative, token by token, |y - y_dense|^2 / |y_dense|^2: the first position's
activations are hundreds of times the others', and a plain mean would see nothing else. Text that
is held out decides when to stop and which epoch's weights to keep; the pruned block itself counts
as epoch 0, so that a block never gets worse on it, trained whole or in halves.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cap_llm.blockwise.cache import ActivationCache
from cap_llm.blockwise.prune import PrunedBlock, carry
from cap_llm.blockwise.stage import BlockStage, masks_of_block, start_masks
from cap_llm.blockwise.walk import Walk
from cap_llm.config import Config
from cap_llm.models.blocks import BlockModel, Call, stored_dtype
from cap_llm.models.directory import patterns
from cap_llm.models.masks import Masks
from cap_llm.models.skeleton import states_of
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.memory import Memory
from cap_llm.runtime.rundir import Run
from cap_llm.runtime.world import World
from cap_llm.text.reading import Texts

STAGE = "reconstruct"
WARMUP = 0.1  # of the steps: Adam's first ones are as large as the rate, whatever the gradient
PATIENCE = 2  # epochs; large steps may make it worse first, and the small ones at the end better


def reconstruct(pruned: Path, dense: Path, texts: Texts, config: Config, run: Run) -> Path:
    """Trains the blocks of a pruned model one by one.

    Args:
        pruned: directory of the pruned model.
        dense: directory of the model that it was pruned from.
        texts: with calibration and held-out ids.
        config: the run's settings.
        run: the run directory.

    Returns:
        The directory of the result.

    Raises:
        UserError: see the messages; whatever is finished is kept.
    """
    work = BlockStage(STAGE, config.recipe(STAGE), run, pruned, dense)
    if work.done:
        return work.folder
    work.begin(texts, config, dtype=torch.float32)
    world, in_turn = run.world, config.reconstruct.inputs == "dense"
    if in_turn:
        work.model.drop_outside()  # before the dense model brings its own
    masks = start_masks(pruned, run)
    if not in_turn and world.size > config.reconstruct.batch:
        run.console.say(
            f"{STAGE}: {world.size} ranks share steps of {config.reconstruct.batch} sequences, so "
            "some have no work: raise --reconstruct.batch, and --reconstruct.lr by the root of the "
            "same factor, or take --reconstruct.inputs dense",
            style="yellow",
        )
    n_blocks = len(work.model)
    todo = [i for i in range(n_blocks) if i not in work.finished]
    # A round is a block for each rank; where they share one, the student's stream goes through all.
    in_order = todo if in_turn else range(n_blocks if todo else 0)
    size, place = (world.size, world.rank) if in_turn else (1, 0)
    with work.work() as (bar, scratch):
        if todo:
            bar.phase("embedding")
            dense_model = BlockModel.open(dense, world.device, torch.float32)
            trainer = _Trainer(work.model, dense_model, masks, texts, config, world, scratch)
        passed = 0  # blocks that the dense stream is through
        for at in range(0, len(in_order), size):
            round_ = in_order[at : at + size]
            own = round_[place] if place < len(round_) else None
            trains = own in todo
            for i in range(passed, round_[-1] + 1):
                bar.phase("dense outputs")
                trainer.pass_dense(i, keep=trains and i == own)
            results: dict[int, PrunedBlock] = {}
            if trains or not in_turn:
                with work.model.block(own) as block:
                    if trains:
                        results[own] = result = trainer.train(own, block, bar.phase)
                        bar.phase("writing")
                        if in_turn or world.is_main:
                            prefix = work.model.block_name(own) + "."
                            trained = {prefix + n: p for n, p in block.named_parameters()}
                            work.write(own, trained, result)
                        result.masks = {}
                    else:
                        bar.phase("passing a finished block")
                        work.load(own, block)
                    if not in_turn:
                        trainer.pass_student(own, block)
            # Everyone's blocks of this round are there; ranks that share one have the same.
            everyone = {j: r for part in world.gather(results) for j, r in part.items()}
            for j in sorted(everyone):
                work.report(j, everyone[j])
            bar.advance(round_[-1] + 1 - passed)
            passed = round_[-1] + 1
    return work.finish()


class _Trainer:
    """The streams of text through both models, and the training of one block between them.

    Args:
        student: the pruned model.
        dense: the model that it was pruned from.
        masks: the student's.
        texts: with calibration and held-out ids.
        config: the run's settings.
        world: the ranks.
        scratch: a folder to spill activations to.

    Attributes:
        team: the ranks that train a block together, each on its share of the sequences.
        pool: the ranks that each need all of the dense stream, and share the work of it.
    """

    def __init__(
        self,
        student: BlockModel,
        dense: BlockModel,
        masks: Masks,
        texts: Texts,
        config: Config,
        world: World,
        scratch: Path,
    ):
        self.student, self.dense, self.masks = student, dense, masks
        self.settings, self.patterns = config.reconstruct, patterns(masks.folder)
        device, alone = world.device, World.alone(world.device)
        own_inputs = self.settings.inputs == "student"
        self.team, self.pool = (world, alone) if own_inputs else (alone, world)
        dtype = self.settings.dtype
        low = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
        self.autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=low)
        self.n = len(texts.calibration)
        mine, held_out = self.team.shard(self.n), self.team.shard(len(texts.held_out))
        self.place = {sequence: k for k, sequence in enumerate(mine)}  # of the ones to train on
        self.judges = range(len(mine), len(mine) + len(held_out))
        self.n_judges = len(texts.held_out)
        windows = torch.cat([texts.calibration[list(mine)], texts.held_out[list(held_out)]])
        parts = 4 if self.settings.split_attention else 3
        memory = Memory.plan(device, config.runtime.activation_gib, parts)
        self.new_store = lambda: ActivationCache(device, memory, scratch)
        length = windows.shape[1]  # one sequence at a time, so that steps can mix them freely
        self.given = Walk(dense, windows, memory, scratch, length)
        self.seen = Walk(student, windows, memory, scratch, length) if own_inputs else None
        # the dense stream, and of the block to be trained what goes in and what comes out
        self.stores = [self.given.hidden, self.new_store(), self.new_store()]
        self.inputs = self.outputs = None
        dense.drop_outside()
        student.drop_outside()

    @torch.no_grad()
    def pass_dense(self, i: int, keep: bool) -> None:
        """Takes the dense stream through block i, and keeps both its ends for `train`."""
        x, pool, n = self.given.hidden, self.pool, len(self.given.ids)
        if keep:
            self.inputs = x
        busy = (self.inputs, self.outputs)  # until they are trained on; else in place
        y = x if x not in busy else next(s for s in self.stores if s is not x and s not in busy)
        with self.dense.block(i) as block, self.autocast():
            for first in range(0, n, pool.size):
                k = min(first + pool.rank, n - 1)
                outputs = pool.all_gather(self.given.output(i, k, block).float())  # [W, T, H]
                for j, output in enumerate(outputs.split(1)[: n - first]):
                    y[first + j] = output
        self.given.hidden = y
        if keep:
            self.outputs = y

    def pass_student(self, i: int, block: nn.Module) -> None:
        """Takes the student's stream through block i as it stands."""
        with self.autocast():
            self.seen.forward(i, block)

    def train(self, i: int, block: nn.Module, phase: Callable[[str], None]) -> PrunedBlock:
        """Trains block i in place, between what `pass_dense` kept.

        Raises:
            UserError: an activation or an error is not finite.
        """
        start = time.monotonic()
        linears = self.student.linears(i)
        masks = masks_of_block(self.student, i, self.masks)
        keep = {
            m.weight: masks[n] if isinstance(m, nn.Linear) else masks[n].T
            for n, m in linears.items()
            if n in masks
        }
        *halves, whole = [
            _Section(self, i, block, module, parameters, keep)
            for module, parameters in _sections(block, self.settings.split_attention)
        ]
        if halves:
            everything = list(block.parameters())
            pruned, before = _copies(everything), whole.judge()
            sections = [half.train(phase) for half in halves]
            error = whole.train(phase) | {"before": before, "sections": sections}
            if error["after"] > before:  # a better attention has made a worse block
                _put(everything, pruned)
                error |= {"after": before, "epoch": 0}
        else:
            error = whole.train(phase)
        self.inputs = self.outputs = None
        seconds = time.monotonic() - start
        result = PrunedBlock({}, [], seconds, error)
        each = round(seconds / max(1, len(masks)), 4)
        carry(self.student, i, masks, result, self.patterns, each)
        return result

    @torch.no_grad()
    def targets(self, i: int, module: str | None) -> ActivationCache:
        """What dense block i, or a module of it, gives for each sequence."""
        if module is None:
            return self.outputs
        targets = self.new_store()
        with self.dense.block(i) as block, self.autocast():
            for k in range(len(self.given.ids)):
                call = self.given.calls[k][i]
                targets[k] = _output(call, block, self.inputs[k], module)
        return targets


class _Section:
    """Parameters that are trained together, for the output of their block or of a module of it.

    They are fp32 while they are trained, but judged as they will be stored, and so they end.

    Args:
        trainer: has the text.
        i: the block's number.
        block: the student's.
        module: the name in the block of the module whose output counts; None: the block's own.
        parameters: to be trained.
        keep: masks, in the shape of their parameters.
    """

    def __init__(
        self,
        trainer: _Trainer,
        i: int,
        block: nn.Module,
        module: str | None,
        parameters: list[nn.Parameter],
        keep: dict[nn.Parameter, torch.Tensor],
    ):
        self.trainer, self.settings, self.team = trainer, trainer.settings, trainer.team
        self.i, self.block, self.module, self.parameters = i, block, module, parameters
        self.keep = {p: keep[p] for p in parameters if p in keep}
        self.targets = trainer.targets(i, module)
        seen = trainer.seen or trainer.given
        self.calls = [calls[i] for calls in seen.calls]
        self.inputs = trainer.seen.hidden if trainer.seen else trainer.inputs
        self.name = trainer.student.block_name(i)
        names = {p: f"{self.name}.{name}" for name, p in block.named_parameters()}
        self.stored = {p: stored_dtype(trainer.student, names[p]) for p in parameters}

    def train(self, phase: Callable[[str], None]) -> dict:
        """Trains the parameters in place.

        Returns:
            The error on held-out text before and after, the epoch that is kept, and their number.

        Raises:
            UserError: an error is not finite.
        """
        settings = self.settings
        groups = [{"params": [p], "lr": settings.lr * _scale(p)} for p in self.parameters]
        # gradients fall with the number of weights; the default of 1e-8 would shorten their steps
        optimizer = torch.optim.Adam(groups, eps=1e-12, fused=True)
        n_steps = settings.epochs * -(-self.trainer.n // settings.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / (WARMUP * n_steps)) * (1 - step / n_steps)
        )
        draw = torch.Generator().manual_seed(settings.seed * 100_003 + self.i)
        phase("error before")
        before = least = self.judge()
        best, kept = _copies(self.parameters), 0
        with self._trainable():
            epochs = settings.epochs if before else 0  # the dense block itself learns nothing
            for epoch in range(1, epochs + 1):
                phase(f"epoch {epoch} of {settings.epochs}, error {least:.4f}")
                self._epoch(optimizer, schedule, draw)
                with self._as_stored():
                    now = self.judge(epoch)
                    if not self.trainer.n_judges or now < least:
                        least, kept, best = now, epoch, _copies(self.parameters)
                    elif epoch - kept == PATIENCE:
                        break
        _put(self.parameters, best)
        return {"before": before, "after": least, "epoch": kept, "epochs": settings.epochs}

    @torch.no_grad()
    def judge(self, epoch: int = 0) -> float:
        """The mean error on held-out text, over all ranks; without any, on the text to train on.

        Args:
            epoch: after which it is asked for; 0: before any.

        Raises:
            UserError: it is not finite.
        """
        trainer = self.trainer
        total = torch.zeros((), dtype=torch.float64, device=self.team.device)
        with trainer.autocast():
            for k in trainer.judges if trainer.n_judges else trainer.place.values():
                total += self._error(k)
        value = (self.team.sum(total) / (trainer.n_judges or trainer.n)).item()
        if not math.isfinite(value):
            raise UserError(
                f"the error of {self.name} is not finite while it is trained; "
                f"lower --reconstruct.lr (it is {self.settings.lr:g})"
                if epoch
                else f"the error of {self.name} is not finite before it is trained: the pruned "
                "model's activations overflow there; prune it anew, or score it first"
            )
        return value

    def _epoch(self, optimizer, schedule, draw: torch.Generator) -> None:
        """One pass over the calibration text, in an order of its own.

        A step takes a sequence from each of as many parts of the text, so that ranks that share the
        text, by parts too, share every step.
        """
        place, n = self.trainer.place, self.trainer.n
        parts = torch.arange(n).tensor_split(min(self.settings.batch, n))
        orders = (part[torch.randperm(len(part), generator=draw)].tolist() for part in parts)
        for step in itertools.zip_longest(*orders):
            batch = [sequence for sequence in step if sequence is not None]
            optimizer.zero_grad()
            with self.trainer.autocast():  # around all, so that weights are cast once
                for sequence in batch:
                    if sequence in place:
                        (self._error(place[sequence]) / len(batch)).backward()
            for p in self.parameters if self.team.size > 1 else ():
                p.grad = self.team.sum(torch.zeros_like(p) if p.grad is None else p.grad)
            for p, mask in self.keep.items():  # zeros leave Adam's moments and the weights at zero
                if p.grad is not None:  # else the block makes no use of it
                    p.grad.mul_(mask)
            optimizer.step()
            schedule.step()

    def _error(self, k: int) -> torch.Tensor:
        """The mean relative error of sequence k's tokens."""
        with self.trainer.autocast():
            out = _output(self.calls[k], self.block, self.inputs[k], self.module)
        y, out = self.targets[k].float(), out.float()
        size = y.square().sum(-1).clamp(min=torch.finfo(y.dtype).tiny)
        return ((out - y).square().sum(-1) / size).mean()

    @contextmanager
    def _trainable(self) -> Iterator[None]:
        """Gradients for the parameters."""
        for p in self.parameters:
            p.requires_grad_(True)
        try:
            yield
        finally:
            for p in self.parameters:
                p.requires_grad_(False)
                p.grad = None

    @contextmanager
    def _as_stored(self) -> Iterator[None]:
        """The parameters rounded to the types that they are stored in, and exact again after."""
        exact = {p: p.detach().clone() for p, dtype in self.stored.items() if dtype != p.dtype}
        for p in exact:
            p.data.copy_(p.data.to(self.stored[p]))
        try:
            yield
        finally:
            _put(exact, exact.values())


def _scale(p: nn.Parameter) -> float:
    """The root mean square of a tensor's non-zero entries; a least one for biases that are zero."""
    energy = p.detach().square().sum().item() / max(1, int(p.count_nonzero()))
    return max(1e-3, math.sqrt(energy))


def _copies(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters]


def _put(parameters: Iterable[nn.Parameter], values: Iterable[torch.Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.data.copy_(value)


class _Reached(Exception):
    """Carries a module's output out of a forward that need not go on."""


def _output(call: Call, block: nn.Module, hidden: torch.Tensor, module: str | None):
    """What a block, or a module of it, gives for the hidden states [B, T, H]."""
    if module is None:
        return call.run(block, hidden)

    def stop(_, args, out):
        raise _Reached(states_of(out))

    handle = block.get_submodule(module).register_forward_hook(stop)
    try:
        call.run(block, hidden)
    except _Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise AssertionError(f"{module} did not run")


def _sections(block: nn.Module, halves: bool) -> list[tuple[str | None, list[nn.Parameter]]]:
    """What is trained together, each with the module whose output it is trained for.

    Of halves the first is the attention: the first module that holds linears without being one.
    """
    everything = list(block.parameters())
    if not halves:
        return [(None, everything)]
    for name, module in block.named_children():
        linears = [m for m in module.modules() if isinstance(m, nn.Linear | Conv1D)]
        if linears and module not in linears:
            inside = list(module.parameters())
            rest = [p for p in everything if not any(p is q for q in inside)]
            return [(name, inside), (None, rest)]
    raise UserError(
        f"{type(block).__name__} has no attention module to train by itself; leave out "
        "--reconstruct.split_attention"
    )

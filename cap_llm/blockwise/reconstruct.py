"""The stage `reconstruct`: each pruned block is trained to give the dense block's output.

All weights that the mask leaves, biases and norms of a block are trained together (Shin et al.
2024, "BR + GP"; Guo et al. 2024, EBFT). With the dense model's activations as input the blocks are
independent: every rank walks the dense model, which costs one forward of a block where training it
costs three an epoch, and trains the blocks that are its turn. With the student's own activations a
block must wait for the one before it, and the ranks share the sequences of each step instead.

The error is relative, token by token, |y - y_dense|^2 / |y_dense|^2, without the first position:
its activations are hundreds of times the others', and a plain mean would see nothing else. Text
that is held out decides when to stop and which epoch's weights to keep; the pruned block itself
counts as epoch 0, so that a block never gets worse on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cap_llm.blockwise.cache import ActivationCache
from cap_llm.blockwise.prune import PrunedBlock, Row, matrix, stored_dtype
from cap_llm.blockwise.stage import BlockStage, activation_bytes, start_masks
from cap_llm.blockwise.walk import Walk
from cap_llm.config import Config
from cap_llm.models.blocks import BlockModel, Call
from cap_llm.models.masks import Masks, patterns
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.rundir import Run
from cap_llm.runtime.world import World
from cap_llm.text.reading import Texts

STAGE = "reconstruct"
SKIP = 1  # first positions without a say


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
    work = BlockStage(STAGE, STAGE, config.recipe(STAGE), run)
    if work.done:
        return work.folder
    work.begin(pruned, texts, config, dtype=torch.float32)
    masks = start_masks(pruned, run)
    settings, world = config.reconstruct, run.world
    in_turn = settings.inputs == "dense"
    team = World.alone(world.device) if in_turn else world
    n_blocks = len(work.model)
    todo = len(work.finished) < n_blocks
    with work.work() as (bar, scratch):
        if todo:
            bar.phase("embedding")
            dense_model = BlockModel.open(dense, world.device, torch.float32)
            trainer = _Trainer(work.model, dense_model, masks, texts, config, team, scratch)
        round_: dict[int, PrunedBlock] = {}
        for i in range(n_blocks if todo else 0):
            with trainer.dense.block(i) as dense_block, trainer.student.block(i) as block:
                if i in work.finished:
                    bar.phase("passing a finished block")
                    work.load(i, block)
                    trainer.forward(i, dense_block, block)
                elif in_turn and i % world.size != world.rank:
                    bar.phase("passing a block of another rank")
                    trainer.forward(i, dense_block, block)
                else:
                    round_[i] = result = trainer.train(i, dense_block, block, bar.phase)
                    bar.phase("writing")
                    if in_turn or world.first:
                        prefix = trainer.student.block_name(i) + "."
                        work.write(i, {prefix + n: p for n, p in block.named_parameters()}, result)
                    result.masks = {}
            if (i + 1) % world.size == 0 or i + 1 == n_blocks or not in_turn:
                # Everyone's blocks of this round are there; ranks that share one have the same.
                everyone = {j: r for part in world.gather(round_) for j, r in part.items()}
                for j in sorted(everyone):
                    work.report(j, everyone[j])
                round_ = {}
            bar.advance()
    return work.finish()


class _Trainer:
    """The streams of text through both models, and the training of one block between them.

    Args:
        student: the pruned model.
        dense: the model that it was pruned from.
        masks: the student's.
        texts: with calibration and held-out ids.
        config: the run's settings.
        team: the ranks that share the sequences of a block.
        scratch: a folder to spill activations to.
    """

    def __init__(
        self,
        student: BlockModel,
        dense: BlockModel,
        masks: Masks,
        texts: Texts,
        config: Config,
        team: World,
        scratch: Path,
    ):
        self.settings, self.team = config.reconstruct, team
        self.student, self.dense, self.masks = student, dense, masks
        self.patterns = patterns(masks.folder)
        device = team.device
        dtype = self.settings.dtype
        low = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
        self.autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=low)
        self.n = len(texts.calibration)
        mine, held_out = team.share(self.n), team.share(len(texts.held_out))
        self.place = {sequence: k for k, sequence in enumerate(mine)}  # of the ones to train on
        self.judges = range(len(mine), len(mine) + len(held_out))
        self.n_judges = len(texts.held_out)
        windows = torch.cat([texts.calibration[list(mine)], texts.held_out[list(held_out)]])
        memory = activation_bytes(config, parts=3)
        length = windows.shape[1]  # one sequence at a time, so that steps can mix them freely
        self.given = Walk(self.dense, windows, memory, scratch, length)
        self.seen = self.given
        if self.settings.inputs == "student":
            self.seen = Walk(self.student, windows, memory, scratch, length)
        self.targets = ActivationCache(device, memory, scratch)
        self.dense.drop_outside()
        self.student.drop_outside()

    def forward(self, i: int, dense_block: nn.Module, block: nn.Module) -> None:
        """Takes the text through block i as it stands."""
        with self.autocast():
            self.given.forward(i, dense_block)
            if self.seen is not self.given:
                self.seen.forward(i, block)

    def train(
        self, i: int, dense_block: nn.Module, block: nn.Module, phase: Callable[[str], None]
    ) -> PrunedBlock:
        """Trains block i in place and takes the text through it.

        Raises:
            UserError: an activation or an error is not finite.
        """
        start = time.monotonic()
        linears = self.student.linears(i)
        names = {n: self.student.weight_name(i, n) for n in linears}
        device = self.team.device
        masks = {n: self.masks[w].to(device) for n, w in names.items() if w in self.masks}
        phase("dense outputs")
        with torch.no_grad(), self.autocast():
            for k in range(len(self.given.ids)):
                self.targets[k] = self.given.output(i, k, dense_block)
        keep = {
            m.weight: masks[n] if isinstance(m, nn.Linear) else masks[n].T
            for n, m in linears.items()
            if n in masks
        }
        errors = [
            self._section(i, dense_block, block, section, parameters, keep, phase)
            for section, parameters in _sections(block, self.settings.halves)
        ]
        self.given.hidden, self.targets = self.targets, self.given.hidden
        if self.seen is not self.given:
            with self.autocast():
                self.seen.forward(i, block)
        seconds = time.monotonic() - start
        rows = [
            Row(
                names[n],
                list(mask.shape),
                self.patterns.get(names[n], "as found"),
                int((matrix(linears[n]) == 0).sum()),
                int((~mask).sum()),
                None,
                None,
                round(seconds / len(masks), 4),
            )
            for n, mask in masks.items()
        ]
        error = errors[-1] | ({"sections": errors[:-1]} if errors[1:] else {})
        return PrunedBlock({names[n]: m.cpu() for n, m in masks.items()}, rows, seconds, error)

    def _section(
        self,
        i: int,
        dense_block: nn.Module,
        block: nn.Module,
        section: str | None,
        parameters: list[nn.Parameter],
        keep: dict[nn.Parameter, torch.Tensor],
        phase: Callable[[str], None],
    ) -> dict:
        """Trains some parameters of block i for the output of its module `section`, None: its own.

        They end rounded to the type that they are stored in, and are judged so.

        Returns:
            The error on held-out text before and after, the epoch that is kept, and their number.
        """
        settings, team = self.settings, self.team

        def error(k: int) -> torch.Tensor:
            student = self.seen.calls[k][i], block, self.seen.hidden[k]
            with self.autocast():
                out = _output(*student, section)
                if section is None:
                    y = self.targets[k]
                else:
                    with torch.no_grad():
                        given = self.given.calls[k][i], dense_block, self.given.hidden[k]
                        y = _output(*given, section)
            y, out = y[..., SKIP:, :].float(), out[..., SKIP:, :].float()
            size = y.square().sum(-1).clamp(min=torch.finfo(y.dtype).tiny)
            return ((out - y).square().sum(-1) / size).mean()

        @torch.no_grad()
        def judge() -> float:
            own = self.judges if self.n_judges else self.place.values()
            total = torch.zeros((), dtype=torch.float64, device=team.device)
            for k in own:
                total += error(k)
            value = (team.sum(total) / (self.n_judges or self.n)).item()
            if not math.isfinite(value):
                raise UserError(
                    f"the error of {self.student.block_name(i)} is not finite while it is trained; "
                    f"lower --reconstruct.lr (it is {settings.lr:g})"
                )
            return value

        dtypes = {
            p: stored_dtype(self.student, f"{self.student.block_name(i)}.{name}")
            for name, p in block.named_parameters()
        }
        handles = []
        for p in parameters:
            p.requires_grad_(True)
            if p in keep:  # zero gradients leave Adam's moments and the weights at zero
                handles.append(p.register_hook(keep[p].mul))
        optimizer = torch.optim.Adam(parameters, lr=settings.lr, fused=True)
        n_steps = settings.epochs * -(-self.n // settings.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n_steps)
        draw = torch.Generator().manual_seed(settings.seed * 100_003 + i)
        phase("error before")
        before = least = judge()
        best, kept = [p.detach().clone() for p in parameters], 0
        for epoch in range(1, settings.epochs + 1):
            phase(f"epoch {epoch} of {settings.epochs}, error {least:.4f}")
            for batch in torch.randperm(self.n, generator=draw).split(settings.batch):
                optimizer.zero_grad()
                for sequence in batch.tolist():
                    if sequence in self.place:
                        (error(self.place[sequence]) / len(batch)).backward()
                for p in parameters if team.size > 1 else ():
                    p.grad = team.sum(torch.zeros_like(p) if p.grad is None else p.grad)
                optimizer.step()
                schedule.step()
            exact = [p.detach().clone() for p in parameters]
            for p in parameters:
                p.data.copy_(p.data.to(dtypes[p]))
            now = judge()
            if self.n_judges and now >= least:
                break
            least, kept = now, epoch
            best = [p.detach().clone() for p in parameters]
            for p, weight in zip(parameters, exact, strict=True):
                p.data.copy_(weight)
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for p, weight in zip(parameters, best, strict=True):
                p.requires_grad_(False).copy_(weight)
                p.grad = None
        return {"before": before, "after": least, "epoch": kept, "epochs": settings.epochs}


class _Reached(Exception):
    """Carries a module's output out of a forward that need not go on."""


def _output(call: Call, block: nn.Module, hidden: torch.Tensor, section: str | None):
    """What a block, or a module of it, gives for the hidden states [B, T, H]."""
    if section is None:
        return call.run(block, hidden)

    def stop(module, args, out):
        raise _Reached(out[0] if isinstance(out, tuple) else out)

    handle = block.get_submodule(section).register_forward_hook(stop)
    try:
        call.run(block, hidden)
    except _Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise AssertionError(f"{section} did not run")


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
        "--reconstruct.halves"
    )

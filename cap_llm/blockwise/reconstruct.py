"""The stage `reconstruct`: trains each pruned block to reproduce the dense block's output.

The unmasked weights, biases and norms of a block are trained together (Shin et al. 2024, "BR + GP";
Guo et al. 2024, EBFT). With the student's activations as input, a block corrects the errors of the
previous blocks and must wait for them; the ranks share the sequences of each step. With the dense
model's activations, blocks are independent. A round then has one block per rank: the ranks share
the sequences of the dense forward pass, and each trains one block on all sequences. A round lasts
as long as its slowest block, so W ranks are less than W times as fast.

Adam's step size is relative to the root mean square of each tensor, so one learning rate fits
models of any scale, matrices and norms alike (like Adafactor's relative steps, Shazeer & Stern
2018). At the papers' absolute rate, 2e-4 with steps of 8 sequences, a small model changes too
little.

The error is relative per token, |y - y_dense|^2 / |y_dense|^2. The first position's activations are
hundreds of times larger and would dominate a plain mean. The held-out error decides when to stop
and which epoch's weights to keep. The pruned block is epoch 0, so a block's held-out error never
increases.
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

from cap_llm.blockwise.cache import ActivationCache
from cap_llm.blockwise.estimate import streaming_cost
from cap_llm.blockwise.prune import PrunedBlock, record_unchanged
from cap_llm.blockwise.stage import BlockStage, check_dense, masks_of_block, start_masks
from cap_llm.blockwise.walk import Walk
from cap_llm.config import CalibrationConfig, ReconstructConfig
from cap_llm.models.blocks import BlockModel, Call, stored_dtype
from cap_llm.models.masks import Masks
from cap_llm.models.result import Result
from cap_llm.models.skeleton import LINEARS, as_matrix, linears, states_of
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.memory import Memory
from cap_llm.runtime.world import World
from cap_llm.stages import Cost, Inputs, Preview
from cap_llm.text.reading import Calibration

STAGE = "reconstruct"
WARMUP = 0.1  # of the steps: Adam's first steps have full size whatever the gradient
PATIENCE = 2  # epochs without improvement; early large steps may increase the error


def check(preview: Preview, reconstruct: ReconstructConfig, **_) -> None:
    """Checks the dense model, and that blocks can be trained in halves if they are to be."""
    check_dense(preview)
    for block in preview.model.blocks:
        _sections(block, reconstruct.split_attention)


def cost(preview: Preview, calibration: CalibrationConfig, reconstruct: ReconstructConfig) -> Cost:
    """The cost of the stage; blocks are trained in fp32."""
    c, independent = calibration, reconstruct.inputs == "dense"
    # independent blocks need all sequences on each rank
    share = preview.world.size if independent else 1
    return streaming_cost(
        preview,
        c.sequences * c.length,
        c.length,
        passes=1 + 3 * reconstruct.epochs,  # a backward pass takes as long as two forward passes
        streams=(4 if reconstruct.split_attention else 3) * share * (1 + c.held_out / c.sequences),
        width=4,
        models=1 if independent else 2,
        # gradients, Adam's two moments, the weights as trained and as selected, the masks
        per_weight=6 * 4,
    )


def run(inputs: Inputs, calibration: Calibration, reconstruct: ReconstructConfig) -> None:
    """Runs the stage.

    Raises:
        UserError: a setting or an input is invalid. Finished blocks remain on disk.
    """
    pruned, dense, run = inputs.start, inputs.dense, inputs.run
    work = BlockStage(STAGE, inputs.recipe, run, pruned, dense)
    if work.done:
        return
    work.begin(calibration, dtype=torch.float32)
    world, independent = run.world, reconstruct.inputs == "dense"
    if independent:
        work.model.drop_outside()  # before the dense model loads its own
    masks = start_masks(pruned, run)
    if not independent and world.size > reconstruct.batch:
        run.console.say(
            f"reconstruct.batch is {reconstruct.batch}, so some of the {world.size} ranks "
            "are idle. Increase it, and reconstruct.lr by the square root of the same factor, or "
            "set --reconstruct.inputs dense.",
            style="yellow",
        )
    n_blocks = len(work.model)
    todo = [i for i in range(n_blocks) if i not in work.finished]
    # A round has one block per rank, or one block that all ranks share. The student's stream passes
    # through finished blocks too.
    order = todo if independent else range(n_blocks if todo else 0)
    size, index = (world.size, world.rank) if independent else (1, 0)
    with work.work() as (bar, scratch):
        if todo:
            bar.phase("embedding")
            dense_model = BlockModel.open(dense, world.device, torch.float32)
            trainer = _Trainer(
                work.model, dense_model, masks, calibration, reconstruct, world, scratch
            )
        passed = 0  # blocks that the dense stream has passed
        for start in range(0, len(order), size):
            round_ = order[start : start + size]
            own = round_[index] if index < len(round_) else None
            trains = own in todo
            for i in range(passed, round_[-1] + 1):
                bar.phase("dense outputs")
                trainer.pass_dense(i, keep=trains and i == own)
            results: dict[int, PrunedBlock] = {}
            if trains or not independent:
                with work.model.block(own) as block:
                    if trains:
                        results[own] = result = trainer.train(own, block, bar.phase)
                        bar.phase("writing")
                        if independent or world.is_main:
                            prefix = work.model.block_name(own) + "."
                            trained = {prefix + n: p for n, p in block.named_parameters()}
                            work.write(own, trained, result)
                        result.masks = {}
                    else:
                        bar.phase("replaying a finished block")
                        work.load(own, block)
                    if not independent:
                        trainer.pass_student(own, block)
            # ranks that share a block return the same result
            all_results = {j: r for part in world.gather(results) for j, r in part.items()}
            for j in sorted(all_results):
                work.report(j, all_results[j])
            bar.advance(round_[-1] + 1 - passed)
            passed = round_[-1] + 1
    work.finish(label(reconstruct, work.before))


def label(settings: ReconstructConfig, before: Result) -> tuple[str, str]:
    """Method and amount of a result, for reports; papers use dense inputs."""
    inputs = " (dense inputs)" * (settings.inputs == "dense")
    return f"{before.method} + reconstruction{inputs}", before.amount


class _Trainer:
    """Passes the text through both models and trains one block at a time.

    Args:
        student: the pruned model.
        dense: the dense model.
        masks: of the student.
        text: calibration and held-out ids.
        settings: of the stage.
        world: the ranks.
        scratch: folder to spill activations to.

    Attributes:
        team: the ranks that train a block together, each on its share of the sequences.
        pool: the ranks that share the dense forward passes, and each store all of their outputs.
    """

    def __init__(
        self,
        student: BlockModel,
        dense: BlockModel,
        masks: Masks,
        text: Calibration,
        settings: ReconstructConfig,
        world: World,
        scratch: Path,
    ):
        self.student, self.dense, self.masks = student, dense, masks
        self.settings, self.patterns = (
            settings,
            {row.name: row.pattern for row in masks.directory.rows},
        )
        device, alone = world.device, World.alone(world.device)
        own_inputs = self.settings.inputs == "student"
        self.team, self.pool = (world, alone) if own_inputs else (alone, world)
        dtype = self.settings.dtype
        low = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
        self.autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=low)
        self.n = len(text.ids)
        own, held_out = self.team.shard(self.n), self.team.shard(len(text.held_out))
        self.index = {sequence: k for k, sequence in enumerate(own)}  # of training sequences
        self.held_out = range(len(own), len(own) + len(held_out))
        self.n_held_out = len(text.held_out)
        windows = torch.cat([text.ids[list(own)], text.held_out[list(held_out)]])
        parts = 4 if self.settings.split_attention else 3
        memory = Memory.plan(device, world.activation_gib, parts)
        self.new_store = lambda: ActivationCache(device, memory, scratch)
        length = windows.shape[1]  # one sequence per forward pass, so that steps can mix them
        self.dense_walk = Walk(dense, windows, memory, scratch, length)
        self.walk = Walk(student, windows, memory, scratch, length) if own_inputs else None
        # the dense stream, and inputs and outputs of the block to train
        self.stores = [self.dense_walk.hidden, self.new_store(), self.new_store()]
        self.inputs = self.outputs = None
        dense.drop_outside()
        student.drop_outside()

    @torch.no_grad()
    def pass_dense(self, i: int, keep: bool) -> None:
        """Passes the dense stream through block i; `keep` stores inputs and outputs for `train`."""
        x, pool, n = self.dense_walk.hidden, self.pool, len(self.dense_walk.ids)
        if keep:
            self.inputs = x
        used = (self.inputs, self.outputs)  # not to overwrite before the training
        y = x if x not in used else next(s for s in self.stores if s is not x and s not in used)
        with self.dense.block(i) as block, self.autocast():
            for first in range(0, n, pool.size):
                k = min(first + pool.rank, n - 1)
                outputs = pool.all_gather(self.dense_walk.output(i, k, block).float())  # [W, T, H]
                for j, output in enumerate(outputs.split(1)[: n - first]):
                    y[first + j] = output
        self.dense_walk.hidden = y
        if keep:
            self.outputs = y

    def pass_student(self, i: int, block: nn.Module) -> None:
        """Passes the student's stream through block i."""
        with self.autocast():
            self.walk.forward(i, block)

    def train(self, i: int, block: nn.Module, phase: Callable[[str], None]) -> PrunedBlock:
        """Trains block i in place on the inputs and outputs that `pass_dense` stored.

        Raises:
            UserError: an activation or an error is not finite.
        """
        start = time.monotonic()
        masks = masks_of_block(self.student, i, self.masks)
        keep = {
            m.weight: as_matrix(m, masks[n])
            for n, m in self.student.linears(i).items()
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
            if error["after"] > before:  # the attention improved, but the block got worse
                _put(everything, pruned)
                error |= {"after": before, "epoch": 0}
        else:
            error = whole.train(phase)
        self.inputs = self.outputs = None
        seconds = time.monotonic() - start
        result = PrunedBlock({}, [], seconds, error)
        each = round(seconds / max(1, len(masks)), 4)
        record_unchanged(self.student, i, masks, result, self.patterns, each)
        return result

    @torch.no_grad()
    def targets(self, i: int, module: str | None) -> ActivationCache:
        """Returns the output of dense block i, or of one of its modules, per sequence."""
        if module is None:
            return self.outputs
        targets = self.new_store()
        with self.dense.block(i) as block, self.autocast():
            for k in range(len(self.dense_walk.ids)):
                call = self.dense_walk.calls[k][i]
                targets[k] = _output(call, block, self.inputs[k], module)
        return targets


class _Section:
    """Parameters that are trained together to match the output of their block or module.

    They are trained in fp32, but evaluated and finally set to their stored dtype.

    Args:
        trainer: provides the text.
        i: index of the block.
        block: of the student.
        module: name of the module whose output to match; None: the block.
        parameters: to train.
        keep: masks by parameter, in its shape.
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
        walk = trainer.walk or trainer.dense_walk
        self.calls = [calls[i] for calls in walk.calls]
        self.inputs = trainer.walk.hidden if trainer.walk else trainer.inputs
        self.name = trainer.student.block_name(i)
        names = {p: f"{self.name}.{name}" for name, p in block.named_parameters()}
        self.stored = {p: stored_dtype(trainer.student, names[p]) for p in parameters}

    def train(self, phase: Callable[[str], None]) -> dict:
        """Trains the parameters in place.

        Returns:
            The held-out error before and after, the selected epoch, and the number of epochs.

        Raises:
            UserError: an error is not finite.
        """
        settings = self.settings
        groups = [{"params": [p], "lr": settings.lr * _scale(p)} for p in self.parameters]
        # gradients decrease with the number of weights, so the default of 1e-8 would shorten steps
        optimizer = torch.optim.Adam(groups, eps=1e-12, fused=True)
        n_steps = settings.epochs * -(-self.trainer.n // settings.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / (WARMUP * n_steps)) * (1 - step / n_steps)
        )
        generator = torch.Generator().manual_seed(settings.seed * 100_003 + self.i)
        phase("error before")
        before = lowest = self.judge()
        best, best_epoch = _copies(self.parameters), 0
        with self._trainable():
            epochs = settings.epochs if before else 0  # a dense block has nothing to learn
            for epoch in range(1, epochs + 1):
                phase(f"epoch {epoch}/{settings.epochs}, error {lowest:.4f}")
                self._epoch(optimizer, schedule, generator)
                with self._as_stored():
                    error = self.judge(epoch)
                    if not self.trainer.n_held_out or error < lowest:
                        lowest, best_epoch, best = error, epoch, _copies(self.parameters)
                    elif epoch - best_epoch == PATIENCE:
                        break
        _put(self.parameters, best)
        return {"before": before, "after": lowest, "epoch": best_epoch, "epochs": settings.epochs}

    @torch.no_grad()
    def judge(self, epoch: int = 0) -> float:
        """Returns the mean error on held-out text, else on the training text, over all ranks.

        Args:
            epoch: number of trained epochs.

        Raises:
            UserError: the error is not finite.
        """
        trainer = self.trainer
        total = torch.zeros((), dtype=torch.float64, device=self.team.device)
        with trainer.autocast():
            for k in trainer.held_out if trainer.n_held_out else trainer.index.values():
                total += self._error(k)
        value = (self.team.sum(total) / (trainer.n_held_out or trainer.n)).item()
        if not math.isfinite(value):
            raise UserError(
                f"reconstruct.lr is {self.settings.lr:g}, and the error of {self.name} is not "
                "finite during training. Lower it."
                if epoch
                else f"The error of {self.name} is not finite before its training: activations of "
                "the pruned model overflow. Prune the model again."
            )
        return value

    def _epoch(self, optimizer, schedule, generator: torch.Generator) -> None:
        """Trains for one pass over the calibration text, in a random order.

        The text is divided into as many parts as a step has sequences, and a step takes one from
        each part. Ranks that share the text by parts then share every step.
        """
        index, n = self.trainer.index, self.trainer.n
        parts = torch.arange(n).tensor_split(min(self.settings.batch, n))
        orders = (part[torch.randperm(len(part), generator=generator)].tolist() for part in parts)
        for step in itertools.zip_longest(*orders):
            batch = [sequence for sequence in step if sequence is not None]
            optimizer.zero_grad()
            with self.trainer.autocast():  # around all sequences, so that weights are cast once
                for sequence in batch:
                    if sequence in index:
                        (self._error(index[sequence]) / len(batch)).backward()
            for p in self.parameters if self.team.size > 1 else ():
                p.grad = self.team.sum(torch.zeros_like(p) if p.grad is None else p.grad)
            for p, mask in self.keep.items():  # keeps Adam's moments and the weights at zero
                if p.grad is not None:  # otherwise the block does not use it
                    p.grad.mul_(mask)
            optimizer.step()
            schedule.step()

    def _error(self, k: int) -> torch.Tensor:
        """Returns the mean relative error over the tokens of sequence k."""
        with self.trainer.autocast():
            out = _output(self.calls[k], self.block, self.inputs[k], self.module)
        y, out = self.targets[k].float(), out.float()
        size = y.square().sum(-1).clamp(min=torch.finfo(y.dtype).tiny)
        return ((out - y).square().sum(-1) / size).mean()

    @contextmanager
    def _trainable(self) -> Iterator[None]:
        """Enables gradients of the parameters."""
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
        """Temporarily rounds the parameters to their stored dtypes."""
        exact = {p: p.detach().clone() for p, dtype in self.stored.items() if dtype != p.dtype}
        for p in exact:
            p.data.copy_(p.data.to(self.stored[p]))
        try:
            yield
        finally:
            _put(exact, exact.values())


def _scale(p: nn.Parameter) -> float:
    """Returns the root mean square of a tensor's nonzero entries, at least 1e-3 (zero biases)."""
    energy = p.detach().square().sum().item() / max(1, int(p.count_nonzero()))
    return max(1e-3, math.sqrt(energy))


def _copies(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters]


def _put(parameters: Iterable[nn.Parameter], values: Iterable[torch.Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.data.copy_(value)


class _ModuleOutput(Exception):
    """Returns a module's output from a forward pass that need not continue."""


def _output(call: Call, block: nn.Module, hidden: torch.Tensor, module: str | None):
    """Returns the output of a block, or of one of its modules, for hidden states [B, T, H]."""
    if module is None:
        return call.run(block, hidden)

    def stop(_, args, out):
        raise _ModuleOutput(states_of(out))

    handle = block.get_submodule(module).register_forward_hook(stop)
    try:
        call.run(block, hidden)
    except _ModuleOutput as output:
        return output.args[0]
    finally:
        handle.remove()
    raise AssertionError(f"{module} did not run")


def _sections(block: nn.Module, halves: bool) -> list[tuple[str | None, list[nn.Parameter]]]:
    """Returns the parameter groups to train in order, each with the module whose output to match.

    The first half is the attention, taken to be the first child that contains linears.
    """
    everything = list(block.parameters())
    if not halves:
        return [(None, everything)]
    for name, module in block.named_children():
        if linears(module) and not isinstance(module, LINEARS):
            attention = list(module.parameters())
            rest = [p for p in everything if not any(p is q for q in attention)]
            return [(name, attention), (None, rest)]
    raise UserError(
        f"reconstruct.split_attention: {type(block).__name__} has no separate attention "
        "module. Set it to false."
    )

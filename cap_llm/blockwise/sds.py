"""The stage `sds`: Sparse-Dense-Sparse (Li et al. 2025), block by block.

The stage starts from a pruned model: the result of `oneshot`, or one that was pruned elsewhere.
Each pruned matrix is re-densified, from its pruned towards its dense weights; pruned again by the
method of `oneshot`; and adjusted towards the dense weights with a soft mask, which is chosen again
at every step. Mode `gram` adjusts by ALPS iterations from the second prune, since the paper's
gradient steps hardly change a mask.

Two streams of text pass through the model. The first provides the inputs of re-densification
(`sds.data`). The second passes through the result, provides the inputs of the second prune, and
includes held-out text. Of the weights of the first prune, the second prune and the adjustment, a
matrix gets those with the smallest error against the dense weights on held-out text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cap_llm.blockwise.estimate import streaming_cost
from cap_llm.blockwise.oneshot import earlier_mask
from cap_llm.blockwise.prune import (
    PrunedBlock,
    Solved,
    owners,
    plan_sparsities,
    record_unchanged,
    solve_across_ranks,
)
from cap_llm.blockwise.stage import BlockStage, check_dense, masks_of_block, start_masks
from cap_llm.blockwise.walk import Walk
from cap_llm.config import CalibrationConfig, OneshotConfig, SdsConfig
from cap_llm.models.blocks import BlockModel, Group
from cap_llm.models.directory import ModelDirectory
from cap_llm.models.masks import Masks
from cap_llm.models.result import Result
from cap_llm.models.skeleton import matrix
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import atomic
from cap_llm.runtime.memory import Memory
from cap_llm.solvers.admm import alps
from cap_llm.solvers.hessian import Moments, factorize
from cap_llm.solvers.methods import Solver, pattern_of
from cap_llm.solvers.redensify import STEPS as SGD_STEPS
from cap_llm.solvers.redensify import redensify, redensify_by_sgd
from cap_llm.sparsity.choose import choose, obeys
from cap_llm.sparsity.pattern import Pattern
from cap_llm.stages import Cost, Inputs, Preview
from cap_llm.text.reading import Calibration

STAGE = "sds"
SGD_BATCH = 8  # sequences per SGD step in mode `paper`


def check(preview: Preview, oneshot: OneshotConfig, **_) -> None:
    """Checks that the second prune fits the model that the stage starts from."""
    check_dense(preview)
    plan_sparsities(preview.model, oneshot)
    if preview.has_weights and not preview.from_run:
        plan_second_prune(preview.start.masks(preview.world), preview.model, oneshot)


def cost(preview: Preview, calibration: CalibrationConfig, sds: SdsConfig, **_) -> Cost:
    """The cost of the stage."""
    c = calibration
    n_batches = -(-c.sequences // SGD_BATCH) if sds.mode == "paper" else 0
    result = streaming_cost(
        preview,
        c.sequences * c.length,
        c.length,
        passes=2,
        walks=2,
        streams=1 + sds.redensify + c.held_out / c.sequences,
        models=1 + (sds.data == "dense"),
        per_weight=4 * 4,  # the dense block; sparse, dense and free weights in fp32
        solver=(7 + n_batches, 8),  # with held-out moments
        solving=102 + 4 * SGD_STEPS * n_batches,
    )
    if sds.data == "redense":
        result.disk += 2 * preview.n_bytes  # see `save_redensified`
    return result


def run(inputs: Inputs, oneshot: OneshotConfig, calibration: Calibration, sds: SdsConfig) -> None:
    """Runs the stage; `oneshot` configures the second prune.

    Raises:
        UserError: a setting or an input is invalid. Finished blocks remain on disk.
    """
    pruned, dense, run = inputs.start, inputs.dense, inputs.run
    work = BlockStage(STAGE, inputs.recipe, run, pruned, dense)
    if work.done:
        return
    dense_model = BlockModel.open(dense, run.world.device)
    masks = start_masks(pruned, run)
    plan = plan_second_prune(masks, dense_model, oneshot, inputs.from_run)
    if sds.data != "dense":
        dense_model.drop_outside()  # before the pruned model loads its own
    work.begin(calibration)
    todo = len(work.finished) < len(work.model)
    with work.work() as (bar, scratch):
        if todo:
            bar.phase("embedding")
            step = _Step(work, dense_model, masks, dense, plan, calibration, sds, oneshot, scratch)
        for i in range(len(work.model) if todo else 0):
            with work.model.block(i) as block, dense_model.block(i) as dense_block:
                if i in work.finished:
                    bar.phase("replaying a finished block")
                    step.pass_finished(i, block, dense_block)
                else:
                    result = step.change(i, block, dense_block, bar.phase)
                    bar.phase("writing")
                    if run.world.is_main:
                        step.save_redensified(i, block)
                        get = work.model.model.get_parameter
                        work.write(i, {r.name: get(r.name) for r in result.rows}, result)
                    run.world.barrier()
                    work.report(i, result)
            bar.advance()
    work.finish(label(sds, work.before))


def label(settings: SdsConfig, before: Result) -> tuple[str, str]:
    """Method and amount of a result, for reports; only mode `paper` is SDS as published."""
    name = "SDS" if settings.mode == "paper" else "SDS (gram)"
    name += " without adjustment" * (not settings.adjust)
    name = name if settings.redensify else "adjustment"
    return f"{before.method} + {name}", before.amount


def plan_second_prune(
    masks: Masks, dense: BlockModel, settings: OneshotConfig, from_run: bool = False
) -> dict[str, float]:
    """Returns the sparsity per weight for the second prune: that of the first, else `oneshot`'s.

    Args:
        masks: of the first prune.
        dense: the dense model.
        settings: of the second prune.
        from_run: whether this run did the first prune, with the same settings.

    Raises:
        UserError: a model of another run has a different pattern or sparsity than `oneshot`.
    """
    plan = plan_sparsities(dense, settings)
    pruned = masks.directory
    sparsities = {row.name: row.sparsity for row in pruned.rows}
    if from_run:
        return plan | {name: s for name, s in sparsities.items() if plan.get(name)}
    patterns = sorted({row.pattern for row in pruned.rows} - {"as found"})
    target, compatible = Pattern.parse(settings.pattern), {settings.pattern}
    if not patterns:  # not pruned by cap_llm: infer the pattern from the masks
        sparsities = masks.shares
        patterns = [_infer_pattern(masks, sparsities, target)] if sparsities else []
    if not sparsities:
        return plan
    if settings.method == "wanda" and not target.m:
        compatible = {"unstructured", "row"}  # Wanda compares within an output row for both
    if not compatible.issuperset(patterns):
        remedy = f"Set --oneshot.pattern {patterns[0]}."
        if len(patterns) > 1:
            remedy = "Use a model with a single pattern."
        raise UserError(
            f"oneshot.pattern is {settings.pattern}, but {pruned} has "
            f"{' and '.join(patterns)}. {remedy}"
        )
    if target.m:
        return plan | sparsities
    tolerance = 1e-3 + 1 / min(matrix(m).shape[1] for m in dense.linears(0).values())
    uniform = max(sparsities.values()) - min(sparsities.values()) <= tolerance
    for name, sparsity in sparsities.items():  # an uneven allocation is kept
        planned = plan.get(name, 0)
        if uniform and abs(sparsity - planned) > tolerance:
            remedy = " and remove oneshot.layers" if settings.layers else ""
            raise UserError(
                f"oneshot.sparsity would prune {name} to {100 * planned:g}%, but it has "
                f"{100 * sparsity:.1f}% zeros in {pruned}. Set --oneshot.sparsity "
                f"{round(sparsity, 3):g}{remedy}."
            )
    return plan | sparsities


def _infer_pattern(masks: Masks, sparsities: dict[str, float], target: Pattern) -> str:
    """Returns an N:M pattern that all masks satisfy exactly, else an unstructured one."""
    density = 1 - max(sparsities.values())
    uniform = 1 - min(sparsities.values()) - density < 1e-6  # as for N:M
    groups = [target.m, 4, 8, 16, 32] if target.m else [4, 8, 16, 32]
    for m in groups if uniform else ():
        text = f"{round(density * m)}:{m}"
        exact = 0 < round(density * m) < m and abs(density - round(density * m) / m) < 1e-6
        if exact and all(obeys(mask, Pattern.parse(text)) for mask in masks.values()):
            return text
    return "unstructured" if target.m else str(target)


class _Step:
    """Applies SDS to the blocks, one after the other, with the two streams of text."""

    def __init__(
        self,
        work: BlockStage,
        dense_model: BlockModel,
        masks: Masks,
        dense: ModelDirectory,
        plan: dict[str, float],
        text: Calibration,
        settings: SdsConfig,
        oneshot: OneshotConfig,
        scratch: Path,
    ):
        self.work, self.model, self.world = work, work.model, work.run.world
        self.settings, self.oneshot = settings, oneshot
        self.pattern = pattern_of(oneshot)
        self.masks, self.plan = masks, plan
        self.allowed_mask = earlier_mask(dense, oneshot, plan)
        own = self.world.shard(len(text.ids))
        calibration = text.ids[list(own)]
        held_out = text.held_out[list(self.world.shard(len(text.held_out)))]
        self.has_held_out = len(text.held_out) > 0
        # statistics per SGD batch in mode `paper`, one batch in mode `gram`
        batch = SGD_BATCH if self.settings.mode == "paper" else len(text.ids)
        self.n_batches = -(-len(text.ids) // batch)
        self.batch_of = [n // batch for n in own]  # per calibration sequence
        parts = 2 if self.settings.redensify else 1
        memory = Memory.plan(self.model.device, self.world.activation_gib, parts)
        self.redensify_walk = None
        if self.settings.redensify:
            source = dense_model if self.settings.data == "dense" else self.model
            self.redensify_walk = Walk(source, calibration, memory, scratch)
        windows = torch.cat([calibration, held_out])
        self.prune_walk = Walk(self.model, windows, memory, scratch)
        self.redensified: dict[str, torch.Tensor] = {}  # weights of the current block
        self.model.drop_outside()
        dense_model.drop_outside()

    def pass_finished(self, i: int, block: nn.Module, dense_block: nn.Module) -> None:
        """Passes both streams through a finished block."""
        if self.redensify_walk:
            if self.settings.data == "redense":
                for name, weight in load_file(self._redense_file(i)).items():
                    matrix(block.get_submodule(name)).copy_(weight)
            source = dense_block if self.settings.data == "dense" else block
            self.redensify_walk.forward(i, source)
        self.work.load(i, block)
        self.prune_walk.forward(i, block)

    def change(
        self, i: int, block: nn.Module, dense_block: nn.Module, phase: Callable[[str], None]
    ) -> PrunedBlock:
        """Re-densifies block i and prunes it again, while both streams pass through it."""
        start = time.monotonic()
        prefix = self.model.block_name(i) + "."
        linears = {n: matrix(m) for n, m in self.model.linears(i).items()}
        masks = masks_of_block(self.model, i, self.masks)
        unchanged = {n: masks.pop(n) for n in linears if n in masks and not self.planned(i, n)}
        sparse = {n: linears[n].float().clone() for n in masks}
        target = {n: matrix(dense_block.get_submodule(n)).float() for n in masks}
        self.redensified = {}
        result = PrunedBlock({}, [], 0.0)

        def make_dense(group: Group, inputs: Iterator[torch.Tensor]) -> None:
            names = [n for n in group.names if n in masks]
            phase(f"re-densifying {group.short}")
            if not names:
                return _consume(inputs)
            batches, _ = self._statistics(self.redensify_walk, group, inputs, prefix + names[0])
            for n, weight in self._redensify(names, prefix, sparse, target, batches).items():
                self.redensified[n] = weight
                if self.settings.data == "redense":
                    linears[n].copy_(weight)

        def prune_again(group: Group, inputs: Iterator[torch.Tensor]) -> None:
            names = [n for n in group.names if n in masks]
            phase(f"pruning {group.short}")
            if not names:
                return _consume(inputs)
            name, walk = prefix + names[0], self.prune_walk
            batches, held_out = self._statistics(walk, group, inputs, name)
            grams = self._grams(batches)
            solver = Solver(self.oneshot, Moments.total(batches), name, needs_factor=True)

            def solve(n: str, dtype: torch.dtype) -> Solved:
                allowed = self.allowed_mask(self.model.weight_name(i, n), target[n])
                dense, first = target[n], (sparse[n], masks[n])
                candidates = self._candidates(n, *first, dense, allowed, solver, grams)
                candidates = {k: (w.to(dtype), mask) for k, (w, mask) in candidates.items()}
                label = list(candidates)[-1]
                if held_out:
                    label = min(
                        candidates, key=lambda k: held_out.error(candidates[k][0].float() - dense)
                    )
                weight, mask = candidates[label]
                error = solver.error(dense, weight.float())
                return Solved(weight, mask, error, solver.damping, label)

            pattern = self.oneshot.pattern
            solve_across_ranks(self.model, i, names, pattern, self.world, solve, result)

        with torch.no_grad():
            if self.redensify_walk:
                source = dense_block if self.settings.data == "dense" else block
                self.redensify_walk.visit(i, source, make_dense)
            if self.redensified and self.settings.data == "redense":
                for n, weight in sparse.items():
                    linears[n].copy_(weight)
            self.prune_walk.visit(i, block, prune_again)
        record_unchanged(self.model, i, unchanged, result)
        result.seconds = time.monotonic() - start
        return result

    def planned(self, i: int, n: str) -> float:
        """Returns the planned sparsity of a linear; 0 if `oneshot.layers` excludes it."""
        return self.plan.get(self.model.weight_name(i, n), 0.0)

    def save_redensified(self, i: int, block: nn.Module) -> None:
        """Writes block i's re-densified weights, if a resumed run passes its text through them."""
        if self.settings.data != "redense":
            return
        weights = {
            n: w.to(matrix(block.get_submodule(n)).dtype).cpu().contiguous()
            for n, w in self.redensified.items()
        }
        with atomic(self._redense_file(i)) as temporary:
            save_file(weights, temporary)

    def _redense_file(self, i: int) -> Path:
        return self.work.parts / f"{i:05d}.redense"

    def _statistics(
        self, walk: Walk, group: Group, inputs: Iterator[torch.Tensor], name: str
    ) -> tuple[list[Moments], Moments | None]:
        """Computes the second moments of a group's input, per batch and on held-out text.

        Only the walk of the second prune includes held-out text.

        Raises:
            UserError: the input is not finite; `name` is the linear in the message.
        """

        def new() -> Moments:
            return Moments(group.columns, self.model.device)

        batches = [new() for _ in range(self.n_batches)]
        held_out = new() if self.has_held_out and walk is self.prune_walk else None
        sequences = (
            sequence
            for ids, x in zip(walk.ids, inputs, strict=True)
            for sequence in x.reshape(len(ids), -1, x.shape[-1])
        )
        for n, sequence in enumerate(sequences):
            moments = batches[self.batch_of[n]] if n < len(self.batch_of) else held_out
            moments.add(sequence)
        for moments in filter(None, (*batches, held_out)):
            moments.merge(self.world)
            moments.finish(name)
        return batches, held_out

    def _grams(self, batches: list[Moments]) -> list[torch.Tensor] | None:
        """Mean x x^T [C, C] per SGD batch; a single one is copied, since damping modifies it."""
        if self.settings.mode != "paper":
            return None
        grams = [part.hessian for part in batches]
        return grams if len(grams) > 1 else [grams[0].clone()]

    def _redensify(
        self,
        names: list[str],
        prefix: str,
        sparse: dict[str, torch.Tensor],
        target: dict[str, torch.Tensor],
        batches: list[Moments],
    ) -> dict[str, torch.Tensor]:
        """Re-densifies matrices [R, C] that share an input, fp32, distributed over the ranks."""
        settings, (l1, l2) = self.settings, self.settings.regularizers
        grams = self._grams(batches)
        if grams is None:
            name = prefix + names[0]
            hessian = factorize(batches[0].hessian, self.oneshot.damping, name).hessian
        weights = {}
        for n, owner in owners({n: sparse[n] for n in names}, self.world).items():
            weight = torch.empty_like(sparse[n])
            if owner == self.world.rank and grams is None:
                weight = redensify(sparse[n], target[n], hessian, settings.mu, l1, l2)
            elif owner == self.world.rank:
                weight = redensify_by_sgd(sparse[n], target[n], grams, l1=l1, l2=l2)
            weights[n] = self.world.broadcast(weight.contiguous(), owner)
        return weights

    def _candidates(
        self,
        n: str,
        sparse: torch.Tensor,
        mask: torch.Tensor,
        target: torch.Tensor,
        allowed: torch.Tensor | None,
        solver: Solver,
        grams: list[torch.Tensor] | None,
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Returns weight and mask of the first prune, the second prune and the adjustment."""
        sparsity = (~mask).sum().item() / mask.numel()
        # a model that was pruned elsewhere may have another pattern
        candidates = {"first": (sparse, mask)} if obeys(mask, self.pattern) else {}
        weight = sparse
        if n in self.redensified:
            candidates["again"] = solver(self.redensified[n], sparsity, allowed, target)
            weight = candidates["again"][0]
        if not self.settings.adjust:
            return candidates
        if grams is None:
            hessian = solver.factor.hessian
            weight, mask = alps(target, hessian, self.pattern, sparsity, allowed, start=weight)
            candidates["adjusted"] = (solver.refit(weight, mask, target), mask)
            return candidates

        def soft_mask(w: torch.Tensor) -> torch.Tensor:
            return w * choose(w.abs(), self.pattern, sparsity, allowed)

        weight = redensify_by_sgd(weight, target, grams, l1=0, l2=0, after_pass=soft_mask)
        candidates["adjusted"] = (weight, choose(weight.abs(), self.pattern, sparsity, allowed))
        return candidates


def _consume(inputs: Iterator[torch.Tensor]) -> None:
    """Reads all inputs without using them, so that the walk can continue."""
    for _ in inputs:
        pass

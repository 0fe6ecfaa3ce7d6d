"""The stage `sds`: Sparse-Dense-Sparse (Li et al. 2025), a block at a time.

The first prune is what the stage starts from (`oneshot`, or a model pruned elsewhere). Each pruned
matrix is made dense again, from its pruned weights towards the dense ones; pruned again by
`oneshot`'s method; and adjusted towards the dense weights with a soft mask, one that is chosen anew
at every step: mode `gram` solves that by the iterations of ALPS from the second prune on, since
gradient steps, the paper's, hardly move a mask.

Two streams of text go side by side: one shows re-densification its inputs (`sds.data`), the other,
which carries the held-out text too, is the result so far, which the second prune sees. Of the first
prune's weights, the second's and the adjusted ones, a matrix takes those with the least error
against the dense weights on held-out text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cap_llm.blockwise.oneshot import earlier_mask
from cap_llm.blockwise.prune import (
    PrunedBlock,
    Solved,
    carry,
    owners,
    plan_sparsities,
    spread,
)
from cap_llm.blockwise.stage import BlockStage, masks_of_block, start_masks
from cap_llm.blockwise.walk import Walk
from cap_llm.config import Config
from cap_llm.models.blocks import BlockModel, Group, matrix
from cap_llm.models.directory import recorded, removed
from cap_llm.models.masks import Masks
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import atomic
from cap_llm.runtime.memory import Memory
from cap_llm.runtime.rundir import Run
from cap_llm.solvers.admm import alps
from cap_llm.solvers.hessian import Moments, factorize
from cap_llm.solvers.methods import Solver, pattern_of
from cap_llm.solvers.redensify import redensify, redensify_by_sgd
from cap_llm.sparsity.choose import choose, obeys
from cap_llm.sparsity.pattern import Pattern
from cap_llm.text.reading import Texts

STAGE = "sds"
SGD_BATCH = 8  # sequences of an SGD step in mode `paper`


def sds(pruned: Path, dense: Path, texts: Texts, config: Config, run: Run) -> Path:
    """Takes a pruned model through Sparse-Dense-Sparse.

    Args:
        pruned: directory of the first prune.
        dense: directory of the model that it was pruned from.
        texts: with calibration and held-out ids.
        config: the run's settings; the second prune is `oneshot`'s.
        run: the run directory.

    Returns:
        The directory of the result.

    Raises:
        UserError: see the messages; whatever is finished is kept.
    """
    work = BlockStage(STAGE, config.recipe(STAGE), run, pruned, dense)
    if work.done:
        return work.folder
    dense_model = BlockModel.open(dense, run.world.device)
    masks = start_masks(pruned, run)
    plan = plan_second_prune(masks, dense_model, config)
    if config.sds.data != "dense":
        dense_model.drop_outside()  # before the pruned model brings its own
    work.begin(texts, config)
    todo = len(work.finished) < len(work.model)
    with work.work() as (bar, scratch):
        if todo:
            bar.phase("embedding")
            step = _Step(work, dense_model, masks, dense, plan, texts, config, scratch)
        for i in range(len(work.model) if todo else 0):
            with work.model.block(i) as block, dense_model.block(i) as dense_block:
                if i in work.finished:
                    bar.phase("passing a finished block")
                    step.pass_finished(i, block, dense_block)
                else:
                    result = step.change(i, block, dense_block, bar.phase)
                    bar.phase("writing")
                    if run.world.first:
                        step.keep_redense(i, block)
                        get = work.model.model.get_parameter
                        work.write(i, {r.name: get(r.name) for r in result.rows}, result)
                    run.world.barrier()
                    work.report(i, result)
            bar.advance()
    return work.finish()


def plan_second_prune(masks: Masks, dense: BlockModel, config: Config) -> dict[str, float]:
    """The sparsity of every weight by name: that of the first prune, or as asked for.

    Raises:
        UserError: a start of another run has another pattern or another sparsity than `oneshot`
            asks for, so that the second prune would not be the first one's.
    """
    settings, pruned = config.oneshot, masks.folder
    plan = plan_sparsities(dense, settings)
    rows = recorded(pruned)
    found = {row["name"]: removed(row) for row in rows}
    if config.start(STAGE):  # this run's own, whose settings are held already
        return plan | {name: share for name, share in found.items() if plan.get(name)}
    first = sorted({row["pattern"] for row in rows} - {"as found"})
    asked, same = Pattern.parse(settings.pattern), {settings.pattern}
    if not first:  # pruned elsewhere, if at all: its masks tell
        found = masks.shares
        first = [_pattern_of_masks(masks, found, asked)] if found else []
    if not found:
        return plan
    if settings.method == "wanda" and not asked.m:
        same = {"unstructured", "row"}  # Wanda compares the weights of an output row either way
    if not same.issuperset(first):
        remedy = f"give --oneshot.pattern {first[0]}"
        if len(first) > 1:
            remedy = "it takes a model of one pattern"
        raise UserError(
            f"{pruned} is pruned to {' and '.join(first)}, and sds would prune it again to "
            f"oneshot.pattern {settings.pattern}: {remedy}"
        )
    if asked.m:
        return plan | found
    rounding = 1e-3 + 1 / min(matrix(m).shape[1] for m in dense.linears(0).values())
    even = max(found.values()) - min(found.values()) <= rounding  # an uneven budget stays as it is
    for name, share in found.items():
        wanted = plan.get(name, 0)
        if even and abs(share - wanted) > rounding:
            without = " and no oneshot.layers" if settings.layers else ""
            raise UserError(
                f"{name} in {pruned} is pruned to {100 * share:.1f} % zeros, and sds would prune "
                f"it again to {100 * wanted:g} %: give --oneshot.sparsity {round(share, 3):g}"
                f"{without}"
            )
    return plan | found


def _pattern_of_masks(masks: Masks, shares: dict[str, float], asked: Pattern) -> str:
    """The pattern that masks made elsewhere have: the one asked for, if that may be, or an N:M."""
    kept = 1 - max(shares.values())
    even = 1 - min(shares.values()) - kept < 1e-6  # as N:M leaves every matrix
    groups = [asked.m, 4, 8, 16, 32] if asked.m else [4, 8, 16, 32]
    for m in groups if even else ():
        text = f"{round(kept * m)}:{m}"
        exact = 0 < round(kept * m) < m and abs(kept - round(kept * m) / m) < 1e-6
        if exact and all(obeys(mask, Pattern.parse(text)) for mask in masks.values()):
            return text
    return "unstructured" if asked.m else str(asked)


class _Step:
    """The two streams, and what happens to a block between them."""

    def __init__(
        self,
        work: BlockStage,
        dense_model: BlockModel,
        masks: Masks,
        dense: Path,
        plan: dict[str, float],
        texts: Texts,
        config: Config,
        scratch: Path,
    ):
        self.work, self.model, self.world = work, work.model, work.run.world
        self.settings, self.oneshot = config.sds, config.oneshot
        self.pattern = pattern_of(config.oneshot)
        self.masks, self.plan = masks, plan
        self.inside = earlier_mask(dense, config.oneshot, plan)
        mine = self.world.share(len(texts.calibration))
        calibration = texts.calibration[list(mine)]
        held_out = texts.held_out[list(self.world.share(len(texts.held_out)))]
        self.holds_out = len(texts.held_out) > 0
        # a batch of SGD has statistics of its own; mode `gram` is one batch
        batch = SGD_BATCH if self.settings.mode == "paper" else len(texts.calibration)
        self.n_batches = -(-len(texts.calibration) // batch)
        self.batch_of = [n // batch for n in mine]  # of each calibration sequence
        parts = 2 if self.settings.redensify else 1
        memory = Memory.plan(self.model.device, config.runtime.activation_gib, parts)
        self.first = None
        if self.settings.redensify:
            seen = dense_model if self.settings.data == "dense" else self.model
            self.first = Walk(seen, calibration, memory, scratch)
        self.final = Walk(self.model, torch.cat([calibration, held_out]), memory, scratch)
        self.free: dict[str, torch.Tensor] = {}  # re-densified weights of the block at hand
        self.model.drop_outside()
        dense_model.drop_outside()

    def pass_finished(self, i: int, block: nn.Module, dense_block: nn.Module) -> None:
        """Takes both streams through a block that is done."""
        if self.first:
            if self.settings.data == "redense":
                for name, weight in load_file(self._redense_file(i)).items():
                    matrix(block.get_submodule(name)).copy_(weight)
            self.first.forward(i, dense_block if self.settings.data == "dense" else block)
        self.work.load(i, block)
        self.final.forward(i, block)

    def change(
        self, i: int, block: nn.Module, dense_block: nn.Module, phase: Callable[[str], None]
    ) -> PrunedBlock:
        """Re-densifies block i and prunes it again, on the way of both streams through it."""
        start = time.monotonic()
        prefix = self.model.block_name(i) + "."
        linears = {n: matrix(m) for n, m in self.model.linears(i).items()}
        masks = masks_of_block(self.model, i, self.masks)
        left = {n: masks.pop(n) for n in linears if n in masks and not self.asked(i, n)}
        sparse = {n: linears[n].float().clone() for n in masks}
        target = {n: matrix(dense_block.get_submodule(n)).float() for n in masks}
        self.free = {}
        result = PrunedBlock({}, [], 0.0)

        def make_dense(group: Group, inputs: Iterator[torch.Tensor]) -> None:
            names = [n for n in group.names if n in masks]
            phase(f"re-densifying {group.short}")
            if not names:
                return _read(inputs)
            batches, _ = self._statistics(self.first, group, inputs, prefix + names[0])
            for n, weight in self._redensify(names, prefix, sparse, target, batches).items():
                self.free[n] = weight
                if self.settings.data == "redense":
                    linears[n].copy_(weight)

        def prune_again(group: Group, inputs: Iterator[torch.Tensor]) -> None:
            names = [n for n in group.names if n in masks]
            phase(f"pruning {group.short}")
            if not names:
                return _read(inputs)
            batches, held_out = self._statistics(self.final, group, inputs, prefix + names[0])
            grams = self._grams(batches)
            solver = Solver(
                self.oneshot, Moments.total(batches), prefix + names[0], needs_factor=True
            )

            def solve(n: str, dtype: torch.dtype) -> Solved:
                inside = self.inside(self.model.weight_name(i, n), target[n])
                found = self._candidates(n, sparse[n], masks[n], target[n], inside, solver, grams)
                found = {kept: (w.to(dtype), mask) for kept, (w, mask) in found.items()}
                kept = list(found)[-1]
                if held_out:
                    kept = min(found, key=lambda k: held_out.error(found[k][0].float() - target[n]))
                weight, mask = found[kept]
                error = solver.error(target[n], weight.float())
                return Solved(weight, mask, error, solver.damping, kept)

            spread(self.model, i, names, self.oneshot.pattern, self.world, solve, result)

        with torch.no_grad():
            if self.first:
                seen = dense_block if self.settings.data == "dense" else block
                self.first.visit(i, seen, make_dense)
            if self.free and self.settings.data == "redense":
                for n, weight in sparse.items():
                    linears[n].copy_(weight)
            self.final.visit(i, block, prune_again)
        carry(self.model, i, left, result)
        result.seconds = time.monotonic() - start
        return result

    def asked(self, i: int, n: str) -> float:
        """The sparsity of a linear of block i; 0 for one that `oneshot.layers` leaves as it is."""
        return self.plan.get(self.model.weight_name(i, n), 0.0)

    def keep_redense(self, i: int, block: nn.Module) -> None:
        """Writes block i's re-densified weights, where a resumed run has to send text through: in
        the type in which they were passed."""
        if self.settings.data != "redense":
            return
        free = {n: w.to(matrix(block.get_submodule(n)).dtype) for n, w in self.free.items()}
        with atomic(self._redense_file(i)) as temporary:
            save_file({n: w.cpu().contiguous() for n, w in free.items()}, temporary)

    def _redense_file(self, i: int) -> Path:
        return self.work.parts / f"{i:05d}.redense"

    def _statistics(
        self, walk: Walk, group: Group, inputs: Iterator[torch.Tensor], name: str
    ) -> tuple[list[Moments], Moments | None]:
        """Second moments of a group's input over all ranks: of each batch, and of held-out text.

        The first stream carries no held-out text.

        Raises:
            UserError: the input is not finite; `name` says of which linear.
        """

        def new() -> Moments:
            return Moments(group.columns, self.model.device)

        batches = [new() for _ in range(self.n_batches)]
        held_out = new() if self.holds_out and walk is self.final else None
        sequences = (
            sequence
            for ids, x in zip(walk.ids, inputs, strict=True)
            for sequence in x.reshape(len(ids), -1, x.shape[-1])
        )
        for n, sequence in enumerate(sequences):
            part = batches[self.batch_of[n]] if n < len(self.batch_of) else held_out
            part.add(sequence)
        for part in filter(None, (*batches, held_out)):
            part.merge(self.world)
            part.finish(name)
        return batches, held_out

    def _grams(self, batches: list[Moments]) -> list[torch.Tensor] | None:
        """Mean x x^T [C, C] of each batch for SGD; a single one is damped later, so copied."""
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
        """The free weights [R, C] of matrices that read one input, fp32; ranks take turns."""
        settings, (l1, l2) = self.settings, self.settings.regularisers
        grams = self._grams(batches)
        if grams is None:
            name = prefix + names[0]
            hessian = factorize(batches[0].hessian, self.oneshot.damping, name).hessian
        free = {}
        for n, owner in owners({n: sparse[n] for n in names}, self.world).items():
            weight = torch.empty_like(sparse[n])
            if owner == self.world.rank and grams is None:
                weight = redensify(sparse[n], target[n], hessian, settings.mu, l1, l2)
            elif owner == self.world.rank:
                weight = redensify_by_sgd(sparse[n], target[n], grams, l1=l1, l2=l2)
            free[n] = self.world.broadcast(weight.contiguous(), owner)
        return free

    def _candidates(
        self,
        n: str,
        sparse: torch.Tensor,
        mask: torch.Tensor,
        target: torch.Tensor,
        inside: torch.Tensor | None,
        solver: Solver,
        grams: list[torch.Tensor] | None,
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What a matrix may become, with its mask: the first prune, the second, the adjusted."""
        sparsity = (~mask).sum().item() / mask.numel()
        # elsewhere it may have been pruned to another pattern
        found = {"first": (sparse, mask)} if obeys(mask, self.pattern) else {}
        weight = sparse
        if n in self.free:
            found["again"] = solver(self.free[n], sparsity, inside, target)
            weight = found["again"][0]
        if not self.settings.adjust:
            return found
        if grams is None:
            hessian = solver.factor.hessian
            weight, again = alps(target, hessian, self.pattern, sparsity, inside, start=weight)
            found["adjusted"] = (solver.refit(weight, again, target), again)
            return found

        def soft_mask(w: torch.Tensor) -> torch.Tensor:
            return w * choose(w.abs(), self.pattern, sparsity, inside)

        weight = redensify_by_sgd(weight, target, grams, l1=0, l2=0, after_pass=soft_mask)
        found["adjusted"] = (weight, choose(weight.abs(), self.pattern, sparsity, inside))
        return found


def _read(inputs: Iterator[torch.Tensor]) -> None:
    """Takes inputs of which nothing is wanted, so that the text can go on."""
    for _ in inputs:
        pass

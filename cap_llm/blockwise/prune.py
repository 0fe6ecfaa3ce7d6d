"""One-shot pruning of a model's blocks: the mathematics meets the walk. No files here.

`prune` is the way in for a module in memory; the stage `oneshot` streams and writes instead.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from cap_llm.blockwise.walk import Walk
from cap_llm.config import OneshotConfig
from cap_llm.models.blocks import BlockModel, Group, matrix, stored_dtype
from cap_llm.models.directory import Row
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.memory import Memory
from cap_llm.runtime.world import World
from cap_llm.solvers.hessian import Moments
from cap_llm.solvers.methods import Solver
from cap_llm.sparsity.pattern import Pattern

MEASURED = 16  # sequences that measure the error of a method which needs no Hessian


@dataclass
class PrunedBlock:
    """The outcome of one block.

    Attributes:
        masks: [R, C] of each pruned weight, by its name.
        rows: one for each pruned weight.
        seconds: taken by the block.
        error: of the block's own output, where a stage works on that.
    """

    masks: dict[str, torch.Tensor]
    rows: list[Row]
    seconds: float
    error: dict | None = None


def prune(
    model: PreTrainedModel,
    windows: torch.Tensor | None,
    config: OneshotConfig | None = None,
) -> dict[str, torch.Tensor]:
    """Prunes a transformers model in memory, in place.

    Args:
        model: any model whose blocks are linears; it stays on its device.
        windows: calibration ids [N, T]; None for magnitude.
        config: method, pattern and `layers`; `earlier_mask` belongs to the stage.

    Returns:
        The masks [R, C] by weight name, true where a weight stays.

    Raises:
        UserError: the model cannot be walked, the pattern does not fit it, or `budget` is not
            uniform: to allocate one is the stage's work.
    """
    # anew: what was changed in place is held against its range, too
    config = dataclasses.replace(config) if config else OneshotConfig()
    if config.allocation != "uniform":
        raise UserError(
            f"prune() takes no budget {config.allocation!r}: give oneshot.layers, or run "
            "the stage oneshot"
        )
    configs = (model.config, model.config.get_text_config())
    caches = [(c, c.use_cache) for c in configs if hasattr(c, "use_cache")]
    precision = torch.get_float32_matmul_precision()
    was = [(m, m.training) for m in model.modules()]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    masks: dict[str, torch.Tensor] = {}
    try:
        torch.set_float32_matmul_precision("highest")  # no TF32 in Hessians and solvers
        blocks = BlockModel(model, model.device)
        if windows is None and config.uses_calibration:
            raise UserError(f"{config.method} needs calibration ids; only magnitude goes without")
        plan = plan_sparsities(blocks, config)
        world = World.alone(model.device)
        with tempfile.TemporaryDirectory() as scratch:
            memory = Memory.plan(model.device)
            walk = None if windows is None else Walk(blocks, windows, memory, Path(scratch))
            for i in range(len(blocks)):
                with blocks.block(i) as block:
                    masks |= prune_block(blocks, i, block, walk, config, plan, world).masks
    finally:
        torch.set_float32_matmul_precision(precision)
        for module, training in was:
            module.training = training
        for p, requires_grad in trained:
            p.requires_grad_(requires_grad)
        for own, use_cache in caches:
            own.use_cache = use_cache
    return masks


def plan_sparsities(model: BlockModel, settings: OneshotConfig) -> dict[str, float]:
    """The sparsity of every prunable weight by its name: `settings.layers` over the uniform one.

    Raises:
        UserError: an entry of `layers` matches nothing, or the pattern does not divide a matrix.
    """
    plan = by_hand(uniform(model, settings), settings)
    _check_shapes(model, plan, settings)
    return plan


def uniform(model: BlockModel, config: OneshotConfig) -> dict[str, float]:
    """The same sparsity for every prunable weight, by name."""
    return {
        model.weight_name(i, linear): config.target_sparsity
        for i in range(len(model))
        for linear in model.linears(i)
    }


def by_hand(plan: dict[str, float], settings: OneshotConfig) -> dict[str, float]:
    """Applies `oneshot.layers`; a later entry wins."""
    for wanted, sparsity in settings.layers.items():
        names = [n for n in plan if matches(n, wanted)]
        if not names:
            raise UserError(
                f"oneshot.layers names {wanted!r}, which matches no prunable matrix; they are "
                f"called like {next(iter(plan)).removesuffix('.weight')}"
            )
        plan = plan | dict.fromkeys(names, sparsity)
    if not any(plan.values()):
        raise UserError("oneshot.layers leaves every matrix dense; nothing is left to prune")
    return plan


def matches(name: str, wanted: str) -> bool:
    """Whether an entry of `oneshot.layers` means a weight."""
    return fnmatch.fnmatchcase(name.removesuffix(".weight"), wanted)


def _check_shapes(model: BlockModel, plan: dict[str, float], settings: OneshotConfig) -> None:
    """Refuses a pattern that does not fit a matrix, before any work.

    Raises:
        UserError: names the matrix.
    """
    pattern = Pattern.parse(settings.pattern)
    for i in range(len(model)):
        for linear, module in model.linears(i).items():
            name = model.weight_name(i, linear)
            if not (share := plan.get(name)):
                continue
            shape = matrix(module).shape
            pattern.check(name, shape)
            if not pattern.m and round(share * shape.numel()) in (0, shape.numel()):
                which = "no weight" if share < 0.5 else "every weight"
                raise UserError(
                    f"a sparsity of {share} removes {which} of {name} {list(shape)}; choose one "
                    "between, or leave the matrix dense by --oneshot.layers"
                )


def prune_block(
    model: BlockModel,
    i: int,
    block: nn.Module,
    walk: Walk | None,
    config: OneshotConfig,
    sparsities: dict[str, float],
    world: World,
    earlier: Callable[[str, torch.Tensor], torch.Tensor | None] = lambda name, weight: None,
    phase: Callable[[str], None] = lambda text: None,
    measure: bool = True,
) -> PrunedBlock:
    """Prunes block i, and takes the walk's hidden states through it.

    Args:
        model: the model.
        i: the block's number.
        block: the block with its weights; changed in place, rounded to the stored type.
        walk: the calibration text in front of the block; None where the method needs none.
        config: method and pattern.
        sparsities: by weight name; 0 or absent leaves a weight dense.
        world: the ranks; each solves some of the matrices that share an input.
        earlier: gives the mask [R, C] inside which a weight's new mask must lie, or None.
        phase: told what is being done.
        measure: compute the errors also where the method needs no Hessian.

    Raises:
        UserError: activations overflow, or a Hessian is not positive definite.
    """
    start = time.monotonic()
    result = PrunedBlock({}, [], 0.0)
    linears = model.linears(i)
    full = config.second_order
    most = _measured_tokens(walk, world) if walk and measure and not full else None

    def change(group: Group, inputs: Iterator[torch.Tensor]) -> None:
        names = [n for n in group.names if sparsities.get(model.weight_name(i, n))]
        phase(f"reading {group.short}")
        moments = Moments(group.columns, model.device, full)
        sample = None if most is None else Moments(group.columns, model.device, most=most)
        seen = [m for m in (moments, sample) if m and names]
        for x in inputs:
            for part in seen:
                part.add(x)
        if names:
            for part in seen:
                part.merge(world)
                part.finish(f"{model.block_name(i)}.{names[0]}")
            phase(f"solving {group.short}")
            solve(names, moments, sample)

    def solve(names: list[str], moments: Moments | None, sample: Moments | None = None) -> None:
        name = f"{model.block_name(i)}.{names[0]}"
        solver = Solver(config, moments, name, sample=sample)

        def one(name: str, dtype: torch.dtype) -> Solved:
            dense, full_name = matrix(linears[name]).float(), model.weight_name(i, name)
            inside = _check(earlier(full_name, dense), full_name)
            new, mask = solver(dense, sparsities[full_name], inside)
            new = new.to(dtype)
            return Solved(new, mask, solver.error(dense, new.float()), solver.damping)

        spread(model, i, names, config.pattern, world, one, result)

    with torch.no_grad():
        if walk:
            walk.visit(i, block, change)
        else:
            phase("choosing")
            names = [n for n in linears if sparsities.get(model.weight_name(i, n))]
            if names:
                solve(names, None)
    result.seconds = time.monotonic() - start
    return result


def _measured_tokens(walk: Walk, world: World) -> int:
    """How many of this rank's tokens belong to the first `MEASURED` sequences of all ranks."""
    counts = world.gather(sum(len(ids) for ids in walk.ids))
    sequences = min(counts[world.rank], max(0, MEASURED - sum(counts[: world.rank])))
    return sequences * walk.ids[0].shape[1]


@dataclass
class Solved:
    """One matrix: its weight [R, C] in the stored type, its mask [R, C], facts for its `Row`."""

    weight: torch.Tensor
    mask: torch.Tensor
    error: float | None
    damping: float | None
    kept: str | None = None


def spread(
    model: BlockModel,
    i: int,
    names: list[str],
    pattern: str,
    world: World,
    solve: Callable[[str, torch.dtype], Solved],
    result: PrunedBlock,
) -> None:
    """Solves matrices of block i, each on one of the ranks, and gives all ranks the results.

    Args:
        model: the model, whose block i gets the new weights.
        i: the block's number.
        names: of the linears in their block.
        pattern: for the rows.
        world: the ranks.
        solve: gets one of `names` and the type that its weight is stored in; what follows must see
            the weights as they will be stored.
        result: takes masks and rows.
    """
    linears = model.linears(i)
    owner = owners({name: linears[name].weight for name in names}, world)
    rows: dict[str, Row] = {}
    for name in names:
        full_name = model.weight_name(i, name)
        weight = matrix(linears[name])
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        if owner[name] == world.rank:
            tick = time.monotonic()
            solved = solve(name, stored_dtype(model, full_name))
            mask = solved.mask.contiguous()  # as the other ranks receive it
            rows[name] = Row(
                full_name,
                list(weight.shape),
                pattern,
                int((solved.weight == 0).sum()),
                int((~mask).sum()),
                solved.error,
                solved.damping,
                round(time.monotonic() - tick, 4),
                solved.kept,
            )
            weight.copy_(solved.weight)
        contiguous = weight.contiguous()  # Conv1D stores the transpose
        weight.copy_(world.broadcast(contiguous, owner[name]))
        result.masks[full_name] = world.broadcast(mask, owner[name]).cpu()
    everyone = {name: row for part in world.gather(rows) for name, row in part.items()}
    result.rows += [everyone[name] for name in names]


def carry(
    model: BlockModel,
    i: int,
    masks: dict[str, torch.Tensor],
    result: PrunedBlock,
    patterns: dict[str, str] | None = None,
    seconds: float = 0.0,
) -> None:
    """Takes the masks [R, C] of linears of block i that a stage leaves as they are into its result.

    Without them what follows would take their zeros for weights to train. `patterns` has what a
    weight's pattern is called, by its name; each row gets these `seconds`.
    """
    linears = model.linears(i)
    for n, mask in masks.items():
        name, weight = model.weight_name(i, n), matrix(linears[n])
        result.masks[name] = mask.cpu()
        zeros, removed = int((weight == 0).sum()), int((~mask).sum())
        shape = list(weight.shape)
        pattern = (patterns or {}).get(name, "as found")
        result.rows.append(Row(name, shape, pattern, zeros, removed, None, None, seconds))


def owners(weights: dict[str, torch.Tensor], world: World) -> dict[str, int]:
    """The rank that solves each matrix: the largest first, each to the least loaded rank."""
    load = [0] * world.size
    owner = {}
    for name in sorted(weights, key=lambda n: -weights[n].numel()):
        owner[name] = load.index(min(load))
        load[owner[name]] += weights[name].numel()
    return owner


def _check(inside: torch.Tensor | None, name: str) -> torch.Tensor | None:
    if inside is not None and not bool(inside.any()):
        raise UserError(
            f"the earlier mask of {name} keeps no weight, and nothing is left to prune: leave it "
            "dense by --oneshot.layers, or set --oneshot.initial_mask ignore"
        )
    return inside

"""One-shot pruning of a model's blocks: connects the solvers with the walk, without files.

`prune` is the entry for a model in memory; the stage `oneshot` streams blocks and writes files.
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
from cap_llm.models.blocks import BlockModel, Group, stored_dtype
from cap_llm.models.directory import Row
from cap_llm.models.skeleton import matrix
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.memory import Memory
from cap_llm.runtime.world import World
from cap_llm.solvers.hessian import Moments
from cap_llm.solvers.methods import Solver
from cap_llm.sparsity.pattern import Pattern

MEASURED = 16  # sequences for the layer errors of a method without a Hessian


@dataclass
class PrunedBlock:
    """The result of one block.

    Attributes:
        masks: [R, C] per pruned weight, by name.
        rows: one per pruned weight.
        seconds: time of the block.
        error: of the block's output, from a stage that trains it.
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
        model: any supported model, on any device.
        windows: calibration ids [N, T]; None for magnitude.
        config: method, pattern and `layers`; `earlier_mask` only affects the stage.

    Returns:
        The masks [R, C] by weight name, true where a weight is kept.

    Raises:
        UserError: the model is not supported, the pattern does not fit it, or `budget` is not
            uniform, which only the stage supports.
    """
    # a copy: fields that were assigned after construction are validated again
    config = dataclasses.replace(config) if config else OneshotConfig()
    if config.allocation != "uniform":
        raise UserError(
            f"oneshot.allocation {config.allocation!r} is not supported by prune(). "
            "Set oneshot.layers, or run the stage oneshot."
        )
    configs = (model.config, model.config.get_text_config())
    caches = [(c, c.use_cache) for c in configs if hasattr(c, "use_cache")]
    precision = torch.get_float32_matmul_precision()
    modes = [(m, m.training) for m in model.modules()]
    gradients = [(p, p.requires_grad) for p in model.parameters()]
    masks: dict[str, torch.Tensor] = {}
    try:
        torch.set_float32_matmul_precision("highest")  # no TF32 in Hessians and solvers
        blocks = BlockModel(model, model.device)
        if windows is None and config.uses_calibration:
            raise UserError(f"oneshot.method {config.method} needs calibration ids as `windows`.")
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
        for module, training in modes:
            module.training = training
        for p, requires_grad in gradients:
            p.requires_grad_(requires_grad)
        for c, use_cache in caches:
            c.use_cache = use_cache
    return masks


def plan_sparsities(model: BlockModel, settings: OneshotConfig) -> dict[str, float]:
    """Returns the sparsity per prunable weight: uniform, overridden by `settings.layers`.

    Raises:
        UserError: an entry of `layers` matches nothing, or the pattern does not fit a matrix.
    """
    plan = override(uniform(model, settings), settings)
    _check_shapes(model, plan, settings)
    return plan


def uniform(model: BlockModel, config: OneshotConfig) -> dict[str, float]:
    """Returns the same sparsity for every prunable weight, by name."""
    return {
        model.weight_name(i, linear): config.target_sparsity
        for i in range(len(model))
        for linear in model.linears(i)
    }


def override(plan: dict[str, float], settings: OneshotConfig) -> dict[str, float]:
    """Applies `oneshot.layers`; the last matching entry wins.

    Raises:
        UserError: an entry matches nothing, or nothing is left to prune.
    """
    for glob, sparsity in settings.layers.items():
        names = [n for n in plan if matches(n, glob)]
        if not names:
            raise UserError(
                f"oneshot.layers: {glob!r} matches no prunable matrix. An example of a name is "
                f"{next(iter(plan)).removesuffix('.weight')}."
            )
        plan = plan | dict.fromkeys(names, sparsity)
    if not any(plan.values()):
        raise UserError("oneshot.layers leaves every matrix dense, so nothing is left to prune.")
    return plan


def matches(name: str, glob: str) -> bool:
    """Returns whether an entry of `oneshot.layers` matches a weight."""
    return fnmatch.fnmatchcase(name.removesuffix(".weight"), glob)


def _check_shapes(model: BlockModel, plan: dict[str, float], settings: OneshotConfig) -> None:
    """Verifies that pattern and sparsity fit every matrix.

    Raises:
        UserError: one does not fit.
    """
    pattern = Pattern.parse(settings.pattern)
    for i in range(len(model)):
        for linear, module in model.linears(i).items():
            name = model.weight_name(i, linear)
            if not (sparsity := plan.get(name)):
                continue
            shape = matrix(module).shape
            pattern.check(name, shape)
            if not pattern.m and round(sparsity * shape.numel()) in (0, shape.numel()):
                amount = "no weight" if sparsity < 0.5 else "every weight"
                raise UserError(
                    f"Sparsity {sparsity} removes {amount} of {name} {list(shape)}. Use another "
                    "value, or exclude the matrix by --oneshot.layers."
                )


def prune_block(
    model: BlockModel,
    i: int,
    block: nn.Module,
    walk: Walk | None,
    config: OneshotConfig,
    sparsities: dict[str, float],
    world: World,
    allowed_mask: Callable[[str, torch.Tensor], torch.Tensor | None] = lambda name, weight: None,
    phase: Callable[[str], None] = lambda text: None,
    measure: bool = True,
) -> PrunedBlock:
    """Prunes block i and passes the walk's hidden states through it.

    Args:
        model: the model.
        i: index of the block.
        block: the block, with its weights; changed in place, rounded to the stored dtype.
        walk: at the input of the block; None if the method needs no calibration.
        config: method and pattern.
        sparsities: by weight name; 0 or absent: the weight remains dense.
        world: the ranks, which share the matrices of each input.
        allowed_mask: returns the mask [R, C] that a weight's new mask must be a subset of, or None.
        phase: called with a description of the current work.
        measure: compute layer errors even if the method needs no Hessian.

    Raises:
        UserError: activations overflow, or a Hessian is not positive definite.
    """
    start = time.monotonic()
    result = PrunedBlock({}, [], 0.0)
    linears = model.linears(i)
    full = config.second_order
    n_measured = _measured_tokens(walk, world) if walk and measure and not full else None

    def change(group: Group, inputs: Iterator[torch.Tensor]) -> None:
        names = [n for n in group.names if sparsities.get(model.weight_name(i, n))]
        phase(f"reading {group.short}")
        moments = Moments(group.columns, model.device, full)
        sample = None
        if n_measured is not None:
            sample = Moments(group.columns, model.device, max_tokens=n_measured)
        statistics = [m for m in (moments, sample) if m and names]
        for x in inputs:
            for m in statistics:
                m.add(x)
        if names:
            for m in statistics:
                m.merge(world)
                m.finish(f"{model.block_name(i)}.{names[0]}")
            phase(f"solving {group.short}")
            solve(names, moments, sample)

    def solve(names: list[str], moments: Moments | None, sample: Moments | None = None) -> None:
        name = f"{model.block_name(i)}.{names[0]}"
        solver = Solver(config, moments, name, sample=sample)

        def solve_one(name: str, dtype: torch.dtype) -> Solved:
            dense, full_name = matrix(linears[name]).float(), model.weight_name(i, name)
            allowed = _check_allowed(allowed_mask(full_name, dense), full_name)
            new, mask = solver(dense, sparsities[full_name], allowed)
            new = new.to(dtype)
            return Solved(new, mask, solver.error(dense, new.float()), solver.damping)

        solve_across_ranks(model, i, names, config.pattern, world, solve_one, result)

    with torch.no_grad():
        if walk:
            walk.visit(i, block, change)
        else:
            phase("solving")
            names = [n for n in linears if sparsities.get(model.weight_name(i, n))]
            if names:
                solve(names, None)
    result.seconds = time.monotonic() - start
    return result


def _measured_tokens(walk: Walk, world: World) -> int:
    """Counts this rank's tokens among the first `MEASURED` sequences of all ranks."""
    counts = world.gather(sum(len(ids) for ids in walk.ids))
    sequences = min(counts[world.rank], max(0, MEASURED - sum(counts[: world.rank])))
    return sequences * walk.ids[0].shape[1]


@dataclass
class Solved:
    """A solved matrix.

    Attributes:
        weight: [R, C], in the stored dtype.
        mask: [R, C].
        error: relative output error.
        damping: of the Hessian.
        kept: name of the selected candidate, from a stage with several.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    error: float | None
    damping: float | None
    kept: str | None = None


def solve_across_ranks(
    model: BlockModel,
    i: int,
    names: list[str],
    pattern: str,
    world: World,
    solve: Callable[[str, torch.dtype], Solved],
    result: PrunedBlock,
) -> None:
    """Solves matrices of block i, each on one rank, and broadcasts the results.

    Args:
        model: the model, whose block i receives the new weights.
        i: index of the block.
        names: of the linears within the block.
        pattern: for the rows.
        world: the ranks.
        solve: called with a name and the dtype of its stored weight; must round to that dtype, so
            that later layers see the stored weights.
        result: receives masks and rows.
    """
    linears = model.linears(i)
    owner = owners({name: linears[name].weight for name in names}, world)
    rows: dict[str, Row] = {}
    for name in names:
        full_name = model.weight_name(i, name)
        weight = matrix(linears[name])
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        if owner[name] == world.rank:
            start = time.monotonic()
            solved = solve(name, stored_dtype(model, full_name))
            mask = solved.mask.contiguous()  # as on the other ranks
            rows[name] = Row(
                full_name,
                list(weight.shape),
                pattern,
                int((solved.weight == 0).sum()),
                int((~mask).sum()),
                solved.error,
                solved.damping,
                round(time.monotonic() - start, 4),
                solved.kept,
            )
            weight.copy_(solved.weight)
        contiguous = weight.contiguous()  # Conv1D stores the transpose
        weight.copy_(world.broadcast(contiguous, owner[name]))
        result.masks[full_name] = world.broadcast(mask, owner[name]).cpu()
    all_rows = {name: row for part in world.gather(rows) for name, row in part.items()}
    result.rows += [all_rows[name] for name in names]


def record_unchanged(
    model: BlockModel,
    i: int,
    masks: dict[str, torch.Tensor],
    result: PrunedBlock,
    patterns: dict[str, str] | None = None,
    seconds: float = 0.0,
) -> None:
    """Records the masks of linears that a stage leaves unchanged, so that later stages keep them.

    Args:
        model: the model.
        i: index of the block.
        masks: [R, C], by the linear's name within the block.
        result: receives masks and rows.
        patterns: pattern names by weight name.
        seconds: for each row.
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
    """Assigns each matrix to a rank: the largest first, each to the least loaded rank."""
    load = [0] * world.size
    owner = {}
    for name in sorted(weights, key=lambda n: -weights[n].numel()):
        owner[name] = load.index(min(load))
        load[owner[name]] += weights[name].numel()
    return owner


def _check_allowed(allowed: torch.Tensor | None, name: str) -> torch.Tensor | None:
    if allowed is not None and not bool(allowed.any()):
        raise UserError(
            f"The existing mask of {name} keeps no weight. Exclude the matrix by "
            "--oneshot.layers, or set --oneshot.initial_mask ignore."
        )
    return allowed

"""The stage `oneshot`: from a model directory to a pruned, verified one, a block at a time.

What went before an unfinished block is only run forward, with the weights as written, which gives
the same activations bit for bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from cap_llm.blockwise import owl
from cap_llm.blockwise.estimate import streaming_cost
from cap_llm.blockwise.perplexity import head_nll
from cap_llm.blockwise.prune import (
    PrunedBlock,
    matches,
    plan_sparsities,
    prune_block,
    record_unchanged,
)
from cap_llm.blockwise.stage import BlockStage
from cap_llm.blockwise.walk import Walk
from cap_llm.config import CalibrationConfig, OneshotConfig
from cap_llm.models.blocks import BlockModel
from cap_llm.models.directory import ModelDirectory
from cap_llm.models.masks import PRUNED
from cap_llm.models.skeleton import matrix
from cap_llm.runtime.console import format_bytes
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import read_json, write_json
from cap_llm.runtime.memory import Memory
from cap_llm.runtime.world import World
from cap_llm.sparsity.pattern import Pattern
from cap_llm.stages import Cost, Inputs, Preview
from cap_llm.text.reading import Calibration

STAGE = "oneshot"
_NAMES = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "admm_grad": "ADMM-grad", "alps": "ALPS"}


def check(preview: Preview, oneshot: OneshotConfig, **_) -> None:
    """Checks that pattern, sparsity and existing masks fit the model."""
    plan = plan_sparsities(preview.model, oneshot)
    if oneshot.allocation == "uniform":
        earlier_mask(preview.folder, oneshot, plan)


def cost(
    preview: Preview, oneshot: OneshotConfig, calibration: CalibrationConfig | None = None
) -> Cost:
    """The cost of the stage."""
    if not calibration:
        return streaming_cost(preview, 0, 0)
    walks = 4 if oneshot.allocation == "owl" else 1  # OWL and its guard need three more
    return streaming_cost(
        preview,
        calibration.sequences * calibration.length,
        calibration.length,
        passes=walks,
        walks=walks,
        solver=(6, 8) if oneshot.method in ("alps", "admm_grad") else (3, 4),
        solving=2 + 100 * oneshot.refits,
    )


def run(
    inputs: Inputs,
    oneshot: OneshotConfig,
    calibration: Calibration | None = None,
    name: str = STAGE,
) -> ModelDirectory:
    """Prunes the model `inputs.start`.

    Args:
        inputs: the model, and the recipe of the result.
        oneshot: method, pattern and sparsity.
        calibration: the calibration text; None if the method needs none.
        name: folder of the result in the run directory.

    Returns:
        The directory of the pruned model.

    Raises:
        UserError: a setting or an input is invalid. Finished blocks remain on disk.
    """
    source, settings, run, world = inputs.start, oneshot, inputs.run, inputs.run.world
    work = BlockStage(name, inputs.recipe, run, source)
    if work.done:
        return work.result
    work.begin(calibration)
    model = work.model
    plan, budget = plan_sparsities(model, settings), "uniform"
    windows = calibration.ids if calibration else None
    if settings.allocation == "owl":
        gone = source.masks(world).shares if _grows(source, settings) else {}
        plan, budget = _owl(work, plan, gone, windows, settings)
    earlier = earlier_mask(source, settings, plan)
    with work.work() as (bar, scratch):
        walk = None
        if windows is not None and len(work.finished) < len(model):
            bar.phase("embedding")
            mine = windows[list(world.shard(len(windows)))]
            memory = Memory.plan(model.device, world.activation_gib)
            walk = Walk(model, mine, memory, scratch)
        model.drop_outside()
        for i in range(len(model)):
            if i in work.finished and not walk:
                bar.advance()
                continue
            with model.block(i) as block:
                if i in work.finished:
                    bar.phase("replaying a finished block")
                    work.load(i, block)
                    walk.forward(i, block)
                    bar.advance()
                    continue
                result = prune_block(
                    model, i, block, walk, settings, plan, world, earlier, bar.phase
                )
                record_unchanged(model, i, _left(model, i, result, earlier, settings), result)
                bar.phase("writing")
                if world.is_main:
                    weights = {r.name: model.model.get_parameter(r.name) for r in result.rows}
                    work.write(i, weights, result)
            world.barrier()
            work.report(i, result)
            bar.advance()
        if walk and walk.hidden.spilled:
            run.console.say(
                f"oneshot: {format_bytes(walk.hidden.spilled)} of activations went to disk"
            )
    return work.finish(label(settings), allocation=budget)


def label(settings: OneshotConfig) -> tuple[str, str]:
    """Method and amount of a result, for reports."""
    method = _NAMES.get(settings.method, settings.method)
    if settings.pattern == "row" and settings.method != "wanda":  # which always prunes by row
        method += " by row"
    method += " + refit" * settings.refit + " + OWL" * (settings.allocation == "owl")
    if settings.layers:
        return f"{method} by layer", ""
    fixed = ":" in settings.pattern
    return method, settings.pattern if fixed else f"{100 * settings.target_sparsity:g}%"


def _left(
    model: BlockModel,
    i: int,
    result: PrunedBlock,
    earlier: Callable[[str, torch.Tensor], torch.Tensor | None],
    settings: OneshotConfig,
) -> dict[str, torch.Tensor]:
    """The earlier masks [R, C] of block i's linears that this prune leaves as they are."""
    least = PRUNED if settings.initial_mask == "zeros" else 0.0
    masks = {}
    for n, linear in model.linears(i).items():
        name = model.weight_name(i, n)
        inside = None if name in result.masks else earlier(name, matrix(linear))
        if inside is not None and 1 - inside.float().mean().item() >= least:
            masks[n] = inside
    return masks


def _owl(
    work: BlockStage,
    plan: dict[str, float],
    gone: dict[str, float],
    windows: torch.Tensor,
    oneshot: OneshotConfig,
) -> tuple[dict[str, float], str]:
    """The uneven plan, if it beats the even one on held-out text; computed once and kept.

    Neither brings back what is `gone` by an earlier mask. The second value says which it is.
    """
    model, run, world = work.model, work.run, work.run.world
    path = work.folder / "owl.json"
    known = path.exists() and read_json(path, lambda c: (dict(c["sparsity"]), c["allocation"]))
    if known := run.world.gather(known)[0]:
        return known
    settings = oneshot.owl
    guard = min(settings.guard_sequences, len(windows) // 2)
    if guard and not model.is_causal:
        raise UserError(
            f"{type(model.model).__name__} has no perplexity for OWL's guard to compare; set "
            "--oneshot.owl.guard_sequences 0"
        )
    if len(windows) - guard < run.world.size:
        raise UserError(
            f"calibration.sequences is {len(windows)}; OWL's guard leaves {len(windows) - guard} "
            f"for {run.world.size} ranks: give more, or a smaller --oneshot.owl.guard_sequences"
        )
    held_out, seen = windows[:guard], windows[guard:]
    named = {n for w in oneshot.layers for n in plan if matches(n, w)}
    with tempfile.TemporaryDirectory(dir=run.path, prefix=".scratch-") as scratch:
        mine = seen[list(run.world.shard(len(seen)))]
        with run.console.bar("OWL", len(model), "blocks") as bar:
            memory = Memory.plan(model.device, world.activation_gib)
            walk = Walk(model, mine, memory, Path(scratch))
            shares = owl.outlier_shares(model, walk, settings.threshold, run.world, bar.advance)
        uneven = plan | _owl_sparsities(model, named, shares, gone, oneshot)
        even = plan | _owl_sparsities(model, named, [0.0] * len(shares), gone, oneshot)
        record = {"outlier_percent": shares, "sparsity": uneven, "allocation": "owl"}
        if guard:
            nll = {}
            for name, candidate in (("uniform", even), ("owl", uneven)):
                with run.console.bar(f"OWL guard, {name}", len(model), "blocks") as bar:
                    proxy = OneshotConfig(method="wanda", pattern=oneshot.pattern, sparsity=0.5)
                    nll[name] = _proxy_nll(
                        model, candidate, proxy, seen, held_out, world, Path(scratch), bar.advance
                    )
            record |= {"guard_nll": nll, "guard_sequences": guard}
            if nll["owl"] >= nll["uniform"]:
                record |= {"sparsity": even, "allocation": "uniform"}
            run.console.say(
                f"OWL guard: held-out loss {nll['owl']:.4f} against {nll['uniform']:.4f} uniform; "
                f"{'OWL' if record['allocation'] == 'owl' else 'uniform'} is used"
            )
    run.bind(work.folder, work.recipe)
    if run.world.is_main:
        write_json(path, record)
    run.world.barrier()
    return record["sparsity"], record["allocation"]


def _owl_sparsities(
    model: BlockModel,
    named: set[str],
    shares: list[float],
    gone: dict[str, float],
    settings: OneshotConfig,
) -> dict[str, float]:
    """The sparsity of each weight that is not named by hand; their mean is the one asked for."""
    left = []  # names and sizes, of the blocks where there are any
    for i, share in enumerate(shares):
        names = {model.weight_name(i, n): m for n, m in model.linears(i).items()}
        names = {n: matrix(m).numel() for n, m in names.items() if n not in named}
        left += [(share, names)] if names else []
    if not left:
        return {}
    sizes = [sum(names.values()) for _, names in left]
    least = [max(gone.get(n, 0.0) for n in names) for _, names in left]
    chosen = owl.allocate(
        [s for s, _ in left], sizes, settings.target_sparsity, settings.owl, least
    )
    pairs = zip(left, chosen, strict=True)
    return {n: round(s, 6) for (_, names), s in pairs for n in names}


def _grows(source: ModelDirectory, settings: OneshotConfig) -> bool:
    """Whether the new masks must lie inside those of `source`."""
    has_file = settings.initial_mask == "auto" and source.mask_file is not None
    return has_file or settings.initial_mask == "zeros"


def _proxy_nll(
    model: BlockModel,
    plan: dict[str, float],
    settings: OneshotConfig,
    seen: torch.Tensor,
    held_out: torch.Tensor,
    world: World,
    scratch: Path,
    advance: Callable[[], None],
) -> float:
    """Mean loss a token of the model pruned by Wanda to `plan`, on held-out ids [N, T]."""
    memory = Memory.plan(model.device, world.activation_gib, parts=2)
    walk = Walk(model, seen[list(world.shard(len(seen)))], memory, scratch)
    mine = held_out[list(world.shard(len(held_out)))]
    scored = Walk(model, mine, memory, scratch) if len(mine) else None
    for i in range(len(model)):
        with model.block(i) as block:
            prune_block(model, i, block, walk, settings, plan, world, measure=False)
            if scored:
                scored.forward(i, block)
        advance()
    return head_nll(model, scored, world) / (held_out.shape[0] * (held_out.shape[1] - 1))


def earlier_mask(
    source: ModelDirectory, settings: OneshotConfig, plan: dict[str, float]
) -> Callable[[str, torch.Tensor], torch.Tensor | None]:
    """Where the earlier mask of a weight comes from.

    Raises:
        UserError: a matrix has more zeros than `plan` asks for; at once where `sparsity.json` says
            so, else when its turn comes.
    """
    masks = source.mask_file if settings.initial_mask == "auto" else None
    pattern = Pattern.parse(settings.pattern)
    for name in masks.columns.keys() - plan.keys() if masks else ():
        raise UserError(
            f"{masks.path} contains a mask for {name}, which is not a linear layer in the model's "
            "blocks. It belongs to another model: remove the file."
        )

    def refuse_more(name: str, zeros: float) -> None:
        asked = plan.get(name) or 1  # what is left as it is may be sparse
        if not pattern.m and round(zeros, 6) > asked + 1e-3:
            raise UserError(
                f"{name} is {100 * zeros:.1f} % zeros already and {100 * asked:g} % are asked "
                "for; masks only grow: ask for more, or set --oneshot.initial_mask ignore"
            )

    for row in source.rows if masks else ():
        refuse_more(row.name, row.sparsity)

    def earlier(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        if settings.initial_mask == "zeros":
            inside = weight != 0
        elif masks and name in masks:
            inside = masks.read(name).to(weight.device)
            if inside.shape != weight.shape:
                raise UserError(
                    f"The mask of {name} in {masks.path} has shape {list(inside.shape)}, but the "
                    f"weight has {list(weight.shape)}. Remove the file of another model."
                )
        else:
            return None
        refuse_more(name, 1 - inside.float().mean().item())
        return inside

    return earlier

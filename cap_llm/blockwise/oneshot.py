"""The stage `oneshot`: from a model directory to a pruned, verified one, a block at a time.

Each finished block is durable: its shard of the model, its masks and its rows lie in the folder, so
that a killed job goes on at the first block that is not there. What went before is then only run
forward, with the weights as written, which gives the same activations bit for bit.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from cap_llm.blockwise import owl
from cap_llm.blockwise.perplexity import head_nll
from cap_llm.blockwise.prune import PrunedBlock, Row, matches, plan_sparsities, prune_block
from cap_llm.blockwise.walk import Walk
from cap_llm.config import Config, OneshotConfig
from cap_llm.models.blocks import BlockModel, match_names, skeleton
from cap_llm.models.checkpoint import Checkpoint, ShardWriter
from cap_llm.runtime.console import duration, size
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import read_json, write_json
from cap_llm.runtime.rundir import Run, peak_memory
from cap_llm.sparsity import masks as mask_files
from cap_llm.sparsity.patterns import Pattern
from cap_llm.text.reading import Texts

STAGE = "oneshot"


def oneshot(source: Path, texts: Texts, config: Config, run: Run, stage: str = STAGE) -> Path:
    """Prunes the model of directory `source`.

    Args:
        source: a directory of safetensors.
        texts: with the calibration ids, where the method reads any.
        config: the run's settings.
        run: the run directory.
        stage: its folder in the run directory.

    Returns:
        The directory of the pruned model.

    Raises:
        UserError: see the messages; whatever is finished is kept.
    """
    world = run.world
    recipe = config.recipe(STAGE)
    folder, done = run.stage(stage, recipe)
    parts = folder / "blocks"
    if done:
        if world.first:
            shutil.rmtree(parts, ignore_errors=True)  # if it was killed before it could
        run.console.say(f"oneshot: done already, in {folder}")
        return folder
    start = time.monotonic()
    settings = config.oneshot
    model = BlockModel.open(source, world.device)
    plan = plan_sparsities(model, settings)
    windows = texts.calibration
    if windows is not None and len(windows) < world.size:
        raise UserError(
            f"calibration.sequences is {len(windows)}, fewer than the {world.size} ranks; "
            "give at least one sequence a rank"
        )
    if world.first:
        parts.mkdir(parents=True, exist_ok=True)
        sweep(folder, parts)
        _refuse_other_text(folder, texts)
    world.barrier()
    if settings.budget == "owl":
        plan = _owl(model, plan, windows, config, run, folder)
    earlier = _earlier_mask(source, settings, plan)
    writer = ShardWriter(folder, len(model))
    # the first rank's view counts, as for `done`
    finished = world.gather(_finished(parts, writer, len(model)))[0]
    if finished:
        run.console.say(f"oneshot: going on at block {finished + 1} of {len(model)}")
    with (
        tempfile.TemporaryDirectory(dir=run.path, prefix=".scratch-") as scratch,
        run.console.bar("oneshot", len(model), "blocks") as bar,
    ):
        walk = None
        if windows is not None and finished < len(model):
            bar.phase("embedding")
            mine = windows[list(world.share(len(windows)))]
            walk = Walk(model, mine, activation_bytes(config), Path(scratch))
        model.drop_outside()
        for i in range(len(model)):
            if i < finished and not walk:
                bar.advance()
                continue
            with model.block(i) as block:
                if i < finished:
                    bar.phase("passing a finished block")
                    _load_pruned(model, i, block, writer.path(i))
                    walk.forward(i, block)
                    bar.advance()
                    continue
                result = prune_block(
                    model, i, block, walk, settings, plan, world, earlier, bar.phase
                )
                bar.phase("writing")
                run.bind(folder, recipe)
                if world.first:
                    _write_block(model, i, block, result, writer, parts)
            world.barrier()
            _report_block(run, i, len(model), result)
            bar.advance()
        if walk and walk.hidden.spilled:
            run.console.say(f"oneshot: {size(walk.hidden.spilled)} of activations went to disk")
    peak = max(world.gather(peak_memory()))
    if world.first:
        _finish(model, source, folder, parts, writer, run)
    seconds = time.monotonic() - start
    seconds += sum(read_json(_row_file(parts, i))["seconds"] for i in range(finished))
    summary = {
        "seconds": round(seconds, 2),
        "resumed_at_block": finished,
        "peak_memory_bytes": peak,
        "calibration": texts.origin,
        "budget": "owl" if plan != plan_sparsities(model, settings) else "uniform",
    }
    if world.device.type == "cuda":
        summary["peak_cuda_bytes"] = torch.cuda.max_memory_allocated(world.device)
    run.finish_stage(folder, summary)
    if world.first:
        shutil.rmtree(parts)
    run.console.say(f"oneshot: done in {duration(seconds)}, {size(peak)} at most, in {folder}")
    return folder


def activation_bytes(config: Config) -> int | None:
    """Bytes for activations as configured; None: decide when the work starts."""
    gib = config.runtime.activation_gib
    return None if gib is None else int(gib * 2**30)


def sweep(folder: Path, parts: Path) -> None:
    """Removes what a killed writer left half-written."""
    for place in (folder, parts):
        for path in place.glob(".*.tmp"):
            path.unlink()


def _owl(
    model: BlockModel,
    plan: dict[str, float],
    windows: torch.Tensor,
    config: Config,
    run: Run,
    folder: Path,
) -> dict[str, float]:
    """The uneven plan, if it beats the even one on held-out text; computed once and kept."""
    path = folder / "owl.json"
    known = run.world.gather(read_json(path) if path.exists() else None)[0]
    if known:
        return known["sparsity"]
    settings = config.oneshot.owl
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
    named = {n for w in config.oneshot.layers for n in plan if matches(n, w)}
    uneven = dict(plan)
    with tempfile.TemporaryDirectory(dir=run.path, prefix=".scratch-") as scratch:
        mine = seen[list(run.world.share(len(seen)))]
        with run.console.bar("OWL", len(model), "blocks") as bar:
            walk = Walk(model, mine, activation_bytes(config), Path(scratch))
            shares = owl.outlier_shares(model, walk, settings.threshold, run.world, bar.advance)
        names = [[model.weight_name(i, n) for n in model.linears(i)] for i in range(len(model))]
        sizes = [
            sum(m.weight.numel() for m in model.linears(i).values()) for i in range(len(model))
        ]
        for i, s in enumerate(owl.allocate(shares, sizes, config.oneshot.amount, settings)):
            uneven |= dict.fromkeys([n for n in names[i] if n not in named], round(s, 6))
        record = {"outlier_percent": shares, "sparsity": uneven}
        if guard:
            nll = {}
            for name, candidate in (("uniform", plan), ("owl", uneven)):
                with run.console.bar(f"OWL guard, {name}", len(model), "blocks") as bar:
                    nll[name] = _proxy_nll(
                        model, candidate, seen, held_out, config, run, Path(scratch), bar.advance
                    )
            record |= {"guard_nll": nll, "guard_sequences": guard}
            better = nll["owl"] < nll["uniform"]
            record["sparsity"] = uneven if better else plan
            run.console.say(
                f"OWL guard: held-out loss {nll['owl']:.4f} against {nll['uniform']:.4f} uniform; "
                f"{'OWL' if better else 'uniform'} is used"
            )
    run.bind(folder, config.recipe(STAGE))
    if run.world.first:
        write_json(path, record)
    run.world.barrier()
    return record["sparsity"]


def _proxy_nll(
    model: BlockModel,
    plan: dict[str, float],
    seen: torch.Tensor,
    held_out: torch.Tensor,
    config: Config,
    run: Run,
    scratch: Path,
    advance: Callable[[], None],
) -> float:
    """Mean loss a token of the model pruned by Wanda to `plan`, on held-out ids [N, T]."""
    settings = OneshotConfig(method="wanda", pattern=config.oneshot.pattern, sparsity=0.5)
    world, memory = run.world, activation_bytes(config)
    memory = None if memory is None else memory // 2  # for two walks at once
    walk = Walk(model, seen[list(world.share(len(seen)))], memory, scratch)
    mine = held_out[list(world.share(len(held_out)))]
    scored = Walk(model, mine, memory, scratch) if len(mine) else None
    for i in range(len(model)):
        with model.block(i) as block:
            prune_block(model, i, block, walk, settings, plan, world, measure=False)
            if scored:
                scored.forward(i, block)
        advance()
    return head_nll(model, scored, world) / (held_out.shape[0] * (held_out.shape[1] - 1))


def _earlier_mask(
    source: Path, settings: OneshotConfig, plan: dict[str, float]
) -> Callable[[str, torch.Tensor], torch.Tensor | None]:
    """Where the earlier mask of a weight comes from."""
    file = source / mask_files.FILE
    masks = mask_files.MaskFile(file) if settings.earlier_mask == "auto" and file.exists() else None
    pattern = Pattern.parse(settings.pattern)

    def earlier(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        if settings.earlier_mask == "zeros":
            inside = weight != 0
        elif masks and name in masks:
            inside = masks.read(name).to(weight.device)
        else:
            return None
        zeros = 1 - inside.float().mean().item()
        if not pattern.m and round(zeros, 6) > plan[name] + 1e-3:
            raise UserError(
                f"{name} is {100 * zeros:.1f} % zeros already and {100 * plan[name]:g} % are asked "
                "for; masks only grow: ask for more, or set --oneshot.earlier_mask ignore"
            )
        return inside

    return earlier


def _refuse_other_text(folder: Path, texts: Texts) -> None:
    """Holds the calibration ids against those that the finished blocks were made with."""
    path = folder / "calibration.json"
    record = {"ids_sha256": texts.calibration_digest}
    begun = path.exists() and (folder / "recipe.json").exists()
    if begun and read_json(path) != record:
        raise UserError(
            f"the calibration text or tokenizer has changed since {folder} was begun; bring it "
            "back, or choose another output_dir"
        )
    write_json(path, record)


def _finished(parts: Path, writer: ShardWriter, n_blocks: int) -> int:
    """How many blocks, from the first on, are wholly there; the row file is written last."""
    for i in range(n_blocks):
        if not (_row_file(parts, i).exists() and writer.path(i).exists()):
            return i
    return n_blocks


def _row_file(parts: Path, i: int) -> Path:
    return parts / f"{i:05d}.json"


def _mask_file(parts: Path, i: int) -> Path:
    return parts / f"{i:05d}.safetensors"


def _load_pruned(model: BlockModel, i: int, block, shard: Path) -> None:
    stored = load_file(shard)
    for linear, module in model.linears(i).items():
        weight = stored[model.key(model.weight_name(i, linear))]
        module.weight.data.copy_(weight)


def _write_block(
    model: BlockModel,
    i: int,
    block,
    result: PrunedBlock,
    writer: ShardWriter,
    parts: Path,
) -> None:
    tensors = model.checkpoint.read(model.block_keys(i))
    linears = model.linears(i)
    for row in result.rows:
        key = model.key(row.name)
        linear = row.name.removeprefix(model.block_name(i) + ".").removesuffix(".weight")
        tensors[key] = linears[linear].weight.data.to(tensors[key].dtype)
    writer.write(i, tensors)
    if result.masks:
        mask_files.save_masks(result.masks, _mask_file(parts, i))
    write_json(
        _row_file(parts, i),
        {"seconds": round(result.seconds, 3), "rows": [asdict(r) for r in result.rows]},
    )


def _kind(name: str) -> str:
    """A weight's place in its block: `mlp.up_proj` of `model.layers.3.mlp.up_proj.weight`."""
    return re.sub(r"^.*?\.\d+\.", "", name).removesuffix(".weight")


def _report_block(run: Run, i: int, n_blocks: int, result: PrunedBlock) -> None:
    if not result.rows:
        run.console.say(f"block {i + 1:>3}/{n_blocks}  {result.seconds:6.1f} s  left dense")
        return
    weights = sum(r.shape[0] * r.shape[1] for r in result.rows)
    sparsity = sum(r.zeros for r in result.rows) / weights
    text = f"block {i + 1:>3}/{n_blocks}  {result.seconds:6.1f} s  sparsity {sparsity:.4f}"
    values = {"sparsity": sparsity, "seconds": result.seconds, "blocks": n_blocks}
    errors = {_kind(r.name): r.error for r in result.rows if r.error is not None}
    if errors:
        mean = sum(errors.values()) / len(errors)
        worst = max(errors, key=errors.get)
        text += f"  error {mean:.4f} (worst {worst} {errors[worst]:.4f})"
        values["error"] = mean
    damping = {r.damping for r in result.rows if r.damping is not None}
    if damping:
        text += f"  damping {max(damping):g}"
        values["damping"] = max(damping)
    run.console.say(text)
    run.metric(STAGE, i + 1, values)


def _finish(
    model: BlockModel, source: Path, folder: Path, parts: Path, writer: ShardWriter, run: Run
) -> None:
    """Writes what lies outside the blocks, joins the parts, and verifies the whole."""
    n_blocks = len(model)
    inside = {key for i in range(n_blocks) for key in model.block_keys(i)}
    outside = [key for key in model.checkpoint.names() if key not in inside]
    writer.write(None, model.checkpoint.read(outside))
    writer.finish(source)
    mask_files.join(sorted(parts.glob("*.safetensors")), folder / mask_files.FILE)
    rows = [Row(**r) for i in range(n_blocks) for r in read_json(_row_file(parts, i))["rows"]]
    total = verify(folder, rows)
    pruned, zeros, n_weights = write_sparsity(folder, source.name, rows, total)
    by_kind: dict[str, list[Row]] = {}
    for row in rows:
        by_kind.setdefault(_kind(row.name), []).append(row)
    table = []
    for kind, group in by_kind.items():
        weights = sum(r.shape[0] * r.shape[1] for r in group)
        errors = [r.error for r in group if r.error is not None]
        shapes = {"x".join(map(str, r.shape)) for r in group}
        table.append(
            [
                kind,
                str(len(group)),
                ", ".join(sorted(shapes)),
                f"{sum(r.zeros for r in group) / weights:.4f}",
                f"{sum(errors) / len(errors):.4f}" if errors else "-",
                f"{max(errors):.4f}" if errors else "-",
                f"{sum(r.seconds for r in group):.1f}",
            ]
        )
    columns = ["matrix", "count", "shape", "sparsity", "mean error", "worst", "solver s"]
    run.console.table("pruned matrices", columns, table)
    run.console.say(
        f"verified: {zeros:,} zeros in {pruned:,} pruned weights ({100 * zeros / pruned:.2f} %), "
        f"{100 * total / n_weights:.2f} % of the whole model"
    )


def write_sparsity(
    folder: Path, model: str, rows: list[Row], total_zeros: int
) -> tuple[int, int, int]:
    """Writes `sparsity.json` of a model directory.

    Returns:
        Pruned weights, zeros among them, and weights of the whole model.
    """
    pruned = sum(r.shape[0] * r.shape[1] for r in rows)
    zeros = sum(r.zeros for r in rows)
    checkpoint = Checkpoint(folder)
    n_weights = sum(torch.Size(checkpoint.shape(k)).numel() for k in checkpoint.names())
    write_json(
        folder / "sparsity.json",
        {
            "model": model,
            "rows": [asdict(r) for r in rows],
            "pruned_matrices": {
                "count": len(rows),
                "weights": pruned,
                "zeros": zeros,
                "sparsity": zeros / max(1, pruned),
            },
            "whole_model": {
                "weights": n_weights,
                "zeros": total_zeros,
                "sparsity": total_zeros / n_weights,
            },
        },
    )
    return pruned, zeros, n_weights


def verify(folder: Path, rows: list[Row]) -> int:
    """Reloads a written model and holds it against its masks and its skeleton.

    Returns:
        The zeros in the whole model.

    Raises:
        UserError: a masked weight is not zero, or a count differs.
    """
    checkpoint = Checkpoint(folder)
    model = skeleton(folder)
    keys = match_names(model, checkpoint)  # every parameter is there, with its shape
    masks = mask_files.MaskFile(folder / mask_files.FILE)
    by_key = {keys[r.name]: r for r in rows}
    total = 0
    for key in checkpoint.names():
        (tensor,) = checkpoint.read([key]).values()
        zeros = int((tensor == 0).sum())
        total += zeros
        row = by_key.get(key)
        if row is None:
            continue
        mask = masks.read(row.name)
        transposed = isinstance(model.get_submodule(row.name.removesuffix(".weight")), Conv1D)
        weight = tensor.T if transposed else tensor
        if zeros != row.zeros or bool((weight[~mask] != 0).any()):
            raise UserError(
                f"{row.name} in {folder} has {zeros} zeros, {row.zeros} were made; the file was "
                "changed or the disk is failing: remove the folder and run again"
            )
    return total

"""From an engine back to a plain model directory, at any ZeRO stage, a block at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from cap_llm.blockwise.prune import Row
from cap_llm.blockwise.stage import BY_CHANCE, verify, write_sparsity
from cap_llm.models.blocks import find_blocks, match_names, skeleton
from cap_llm.models.checkpoint import Checkpoint, ShardWriter
from cap_llm.recovery.engines import gathered
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import read_json, write_json
from cap_llm.runtime.world import World
from cap_llm.sparsity import masks as mask_files


def export(engine, source: Path, folder: Path, pruned: bool, world: World) -> None:
    """Writes the trained model as safetensors, its masks and `sparsity.json`, and verifies them.

    All ranks take part; under ZeRO-3 one block is whole at a time. Weights are stored in the type
    that the engine computes in.

    Args:
        engine: its module holds the model.
        source: directory that the model was loaded from: its configuration, tokenizer and names.
        folder: to write to.
        pruned: whether the source's masks hold; a fine-tuned model has none.
        world: the ranks.

    Raises:
        UserError: a masked weight is not zero in the written file, or the disk is full.
    """
    model = engine.module.model
    checkpoint = Checkpoint(source)
    keys = match_names(skeleton(source), checkpoint)
    prefix, blocks = find_blocks(model)
    writer = ShardWriter(folder, len(blocks))
    parameters = dict(model.named_parameters())
    inside = tuple(f"{prefix}.{i}." for i in range(len(blocks)))
    zeros: dict[str, int] = {}
    if world.first:
        folder.mkdir(parents=True, exist_ok=True)
    world.barrier()
    masks, rows = masks_and_rows(source) if pruned and world.first else ({}, [])
    by_name = {row.name: row for row in rows}
    for block in [None, *range(len(blocks))]:
        start = inside if block is None else inside[block]
        names = [n for n in keys if n.startswith(start) == (block is not None)]
        present = [n for n in names if n in parameters]
        dtype = parameters[present[0]].dtype if present else torch.float32
        with gathered(parameters[n] for n in present):
            if world.first:
                tensors = {keys[n]: parameters[n].detach().to("cpu", copy=True) for n in present}
        if world.first:
            buffers = checkpoint.read(keys[n] for n in names if n not in parameters)
            writer.write(block, tensors | {k: _cast(b, dtype) for k, b in buffers.items()})
            zeros |= {n: int((tensors[keys[n]] == 0).sum()) for n in present if n in by_name}
        world.barrier()
    if world.first:
        writer.finish(source)
        content = read_json(folder / "config.json")
        content.pop("torch_dtype", None)
        write_json(folder / "config.json", content | {"dtype": str(dtype).removeprefix("torch.")})
        mask_files.save_masks(masks, folder / mask_files.FILE)
        for row in rows:
            row.zeros, row.error, row.damping, row.seconds = zeros[row.name], None, None, 0.0
        write_sparsity(folder, source.name, rows, verify(folder, rows))
    world.barrier()


def masks_and_rows(folder: Path) -> tuple[dict[str, torch.Tensor], list[Row]]:
    """The masks [R, C] of a pruned model directory, and its rows.

    They come from `masks.safetensors`, or from the zeros of the matrices where there is none: a
    matrix outside the blocks, or with fewer zeros than chance makes, has no mask. A dense model
    gives none.

    Raises:
        UserError: a masked weight is not zero.
    """
    checkpoint = Checkpoint(folder)
    model = skeleton(folder)
    keys = match_names(model, checkpoint)
    file = folder / mask_files.FILE
    known = mask_files.MaskFile(file) if file.exists() else None
    patterns = {}
    if (folder / "sparsity.json").exists():
        patterns = {r["name"]: r["pattern"] for r in read_json(folder / "sparsity.json")["rows"]}
    prefix, _ = find_blocks(model)
    masks, rows = {}, []
    for module_name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | Conv1D):
            continue
        name = f"{module_name}.weight"
        if not name.startswith(prefix + ".") or (known and name not in known):
            continue
        (weight,) = checkpoint.read([keys[name]]).values()
        weight = weight.T if isinstance(module, Conv1D) else weight
        mask = known.read(name) if known else weight != 0
        if not known and (~mask).sum() < BY_CHANCE * mask.numel():
            continue
        stray = int((weight[~mask] != 0).sum())
        if stray:
            raise UserError(
                f"{name} in {folder} has {stray} weights that are not zero where its mask says so; "
                "the weights were changed after pruning: prune again, or remove masks.safetensors "
                "to take the zeros as they are"
            )
        masks[name] = mask
        zeros, masked = int((weight == 0).sum()), int((~mask).sum())
        pattern = patterns.get(name, "as found")
        rows.append(Row(name, list(mask.shape), pattern, zeros, masked, None, None, 0.0))
    return masks, rows


def in_parameter_shape(masks: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Masks [R, C] as their parameters lie: `Conv1D` stores the transpose."""
    modules = skeleton(folder).named_modules()
    transposed = {f"{name}.weight" for name, m in modules if isinstance(m, Conv1D)}
    return {name: mask.T if name in transposed else mask for name, mask in masks.items()}


def _cast(buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return buffer.to(dtype) if buffer.is_floating_point() else buffer

"""From an engine back to a plain model directory, at any ZeRO stage, a block at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from cap_llm.blockwise.prune import Row
from cap_llm.blockwise.stage import verify, write_sparsity
from cap_llm.models.blocks import find_blocks, match_names, skeleton
from cap_llm.models.checkpoint import Checkpoint, ShardWriter
from cap_llm.models.masks import patterns
from cap_llm.recovery.engines import gathered
from cap_llm.runtime.files import read_json, write_json
from cap_llm.runtime.world import World
from cap_llm.sparsity import masks as mask_files


def export(
    engine, source: Path, folder: Path, masks: Mapping[str, torch.Tensor], world: World
) -> None:
    """Writes the trained model as safetensors, its masks and `sparsity.json`, and verifies them.

    All ranks take part; under ZeRO-3 one block is whole at a time. Weights are stored in the type
    that the engine computes in.

    Args:
        engine: its module holds the model.
        source: directory that the model was loaded from: its configuration, tokenizer and names.
        folder: to write to.
        masks: [R, C] by weight name, the source's; a fine-tuned model has none.
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
    masked = set(masks)
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
            zeros |= {n: int((tensors[keys[n]] == 0).sum()) for n in present if n in masked}
        world.barrier()
    if world.first:
        writer.finish(source)
        content = read_json(folder / "config.json")
        content.pop("torch_dtype", None)
        write_json(folder / "config.json", content | {"dtype": str(dtype).removeprefix("torch.")})
        mask_files.save_masks(masks, folder / mask_files.FILE)
        asked, rows = patterns(source), []
        for name, mask in masks.items():
            shape, n_masked = list(mask.shape), int((~mask).sum())
            pattern = asked.get(name, "as found")
            rows.append(Row(name, shape, pattern, zeros[name], n_masked, None, None, 0.0))
        write_sparsity(folder, source.name, rows, verify(folder, rows))
    world.barrier()


def _cast(buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return buffer.to(dtype) if buffer.is_floating_point() else buffer

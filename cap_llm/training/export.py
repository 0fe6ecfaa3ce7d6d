"""From an engine back to a plain model directory, at any ZeRO stage, a block at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from cap_llm.models.checkpoint import Checkpoint, ShardWriter
from cap_llm.models.directory import ModelDirectory, Row
from cap_llm.models.mask_file import FILE, save_masks
from cap_llm.models.skeleton import find_blocks
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import read_json, write_json
from cap_llm.runtime.world import World
from cap_llm.training.engine import gathered


def export(
    engine,
    source: ModelDirectory,
    folder: Path,
    masks: Mapping[str, torch.Tensor],
    world: World,
    dtype: torch.dtype | None = None,
) -> ModelDirectory:
    """Writes the trained model as safetensors, its masks and `sparsity.json`, and verifies them.

    All ranks take part; under ZeRO-3 one block is whole at a time. The values are those that the
    engine computes with.

    Args:
        engine: its module holds the model.
        source: the model that was trained, for its configuration, tokenizer and names.
        folder: to write to.
        masks: [R, C] by weight name, the source's; a fine-tuned model has none.
        world: the ranks.
        dtype: to store the weights in; by default each in the type that the source stores it in.

    Raises:
        UserError: a masked weight is not zero in the written file, a weight is too large for the
            type, or the disk is full.
    """
    model = engine.module.model
    checkpoint, keys = source.checkpoint, source.keys
    prefix, blocks = find_blocks(model)
    writer, result = ShardWriter(folder, len(blocks)), ModelDirectory(folder)
    parameters = dict(model.named_parameters())
    inside = tuple(f"{prefix}.{i}." for i in range(len(blocks)))
    zeros: dict[str, int] = {}
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    world.barrier()
    masked = set(masks)
    for block in [None, *range(len(blocks))]:
        start = inside if block is None else inside[block]
        names = [n for n in keys if n.startswith(start) == (block is not None)]
        present = [n for n in names if n in parameters]
        with gathered(parameters[n] for n in present):
            if world.is_main:
                tensors = {keys[n]: parameters[n].detach().to("cpu", copy=True) for n in present}
        if world.is_main:
            tensors |= checkpoint.read(keys[n] for n in names if n not in parameters)
            tensors = {key: _cast(key, t, dtype, checkpoint) for key, t in tensors.items()}
            writer.write(block, tensors)
            # of the matrices: a few others, such as a router's, may be stored in another type
            kind = max(tensors.values(), key=torch.Tensor.numel).dtype
            zeros |= {n: int((tensors[keys[n]] == 0).sum()) for n in present if n in masked}
        world.barrier()
    if world.is_main:
        writer.finish(source.path)
        content = read_json(folder / "config.json")
        content.pop("torch_dtype", None)
        write_json(folder / "config.json", content | {"dtype": str(kind).removeprefix("torch.")})
        save_masks(masks, folder / FILE)
        patterns, rows = {row.name: row.pattern for row in source.rows}, []
        for name, mask in masks.items():
            shape, n_masked = list(mask.shape), int((~mask).sum())
            rows.append(Row(name, shape, patterns.get(name, "as found"), zeros[name], n_masked))
        result.write_sparsity(source.path.name, rows, result.verify(rows))
    world.barrier()
    return result


def _cast(
    key: str, tensor: torch.Tensor, dtype: torch.dtype | None, checkpoint: Checkpoint
) -> torch.Tensor:
    """A tensor in the type to store it in.

    Raises:
        UserError: a value is too large for it.
    """
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype or checkpoint.dtype(key))
    if cast.dtype == torch.float16 and cast.isinf().any() and tensor.isfinite().all():
        raise UserError(
            f"{key} is too large for float16 after training; give --recover.save_dtype bfloat16 "
            "or float32"
        )
    return cast

"""From an engine back to a plain model directory, at any ZeRO stage, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        patterns = {}
        if (source / "sparsity.json").exists():
            rows = read_json(source / "sparsity.json")["rows"]
            patterns = {row["name"]: row["pattern"] for row in rows}
        rows = []
        for name, mask in masks.items():
            pattern, n_masked = patterns.get(name, "as found"), int((~mask).sum())
            shape = list(mask.shape)
            rows.append(Row(name, shape, pattern, zeros[name], n_masked, None, None, 0.0))
        write_sparsity(folder, source.name, rows, verify(folder, rows))
    world.barrier()


class Masks(Mapping[str, torch.Tensor]):
    """The masks [R, C] of a pruned model directory by weight name, one in memory at a time.

    They come from `masks.safetensors`, or from the zeros of the matrices where there is none: a
    matrix outside the blocks, or with fewer zeros than chance makes, has no mask. A dense model
    has none at all. All ranks open them together, and each reads its share of the weights.
    """

    def __init__(self, folder: Path, world: World):
        self.folder, self._world, self._checkpoint = folder, world, Checkpoint(folder)
        model = skeleton(folder)
        self._keys = match_names(model, self._checkpoint)
        prefix, _ = find_blocks(model)
        self._transposed = {
            f"{name}.weight": isinstance(module, Conv1D)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and name.startswith(prefix + ".")
        }
        file = folder / mask_files.FILE
        self._file = mask_files.MaskFile(file) if file.exists() else None
        if self._file:
            self._names = [name for name in self._transposed if name in self._file]
        else:
            mine = [n for n in self._share(list(self._transposed)) if self._is_pruned(n)]
            pruned = {name for names in world.gather(mine) for name in names}
            self._names = [name for name in self._transposed if name in pruned]

    def _share(self, names: list[str]) -> list[str]:
        return names[self._world.rank :: self._world.size]

    def _is_pruned(self, name: str) -> bool:
        return (self._weight(name) == 0).float().mean().item() >= BY_CHANCE

    def _weight(self, name: str) -> torch.Tensor:
        (weight,) = self._checkpoint.read([self._keys[name]]).values()
        return weight.T if self._transposed[name] else weight

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.read(name) if self._file else self._weight(name) != 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def from_zeros(self) -> bool:
        """Whether there is no file of masks: the model was pruned elsewhere, or not at all."""
        return self._file is None

    def check(self) -> None:
        """Holds the weights against the file of masks.

        Raises:
            UserError: a masked weight is not zero.
        """
        mine = () if self.from_zeros else self._share(self._names)
        counts = ((n, int((self._weight(n)[~self[n]] != 0).sum())) for n in mine)
        found = self._world.gather(next((stray for stray in counts if stray[1]), None))
        for name, count in filter(None, found):
            raise UserError(
                f"{name} in {self.folder} has {count} weights that are not zero where its mask "
                "says so; the weights were changed after pruning: prune again, or remove "
                "masks.safetensors to take the zeros as they are"
            )

    def in_parameter_shape(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and masks as their parameters lie: `Conv1D` stores the transpose."""
        return ((n, mask.T if self._transposed[n] else mask) for n, mask in self.items())

    @property
    def sparsity(self) -> float:
        """The share of all weights with a mask that it removes."""
        counts = [(int((~mask).sum()), mask.numel()) for mask in self.values()]
        removed, weights = map(sum, zip(*counts, strict=True))
        return removed / weights


def _cast(buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return buffer.to(dtype) if buffer.is_floating_point() else buffer

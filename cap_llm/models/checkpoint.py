"""A model directory's safetensors, read tensor by tensor and written shard by shard.

Only requested tensors are in memory, so a 70B model can be processed one block at a time. Shards
are written atomically, so a finished shard survives any crash.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.modeling_utils import load_state_dict

from cap_llm.models.files import (
    INDEX,
    SINGLE,
    can_be_streamed,
    copy_side_files,
    open_tensors,
    weight_files,
)
from cap_llm.runtime.errors import UserError, one_line
from cap_llm.runtime.files import atomic, write_json

# the prefix that torch.compile, FSDP or data parallel add to all names
_WRAPPERS = re.compile(r"(?:(?:_orig_mod|_fsdp_wrapped_module|module)\.)+")
# suffixes that compressed-tensors, GPTQ, AWQ and bitsandbytes store instead of `.weight`
_COMPRESSED = re.compile(r"\.(weight_packed|compressed|bitmask|qweight|absmax)$")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Checkpoint:
    """The tensors of a model directory, by name.

    Attributes:
        prefix: the prefix of all names in the files (`_orig_mod.`, `module.`), removed here.

    Raises:
        UserError: a safetensors file is missing, truncated or corrupt.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._header: dict[str, tuple[list[int], str]] = {}
        for path in weight_files(folder) if can_be_streamed(folder) else [folder / SINGLE]:
            with open_tensors(path) as file:
                for name in sorted(file.keys()):  # safetensors' order differs from call to call
                    piece = file.get_slice(name)
                    self._file_of[name] = path
                    self._header[name] = (piece.get_shape(), piece.get_dtype())
        self.prefix = _common_prefix(self._file_of)
        start = len(self.prefix)
        self._file_of = {name[start:]: path for name, path in self._file_of.items()}
        self._header = {name[start:]: header for name, header in self._header.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        """All tensors' names."""
        return list(self._file_of)

    def shape(self, name: str) -> list[int]:
        """A tensor's shape."""
        return self._header[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's type.

        Raises:
            UserError: it is not a floating-point type that can be pruned.
        """
        kind = self._header[name][1]
        if kind not in DTYPES:
            raise UserError(
                f"{name} in {self.folder} is stored as {kind}. Quantized models cannot be pruned: "
                "use the model in float32, float16 or bfloat16."
            )
        return DTYPES[kind]

    def refuse_compressed(self) -> None:
        """Rejects weights in a compressed or quantized format.

        Raises:
            UserError: the files contain such weights.
        """
        for name in filter(_COMPRESSED.search, self._file_of):
            raise UserError(
                f"{name} in {self.folder} belongs to compressed or quantized weights. Use the "
                "model in float32, float16 or bfloat16."
            )

    def n_bytes(self) -> int:
        """Stored bytes of all tensors."""
        total = 0
        for shape, kind in self._header.values():
            width = DTYPES[kind].itemsize if kind in DTYPES else 8
            total += torch.Size(shape).numel() * width
        return total

    def read(self, names: Iterable[str], finite: bool = True) -> dict[str, torch.Tensor]:
        """Reads tensors into memory; they do not reference the memory-mapped files.

        Raises:
            UserError: `finite` is set and a value is not finite.
        """
        tensors: dict[str, torch.Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        for path, names_in_file in by_file.items():
            with open_tensors(path) as file:
                for name in names_in_file:
                    tensors[name] = file.get_tensor(self.prefix + name).clone()
                    is_float = tensors[name].is_floating_point()
                    if finite and is_float and not _finite(tensors[name]):
                        raise UserError(
                            f"{name} in {path} contains NaN or infinite weights. "
                            "Download the model again."
                        )
        return tensors


class ShardWriter:
    """Writes a model directory with one shard per block and one for everything else.

    `model-00001-of-000NN.safetensors` holds the tensors outside the blocks, each other shard one
    block. The index is written last: without it the directory does not load as a model.
    """

    def __init__(self, folder: Path, n_blocks: int):
        self.folder, self.n_shards = folder, n_blocks + 1

    def path(self, block: int | None) -> Path:
        """The shard of a block; None means the one for everything else."""
        number = 1 if block is None else block + 2
        return self.folder / f"model-{number:05d}-of-{self.n_shards:05d}.safetensors"

    def write(self, block: int | None, tensors: dict[str, torch.Tensor]) -> None:
        """Writes one shard, atomically."""
        tensors = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
        with atomic(self.path(block)) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})

    def finish(self, source: Path) -> None:
        """Copies the source's config and tokenizer files and writes the index."""
        copy_side_files(source, self.folder)
        weight_map: dict[str, str] = {}
        total = 0
        for block in [None, *range(self.n_shards - 1)]:
            path = self.path(block)
            with open_tensors(path) as file:
                for name in sorted(file.keys()):
                    weight_map[name] = path.name
            total += path.stat().st_size
        write_json(
            self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def prefix_of_bin(folder: Path) -> str:
    """The prefix of all names in a directory's `.bin` files, see `Checkpoint.prefix`."""
    return _common_prefix(n for f in weight_files(folder) for n in _names_in_bin(f))


def _names_in_bin(path: Path) -> list[str]:
    try:
        return list(load_state_dict(path, map_location="meta"))  # torch's weights-only unpickler
    except Exception as error:  # each kind of damage raises its own type
        raise UserError(
            f"{path} is truncated or corrupt ({one_line(error, 160)}). Download the file again."
        ) from None


def _common_prefix(names: Iterable[str]) -> str:
    names = list(names)
    match = _WRAPPERS.match(names[0]) if names else None
    return match[0] if match and all(name.startswith(match[0]) for name in names) else ""


def _finite(tensor: torch.Tensor) -> bool:
    # a finite sum has only finite terms; an infinite one may also come from overflow
    return bool(tensor.float().sum().isfinite()) or bool(tensor.isfinite().all())

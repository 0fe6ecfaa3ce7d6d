"""Masks on disk: one bit per weight, in `masks/masks.safetensors` of a model directory.

They have their own folder, because some tools load every `*.safetensors` of a directory as weights.
Each tensor is uint8 [R, ceil(C / 8)], `numpy.packbits` of the mask's rows, under the name of its
weight. The file's metadata holds each mask's number of columns. A mask cannot always be inferred
from zeros: quantized models have zeros that are not pruned.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import atomic, regular
from cap_llm.sparsity.bits import pack, unpack

FILE = "masks/masks.safetensors"
OLD_FILE = "masks.safetensors"  # where version 0.1 wrote it


def save_masks(masks: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes masks [R, C] by weight name, atomically."""
    packed, columns = {}, {}
    for name, mask in masks.items():
        packed[name], columns[name] = pack(mask), str(mask.shape[1])
    path.parent.mkdir(exist_ok=True)
    with atomic(path) as temporary:
        save_file(packed, temporary, metadata=columns or None)
    join([path], path)  # sorts the metadata, so that equal masks make equal files


class MaskFile:
    """A mask file, read mask by mask.

    Raises:
        UserError: the file is unreadable or was not written by cap_llm.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(regular(path), "pt")
            metadata = self._file.metadata() or {}
            self.columns = {name: int(metadata[name]) for name in self._file.keys()}  # noqa: SIM118
            for name, columns in self.columns.items():
                piece = self._file.get_slice(name)
                kind, shape = piece.get_dtype(), piece.get_shape()
                if kind != "U8" or len(shape) != 2 or columns < 1 or shape[1] != -(-columns // 8):
                    raise ValueError(f"{name} is {kind} {shape} for {columns} columns")
        except UserError:
            raise
        except Exception as error:  # safetensors' own types, which differ by version
            raise UserError(f"{path} is not a mask file: {error}") from None

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def read(self, name: str) -> torch.Tensor:
        """The mask [R, C] of weight `name`."""
        return unpack(self._file.get_tensor(name), self.columns[name])


def join(parts: Iterable[Path], path: Path) -> None:
    """Joins mask files into one, which may be one of them, with only a buffer in memory.

    safetensors can only write tensors that are all in memory; the masks of a 70B model take 9 GB.
    The format is a length, a JSON header, and the bytes of the tensors.
    """
    header: dict[str, dict] = {"__metadata__": {}}
    bodies, offset = [], 0
    for part in parts:
        with open(part, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
        header["__metadata__"] |= entries.pop("__metadata__", {})
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            header[name] = entry | {"data_offsets": [start + offset, end + offset]}
        bodies.append((part, 8 + length))
        offset += part.stat().st_size - 8 - length
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # deterministic bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(exist_ok=True)
    with atomic(path) as temporary, open(temporary, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for part, start in bodies:
            with open(part, "rb") as file:
                file.seek(start)
                while chunk := file.read(2**24):
                    out.write(chunk)

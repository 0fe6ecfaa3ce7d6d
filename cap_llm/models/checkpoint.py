"""A model directory's safetensors, read tensor by tensor and written shard by shard.

Nothing here holds more than what the caller asks for: a 70B model passes through one block at a
time. Shards are written atomically, so that a finished one survives anything.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import atomic, read_json, write_json
from cap_llm.runtime.world import World

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# what a model directory holds besides weights: configuration and tokenizer, never code
_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_COPIED = {"sparsity.json", "recipe.json", "done.json", "perplexity.json"} | {
    "zeroshot.json",
    "owl.json",
    "calibration.json",
    "rung.json",
    "recovery.json",
    "inputs.json",
}

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Checkpoint:
    """The tensors of a model directory, by name.

    Raises:
        UserError: there are no safetensors, or a file of them is truncated, corrupt or missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._header: dict[str, tuple[list[int], str]] = {}
        if (folder / INDEX).exists():
            index = read_json(folder / INDEX)
            try:
                weight_map = dict(index["weight_map"])
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{folder / INDEX} has no weight_map; get the file again") from None
            shards = sorted(set(map(str, weight_map.values())))
        else:
            shards = [SINGLE]
        for shard in shards:
            path = folder / shard
            with _open(path) as file:
                for name in sorted(file.keys()):  # their own order differs from call to call
                    piece = file.get_slice(name)
                    self._file_of[name] = path
                    self._header[name] = (piece.get_shape(), piece.get_dtype())

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
            UserError: it is none of the floating-point types that can be pruned.
        """
        kind = self._header[name][1]
        if kind not in DTYPES:
            raise UserError(
                f"{name} in {self.folder} is stored as {kind}: a quantised model cannot be pruned; "
                "give the model in float32, float16 or bfloat16"
            )
        return DTYPES[kind]

    def n_bytes(self, names: Iterable[str] | None = None) -> int:
        """Bytes of the named tensors (all of them by default) as stored."""
        total = 0
        for name in self._file_of if names is None else names:
            shape, kind = self._header[name]
            width = DTYPES[kind].itemsize if kind in DTYPES else 8
            total += torch.Size(shape).numel() * width
        return total

    def read(self, names: Iterable[str], finite: bool = True) -> dict[str, torch.Tensor]:
        """Reads tensors into memory of their own: the files' mappings are not kept.

        Raises:
            UserError: a value is not finite, where all must be `finite`.
        """
        tensors: dict[str, torch.Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        for path, wanted in by_file.items():
            with _open(path) as file:
                for name in wanted:
                    tensors[name] = file.get_tensor(name).clone()
                    floats = tensors[name].is_floating_point()
                    if finite and floats and not _finite(tensors[name]):
                        raise UserError(
                            f"{name} in {path} holds NaN or infinite weights; "
                            "the model is damaged, get it again"
                        )
        return tensors


class ShardWriter:
    """Writes a model directory with one shard a block and one for everything else.

    `model-00001-of-000NN.safetensors` holds what lies outside the blocks, the others a block each.
    The index comes last: without it the directory does not load as a model.
    """

    def __init__(self, folder: Path, n_blocks: int):
        self.folder, self.n_shards = folder, n_blocks + 1

    def path(self, block: int | None) -> Path:
        """The shard of a block, or with None that of everything else."""
        number = 1 if block is None else block + 2
        return self.folder / f"model-{number:05d}-of-{self.n_shards:05d}.safetensors"

    def write(self, block: int | None, tensors: dict[str, torch.Tensor]) -> None:
        """Writes one shard, atomically."""
        tensors = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
        with atomic(self.path(block)) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})

    def finish(self, source: Path) -> None:
        """Copies the source's configuration and tokenizer files and writes the index."""
        for file in source.iterdir():
            index = file.name.endswith(".index.json")
            if file.suffix in _SIDE_FILES and file.name not in _NOT_COPIED and not index:
                with atomic(self.folder / file.name) as temporary:
                    shutil.copyfile(file, temporary)
        weight_map: dict[str, str] = {}
        total = 0
        for block in [None, *range(self.n_shards - 1)]:
            path = self.path(block)
            with _open(path) as file:
                for name in sorted(file.keys()):
                    weight_map[name] = path.name
            total += path.stat().st_size
        write_json(
            self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def fingerprint(folder: Path) -> str | None:
    """What tells one model directory from another: 64 samples of each shard; None without one."""
    sha, files = hashlib.sha256(), weight_files(folder)
    for path in files:
        n_bytes = path.stat().st_size
        sha.update(f"{path.name} {n_bytes}".encode())
        with open(path, "rb") as file:
            for at in range(0, n_bytes, max(2**14, n_bytes // 64)):
                file.seek(at)
                sha.update(file.read(2**14))
    return sha.hexdigest()[:16] if files else None


def weights_digest(folder: Path) -> str:
    """A checksum of all of a model directory's weights: scores are of these and no others."""
    sha = hashlib.sha256()
    for path in weight_files(folder):
        with open(path, "rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:16]


def has_weights(folder: Path, world: World) -> bool:
    """Whether a model directory's weights are there: `remove_weights` leaves none.

    As the first rank sees it: a shared file system may show ranks different things.
    """
    return world.gather(bool(weight_files(folder)))[0]


def can_be_streamed(folder: Path) -> bool:
    """Whether a directory holds a model's safetensors, not other formats or left-over shards."""
    return any((folder / name).exists() for name in (INDEX, SINGLE))


def weight_files(folder: Path) -> list[Path]:
    """The files of a model directory's weights, as transformers finds them.

    Shards without an index are none: a removal of them was killed.
    """
    name = "model*.safetensors" if can_be_streamed(folder) else "pytorch_model*.bin"
    return sorted(folder.glob(name))


def remove_weights(folder: Path) -> None:
    """Deletes a model directory's weights, keeping its records; the index goes first."""
    (folder / INDEX).unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors"):
        path.unlink()


def _open(path: Path):
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; the model directory is not complete") from None
    except Exception as error:  # safetensors raises its own kinds, by version
        raise UserError(f"{path} is truncated or corrupt ({error}); get the file again") from None


def _finite(tensor: torch.Tensor) -> bool:
    # a sum is not finite if any term is not; it may also overflow, so look closer then
    return bool(tensor.float().sum().isfinite()) or bool(tensor.isfinite().all())


def config_dict(folder: Path) -> dict:
    """A model directory's `config.json`.

    Raises:
        UserError: there is none.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no model directory: it has no config.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings; get the file again")
    return content


def text_settings(folder: Path) -> dict:
    """Its `config.json`, for a model that also sees or hears with those of the part that reads.

    Raises:
        UserError: there is none.
    """
    config = config_dict(folder)
    inside = config.get("text_config")
    return config | inside if isinstance(inside, dict) else config

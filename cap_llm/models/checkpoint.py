"""A model directory's safetensors, read tensor by tensor and written shard by shard.

Nothing here holds more than what the caller asks for: a 70B model passes through one block at a
time. Shards are written atomically, so that a finished one survives anything.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import atomic, read_json, readable, regular, write_json
from cap_llm.runtime.world import World
from cap_llm.sparsity import masks as mask_files

INDEX, SINGLE = SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
# by what a directory's weights are found: transformers' own order
_ENTRIES = (SINGLE, INDEX, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
# what a model directory holds besides weights: configuration and tokenizer, never code
_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_COPIED = {"sparsity.json", "recipe.json", "done.json", "perplexity.json"} | {
    "zeroshot.json",
    "owl.json",
    "calibration.json",
    "rung.json",
    "recovery.json",
    "inputs.json",
    "adapter_config.json",  # its weights are not copied either
}
# what config.json says of how the weights beside it are stored
STORAGE = ("quantization_config", "compression_config", "sparsity_config", "transformers_weights")
# what torch.compile and data parallel put before all names
_WRAPPERS = re.compile(r"(?:(?:_orig_mod|_fsdp_wrapped_module|module)\.)+")
# the ends of what compressed-tensors, GPTQ, AWQ and bitsandbytes store instead of a `weight`
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
        prefix: `_orig_mod.` or `module.` before all names in the files, which are read without it.

    Raises:
        UserError: there are no safetensors, or a file of them is truncated, corrupt or missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._header: dict[str, tuple[list[int], str]] = {}
        for path in weight_files(folder) if can_be_streamed(folder) else [folder / SINGLE]:
            with _open(path) as file:
                for name in sorted(file.keys()):  # their own order differs from call to call
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
            UserError: it is none of the floating-point types that can be pruned.
        """
        kind = self._header[name][1]
        if kind not in DTYPES:
            raise UserError(
                f"{name} in {self.folder} is stored as {kind}: a quantised model cannot be pruned; "
                "give the model in float32, float16 or bfloat16"
            )
        return DTYPES[kind]

    def refuse_compressed(self) -> None:
        """Refuses weights that are stored in another form than as matrices.

        Raises:
            UserError: they are.
        """
        for name in filter(_COMPRESSED.search, self._file_of):
            raise UserError(
                f"{name} in {self.folder} is a part of compressed or quantised weights; give the "
                "model with plain weights in float32, float16 or bfloat16"
            )

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
                    tensors[name] = file.get_tensor(self.prefix + name).clone()
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
        copy_side_files(source, self.folder)
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
    return world.gather(_entry(folder) is not None)[0]


def can_be_streamed(folder: Path) -> bool:
    """Whether a directory holds a model's safetensors, not other formats or left-over shards."""
    entry = _entry(folder)
    return entry is not None and ".safetensors" in entry.name


def weight_files(folder: Path) -> list[Path]:
    """The files of a model directory's weights, those that transformers reads; perhaps none.

    Shards without an index are none: a removal of them was killed.

    Raises:
        UserError: one is missing, no regular file, or not in the directory.
    """
    entry = _entry(folder)
    if entry is None:
        return []
    if not entry.name.endswith(".index.json"):
        return [regular(entry)]
    names = read_json(entry, lambda index: {str(n) for n in dict(index["weight_map"]).values()})
    ending = entry.name.removesuffix(".index.json").rpartition(".")[2]
    for name in names:
        if Path(name).name != name or not name.endswith(f".{ending}"):
            raise UserError(
                f"{entry} names {name!r} as a shard, which is not a .{ending} file of that "
                "directory; get the model again"
            )
        if not os.path.lexists(folder / name):
            raise UserError(f"{folder / name} does not exist; the model directory is not complete")
    return [regular(folder / name) for name in sorted(names)]


def _entry(folder: Path) -> Path | None:
    """The file by which transformers finds a directory's weights: all of them or their index."""
    with readable(folder):
        named = (folder / "config.json").is_file() and config_dict(folder).get(STORAGE[-1])
        paths = [folder / str(name) for name in ([named] if named else _ENTRIES)]
        entry = next((path for path in paths if path.is_file()), None)
        for path in paths if entry is None else ():
            if os.path.lexists(path):  # a pipe, or a link that leads nowhere
                regular(path)
    if named and (entry is None or Path(str(named)).name != named):
        raise UserError(f"{folder}/config.json names {named!r} as its weights, not a file of it")
    return entry


def stored_prefix(folder: Path) -> str:
    """What torch.compile or data parallel have put before all names in a directory's files."""
    if can_be_streamed(folder):
        return Checkpoint(folder).prefix
    return _common_prefix(n for f in weight_files(folder) for n in _names_in_bin(f))


def _names_in_bin(path: Path) -> list[str]:
    try:
        return list(load_state_dict(path, map_location="meta"))  # torch's weights-only unpickler
    except Exception as error:  # every kind of damage shows in a way of its own
        why = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is truncated or corrupt ({why}); get the file again") from None


def _common_prefix(names: Iterable[str]) -> str:
    names = list(names)
    found = _WRAPPERS.match(names[0]) if names else None
    return found[0] if found and all(name.startswith(found[0]) for name in names) else ""


def weights_and_masks(folder: Path) -> list[str]:
    """The files of a model directory that hold numbers, by their names in it."""
    paths = [*weight_files(folder), folder / INDEX, mask_files.path_of(folder)]
    return [str(path.relative_to(folder)) for path in paths if path.exists()]


def side_files(folder: Path) -> list[Path]:
    """A model directory's configuration and tokenizer files, which what is made of it gets, too.

    Raises:
        UserError: one is not a regular file, or a link that leads out of the directory.
    """
    found = []
    with readable(folder):
        paths = sorted(folder.iterdir())
    for path in paths:
        index, inside = path.name.endswith(".index.json"), path.name in _NOT_COPIED
        if path.suffix not in _SIDE_FILES or index or inside or path.is_dir():
            continue
        if regular(path).is_symlink() and not _is_of_a_model(path.resolve(), path.name, folder):
            target = path.resolve()
            raise UserError(
                f"{path} is a link to {target}, which is not a model's file of that name and "
                "would be copied into the output; replace the link by a copy, or remove it"
            )
        found.append(path)
    return found


def _is_of_a_model(target: Path, name: str, folder: Path) -> bool:
    """Whether what a link `name` in `folder` leads to may be published with the model."""
    place = target.parent
    if place.name == "blobs":  # the hub's cache: `snapshots/REVISION/NAME` leads to `blobs/HASH`
        return (place.parent / "snapshots").is_dir()
    if folder.resolve() in target.parents:
        return True
    is_model = (place / "config.json").is_file() and "model_type" in config_dict(place)
    return is_model and target.name == name


def copy_side_files(source: Path, folder: Path, replace: bool = True) -> None:
    """Copies configuration and tokenizer files, with nothing said of the source's storage."""
    for file in side_files(source):
        target = folder / file.name
        if replace or not target.exists():
            with atomic(target) as temporary:
                shutil.copyfile(file, temporary)
    config = read_json(folder / "config.json")
    if said := set(STORAGE) & config.keys():
        write_json(folder / "config.json", {k: v for k, v in config.items() if k not in said})


def remove_weights(folder: Path) -> None:
    """Deletes a model directory's weights, keeping its records; the index goes first."""
    (folder / INDEX).unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors"):
        path.unlink()


def _open(path: Path):
    if not os.path.lexists(path):
        raise UserError(f"{path} does not exist; the model directory is not complete")
    try:
        return safe_open(regular(path), "pt")
    except UserError:
        raise
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
    with readable(path):
        if not path.is_file():
            raise UserError(f"{folder} is no model directory: it has no config.json")
    content = read_json(path)
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

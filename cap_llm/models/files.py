"""The files of a model directory: weights as transformers finds them, config, side files."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from safetensors import safe_open
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from cap_llm.models.mask_file import FILE as MASKS
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import atomic, read_json, readable, regular, write_json
from cap_llm.runtime.world import World

INDEX, SINGLE = SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
# the files by which transformers finds a directory's weights, in its order
_ENTRIES = (SINGLE, INDEX, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
# suffixes of config and tokenizer files; code is never copied
_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_COPIED = {
    "sparsity.json",
    "recipe.json",
    "done.json",
    "scores.json",
    "result.json",
    "owl.json",
    "calibration.json",
    "level.json",
    "recovery.json",
    "inputs.json",
    "adapter_config.json",  # its weights are not copied either
}
# the fields of config.json about the storage format of the weights
STORAGE = ("quantization_config", "compression_config", "sparsity_config", "transformers_weights")


def config_dict(folder: Path) -> dict:
    """A model directory's `config.json`.

    Raises:
        UserError: it is missing or not a JSON object.
    """
    path = folder / "config.json"
    with readable(path):
        if not path.is_file():
            raise UserError(f"{folder} is not a model directory: config.json is missing")
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object. Download the file again.")
    return content


def can_be_streamed(folder: Path) -> bool:
    """Whether a directory's weights are safetensors, not another format or leftover shards."""
    entry = _entry(folder)
    return entry is not None and ".safetensors" in entry.name


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model directory that transformers reads; may be empty.

    Shards without an index do not count: their removal was interrupted.

    Raises:
        UserError: one is missing, not a regular file, or outside the directory.
    """
    entry = _entry(folder)
    if entry is None:
        return []
    if not entry.name.endswith(".index.json"):
        return [regular(entry)]
    names = read_json(entry, lambda index: {str(n) for n in dict(index["weight_map"]).values()})
    suffix = entry.name.removesuffix(".index.json").rpartition(".")[2]
    for name in names:
        if Path(name).name != name or not name.endswith(f".{suffix}"):
            raise UserError(
                f"{entry} lists the shard {name!r}, which is not a .{suffix} file in this "
                "directory. Download the model again."
            )
        if not os.path.lexists(folder / name):
            raise UserError(f"{folder / name} does not exist: the model directory is incomplete")
    return [regular(folder / name) for name in sorted(names)]


def _entry(folder: Path) -> Path | None:
    """The file by which transformers finds a directory's weights: the only one, or the index."""
    with readable(folder):
        named = (folder / "config.json").is_file() and config_dict(folder).get(STORAGE[-1])
        paths = [folder / str(name) for name in ([named] if named else _ENTRIES)]
        entry = next((path for path in paths if path.is_file()), None)
        for path in paths if entry is None else ():
            if os.path.lexists(path):  # a pipe, or a link that leads nowhere
                regular(path)
    if named and (entry is None or Path(str(named)).name != named):
        raise UserError(
            f"{folder}/config.json names the weights {named!r}, which are not in {folder}"
        )
    return entry


def has_weights(folder: Path, world: World) -> bool:
    """Whether a model directory has weights, as rank 0 sees it on a shared file system."""
    return world.decide(lambda: _entry(folder) is not None)


def remove_weights(folder: Path) -> None:
    """Deletes a model directory's weights but not its records; the index first."""
    (folder / INDEX).unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors"):
        path.unlink()


def fingerprint(folder: Path) -> str | None:
    """A checksum of about 64 samples of each shard, None without weights."""
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
    """A checksum of all of a model directory's weights, which ties scores to them."""
    sha = hashlib.sha256()
    for path in weight_files(folder):
        with open(path, "rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:16]


def weights_and_masks(folder: Path) -> list[str]:
    """The weight files, index and mask file of a model directory, relative to it."""
    paths = [*weight_files(folder), folder / INDEX, folder / MASKS]
    return [str(path.relative_to(folder)) for path in paths if path.exists()]


def _is_model_file(target: Path, name: str, folder: Path) -> bool:
    """Whether the target of a link `name` in `folder` may be published with the model."""
    parent = target.parent
    if parent.name == "blobs":  # the hub's cache: `snapshots/REVISION/NAME` links to `blobs/HASH`
        return (parent.parent / "snapshots").is_dir()
    if folder.resolve() in target.parents:
        return True
    is_model = (parent / "config.json").is_file() and "model_type" in config_dict(parent)
    return is_model and target.name == name


def side_files(folder: Path) -> list[Path]:
    """A model directory's config and tokenizer files, which derived models also get.

    Raises:
        UserError: one is not a regular file, or is a link to something other than a model's file.
    """
    files = []
    with readable(folder):
        paths = sorted(folder.iterdir())
    for path in paths:
        skipped = path.name in _NOT_COPIED or path.name.endswith(".index.json")
        if path.suffix not in _SIDE_FILES or skipped or path.is_dir():
            continue
        if regular(path).is_symlink() and not _is_model_file(path.resolve(), path.name, folder):
            raise UserError(
                f"{path} links to {path.resolve()}, which is not a file of a model and would be "
                "copied into the output. Replace the link by a copy, or remove it."
            )
        files.append(path)
    return files


def copy_side_files(source: Path, folder: Path, replace: bool = True) -> None:
    """Copies config and tokenizer files, without the config's storage settings."""
    for file in side_files(source):
        target = folder / file.name
        if replace or not target.exists():
            with atomic(target) as temporary:
                shutil.copyfile(file, temporary)
    config = read_json(folder / "config.json")
    if set(STORAGE) & config.keys():
        write_json(folder / "config.json", {k: v for k, v in config.items() if k not in STORAGE})


def open_tensors(path: Path):
    """Opens a safetensors file.

    Raises:
        UserError: it is missing, not a regular file, truncated or corrupt.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path} does not exist: the model directory is incomplete")
    try:
        return safe_open(regular(path), "pt")
    except UserError:
        raise
    except Exception as error:  # safetensors' own types, which differ by version
        raise UserError(f"{path} is truncated or corrupt ({error}). Download it again.") from None

"""The files of a model directory: weights as transformers finds them, settings, side files."""

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

from cap_llm.models import mask_file as mask_files
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import atomic, read_json, readable, regular, write_json
from cap_llm.runtime.world import World

INDEX, SINGLE = SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


# by what a directory's weights are found: transformers' own order
_ENTRIES = (SINGLE, INDEX, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


# what a model directory holds besides weights: configuration and tokenizer, never code
_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")


_NOT_COPIED = {"sparsity.json", "recipe.json", "done.json", "perplexity.json"} | {
    "zeroshot.json",
    "owl.json",
    "calibration.json",
    "level.json",
    "recovery.json",
    "inputs.json",
    "adapter_config.json",  # its weights are not copied either
}


# what config.json says of how the weights beside it are stored
STORAGE = ("quantization_config", "compression_config", "sparsity_config", "transformers_weights")


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


def has_weights(folder: Path, world: World) -> bool:
    """Whether a model directory's weights are there: `remove_weights` leaves none.

    As the first rank sees it: a shared file system may show ranks different things.
    """
    return world.decide(lambda: _entry(folder) is not None)


def remove_weights(folder: Path) -> None:
    """Deletes a model directory's weights, keeping its records; the index goes first."""
    (folder / INDEX).unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors"):
        path.unlink()


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


def weights_and_masks(folder: Path) -> list[str]:
    """The files of a model directory that hold numbers, by their names in it."""
    paths = [*weight_files(folder), folder / INDEX, mask_files.path_of(folder)]
    return [str(path.relative_to(folder)) for path in paths if path.exists()]


def _is_of_a_model(target: Path, name: str, folder: Path) -> bool:
    """Whether what a link `name` in `folder` leads to may be published with the model."""
    place = target.parent
    if place.name == "blobs":  # the hub's cache: `snapshots/REVISION/NAME` leads to `blobs/HASH`
        return (place.parent / "snapshots").is_dir()
    if folder.resolve() in target.parents:
        return True
    is_model = (place / "config.json").is_file() and "model_type" in config_dict(place)
    return is_model and target.name == name


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


def open_tensors(path: Path):
    if not os.path.lexists(path):
        raise UserError(f"{path} does not exist; the model directory is not complete")
    try:
        return safe_open(regular(path), "pt")
    except UserError:
        raise
    except Exception as error:  # safetensors raises its own kinds, by version
        raise UserError(f"{path} is truncated or corrupt ({error}); get the file again") from None

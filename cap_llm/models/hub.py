"""From a model's name to a local directory of safetensors that can be streamed."""

from __future__ import annotations

import difflib
import hashlib
import os
from dataclasses import asdict
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from cap_llm.config import Config, ModelConfig
from cap_llm.config.section import places
from cap_llm.models.directory import FROM_DIRECTORY, ModelDirectory
from cap_llm.models.files import (
    SINGLE,
    can_be_streamed,
    copy_side_files,
    fingerprint,
    side_files,
    weight_files,
    weights_and_masks,
)
from cap_llm.models.skeleton import NamesDiffer
from cap_llm.runtime.environment import offline
from cap_llm.runtime.errors import UserError, one_line
from cap_llm.runtime.files import readable, regular
from cap_llm.runtime.rundir import CONTENTS, Run
from cap_llm.runtime.world import World
from cap_llm.text.corpora import NAMES

# the files that define a model besides its weights
_DEFINITION = ("config.json", "tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken")
_DEFINITION += ("added_tokens.json", "special_tokens_map.json")
_CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


def locate(
    config: ModelConfig, download: bool = True, option: str = "model.path"
) -> ModelDirectory | None:
    """Opens a model by its path, or by its name on the hub, from where it is downloaded once.

    With `download` off, None means that a model on the hub is not in the cache. Messages name
    `option`. All files are looked at, so that damage shows before the work.

    Raises:
        UserError: the model does not exist, cannot be downloaded, is damaged, or is quantized.
    """
    path = Path(config.path)
    with readable(f"{option} {config.path}"):
        is_folder, exists = path.is_dir(), path.exists()
    if is_folder and path.name in ("", ".."):  # messages and records need its name
        path = path.resolve()
    if not is_folder and path.suffix == ".gguf":
        return ModelDirectory(regular(path))
    if exists and not is_folder:
        raise UserError(f"{option} {path} is a file. Give the model's directory, or a .gguf file.")
    if not exists and (config.path.startswith((".", "/", "~")) or config.path.count("/") > 1):
        similar = []
        if path.parent.is_dir():
            with readable(path.parent):
                similar = difflib.get_close_matches(path.name, os.listdir(path.parent), 1)
        hint = f"; did you mean {path.parent / similar[0]}?" if similar else ""
        raise UserError(f"{option} {config.path} is not a directory{hint}")
    directory = ModelDirectory(path) if exists else _download(config, download, option)
    if directory:
        side_files(directory.path)
        marks = _storage_marks(directory, option)
        if not directory.has_safetensors:
            weight_files(directory.path)
        elif directory.checkpoint and marks:  # opening it reads all headers
            directory.checkpoint.refuse_compressed()
    return directory


def _storage_marks(directory: ModelDirectory, option: str) -> dict:
    """The quantization settings in config.json, of a model whose weights may still be plain.

    Raises:
        UserError: the model is quantized.
    """
    marks = directory.settings.get("quantization_config") or {}
    marks = marks if isinstance(marks, dict) else {"quant_method": marks}
    method = marks.get("quant_method")
    # compressed-tensors marks plain weights too; the names of the tensors tell
    if marks and method != "compressed-tensors" and "sparsity_config" not in marks:
        raise UserError(f"{option} {directory} is quantized ({method}). Use the unquantized model.")
    return marks


def prepare(
    located: ModelDirectory, config: ModelConfig, run: Run, stage: str = "source"
) -> ModelDirectory:
    """A directory that can be streamed: `located` itself, or its conversion in the run directory.

    Raises:
        UserError: transformers cannot read the model.
    """
    names_differ = None
    try:
        if located.has_safetensors and located.keys:
            return located
    except NamesDiffer as error:
        names_differ = error
    known = {"model.path": content(located.path)} if run.world.is_main else {}
    recipe = {"model": asdict(config), CONTENTS: known}
    folder, done = run.stage(stage, recipe)
    if not done:
        run.console.say(f"converting {located.path.name} to safetensors, once")
        if located.path.is_dir() and located.prefix:
            run.console.say(located.notice)
        run.bind(folder, recipe)
        if run.world.is_main:
            try:
                convert(located, folder)
            except UserError as error:
                raise (names_differ or error) from None
        files = weights_and_masks(folder) if run.world.is_main else ()
        run.finish_stage(folder, {"from": str(located)}, files)
    return ModelDirectory(folder)


def contents(config: Config, located: ModelDirectory | None = None) -> dict[str, str]:
    """Checksums of the files that settings name, by option, since a path may change.

    Args:
        config: the run's settings.
        located: the run's model, which may have a name on the hub.
    """
    known: dict[str, str | None] = {}
    for option in places(Config):
        section, _, name = option.rpartition(".")
        value = getattr(config, section, None) and getattr(getattr(config, section), name)
        if section != "evaluate" and isinstance(value, str) and value not in NAMES:
            known[option] = content(Path(value))
    if located:
        known["model.path"] = content(located.path)
    known["model.revision"] = known.get("model.path")
    return {option: checksum for option, checksum in known.items() if checksum}


def content(path: Path) -> str | None:
    """A checksum of a file or a model directory; None if it is neither, or unreadable.

    That of a directory covers the weights' fingerprint, the configuration and the tokenizer.
    """
    files, names = [path], [""]
    try:
        if path.is_dir():
            files = sorted({f for name in _DEFINITION for f in path.glob(name) if f.is_file()})
            names = [fingerprint(path) or "", *(file.name for file in files)]
        if not files or not all(map(Path.is_file, files)):
            return None
        sha = hashlib.sha256("/".join(names).encode())
        for file in files:
            with open(file, "rb") as opened:
                sha.update(hashlib.file_digest(opened, "sha256").digest())
    except (OSError, UserError):  # a stage that needs the file reports it
        return None
    return sha.hexdigest()[:16]


def found_here(
    option: str, path: str | None, config: Config, world: World
) -> ModelDirectory | None:
    """Opens the model of an option without a download: only its config.json if it is on the hub.

    Returns:
        The directory; None without a path, for a .gguf file, and if the hub is out of reach.

    Raises:
        UserError: the model does not exist or is incomplete.
    """
    if not path:
        return None
    model = ModelConfig(path=path)
    directory = locate(model, download=False, option=option)
    if not directory:
        return hub_config(model, option)
    if not directory.path.is_dir():
        return None
    check_files(option, directory, config, world)
    return directory


def hub_config(config: ModelConfig, option: str = "model.path") -> ModelDirectory | None:
    """A directory with only the config.json of a model on the hub; None if out of reach.

    Raises:
        UserError: the hub has no such model, or it is quantized.
    """
    import huggingface_hub

    try:
        file = huggingface_hub.hf_hub_download(config.path, "config.json", revision=config.revision)
    except huggingface_hub.errors.HfHubHTTPError as error:  # from the hub itself
        raise _not_on_hub(option, config, one_line(error)) from None
    except Exception:  # the network's errors have no common base
        return None
    directory = ModelDirectory(Path(file).parent)
    _storage_marks(directory, option)
    return directory


def is_whole(folder: Path) -> bool:
    """Whether a model directory has weights, with all shards of its index."""
    try:
        return bool(weight_files(folder))
    except UserError:
        return False


def check_files(option: str, directory: ModelDirectory, config: Config, world: World) -> None:
    """Rejects a directory without weights, or with a missing or misshapen tensor.

    Only headers are read. The weights of a model that an earlier job has converted may be gone.

    Raises:
        UserError: the directory is incomplete.
    """
    name = "source" if option == "model.path" else f"{option.rpartition('.')[2]}-source"
    converted = Path(config.output_dir) / name / "done.json"
    world.decide(lambda: converted.exists() or _check_files(option, directory))


def _check_files(option: str, directory: ModelDirectory) -> None:
    if not weight_files(directory.path):
        raise UserError(
            f"{option} {directory} has no weights: neither {SINGLE} nor pytorch_model.bin. "
            "Download the model again."
        )
    names_differ = None
    try:
        if directory.has_safetensors and directory.keys:
            return
    except NamesDiffer as error:
        names_differ = error
    try:
        load_whole(directory, device_map={"": "meta"})
    except UserError as error:
        raise (names_differ or error) from None


def further_model(option: str, path: str, run: Run) -> ModelDirectory:
    """Opens the model of an option other than `model.path`, converted if it cannot be streamed.

    Raises:
        UserError: the model does not exist or cannot be read.
    """
    model, name = ModelConfig(path=path), option.rpartition(".")[2]
    directory = prepare(locate(model, option=option), model, run, f"{name}-source")
    if directory.notice:
        run.console.say(directory.notice)
    return directory


def convert(source: ModelDirectory, folder: Path) -> None:
    """Rewrites a model as a plain safetensors directory. Holds the whole model in memory.

    For `.gguf` files (de-quantized to float32), `.bin` checkpoints (read with torch's weights-only
    unpickler) and directories whose tensor names differ from the model's parameters.

    Raises:
        UserError: transformers cannot read the model, or weights are missing.
    """
    is_gguf = source.path.is_file()
    model = load_whole(source, dtype="float32" if is_gguf else "auto")
    # transformers marks a de-quantized GGUF model as quantized, and then refuses to save it
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    if not is_gguf and source.prefix:
        model._weight_conversions = None  # else the names get the prefix back
    model.save_pretrained(folder)
    if is_gguf:
        AutoTokenizer.from_pretrained(
            source.path.parent, gguf_file=source.path.name, **FROM_DIRECTORY
        ).save_pretrained(folder)
    else:
        copy_side_files(source.path, folder, replace=False)


def load_whole(source: ModelDirectory, **options) -> PreTrainedModel:
    """Loads a whole model into memory with transformers' `options`.

    Raises:
        UserError: transformers cannot read the model, or weights are missing.
    """
    disable_progress_bar()
    folder = source.path
    try:
        if folder.is_file():
            kind, folder = AutoModelForCausalLM, folder.parent
            options |= {"gguf_file": source.path.name, **FROM_DIRECTORY}
        else:
            kind, options = type(source.skeleton), options | source.loading_options
        # else the error names neither tensor nor shapes
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = kind.from_pretrained(folder, **options)
        head = f"{model.base_model_prefix}."
        missing, is_body = info["missing_keys"], model.base_model is model
        if missing and not is_body and not any(name.startswith(head) for name in missing):
            # the base model without the head that config.json names, as in `skeleton`
            model, info = type(model.base_model).from_pretrained(folder, **options)
    except UserError:
        raise
    except Exception as error:  # each kind of damage raises its own type
        raise UserError(f"{source} cannot be read by transformers: {one_line(error)}") from None
    if info["mismatched_keys"]:
        name, stored, implied = sorted(info["mismatched_keys"])[0]
        raise UserError(
            f"{name} in {source} has shape {list(stored)}, but config.json implies {list(implied)}."
        )
    if missing := sorted(info["missing_keys"]):  # transformers would initialize them
        raise UserError(
            f"{source} has no tensor for {missing[0]} ({len(missing)} in total). Download the "
            "model again."
        )
    return model


def _download(config: ModelConfig, download: bool, option: str) -> ModelDirectory | None:
    import huggingface_hub
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()

    def fetch(patterns: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                config.path,
                revision=config.revision,
                allow_patterns=patterns,
                local_files_only=not download,
            )
        )

    try:
        folder = fetch([*_CONFIG_FILES, "model*.safetensors"])
        if not can_be_streamed(folder):
            folder = fetch([*_CONFIG_FILES, "pytorch_model*.bin"])
        if not download and not is_whole(folder):
            raise FileNotFoundError("its weights are not in the cache")
    except Exception as error:  # the hub's and the network's errors have no common base
        if not download and not offline():
            return None
        reason = one_line(error)
        if offline():
            reason = (
                "HF_HUB_OFFLINE is set and the cache has no copy. Run `cap-llm prefetch` on a "
                "machine with internet access."
            )
        raise _not_on_hub(option, config, reason) from None
    return ModelDirectory(folder)


def _not_on_hub(option: str, config: ModelConfig, reason: str) -> UserError:
    return UserError(
        f"{option} {config.path!r} is not a local directory and cannot be downloaded: {reason}"
    )

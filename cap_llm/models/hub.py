"""From a model's name to a local directory of safetensors that can be streamed."""

from __future__ import annotations

import difflib
import hashlib
import os
from dataclasses import asdict
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from cap_llm.config import Config, ModelConfig
from cap_llm.config.section import places
from cap_llm.models.checkpoint import Checkpoint, stored_prefix
from cap_llm.models.files import (
    SINGLE,
    can_be_streamed,
    copy_side_files,
    fingerprint,
    side_files,
    text_settings,
    weight_files,
    weights_and_masks,
)
from cap_llm.models.skeleton import (
    FROM_DIRECTORY,
    NamesDiffer,
    match_names,
    model_class,
    read_as,
    reading_options,
    skeleton,
)
from cap_llm.runtime.environment import offline
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import readable, regular
from cap_llm.runtime.rundir import CONTENTS, Run
from cap_llm.runtime.world import World
from cap_llm.text.corpora import NAMES

# what a model is besides its weights
_MEANING = ("config.json", "tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken")
_MEANING += ("added_tokens.json", "special_tokens_map.json")
_CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


def locate(config: ModelConfig, download: bool = True, option: str = "model.path") -> Path | None:
    """The local directory (or .gguf file) of a model; a hub name is downloaded once.

    With `download` off, None stands for a model that is on the hub and not in its cache. Messages
    name `option`.

    Raises:
        UserError: there is no such model, or it cannot be fetched.
    """
    path = Path(config.path)
    with readable(f"{option} {config.path}"):
        is_folder, exists = path.is_dir(), path.exists()
    if is_folder and path.name in ("", ".."):  # what is made from it is called by its name
        path = path.resolve()
    if is_folder or path.suffix == ".gguf":
        if not exists:
            raise UserError(f"{option} {path} does not exist")
        return _sound(path, option)
    if exists:
        raise UserError(f"{option} {path} is a file; give the model's directory, or a .gguf file")
    if config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
        near = []
        if path.parent.is_dir():
            with readable(path.parent):
                near = difflib.get_close_matches(path.name, os.listdir(path.parent), 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{option} {config.path} is not a directory{hint}")
    folder = _download(config, download, option)
    return folder and _sound(folder, option)


def _sound(path: Path, option: str) -> Path:
    """`path`, whose files are all looked at: a damaged one is to show before the work.

    Raises:
        UserError: a file cannot be read or taken along, or the model is quantised.
    """
    if not path.is_dir():
        return regular(path)
    side_files(path)
    marks = _storage_marks(path, option)
    if not can_be_streamed(path):
        weight_files(path)
    elif marks:
        Checkpoint(path).refuse_compressed()
    else:
        Checkpoint(path)
    return path


def _storage_marks(folder: Path, option: str) -> dict:
    """What config.json says of how weights are stored, where they may be plain all the same.

    Raises:
        UserError: the model is quantized.
    """
    marks = text_settings(folder).get("quantization_config") or {}
    marks = marks if isinstance(marks, dict) else {"quant_method": marks}
    method = marks.get("quant_method")
    # these mark plain weights, too, and what is compressed shows in the files
    if marks and method != "compressed-tensors" and "sparsity_config" not in marks:
        raise UserError(f"{option} {folder} is quantized ({method}); give it unquantized")
    return marks


def needs_conversion(folder: Path) -> bool:
    """Whether the weights are in a format that cannot be streamed (.bin, .gguf)."""
    return not can_be_streamed(folder)


def prepare(located: Path, config: ModelConfig, run: Run, stage: str = "source") -> Path:
    """A directory that can be streamed: `located` itself, or its conversion in the run directory.

    Raises:
        UserError: transformers cannot read the model.
    """
    names_differ = None
    if not needs_conversion(located):
        try:
            match_names(skeleton(located), Checkpoint(located))
            return located
        except NamesDiffer as error:
            names_differ = error
    known = {"model.path": content(located)} if run.world.is_main else {}
    recipe = {"model": asdict(config), CONTENTS: known}
    folder, done = run.stage(stage, recipe)
    if not done:
        run.console.say(f"converting {located.name} to safetensors, once")
        if prefix := located.is_dir() and stored_prefix(located):
            run.console.say(f"model {located}: tensor names are read without their prefix {prefix}")
        run.bind(folder, recipe)
        if run.world.is_main:
            try:
                convert(located, folder)
            except UserError as error:
                raise (names_differ or error) from None
        files = weights_and_masks(folder) if run.world.is_main else ()
        run.finish_stage(folder, {"from": str(located)}, files)
    return folder


def contents(config: Config, located: Path | None = None) -> dict[str, str]:
    """Checksums of what the settings name by a path, by option: it may be given by another path.

    `located` is where the run's model lies, if it is given by its name on the hub.
    """
    known: dict[str, str | None] = {}
    for option in places(Config):
        section, _, name = option.rpartition(".")
        value = getattr(config, section, None) and getattr(getattr(config, section), name)
        if section != "evaluate" and isinstance(value, str) and value not in NAMES:
            known[option] = content(Path(value))
    if located:
        known["model.path"] = content(located)
    known["model.revision"] = known.get("model.path")
    return {option: checksum for option, checksum in known.items() if checksum}


def content(path: Path) -> str | None:
    """A checksum of a file or a model directory, wherever it lies; None for what is neither.

    Of a directory it is made of the weights' fingerprint, the configuration and the tokenizer.
    """
    files, names = [path], [""]
    try:
        if path.is_dir():
            files = sorted({f for name in _MEANING for f in path.glob(name) if f.is_file()})
            names = [fingerprint(path) or "", *(file.name for file in files)]
        if not files or not all(map(Path.is_file, files)):
            return None
        sha = hashlib.sha256("/".join(names).encode())
        for file in files:
            with open(file, "rb") as opened:
                sha.update(hashlib.file_digest(opened, "sha256").digest())
    except (OSError, UserError):  # whoever needs it says what is wrong
        return None
    return sha.hexdigest()[:16]


def found_here(option: str, path: str | None, config: Config, world: World) -> Path | None:
    """The directory of a model that an option names, of one that is only on the hub a directory
    with its config.json; None where even that is out of reach.

    Raises:
        UserError: there is no such model, or it is not whole.
    """
    if not path:
        return None
    model = ModelConfig(path=path)
    found = locate(model, download=False, option=option)
    if not found:
        return hub_config(model, option)
    if not found.is_dir():
        return None
    check_files(option, found, config, world)
    return found


def hub_config(config: ModelConfig, option: str = "model.path") -> Path | None:
    """A directory with the config.json of a model on the hub, enough for its shapes; None where
    the hub is out of reach.

    Raises:
        UserError: the hub has no such model.
    """
    import huggingface_hub

    try:
        file = huggingface_hub.hf_hub_download(config.path, "config.json", revision=config.revision)
    except huggingface_hub.errors.HfHubHTTPError as error:  # it has answered
        raise _not_on_hub(option, config, _first_line(error)) from None
    except Exception:  # the network's errors have no common base
        return None
    _storage_marks(Path(file).parent, option)
    return Path(file).parent


def is_whole(folder: Path) -> bool:
    """Whether a model directory holds weights, with every shard that its index names."""
    try:
        return bool(weight_files(folder))
    except UserError:
        return False


def check_files(option: str, folder: Path, config: Config, world: World) -> None:
    """Refuses a directory without weights, or one that lacks a tensor or has it in another shape.

    Only headers are read. What an earlier job has converted passes: its weights may be gone.

    Raises:
        UserError: it is not whole.
    """
    name = "source" if option == "model.path" else f"{option.rpartition('.')[2]}-source"
    converted = Path(config.output_dir) / name / "done.json"
    world.decide(lambda: converted.exists() or _check_files(option, folder))


def _check_files(option: str, folder: Path) -> None:
    if not weight_files(folder):
        raise UserError(
            f"{option} {folder} has no weights: neither {SINGLE} nor pytorch_model.bin is in it; "
            "get the model again"
        )
    names_differ = None
    try:
        if not needs_conversion(folder):
            match_names(skeleton(folder), Checkpoint(folder))
            return
    except NamesDiffer as error:
        names_differ = error
    try:
        load_whole(folder, device_map={"": "meta"})
    except UserError as error:
        raise (names_differ or error) from None


def further_model(option: str, path: str, run: Run) -> Path:
    """The model that an option other than `model.path` names, as a directory that can be streamed.

    Raises:
        UserError: it is not to be had, or cannot be read.
    """
    model, name = ModelConfig(path=path), option.rpartition(".")[2]
    folder = prepare(locate(model, option=option), model, run, f"{name}-source")
    if told := read_as(skeleton(folder), Checkpoint(folder)):
        run.console.say(told)
    return folder


def convert(source: Path, folder: Path) -> None:
    """Rewrites a model as a plain safetensors directory. Holds the whole model in memory.

    For `.gguf` files (de-quantised to float32), `.bin` checkpoints (read with torch's weights-only
    unpickler) and directories whose tensors have other names than the model's parameters.

    Raises:
        UserError: transformers cannot read it, or it lacks weights.
    """
    where = {"gguf_file": source.name} if source.suffix == ".gguf" else {}
    root = str(source.parent if where else source)
    model = load_whole(source, dtype="float32" if where else "auto", **where)
    # transformers marks a de-quantised GGUF model as quantised still, and refuses to save it
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    if not where and stored_prefix(source):
        model._weight_conversions = None  # else the names get the prefix back
    model.save_pretrained(folder)
    if where:
        AutoTokenizer.from_pretrained(root, **where, **FROM_DIRECTORY).save_pretrained(folder)
    else:
        copy_side_files(source, folder, replace=False)


def load_whole(source: Path, **options) -> PreTrainedModel:
    """A model in memory, read by transformers with `options`.

    Raises:
        UserError: transformers cannot read it, or it lacks weights.
    """
    disable_progress_bar()
    is_file = "gguf_file" in options
    folder = source.parent if is_file else source
    try:
        kind = model_class(source)
        # else the error names neither tensor nor shapes
        options |= FROM_DIRECTORY | {"ignore_mismatched_sizes": True}
        how = options if is_file else options | reading_options(source)
        model, info = kind.from_pretrained(folder, output_loading_info=True, **how)
        head = f"{model.base_model_prefix}."
        lacks, is_body = info["missing_keys"], model.base_model is model
        if lacks and not is_body and not any(name.startswith(head) for name in lacks):
            # a body without the head that config.json names, as `skeleton` finds in safetensors
            kind = type(model.base_model)
            model, info = kind.from_pretrained(folder, output_loading_info=True, **how)
    except UserError:
        raise
    except Exception as error:  # every kind of damage shows in a way of its own
        raise UserError(
            f"{source} cannot be read by transformers: {' '.join(str(error).split())[:200]}"
        ) from None
    if info["mismatched_keys"]:
        name, stored, made = sorted(info["mismatched_keys"])[0]
        raise UserError(
            f"{name} in {source} is {list(stored)}, but its config.json makes it {list(made)}; "
            "weights and config do not belong together"
        )
    if info["missing_keys"]:  # transformers would invent them
        raise UserError(
            f"{source} lacks {len(info['missing_keys'])} of the weights that its config.json asks "
            f"for, {sorted(info['missing_keys'])[0]} among them; get the model again"
        )
    return model


def _download(config: ModelConfig, download: bool, option: str) -> Path | None:
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
        if offline():
            reason = (
                "the hub is switched off (HF_HUB_OFFLINE) and no copy is in its cache; fetch it "
                "with `cap-llm prefetch` where there is a hub"
            )
        else:
            reason = _first_line(error)
        raise _not_on_hub(option, config, reason) from None
    return folder


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _not_on_hub(option: str, config: ModelConfig, reason: str) -> UserError:
    return UserError(
        f"{option} {config.path!r} is neither a directory nor to be had from the hub: {reason}"
    )

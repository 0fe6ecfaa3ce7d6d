"""From a model's name to a local directory of safetensors that can be streamed."""

from __future__ import annotations

import difflib
import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from cap_llm.config import Config, ModelConfig
from cap_llm.models.blocks import NamesDiffer, match_names, model_class, skeleton
from cap_llm.models.checkpoint import (
    Checkpoint,
    can_be_streamed,
    config_dict,
    fingerprint,
    has_weights,
)
from cap_llm.models.masks import Masks
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.rundir import CONTENTS, Run, refuse_other, with_contents
from cap_llm.runtime.sections import places
from cap_llm.text.corpora import NAMES, offline

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
    if path.name in ("", ".."):  # what is made from it is called by its name
        path = path.resolve()
    if path.is_dir() or path.suffix == ".gguf":
        if not path.exists():
            raise UserError(f"{option} {path} does not exist")
        return _unquantised(path, option)
    if path.is_file():
        raise UserError(f"{option} {path} is a file; give the model's directory, or a .gguf file")
    if config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
        near = []
        if path.parent.is_dir():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{option} {config.path} is not a directory{hint}")
    folder = _download(config, download)
    return folder and _unquantised(folder, option)


def _unquantised(path: Path, option: str) -> Path:
    quantised = config_dict(path).get("quantization_config") if path.is_dir() else None
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(f"{option} {path} is quantised ({method}); give it unquantised")
    return path


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
    known = {"model.path": content(located)} if run.world.first else {}
    recipe = {"model": asdict(config), CONTENTS: known}
    folder, done = run.stage(stage, recipe)
    if not done:
        run.console.say(f"converting {located.name} to safetensors, once")
        run.bind(folder, recipe)
        if run.world.first:
            try:
                convert(located, folder)
            except UserError as error:
                raise (names_differ or error) from None
        run.finish_stage(folder, {"from": str(located)})
    return folder


def start_of(stage: str, source: Path, config: Config, run: Run) -> tuple[Path, Path]:
    """The model that a stage starts from, and the dense one that it was pruned from.

    The first is what the stage before it made in this run directory, now or in an earlier job;
    without one, the run's model. The second is then `model.dense`, or the run's model where the
    first was made of it here (and is kept), or is not pruned yet and about to climb a ladder. Else
    recover takes its teacher for it.

    Raises:
        UserError: nothing says which model is the dense one.
    """
    earlier = config.start(stage)
    start = run.stage(earlier, config.recipe(earlier))[0] if earlier else source
    if config.model.dense:
        return start, further_model("model.dense", config.model.dense, run)
    recovers = stage == "recover"
    if start is not source:
        dense_is_here = has_weights(source, run.world)
    else:
        climbs = recovers and bool(config.recover.ladder)
        dense_is_here = climbs and not Masks(source, run.world)
    if recovers and config.recover.teacher and not dense_is_here:
        return start, further_model("recover.teacher", config.recover.teacher, run)
    if start is source and not dense_is_here:
        raise UserError(
            f"{stage} starts from {source}, and nothing says what it was pruned from: name the "
            f"dense model with --model.dense, or let --stages begin with oneshot"
        )
    return start, source


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


def refuse_another_run(config: Config, located: Path | None = None) -> None:
    """Refuses an output_dir whose stages were begun with other settings. Writes nothing.

    Raises:
        UserError: names the first setting that differs.
    """
    known = contents(config, located)
    for stage in ("dense", *config.stages):
        refuse_other(Path(config.output_dir) / stage, with_contents(config.recipe(stage), known))


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
    except OSError:  # whoever needs it says what is wrong
        return None
    return sha.hexdigest()[:16]


def found_here(path: str | None, option: str) -> Path | None:
    """The directory of a model that an option names; None for one that is only on the hub, which
    is looked at when it is here.

    Raises:
        UserError: there is no such model.
    """
    found = locate(ModelConfig(path=path), download=False, option=option) if path else None
    return found if found and found.is_dir() else None


def further_model(option: str, path: str, run: Run) -> Path:
    """The model that an option other than `model.path` names, as a directory that can be streamed.

    Raises:
        UserError: it is not to be had, or cannot be read.
    """
    model, name = ModelConfig(path=path), option.rpartition(".")[2]
    return prepare(locate(model, option=option), model, run, f"{name}-source")


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
    model.save_pretrained(folder)
    if where:
        AutoTokenizer.from_pretrained(root, **where).save_pretrained(folder)
        return
    for file in source.iterdir():
        wanted = any(file.match(pattern) for pattern in _CONFIG_FILES)
        if wanted and not file.name.endswith(".index.json") and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def load_whole(source: Path, **options) -> PreTrainedModel:
    """A model in memory, read by transformers with `options`.

    Raises:
        UserError: transformers cannot read it, or it lacks weights.
    """
    disable_progress_bar()
    folder = source.parent if "gguf_file" in options else source
    try:
        kind = model_class(source)
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    except UserError:
        raise
    except Exception as error:  # every kind of damage shows in a way of its own
        raise UserError(
            f"{source} cannot be read by transformers: {' '.join(str(error).split())[:200]}"
        ) from None
    if info["missing_keys"]:  # transformers would invent them
        raise UserError(
            f"{source} lacks {len(info['missing_keys'])} of the weights that its config.json asks "
            f"for, {sorted(info['missing_keys'])[0]} among them; get the model again"
        )
    return model


def _download(config: ModelConfig, download: bool) -> Path | None:
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
        if not list(folder.glob("model*.safetensors")):
            folder = fetch([*_CONFIG_FILES, "pytorch_model*.bin"])
    except Exception as error:  # the hub's and the network's errors have no common base
        if not download and not offline():
            return None
        if offline():
            reason = (
                "the hub is switched off (HF_HUB_OFFLINE) and no copy is in its cache; fetch it "
                "with `cap-llm prefetch` where there is a hub"
            )
        else:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise UserError(
            f"model {config.path!r} is neither a directory nor to be had from the hub: {reason}"
        ) from None
    return folder

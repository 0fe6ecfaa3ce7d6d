"""From a model's name to a local directory of safetensors that can be streamed."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from cap_llm.config import ModelConfig
from cap_llm.models.blocks import NamesDiffer, match_names, model_class, skeleton
from cap_llm.models.checkpoint import INDEX, SINGLE, Checkpoint, config_dict
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import write_json
from cap_llm.runtime.rundir import Run
from cap_llm.text.corpora import offline

_CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


def locate(config: ModelConfig, download: bool = True) -> Path | None:
    """The local directory (or .gguf file) of a model; a hub name is downloaded once.

    With `download` off, None stands for a model that is on the hub and not in its cache.

    Raises:
        UserError: there is no such model, or it cannot be fetched.
    """
    path = Path(config.path)
    if path.is_dir() or path.suffix == ".gguf":
        if not path.exists():
            raise UserError(f"model.path {path} does not exist")
        if path.is_dir():
            quantised = config_dict(path).get("quantization_config")
            if quantised:
                raise UserError(
                    f"model.path {path} is quantised ({quantised.get('quant_method')}); "
                    "give the unquantised model"
                )
        return path
    if config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
        near = []
        if path.parent.is_dir():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"model.path {config.path} is not a directory{hint}")
    return _download(config, download)


def needs_conversion(folder: Path) -> bool:
    """Whether the weights are in a format that cannot be streamed (.bin, .gguf)."""
    return not any((folder / name).exists() for name in (INDEX, SINGLE))


def prepare(located: Path, run: Run) -> Path:
    """A directory that can be streamed: `located` itself, or its conversion in the run directory.

    Raises:
        UserError: transformers cannot read the model.
    """
    if not needs_conversion(located):
        try:
            match_names(skeleton(located), Checkpoint(located))
            return located
        except NamesDiffer as error:
            run.console.say(f"{error}; rewriting the model with transformers' names")
    folder = run.path / "source"
    if run.world.first and not (folder / "done.json").exists():
        run.console.say(f"converting {located.name} to safetensors, once")
        convert(located, folder)
        write_json(folder / "done.json", {"from": str(located)})
    run.world.barrier()
    return folder


def convert(source: Path, folder: Path) -> None:
    """Rewrites a model as a plain safetensors directory. Holds the whole model in memory.

    For `.gguf` files (de-quantised to float32), `.bin` checkpoints (read with torch's weights-only
    unpickler) and directories whose tensors have other names than the model's parameters.

    Raises:
        UserError: transformers cannot read it.
    """
    where = {"gguf_file": source.name} if source.suffix == ".gguf" else {}
    root = str(source.parent if where else source)
    try:
        model = model_class(source).from_pretrained(
            root, dtype="float32" if where else "auto", use_safetensors=None, **where
        )
    except Exception as error:  # every format fails in a way of its own
        raise UserError(
            f"{source} cannot be read by transformers: {str(error).splitlines()[0]}"
        ) from None
    # transformers marks a de-quantised GGUF model as quantised still, and refuses to save it
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    if where:
        AutoTokenizer.from_pretrained(root, **where).save_pretrained(folder)
    else:
        for file in source.iterdir():
            if file.suffix in {p[1:] for p in _CONFIG_FILES} and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


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
        folder = fetch([*_CONFIG_FILES, "*.safetensors"])
        if not list(folder.glob("*.safetensors")):
            folder = fetch([*_CONFIG_FILES, "pytorch_model*.bin"])
    except Exception as error:  # the hub's and the network's errors have no common base
        if not download and not offline():
            return None
        if offline():
            reason = "the hub is switched off (HF_HUB_OFFLINE) and no copy is in its cache"
        else:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise UserError(
            f"model {config.path!r} is neither a directory nor to be had from the hub: {reason}"
        ) from None
    return folder

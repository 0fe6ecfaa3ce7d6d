"""The architecture of a model directory without its weights: class, blocks, tensor names."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from cap_llm.models.checkpoint import Checkpoint, stored_prefix
from cap_llm.models.files import STORAGE, can_be_streamed, config_dict
from cap_llm.runtime.errors import UserError, one_line

# Options of `from_pretrained`. By default transformers asks on a terminal whether to run a
# directory's own code (and takes SIGALRM for that), and looks for missing files on the hub.
FROM_DIRECTORY = {"trust_remote_code": False, "local_files_only": True}


def skeleton(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A directory's model with its parameters on the meta device and its buffers computed.

    Its type is `dtype` or that of config.json. Its class is the one that config.json names, or the
    base model's if the files lack only the head, as those of sentence encoders do.

    Raises:
        UserError: transformers does not support this model type, or config.json is damaged.
    """
    model = _empty(folder, _named_class(folder), dtype)
    if not can_be_streamed(folder) or model.base_model is model:
        return model
    checkpoint, head = Checkpoint(folder), model.base_model_prefix + "."
    missing = _missing(model, _stored(model, checkpoint))
    if not missing or any(name.startswith(head) for name in missing):
        return model
    body = _empty(folder, type(model.base_model), dtype)
    return model if _missing(body, _stored(body, checkpoint)) else body


def _empty(folder: Path, kind: type, dtype: torch.dtype | None) -> PreTrainedModel:
    config = model_config(folder)
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            return kind._from_config(config, dtype=dtype or config.dtype)
    except UserError:
        raise
    except Exception as error:  # any type: the values go straight into the model's own code
        raise _unreadable(folder, error) from None


def model_class(source: Path) -> type:
    """The class that the model was saved from; the auto class for GGUF, which names none."""
    return AutoModelForCausalLM if source.suffix == ".gguf" else type(skeleton(source))


def _named_class(folder: Path) -> type:
    config = model_config(folder)
    for name in config.architectures or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UserError(f"{folder} ({config.model_type}) is not a language model") from None


def read_as(model: PreTrainedModel, checkpoint: Checkpoint) -> str:
    """A sentence about how the model differs from what its directory says, or an empty string."""
    parts, named = [], _named_class(checkpoint.folder)
    if checkpoint.prefix:
        parts.append(f"removing the prefix {checkpoint.prefix} from tensor names")
    if type(model) is not named:
        parts.append(
            f"loading it as {type(model).__name__}, because the files lack the head of "
            f"{named.__name__}"
        )
    return f"model {checkpoint.folder}: {'; '.join(parts)}" if parts else ""


def reading_options(folder: Path) -> dict:
    """The options that make `from_pretrained` read a directory as `skeleton` does."""
    prefix = stored_prefix(folder)
    renaming = {"key_mapping": {f"^{re.escape(prefix)}": ""}} if prefix else {}
    return {"config": model_config(folder)} | renaming


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's blocks.

    The blocks are the only `ModuleList` of the classes in `_no_split_modules`. If that is empty,
    they are the only one with `num_hidden_layers` modules of one class.

    Raises:
        UserError: there is not exactly one such list, or it contains no linear layer.
    """
    classes = set(model._no_split_modules or [])
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    names = [n for n, m in lists.items() if {type(block).__name__ for block in m} <= classes]
    if not classes:  # as in many encoders
        n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        names = [n for n, m in lists.items() if len(m) == n_layers and len(set(map(type, m))) == 1]
    if len(names) > 1 and model.config.get_text_config() is not model.config:
        # multimodal: only the blocks that read text
        inside = {id(m) for m in model.get_decoder().modules()}
        names = [n for n in names if id(lists[n]) in inside]
    if len(names) != 1:
        kind = f"of class {' or '.join(sorted(classes))}" if classes else "with one per layer"
        raise UserError(
            f"{type(model).__name__} must have exactly one list of blocks {kind}, but has "
            f"{', '.join(names) or 'none'}. This model cannot be pruned block by block."
        )
    prefix, blocks = names[0], lists[names[0]]
    if not any(isinstance(m, nn.Linear | Conv1D) for m in blocks.modules()):
        raise UserError(f"the blocks {prefix} of {type(model).__name__} contain no linear layer")
    return prefix, blocks


def match_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Maps each parameter, except tied ones, to its name in the files.

    The names differ if the files were saved from a base model (GPT-2's lack `transformer.`) or if
    transformers renamed a module (GPT-NeoX's `embed_out`). transformers' own rules rename them.

    Raises:
        NamesDiffer: the files lack a parameter under these rules.
        UserError: a shape does not match config.json, a tensor is quantized, or two tensors differ
            that config.json ties.
    """
    tensors = model.state_dict(keep_vars=True)  # parameters and persistent buffers
    keys = _stored(model, checkpoint)
    tied = _tied(model)
    for name, other in tied.items():
        if name in keys and other in keys:
            both = list(checkpoint.read([keys.pop(name), keys[other]]).values())
            if not torch.equal(*both):
                raise UserError(
                    f"{name} and {other} in {checkpoint.folder} differ, but config.json ties them. "
                    'If they should differ, set "tie_word_embeddings": false in config.json.'
                )
    for name in _missing(model, keys):
        checkpoint.refuse_compressed()
        raise NamesDiffer(
            f"{checkpoint.folder} has no tensor for the parameter {name}. Download the model again."
        )
    for name in (name for name in tensors if name in keys):
        key, tensor = keys[name], tensors[name]
        if list(tensor.shape) != checkpoint.shape(key):
            raise UserError(
                f"{key} in {checkpoint.folder} has shape {checkpoint.shape(key)}, but config.json "
                f"implies {list(tensor.shape)}."
            )
        if isinstance(tensor, nn.Parameter):
            checkpoint.dtype(key)  # raises if quantized
    return keys


def _stored(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Maps the model's parameters and buffers that the files contain to their names there."""
    tensors = model.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    keys: dict[str, str] = {}
    for key in checkpoint.names():
        name, _ = rename_source_key(key, renamings, [], model.base_model_prefix, tensors)
        if name in tensors:
            keys[name] = key
    return keys


def _tied(model: PreTrainedModel) -> dict[str, str]:
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _missing(model: PreTrainedModel, keys: dict[str, str]) -> list[str]:
    """The untied parameters that have no name in `keys`.

    Buffers may be missing, as in old files; they keep their computed values.
    """
    tensors, tied = model.state_dict(keep_vars=True), _tied(model)
    parameters = [name for name, t in tensors.items() if isinstance(t, nn.Parameter)]
    return [name for name in parameters if name not in keys and name not in tied]


class NamesDiffer(UserError):
    """The tensor names in the files do not match the model."""


def model_config(folder: Path) -> PreTrainedConfig:
    """A model directory's config as transformers reads it, without storage settings.

    Raises:
        UserError: transformers does not support this model type, or the model needs its own code.
    """
    content = config_dict(folder)
    kind, code = content.get("model_type"), content.get("auto_map")
    if code and str(kind) not in CONFIG_MAPPING:
        raise UserError(
            f"{folder}: transformers {transformers.__version__} does not support model_type "
            f"{kind!r}, and cap_llm never runs a model's own Python code (auto_map in config.json)"
        )
    try:
        config = AutoConfig.from_pretrained(folder, **FROM_DIRECTORY)
    except Exception as error:  # KeyError, ValueError, OSError, by cause
        raise _unreadable(folder, error) from None
    for part in (config, config.get_text_config()):  # two if multimodal
        for name in STORAGE[:-1]:
            if hasattr(part, name):
                delattr(part, name)
        kernel = part._attn_implementation
        if isinstance(kernel, str) and "/" in kernel:
            raise UserError(
                f"{folder}/config.json sets attn_implementation to {kernel}, code from the hub "
                'that cap_llm never runs. Set it to "sdpa".'
            )
    return config


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"{folder}/config.json: transformers {transformers.__version__} cannot read it: "
        f"{one_line(error)}"
    )


def states_of(out) -> torch.Tensor:
    """The hidden states of a block's output, a tensor or a tuple that begins with it."""
    return out[0] if isinstance(out, tuple | list) else out

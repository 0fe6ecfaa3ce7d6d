"""A model directory's architecture without its weights: class, blocks, names of the tensors."""

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
from cap_llm.runtime.errors import UserError

# How transformers reads a directory: left to itself it asks on a terminal whether to run the code
# in it (and takes SIGALRM for that), and looks for what is missing on the hub.
FROM_DIRECTORY = {"trust_remote_code": False, "local_files_only": True}


def skeleton(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a directory with its parameters on the meta device and its buffers computed,
    in `dtype` or that of config.json.

    It is the class that config.json names, or its body where the files hold all but the head: so
    sentence encoders are stored.

    Raises:
        UserError: transformers does not know this kind of model, or config.json is damaged.
    """
    model = _bare(folder, _named_class(folder), dtype)
    if not can_be_streamed(folder) or model.base_model is model:
        return model
    checkpoint, head = Checkpoint(folder), model.base_model_prefix + "."
    lacks = _missing(model, _stored(model, checkpoint))
    if not lacks or any(name.startswith(head) for name in lacks):
        return model
    body = _bare(folder, type(model.base_model), dtype)
    return model if _missing(body, _stored(body, checkpoint)) else body


def _bare(folder: Path, kind: type, dtype: torch.dtype | None) -> PreTrainedModel:
    config = model_config(folder)
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            return kind._from_config(config, dtype=dtype or config.dtype)
    except UserError:
        raise
    except Exception as error:  # of any kind: the values go straight into the model's own code
        raise _unreadable(folder, error) from None


def model_class(source: Path) -> type:
    """The class that the model was saved from, or the auto class where it does not say."""
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
    """What a user is told where a model is not read as its directory says; else empty."""
    told, named = [], _named_class(checkpoint.folder)
    if checkpoint.prefix:
        told.append(f"tensor names are read without their prefix {checkpoint.prefix}")
    if type(model) is not named:
        told.append(f"the head of {named.__name__} is not in the files, {type(model).__name__} is")
    return f"model {checkpoint.folder}: {'; '.join(told)}" if told else ""


def reading_options(folder: Path) -> dict:
    """What `from_pretrained` is to be given, so that it reads a directory as `skeleton` does."""
    prefix = stored_prefix(folder)
    renamed = {"key_mapping": {f"^{re.escape(prefix)}": ""}} if prefix else {}
    return {"config": model_config(folder)} | renamed


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's blocks.

    Raises:
        UserError: there is no such list, or more than one.
    """
    classes = set(model._no_split_modules or [])
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    found = [n for n, m in lists.items() if {type(block).__name__ for block in m} <= classes]
    if not classes:  # as many encoders leave it: a list of one class, a module for each layer
        n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        found = [n for n, m in lists.items() if len(m) == n_layers and len(set(map(type, m))) == 1]
    if len(found) > 1 and model.config.get_text_config() is not model.config:
        # one that sees or hears, too: the blocks that read text
        inside = {id(m) for m in model.get_decoder().modules()}
        found = [n for n in found if id(lists[n]) in inside]
    if len(found) != 1:
        wanted = f"of class {' or '.join(sorted(classes))}" if classes else "one for each layer"
        raise UserError(
            f"{type(model).__name__} should have one list of blocks, {wanted}; found: "
            f"{', '.join(found) or 'none'}; this model cannot be pruned block by block"
        )
    prefix, blocks = found[0], lists[found[0]]
    if not any(isinstance(m, nn.Linear | Conv1D) for m in blocks.modules()):
        raise UserError(f"the blocks {prefix} of {type(model).__name__} hold no linear layer")
    return prefix, blocks


def match_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """For each parameter the name under which the files hold it; tied ones are left out, also
    where a file holds them beside what they are tied to.

    The two differ for files saved from a base model (GPT-2's lack `transformer.`) and where
    transformers renamed a module (GPT-NeoX's `embed_out`); its own renaming rules are asked.

    Raises:
        NamesDiffer: a parameter is under no name that these rules give.
        UserError: a shape differs from the one that config.json makes, or is quantised, or two
            tensors differ that config.json ties.
    """
    tensors = model.state_dict(keep_vars=True)  # parameters and persistent buffers
    keys = _stored(model, checkpoint)
    tied = _tied(model)
    for name, of in tied.items():
        if name in keys and of in keys:
            both = list(checkpoint.read([keys.pop(name), keys[of]]).values())
            if not torch.equal(*both):
                raise UserError(
                    f"{name} and {of} in {checkpoint.folder} differ, but its config.json ties "
                    'them; set "tie_word_embeddings": false there if they are to differ'
                )
    for name in _missing(model, keys):
        checkpoint.refuse_compressed()
        raise NamesDiffer(
            f"{checkpoint.folder} holds no tensor for the parameter {name}; get the model again"
        )
    for name in (name for name in tensors if name in keys):
        key, tensor = keys[name], tensors[name]
        if list(tensor.shape) != checkpoint.shape(key):
            raise UserError(
                f"{key} in {checkpoint.folder} is {checkpoint.shape(key)}, but its config.json "
                f"makes it {list(tensor.shape)}; weights and config do not belong together"
            )
        if isinstance(tensor, nn.Parameter):
            checkpoint.dtype(key)  # refuses quantised storage
    return keys


def _stored(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """The files' names of a model's parameters and buffers, of those that they hold."""
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
    """The parameters that have no name in `keys` and are not tied to others.

    Old files lack some buffers, which then keep their computed values.
    """
    tensors, tied = model.state_dict(keep_vars=True), _tied(model)
    wanted = [name for name, t in tensors.items() if isinstance(t, nn.Parameter)]
    return [name for name in wanted if name not in keys and name not in tied]


class NamesDiffer(UserError):
    """The files' tensor names are not the model's."""


def model_config(folder: Path) -> PreTrainedConfig:
    """A model directory's settings as transformers reads them, without asking or running anything,
    and without those of how its weights are stored.

    Raises:
        UserError: transformers does not know this kind of model, or the directory asks for code.
    """
    content = config_dict(folder)
    kind, code = content.get("model_type"), content.get("auto_map")
    if code and str(kind) not in CONFIG_MAPPING:
        raise UserError(
            f"{folder} needs its own Python code (auto_map in config.json), which cap_llm never "
            f"runs: transformers {transformers.__version__} does not know model_type {kind!r}. "
            "Give a model of a type that it knows."
        )
    try:
        config = AutoConfig.from_pretrained(folder, **FROM_DIRECTORY)
    except Exception as error:  # KeyError, ValueError, OSError, by cause
        raise _unreadable(folder, error) from None
    for part in (config, config.get_text_config()):  # two where the model also sees
        for name in STORAGE[:-1]:
            if hasattr(part, name):
                delattr(part, name)
        kernel = part._attn_implementation
        if isinstance(kernel, str) and "/" in kernel:
            raise UserError(
                f"{folder}/config.json sets attn_implementation to {kernel}, code of the hub, "
                'which cap_llm never runs. Set it to "sdpa".'
            )
    return config


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"transformers {transformers.__version__} cannot read {folder}/config.json: "
        f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
    )


def states_of(out) -> torch.Tensor:
    """The hidden states of what a block returns: perhaps with other values behind them."""
    return out[0] if isinstance(out, tuple | list) else out

"""The architecture of a model without its weights: linears, blocks, tensor names."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from cap_llm.models.checkpoint import Checkpoint
from cap_llm.runtime.errors import UserError

LINEARS = (nn.Linear, Conv1D)  # what is pruned; `Conv1D` stores the transpose of its matrix


def linears(module: nn.Module) -> dict[str, nn.Module]:
    """The linears inside a module, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, LINEARS)}


def as_matrix(linear: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the shape of a linear's parameter as [R, C], or the reverse; a view."""
    return tensor.T if isinstance(linear, Conv1D) else tensor


def matrix(linear: nn.Module) -> torch.Tensor:
    """A linear's weight [R, C], a view of its parameter."""
    return as_matrix(linear, linear.weight.data)


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
    if not linears(blocks):
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
    keys = stored_names(model, checkpoint)
    tied = _tied(model)
    for name, other in tied.items():
        if name in keys and other in keys:
            both = list(checkpoint.read([keys.pop(name), keys[other]]).values())
            if not torch.equal(*both):
                raise UserError(
                    f"{name} and {other} in {checkpoint.folder} differ, but config.json ties them. "
                    'If they should differ, set "tie_word_embeddings": false in config.json.'
                )
    for name in missing_names(model, keys):
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


def stored_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
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


def missing_names(model: PreTrainedModel, keys: dict[str, str]) -> list[str]:
    """The untied parameters that have no name in `keys`.

    Buffers may be missing, as in old files; they keep their computed values.
    """
    tensors, tied = model.state_dict(keep_vars=True), _tied(model)
    parameters = [name for name, t in tensors.items() if isinstance(t, nn.Parameter)]
    return [name for name in parameters if name not in keys and name not in tied]


class NamesDiffer(UserError):
    """The tensor names in the files do not match the model."""


def states_of(out) -> torch.Tensor:
    """The hidden states of a block's output, a tensor or a tuple that begins with it."""
    return out[0] if isinstance(out, tuple | list) else out

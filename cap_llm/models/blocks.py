"""A Hugging Face model seen as embedding, blocks and head, without code per family.

The blocks are the one `ModuleList` of a class that the model itself names in `_no_split_modules`,
or, where it names none, the one that holds as many modules of one class as the model has layers.
What a block is called with (masks, rotary embeddings, ALiBi, ...) is recorded from the model's own
forward, in which every block is replaced by a recorder, and replayed later. So the model's own code
computes everything, and a new family needs nothing here. What does not hold for a model (a block
that reads more than its predecessor's output, say) is checked, and refused by name.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map
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

from cap_llm.models.checkpoint import (
    STORAGE,
    Checkpoint,
    can_be_streamed,
    config_dict,
    stored_prefix,
)
from cap_llm.runtime.errors import UserError

# How transformers reads a directory: left to itself it asks on a terminal whether to run the code
# in it (and takes SIGALRM for that), and looks for what is missing on the hub.
FROM_DIRECTORY = {"trust_remote_code": False, "local_files_only": True}


@dataclass
class Call:
    """What a block is called with, its hidden states [B, T, H] taken out."""

    args: tuple
    kwargs: dict
    slot: int | str  # where the hidden states go: a position or a keyword

    @classmethod
    def record(cls, args: tuple, kwargs: dict) -> tuple[Call, torch.Tensor]:
        """Splits a call into its frame and the hidden states."""
        if args:
            return cls((None, *args[1:]), dict(kwargs), 0), args[0]
        kwargs = dict(kwargs)
        return cls((), kwargs, "hidden_states"), kwargs.pop("hidden_states")

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output for `hidden` [B, T, H]."""
        if self.slot == 0:
            out = block(hidden, *self.args[1:], **self.kwargs)
        else:
            out = block(**self.kwargs, hidden_states=hidden)
        return states_of(out)


def states_of(out) -> torch.Tensor:
    """The hidden states of what a block returns: perhaps with other values behind them."""
    return out[0] if isinstance(out, tuple | list) else out


@dataclass
class Group:
    """The linears of a block that read the same input [tokens, C], in the order they run."""

    names: list[str]
    columns: int

    @property
    def short(self) -> str:
        """The names without their modules', for people."""
        return " ".join(name.rpartition(".")[2] for name in self.names)


class BlockModel:
    """A model whose blocks are visited one at a time.

    Either wraps a module in memory, or streams a model directory: then only what lies outside the
    blocks is resident, and `block(i)` brings in the weights of one.

    Args:
        model: the module; with `checkpoint`, its parameters are on the meta device.
        device: where it computes.
        checkpoint: the files to stream from.
        dtype: the type to compute in; by default that of the parameters.

    Raises:
        UserError: no blocks can be found, or a block holds weights that are not linears.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        checkpoint: Checkpoint | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.model, self.device, self.checkpoint, self.dtype = model, device, checkpoint, dtype
        model.eval().requires_grad_(False)
        for config in (model.config, model.config.get_text_config()):  # two where it also sees
            config.use_cache = False
        self.prefix, self.blocks = find_blocks(model)
        for i in range(len(self.blocks)):
            _refuse_unprunable(self.block_name(i), self.blocks[i])
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._n_returned: int | None = None  # values that a block returns; 0: a bare tensor
        if checkpoint:
            self._key = match_names(model, checkpoint)
            self._load_outside()

    @classmethod
    def open(
        cls, folder: Path, device: torch.device, dtype: torch.dtype | None = None
    ) -> BlockModel:
        """Opens a model directory for streaming.

        It computes in `dtype`; by default in float32 on a CPU and in the stored type on a GPU.

        Raises:
            UserError: the directory is damaged or the model cannot be walked block by block.
        """
        checkpoint = Checkpoint(folder)
        model = skeleton(folder)
        if dtype is None and device.type == "cpu":
            dtype = torch.float32
        elif dtype is None:
            prefix, blocks = find_blocks(model)
            matrix = next(n for n, p in blocks[0].named_parameters() if p.dim() > 1)
            dtype = checkpoint.dtype(match_names(model, checkpoint)[f"{prefix}.0.{matrix}"])
        return cls(model, device, checkpoint, dtype)

    def __len__(self) -> int:
        return len(self.blocks)

    def block_name(self, i: int) -> str:
        """The name of block i in the model, such as `model.layers.3`."""
        return f"{self.prefix}.{i}"

    def linears(self, i: int) -> dict[str, nn.Module]:
        """The prunable linears of block i by their name in the block."""
        modules = self.blocks[i].named_modules()
        return {name: m for name, m in modules if isinstance(m, nn.Linear | Conv1D)}

    def weight_name(self, i: int, linear: str) -> str:
        """The name of a linear's weight in the model."""
        return f"{self.block_name(i)}.{linear}.weight"

    @property
    def is_causal(self) -> bool:
        """Whether the model gives next-token logits, so that it has a perplexity."""
        return type(self.model) in AutoModelForCausalLM._model_mapping.values()

    @contextlib.contextmanager
    def block(self, i: int) -> Iterator[nn.Module]:
        """Block i with its weights on the device; a streamed block is dropped afterwards."""
        block = self.blocks[i]
        if not self.checkpoint:
            yield block
            return
        prefix = self.block_name(i) + "."
        try:
            self._fill(block, prefix)
            yield block
        finally:
            for module in block.modules():
                _drop_weights(module)

    def drop_outside(self) -> None:
        """Frees what lies outside the blocks (embedding, head) of a streamed model.

        For a walk that has embedded its text and needs no logits.
        """
        inside = {module for block in self.blocks for module in block.modules()}
        for module in self.model.modules():
            if self.checkpoint and module not in inside:
                _drop_weights(module)

    def key(self, name: str) -> str:
        """The name under which the files hold parameter `name`."""
        return self._key[name]

    def block_keys(self, i: int) -> list[str]:
        """The names of all parameters and persistent buffers of block i in the files."""
        prefix = self.block_name(i) + "."
        return [key for name, key in self._key.items() if name.startswith(prefix)]

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """What the first block reads for ids [B, T], and the frame of each block's call.

        Raises:
            UserError: a block depends on more than its predecessor's output and the shape of `ids`.
        """
        hidden, calls = self._record(ids)
        shape = tuple(ids.shape)
        if shape not in self._calls:
            other = torch.where(ids > 0, ids - 1, ids + 1).flip(-1)  # any other text of this shape
            _, again = self._record(other)
            for i, (a, b) in enumerate(zip(calls, again, strict=True)):
                _require_same(self.block_name(i), a, b)
            self._calls = {**self._calls, shape: calls}
        return hidden, self._calls[shape]

    @torch.no_grad()
    def head(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] from the last block's output [B, T, H] for ids [B, T]."""
        last = len(self) - 1

        def skip(i: int) -> Callable:
            def forward(*args, **kwargs):
                _, x = Call.record(args, kwargs)
                out = hidden if i == last else x
                return self._returned(out)

            return forward

        with self._replaced([skip(i) for i in range(len(self))]):
            return self.model(input_ids=ids.to(self.device)).logits

    @torch.no_grad()
    def groups(self, i: int, call: Call, hidden: torch.Tensor) -> list[Group]:
        """The linears of block i by the input they read, found by a run on the meta device.

        Raises:
            UserError: a linear runs never or more than once, so that its input is not one matrix.
        """
        block = _on_meta(self.blocks[i])
        seen: dict[str, tuple] = {}
        inputs = []  # kept alive, so that no two of them can share an address

        def note(name: str) -> Callable:
            def hook(module, args):
                x = args[0]
                inputs.append(x)
                place = (x.untyped_storage()._cdata, x.storage_offset(), x.shape[-1], x._version)
                seen[name] = (*seen.get(name, ()), place)

            return hook

        handles = [
            module.register_forward_pre_hook(note(name))
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        ]
        call_on_meta = Call(*tree_map(_meta, (call.args, call.kwargs)), call.slot)
        call_on_meta.run(block, _meta(hidden))
        for handle in handles:
            handle.remove()
        for name in self.linears(i):
            if len(seen.get(name, ())) != 1:
                raise UserError(
                    f"{self.block_name(i)}.{name} runs {len(seen.get(name, ()))} times in a "
                    "forward of its block; only linears that run once can be pruned"
                )
        groups: dict[tuple, Group] = {}
        for name, (place,) in seen.items():
            groups.setdefault(place, Group([], place[2])).names.append(name)
        return list(groups.values())

    def _record(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """Runs the model with recorders in place of its blocks."""
        calls: list[Call] = []
        first: list[torch.Tensor] = []
        passed: list[torch.Tensor] = []

        def recorder(i: int) -> Callable:
            def forward(*args, **kwargs):
                call, hidden = Call.record(args, kwargs)
                if i == 0:
                    first.append(hidden)
                    if self._n_returned is None:
                        self._n_returned = self._probe_return(call, hidden)
                elif hidden is not passed[-1]:
                    raise UserError(
                        f"{self.block_name(i)} does not read what {self.block_name(i - 1)} gives; "
                        "this model cannot be pruned block by block"
                    )
                calls.append(call)
                passed[:] = [hidden.clone()]  # one is enough, and the last block needs none
                if i == len(self) - 1:
                    raise _LastBlock
                return self._returned(passed[-1])

            return forward

        with (
            self._replaced([recorder(i) for i in range(len(self))]),
            contextlib.suppress(_LastBlock),
        ):
            self.model(input_ids=ids.to(self.device))
        if len(calls) != len(self):
            raise UserError(f"only {len(calls)} of {len(self)} blocks of {self.prefix} run")
        return first[0], calls

    def _returned(self, hidden: torch.Tensor) -> torch.Tensor | tuple:
        """`hidden` as a block returns it: perhaps with others behind it, which are then None."""
        return (hidden, *[None] * (self._n_returned - 1)) if self._n_returned else hidden

    def _probe_return(self, call: Call, hidden: torch.Tensor) -> int:
        block = _on_meta(self.blocks[0])
        call = Call(*tree_map(_meta, (call.args, call.kwargs)), call.slot)
        args = (_meta(hidden), *call.args[1:]) if call.slot == 0 else ()
        kwargs = call.kwargs if args else {**call.kwargs, "hidden_states": _meta(hidden)}
        out = block(*args, **kwargs)
        return len(out) if isinstance(out, tuple | list) else 0

    @contextlib.contextmanager
    def _replaced(self, forwards: list[Callable]) -> Iterator[None]:
        for block, forward in zip(self.blocks, forwards, strict=True):
            block.forward = forward
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _load_outside(self) -> None:
        """Loads what lies outside the blocks, and brings all buffers to the device."""
        inside = tuple(self.block_name(i) + "." for i in range(len(self)))
        for path, module in self.model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)
            if not (path + ".").startswith(inside):
                self._fill(module, path + "." if path else "", recurse=False)
        self.model.tie_weights()

    def _fill(self, module: nn.Module, prefix: str, recurse: bool = True) -> None:
        names = [n for n, _ in module.named_parameters(recurse=recurse)]
        names += [n for n, _ in module.named_buffers(recurse=recurse)]
        names = [n for n in names if prefix + n in self._key]
        tensors = self.checkpoint.read(self._key[prefix + n] for n in names)
        for name in names:
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            tensor = tensors.pop(self._key[prefix + name]).to(self.device)
            if tensor.is_floating_point():
                tensor = tensor.to(self.dtype)
            if leaf in owner._buffers:
                owner._buffers[leaf] = tensor
            else:
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


class _LastBlock(Exception):
    """Ends a recording once the last block has been reached."""


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


def _refuse_unprunable(name: str, block: nn.Module) -> None:
    """Refuses a block with matrices that are not linears, such as fused experts."""
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            continue
        for p_name, p in module.named_parameters(recurse=False):
            if p.dim() >= 2:
                raise UserError(
                    f"{name}.{path} ({type(module).__name__}) holds {p_name} {list(p.shape)}, "
                    "which is no linear layer; models with fused experts or convolutions in their "
                    "blocks cannot be pruned"
                )


def _require_same(name: str, a: Call, b: Call) -> None:
    """Refuses a block whose further arguments depend on the text."""
    flat_a, _ = tree_flatten((a.args, a.kwargs))
    flat_b, _ = tree_flatten((b.args, b.kwargs))
    for x, y in zip(flat_a, flat_b, strict=True):
        if isinstance(x, torch.Tensor) and not torch.equal(x, y):
            parts = {k: [id(leaf) for leaf in tree_flatten(v)[0]] for k, v in a.kwargs.items()}
            which = next((k for k, ids in parts.items() if id(x) in ids), "an argument")
            raise UserError(
                f"{name} is called with {which}, which depends on the text; "
                "this model cannot be pruned block by block"
            )


def _drop_weights(module: nn.Module) -> None:
    for name, p in module._parameters.items():
        if p is not None:
            module._parameters[name] = nn.Parameter(p.to("meta"), requires_grad=False)


def _meta(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _on_meta(block: nn.Module) -> nn.Module:
    """A copy of a block without weights, to see how it is wired."""
    replaced = block.__dict__.pop("forward", None)
    try:
        memo = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in block.parameters()}
        return copy.deepcopy(block, memo).to("meta")
    finally:
        if replaced:
            block.forward = replaced

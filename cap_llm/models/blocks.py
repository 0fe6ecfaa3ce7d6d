"""A Hugging Face model as embedding, blocks and head, without code per model family.

`skeleton.find_blocks` finds the blocks. A block's other inputs (masks, rotary embeddings, ALiBi,
...) are recorded from the model's own forward, in which every block is replaced by a recorder, and
replayed later. So the model's own code computes everything, and a new family needs no code here.
Every assumption (such as that a block reads only its predecessor's output) is checked, and a model
that violates one is rejected with a message that names the block.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map
from transformers import AutoModelForCausalLM, PreTrainedModel

from cap_llm.models.directory import ModelDirectory
from cap_llm.models.skeleton import LINEARS, find_blocks, linears, states_of
from cap_llm.runtime.errors import UserError


@dataclass
class Call:
    """The arguments of a block's call, without its hidden states [B, T, H]."""

    args: tuple
    kwargs: dict
    slot: int | str  # position or keyword of the hidden states

    @classmethod
    def record(cls, args: tuple, kwargs: dict) -> tuple[Call, torch.Tensor]:
        """Splits a call into its other arguments and the hidden states."""
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


@dataclass
class Group:
    """The linears of a block that read the same input [tokens, C], in execution order."""

    names: list[str]
    columns: int

    @property
    def short(self) -> str:
        """The last parts of the names, for messages."""
        return " ".join(name.rpartition(".")[2] for name in self.names)


class BlockModel:
    """A model whose blocks are visited one at a time.

    It either wraps a module in memory or streams a model directory. When streaming, only the
    weights outside the blocks stay in memory, and `block(i)` loads those of one block.

    Args:
        model: the module; with `directory`, a new skeleton of it.
        device: where it computes.
        directory: the directory whose weights to stream.
        dtype: the type to compute in; by default that of the parameters.

    Raises:
        UserError: the blocks cannot be found, or a block has matrices that are not linear layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        directory: ModelDirectory | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.model, self.device, self.dtype = model, device, dtype
        self.checkpoint = directory.checkpoint if directory else None
        model.eval().requires_grad_(False)
        for config in (model.config, model.config.get_text_config()):  # two if multimodal
            config.use_cache = False
        self.prefix, self.blocks = find_blocks(model)
        for i in range(len(self.blocks)):
            _check_prunable(self.block_name(i), self.blocks[i])
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._n_returned: int | None = None  # length of a block's output tuple; 0: a tensor
        if directory:
            self._key = directory.keys
            self._load_outside()

    @classmethod
    def open(
        cls, directory: ModelDirectory, device: torch.device, dtype: torch.dtype | None = None
    ) -> BlockModel:
        """Opens a model directory for streaming.

        It computes in `dtype`; by default in float32 on a CPU and in the stored type on a GPU.

        Raises:
            UserError: the directory is damaged, or the model cannot run block by block.
        """
        if dtype is None and device.type == "cpu":
            dtype = torch.float32
        elif dtype is None:
            prefix, blocks = find_blocks(directory.skeleton)
            matrix = next(n for n, p in blocks[0].named_parameters() if p.dim() > 1)
            dtype = directory.checkpoint.dtype(directory.keys[f"{prefix}.0.{matrix}"])
        return cls(directory.build(), device, directory, dtype)

    def __len__(self) -> int:
        return len(self.blocks)

    def block_name(self, i: int) -> str:
        """The name of block i in the model, such as `model.layers.3`."""
        return f"{self.prefix}.{i}"

    def linears(self, i: int) -> dict[str, nn.Module]:
        """The prunable linears of block i, by their name in the block."""
        return linears(self.blocks[i])

    def weight_name(self, i: int, linear: str) -> str:
        """The name of a linear's weight in the model."""
        return f"{self.block_name(i)}.{linear}.weight"

    @property
    def is_causal(self) -> bool:
        """Whether the model is a causal LM, so that it has a perplexity."""
        return type(self.model) in AutoModelForCausalLM._model_mapping.values()

    @contextlib.contextmanager
    def block(self, i: int) -> Iterator[nn.Module]:
        """Block i with its weights on the device; a streamed block is freed afterwards."""
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
        """Frees the weights outside the blocks (embedding, head) of a streamed model.

        For a walk that has embedded its text and needs no logits.
        """
        inside = {module for block in self.blocks for module in block.modules()}
        for module in self.model.modules():
            if self.checkpoint and module not in inside:
                _drop_weights(module)

    def key(self, name: str) -> str:
        """The name of parameter `name` in the files."""
        return self._key[name]

    def block_keys(self, i: int) -> list[str]:
        """The names in the files of all parameters and persistent buffers of block i."""
        prefix = self.block_name(i) + "."
        return [key for name, key in self._key.items() if name.startswith(prefix)]

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """The first block's input [B, T, H] for ids [B, T], and each block's other arguments.

        Raises:
            UserError: a block depends on more than its predecessor's output and the shape of `ids`.
        """
        hidden, calls = self._record(ids)
        shape = tuple(ids.shape)
        if shape not in self._calls:
            other_ids = torch.where(ids > 0, ids - 1, ids + 1).flip(-1)  # a text of the same shape
            _, other_calls = self._record(other_ids)
            for i, (a, b) in enumerate(zip(calls, other_calls, strict=True)):
                _check_same(self.block_name(i), a, b)
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
        """The linears of block i grouped by the input they read, from a run on the meta device.

        Raises:
            UserError: a linear does not run exactly once, so its input is not one matrix.
        """
        block = _on_meta(self.blocks[i])
        keys: dict[str, tuple] = {}  # per linear, what identifies the input of each of its runs
        inputs = []  # kept alive, so that no two of them can share an address

        def recorder(name: str) -> Callable:
            def hook(module, args):
                x = args[0]
                inputs.append(x)
                key = (x.untyped_storage()._cdata, x.storage_offset(), x.shape[-1], x._version)
                keys[name] = (*keys.get(name, ()), key)

            return hook

        handles = [
            module.register_forward_pre_hook(recorder(name))
            for name, module in linears(block).items()
        ]
        call_on_meta = Call(*tree_map(_meta, (call.args, call.kwargs)), call.slot)
        call_on_meta.run(block, _meta(hidden))
        for handle in handles:
            handle.remove()
        for name in self.linears(i):
            if len(keys.get(name, ())) != 1:
                raise UserError(
                    f"{self.block_name(i)}.{name} runs {len(keys.get(name, ()))} times in a "
                    "forward of its block. Only linear layers that run once can be pruned."
                )
        groups: dict[tuple, Group] = {}
        for name, (key,) in keys.items():
            groups.setdefault(key, Group([], key[2])).names.append(name)
        return list(groups.values())

    def _record(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """Runs the model with recorders in place of its blocks."""
        calls: list[Call] = []
        first: list[torch.Tensor] = []
        previous: list[torch.Tensor] = []  # the output of the block before

        def recorder(i: int) -> Callable:
            def forward(*args, **kwargs):
                call, hidden = Call.record(args, kwargs)
                if i == 0:
                    first.append(hidden)
                    if self._n_returned is None:
                        self._n_returned = self._probe_return(call, hidden)
                elif hidden is not previous[-1]:
                    raise UserError(
                        f"{self.block_name(i)} does not read the output of "
                        f"{self.block_name(i - 1)}. This model cannot be pruned block by block."
                    )
                calls.append(call)
                previous[:] = [hidden.clone()]
                if i == len(self) - 1:
                    raise _LastBlock
                return self._returned(previous[-1])

            return forward

        with (
            self._replaced([recorder(i) for i in range(len(self))]),
            contextlib.suppress(_LastBlock),
        ):
            self.model(input_ids=ids.to(self.device))
        if len(calls) != len(self):
            raise UserError(
                f"only {len(calls)} of {len(self)} blocks of {self.prefix} run. This model cannot "
                "be pruned block by block."
            )
        return first[0], calls

    def _returned(self, hidden: torch.Tensor) -> torch.Tensor | tuple:
        """`hidden` as a block returns it: alone, or as the first of a tuple with Nones."""
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
        """Loads the weights outside the blocks and moves all buffers to the device."""
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
    """Ends a recording at the last block."""


def _check_prunable(name: str, block: nn.Module) -> None:
    """Rejects a block with matrices that are not linear layers, such as fused experts."""
    for path, module in block.named_modules():
        if isinstance(module, (*LINEARS, nn.Embedding)):
            continue
        for p_name, p in module.named_parameters(recurse=False):
            if p.dim() >= 2:
                raise UserError(
                    f"{name}.{path} ({type(module).__name__}) has the matrix {p_name} "
                    f"{list(p.shape)}, which is not a linear layer. Models with fused experts or "
                    "convolutions in their blocks are not supported."
                )


def _check_same(name: str, a: Call, b: Call) -> None:
    """Rejects a block whose other arguments depend on the text."""
    flat_a, _ = tree_flatten((a.args, a.kwargs))
    flat_b, _ = tree_flatten((b.args, b.kwargs))
    for x, y in zip(flat_a, flat_b, strict=True):
        if isinstance(x, torch.Tensor) and not torch.equal(x, y):
            parts = {k: [id(leaf) for leaf in tree_flatten(v)[0]] for k, v in a.kwargs.items()}
            which = next((k for k, ids in parts.items() if id(x) in ids), "an argument")
            raise UserError(
                f"{name} takes {which}, which depends on the text. This model cannot be pruned "
                "block by block."
            )


def _drop_weights(module: nn.Module) -> None:
    for name, p in module._parameters.items():
        if p is not None:
            module._parameters[name] = nn.Parameter(p.to("meta"), requires_grad=False)


def _meta(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _on_meta(block: nn.Module) -> nn.Module:
    """A copy of a block on the meta device, for runs that compute no values."""
    replacement = block.__dict__.pop("forward", None)
    try:
        memo = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in block.parameters()}
        return copy.deepcopy(block, memo).to("meta")
    finally:
        if replacement:
            block.forward = replacement


def stored_dtype(model: BlockModel, name: str) -> torch.dtype:
    """The type of a weight in the files, or in the module if the model is in memory."""
    if model.checkpoint:
        return model.checkpoint.dtype(model.key(name))
    return model.model.get_parameter(name).dtype

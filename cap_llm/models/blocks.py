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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from cap_llm.models.checkpoint import Checkpoint
from cap_llm.models.skeleton import find_blocks, match_names, skeleton, states_of
from cap_llm.runtime.errors import UserError


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


def matrix(linear: nn.Module) -> torch.Tensor:
    """A linear's weight as [R, C]: a view into its parameter, also of the transposed `Conv1D`."""
    return linear.weight.data if isinstance(linear, nn.Linear) else linear.weight.data.T


def stored_dtype(model: BlockModel, name: str) -> torch.dtype:
    """The type in which a weight is kept: the files', or the module's own."""
    if model.checkpoint:
        return model.checkpoint.dtype(model.key(name))
    return model.model.get_parameter(name).dtype

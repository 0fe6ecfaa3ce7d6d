"""A dry run of a model's own code, so that unsupported lengths fail within seconds.

Embedding, masks and the first block run on a sequence of the full requested length. Weights are
placeholders and plain linears compute nothing, so even a 70B model needs no files, little memory
and little time. What runs is the model's own code: position tables, masks, attention kernels.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

from cap_llm.models.blocks import BlockModel
from cap_llm.models.directory import ModelDirectory
from cap_llm.models.skeleton import LINEARS, matrix
from cap_llm.runtime.errors import UserError, one_line

SCORES = 2**29  # attention scores per sequence; more take minutes on a CPU


def check_lengths(
    directory: ModelDirectory,
    lengths: dict[str, int],
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    walked: bool = True,
) -> None:
    """Checks that a model accepts the requested lengths.

    Args:
        directory: the model's; config.json is sufficient.
        lengths: tokens per sequence, by option.
        name: the model's name in messages.
        device, dtype: of the run.
        walked: whether the run walks the model block by block. Otherwise it loads the model in
            `dtype`, and one that cannot be walked passes.

    Raises:
        UserError: a length is too long, or the model's own code fails.
    """
    config = directory.settings
    n_positions = config.get("max_position_embeddings") or config.get("n_positions")
    for option, length in lengths.items():
        if n_positions and length > n_positions:
            raise UserError(
                f"{option} is {length}, but {name} has only {n_positions} positions. "
                f"Pass --{option} {n_positions} or less."
            )
    # First on a CPU: on a GPU an out-of-range index makes the whole process unusable.
    places = {(torch.device("cpu"), torch.float32 if device.type == "cuda" else dtype): None}
    try:
        for place in places | {(device, dtype): None} if lengths else ():
            rehearsal = Rehearsal(directory, *place, buffer_dtype=None if walked else place[1])
            for option, length in lengths.items():
                _check_length(rehearsal, option, length, name)
            if walked and "calibration.length" in lengths:
                rehearsal.check_wiring()
    except _NotWalkable as error:
        if walked:
            raise UserError(str(error)) from None


def _check_length(rehearsal: Rehearsal, option: str, length: int, name: str) -> None:
    error = rehearsal.failure(length)
    if not error:
        return
    longest = rehearsal.longest(length)
    if longest:
        raise UserError(
            f"{option} is {length}, but {name} accepts at most {longest} tokens "
            f"({one_line(error)}). Pass --{option} {longest} or less."
        )
    raise UserError(f"the forward of {name} fails at any length: {one_line(error)}")


class Rehearsal:
    """A model with placeholder weights whose first block can run.

    Args:
        directory: the model's; config.json is sufficient.
        device, dtype: where and in which type it runs.
        buffer_dtype: the type in which buffers are computed; by default that of config.json.
    """

    def __init__(
        self,
        directory: ModelDirectory,
        device: torch.device,
        dtype: torch.dtype,
        buffer_dtype: torch.dtype | None = None,
    ):
        model = directory.build(buffer_dtype)
        try:
            self.model = BlockModel(model, device, dtype=dtype)
        except UserError as error:
            raise _NotWalkable(error) from None
        for module in model.modules():
            for key, p in module._parameters.items():
                if p is not None:
                    module._parameters[key] = _placeholder(p, device, dtype)
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(device)
            if type(module) in LINEARS:
                module.forward = functools.partial(_no_product, module)
        # Not a special token: padding takes no position. `embed` also tries the id below it.
        config = model.config.get_text_config().to_dict()
        special = [value for key, value in config.items() if key.endswith("token_id")]
        middle, n = config["vocab_size"] // 2, config["vocab_size"]
        words = (i for i in range(middle, n) if i not in special and i - 1 not in special)
        self._token = next(words, middle)
        heads = getattr(model.config.get_text_config(), "num_attention_heads", None) or 1
        self._max_length = math.isqrt(SCORES // heads)
        self.failure = functools.cache(self._failure)

    def longest(self, length: int) -> int:
        """The largest length up to `length` that the model accepts."""
        if not self.failure(length):
            return length
        good, bad = 0, min(length, self._max_length)
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if self.failure(middle) else (middle, bad)
        return good

    @torch.no_grad()
    def _failure(self, length: int) -> Exception | None:
        """The error that embedding or first block raise at a length, or None."""
        try:
            hidden, calls = self._embed(min(length, self._max_length))
            calls[0].run(self.model.blocks[0], hidden)
        except (_NotWalkable, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # any type: it comes from the model's own code
            return error
        return None

    def check_wiring(self) -> None:
        """Checks that every linear of every block runs exactly once.

        Raises:
            UserError: one does not.
        """
        hidden, calls = self._embed(8)
        for i, call in enumerate(calls):
            self.model.groups(i, call, hidden)

    def _embed(self, length: int) -> tuple:
        ids = torch.full((1, length), self._token)
        try:
            return self.model.embed(ids)
        except UserError as error:
            raise _NotWalkable(error) from None


class _NotWalkable(Exception):
    """The model cannot run block by block."""


def _placeholder(p: nn.Parameter, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of the same shape with one value per row, in the memory of one column."""
    rows = torch.linspace(-1, 1, p.shape[0] if p.dim() else 1, dtype=dtype, device=device)
    values = rows.view(-1, *[1] * (p.dim() - 1)).expand(p.shape) if p.dim() else rows[0]
    return nn.Parameter(values, requires_grad=False)


def _no_product(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Zeros of a linear's output shape; like torch, it rejects an input of another type."""
    if x.dtype != linear.weight.dtype:
        raise RuntimeError(f"the linear's weight is {linear.weight.dtype}, its input {x.dtype}")
    return x.new_zeros(*x.shape[:-1], matrix(linear).shape[0])

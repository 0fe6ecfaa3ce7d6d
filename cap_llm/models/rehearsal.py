"""A model's own code, run ahead of the work: what it cannot take shows in seconds.

Embedding, masks and the first block run on a sequence of the full asked-for length. Weights are
placeholders and plain linears compute nothing, so a 70B model needs neither files, memory nor
time. What remains is the model's own code: tables of positions, masks, kernels for its type.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cap_llm.models.blocks import BlockModel
from cap_llm.models.files import text_settings
from cap_llm.models.skeleton import skeleton
from cap_llm.runtime.errors import UserError, one_line

SCORES = 2**29  # attention scores of one sequence; more would take a CPU minutes


def check_lengths(
    folder: Path,
    asked: dict[str, int],
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    walked: bool = True,
) -> None:
    """Refuses lengths that a model does not take.

    Args:
        folder: the model's directory; its config.json is enough.
        asked: tokens per sequence, by the option that asks for them.
        name: what messages call the model.
        device, dtype: where, and in which type, the work will run.
        walked: whether the model will be walked block by block; else it is loaded in `dtype`, and
            one that cannot be walked passes.

    Raises:
        UserError: a length is too long, or the model's own code fails.
    """
    facts = text_settings(folder)
    most = facts.get("max_position_embeddings") or facts.get("n_positions")
    for option, length in asked.items():
        if most and length > most:
            raise UserError(
                f"{option} is {length}, but {name} has {most} positions; "
                f"give --{option} {most} or less"
            )
    # First on a CPU: on a GPU an index beyond a table ends all further work of the process.
    places = {(torch.device("cpu"), torch.float32 if device.type == "cuda" else dtype): None}
    try:
        for place in places | {(device, dtype): None} if asked else ():
            stage = Rehearsal(folder, *place, built_in=None if walked else place[1])
            for option, length in asked.items():
                _check_length(stage, option, length, name)
            if walked and "calibration.length" in asked:
                stage.check_wiring()
    except _NotWalked as error:
        if walked:
            raise UserError(str(error)) from None


def _check_length(stage: Rehearsal, option: str, length: int, name: str) -> None:
    error = stage.failure(length)
    if not error:
        return
    longest = stage.longest(length)
    if longest:
        raise UserError(
            f"{option} is {length}, but {name} takes {longest} tokens at most ({one_line(error)}); "
            f"give --{option} {longest} or less"
        )
    raise UserError(f"the forward of {name} fails at any length: {one_line(error)}")


class Rehearsal:
    """A model without weights whose first block can be run.

    Args:
        folder: the model's directory; its config.json is enough.
        device, dtype: where, and in which type, it runs.
        built_in: the type in which buffers are computed; by default that of config.json.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        built_in: torch.dtype | None = None,
    ):
        model = skeleton(folder, built_in)
        try:
            self.model = BlockModel(model, device, dtype=dtype)
        except UserError as error:
            raise _NotWalked(error) from None
        for module in model.modules():
            for key, p in module._parameters.items():
                if p is not None:
                    module._parameters[key] = _placeholder(p, device, dtype)
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(device)
            if type(module) in (nn.Linear, Conv1D):
                module.forward = functools.partial(_no_product, module)
        # An ordinary word: padding takes no position. `embed` also tries the id below it.
        facts = model.config.get_text_config().to_dict()
        special = [value for key, value in facts.items() if key.endswith("token_id")]
        middle, n = facts["vocab_size"] // 2, facts["vocab_size"]
        words = (i for i in range(middle, n) if i not in special and i - 1 not in special)
        self._token = next(words, middle)
        heads = getattr(model.config.get_text_config(), "num_attention_heads", None) or 1
        self._most = math.isqrt(SCORES // heads)
        self.failure = functools.cache(self._failure)

    def longest(self, length: int) -> int:
        """The most tokens up to `length` that the model takes."""
        if not self.failure(length):
            return length
        good, bad = 0, min(length, self._most)
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if self.failure(middle) else (middle, bad)
        return good

    @torch.no_grad()
    def _failure(self, length: int) -> Exception | None:
        """What goes wrong in embedding and first block at a length; None where nothing does."""
        try:
            hidden, calls = self._embed(min(length, self._most))
            calls[0].run(self.model.blocks[0], hidden)
        except (_NotWalked, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of any kind: the model's own
            return error
        return None

    def check_wiring(self) -> None:
        """Looks at all blocks' linears, of whatever length the text is.

        Raises:
            UserError: a linear does not run exactly once.
        """
        hidden, calls = self._embed(8)
        for i, call in enumerate(calls):
            self.model.groups(i, call, hidden)

    def _embed(self, length: int) -> tuple:
        ids = torch.full((1, length), self._token)
        try:
            return self.model.embed(ids)
        except UserError as error:
            raise _NotWalked(error) from None


class _NotWalked(Exception):
    """The model cannot be walked block by block."""


def _placeholder(p: nn.Parameter, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """Of a parameter's shape, with another value per row, in the memory of a column."""
    rows = torch.linspace(-1, 1, p.shape[0] if p.dim() else 1, dtype=dtype, device=device)
    values = rows.view(-1, *[1] * (p.dim() - 1)).expand(p.shape) if p.dim() else rows[0]
    return nn.Parameter(values, requires_grad=False)


def _no_product(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Zeros in place of a linear's output; of another type than its weight's it fails as torch's
    product does."""
    if x.dtype != linear.weight.dtype:
        raise RuntimeError(f"a linear of {linear.weight.dtype} reads {x.dtype}")
    return x.new_zeros(*x.shape[:-1], linear.nf if hasattr(linear, "nf") else linear.out_features)

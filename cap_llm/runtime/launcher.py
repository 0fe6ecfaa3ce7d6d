"""The launcher's environment variables, which only this module reads and checks.

`deepspeed`, `torchrun` and plain `python` describe a rank by the same variables. Some images and
schedulers set a part of them for every process; a world of one rank is then a plain process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from cap_llm.runtime.errors import UserError

MAX_NUMBER = 2**16 - 1  # of ranks and ports


@dataclass(frozen=True)
class Launch:
    """The launcher's description of a rank.

    Attributes:
        rank: this process, 0 to `size` - 1.
        size: number of ranks.
        local_rank: index of this rank's GPU on its node.
        local_size: number of ranks on this node.
        address: host and port of the ranks' store; None for a single process.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: tuple[str, int] | None


def read_launch() -> Launch:
    """Reads the launcher's variables.

    Raises:
        UserError: a variable is missing or out of range.
    """
    size = number("WORLD_SIZE", 1, 1)
    rank = number("RANK", 0 if size == 1 else None)
    if rank >= size:
        raise _error(f"RANK is {rank}, but WORLD_SIZE is {size}")
    # Older launchers write -1 for a single process.
    local = os.environ.get("LOCAL_RANK") != "-1" and number("LOCAL_RANK", 0)
    local_sizes = [number(name, size, 1) for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")]
    address = None
    if size > 1:
        if not (host := os.environ.get("MASTER_ADDR")):
            raise _error(f"WORLD_SIZE is {size}, but MASTER_ADDR is not set")
        address = host, number("MASTER_PORT", None, 1)
    return Launch(rank, size, int(local), min(size, *local_sizes), address)


def number(name: str, default: int | None, low: int = 0, high: int = MAX_NUMBER) -> int:
    """The integer in an environment variable, or `default` if it is empty or not set.

    Raises:
        UserError: it is not an integer, out of range, or missing without a default.
    """
    text = os.environ.get(name) or default
    if text is None:
        raise _error(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {name} is not set")
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise _error(f"{name} is {text!r}; it must be an integer from {low} to {high}")
    return value


def _error(problem: str) -> UserError:
    return UserError(
        f"{problem}. Start the ranks with deepspeed or torchrun, or unset the launcher's variables "
        "(RANK, WORLD_SIZE, ...)."
    )

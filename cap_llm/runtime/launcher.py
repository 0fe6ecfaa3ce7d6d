"""What launchers and SLURM say of this process in the environment: read and checked here alone.

`deepspeed`, `torchrun` and plain `python` all describe a rank by the same variables. Some images
and schedulers leave a part of them to every process; one of one rank is a plain process then.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from cap_llm.runtime.errors import UserError

MOST = 2**16 - 1  # ranks and ports


@dataclass(frozen=True)
class Launch:
    """One rank as its launcher describes it.

    Attributes:
        rank: this process, 0 to `size` - 1.
        size: number of ranks.
        local_rank: the GPU that this rank uses, among those of its node.
        near: ranks of this node.
        address: host and port where the ranks meet; None for a single process.
    """

    rank: int
    size: int
    local_rank: int
    near: int
    address: tuple[str, int] | None


def launched() -> Launch:
    """This process, as the environment describes it.

    Raises:
        UserError: names the variable that is missing or out of range.
    """
    size = number("WORLD_SIZE", 1, 1)
    rank = number("RANK", 0 if size == 1 else None)
    if rank >= size:
        raise _odd(f"RANK is {rank}, but WORLD_SIZE is {size}")
    # -1 is what older launchers write where there are no ranks
    local = os.environ.get("LOCAL_RANK") != "-1" and number("LOCAL_RANK", 0)
    near = [number(name, size, 1) for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")]
    address = None
    if size > 1:
        if not (host := os.environ.get("MASTER_ADDR")):
            raise _odd(f"WORLD_SIZE is {size}, but MASTER_ADDR is not set")
        address = host, number("MASTER_PORT", None, 1)
    return Launch(rank, size, int(local), min(size, *near), address)


def number(name: str, default: int | None, least: int = 0, most: int = MOST) -> int:
    """The whole number in the environment variable `name`; `default` where it is empty or not set.

    Raises:
        UserError: it is none or out of range, or missing where there is no default.
    """
    text = os.environ.get(name) or default
    if text is None:
        raise _odd(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {name} is not set")
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        raise _odd(f"{name} is {text!r}; it must be a whole number from {least} to {most}")
    return value


def _odd(problem: str) -> UserError:
    return UserError(
        f"{problem}. Start the ranks with deepspeed or torchrun, or unset what a launcher has left "
        "in the environment (RANK, WORLD_SIZE, ...)."
    )

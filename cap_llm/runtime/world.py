"""The ranks of a job, on CPUs (gloo) or GPUs (nccl), started by any launcher.

A world of one rank needs no process group: every call below is then free.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from cap_llm.runtime.errors import UserError
from cap_llm.runtime.interrupt import deadly
from cap_llm.runtime.launcher import Launch, launched
from cap_llm.runtime.watch import Watch

MEETING = 900.0  # seconds in which all ranks come to their store
PATIENT = 30.0  # seconds without a word about those that are missing


class World:
    """The ranks that work together, and the device of this one.

    Attributes:
        rank: this process, 0 to `size` - 1.
        size: number of ranks.
        device: where this rank computes.

    Raises:
        UserError: the launcher's variables are odd, a rank does not come, or it has no GPU.
    """

    def __init__(self, device: str = "auto"):
        launch = launched()
        self.rank, self.size, self.local_rank = launch.rank, launch.size, launch.local_rank
        self.device = _device(device, self.local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("highest")  # no TF32 in Hessians and solvers
        else:
            _reuse_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            # Ranks of one node share its cores; more threads than cores slow all of them down. On
            # GPUs too, where an offloaded optimizer steps on the cores.
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // launch.near))
        self._owns_group, self._watch = False, None
        # Nothing is begun yet: a signal ends a rank at once that waits for the others.
        with deadly() if self.size > 1 else contextlib.nullcontext():
            self._join(launch)

    def _join(self, launch: Launch) -> None:
        if self.size > 1:
            store = None if dist.is_initialized() else _meet(launch)
            self._watch = Watch(self.rank, self.size, launch.address)
            if store:
                backend = "nccl" if self.device.type == "cuda" else "gloo"
                # Ranks may wait for hours for one that converts a large checkpoint; the watch
                # tells that from a halt.
                days = datetime.timedelta(days=1)
                store.set_timeout(days)
                with self.bounded("the start"):
                    dist.init_process_group(
                        backend, store=store, rank=self.rank, world_size=self.size, timeout=days
                    )
                self._owns_group = True
        # who is where; and all watches have begun
        pid, here = os.getpid(), socket.gethostname()
        self._places = self.gather((here, pid, _start_of(pid)))
        # Of this node's ranks those that can be seen: containers may hide them from each other.
        near = [rank for rank, (host, *_) in enumerate(self._places) if host == here]
        self._seen = [rank for rank in near if self._lives(rank)]
        self.barrier()  # no rank has ended before all have looked
        if self._watch:
            self._watch.gone = self.lost

    @classmethod
    def alone(cls, device: torch.device) -> World:
        """A world of this process only, whatever launched it; changes no global state."""
        world = cls.__new__(cls)
        world.rank, world.size, world.local_rank, world.device = 0, 1, 0, device
        world._owns_group, world._watch, world._places, world._seen = False, None, [], []
        return world

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and speaks to the user."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """The machines that the ranks are on."""
        return len({host for host, *_ in self._places}) or 1

    def shard(self, n: int) -> range:
        """The items of 0..n-1 that belong to this rank; shares differ by one item at most."""
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds `tensor` over all ranks, in place."""
        if self.size > 1:
            with self.bounded("a sum"):
                dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Copies `tensor` of rank `source` to all ranks, in place."""
        if self.size > 1:
            carried = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
            with self.bounded("a broadcast"):
                dist.broadcast(carried, source)
        return tensor

    def gather(self, value) -> list:
        """`value` of every rank, in rank order, on every rank. For small Python objects."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self.bounded("a gather"):
            dist.all_gather_object(values, value)
        return values

    def decide(self, work: Callable):
        """What `work` returns on the first rank, on every rank.

        The first rank's view counts: a shared file system may show ranks different things. Small
        Python objects only.

        Raises:
            UserError: what `work` raises there, on every rank, so that none waits for it.
        """
        value = problem = None
        if self.is_main:
            try:
                value = work()
            except UserError as error:
                problem = error
        value, problem = self.gather((value, problem))[0]
        if problem:
            raise problem
        return value

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors, equal in shape, one after another along the first dimension."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.bounded("a gather"):
            dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def barrier(self) -> None:
        """Returns once all ranks are here."""
        if self.size > 1:
            with self.bounded("a barrier"):
                dist.barrier()

    @contextlib.contextmanager
    def bounded(self, what: str) -> Iterator[None]:
        """For the body of a `with` that takes seconds, once all ranks are at it: where all ranks
        stay in such bodies for long, the job ends with an error (see `watch.py`)."""
        if not self._watch:
            yield
            return
        with self._watch.bounded(what):
            yield
            if self.device.type == "cuda":  # NCCL's calls return before they are done
                torch.cuda.current_stream(self.device).synchronize()

    def on_failure(self, action: Callable[[str], None]) -> None:
        """What to do with the reason when the watch ends the job."""
        if self._watch:
            self._watch.on_failure = action

    def stop_watching(self) -> None:
        """Ends the watch; this rank is about to leave."""
        if self._watch:
            self._watch.stop()

    def lost(self) -> list[str]:
        """Ranks of this node whose process is no more, as a person is told of them."""
        lost = [(rank, *self._places[rank]) for rank in self._seen if not self._lives(rank)]
        return [f"rank {rank} (process {pid} on {host})" for rank, host, pid, _ in lost]

    def _lives(self, rank: int) -> bool:
        _, pid, start = self._places[rank]
        return start is not None and _start_of(pid) == start

    def crowded(self) -> str | None:
        """Says whose the cores are, where not all of the machine's are this job's."""
        cores, own = os.cpu_count() or 1, len(os.sched_getaffinity(0))
        quota = _quota()
        words = [f"{own} of the machine's {cores} cores are this job's"] if own < cores else []
        if quota < own:
            words.append(f"its container may use {quota:g} of them (set OMP_NUM_THREADS to that)")
        try:
            running = int(
                Path("/proc/loadavg").read_text(encoding="utf-8").split()[3].partition("/")[0]
            )
            # the mean of a minute holds this job's own past, the moment a passer-by
            others = min(os.getloadavg()[0], running - 1)
        except (OSError, ValueError):
            others = 0
        if others + torch.get_num_threads() * ranks_on_node() > cores + 0.5:
            words.append(f"about {others:.0f} are busy with other work, which slows this job down")
        return f"cores: {', '.join(words)}" if words else None

    def close(self) -> None:
        """Ends the process group, if this object started it, once all ranks are here."""
        self.barrier()
        self.stop_watching()
        if self._owns_group:
            dist.destroy_process_group()
            self._owns_group = False


def ranks_on_node() -> int:
    """Ranks that share this machine, from what the launchers say (torchrun, deepspeed)."""
    return launched().near


def _meet(launch: Launch) -> dist.TCPStore:
    """The ranks' store, once all of them have come to it.

    Raises:
        UserError: names who is missing after `MEETING` seconds.
    """
    host, port = launch.address
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun holds it
    names = [f"cap_llm/here/{rank}" for rank in range(launch.size)]
    start, said = time.monotonic(), False
    try:
        store = dist.TCPStore(
            host,
            port,
            is_master=launch.rank == 0 and not agent,
            timeout=datetime.timedelta(seconds=MEETING),
            wait_for_workers=False,
            multi_tenant=True,
        )
        store.set(names[launch.rank], "")
    except RuntimeError as error:
        raise UserError(
            f"The ranks cannot meet at MASTER_ADDR {host}, MASTER_PORT {port}: "
            f"{str(error).strip().partition(chr(10))[0]}"
        ) from None
    while not store.check(names):
        missing = [str(rank) for rank, name in enumerate(names) if not store.check([name])]
        who = f"rank{'s' * (len(missing) > 1)} {', '.join(missing[:8])}"
        who += f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        if (waited := time.monotonic() - start) > MEETING:
            raise UserError(
                f"Of {launch.size} ranks (WORLD_SIZE), {who} did not come to {host}:{port} in "
                f"{MEETING / 60:g} minutes. Start all ranks, or unset RANK and WORLD_SIZE."
            )
        if waited > PATIENT and launch.rank == 0 and not said:
            said = True
            print(f"cap-llm: waiting for {who} at {host}:{port}", file=sys.stderr, flush=True)
        time.sleep(0.1)
    return store


def _quota() -> float:
    """Cores that the control group of this process may use; infinite without a limit."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            text = " ".join(
                Path("/sys/fs/cgroup", name).read_text(encoding="utf-8") for name in files
            )
            limit, period = map(int, text.split())
            return limit / period if limit > 0 else math.inf
    return math.inf


def _start_of(pid: int) -> str | None:
    """When a living process began, in the kernel's ticks: with its number, which process it is."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
        state, *more = text.rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else more[18]


def _reuse_freed_memory() -> None:
    """Keeps glibc from handing every freed activation back to the kernel.

    A forward frees and asks for the same few megabytes over and over; to map and clear them anew
    each time costs a tenth of it. Blocks above 32 MiB still go back at once.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"runtime.device is {name!r}; choose auto, cpu or cuda")
    if name == "cpu":
        return torch.device("cpu")
    n_cards = torch.cuda.device_count()
    if local_rank >= n_cards:
        raise UserError(
            f"rank {local_rank} of this node has no CUDA card ({n_cards} found); "
            "start fewer ranks or use --runtime.device cpu"
        )
    return torch.device("cuda", local_rank)

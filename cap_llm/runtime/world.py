"""The ranks of a job on CPUs (gloo) or GPUs (nccl), started by any launcher.

A single rank needs no process group, so every call below is then free.
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
from cap_llm.runtime.interrupt import default_signals
from cap_llm.runtime.launcher import Launch, read_launch
from cap_llm.runtime.watch import Watch

START_TIMEOUT = 900.0  # seconds in which all ranks must connect to the store
START_WARNING = 30.0  # seconds until rank 0 prints which ranks are missing


class World:
    """The ranks of this job, and the device of this rank.

    Attributes:
        rank: this process, 0 to `size` - 1.
        size: number of ranks.
        device: the device of this rank.
        activation_gib: memory for activations on it, in GiB; None: half of what is free.

    Raises:
        UserError: a launcher variable is invalid, a rank does not start, or it has no GPU.
    """

    def __init__(self, device: str = "auto", activation_gib: float | None = None):
        launch = read_launch()
        self.activation_gib = activation_gib
        self.rank, self.size, self.local_rank = launch.rank, launch.size, launch.local_rank
        self.device = _device(device, self.local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("highest")  # no TF32 in Hessians and solvers
        else:
            _reuse_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            # The ranks of a node share its cores: more threads than cores slow all ranks down.
            # This holds on GPUs too, where an offloaded optimizer runs on the CPU.
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // launch.local_size))
        self._owns_group, self._watch = False, None
        # There is no state to save yet, so a signal may end a waiting rank at once.
        with default_signals() if self.size > 1 else contextlib.nullcontext():
            self._join(launch)

    def _join(self, launch: Launch) -> None:
        if self.size > 1:
            store = None if dist.is_initialized() else _connect(launch)
            self._watch = Watch(self.rank, self.size, launch.address)
            if store:
                backend = "nccl" if self.device.type == "cuda" else "gloo"
                # Ranks may wait for hours while one converts a large checkpoint; the watch
                # distinguishes that from a deadlock.
                days = datetime.timedelta(days=1)
                store.set_timeout(days)
                with self.bounded("the start"):
                    dist.init_process_group(
                        backend, store=store, rank=self.rank, world_size=self.size, timeout=days
                    )
                self._owns_group = True
        # This gather also ensures that every watch is running.
        pid, host = os.getpid(), socket.gethostname()
        self._processes = self.gather((host, pid, _start_time(pid)))
        # The visible ranks of this node; containers may hide processes from each other.
        local = [rank for rank, process in enumerate(self._processes) if process[0] == host]
        self._visible = [rank for rank in local if self._is_alive(rank)]
        self.barrier()  # no rank exits before all ranks have looked
        if self._watch:
            self._watch.dead_ranks = self.dead_ranks

    @classmethod
    def alone(cls, device: torch.device) -> World:
        """A world of this process only, without changes to global state."""
        world = cls.__new__(cls)
        world.rank, world.size, world.local_rank, world.device = 0, 1, 0, device
        world.activation_gib = None
        world._owns_group, world._watch, world._processes, world._visible = False, None, [], []
        return world

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return len({host for host, *_ in self._processes}) or 1

    def shard(self, n: int) -> range:
        """This rank's items of 0..n-1; the sizes of two shards differ by at most one."""
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds `tensor` over all ranks, in place."""
        if self.size > 1:
            with self.bounded("a sum"):
                dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Copies `tensor` from rank `source` to all ranks, in place."""
        if self.size > 1:
            data = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
            with self.bounded("a broadcast"):
                dist.broadcast(data, source)
        return tensor

    def gather(self, value) -> list:
        """The `value` of every rank, in rank order, on every rank; for small Python objects."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self.bounded("a gather"):
            dist.all_gather_object(values, value)
        return values

    def decide(self, work: Callable):
        """Runs `work` on rank 0 and returns its result, a small Python object, on every rank.

        Rank 0 decides because a shared file system may show different ranks different states.

        Raises:
            UserError: the error of `work`, on every rank.
        """
        value = error = None
        if self.is_main:
            try:
                value = work()
            except UserError as raised:
                error = raised
        value, error = self.gather((value, error))[0]
        if error:
            raise error
        return value

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenates the tensors of all ranks, equal in shape, along the first dimension."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.bounded("a gather"):
            dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def barrier(self) -> None:
        """Waits until all ranks arrive."""
        if self.size > 1:
            with self.bounded("a barrier"):
                dist.barrier()

    @contextlib.contextmanager
    def bounded(self, what: str) -> Iterator[None]:
        """Marks a body that takes seconds once all ranks are in one.

        If all ranks stay in such bodies for long, the job ends with an error (see `watch.py`).
        """
        if not self._watch:
            yield
            return
        with self._watch.bounded(what):
            yield
            if self.device.type == "cuda":  # NCCL calls are asynchronous
                torch.cuda.current_stream(self.device).synchronize()

    def on_failure(self, action: Callable[[str], None]) -> None:
        """Sets what runs, with the reason, before the watch ends the job."""
        if self._watch:
            self._watch.on_failure = action

    def stop_watching(self) -> None:
        """Stops the watch before this rank exits."""
        if self._watch:
            self._watch.stop()

    def dead_ranks(self) -> list[str]:
        """Dead ranks on this node, formatted for messages."""
        dead = [
            (rank, *self._processes[rank]) for rank in self._visible if not self._is_alive(rank)
        ]
        return [f"rank {rank} (process {pid} on {host})" for rank, host, pid, _ in dead]

    def _is_alive(self, rank: int) -> bool:
        _, pid, start = self._processes[rank]
        return start is not None and _start_time(pid) == start

    def cpu_contention(self) -> str | None:
        """A warning if this job has only a part of the machine's cores or shares them."""
        cores, available = os.cpu_count() or 1, len(os.sched_getaffinity(0))
        quota = _cpu_quota()
        notes = [f"this job may use {available} of {cores}"] if available < cores else []
        if quota < available:
            notes.append(f"its container is limited to {quota:g} (set OMP_NUM_THREADS to that)")
        try:
            running = int(
                Path("/proc/loadavg").read_text(encoding="utf-8").split()[3].partition("/")[0]
            )
            # The load average includes this job's own past; the momentary count is noisy.
            others = min(os.getloadavg()[0], running - 1)
        except (OSError, ValueError):
            others = 0
        if others + torch.get_num_threads() * ranks_on_node() > cores + 0.5:
            notes.append(f"about {others:.0f} are busy with other work, which slows this job down")
        return f"cores: {', '.join(notes)}" if notes else None

    def close(self) -> None:
        """Waits for all ranks, then ends the process group if this object started it."""
        self.barrier()
        self.stop_watching()
        if self._owns_group:
            dist.destroy_process_group()
            self._owns_group = False


def ranks_on_node() -> int:
    """The number of ranks on this node, from the launcher's variables."""
    return read_launch().local_size


def _connect(launch: Launch) -> dist.TCPStore:
    """The store of the ranks, once all of them are connected.

    Raises:
        UserError: some ranks are missing after `START_TIMEOUT` seconds.
    """
    host, port = launch.address
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun hosts the store
    keys = [f"cap_llm/started/{rank}" for rank in range(launch.size)]
    start, warned = time.monotonic(), False
    try:
        store = dist.TCPStore(
            host,
            port,
            is_master=launch.rank == 0 and not agent,
            timeout=datetime.timedelta(seconds=START_TIMEOUT),
            wait_for_workers=False,
            multi_tenant=True,
        )
        store.set(keys[launch.rank], "")
    except RuntimeError as error:
        raise UserError(
            f"MASTER_ADDR {host}, MASTER_PORT {port}: the ranks cannot connect: "
            f"{str(error).strip().partition(chr(10))[0]}"
        ) from None
    while not store.check(keys):
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(missing[:8])}"
        ranks += f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        if (elapsed := time.monotonic() - start) > START_TIMEOUT:
            raise UserError(
                f"WORLD_SIZE is {launch.size}, but {ranks} did not connect to {host}:{port} within "
                f"{START_TIMEOUT / 60:g} minutes. Start all ranks, or unset RANK and WORLD_SIZE."
            )
        if elapsed > START_WARNING and launch.rank == 0 and not warned:
            warned = True
            print(f"cap-llm: waiting for {ranks} at {host}:{port}", file=sys.stderr, flush=True)
        time.sleep(0.1)
    return store


def _cpu_quota() -> float:
    """The cores that the control group allows this process; infinite without a limit."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # missing, or "max"
            text = " ".join(
                Path("/sys/fs/cgroup", name).read_text(encoding="utf-8") for name in files
            )
            limit, period = map(int, text.split())
            return limit / period if limit > 0 else math.inf
    return math.inf


def _start_time(pid: int) -> str | None:
    """The start of a live process, in kernel ticks; with the pid it identifies the process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
        state, *more = text.rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else more[18]


def _reuse_freed_memory() -> None:
    """Stops glibc from returning every freed activation to the kernel.

    A forward pass allocates and frees the same few megabytes repeatedly; mapping and clearing them
    each time costs 10% of it. Blocks above 32 MiB are still returned at once.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"runtime.device is {name!r}; it must be auto, cpu or cuda")
    if name == "cpu":
        return torch.device("cpu")
    n_gpus = torch.cuda.device_count()
    if local_rank >= n_gpus:
        raise UserError(
            f"runtime.device: local rank {local_rank} has no GPU (found {n_gpus}). "
            "Start fewer ranks, or pass --runtime.device cpu."
        )
    return torch.device("cuda", local_rank)

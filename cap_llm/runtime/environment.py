"""The environment of a result: versions, commit, hardware, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from typing_extensions import TypedDict

import cap_llm
from cap_llm.runtime.world import World

LIBRARIES = ("torch", "transformers", "deepspeed", "datasets", "safetensors", "numpy", "lm_eval")


class Hardware(TypedDict):
    """One node, and how many nodes and ranks there are; `cuda` has the names of its GPUs."""

    processor: str
    cores: int
    threads: int
    memory_bytes: int
    cuda: list[str]
    nodes: int
    ranks: int


class Environment(TypedDict):
    """What a result depends on besides its settings."""

    command: str
    directory: str
    versions: dict[str, str | None]
    commit: str | None
    hardware: Hardware
    started: str


def environment(world: World) -> Environment:
    """Versions, commit, hardware and command of this process."""
    versions = {"python": platform.python_version(), "cap_llm": cap_llm.__version__}
    versions |= {name: _version(name) for name in LIBRARIES}
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    gpus = range(torch.cuda.device_count() if world.device.type == "cuda" else 0)
    return {
        "command": shlex.join(sys.argv),
        "directory": os.getcwd(),
        "versions": versions,
        "commit": commit or None,
        "hardware": {
            "processor": _processor(),
            "cores": os.cpu_count() or 1,
            "threads": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "cuda": [torch.cuda.get_device_name(i) for i in gpus],
            "nodes": world.nodes,
            "ranks": world.size,
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def machine(hardware: Hardware) -> str:
    """What times and memory depend on; ranks on CPUs share the cores of a node."""
    nodes, gpus = hardware["nodes"], hardware["cuda"]
    text = f"{nodes} nodes of " * (nodes > 1)
    text += f"{hardware['cores']} cores of {hardware['processor']}"
    return text + (f", {hardware['ranks']} x {gpus[0]}" if gpus else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


def offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")

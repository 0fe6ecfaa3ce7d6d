"""Runs cases of the entry one after another, each rank on a simulated card or on the CPU.

    python tests/card/worker.py FOLDER cuda
    torchrun --standalone --nproc_per_node 2 tests/card/worker.py FOLDER cuda
    python tests/card/worker.py FOLDER cpu

FOLDER/cases.json has the cases' arguments by name; a case's run directory is FOLDER/DEVICE/name.
The exit code is that of the first case that fails.
"""

import contextlib
import datetime
import gc
import json
import os
import sys
from pathlib import Path
from unittest import mock

folder, device = Path(sys.argv[1]), sys.argv[2]
if device == "cuda":  # before torch
    from card import simulated
else:
    simulated = contextlib.nullcontext

import torch.distributed as dist  # noqa: E402

from cap_llm import train  # noqa: E402

gc.freeze()  # imported modules need no further collection
with simulated():
    if "MASTER_ADDR" in os.environ:  # once for all cases
        dist.init_process_group("nccl", timeout=datetime.timedelta(seconds=90))
    for name, arguments in json.loads((folder / "cases.json").read_text()).items():
        words = ["--output_dir", str(folder / device / name), "--runtime.device", device]
        with mock.patch.object(sys, "argv", ["cap-llm", *words, *arguments]):
            if code := train.main():
                sys.exit(code)

"""SparseGPT by the peer, `llmcompressor`, timed; started by `bench_oneshot.py` in its environment.

    peer/bin/python eval/peer_llmcompressor.py job.json

Imports nothing of cap_llm. The job names the model directory, the file of calibration ids, and
where the pruned model and the measurements go. The peer runs as its manual shows; what is wrapped
here only reads the clock.
"""

from __future__ import annotations

import collections
import importlib.metadata
import json
import shutil
import sys
import time
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.pruning.sparsegpt import base
from llmcompressor.pipelines.sequential import pipeline
from loguru import logger
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(job: dict) -> None:
    """Prunes `job["model"]` and writes `job["out"]` and `job["result"]`."""
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    imports = peak_memory()
    seconds = collections.Counter()
    start, processor = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, trust_remote_code=False
    )
    seconds["load"] = time.perf_counter() - start
    watch(seconds)
    ids = load_file(job["ids"])["ids"]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    oneshot(
        model=model,
        dataset=torch.utils.data.DataLoader(rows, batch_size=1),
        recipe=SparseGPTModifier(
            sparsity=job["sparsity"],
            mask_structure="0:0",
            block_size=128,
            dampening_frac=0.01,
            targets=["Linear"],
            ignore=["re:.*lm_head"],
        ),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
    )
    seconds["total"] = time.perf_counter() - start
    seconds["processor"] = time.process_time() - processor
    seconds["forward"] -= seconds["hessian"]  # the hooks run inside the forward
    result = {
        "seconds": dict(seconds),
        "imports_bytes": imports,
        "peak_bytes": peak_memory(),
        "threads": torch.get_num_threads(),
        "versions": {
            n: importlib.metadata.version(n) for n in ("llmcompressor", "torch", "transformers")
        },
    }
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(Path(job["model"]) / "config.json", out / "config.json")
    Path(job["result"]).write_text(json.dumps(result))


def watch(seconds: collections.Counter) -> None:
    """Puts a clock around the peer's two passes over the text, its Hessians and its solver."""

    def timed(name: str, function):
        def run(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start

        return run

    batches = pipeline._get_batches

    def timed_batches(activations, num_batches, input_names, desc, *rest):
        start = time.perf_counter()
        yield from batches(activations, num_batches, input_names, desc, *rest)
        name = "forward" if "Calibrating" in desc else "propagate"
        seconds[name] += time.perf_counter() - start

    pipeline._get_batches = timed_batches
    base.accumulate_hessian = timed("hessian", base.accumulate_hessian)
    SparseGPTModifier.compress_modules = timed("solve", SparseGPTModifier.compress_modules)


def peak_memory() -> int:
    """Most bytes of main memory that this process has held at once."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

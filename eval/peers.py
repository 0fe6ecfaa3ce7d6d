"""SparseGPT by others, timed: a plain version of the published algorithm, or `llmcompressor`.

    python eval/peers.py plain|llmcompressor job.json         (`bench_oneshot.py` calls it)

It does not import cap_llm, so it also runs in the peer's own environment. The job names the
files of the model, the calibration ids, the pruned model and the measurements.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401 (else it is loaded during the timing)

SPARSITY, DAMPING, BLOCK_SIZE = 0.5, 0.01, 128


def main(contender: str, job: dict) -> None:
    """Prunes `job["model"]` and writes `job["out"]` and `job["result"]`."""
    if contender == "llmcompressor":
        import llmcompressor.modifiers.pruning  # noqa: F401 (imports are not timed)
    ids = load_file(job["ids"])["ids"]
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, trust_remote_code=False
    ).eval()
    {"plain": plain, "llmcompressor": peer}[contender](model, ids)
    result = {"seconds": time.perf_counter() - start, "peak_bytes": peak_memory()}
    out = Path(job["out"])
    out.mkdir(parents=True)
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(Path(job["model"]) / "config.json", out / "config.json")
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def peer(model, ids: torch.Tensor) -> None:
    """SparseGPT by llmcompressor, as in its documentation."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    recipe = SparseGPTModifier(
        sparsity=SPARSITY,
        mask_structure="0:0",
        block_size=BLOCK_SIZE,
        dampening_frac=DAMPING,
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )
    oneshot(
        model=model,
        dataset=torch.utils.data.DataLoader(rows, batch_size=1),
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
    )


@torch.no_grad()
def plain(model, ids: torch.Tensor) -> None:
    """SparseGPT as published, for LLaMA: two forwards per block, a Hessian for every linear."""
    model.config.use_cache = False
    layers = model.model.layers
    states, kwargs = first_inputs(model, layers, ids)
    outputs = torch.zeros_like(states)
    for layer in layers:
        linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        hessians = {m: PlainHessian(m.in_features) for m in linears}

        def collect(module, args, output, hessians=hessians):
            hessians[module].add(args[0])

        handles = [m.register_forward_hook(collect) for m in linears]
        for k in range(len(ids)):
            outputs[k] = plain_forward(layer, states[k : k + 1], kwargs)
        for handle in handles:
            handle.remove()
        for linear in linears:
            linear.weight.data = plain_sparsegpt(linear.weight.data, hessians.pop(linear).mean)
        for k in range(len(ids)):
            outputs[k] = plain_forward(layer, states[k : k + 1], kwargs)
        states, outputs = outputs, states


class PlainHessian:
    """The running mean of 2 x x^T over sequences, as in the released code."""

    def __init__(self, columns: int):
        self.mean, self.n = torch.zeros(columns, columns), 0

    def add(self, x: torch.Tensor) -> None:
        """Adds a batch of sequences [B, T, C]."""
        n_new = x.shape[0]
        x = x.reshape(-1, x.shape[-1]).T.float()
        self.mean *= self.n / (self.n + n_new)
        self.n += n_new
        x = math.sqrt(2 / self.n) * x
        self.mean += x @ x.T


def plain_sparsegpt(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of the paper on W [R, C], one column at a time; overwrites `hessian`."""
    w = weight.clone().float()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, w.shape[1], BLOCK_SIZE):
        end = min(start + BLOCK_SIZE, w.shape[1])
        block, u = w[:, start:end].clone(), upper[start:end, start:end]
        kept, errors = torch.zeros_like(block), torch.zeros_like(block)
        score = block.square() / u.diagonal().square()
        threshold = score.flatten().sort()[0][int(score.numel() * SPARSITY)]
        removed = score <= threshold
        for j in range(end - start):
            column = block[:, j]
            kept[:, j] = torch.where(removed[:, j], 0, column)
            error = (column - kept[:, j]) / u[j, j]
            block[:, j:] -= error[:, None] @ u[j, j:][None]
            errors[:, j] = error
        w[:, start:end] = kept
        w[:, end:] -= errors @ upper[start:end, end:]
    return w.to(weight.dtype)


def first_inputs(model, layers, ids: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """The first layer's states for ids [N, T], one sequence at a time, and its other arguments."""
    states, other_args = [], []

    def catch(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])
        other_args.append({k: v for k, v in kwargs.items() if k != "hidden_states"})
        raise _Caught

    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for row in ids.split(1):
        with contextlib.suppress(_Caught):
            model(input_ids=row)
    handle.remove()
    return torch.cat(states), other_args[0]


def plain_forward(layer, states: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """The layer's output [1, T, H]."""
    out = layer(states, **kwargs)
    return out[0] if isinstance(out, tuple) else out


class _Caught(Exception):
    """Ends a forward once the first layer's input is recorded."""


def peak_memory() -> int:
    """Peak main memory of this process in bytes."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))

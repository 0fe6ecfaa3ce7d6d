"""SparseGPT as published, written plainly for LLaMA, timed; started by `bench_oneshot.py`.

    python eval/plain_sparsegpt.py job.json

Uses nothing of cap_llm. The job names the model directory, the file of calibration ids, and where
the pruned model and the measurements go.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from bench_oneshot import BLOCK_SIZE, DAMPING, Clock, read_ids, write_result
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401 (loaded late otherwise)


@torch.no_grad()
def main(job: dict) -> None:
    """SparseGPT as published, for LLaMA: two forwards a block, a Hessian for every linear."""
    imports = status_peak()
    clock = Clock()
    ids = read_ids(job)
    with clock("total"), clock.processor():
        with clock("load"):
            model = AutoModelForCausalLM.from_pretrained(
                job["model"], dtype=torch.float32, trust_remote_code=False
            ).eval()
            model.config.use_cache = False
            layers = model.model.layers
            states, kwargs = first_inputs(model, layers, ids)
            outputs = torch.zeros_like(states)
        for layer in layers:
            linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
            hessians = {m: PlainHessian(m.in_features) for m in linears}

            def collect(module, args, output, hessians=hessians):
                with clock("hessian"):
                    hessians[module].add(args[0])

            handles = [m.register_forward_hook(collect) for m in linears]
            with clock("forward"):
                for k in range(len(ids)):
                    outputs[k] = plain_forward(layer, states[k : k + 1], kwargs)
            for handle in handles:
                handle.remove()
            with clock("solve"):
                for linear in linears:
                    mean = hessians.pop(linear).mean
                    linear.weight.data = plain_sparsegpt(linear.weight.data, mean, job["sparsity"])
            with clock("propagate"):
                for k in range(len(ids)):
                    outputs[k] = plain_forward(layer, states[k : k + 1], kwargs)
            states, outputs = outputs, states
    peak = status_peak()
    clock.seconds["forward"] -= clock.seconds["hessian"]  # the hooks run inside the forward
    out = Path(job["out"])
    out.mkdir(parents=True)
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(Path(job["model"]) / "config.json", out / "config.json")
    write_result(job, clock.seconds, imports, peak)


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


def plain_sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, sparsity: float) -> torch.Tensor:
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
        threshold = score.flatten().sort()[0][int(score.numel() * sparsity)]
        gone = score <= threshold
        for j in range(end - start):
            column = block[:, j]
            kept[:, j] = torch.where(gone[:, j], 0, column)
            error = (column - kept[:, j]) / u[j, j]
            block[:, j:] -= error[:, None] @ u[j, j:][None]
            errors[:, j] = error
        w[:, start:end] = kept
        w[:, end:] -= errors @ upper[start:end, end:]
    return w.to(weight.dtype)


def first_inputs(model, layers, ids: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """What the first layer reads for ids [N, T], one sequence at a time, and its other inputs."""
    states, frames = [], []

    def catch(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])
        frames.append({k: v for k, v in kwargs.items() if k != "hidden_states"})
        raise _Caught

    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for row in ids.split(1):
        with contextlib.suppress(_Caught):
            model(input_ids=row)
    handle.remove()
    return torch.cat(states), frames[0]


def plain_forward(layer, states: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """The layer's output [1, T, H]."""
    out = layer(states, **kwargs)
    return out[0] if isinstance(out, tuple) else out


class _Caught(Exception):
    """The first layer's input is known; the rest of the forward is not needed."""


def status_peak() -> int:
    """Most bytes of main memory that this process has held at once, without cap_llm's imports."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

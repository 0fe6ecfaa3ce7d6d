"""What sparsity buys at inference on this machine: bytes, and time relative to dense bf16.

`cap-llm bench` prints them. The formats of the pruned matrices are dense, bit-packed (nonzero
values and one bit per weight, expanded at each use), CSR, and 2:4 semi-structured if the pattern
and the GPU allow it. Single products and a decoding step of the whole model are timed, for 1 and 64
sequences of one token. The formats take turns in each repetition, and ratios compare medians of one
run. The machine should be idle. These are PyTorch's own kernels, without tuning.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from cap_llm.models.checkpoint import Checkpoint
from cap_llm.models.mask_file import pack, unpack
from cap_llm.models.masks import PRUNED
from cap_llm.models.skeleton import find_blocks, match_names, model_class, skeleton
from cap_llm.runtime.console import Console, format_bytes
from cap_llm.runtime.errors import UserError, one_line

warnings.filterwarnings("ignore", message=".*([Ss]parse|prototype)")

BATCHES = (1, 64)
DENSE = "dense bf16"
SAME = 0.05  # ratios this close to 1 are reported as the same
Product = Callable[[torch.Tensor], torch.Tensor]  # [B, C] -> [B, R]


@dataclass
class Stored:
    """A matrix in one format: its bytes and its product with a batch."""

    n_bytes: int
    product: Product


def dense(weight: torch.Tensor) -> Stored:
    return Stored(weight.nbytes, lambda x: linear(x, weight))


def dense_float32(weight: torch.Tensor) -> Stored:
    wide = weight.float()
    return Stored(wide.nbytes, lambda x: linear(x.float(), wide).to(x.dtype))


def bit_packed(weight: torch.Tensor) -> Stored:
    """Values [nnz] and bits [R, ceil(C / 8)]; each product first expands them to [R, C]."""
    columns, keep = weight.shape[1], weight != 0
    values, bits = weight[keep], pack(keep).to(weight.device)
    powers = 2 ** torch.arange(7, -1, -1, device=weight.device, dtype=torch.uint8)

    def product(x):
        mask = (bits.unsqueeze(-1) & powers).ne(0).flatten(1)[:, :columns]
        full = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
        return linear(x, full.masked_scatter_(mask, values))

    assert torch.equal(unpack(bits.cpu(), columns), keep.cpu())
    return Stored(values.nbytes + bits.nbytes, product)


def csr(weight: torch.Tensor) -> Stored:
    """Values with int32 indices; float32 on a CPU, where PyTorch has no CSR product in bf16."""
    dtype = weight.dtype if weight.is_cuda else torch.float32
    sparse = weight.to(dtype).to_sparse_csr()
    parts = (sparse.crow_indices().int(), sparse.col_indices().int(), sparse.values())
    matrix = torch.sparse_csr_tensor(*parts, sparse.shape)
    n_bytes = sum(p.nbytes for p in parts)
    return Stored(n_bytes, lambda x: (matrix @ x.to(dtype).T).T.to(x.dtype))


def two_of_four(weight: torch.Tensor) -> Stored:
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    n_bytes = weight.nbytes * 9 // 16  # per 4 weights of 16 bits: 2 values, 2 indices of 2 bits
    return Stored(n_bytes, lambda x: linear(x, sparse))


@torch.inference_mode()
def bench(folder: Path, repeats: int, console: Console) -> dict:
    """Measures a pruned model directory, prints and returns the results.

    Raises:
        UserError: it is not a model directory, lacks weights, or is not pruned.
    """
    match_names(skeleton(folder), Checkpoint(folder))  # raises if weights are missing
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model_class(folder).from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    modules = _pruned(model)
    if not modules:
        raise UserError(
            f"{folder} is not pruned: no matrix of its blocks has {PRUNED:.0%} zeros. "
            "Pass a stage's folder such as RUN/oneshot."
        )
    weights = {name: _weight(module) for name, module in modules.items()}
    formats, absent = _formats(weights, device)
    result = {"machine": _machine(device), "model": str(folder), "absent": absent}
    result["sparsity"] = 1 - sum(int(w.count_nonzero()) for w in weights.values()) / sum(
        w.numel() for w in weights.values()
    )
    console.say(
        f"{folder}: {len(modules)} pruned matrices, {100 * result['sparsity']:.1f}% zeros; "
        f"{result['machine']}; medians of {repeats}"
    )
    result["bytes"] = _bytes(folder, model, weights, formats, console)
    result["products"] = _products(weights, formats, repeats, device, console)
    result["steps"] = _steps(model, modules, formats, repeats, device, console)
    for name, reason in absent.items():
        console.say(f"{name}: not measured, {reason}")
    return result


def _pruned(model) -> dict[str, torch.nn.Module]:
    """The linears of the blocks with enough zeros to count as pruned."""
    prefix, _ = find_blocks(model)
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(prefix + ".")
        and isinstance(module, torch.nn.Linear | Conv1D)
        and module.weight.count_nonzero() <= (1 - PRUNED) * module.weight.numel()
    }


def _weight(module: torch.nn.Module) -> torch.Tensor:
    """The weight [R, C]; `Conv1D` stores its transpose."""
    weight = module.weight.detach()
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def _formats(
    weights: dict[str, torch.Tensor], device: torch.device
) -> tuple[dict[str, dict[str, Stored]], dict[str, str]]:
    """Each matrix in each format available here, and the reasons why others are not."""
    makers = {DENSE: dense}
    if device.type == "cpu":
        makers["dense float32"] = dense_float32
    makers |= {
        "bit-packed": bit_packed,
        f"CSR {'bf16' if device.type == 'cuda' else 'float32'}": csr,
    }
    absent = {}
    fits = all(
        w.shape[1] % 4 == 0 and bool((w.unflatten(1, (-1, 4)).ne(0).sum(-1) <= 2).all())
        for w in weights.values()
    )
    if not fits:
        absent["2:4"] = "the zeros do not follow the pattern"
    elif device.type == "cpu" or torch.cuda.get_device_capability(device) < (8, 0):
        absent["2:4"] = "it requires a GPU of compute capability 8.0 or higher"
    else:
        makers["2:4"] = two_of_four
    formats: dict[str, dict[str, Stored]] = {}
    for name, maker in makers.items():
        try:
            formats[name] = {key: maker(w) for key, w in weights.items()}
            key, w = next(iter(weights.items()))
            x = torch.randn(BATCHES[-1], w.shape[1], device=device, dtype=w.dtype)
            expected = linear(x.float(), w.float())
            error = (formats[name][key].product(x).float() - expected).norm() / expected.norm()
        except (RuntimeError, ValueError) as exception:  # the device does not support the format
            formats.pop(name, None)
            absent[name] = f"PyTorch does not support it here: {one_line(exception, 150)}"
            continue
        if not error < 0.02:
            raise UserError(f"{name} gives wrong products here (relative error {float(error):.3f})")
    return formats, absent


def _bytes(folder: Path, model, weights: dict, formats: dict, console: Console) -> dict:
    """Prints and returns the bytes of each format, which are the same in memory and in a file."""
    rest = sum(p.nbytes for p in model.parameters()) - sum(w.nbytes for w in weights.values())
    counts = {name: sum(s.n_bytes for s in stored.values()) for name, stored in formats.items()}
    rows = [
        [name, format_bytes(n), f"{n / counts[DENSE]:.2f}", format_bytes(n + rest)]
        for name, n in counts.items()
    ]
    file_bytes = Checkpoint(folder).n_bytes()
    rows.append(["as stored in MODEL", "-", "-", format_bytes(file_bytes)])
    columns = ["format", "pruned\nmatrices", "relative to\ndense bf16", "whole\nmodel"]
    console.table("Bytes, in memory and in a file", columns, rows)
    return {"pruned_matrices": counts, "rest": rest, "as_stored": file_bytes}


def _products(weights: dict, formats: dict, repeats: int, device, console: Console) -> list[dict]:
    """Prints and returns the seconds per product for each distinct shape and batch."""
    shapes = {tuple(w.shape): name for name, w in reversed(weights.items())}
    lines = []
    with console.bar("products", len(shapes) * len(BATCHES), "shapes") as bar:
        for shape, name in sorted(shapes.items()):
            for batch in BATCHES:
                x = torch.randn(batch, shape[1], device=device, dtype=torch.bfloat16)
                # one product of a small matrix is too short to time
                calls = {f: (lambda p=formats[f][name].product, x=x: p(x)) for f in formats}
                seconds = _in_turns(calls, repeats, device, at_least=2e-3)
                lines.append({"shape": list(shape), "batch": batch, "seconds": seconds})
                bar.advance()
    others = [name for name in formats if name != DENSE]
    rows = [
        [
            f"{line['shape'][0]} x {line['shape'][1]}, batch {line['batch']}",
            _time(line["seconds"][DENSE]),
            *(_relative(line["seconds"], name) for name in others),
        ]
        for line in lines
    ]
    console.table("One product, relative to dense bf16", ["matrix", DENSE, *others], rows)
    return lines


def _steps(
    model, modules: dict, formats: dict, repeats: int, device, console: Console
) -> list[dict]:
    """Prints and returns the seconds per decoding step of the whole model for each batch."""
    originals = {name: module.forward for name, module in modules.items()}
    model.config.use_cache = False  # one token has no past
    lines = []
    with console.bar("decoding steps", len(BATCHES), "batches") as bar:
        for batch in BATCHES:
            ids = torch.arange(batch, device=device).view(batch, 1) + 3

            def step(stored: dict[str, Stored], ids=ids):
                for name, module in modules.items():
                    module.forward = _forward(stored[name].product, module.bias)
                return model(ids)

            calls = {name: (lambda s=stored: step(s)) for name, stored in formats.items()}
            lines.append({"batch": batch, "seconds": _in_turns(calls, repeats, device)})
            bar.advance()
    for name, module in modules.items():
        module.forward = originals[name]
    rows = [
        [name, *(f"{_time(n['seconds'][name])}  {_relative(n['seconds'], name)}" for n in lines)]
        for name in formats
    ]
    columns = ["pruned matrices", *(f"batch {batch}" for batch in BATCHES)]
    console.table("One decoding step of the whole model", columns, rows)
    return lines


def _forward(product: Product, bias: torch.Tensor | None) -> Product:
    def forward(x):
        y = product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias

    return forward


def _in_turns(
    calls: dict[str, Callable], repeats: int, device: torch.device, at_least: float = 0.0
) -> dict[str, float]:
    """Median seconds per call; the calls take turns, so that all of them meet slow moments."""

    def timed(call: Callable, n: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(n):
            call()
        _wait(device)
        return (time.perf_counter() - start) / n

    n_calls = {}
    for name, call in calls.items():
        timed(call, 1)  # the first call also allocates
        shortest = min(timed(call, 1) for _ in range(3))
        n_calls[name] = max(1, min(1000, int(at_least / max(shortest, 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(timed(call, n_calls[name]))
    return {name: median(values) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _relative(seconds: dict[str, float], name: str) -> str:
    """A time relative to dense bf16's, in words."""
    ratio = seconds[DENSE] / seconds[name]
    if name == DENSE:
        return ""
    if abs(ratio - 1) < SAME:
        return "the same"
    return f"{ratio:.2f} x faster" if ratio > 1 else f"{1 / ratio:.2f} x slower"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-2 else f"{1e6 * seconds:.0f} us"


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{torch.get_num_threads()} threads ({instructions}), torch {torch.__version__}"

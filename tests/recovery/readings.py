"""What the tests read in run directories: losses, weights, masks, checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cap_llm.models.mask_file import FILE

LOSSES = ("loss", "ce", "kl", "prc", "snc", "fic", "feature", "held_out_ppl", "grad_norm")


def losses(run: Path, stage: str = "recover") -> dict[tuple[str, int], float]:
    """The loss parts by name and step; of a step that was done twice, the later ones."""
    values = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        point = json.loads(line)
        if point["stage"] == stage and point["name"] in LOSSES:
            values[point["name"], point["step"]] = point["value"]
    assert all(math.isfinite(v) for v in values.values())
    return values


def names(values: dict[tuple[str, int], float]) -> set[str]:
    return {name for name, _ in values}


def assert_close(a: dict, b: dict, relative: float) -> None:
    assert a.keys() == b.keys()
    far = {key: (a[key], b[key]) for key in a if a[key] != pytest.approx(b[key], rel=relative)}
    assert not far


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("model*.safetensors") for k, v in load_file(file).items()}


def masks(folder: Path) -> dict[str, np.ndarray]:
    """The masks [R, C] of a model directory: true where a weight stays."""
    found = {}
    with safe_open(folder / FILE, "np") as file:
        for name, columns in file.metadata().items():
            packed = file.get_tensor(name)
            found[name] = np.unpackbits(packed, axis=1, count=int(columns)).astype(bool)
    return found


def assert_zeros(folder: Path, start: Path, transposed: bool = False) -> None:
    """The masks are those of the start; the file has its zeros there and no others."""
    weights, before = tensors(folder), tensors(start)
    kept = masks(folder)
    assert kept.keys() == masks(start).keys()
    for name, mask in kept.items():
        assert np.array_equal(mask, masks(start)[name])
        key = name if name in weights else f"transformer.{name}"
        weight, old = weights[key].float().numpy(), before[key].float().numpy()
        if transposed:
            weight, old = weight.T, old.T
        assert mask.shape == weight.shape and 0 < mask.sum() < mask.size
        assert not weight[~mask].any()
        assert (weight == 0).sum() == (old == 0).sum()
        assert (weight != old)[mask].mean() > 0.5  # the others have trained


def sparsity(folder: Path) -> float:
    kept = masks(folder).values()
    return 1 - sum(m.sum() for m in kept) / sum(m.size for m in kept)


def perplexity(folder: Path, windows: torch.Tensor) -> float:
    """As transformers gives it for a model directory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return math.exp(model(input_ids=windows, labels=windows).loss.item())


def record(run: Path) -> dict:
    (level,) = json.loads((run / "recover" / "recovery.json").read_text())["levels"]
    return level


def checkpoints(run: Path, level: str = "1") -> list[str]:
    return sorted(p.name for p in (run / "recover" / "checkpoints" / level).glob("*-*"))

"""The record of what was pruned in a model directory, and its verification."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers.pytorch_utils import Conv1D

from cap_llm.models import mask_file as mask_files
from cap_llm.models.checkpoint import Checkpoint
from cap_llm.models.skeleton import match_names, skeleton
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import read_json, write_json


def patterns(folder: Path) -> dict[str, str]:
    """The pattern of each pruned weight by name, where the model's `sparsity.json` says it."""
    return {row["name"]: row["pattern"] for row in recorded(folder)}


def removed(row: dict) -> float:
    """The share of a matrix that its mask removes, by its row of `sparsity.json`."""
    return row["masked"] / math.prod(row["shape"])


def recorded(folder: Path) -> list[dict]:
    """The rows of a model's `sparsity.json`, one for each pruned weight; none without the file.

    Raises:
        UserError: the file holds something else.
    """
    path = folder / "sparsity.json"

    def rows(content: dict) -> list[dict]:
        for row in content["rows"]:
            str(row["name"]), str(row["pattern"]), removed(row)
        return content["rows"]

    return read_json(path, rows) if path.exists() else []


def write_sparsity(
    folder: Path,
    model: str,
    rows: list[Row],
    whole: tuple[int, int],
    blocks: list[dict] | None = None,
) -> tuple[int, int]:
    """Writes `sparsity.json` of a model directory.

    Args:
        folder: the model directory.
        model: the name of what it was made from.
        rows: one for each pruned weight.
        whole: zeros and weights of the whole model, as `verify` counts them.
        blocks: errors of whole blocks.

    Returns:
        Pruned weights, and zeros among them.
    """
    pruned = sum(r.shape[0] * r.shape[1] for r in rows)
    zeros = sum(r.zeros for r in rows)
    write_json(
        folder / "sparsity.json",
        {
            "model": model,
            "rows": [asdict(r) for r in rows],
            **({"blocks": blocks} if blocks else {}),
            "pruned_matrices": {
                "count": len(rows),
                "weights": pruned,
                "zeros": zeros,
                "sparsity": zeros / max(1, pruned),
            },
            "whole_model": {
                "weights": whole[1],
                "zeros": whole[0],
                "sparsity": whole[0] / whole[1],
            },
        },
    )
    return pruned, zeros


def verify(folder: Path, rows: list[Row]) -> tuple[int, int]:
    """Reloads a written model and holds it against its masks and its skeleton.

    Returns:
        Zeros and weights of the whole model; stored buffers are none.

    Raises:
        UserError: a masked weight is not zero, or a count differs.
    """
    checkpoint = Checkpoint(folder)
    model = skeleton(folder)
    keys = match_names(model, checkpoint)  # every parameter is there, with its shape
    masks = mask_files.MaskFile(mask_files.path_of(folder))
    by_key = {keys[r.name]: r for r in rows}
    total = n_weights = 0
    parameters = dict(model.named_parameters())
    for key in {key for name, key in keys.items() if name in parameters}:
        (tensor,) = checkpoint.read([key]).values()
        zeros = int((tensor == 0).sum())
        total += zeros
        n_weights += tensor.numel()
        row = by_key.get(key)
        if row is None:
            continue
        mask = masks.read(row.name)
        transposed = isinstance(model.get_submodule(row.name.removesuffix(".weight")), Conv1D)
        weight = tensor.T if transposed else tensor
        if zeros != row.zeros or bool((weight[~mask] != 0).any()):
            raise UserError(
                f"{row.name} in {folder} has {zeros} zeros, {row.zeros} were made; the file was "
                "changed or the disk is failing: remove the folder and run again"
            )
    return total, n_weights


def kind(name: str) -> str:
    """A weight's place in its block: `mlp.up_proj` of `model.layers.3.mlp.up_proj.weight`."""
    return re.sub(r"^.*?\.\d+\.", "", name).removesuffix(".weight")


@dataclass
class Row:
    """What happened to one matrix; a row of `sparsity.json`.

    Attributes:
        name: of the weight in the model.
        shape: [R, C].
        pattern: as asked for.
        zeros: weights that are zero now.
        masked: weights that the mask removes; fewer than `zeros` if some that stay are zero.
        error: squared error of the outputs on the calibration text, relative to the outputs; of
            a method that needs no Hessian (Wanda), on the first 16 sequences, because to accumulate
            one takes as long as all else that it does; None for a method that reads no text, and
            of reconstruction, whose errors are those of whole blocks.
        damping: used for the Hessian, as a share of its mean diagonal; None without one.
        seconds: taken by the solver; of reconstruction, an equal share of the block's.
        kept: which of several candidates was taken, where there were any.
    """

    name: str
    shape: list[int]
    pattern: str
    zeros: int
    masked: int
    error: float | None
    damping: float | None
    seconds: float
    kept: str | None = None

"""`result.json`: what the model of a directory is, how it was made, and what that cost.

A stage writes it when it finishes. Reports read nothing else but `scores.json`.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from dataclasses import asdict, field, replace
from pathlib import Path

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from cap_llm.models.files import config_dict, fingerprint, weight_files
from cap_llm.runtime.environment import Environment, environment, machine
from cap_llm.runtime.files import matching, read_json, write_json
from cap_llm.runtime.rundir import CONTENTS, Run, with_contents

FILE = "result.json"
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(config=ConfigDict(allow_inf_nan=False))
class Result:
    """A model that a stage made, or that a run started from.

    Attributes:
        stage: the stage; `dense` for a dense model, `given` for a model pruned elsewhere.
        method: such as `SparseGPT + refit + recovery`.
        amount: `50%` or `2:4`; empty for a dense model, or if layers differ.
        dense: path or hub name of the dense model.
        weights: fingerprint of the weights.
        before: the pruned model that the stage started from.
        run: name that the user gave to the run.
        identity: checksum of the settings of all stages up to this one, without seeds.
        seeds: the seeds of these stages.
        calibration: the text that the solvers read, such as `128 x 2048 tokens of c4`.
        ids_sha256: checksum of its ids.
        training: the text of the recovery.
        seconds: time of all stages up to this one; None if a part of it is unknown.
        peak_memory_bytes: highest memory per rank in these stages.
        peak_cuda_bytes: highest GPU memory per rank in these stages.
        tokens: tokens trained on in these stages.
        machine: where these stages ran.
        sparsity: share of zeros in the pruned matrices.
        whole_sparsity: share of zeros in the whole model.
        dtype: type of the stored weights.
        n_bytes: size of the weight files.
        packed_bytes: their size if pruned matrices were nonzero values and one bit per weight.
        block_errors: mean relative output error of the pruned matrices of each block.
        curve: per level of the recovery, pairs of tokens trained on and held-out perplexity.
        dense_ppl: perplexity of the dense model on the same held-out text.
        job: environment of the job that finished the stage.
    """

    stage: str
    method: str
    amount: str = ""
    dense: str = ""
    weights: str | None = None
    before: Result | None = None
    run: str = ""
    identity: str = ""
    seeds: list[int] = field(default_factory=list)
    calibration: str | None = None
    ids_sha256: str | None = None
    training: str | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    peak_cuda_bytes: int | None = None
    tokens: int = 0
    machine: str = ""
    sparsity: float | None = None
    whole_sparsity: float | None = None
    dtype: str = ""
    n_bytes: int = 0
    packed_bytes: int | None = None
    block_errors: list[float] = field(default_factory=list)
    curve: list[list[tuple[float, float]]] = field(default_factory=list)
    dense_ppl: float | None = None
    job: Environment | None = None

    @property
    def name(self) -> str:
        """Method and amount."""
        return f"{self.method} {self.amount}".strip()


def read_result(folder: Path) -> Result | None:
    """The result of a model directory; None if no stage made the model.

    Raises:
        UserError: the file has other content.
    """
    path = folder / FILE
    return read_json(path, matching(Result)) if path.exists() else None


def outside_result(folder: Path, stage: str, dense: str) -> Result:
    """The result of a model that no stage made: `dense` or `given`."""
    method, weights = "dense" if stage == "dense" else "given model", fingerprint(folder)
    return Result(stage, method, dense=dense, weights=weights, identity=weights or "")


def result_of(folder: Path, stage: str, model: dict) -> Result:
    """The result of a model directory, also if no stage made it.

    Args:
        folder: the model directory.
        stage: `dense` or `given`, if no stage made it.
        model: the settings of section `model`, which name the dense model.
    """
    return read_result(folder) or outside_result(folder, stage, dense_name(model))


def dense_name(model: dict) -> str:
    """Path or hub name of the dense model, from the settings of section `model`."""
    path = model.get("dense") or model["path"]
    revision = None if model.get("dense") else model.get("revision")
    path = str(Path(path).resolve()) if Path(path).is_dir() else path
    return f"{path}@{revision}" if revision else path


def write_result(folder: Path, result: Result, model: Path | None = None) -> None:
    """Writes the result of a model directory, with what its files say.

    Args:
        folder: where it is written; holds `sparsity.json`.
        result: the rest.
        model: the directory of the weights, if it is another one.
    """
    model = model or folder
    dtype = config_dict(model).get("dtype") or config_dict(model).get("torch_dtype") or ""
    n_bytes = sum(path.stat().st_size for path in weight_files(model))
    facts = {"weights": fingerprint(model), "dtype": dtype, "n_bytes": n_bytes}
    counts = read_json(folder / "sparsity.json")
    if rows := counts["rows"]:
        pruned = counts["pruned_matrices"]
        facts["sparsity"] = pruned["sparsity"]
        facts["whole_sparsity"] = counts["whole_model"]["sparsity"]
        if dtype in _BYTES:
            masks = sum(row["shape"][0] * -(-row["shape"][1] // 8) for row in rows)
            facts["packed_bytes"] = n_bytes - _BYTES[dtype] * pruned["zeros"] + masks
    errors: dict[int, list[float]] = {}
    for row in rows:
        if row["error"] is not None and (block := re.search(r"\.(\d+)\.", row["name"])):
            errors.setdefault(int(block[1]), []).append(row["error"])
    if errors:
        facts["block_errors"] = [statistics.fmean(errors[i]) for i in sorted(errors)]
    write_json(folder / FILE, asdict(replace(result, **facts)))


def finish_result(
    run: Run,
    folder: Path,
    stage: str,
    label: tuple[str, str],
    recipe: dict,
    before: Result | None,
    costs: dict,
    **facts,
) -> None:
    """Writes the result of a stage, on rank 0.

    Args:
        run: the run directory.
        folder: the stage's folder, which is complete but for `done.json`.
        stage: its name.
        label: method and amount.
        recipe: the settings that the result depends on.
        before: the pruned model that it started from; None if that was dense.
        costs: `seconds`, `peak_memory_bytes`, `peak_cuda_bytes` of this stage.
        facts: further fields of `Result`; None: the same as before. `tokens` are this stage's, and
            `calibration` is the origin of the text with its seed.
    """
    job = environment(run.world)
    where = machine(job["hardware"])
    settings = _by_content(with_contents(recipe, run.contents))
    earlier = before or Result("dense", "dense", dense=dense_name(recipe["model"]), seconds=0.0)
    if before:
        settings = {k: v for k, v in settings.items() if k not in ("model", "start")}
        where = where if before.machine in ("", where) else f"{before.machine}, then {where}"
    text = json.dumps([earlier.identity, stage, _without_seeds(settings)], sort_keys=True)
    if origin := facts.get("calibration"):
        facts["calibration"] = " ".join(origin.rpartition(", seed ")[0].split())
    own = {k: v for k, v in facts.items() if v is not None}
    inherited = {k: getattr(earlier, k) for k in ("dense", "calibration", "ids_sha256", "training")}
    peaks = {k: max(costs.get(k) or 0, getattr(earlier, k) or 0) or None for k in _PEAKS}
    own = inherited | peaks | own | {"tokens": earlier.tokens + own.get("tokens", 0)}
    if earlier.seconds is not None:
        own["seconds"] = round(earlier.seconds + costs["seconds"], 2)
    result = Result(
        stage,
        *label,
        before=before,
        run=run.name,
        identity=hashlib.sha256(text.encode()).hexdigest()[:16],
        seeds=[*earlier.seeds, *_seeds(recipe)],
        machine=where,
        job=job,
        **own,
    )
    write_result(folder, result)


_PEAKS = ("peak_memory_bytes", "peak_cuda_bytes")


def _by_content(recipe: dict) -> dict:
    """A recipe in which models and texts are their checksums instead of their paths."""
    contents = recipe.get(CONTENTS) or {}
    return {
        name: {k: contents.get(f"{name}.{k}", v) for k, v in part.items()}
        if isinstance(part, dict)
        else part
        for name, part in recipe.items()
        if name != CONTENTS
    }


def _without_seeds(settings):
    if not isinstance(settings, dict):
        return settings
    return {k: _without_seeds(v) for k, v in settings.items() if k != "seed"}


def _seeds(settings: dict) -> list[int]:
    seeds = []
    for key, value in settings.items():
        if key == "seed":
            seeds.append(value)
        elif isinstance(value, dict):
            seeds += _seeds(value)
    return seeds

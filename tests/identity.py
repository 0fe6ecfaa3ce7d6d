"""Whether a change of structure has changed a result: a fixed set of small runs, to the bit.

    RESULTS=before.json python -m pytest tests/identity.py     # the file is absent: records it
    RESULTS=before.json python -m pytest tests/identity.py     # the file is there: compares

Weights, masks, losses and scores of one-shot pruning by each method and pattern, SDS, block
reconstruction, recovery with every term and a gradual schedule, perplexity and zero-shot scores.
Records hold on one machine only: another processor rounds in another way. Minutes; not part of
`make test`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, environment

from cap_llm.evaluation.scores import read_scores
from cap_llm.train import main

METHODS = ("magnitude", "wanda", "sparsegpt", "admm_grad", "alps")
PATTERNS = ("unstructured", "row", "2:4")
LOSSES = {"loss", "ce", "kl", "feature", "prc", "snc", "fic", "held_out_ppl", "grad_norm", "lr"}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def results(run: Path) -> dict:
    """What a run directory has come to: digests of all weights and masks, losses, scores."""
    found: dict = {}
    for path in sorted(run.rglob("*.safetensors")):
        place = path.parent.relative_to(run)
        kind = "mask " if "mask" in str(path.relative_to(run)) else ""
        for name, tensor in load_file(path).items():
            found[f"{place}: {kind}{name.removesuffix('.mask')}"] = digest(tensor)
    for path in sorted(run.rglob("sparsity.json")):
        for row in json.loads(path.read_text())["rows"]:
            facts = [row["zeros"], row["masked"], row["error"], row["damping"]]
            found[f"{path.parent.relative_to(run)}: row {row['name']}"] = facts
    for path in sorted(run.rglob("scores.json")):
        scores = {(s.name, s.measure): s.value for s in read_scores(path).scores}
        for (name, measure), value in scores.items():
            if measure in ("ppl_token", "acc"):
                value = value if measure != "acc" else [value, scores.get((name, "acc_norm"))]
                found[f"{path.parent.relative_to(run)}: {name}"] = value
    for line in (run / "metrics.jsonl").read_text().splitlines():
        metric = json.loads(line)
        if metric["name"] in LOSSES:
            found[f"{metric['stage']} {metric['name']} {metric['step']}"] = metric["value"]
    return found


@pytest.fixture
def place(tmp_path, text_file, tiny, monkeypatch):
    """Models, text and the entry, in one thread."""
    torch.set_num_threads(1)
    text = tmp_path / "text.txt"
    text.write_text("".join(text_file.read_text().splitlines(keepends=True)[:600]))
    scored = tmp_path / "scored.txt"
    scored.write_text(text.read_text()[::-1][:20_000])
    models = {
        "llama": tiny("llama", num_hidden_layers=3),
        "gpt2": tiny("gpt2"),
        "opt": tiny("opt", dtype=torch.bfloat16),
        "llama-bf16": tiny("llama", dtype=torch.bfloat16),
    }
    common = {"calibration.corpus": text, "calibration.sequences": 12, "calibration.length": 48}
    common |= {"calibration.held_out": 4, "evaluate.corpora": f"[{scored}]", "evaluate.window": 64}
    common |= {"evaluate.max_windows": 6, "runtime.device": "cpu", "recover.corpus": text}

    def run(name: str, model: str = "llama", ranks: int = 1, **changes) -> dict:
        out = tmp_path / name.replace(" ", "-")
        settings = {"output_dir": out, "model.path": models[model]} | common
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        words = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
        if ranks > 1 or "recover" in str(changes.get("stages")):
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            command = [sys.executable, *torchrun, str(ranks), str(ROOT / "cap_llm/train.py")]
            done = subprocess.run([*command, *words], env=environment(), check=False)
            assert done.returncode == 0, name
        else:
            monkeypatch.setattr(sys, "argv", ["cap-llm", *words])
            assert main() == 0, name
        return results(out)

    run.text = text
    return run


RECOVER = {
    "recover__length": 32,
    "recover__optimizer__tokens": 6 * 4 * 32,
    "recover__optimizer__batch": 4,
    "recover__engine__micro_batch": 2,
    "recover__held_out": 4,
    "recover__optimizer__lr": 0.003,
    "recover__objective__ce": 0.2,
    "recover__objective__kl": 0.8,
    "recover__objective__feature": 0.5,
    "recover__objective__prc": 0.1,
    "recover__objective__snc": 0.1,
    "recover__objective__fic": 0.1,
    "recover__finetuned": "train",
    "recover__masks__schedule": "0.6, 0.7",
    "recover__contrast__segments": 4,
    "recover__contrast__token_positions": 8,
    "recover__contrast__n_unlabeled_frequent": 5,
    "recover__contrast__extra_negatives": 4,
    "recover__log__evaluate_every": 3,
}


def runs(run) -> dict[str, dict]:
    found: dict[str, dict] = {}

    def add(name: str, *args, **changes) -> None:
        found[name] = run(name, *args, **changes)

    prune = {"stages": "[oneshot, evaluate]"}
    for method in METHODS:
        for pattern in PATTERNS:
            options = {"oneshot__method": method, "oneshot__pattern": pattern}
            add(f"{method} {pattern.replace(':', 'of')}", **prune, **options)
    add("wanda refit", **prune, oneshot__method="wanda", oneshot__refit="true")
    add("sparsegpt refit", **prune, oneshot__refit="true", oneshot__pattern="4:8")
    add("owl", **prune, oneshot__allocation="owl", oneshot__owl__guard_sequences=4)
    add("by layer", **prune, oneshot__layers='{"*.down_proj": 0.4, "model.layers.0.*": 0}')
    for model in ("gpt2", "opt", "llama-bf16"):
        for method in ("sparsegpt", "alps", "wanda"):
            options = {"oneshot__method": method, "oneshot__pattern": "2:4"}
            add(f"{model} {method}", model, **prune, **options)
    chain = {"stages": "[oneshot, sds, reconstruct, evaluate]", "reconstruct__epochs": 2}
    add("sds gram", **chain)
    add("sds dense", "gpt2", **chain, sds__data="dense", oneshot__pattern="2:4")
    add("sds paper", **chain, sds__mode="paper", reconstruct__inputs="dense")
    add("halves", "opt", **chain, reconstruct__split_attention="true", oneshot__method="wanda")
    add("two ranks", "llama", 2, **chain)
    if data := os.environ.get("CAP_LLM_DATA"):
        tasks = {"evaluate__tasks": "[arc_easy, piqa]", "evaluate__limit": 6}
        add("zero-shot", **prune, **tasks, evaluate__task_data=f"{data}/zeroshot")
    recover = {"stages": "[oneshot, recover, evaluate]"} | RECOVER
    add("recover", **recover, recover__engine__deepspeed="zero0")
    add("recover zero2", "llama", 2, **recover, recover__engine__deepspeed="zero2")
    add("recover zero3", "gpt2", 2, **recover, recover__engine__deepspeed="zero3")
    add("recover bf16", "llama-bf16", 2, **recover, recover__optimizer__dtype="bfloat16")
    return found


def test_identity(place):
    record = Path(os.environ["RESULTS"])
    found = json.loads(json.dumps(runs(place)))
    if not record.exists():
        record.write_text(json.dumps(found, indent=1))
        pytest.skip(f"recorded {sum(map(len, found.values()))} values in {record}")
    was = json.loads(record.read_text())
    different = {
        f"{name}, {key}": (was.get(name, {}).get(key), found.get(name, {}).get(key))
        for name in was | found
        for key in was.get(name, {}) | found.get(name, {})
        if was.get(name, {}).get(key) != found.get(name, {}).get(key)
    }
    assert not different, f"{len(different)} values differ: {list(different.items())[:8]}"

"""The model card of each finished stage: `README.md` in its model directory.

A card names no folder of this machine, because it is uploaded with the model.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import cap_llm
from cap_llm.report.runs import Model, read_runs
from cap_llm.runtime.files import atomic

FILE = "README.md"
_MARK = "<!-- Written by cap-llm, which replaces this file. Remove this line to keep changes. -->"
_LOADING = """## How to load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_MODEL", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("THIS_MODEL")
```

The weights are plain safetensors in which every pruned weight is exactly zero. Any library that
loads the base model loads this one. Files and memory are as large as the base model's, and a
product is as fast, unless the runtime uses the zeros. `masks/masks.safetensors` holds the masks and
`sparsity.json` the share of zeros of each matrix. The license of the base model applies.
"""


def write_cards(run: Path) -> None:
    """Writes the cards of a run's models, except those that a user has changed.

    Raises:
        UserError: a card is not writable.
    """
    models, _ = read_runs([run])
    dense = next((model for model in models if model.result.stage == "dense"), None)
    for model in models:
        path = model.folder / FILE
        if not (model.folder / "done.json").exists():
            continue
        old, new = "", card(model, dense)
        if path.exists():
            old = path.read_text(encoding="utf-8", errors="replace")
        if old != new and (not old or _MARK in old):
            with atomic(path) as temporary:
                temporary.write_text(new, encoding="utf-8")


def card(model: Model, dense: Model | None = None) -> str:
    """The text of a model's card, with the scores of the dense model beside its own."""
    result = model.result
    base, _, revision = result.dense.partition("@")
    on_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base) and not Path(base).exists()
    front = {"library_name": "transformers", "tags": ["pruned", "sparse", "cap-llm"]}
    if on_hub:  # the hub rejects other names here
        front["base_model"] = base
    name = base if on_hub else Path(base).name
    rows = [["base model", name + f" ({revision})" * bool(revision)], ["method", result.method]]
    rows += [["pattern or sparsity", result.amount]] if result.amount else []
    if result.sparsity is not None:
        zeros = f"{result.sparsity:.2%} of the pruned matrices, "
        rows.append(["zeros", f"{zeros}{result.whole_sparsity:.2%} of the model"])
    for title, text in (("calibration", result.calibration), ("training", result.training)):
        rows += [[title, re.sub(r"(?<![\w.~-])~?/\S*/", "", text)]] if text else []
    rows.append(["stored as", result.dtype])
    versions = result.job["versions"] if result.job else {}
    rows.append(["made with", ", ".join(f"{k} {v}" for k, v in versions.items() if v)])
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", _MARK]
    parts.append(f"# {Path(name).name}, {result.name}")
    parts.append(f"Pruned with cap_llm {cap_llm.__version__}.")
    parts.append(_table(["", ""], rows))
    if scores := _scores(model, dense):
        parts += ["## Results", _table(["measure", "this model", "dense model"], scores)]
    return "\n\n".join([*parts, _LOADING])


def _scores(model: Model, dense: Model | None) -> list[list[str]]:
    """Perplexities and accuracies; the dense model's where it was measured on the same."""
    of_dense = {(s.measure, s.data, s.n): s.value for s in (dense.scores if dense else [])}
    rows = []
    for s in model.scores:
        if s.measure in ("ppl_token", "acc"):
            values = (s.value, of_dense.get((s.measure, s.data, s.n)))
            form = ".4g" if s.measure == "ppl_token" else ".1%"
            measure = "accuracy" if s.measure == "acc" else s.measure
            rows.append(
                [f"{s.name}, {measure}", *("-" if v is None else f"{v:{form}}" for v in values)]
            )
    return rows


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(' '.join(c.split()).replace('|', '/') for c in line)} |" for line in lines
    )

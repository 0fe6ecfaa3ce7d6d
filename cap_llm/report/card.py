"""The model card of each finished stage: `README.md` in its model directory.

A card names no folder of this machine, because it is uploaded with the model.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import cap_llm
from cap_llm.report.runs import Result, collect
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
    """Writes the cards of a run's finished models, except those that a user has changed.

    Raises:
        UserError: `run` is not a run directory, or a card cannot be written.
    """
    results = collect(run)
    dense = next((result for result in results if result.stage == "dense"), None)
    for result in results:
        path = run / result.stage / FILE
        if not (path.parent / "done.json").exists():
            continue
        old, new = "", card(result, dense)
        if path.exists():
            old = path.read_text(encoding="utf-8", errors="replace")
        if old != new and (not old or _MARK in old):
            with atomic(path) as temporary:
                temporary.write_text(new, encoding="utf-8")


def card(result: Result, dense: Result | None = None) -> str:
    """The text of a model's card, with the scores of the dense model beside its own."""
    base, _, revision = result.dense.partition("@")
    on_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base) and not Path(base).exists()
    front = {"library_name": "transformers", "tags": ["pruned", "sparse", "cap-llm"]}
    if on_hub:  # the hub rejects other names here
        front["base_model"] = base
    name = base if on_hub else Path(base).name
    rows = [["base model", name + f" ({revision})" * bool(revision)], ["method", result.method]]
    rows += [["pattern or sparsity", result.amount]] if result.amount else []
    if result.sparsity:
        pruned, whole = result.sparsity
        rows.append(["zeros", f"{pruned:.2%} of the pruned matrices, {whole:.2%} of the model"])
    for title, text in (("calibration", result.calibration), ("training", result.training)):
        rows += [[title, re.sub(r"(?<![\w.~-])~?/\S*/", "", text)]] if text else []
    rows.append(["stored as", result.stored_as])
    rows.append(["made with", result.environment.get("versions") or cap_llm.__version__])
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", _MARK]
    parts.append(f"# {Path(name).name}, {result.method} {result.amount}".rstrip())
    parts.append(f"Pruned with cap_llm {cap_llm.__version__}.")
    parts.append(_table(["", ""], rows))
    if scores := _scores(result, dense):
        parts += ["## Results", _table(["measure", "this model", "dense model"], scores)]
    return "\n\n".join([*parts, _LOADING])


def _scores(result: Result, dense: Result | None) -> list[list[str]]:
    """Perplexities and accuracies; the dense model's where it was measured on the same."""
    of_dense = {_measure(f): f.value for f in (dense.figures if dense else [])}
    rows = []
    for figure in result.figures_of("ppl", "task"):
        measure, limit = _measure(figure), figure.facts.get("limit")
        unit = f"ppl_token@{measure[2]}" if figure.kind == "ppl" else "accuracy"
        name = f"{figure.name}, {unit}" + f", first {limit} only" * bool(limit)
        other = of_dense.get(measure)
        values = (figure.value, other)
        shown = [
            "-" if v is None else f"{v:.4g}" if figure.kind == "ppl" else f"{v:.1%}" for v in values
        ]
        rows.append([name, *shown])
    return rows


def _measure(figure) -> tuple:
    """What two figures must share to stand in one row."""
    facts = figure.facts
    return figure.kind, figure.name, facts.get("window"), facts.get("limit"), facts.get("text")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(' '.join(c.split()).replace('|', '/') for c in line)} |" for line in lines
    )

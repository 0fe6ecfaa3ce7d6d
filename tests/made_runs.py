"""Changes of a run's files, for the tests of what is read from them, and its main table."""

import json
from pathlib import Path

from cap_llm.report.comparison import compare
from cap_llm.report.runs import collect

STAGES = ("dense", "oneshot")
PERPLEXITY = "oneshot/perplexity.json"


def quality(*runs: Path) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Labels, cells by row name, and notes of the first table over runs."""
    table = compare([r for run in runs for r in collect(run)])[0].tables[0]
    rows = {row[0].text: [c.text for c in row[1:]] for row in table.rows}
    return [" ".join(c.split()) for c in table.columns[1:]], rows, table.notes


def named(name: str):
    return {"environment.json": lambda c: c.update(run=name)}


def scored(**values):
    """Changes the one entry of a perplexity.json."""

    def change(content):
        (entry,) = content["corpora"].values()
        entry.update(values)

    return change


def zeroshot(versions=None, **accuracies):
    """A zeroshot.json with these accuracies."""
    entry = {"acc_stderr": 0.01, "items": 100, "limit": None, "version": 1.0, "rows_sha256": "abc"}
    entry["versions"] = {"lm_eval": "0.4.13"} | (versions or {})
    tasks = {task: entry | {"acc": acc} for task, acc in accuracies.items()}
    return lambda _: {"model": "m", "stage": "s", "tasks": tasks}


def other(recipe):
    """Another method than the real run's."""
    recipe["oneshot"]["refit"] = True


def seeded(seed: int, ppl: float) -> dict:
    def change(recipe):
        recipe["calibration"]["seed"] = seed

    name = named(f"method, seed {seed}")
    return name | {"oneshot/recipe.json": change, PERPLEXITY: scored(ppl_token=ppl)}


def as_opt(run: Path, window: int = 2048, origin: str = "allenai/c4  train", **oneshot) -> Path:
    """Rewrites a run as one of OPT-125m in the papers' protocol."""

    def recipe(content):
        content["model"]["path"] = "facebook/opt-125m"
        if "oneshot" in content:
            content["oneshot"].update(oneshot)
            content["calibration"].update(corpus="c4", sequences=128, length=2048)

    def done(content):
        content["calibration"] = f"128 x 2048 tokens of {origin}, seed 0"

    def score(content):
        (entry,) = content["corpora"].values()
        content["corpora"] = {f"wikitext2@{window}": entry | {"window": window}}

    changes = [(f"{s}/recipe.json", recipe) for s in STAGES]
    changes += [(f"{s}/perplexity.json", score) for s in STAGES] + [("oneshot/done.json", done)]
    for name, change in changes:
        content = json.loads((run / name).read_text())
        change(content)
        (run / name).write_text(json.dumps(content))
    return run

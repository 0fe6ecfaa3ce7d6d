"""Acceptance: OPT-125m against the published perplexities, each with its target range.

    python eval/acceptance.py [OUTPUT_DIR] [--model DIRECTORY]         (`make acceptance` calls it)

Each row is a run of the real entry with the recipe `opt-125m-acceptance`. The model, C4, WikiText-2
and PTB come from the Hugging Face hub (or from `--model DIRECTORY` and CAP_LLM_DATA). Finished runs
are not repeated, and one that was stopped goes on. Ends with measured, published, difference, and
within or outside the range; the exit code is 0 if all are within, else 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from cap_llm.runtime.console import Console, quiet_libraries  # noqa: E402

quiet_libraries()

from cap_llm.evaluation.report import collect, write_report  # noqa: E402
from cap_llm.evaluation.runs import Result  # noqa: E402
from cap_llm.runtime.errors import UserError  # noqa: E402

RUNS = {
    "dense": ["--stages", "[evaluate]", "--evaluate.dense", "true"],
    "magnitude 50 %": ["--oneshot.method", "magnitude"],
    "SparseGPT 50 %": [],
    "Wanda 50 %": ["--oneshot.method", "wanda"],
    "SparseGPT 2:4": ["--oneshot.pattern", "2:4", "--oneshot.sparsity", "null"],
    "Wanda 2:4": [
        *("--oneshot.method", "wanda", "--oneshot.pattern", "2:4", "--oneshot.sparsity", "null"),
    ],
}
# (run, corpus): published, lowest and highest that is accepted. Where papers disagree, or drew
# another calibration sample, the range spans what they print.
TARGETS = {
    ("dense", "wikitext2"): ("27.66", 27.64, 27.68),
    ("dense", "ptb"): ("38.99", 38.97, 39.01),
    ("dense", "c4"): ("26.56", 26.54, 26.58),
    ("magnitude 50 %", "wikitext2"): ("193.4", 192.9, 193.9),
    ("SparseGPT 50 %", "wikitext2"): ("36.85", 36.3, 37.2),
    ("Wanda 50 %", "wikitext2"): ("39.00", 38.8, 39.4),
    ("SparseGPT 2:4", "wikitext2"): ("60.43", 60.0, 61.0),
    ("Wanda 2:4", "wikitext2"): ("82.47", 81.0, 83.0),
}


def main() -> int:
    """Runs all rows, writes the report and prints the verdicts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/acceptance"))
    parser.add_argument("--model", default="facebook/opt-125m", help="OPT-125m: name or directory")
    options = parser.parse_args()
    console = Console()
    results = {}
    for n, (name, settings) in enumerate(RUNS.items(), 1):
        console.say(f"\n[{n}/{len(RUNS)}] {name}", style="bold")
        folder = options.out / name.lower().replace(" %", "").replace(" ", "-").replace(":", "of")
        command = [sys.executable, str(ROOT / "cap_llm/train.py"), "--output_dir", str(folder)]
        command += ["--config", "opt-125m-acceptance", "--name", name]
        command += ["--model.path", options.model, *settings]
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
        results[name] = collect(folder)[-1]
    try:
        page = write_report(list(results.values()), options.out, "OPT-125m: acceptance", console)
    except UserError as error:
        print(f"acceptance.py: error: {error}", file=sys.stderr)
        return 2
    rows, n_outside = verdicts(results)
    columns = ["run", "corpus", "measured", "published", "difference", "range", ""]
    console.table("Acceptance", columns, rows)
    console.say(f"{len(rows) - n_outside} of {len(rows)} within their range; report: {page}")
    return 1 if n_outside else 0


def verdicts(results: dict[str, Result]) -> tuple[list[list[str]], int]:
    """A row for each target, and how many figures lie outside or are missing."""
    rows, n_outside = [], 0
    for (name, corpus), (published, low, high) in TARGETS.items():
        figures = results[name].figures
        found = [f.value for f in figures if (f.kind, f.name) == ("ppl", corpus)]
        row, accepted = [name, corpus], f"{low:g} to {high:g}"
        if found:
            within = low <= found[0] <= high
            row += [f"{found[0]:.2f}", published, f"{found[0] - float(published):+.2f}", accepted]
        else:
            within = False
            row += ["-", published, "-", accepted]
        rows.append([*row, "within" if within else "OUTSIDE"])
        n_outside += not within
    return rows, n_outside


if __name__ == "__main__":
    sys.exit(main())

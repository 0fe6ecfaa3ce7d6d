"""The README's WikiText-2 table: one-shot methods at five patterns on SmolLM2-135M.

    CAP_LLM_DATA=... python eval/study_oneshot.py [WORK_DIR]          (`make study` calls it)

Each cell is a run of the real entry: calibration on 128 x 512 tokens of C4, perplexity on
WikiText-2 with windows of 2048; the whole test set at 50 % and 2:4, its first 32 windows elsewhere.
Finished cells are kept in `eval/results/study_oneshot.json` and not repeated; a cell that was
stopped goes on from its run in WORK_DIR. Remove the file to measure all of it again. Two to three
hours on two cores.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]

from cap_llm.runtime.console import Console, quiet_libraries  # noqa: E402

quiet_libraries()

import assets  # noqa: E402

from cap_llm.runtime.files import read_json, write_json  # noqa: E402

RESULTS = ROOT / "eval" / "results" / "study_oneshot.json"
METHODS = {
    "magnitude": ["--oneshot.method", "magnitude"],
    "Wanda": ["--oneshot.method", "wanda"],
    "SparseGPT": [],
    "SparseGPT + refit": ["--oneshot.refit", "true"],
}
PATTERNS = {
    "60 %": ["--oneshot.sparsity", "0.6"],
    "70 %": ["--oneshot.sparsity", "0.7"],
    "4:8": ["--oneshot.pattern", "4:8"],
    "50 %": ["--oneshot.sparsity", "0.5"],
    "2:4": ["--oneshot.pattern", "2:4"],
}
WHOLE = ("50 %", "2:4")  # scored on the whole test set
FIRST = 32  # windows elsewhere


def main() -> int:
    """Runs the cells that are missing, prints the table; returns the exit code."""
    work = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/study-oneshot")
    console = Console()
    model = assets.smollm2(console.say)
    dense = ["--stages", "[evaluate]"]
    cells = {f"dense, first {FIRST}": (dense, False)}
    for pattern, pattern_options in PATTERNS.items():
        if pattern == WHOLE[0]:
            cells["dense, whole"] = (dense, True)
        for method, method_options in METHODS.items():
            options = [*pattern_options, *method_options, "--evaluate.dense", "false"]
            cells[f"{method}, {pattern}"] = (options, pattern in WHOLE)
    for n, (cell, (options, whole)) in enumerate(cells.items(), 1):
        results = read_json(RESULTS) if RESULTS.exists() else {}
        if cell in results:
            continue
        console.say(f"\n[{n}/{len(cells)}] {cell}", style="bold")
        folder = work / cell.lower().replace(" %", "").replace(" ", "-").replace(",", "")
        code = run(model, folder, options, whole)
        if code:
            return code
        RESULTS.parent.mkdir(exist_ok=True)
        write_json(RESULTS, results | {cell: measured(folder)})
        console.say("\n".join(table()))
    console.say("\n".join(table()))
    return 0


def run(model: Path, folder: Path, options: list[str], whole: bool) -> int:
    """Runs the entry for one cell; the exit code."""
    command = [
        *(sys.executable, str(ROOT / "cap_llm/train.py"), "--output_dir", str(folder)),
        *("--model.path", str(model), "--calibration.sequences", "128"),
        *("--calibration.length", "512", "--evaluate.window", "2048", *options),
    ]
    if not whole:
        command += ["--evaluate.max_windows", str(FIRST)]
    return subprocess.run(command, check=False).returncode


def measured(folder: Path) -> dict:
    """What a finished run measured, with what a reader needs to compare it."""
    stage = "oneshot" if (folder / "oneshot").exists() else "dense"
    scores = read_json(folder / stage / "perplexity.json")
    (score,) = scores["corpora"].values()
    facts = read_json(folder / "environment.json")
    result = {k: score[k] for k in ("ppl_token", "window", "windows", "tokens", "bos", "origin")}
    result["computed_in"] = score["computed_in"]
    if stage == "oneshot":
        done = read_json(folder / stage / "done.json")
        result["calibration"] = done["calibration"]
        counts = read_json(folder / stage / "sparsity.json")
        result["sparsity"] = counts["pruned_matrices"]["sparsity"]
    versions = {k: facts["versions"][k] for k in ("torch", "transformers")}
    return result | {"versions": versions, "commit": facts["commit"], "model": assets.MODEL_NAME}


def table() -> list[str]:
    """The table of what is there, as Markdown lines."""
    results = read_json(RESULTS) if RESULTS.exists() else {}

    def figure(cell: str) -> str:
        return f"{results[cell]['ppl_token']:.2f}" if cell in results else "..."

    patterns = sorted(PATTERNS, key=lambda p: p not in WHOLE)
    scope = ["whole" if p in WHOLE else f"first {FIRST}" for p in patterns]
    columns = ["method", *(f"{p} ({s})" for p, s in zip(patterns, scope, strict=True))]
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(patterns)]
    lines.append("| " + " | ".join(["dense", *(figure(f"dense, {s}") for s in scope)]) + " |")
    for method in METHODS:
        row = [method, *(figure(f"{method}, {p}") for p in patterns)]
        lines.append("| " + " | ".join(row) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

"""The README's WikiText-2 table: one-shot methods at five patterns on SmolLM2-135M.

    CAP_LLM_DATA=... python eval/study_oneshot.py [OUTPUT_DIR]        (`make study` calls it)

Each cell is a run of the real entry: calibration on 128 x 512 tokens of C4, perplexity on
WikiText-2 with windows of 2048; the whole test set at 50 % and 2:4, its first 32 windows elsewhere
(the cells of the 32 are filled for all). Finished runs are not repeated, so the command can be
stopped and given again; the table of what is there is printed and written to `table.md` each time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]

from cap_llm.runtime.console import Console, quiet_libraries  # noqa: E402

quiet_libraries()

import assets  # noqa: E402

from cap_llm.runtime.files import atomic, read_json  # noqa: E402

METHODS = {
    "magnitude": ["--oneshot.method", "magnitude"],
    "Wanda": ["--oneshot.method", "wanda"],
    "SparseGPT": [],
    "SparseGPT + refit": ["--oneshot.refit", "true"],
}
PATTERNS = {
    "50 %": ["--oneshot.sparsity", "0.5"],
    "2:4": ["--oneshot.pattern", "2:4"],
    "60 %": ["--oneshot.sparsity", "0.6"],
    "70 %": ["--oneshot.sparsity", "0.7"],
    "4:8": ["--oneshot.pattern", "4:8"],
}
WHOLE = ("50 %", "2:4")  # scored on the whole test set
FIRST = 32  # windows elsewhere


def main() -> int:
    """Runs what is missing and prints the table; returns the exit code."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/study-oneshot")
    console = Console()
    if not (Path(os.environ.get("CAP_LLM_DATA", "")) / "wikitext2").is_dir():
        console.say("note: CAP_LLM_DATA holds no wikitext2; texts are asked of the hub")
    model = assets.smollm2(console.say)
    cells: dict[tuple[str, str], Path] = {}
    jobs = [(None, None, folder_of(out, "dense", ""), ["--stages", "[evaluate]"], True)]
    for pattern, pattern_options in PATTERNS.items():
        for method, method_options in METHODS.items():
            folder = folder_of(out, method, pattern)
            options = [*pattern_options, *method_options, "--evaluate.dense", "false"]
            jobs.append((method, pattern, folder, options, pattern in WHOLE))
            cells[method, pattern] = folder
    # the short scores of all cells first: a table that can be read early
    for whole in (False, True):
        for method, pattern, folder, options, wants_whole in jobs:
            if whole and not wants_whole:
                continue
            if not result(folder, "dense" if method is None else "oneshot", whole):
                console.say(f"\n{method or 'dense'} {pattern or ''}", style="bold")
                code = run(model, folder, options, whole)
                if code:
                    return code
            table(console, out, cells)
    return 0


def folder_of(out: Path, method: str, pattern: str) -> Path:
    """The run directory of a cell; whole and partial scores live in one run each."""
    name = f"{method} {pattern}".strip().lower().replace(" + ", "-")
    return out / name.replace(" %", "").replace(" ", "-").replace(":", "of")


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


def result(folder: Path, stage: str, whole: bool) -> float | None:
    """A cell's perplexity on the whole test set or on its first windows, if it is there."""
    path = folder / stage / "perplexity.json"
    if not path.exists():
        return None
    for entry in read_json(path)["corpora"].values():
        if (entry["windows"] > FIRST) == whole:
            return entry["ppl_token"]
    return None


def table(console: Console, out: Path, cells: dict[tuple[str, str], Path]) -> None:
    """Prints what is there and writes it as `table.md`."""
    columns = ["method"]
    columns += [p if p not in WHOLE else f"{p}, whole" for p in PATTERNS]
    columns += [f"{p}, first {FIRST}" for p in WHOLE]

    def cell(folder: Path, stage: str, whole: bool) -> str:
        value = result(folder, stage, whole)
        return f"{value:.2f}" if value else ""

    dense = folder_of(out, "dense", "")
    whole, first = cell(dense, "dense", True), cell(dense, "dense", False)
    rows = [["dense", *(whole if p in WHOLE else first for p in PATTERNS), *([first] * len(WHOLE))]]
    for method in METHODS:
        row = [cell(cells[method, p], "oneshot", p in WHOLE) for p in PATTERNS]
        row += [cell(cells[method, p], "oneshot", False) for p in WHOLE]
        rows.append([method, *row])
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    with atomic(out / "table.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    console.table("WikiText-2 ppl_token@2048", columns, rows)


if __name__ == "__main__":
    sys.exit(main())

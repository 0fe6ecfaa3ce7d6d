"""The demo: a real pretrained model, pruned, reconstructed and recovered, on two CPU cores.

    python eval/demo.py [OUTPUT_DIR] [--full]         (`make demo`, `make demo-full`)

Model and text come from Python packages. Finished rows are skipped and an interrupted row resumes,
so `make demo-full` after `make demo` only adds its own rows.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import assets
import torch
from matrix import DENSE, Matrix, Row, arguments

from cap_llm.report.runs import collect
from cap_llm.report.write import write_report
from cap_llm.runtime.console import Console, duration

REFIT, ALPS = {"oneshot.refit": True}, {"oneshot.method": "alps"}
PATTERN = {"oneshot.pattern": "2:4"}
RANKS = 1 if torch.cuda.is_available() else 2  # of a recovery, which is data-parallel


def after(base: Row, stage: str) -> Row:
    """A row that starts from another row's model."""
    ranks = RANKS if stage == "recover" else 1
    return Row(f"{base.name} + {NAMES[stage]}", {"model.path": base}, stage, ranks)


NAMES = {"reconstruct": "reconstruction", "recover": "recovery"}
SPARSEGPT, BEST = Row("SparseGPT 50%"), Row("ALPS 50%", ALPS)
REBUILT = after(BEST, "reconstruct")
ROWS = [
    *(Row(DENSE, stage=DENSE), SPARSEGPT, BEST, REBUILT, after(REBUILT, "recover")),
    Row("ALPS 2:4", ALPS | PATTERN),
]
MORE = [
    Row("magnitude 50%", {"oneshot.method": "magnitude"}),
    Row("Wanda 50%", {"oneshot.method": "wanda"}),
    after(SPARSEGPT, "recover"),
    Row("SparseGPT + refit 50%", REFIT),
    Row("SparseGPT + refit 2:4", REFIT | PATTERN),
]


def main() -> int:
    """Runs the rows and writes the report; returns the exit code."""
    parser = arguments(__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/demo"))
    parser.add_argument("--full", action="store_true", help="also run the other methods")
    args = parser.parse_args()
    console = Console()
    start = time.monotonic()
    calibration, held_out = assets.wikipedia(console.say)
    common = {"config": "demo", "calibration.corpus": calibration, "recover.corpus": calibration}
    matrix = Matrix(args.out, assets.smollm2(console.say), common)
    rows = ROWS + MORE * args.full
    scores = {"evaluate.corpora": [held_out]}
    code = matrix.run_all(rows, lambda row: matrix.run(row, scores), console)
    finished = [row for row in rows if (matrix.model_of(row) / "perplexity.json").exists()]
    if finished:
        results = [collect(matrix.folder(row))[-1] for row in finished]
        title = f"{assets.MODEL_NAME}, held-out Wikipedia articles"
        page = write_report(results, args.out, title, console)
        console.say(f"total time {duration(time.monotonic() - start)}; report: {page}")
    return code


if __name__ == "__main__":
    sys.exit(main())

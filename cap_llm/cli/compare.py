"""`cap-llm compare`: one report of several runs, without GPU or network."""

from __future__ import annotations

from pathlib import Path

from cap_llm.cli.options import add_out, make_parser, parse
from cap_llm.runtime.console import Console

_EXAMPLES = ("runs/a runs/b", "runs -o runs/comparison", 'runs/* --title "OPT-125m at 50%"')
_MORE = "Writes report.html (self-contained), report.md, report.csv and figures/ to DIR."


def main(argv: list[str], console: Console) -> None:
    """Writes the report.

    Raises:
        UserError: no run was found, or the report cannot be written.
    """
    parser = make_parser("compare", "Write one report of several runs.", _EXAMPLES, _MORE)
    runs = parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    runs.help = "the output_dir of a run, or a folder of them"
    add_out(parser, "DIR", "default: comparison", default=Path("comparison"))
    parser.add_argument("--title", default="Comparison of runs", help="default: %(default)s")
    args = parse(parser, argv)
    from cap_llm.report.runs import read_runs, run_directories
    from cap_llm.report.write import write_report

    models, problems = read_runs(run_directories(args.runs, console))
    page = write_report(models, problems, args.out, args.title, console)
    console.say(f"report: {page}")

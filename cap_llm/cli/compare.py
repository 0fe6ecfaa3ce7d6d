"""`cap-llm compare`: one report over any runs: tables, pictures, a page to pass on, CSV.

Needs no GPU and no network.
"""

from __future__ import annotations

from pathlib import Path

from cap_llm.cli.options import add_out, make_parser, parse
from cap_llm.runtime.console import Console

_EXAMPLES = ("runs/a runs/b", "runs -o runs/comparison", 'runs/* --title "OPT-125m at 50%"')
_MORE = "DIR gets report.html (one file, pictures inside), report.md, report.csv and figures/."


def main(argv: list[str], console: Console) -> None:
    """Writes the report.

    Raises:
        UserError: there is no run in what was named, or the report cannot be written.
    """
    parser = make_parser("compare", "Write one report over any runs.", _EXAMPLES, _MORE)
    runs = parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    runs.help = "the output_dir of a run, or a folder of them"
    add_out(parser, "DIR", "default: comparison", default=Path("comparison"))
    parser.add_argument("--title", default="Comparison of runs", help="default: %(default)s")
    args = parse(parser, argv)
    from cap_llm.report.runs import collect, run_directories
    from cap_llm.report.write import write_report

    results = [r for run in run_directories(args.runs, console) for r in collect(run)]
    page = write_report(results, args.out, args.title, console)
    console.say(f"report: {page}")

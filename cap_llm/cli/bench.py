"""`cap-llm bench`: memory and time that sparse formats save at inference on this machine."""

from __future__ import annotations

from pathlib import Path

from cap_llm.cli.options import add_out, make_parser, parse, writable_file
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError

_EXAMPLES = ("runs/opt/oneshot", "runs/opt/oneshot -o bench.json", "runs/opt/oneshot --repeats 50")
_MORE = """The benchmark stores the pruned matrices dense, bit-packed, as CSR, and as 2:4 if the
pattern and the GPU support it. It times single matrix products and a decoding step of the whole
model, for 1 and 64 sequences, with PyTorch's own kernels. Run nothing else meanwhile."""


def main(argv: list[str], console: Console) -> None:
    """Runs the benchmark and prints its tables.

    Raises:
        UserError: the model is not supported, or the results file is not writable.
    """
    what = "Measure the memory and time that sparse formats save for a pruned model."
    parser = make_parser("bench", what, _EXAMPLES, _MORE)
    parser.add_argument("model", metavar="MODEL", type=Path, help="a pruned model directory")
    repeats = parser.add_argument("--repeats", type=int, default=15)
    repeats.help = "timed repetitions per format; default: 15"
    add_out(parser, "FILE", "JSON file for all results")
    args = parse(parser, argv)
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}; it must be at least 1")
    out = args.out and writable_file(args.out)
    from cap_llm.evaluation.bench_sparse import bench
    from cap_llm.runtime.files import write_json

    result = bench(args.model, args.repeats, console)
    if out:
        write_json(out, result)

"""Seconds and memory of cap_llm's other solvers and block-wise stages relative to its SparseGPT.

    python eval/bench_solvers.py --model /data/smollm2-135m [--sequences 64] [--repeats 2]

Each row is a run of `cap-llm`; later stages start from the SparseGPT model of their round. Seconds
are those of `done.json`, without imports; ratios compare rows of one call. As in
`bench_oneshot.py`, the machine must be idle: the load of other processes is measured, the fastest
undisturbed round counts, and a disturbed row gets no ratio.

On two or more cores, reconstruction also runs on half the threads with one and with two ranks;
their ratio is the gain of the second rank. Corpora come from `CAP_LLM_DATA` or the hub.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import tempfile
from pathlib import Path

from bench_oneshot import GIB, IDLE, alone, say, truncate
from tables import arguments

from cap_llm.cli.matrix import Matrix, Row
from cap_llm.runtime.files import read_json, write_json

BASE = Row("SparseGPT")


def rebuilt(name: str, options: dict | None = None, ranks: int = 1) -> Row:
    """A reconstruction of the SparseGPT model."""
    return Row(name, {"model.path": BASE} | (options or {}), "reconstruct", ranks)


HALF = rebuilt("reconstruction, half the threads")
TWO = rebuilt("reconstruction, 2 ranks of half", ranks=2)
ROWS = [
    BASE,
    Row("SparseGPT + refit", {"oneshot.refit": True}),
    Row("ADMM-grad", {"oneshot.method": "admm_grad"}),
    Row("ALPS", {"oneshot.method": "alps"}),
    Row("SDS", {"model.path": BASE}, "sds"),
    rebuilt("reconstruction, 1 epoch", {"reconstruct.epochs": 1}),
    rebuilt("reconstruction"),
    rebuilt("reconstruction, 5 epochs", {"reconstruct.epochs": 5}),
    rebuilt("reconstruction, dense inputs", {"reconstruct.inputs": "dense"}),
    rebuilt("reconstruction, bfloat16", {"reconstruct.dtype": "bfloat16"}),
    HALF,
    TWO,
]
ROWS = {row.name: row for row in ROWS}


def main() -> None:
    """Measures all rows, prints the table, and writes `--out`."""
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    rounds = collections.defaultdict(list)
    calibration = ("corpus", "length", "sequences", "seed")
    common = {f"calibration.{name}": getattr(args, name) for name in calibration}
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        scratch = Path(scratch)
        model = truncate(args.model, args.blocks, scratch) if args.blocks else args.model
        for n in range(args.repeats):
            runs = Matrix(scratch / str(n), model.resolve(), common)
            for name, row in ROWS.items():
                threads = args.threads // 2 if row in (HALF, TWO) else args.threads
                if threads:
                    rounds[name].append(measure(row, runs, args.work / "solver.log", threads))
                if row is not BASE:
                    shutil.rmtree(runs.folder(row), ignore_errors=True)
            shutil.rmtree(runs.work)
    best = {name: min(r, key=lambda x: (disturbed(x), x["seconds"])) for name, r in rounds.items()}
    show(best, args)
    if args.out:
        facts = {"model": str(args.model), "tokens": [args.sequences, args.length]}
        write_json(args.out, facts | {"threads": args.threads, "rows": best, "all_runs": rounds})


def parse() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="model directory (SmolLM2-135M)")
    add("--sequences", type=int, default=64, help="calibration sequences")
    add("--length", type=int, default=512, help="tokens per sequence")
    add("--corpus", default="c4", help="calibration corpus, as in cap_llm")
    add("--seed", type=int, default=0, help="seed of the calibration draw")
    add("--repeats", type=int, default=1, help="rounds; the fastest undisturbed run counts")
    add("--blocks", type=int, help="use only the model's first blocks (to try the script)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads per row")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "cap_llm_bench", help="scratch")
    add("--out", type=Path, metavar="FILE.json", help="also write all numbers here")
    args = parser.parse_args()
    if args.out and not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out} is not in an existing directory")
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; it must be at least 1")
    return args


def measure(row: Row, runs: Matrix, log: Path, threads: int) -> dict:
    """One run of one row, on `threads` threads per rank."""
    others = alone(row.name, runs.command(row), log, threads)
    done, counts = (read_json(runs.model_of(row) / f"{f}.json") for f in ("done", "sparsity"))
    run = {"seconds": done["seconds"], "peak_bytes": done["peak_memory_bytes"], "others": others}
    say(f"{row.name}: {run['seconds']:.1f} s, other processes used {others:.2f} cores")
    if "blocks" in counts:
        run["epochs"] = [block["epoch"] for block in counts["blocks"]]
    return run


def disturbed(run: dict) -> bool:
    """Whether other processes used the machine during a run."""
    return run["others"] > IDLE


def show(rows: dict[str, dict], args: argparse.Namespace) -> None:
    """Prints the comparison as Markdown."""
    print(f"\n{args.sequences} x {args.length} tokens, {args.threads} threads\n")
    heads = ["", "seconds", "x SparseGPT", "with its start", "others, cores", "peak, GiB per rank"]
    print(f"| {' | '.join([*heads, 'best epoch, blocks'])} |")
    print("|---" * (len(heads) + 1) + "|")

    def ratio(seconds: float, name: str, other: str) -> str:
        calm = not (disturbed(rows[name]) or disturbed(rows[other]))
        return f"{seconds / rows[other]['seconds']:.2f}" if calm else "-"

    for name, row in rows.items():
        start = rows[BASE.name]["seconds"] if ROWS[name].needs else 0.0
        cells = [name, f"{row['seconds']:.1f}", ratio(row["seconds"], name, BASE.name)]
        cells += [ratio(row["seconds"] + start, name, BASE.name) if start else ""]
        cells += [f"{row['others']:.2f}" + (" (disturbed)" if disturbed(row) else "")]
        epochs = sorted(collections.Counter(row.get("epochs", [])).items())
        cells += [f"{row['peak_bytes'] / GIB:.2f}", ", ".join(f"{e} in {n}" for e, n in epochs)]
        print(f"| {' | '.join(cells)} |")
    if TWO.name in rows and (gain := ratio(rows[HALF.name]["seconds"], HALF.name, TWO.name)) != "-":
        print(f"\ntwo ranks are {gain} x as fast as one, each on {args.threads // 2} threads")
    if any(map(disturbed, rows.values())):
        print("\nDisturbed rows have no ratio. Run again on an idle machine.")


if __name__ == "__main__":
    main()

"""Seconds and memory of cap_llm's other solvers and block-wise stages beside its SparseGPT.

    python eval/bench_solvers.py --model /data/smollm2-135m [--sequences 64] [--repeats 2]

Each row is a run of the real entry; later stages start from the SparseGPT model of the first round.
Seconds are those of `done.json`, so without imports; ratios are of this one run. As in
`bench_oneshot.py` the machine must be idle: what others burn meanwhile is measured, of several
rounds the fastest undisturbed one counts, and no ratio is printed of a row that was disturbed.

Where there are two cores, reconstruction also runs on half the threads with one rank and with two:
what the second rank gives is the ratio of these. The corpora are found as `cap_llm` finds them.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]

from bench_oneshot import GIB, IDLE, alone, say, truncate  # noqa: E402
from shapes import BELOW  # noqa: E402

from cap_llm.runtime.files import read_json, write_json  # noqa: E402

BASE, HALF, TWO = "SparseGPT", "reconstruction, half the threads", "reconstruction, 2 ranks of half"
ROWS = {  # stage, options, ranks, parts into which the threads are cut
    BASE: ("oneshot", [], 1, 1),
    "SparseGPT + refit": ("oneshot", ["--oneshot.refit", "true"], 1, 1),
    "ADMM-grad": ("oneshot", ["--oneshot.method", "admm_grad"], 1, 1),
    "ALPS": ("oneshot", ["--oneshot.method", "alps"], 1, 1),
    "SDS": ("sds", [], 1, 1),
    "reconstruction, 1 epoch": ("reconstruct", ["--reconstruct.epochs", "1"], 1, 1),
    "reconstruction": ("reconstruct", [], 1, 1),
    "reconstruction, 5 epochs": ("reconstruct", ["--reconstruct.epochs", "5"], 1, 1),
    "reconstruction, dense inputs": ("reconstruct", ["--reconstruct.inputs", "dense"], 1, 1),
    "reconstruction, bfloat16": ("reconstruct", ["--reconstruct.dtype", "bfloat16"], 1, 1),
    HALF: ("reconstruct", [], 1, 2),
    TWO: ("reconstruct", [], 2, 2),
}


def main() -> None:
    """Measures all rows, prints the table, and writes `--out`."""
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    runs = collections.defaultdict(list)
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        scratch = Path(scratch)
        model = truncate(args.model, args.blocks, scratch) if args.blocks else args.model
        base = scratch / f"{BASE} 0"
        for n in range(args.repeats):
            for name in ROWS:
                if ROWS[name][3] > args.threads:
                    continue
                out = scratch / f"{name} {n}"
                run = measure(name, model, base / "oneshot", out, args)
                runs[name].append(run)
                say(f"{name}: {run['seconds']:.1f} s, others used {run['others']:.2f} cores")
                if out != base:
                    shutil.rmtree(out)
    best = {
        name: min(r, key=lambda run: (disturbed(run), run["seconds"])) for name, r in runs.items()
    }
    show(best, args)
    if args.out:
        facts = {"model": str(args.model), "tokens": [args.sequences, args.length]}
        write_json(args.out, facts | {"threads": args.threads, "rows": best, "all_runs": runs})


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="model directory (SmolLM2-135M)")
    add("--sequences", type=int, default=64, help="calibration sequences")
    add("--length", type=int, default=512, help="tokens a sequence")
    add("--corpus", default="c4", help="calibration corpus, as in cap_llm")
    add("--seed", type=int, default=0, help="of the calibration draw")
    add("--repeats", type=int, default=1, help="rounds; the fastest undisturbed run counts")
    add("--blocks", type=int, help="keep only the model's first blocks (to try the script)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every row")
    add("--work", type=Path, default=BELOW, help="scratch")
    add("--out", type=Path, metavar="FILE.json", help="also write all figures here")
    args = parser.parse_args()
    if args.out and not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out} lies in no existing directory")
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; it must be at least 1")
    return args


def measure(name: str, model: Path, base: Path, out: Path, args: argparse.Namespace) -> dict:
    """One run of one row; `base` is the SparseGPT model that later stages start from."""
    stage, options, ranks, parts = ROWS[name]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    command = [sys.executable, *(launcher if ranks > 1 else []), ROOT / "cap_llm" / "train.py"]
    command += ["--output_dir", out, "--stages", f"[{stage}]", *options]
    if stage == "oneshot":
        command += ["--model.path", model]
    else:
        command += ["--model.path", base, "--model.dense", model]
    command += ["--calibration.corpus", args.corpus, "--calibration.length", args.length]
    command += ["--calibration.sequences", args.sequences, "--calibration.seed", args.seed]
    others = alone(name, command, args.work / "solver.log", args.threads // parts)
    done, counts = (read_json(out / stage / f"{file}.json") for file in ("done", "sparsity"))
    run = {"seconds": done["seconds"], "peak_bytes": done["peak_memory_bytes"], "others": others}
    if "blocks" in counts:
        run["epochs"] = [block["epoch"] for block in counts["blocks"]]
    return run


def disturbed(run: dict) -> bool:
    """Whether others used the machine during a run."""
    return run["others"] > IDLE


def show(rows: dict[str, dict], args: argparse.Namespace) -> None:
    """Prints the comparison as Markdown."""
    print(f"\n{args.sequences} x {args.length} tokens, {args.threads} threads\n")
    heads = ["", "seconds", "x SparseGPT", "with its start", "others, cores", "peak, GiB a rank"]
    print(f"| {' | '.join([*heads, 'epochs that paid, blocks'])} |")
    print("|---" * (len(heads) + 1) + "|")

    def ratio(seconds: float, name: str, other: str) -> str:
        calm = not (disturbed(rows[name]) or disturbed(rows[other]))
        return f"{seconds / rows[other]['seconds']:.2f}" if calm else "-"

    for name, row in rows.items():
        start = rows[BASE]["seconds"] if ROWS[name][0] != "oneshot" else 0.0
        cells = [name, f"{row['seconds']:.1f}", ratio(row["seconds"], name, BASE)]
        cells += [ratio(row["seconds"] + start, name, BASE) if start else ""]
        cells += [f"{row['others']:.2f}" + (" (disturbed)" if disturbed(row) else "")]
        epochs = sorted(collections.Counter(row.get("epochs", [])).items())
        cells += [f"{row['peak_bytes'] / GIB:.2f}", ", ".join(f"{e} in {n}" for e, n in epochs)]
        print(f"| {' | '.join(cells)} |")
    if TWO in rows and (gain := ratio(rows[HALF]["seconds"], HALF, TWO)) != "-":
        print(f"\ntwo ranks are {gain} x as fast as one, each on {args.threads // 2} threads")
    if any(map(disturbed, rows.values())):
        print("\nrows disturbed by other processes have no ratio: run again on an idle machine")


if __name__ == "__main__":
    main()

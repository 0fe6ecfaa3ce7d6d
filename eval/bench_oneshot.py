"""Seconds, memory and quality of SparseGPT at 50%: cap_llm, the published algorithm, a peer.

    python eval/bench_oneshot.py --model /data/smollm2-135m --make-peer /tmp/peer --out bench.json
    python eval/bench_oneshot.py --model /data/smollm2-135m --peer-python /tmp/peer/v/bin/python
    python eval/bench_oneshot.py --random-shape opt-1.3b

Every contender prunes with the same calibration ids, in its own process, on the same number of
threads, and one function scores the results on the same windows. The time runs from opening the
model directory to the last pruned block, without imports. cap_llm runs through its command, and its
seconds, those of `done.json`, also include writing and verifying the result; the others' do not.
The floor is the arithmetic that every implementation of the algorithm needs, at the highest matrix
rate that this machine reaches. For CPUs under Linux.

The machine must be idle: threads that wait for each other beside other work can take ten times as
long, and contenders differ in this. So the load of other processes during a run is measured, the
fastest undisturbed round counts, and a disturbed run gets no ratio.

Corpora come from `CAP_LLM_DATA` or the hub. `bench_solvers.py` times cap_llm's other solvers and
stages.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from shapes import BELOW, SHAPES, TEXT, random_model
from tables import arguments

from cap_llm.blockwise.perplexity import streamed_nll
from cap_llm.cli.matrix import Matrix, Row
from cap_llm.models.blocks import BlockModel
from cap_llm.models.checkpoint import Checkpoint
from cap_llm.models.directory import ModelDirectory
from cap_llm.runtime.files import read_json, write_json
from cap_llm.runtime.memory import Memory
from cap_llm.runtime.world import World
from cap_llm.text.corpora import evaluation_text, read_corpus
from cap_llm.text.tokenizers import load_tokenizer
from cap_llm.text.windows import calibration_windows, evaluation_windows

PEERS = Path(__file__).resolve().parent / "peers.py"
PEER = ("torch==2.13.0", "llmcompressor==0.14.0.1")
TITLES = {
    "ours": "cap_llm",
    "plain": "published algorithm, plain",
    "llmcompressor": f"llmcompressor {PEER[1].rpartition('=')[2]}",
}
OURS = Row("ours", {"oneshot.sparsity": 0.5, "oneshot.damping": 0.01})
GIB = 2**30
IDLE = 0.1  # cores that other processes may use during an undisturbed run


def main() -> None:
    """Runs the measurements, prints them, and writes `--out`."""
    args = parse()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.make_peer:
        args.peer_python = make_peer(args.make_peer)
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        report = (measure_shape if args.random_shape else compare)(args, Path(scratch))
    if args.out:
        write_json(args.out, report)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    add = parser.add_argument
    add("--model", type=Path, help="model directory of the LLaMA family (SmolLM2-135M)")
    add("--sequences", type=int, help="calibration sequences (128; 16 with --random-shape)")
    add("--length", type=int, default=512, help="tokens per sequence")
    add("--corpus", default="c4", help="calibration corpus, as in cap_llm")
    add("--seed", type=int, default=0, help="seed of the calibration draw")
    add("--window", type=int, default=1024, help="tokens per scored window of WikiText-2")
    add("--windows", type=int, default=16, help="scored windows")
    add("--contenders", nargs="+", choices=TITLES, default=list(TITLES), help="which to run")
    add("--repeats", type=int, default=1, help="rounds; the fastest undisturbed run counts")
    add("--blocks", type=int, help="use only the model's first blocks (to try the script)")
    add("--activation-gib", type=float, help="cap_llm's memory for activations (0.25 with shapes)")
    add("--threads", type=int, default=os.cpu_count(), help="threads per contender")
    add("--peer-python", type=Path, help="python of an environment that has llmcompressor")
    add("--make-peer", type=Path, metavar="DIR", help="create that environment in DIR")
    add("--random-shape", choices=SHAPES, help="only cap_llm, on random weights of this shape")
    add("--work", type=Path, default=BELOW, help="scratch folder")
    add("--out", type=Path, metavar="FILE.json", help="also write all numbers here")
    args = parser.parse_args()
    if not (args.model or args.random_shape):
        parser.error("give --model DIRECTORY or --random-shape NAME")
    args.sequences = args.sequences or (16 if args.random_shape else 128)
    return args


# The two measurements


def compare(args: argparse.Namespace, scratch: Path) -> dict:
    """Runs all contenders on `--model` and compares them with the floor."""
    model = truncate(args.model, args.blocks, scratch) if args.blocks else args.model
    ids, windows = texts(args)
    save_file({"ids": ids}, scratch / "ids.safetensors")
    config = read_json(model / "config.json")
    rates = [matrix_rates(config)]
    runs: dict[str, list[dict]] = collections.defaultdict(list)
    for _ in range(args.repeats):
        for name in args.contenders:
            if name == "llmcompressor" and not args.peer_python:
                continue
            if name == "ours":
                run = prune_ours(model, args.corpus, args, scratch)
            else:
                run = prune_other(name, model, args, scratch)
            runs[name].append(run)
            seconds = f"{TITLES[name]}: {run['seconds']:.1f} s"
            say(f"{seconds}, other processes used {run['others']:.2f} cores")
    rates.append(matrix_rates(config))
    best = {name: min(r, key=_rank) for name, r in runs.items()}
    for name, run in best.items():
        folder = scratch / "ours" / "oneshot" if name == "ours" else scratch / name
        run["zeros"] = share_of_zeros(folder)
        run["perplexity"] = score(folder, windows, scratch)
    rate = max(max(r.values()) for r in rates)
    report = {
        "model": str(args.model),
        "blocks": config["num_hidden_layers"],
        "tokens": list(ids.shape),
        "scored": list(windows.shape),
        "threads": args.threads,
        "dense_perplexity": score(model, windows, scratch),
        "matrix_rates": rates,
        "contenders": best,
        "all_runs": runs,
        "floor": floor(ids.shape, config, rate),
    }
    show(report)
    return report


def measure_shape(args: argparse.Namespace, scratch: Path) -> dict:
    """Memory and seconds of cap_llm on a published shape with random weights."""
    model = random_model(args.random_shape, args.blocks, args.work)
    shape = read_json(model / "config.json")
    args.activation_gib = 0.25 if args.activation_gib is None else args.activation_gib
    run = prune_ours(model, model / TEXT, args, scratch)
    size = [args.sequences, args.length]
    print(
        f"\n{args.random_shape}, {shape['num_hidden_layers']} blocks, random weights, "
        f"{size[0]} x {size[1]} tokens, {args.activation_gib:g} GiB for activations: "
        f"{run['seconds']:.1f} s, peak {run['peak_bytes'] / GIB:.2f} GiB"
    )
    return {"shape": args.random_shape, "config": shape, "tokens": size, "ours": run}


def prune_ours(model: Path, corpus: str | Path, args: argparse.Namespace, scratch: Path) -> dict:
    """One run of cap_llm's command; writes the model to `scratch`/ours/oneshot."""
    common = {f"calibration.{k}": getattr(args, k) for k in ("sequences", "length", "seed")}
    common |= {"calibration.corpus": corpus, "runtime.activation_gib": args.activation_gib}
    common |= {"runtime.device": "cpu"}
    runs = Matrix(scratch, model.resolve(), common)
    shutil.rmtree(runs.folder(OURS), ignore_errors=True)
    others = alone(TITLES["ours"], runs.command(OURS), args.work / "ours.log", args.threads)
    done = read_json(runs.model_of(OURS) / "done.json")
    return {
        "seconds": done["seconds"],
        "peak_bytes": done["peak_memory_bytes"],
        "others": others,
    }


def prune_other(name: str, model: Path, args: argparse.Namespace, scratch: Path) -> dict:
    """One run of another contender; writes the model to `scratch`/name."""
    out, result, job = scratch / name, scratch / f"{name}.json", scratch / "job.json"
    shutil.rmtree(out, ignore_errors=True)
    paths = {"model": model, "ids": scratch / "ids.safetensors", "out": out, "result": result}
    write_json(job, {key: str(path) for key, path in paths.items()})
    python = args.peer_python if name == "llmcompressor" else sys.executable
    command, log = [python, PEERS, name, job], args.work / f"{name}.log"
    others = alone(TITLES[name], command, log, args.threads)
    return read_json(result) | {"others": others}


def alone(title: str, command: list, log: Path, threads: int) -> float:
    """Runs a command; returns how many cores unrelated processes used meanwhile."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    before = busy_seconds()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.run(
            map(str, command), env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if process.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        sys.exit(f"{title} exited with code {process.returncode} (log: {log}):\n{tail}")
    after = busy_seconds()
    return round(max(0.0, (after[0] - before[0]) / (after[1] - before[1])), 3)


def busy_seconds() -> tuple[float, float]:
    """CPU seconds of all processes but this one and its children, and the time.

    Steal time (taken by the host of a virtual machine) counts as well.
    """
    with open("/proc/stat", encoding="utf-8") as lines:
        user, nice, system, _, _, irq, soft_irq, steal = map(int, next(lines).split()[1:9])
    ticks = user + nice + system + irq + soft_irq + steal
    usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own = sum(u.ru_utime + u.ru_stime for u in usages)
    return ticks / os.sysconf("SC_CLK_TCK") - own, time.perf_counter()


def _rank(run: dict) -> tuple[bool, float]:
    """Undisturbed runs first, then the fastest."""
    return run["others"] > IDLE, run["seconds"]


def texts(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration ids [N, T], drawn as by `cap-llm`, and the windows to score."""
    tokenizer = load_tokenizer(str(args.model))
    corpus = read_corpus(args.corpus, "train")
    ids = calibration_windows(tokenizer, corpus, args.sequences, args.length, args.seed)
    text, origin = evaluation_text("wikitext2")
    return ids, evaluation_windows(tokenizer, text, origin, args.window, args.windows)


def score(folder: Path, windows: torch.Tensor, scratch: Path) -> float:
    """Perplexity of a model directory on ids [N, T] in fp32."""
    world = World("cpu")
    model = BlockModel.open(ModelDirectory(folder), world.device)
    nll = streamed_nll(model, windows, world, Memory.plan(world.device), scratch)
    return math.exp(nll / (windows.shape[0] * (windows.shape[1] - 1)))


def share_of_zeros(folder: Path) -> float:
    """The share of zeros in the blocks' linears, to check that contenders prune equally."""
    checkpoint = Checkpoint(folder)
    names = [n for n in checkpoint.names() if n.endswith("_proj.weight")]
    zeros = sum(int((checkpoint.read([n])[n] == 0).sum()) for n in names)
    return zeros / sum(torch.Size(checkpoint.shape(n)).numel() for n in names)


# The floor


def matrix_rates(config: dict) -> dict[str, float]:
    """The highest rate of fp32 products per shape of the model, in operations per second."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {(2048, hidden, hidden), (2048, hidden, inner), (2048, inner, hidden)}
    shapes |= {(c, 2048, c) for c in (hidden, inner)}  # the Hessian's product
    rates = {}
    for m, k, n in sorted(shapes):
        a, b = torch.randn(m, k), torch.randn(n, k).T
        best, until = math.inf, time.perf_counter() + 0.6
        while time.perf_counter() < until:
            start = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - start)
        rates[f"{m}x{k} @ {k}x{n}"] = 2 * m * k * n / best
    return rates


def floor(tokens: tuple[int, int], config: dict, rate: float) -> dict:
    """The operations that SparseGPT needs, and their seconds at `rate`.

    Args:
        tokens: sequences and their length.
        config: of a model of the LLaMA family.
        rate: operations per second.
    """
    n_sequences, length = tokens
    n, heads = n_sequences * length, config["num_attention_heads"]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // heads
    width, shared = heads * head, config["num_key_value_heads"] * head
    # per distinct input of a block: its columns, and the rows of all matrices that read it
    groups = [(hidden, width + 2 * shared), (width, hidden), (hidden, 2 * inner), (inner, hidden)]
    flops = {"attention": n_sequences * 2 * length**2 * width}  # two products, half of each
    flops["linears"] = sum(2 * n * columns * rows for columns, rows in groups)
    flops["hessians"] = sum(n * columns**2 for columns, _ in groups)  # half, by symmetry
    flops["factors"] = sum(2 / 3 * columns**3 for columns, _ in groups)
    flops["updates"] = sum(rows * columns**2 for columns, rows in groups)
    flops = {name: config["num_hidden_layers"] * value for name, value in flops.items()}
    total = sum(flops.values())
    return {"flops": flops, "total_flops": total, "rate": rate, "seconds": total / rate}


def make_peer(folder: Path) -> Path:
    """The python of an environment with the peer, which is created if missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for package in PEER:  # torch first, so that its pinned build is kept
            subprocess.run([python, "-m", "pip", "install", "-q", package], check=True)
    return python


# Models


def truncate(model: Path, n_blocks: int, scratch: Path) -> Path:
    """A copy of a LLaMA directory with only its first blocks."""
    folder = scratch / "truncated"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    checkpoint = Checkpoint(model)
    keep = [n for n in checkpoint.names() if not _block_number(n) >= n_blocks]
    save_file(checkpoint.read(keep), folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json(model / "config.json")
    write_json(folder / "config.json", config | {"num_hidden_layers": n_blocks})
    return folder


def _block_number(name: str) -> int:
    parts = name.split(".layers.")
    return int(parts[1].split(".")[0]) if len(parts) > 1 else -1


# The report


def show(report: dict) -> None:
    """Prints the comparison as Markdown."""
    n, length = report["tokens"]
    scored = "{} x {}".format(*report["scored"])
    print(f"\nSparseGPT 50%, {report['blocks']} blocks, {n} x {length} tokens,", end=" ")
    print(f"{report['threads']} threads; the load of others in cores, memory in GiB\n")
    print(f"| | seconds | others | peak | zeros % | ppl {scored} |\n|---|---|---|---|---|---|")
    print(f"| dense | | | | | {report['dense_perplexity']:.4f} |")
    for name, title in TITLES.items():
        run = report["contenders"].get(name)
        if not run:
            print(f"| {title} | not measured | | | | |")
            continue
        others = f"{run['others']:.2f}" + (" (disturbed)" if run["others"] > IDLE else "")
        cells = [title, f"{run['seconds']:.1f}", others, f"{run['peak_bytes'] / GIB:.2f}"]
        cells += [f"{100 * run['zeros']:.2f}", f"{run['perplexity']:.4f}"]
        print(f"| {' | '.join(cells)} |")
    bound = report["floor"]
    parts = ", ".join(f"{k} {v / bound['rate']:.1f}" for k, v in bound["flops"].items())
    print(
        f"\nfloor: {bound['total_flops'] / 1e12:.3f} Tflop at {bound['rate'] / 1e9:.1f} Gflop/s = "
        f"{bound['seconds']:.1f} s ({parts})"
    )
    calm = {n: r["seconds"] for n, r in report["contenders"].items() if r["others"] <= IDLE}
    if "ours" not in calm:
        print("cap_llm has no undisturbed run, so no ratios. Run again on an idle machine.")
        return
    print(f"cap_llm: floor / time = {100 * bound['seconds'] / calm['ours']:.0f}%")
    for name in calm.keys() - {"ours"}:
        print(f"{TITLES[name]}: {calm[name] / calm['ours']:.2f} x the time of cap_llm")


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""Seconds, memory and quality of SparseGPT at 50 %: cap_llm, the published algorithm, a peer.

    python eval/bench_oneshot.py --model /data/smollm2-135m --make-peer ~/peer --out bench.json
    python eval/bench_oneshot.py --model /data/smollm2-135m --peer-python ~/peer/v/bin/python
    python eval/bench_oneshot.py --random-shape opt-1.3b

The calibration ids are drawn once and handed to every contender; each runs in a process of its own,
on the same number of threads; the results are scored by one function on the same windows. Timed is
everything from opening the model directory to the last pruned block; imports and the writing of the
result are not. Beside the contenders stands the floor: the arithmetic that no implementation of the
algorithm avoids, at the best matrix rate this machine reaches. On CPUs, under Linux.

The machine must be idle: two threads that wait for each other beside a stranger take ten times as
long, and not every contender equally. So what other processes burn during a run is measured, the
least disturbed rounds count, and no ratio is printed of a run that was disturbed.

The corpora are found as `cap_llm` finds them (`CAP_LLM_DATA` or the hub). `bench_solvers.py`
times cap_llm's other solvers and stages.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the project, where it is not installed

from shapes import BELOW, SHAPES, random_model  # noqa: E402

PEER = ("torch==2.13.0", "llmcompressor==0.14.0.1")
TITLES = {
    "ours": "cap_llm",
    "plain": "published algorithm, plain",
    "peer": f"llmcompressor {PEER[1].rpartition('=')[2]}",
}
PHASES = ("load", "forward", "hessian", "solve", "propagate")
SPARSITY, DAMPING, BLOCK_SIZE = 0.5, 0.01, 128
GIB = 2**30
IDLE = 0.1  # cores that others may use during a run that counts


def main() -> None:
    """Measures what the command line asks for, prints it, and writes `--out`."""
    args = parse()
    if args.child:
        job = json.loads(args.child.read_text(encoding="utf-8"))
        run_ours(job)
        return
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.make_peer:
        args.peer_python = make_peer(args.make_peer)
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        if args.random_shape:
            report = measure_shape(args, Path(scratch))
        else:
            report = compare(args, Path(scratch))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, help="model directory of the LLaMA family (SmolLM2-135M)")
    add("--sequences", type=int, help="calibration sequences (128; 16 with --random-shape)")
    add("--length", type=int, default=512, help="tokens a sequence")
    add("--corpus", default="c4", help="calibration corpus, as in cap_llm")
    add("--seed", type=int, default=0, help="of the calibration draw")
    add("--window", type=int, default=1024, help="tokens a scored window of WikiText-2")
    add("--windows", type=int, default=16, help="scored windows")
    add("--contenders", nargs="+", choices=TITLES, default=list(TITLES), help="who runs")
    add("--repeats", type=int, default=1, help="rounds; the fastest undisturbed run counts")
    add("--blocks", type=int, help="keep only the model's first blocks (to try the script)")
    add("--activation-gib", type=float, help="cap_llm's memory for activations (0.25 with shapes)")
    add("--threads", type=int, default=os.cpu_count(), help="of every contender")
    add("--peer-python", type=Path, help="python of an environment that has llmcompressor")
    add("--make-peer", type=Path, metavar="DIR", help="make that environment in DIR, if not there")
    add("--random-shape", choices=SHAPES, help="only cap_llm, on random weights of this shape")
    add("--work", type=Path, default=BELOW, help="scratch")
    add("--out", type=Path, metavar="FILE.json", help="also write all figures here")
    add("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.model or args.random_shape or args.child):
        parser.error("give --model DIRECTORY or --random-shape NAME")
    args.sequences = args.sequences or (16 if args.random_shape else 128)
    return args


# The two measurements


def compare(args: argparse.Namespace, scratch: Path) -> dict:
    """Runs all contenders on `--model` and sets them beside the floor."""
    from safetensors.torch import save_file

    model = truncate(args.model, args.blocks, scratch) if args.blocks else args.model
    ids, windows = texts(args)
    save_file({"ids": ids}, scratch / "ids.safetensors")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    rates = [matrix_rates(config)]
    runs: dict[str, list[dict]] = collections.defaultdict(list)
    for _ in range(args.repeats):
        for name in args.contenders:
            if name == "peer" and not args.peer_python:
                continue
            runs[name].append(measure(name, model, args, scratch))
            last = runs[name][-1]
            say(
                f"{TITLES[name]}: {last['seconds']['total']:.1f} s, others used "
                f"{last['others']:.2f} cores"
            )
    rates.append(matrix_rates(config))
    best = {name: min(r, key=_rank) for name, r in runs.items()}
    for name, run in best.items():
        run["zeros"] = share_of_zeros(scratch / name)
        run["perplexity"] = score(scratch / name, windows, scratch)
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
        "all_runs": {
            n: [{"total": run["seconds"]["total"], "others": run["others"]} for run in r]
            for n, r in runs.items()
        },
    }
    if "ours" in best:
        report["floor"] = floor(best["ours"].pop("groups"), ids.shape, config, rate)
    show(report)
    return report


def measure_shape(args: argparse.Namespace, scratch: Path) -> dict:
    """Memory and seconds of cap_llm on random weights of a published shape."""
    from safetensors.torch import save_file

    model = random_model(args.random_shape, args.blocks, args.work)
    shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
    draw = torch.Generator().manual_seed(args.seed)
    size = (args.sequences, args.length)
    ids = torch.randint(4, shape["vocab_size"], size, generator=draw)
    save_file({"ids": ids}, scratch / "ids.safetensors")
    args.activation_gib = 0.25 if args.activation_gib is None else args.activation_gib
    result = measure("ours", model, args, scratch)
    result.pop("groups")
    above = (result["peak_bytes"] - result["imports_bytes"]) / GIB
    print(
        f"\n{args.random_shape}, {shape['num_hidden_layers']} blocks, random weights, "
        f"{args.sequences} x {args.length} tokens, {args.activation_gib:g} GiB for activations: "
        f"{result['seconds']['total']:.1f} s, {above:.2f} GiB above the imports "
        f"({result['peak_bytes'] / GIB:.2f} GiB at most)"
    )
    return {"shape": args.random_shape, "config": shape, "tokens": list(size), "ours": result}


def measure(name: str, model: Path, args: argparse.Namespace, scratch: Path) -> dict:
    """One run of one contender in a process of its own; its result lies in `scratch`/name."""
    out, result = scratch / name, scratch / f"{name}.json"
    shutil.rmtree(out, ignore_errors=True)
    gib = args.activation_gib
    job = scratch / f"{name}-job.json"
    job.write_text(
        json.dumps(
            {
                "contender": name,
                "model": str(model),
                "ids": str(scratch / "ids.safetensors"),
                "out": str(out),
                "result": str(result),
                "sparsity": SPARSITY,
                "activation_gib": gib,
            }
        ),
        encoding="utf-8",
    )
    if name == "peer":
        command = [args.peer_python, HERE / "peer_llmcompressor.py", job]
    elif name == "plain":
        command = [sys.executable, HERE / "plain_sparsegpt.py", job]
    else:
        command = [sys.executable, Path(__file__).resolve(), "--child", job]
    others = alone(TITLES[name], command, args.work / f"{name}.log", args.threads)
    return json.loads(result.read_text(encoding="utf-8")) | {"others": others}


def alone(title: str, command: list, log: Path, threads: int) -> float:
    """Runs a command; returns how many cores others than this process's family used meanwhile."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    before = busy_seconds()
    with open(log, "w", encoding="utf-8") as file:
        ended = subprocess.run(
            map(str, command), env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if ended.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        sys.exit(f"{title} ended with code {ended.returncode} (all of it: {log}):\n{tail}")
    after = busy_seconds()
    return round(max(0.0, (after[0] - before[0]) / (after[1] - before[1])), 3)


def busy_seconds() -> tuple[float, float]:
    """Processor seconds spent on this machine by others than this process's family, and the time.

    Time that the machine's host took away counts as spent by others.
    """
    with open("/proc/stat", encoding="utf-8") as lines:
        user, nice, system, _, _, irq, soft_irq, steal = map(int, next(lines).split()[1:9])
    ticks = user + nice + system + irq + soft_irq + steal
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own = sum(u.ru_utime + u.ru_stime for u in used)
    return ticks / os.sysconf("SC_CLK_TCK") - own, time.perf_counter()


def _rank(run: dict) -> tuple[bool, float]:
    """Undisturbed runs first, then the fastest."""
    return run["others"] > IDLE, run["seconds"]["total"]


def texts(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration ids [N, T] and the windows to score."""
    from cap_llm.text.corpora import evaluation_text, read_corpus
    from cap_llm.text.tokenizers import load_tokenizer
    from cap_llm.text.windows import calibration_windows, evaluation_windows

    tokenizer = load_tokenizer(str(args.model))
    corpus = read_corpus(args.corpus, "train")
    ids = calibration_windows(tokenizer, corpus, args.sequences, args.length, args.seed)
    text, origin = evaluation_text("wikitext2")
    return ids, evaluation_windows(tokenizer, text, origin, args.window, args.windows)


def score(folder: Path, windows: torch.Tensor, scratch: Path) -> float:
    """Perplexity in fp32 of a model directory on ids [N, T]; the same code for every contender."""
    from cap_llm.blockwise.cache import Memory
    from cap_llm.blockwise.perplexity import streamed_nll
    from cap_llm.models.blocks import BlockModel
    from cap_llm.runtime.world import World

    world = World("cpu")
    model = BlockModel.open(folder, world.device)
    nll = streamed_nll(model, windows, world, Memory.plan(world.device), scratch)
    return math.exp(nll / (windows.shape[0] * (windows.shape[1] - 1)))


def share_of_zeros(folder: Path) -> float:
    """Of the weights of the blocks' linears, to see that all contenders removed as many."""
    from cap_llm.models.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    names = [n for n in checkpoint.names() if n.endswith("_proj.weight")]
    zeros = sum(int((checkpoint.read([n])[n] == 0).sum()) for n in names)
    return zeros / sum(torch.Size(checkpoint.shape(n)).numel() for n in names)


# The floor


def matrix_rates(config: dict) -> dict[str, float]:
    """Operations a second of fp32 products of the model's own shapes, the best of several."""
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


def floor(groups: list, tokens: tuple[int, int], config: dict, rate: float) -> dict:
    """The arithmetic that must be done, and the seconds it takes at `rate` operations a second.

    Args:
        groups: for each block, for each distinct input, its columns and the rows of its matrices.
        tokens: sequences and their length.
        config: the model's.
        rate: operations a second.
    """
    n_sequences, length = tokens
    n, heads = n_sequences * length, config["num_attention_heads"]
    width = heads * (config.get("head_dim") or config["hidden_size"] // heads)
    flops = dict.fromkeys(("linears", "attention", "hessians", "factors", "updates"), 0.0)
    for block in groups:
        flops["attention"] += n_sequences * 2 * length**2 * width  # two products, half of each
        for columns, rows in block:
            flops["linears"] += 2 * n * columns * sum(rows)
            flops["hessians"] += n * columns**2  # symmetric: half of the product
            flops["factors"] += 2 / 3 * columns**3
            flops["updates"] += sum(rows) * columns**2
    total = sum(flops.values())
    return {"flops": flops, "total_flops": total, "rate": rate, "seconds": total / rate}


# The contenders


class Clock:
    """Adds up seconds by name."""

    def __init__(self):
        self.seconds: dict[str, float] = collections.Counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    @contextlib.contextmanager
    def processor(self) -> Iterator[None]:
        """Adds the processor's seconds, of all threads: far from threads x wall, others ran too."""
        start = time.process_time()
        yield
        self.seconds["processor"] += time.process_time() - start


def run_ours(job: dict) -> None:
    """cap_llm's own walk and solver, with a clock around their parts."""
    from cap_llm.blockwise.cache import Memory
    from cap_llm.blockwise.oneshot import STAGE  # noqa: F401 (what the stage imports, counts)
    from cap_llm.blockwise.prune import matrix, prune_block, uniform
    from cap_llm.blockwise.walk import Walk
    from cap_llm.config import OneshotConfig
    from cap_llm.models.blocks import BlockModel
    from cap_llm.models.checkpoint import ShardWriter
    from cap_llm.runtime.peaks import peak_memory
    from cap_llm.runtime.world import World

    clock, groups = Clock(), []

    class TimedWalk(Walk):
        def visit(self, i, block, change):
            linears, seen = self.model.linears(i), []

            def timed_change(group, inputs):
                def timed_inputs():
                    for x in inputs:
                        with clock("hessian"):
                            yield x
                    ended.append(time.perf_counter())

                ended = []
                rows = [matrix(linears[name]).shape[0] for name in group.names]
                seen.append((group.columns, rows))
                change(group, timed_inputs())
                clock.seconds["solve"] += time.perf_counter() - ended[0]

            with clock("visit"):
                super().visit(i, block, timed_change)
            groups.append(seen)

    imports = peak_memory()
    ids = read_ids(job)
    settings, world = OneshotConfig(sparsity=job["sparsity"], damping=DAMPING), World("cpu")
    source, out = Path(job["model"]), Path(job["out"])
    out.mkdir(parents=True)
    matrices = 0.0
    with clock("all"), clock.processor(), tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        with clock("load"):
            model = BlockModel.open(source, world.device)
            plan = uniform(model, settings)
            writer = ShardWriter(out, len(model))
            memory = Memory.plan(world.device, job["activation_gib"])
            walk = TimedWalk(model, ids, memory, Path(scratch))
        for i in range(len(model)):
            with contextlib.ExitStack() as stack:
                with clock("load"):
                    block = stack.enter_context(model.block(i))
                result = prune_block(model, i, block, walk, settings, plan, world)
                matrices += sum(row.seconds for row in result.rows)
                with clock("save"):
                    tensors = model.checkpoint.read(model.block_keys(i))
                    for name, linear in model.linears(i).items():
                        key = model.key(model.weight_name(i, name))
                        tensors[key] = linear.weight.data.to(tensors[key].dtype)
                    writer.write(i, tensors)
                    del tensors
    inside = {key for i in range(len(model)) for key in model.block_keys(i)}
    outside = [key for key in model.checkpoint.names() if key not in inside]
    writer.write(None, model.checkpoint.read(outside))
    writer.finish(source)
    peak = peak_memory()
    seconds = clock.seconds
    visits, whole, saved = seconds.pop("visit"), seconds.pop("all"), seconds.pop("save")
    seconds["forward"] = visits - seconds["hessian"] - seconds["solve"]
    seconds["total"] = whole - saved
    details = {"matrices_alone": matrices, "save": saved, "spilled_bytes": walk.hidden.spilled}
    write_result(job, seconds, imports, peak, groups=groups, details=details)


def read_ids(job: dict) -> torch.Tensor:
    """The calibration ids [N, T]."""
    from safetensors.torch import load_file

    return load_file(job["ids"])["ids"]


def write_result(job: dict, seconds: dict, imports: int, peak: int, **more) -> None:
    """Hands the measurements to the parent."""
    result = {
        "seconds": dict(seconds),
        "imports_bytes": imports,
        "peak_bytes": peak,
        "threads": torch.get_num_threads(),
        **more,
    }
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def make_peer(folder: Path) -> Path:
    """The python of an environment with the peer; made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for package in PEER:  # torch first, so that the build at hand is taken
            subprocess.run([python, "-m", "pip", "install", "-q", package], check=True)
    return python


# Models


def truncate(model: Path, n_blocks: int, scratch: Path) -> Path:
    """A copy of a LLaMA directory with its first blocks only."""
    from safetensors.torch import save_file

    from cap_llm.models.checkpoint import Checkpoint

    folder = scratch / "truncated"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    checkpoint = Checkpoint(model)
    keep = [n for n in checkpoint.names() if not _block_number(n) >= n_blocks]
    save_file(checkpoint.read(keep), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    fewer = json.dumps(config | {"num_hidden_layers": n_blocks})
    (folder / "config.json").write_text(fewer, encoding="utf-8")
    return folder


def _block_number(name: str) -> int:
    parts = name.split(".layers.")
    return int(parts[1].split(".")[0]) if len(parts) > 1 else -1


# The report


def show(report: dict) -> None:
    """Prints the comparison as Markdown."""
    n, length = report["tokens"]
    scored = "{} x {}".format(*report["scored"])
    print(
        f"\nSparseGPT {100 * SPARSITY:g} %, {report['blocks']} blocks, {n} x {length} tokens, "
        f"{report['threads']} threads; seconds; others in cores, memory in GiB\n"
    )
    heads = ["", *PHASES, "total", "others", "peak", "imports", "zeros %", f"ppl {scored}"]
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    print(f"| dense |{' |' * 10} {report['dense_perplexity']:.4f} |")
    for name, title in TITLES.items():
        run = report["contenders"].get(name)
        if not run:
            print(f"| {title} | not measured |{' |' * 10}")
            continue
        seconds = [run["seconds"].get(p) for p in (*PHASES, "total")]
        cells = ["in forward" if s is None else f"{s:.1f}" for s in seconds]
        cells.append(f"{run['others']:.2f}" + (" (disturbed)" if run["others"] > IDLE else ""))
        cells += [f"{run[key] / GIB:.2f}" for key in ("peak_bytes", "imports_bytes")]
        cells += [f"{100 * run['zeros']:.2f}", f"{run['perplexity']:.4f}"]
        print(f"| {title} | " + " | ".join(cells) + " |")
    if "floor" not in report:
        return
    bound, ours = report["floor"], report["contenders"]["ours"]["seconds"]["total"]
    parts = ", ".join(f"{k} {v / bound['rate']:.1f}" for k, v in bound["flops"].items())
    print(
        f"\nfloor: {bound['total_flops'] / 1e12:.3f} Tflop at {bound['rate'] / 1e9:.1f} Gflop/s = "
        f"{bound['seconds']:.1f} s ({parts})"
    )
    calm = {name for name, run in report["contenders"].items() if run["others"] <= IDLE}
    if "ours" not in calm:
        print("cap_llm was disturbed by other processes: no ratios; run again on an idle machine")
        return
    print(f"cap_llm: floor / time = {100 * bound['seconds'] / ours:.0f} %")
    for name in ("plain", "peer"):
        if name in calm:
            other = report["contenders"][name]["seconds"]["total"]
            print(f"{TITLES[name]}: {other / ours:.2f} x the time of cap_llm")
        elif name in report["contenders"]:
            print(f"{TITLES[name]}: disturbed by other processes, no ratio; run again")


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

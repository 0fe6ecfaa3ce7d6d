"""Speed and memory of a recovery step: what each term of the objective costs, at each ZeRO stage.

    python eval/bench_recovery.py [--model DIR | --random-shape opt-1.3b] [--length 512]
                                  [--micro-batch 2] [--rounds 4] [--passes 2] [--dtype bfloat16]
                                  [--gradient-checkpointing] [--peak-tflops 989] [--out FILE.json]

A group is a number of ranks and a ZeRO stage: processes of their own that run the training's own
step on real text and full banks. Its arms (cross-entropy; + KL from the teacher; + SquareHead;
the contrasts PrC, FiC, SnC; the pass that fills the bank of FiC or of a snapshot, which is made
once a training or rung) take turns on one engine, a step each a round, and the groups take turns
too, so that a machine whose speed drifts slows all of them alike. A rank has as many cores in every
group. A ratio is the median over the rounds of the two steps next to each other, with the range of
all rounds. The last lines hold the memory of the head's losses against one set of logits. Leave the
machine alone meanwhile.

A random shape has random weights and random words. A group that does not fit in memory is named and
left out, so trying one shape after the other finds the largest that fits with its teacher. On a GPU
another group offloads parameters, moments and teacher to main memory.

Given the peak of a GPU, each line also says which share of it the model's operations make up:
6 N + 12 L H T a token of length T for N weights that are multiplied with, 2 N + 4 L H T more where
the teacher runs; what gradient checkpointing computes again does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shapes import SHAPES, TEXT, random_model
from tables import arguments

from cap_llm.runtime.console import Console, format_bytes

KL = {"ce": 0.2, "kl": 0.8}
CONTRASTS = {"prc": 0.1, "fic": 0.1, "snc": 0.1}
# in the order in which they need more memory, which is measured in their first step
ARMS = {
    "cross-entropy": {"ce": 1.0},
    "+ KL": KL,
    "+ SquareHead": KL | {"feature": 1.0},
    "KL + contrasts": KL | CONTRASTS,
    "+ contrasts": KL | {"feature": 1.0} | CONTRASTS,
}
COSTS = {  # what is added -> (arm with it, arm without)
    "teacher and KL, on cross-entropy": ("+ KL", "cross-entropy"),
    "SquareHead, on KL": ("+ SquareHead", "+ KL"),
    "contrasts, on KL": ("KL + contrasts", "+ KL"),
    "contrasts, on KL and SquareHead": ("+ contrasts", "+ SquareHead"),
}
PASS = "a pass for FiC or a snapshot"  # the teacher's forward and its rows: no step of training
HEAD_TOKENS = (512, 2048)
LATE = 1000  # the first step that is made: all rows of PrC's bank count as seen


def main() -> int:
    """Measures every line and prints the tables; returns the exit code."""
    args = parse()
    if args.work:
        return measure(json.loads(args.work))
    import torch

    from cap_llm.cli import assets

    console = Console()
    if args.random_shape:
        model = str(random_model(args.random_shape, args.blocks))
        text = f"{model}/{TEXT}"
    else:
        model = args.model or str(assets.smollm2(console.say))
        text = str(assets.wikipedia(console.say)[0])
    common = {"model": model, "text": text, "length": args.length}
    common |= {"rounds": args.rounds, "micro_batch": args.micro_batch, "dtype": args.dtype}
    common |= {"gradient_checkpointing": args.gradient_checkpointing}
    n = args.ranks
    if torch.cuda.is_available() and torch.cuda.device_count() < n:
        n = torch.cuda.device_count()
        console.say(f"{n} ranks at most: a rank needs a GPU of its own")
    common["threads"] = max(1, len(os.sched_getaffinity(0)) // n)
    groups = {(1, "zero2"): list(ARMS)}
    groups |= {(n, f"zero{stage}"): list(ARMS) for stage in range(4)}
    if torch.cuda.is_available():
        groups[n, "zero3_offload"] = ["+ KL"]
    seconds: dict[tuple, list[float]] = {}  # by ranks, stage and arm
    peaks: dict[tuple, int] = {}
    no_room: set[str] = set()
    with console.bar("measuring", args.passes * len(groups), "groups") as bar:
        for _ in range(args.passes):
            for (ranks, zero), arms in groups.items():
                bar.phase(f"{ranks} ranks, {zero}")
                work = common | {"ranks": ranks, "deepspeed": zero, "arms": arms}
                measured = launch(work)
                if measured is None:
                    no_room.add(f"{ranks} rank{'s' * (ranks > 1)}, {zero}")
                for arm, line in (measured or {}).items():
                    key = (ranks, zero, arm)
                    seconds[key] = seconds.get(key, []) + line["seconds"]
                    peaks[key] = max(peaks.get(key, 0), line["peak_bytes"])
                bar.advance()

    def speed(key: tuple) -> float:
        return key[0] * args.micro_batch * args.length / statistics.median(seconds[key])

    def used(key: tuple) -> list[str]:
        """The share of the GPUs' peak, if that is known."""
        if not args.peak_tflops:
            return []
        trained, taught = flops_a_token(Path(model), args.length)
        made = taught if key[2] == PASS else trained + taught * (key[2] != "cross-entropy")
        return [f"{100 * made * speed(key) / (key[0] * args.peak_tflops * 1e12):.1f}%"]

    def cost(ranks: int, zero: str, arms: tuple[str, str]) -> str:
        more, less = (seconds.get((ranks, zero, arm), []) for arm in arms)
        if not more:
            return ""
        shares = [100 * (a / b - 1) for a, b in zip(more, less, strict=True)]
        return f"{statistics.median(shares):+.1f}% ({min(shares):+.1f} to {max(shares):+.1f})"

    for group in sorted(no_room):
        console.say(f"no room for {group}", style="yellow")
    console.table(
        "a step",
        ["ranks", "ZeRO", "objective", "tokens/s", "peak memory per rank"]
        + ["of the GPU's peak"] * bool(args.peak_tflops),
        [
            [
                str(key[0]),
                key[1].removeprefix("zero"),
                key[2],
                f"{speed(key):.1f}",
                format_bytes(peak),
                *used(key),
            ]
            for key, peak in peaks.items()
        ],
    )
    rounds = args.passes * args.rounds
    whole = [group for group, arms in groups.items() if len(arms) > 1]
    console.table(
        f"what a term adds to the time of a step: median and range of {rounds} rounds",
        ["term", *(f"{r} rank{'s' * (r > 1)}, {zero}" for r, zero in whole)],
        [[term, *(cost(*group, arms) for group in whole)] for term, arms in COSTS.items()],
    )
    for r in (r for r in sorted({1, n}) if (r, "zero2", PASS) in seconds):
        share = speed((r, "zero2", "+ KL")) / speed((r, "zero2", PASS))
        console.say(
            f"{PASS} takes {share:.2f} of the time of a step of + KL, a token, on {r} rank"
            f"{'s' * (r > 1)} (ZeRO-2); a training makes one for FiC, a rung one for its snapshot"
        )
    if n > 1 and {(1, "zero2", "+ KL"), (n, "zero2", "+ KL")} <= seconds.keys():
        gain = speed((n, "zero2", "+ KL")) / speed((1, "zero2", "+ KL"))
        console.say(f"{n} ranks pass {gain:.2f} times the tokens of one (ZeRO-2, + KL)")
    heads = [launch(common | {"ranks": 1, "head_tokens": t}) for t in HEAD_TOKENS]
    for head in filter(None, heads):
        console.say(
            f"head losses of {head['tokens']} tokens: {format_bytes(head['forward_bytes'])} above "
            f"their inputs and the head's gradient, {format_bytes(head['extra_bytes'])} with the "
            f"backward; one set of logits takes {format_bytes(head['logits_bytes'])}"
        )
    if args.out:
        keys = ("ranks", "deepspeed", "arm")
        lines = [
            dict(zip(keys, key, strict=True))
            | {"tokens_per_second": speed(key), "seconds": seconds[key], "peak_bytes": peak}
            | ({"of_peak": used(key)[0]} if used(key) else {})
            for key, peak in peaks.items()
        ]
        content = common | {"lines": lines, "heads": heads}
        Path(args.out).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    add = parser.add_argument
    add("--model", help="model directory; default: SmolLM2-135M from its package")
    add("--random-shape", choices=SHAPES, help="random weights and random words instead")
    add("--blocks", type=int, help="how many of the shape's; default: all")
    add("--length", type=int, default=512, help="tokens per sequence")
    add("--micro-batch", type=int, default=2, help="sequences at once, per rank")
    add("--rounds", type=int, default=4, help="timed steps of an arm, per pass")
    add("--passes", type=int, default=2, help="times that every group is started")
    add("--ranks", type=int, default=2, help="of the groups with several ranks")
    add("--gradient-checkpointing", action="store_true")
    add("--peak-tflops", type=float, help="of one GPU, in --dtype, without sparsity")
    add("--dtype", default="float32", help="float32 or bfloat16")
    add("--out", help="JSON file for all figures")
    add("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.blocks and not args.random_shape:
        parser.error("--blocks needs --random-shape")
    return args


def launch(work: dict) -> dict | None:
    """Runs one group in processes of its own; None where memory, or a card's, is too small."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(work["ranks"]), __file__]
        command += ["--work", json.dumps(work | {"out": str(out), "folder": folder})]
        environment = os.environ | {"OMP_NUM_THREADS": str(work["threads"])}
        if "head_tokens" in work:  # what is freed goes back at once: memory is what stands
            environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if re.search(r"OutOfMemoryError|exitcode\s*: -9", done.stderr):
            return None
        if done.returncode:
            raise SystemExit(f"{work} failed:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def measure(work: dict) -> int:
    """One group, on this rank."""
    from cap_llm.runtime.world import World

    world = World("auto")
    result = head_memory(work) if "head_tokens" in work else steps(work, world)
    if world.is_main:
        Path(work["out"]).write_text(json.dumps(result), encoding="utf-8")
    world.barrier()
    sys.stdout.flush()
    os._exit(0)


def steps(work: dict, world) -> dict[str, dict]:
    """Seconds of each timed step of the training's own code, and the peak memory of one, by arm."""
    import torch

    from cap_llm.config import EngineConfig, ObjectiveConfig, OptimizerConfig, RecoverConfig
    from cap_llm.contrast.terms import NoContrast
    from cap_llm.models.directory import ModelDirectory
    from cap_llm.runtime.memory import max_peaks, peaks, reset_peak_memory
    from cap_llm.sparsity.keeper import keep_zeros
    from cap_llm.tasks.language_modeling import LanguageModeling
    from cap_llm.text.corpora import read_corpus
    from cap_llm.text.packing import pack
    from cap_llm.text.tokenizers import load_tokenizer
    from cap_llm.training import ds_config
    from cap_llm.training import engine as engines
    from cap_llm.training import loop as training
    from cap_llm.training.masks import Fixed

    model, folder = ModelDirectory(Path(work["model"])), Path(work["folder"])
    batch = world.size * work["micro_batch"]
    configs = {
        arm: RecoverConfig(
            length=work["length"],
            held_out=1,
            optimizer=OptimizerConfig(
                batch=batch,
                tokens=batch * work["length"] * (work["rounds"] + 1),
                dtype=work["dtype"],
            ),
            engine=EngineConfig(
                micro_batch=work["micro_batch"],
                gradient_checkpointing=work["gradient_checkpointing"],
                deepspeed=work["deepspeed"],
            ),
            finetuned="given",
            objective=ObjectiveConfig(**dict.fromkeys(ObjectiveConfig.TERMS, 0.0) | ARMS[arm]),
        )
        for arm in work["arms"]
    }
    config = next(iter(configs.values()))
    engines.start(world)
    student_ds = ds_config.student_settings(config, world)
    teacher_ds = ds_config.teacher_settings(config, world, student_ds)
    corpus = read_corpus(work["text"], "train")
    text = pack(load_tokenizer(str(model)), corpus, 32, 1, config.length, 0)
    tasks = {
        arm: LanguageModeling(
            text, config.objective, config.SKIP, config.optimizer.seed, world.device
        )
        for arm, config in configs.items()
    }
    first = next(iter(tasks.values()))
    engine = engines.load_student(model, student_ds, config, world, first.student)

    def masks():
        for name, p in engine.module.named_parameters():
            shape = getattr(p, "ds_shape", p.shape)
            if ".layers." in name and len(shape) == 2:
                yield name, torch.arange(shape.numel()).view(shape) % 2 == 0

    keep_zeros(engine, masks())
    teacher, jobs = None, {}
    lines: dict[str, dict] = {}

    def states(ids):
        return first.states(teacher, ids)

    def timed(arm: str, step: int, work, *given) -> None:
        reset_peak_memory()
        world.barrier()
        start = time.perf_counter()
        work(*given)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        line = lines.setdefault(arm, {"seconds": []})
        if step:
            line["seconds"].append(round(time.perf_counter() - start, 3))
        else:  # the first step of an arm also allocates; it is not timed
            most = max_peaks(world.gather(peaks()))
            line["peak_bytes"] = most.get("peak_cuda_bytes", most["peak_memory_bytes"])

    for step in range(work["rounds"] + 1):
        # back and forth: under ZeRO-3 a step's time also depends on its place in the row
        for arm, config in list(configs.items())[:: -1 if step % 2 else 1]:
            o = config.objective
            if step == 0:  # what an arm needs comes just before its first step
                if o.kl and teacher is None:
                    teacher = engines.load_teacher(model, teacher_ds, config, world, first.teacher)
                contrasts = NoContrast()
                if config.contrasts:
                    contrasts = filled(config, text, model, folder / arm, world)
                used = teacher if o.kl else None
                jobs[arm] = training.Job(
                    model, tasks[arm], Fixed(()), used, contrasts, folder, {}, "bench", "bench"
                )
            engine.module.objective = o
            timed(arm, step, training.step_once, engine, jobs[arm], LATE + step, config, world)
        banked = next((job.contrasts for job in jobs.values() if job.contrasts.terms), None)
        if banked:
            bank = random_bank(banked.extractor, folder / f"pass-{step}", world, empty=True)
            some, each = torch.arange(batch), work["micro_batch"]
            timed(PASS, step, banked.fill, bank, states, some, each, PASS, Console(enabled=False))
    return lines


def filled(config, text, model, folder: Path, world):
    """The contrasts on full banks; of random rows, which cost as much as any."""
    from cap_llm.contrast.terms import ContrastiveObjective, ContrastTerm
    from cap_llm.recovery.check import state_width
    from cap_llm.tasks.language_modeling import TextUnits

    width, extra = state_width(model), config.contrast.extra_negatives
    units = TextUnits(text, config.contrast, width, config.SKIP, 0, world.device)
    contrasts = ContrastiveObjective(units, extra, config.optimizer.batch, world)
    for name in CONTRASTS:
        bank = random_bank(units, folder / name, world)
        contrasts.terms.append(ContrastTerm(name, CONTRASTS[name], [bank], name == "prc"))
    return contrasts


def random_bank(units, folder: Path, world, empty: bool = False):
    """A bank of random rows, or of none yet."""
    import torch

    from cap_llm.contrast.bank import Bank
    from cap_llm.contrast.units import normalize

    shape = units.n_examples, units.n_units, units.dim
    bank = Bank(folder, {}, shape, world)
    bank.set_center(torch.zeros(units.dim), 0.0, float(units.dim))
    if not empty:
        rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        bank.write(torch.arange(shape[0]), normalize(rows, bank.center))
    return bank


def flops_a_token(model: Path, length: int) -> tuple[float, float]:
    """Operations of a model a token: forward and backward, and forward alone (PaLM's count)."""
    from cap_llm.models.directory import ModelDirectory

    empty = ModelDirectory(model).skeleton
    embedding, head = empty.get_input_embeddings().weight, empty.get_output_embeddings().weight
    n = sum(p.numel() for p in empty.parameters() if p is not embedding or p is head)
    config = empty.config
    forward = 2 * n + 4 * config.num_hidden_layers * config.hidden_size * length
    return 3 * forward, forward


def head_memory(work: dict) -> dict:
    """Memory that the head's losses take above their inputs and the head's own gradient."""
    import torch

    from cap_llm.models.directory import ModelDirectory
    from cap_llm.recovery.check import state_width
    from cap_llm.runtime.memory import reset_peak_memory
    from cap_llm.training.objectives import head_loss

    model = ModelDirectory(Path(work["model"]))
    vocabulary, width = model.settings["vocab_size"], state_width(model)
    n = work["head_tokens"]
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, width).requires_grad_()
    other = torch.randn(vocabulary, width)
    states = torch.randn(n, width, requires_grad=True)
    target = torch.randint(0, vocabulary, (n,))

    def memory(key: str) -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split(f"{key}:")[1].split()[0]) * 1024

    reset_peak_memory()
    before = memory("VmRSS")
    total, _, _ = head_loss(
        states, weight, None, target, (states.detach(), other, None), 0.2, 0.8, 1.0
    )
    forward = memory("VmHWM")
    total.backward()
    after = memory("VmHWM")
    head = 4 * vocabulary * width  # its gradient, which every loss needs
    return {
        "tokens": n,
        "forward_bytes": max(forward - before - head, 0),
        "extra_bytes": max(after - before - head, 0),
        "logits_bytes": 4 * n * vocabulary,
    }


if __name__ == "__main__":
    sys.exit(main())

"""Speed and memory of a recovery step: what each term of the objective costs, at each ZeRO stage.

    python eval/bench_recovery.py [--model DIR] [--length 512] [--micro-batch 2] [--steps 3]
                                  [--dtype bfloat16] [--out FILE.json]

Every line is a process group of its own that runs the training's own step on real text: arms add
one term each (cross-entropy; + KL from the teacher; + SquareHead; + the contrasts PrC, FiC, SnC on
filled banks). Ratios are of lines of this one run. The last lines hold the memory of the head's
losses against one set of logits. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]

from cap_llm.runtime.console import Console, quiet_libraries, size  # noqa: E402

quiet_libraries()

ARMS = {
    "cross-entropy": {"ce": 1.0},
    "+ KL": {"ce": 0.2, "kl": 0.8},
    "+ SquareHead": {"ce": 0.2, "kl": 0.8, "feature": 1.0},
    "+ contrasts": {"ce": 0.2, "kl": 0.8, "feature": 1.0, "prc": 0.1, "fic": 0.1, "snc": 0.1},
    "KL + contrasts": {"ce": 0.2, "kl": 0.8, "prc": 0.1, "fic": 0.1, "snc": 0.1},
}
HEAD_TOKENS = (512, 2048)


def main() -> int:
    """Measures every line and prints the table; returns the exit code."""
    options = parse()
    if options.work:
        return measure(json.loads(options.work))
    import assets

    console = Console()
    model = options.model or str(assets.smollm2(console.say))
    text, _ = assets.wikipedia(console.say)
    common = {"model": model, "text": str(text), "length": options.length, "steps": options.steps}
    common |= {"micro_batch": options.micro_batch, "dtype": options.dtype}
    plan = [(1, "zero2", arm) for arm in ARMS]
    plan += [(options.ranks, "zero2", arm) for arm in ARMS]
    plan += [(options.ranks, z, a) for z in ("zero0", "zero1", "zero3") for a in ("+ KL",)]
    plan += [(options.ranks, "zero3", "KL + contrasts")]
    results = []
    with console.bar("measuring", len(plan), "lines") as bar:
        for ranks, zero, arm in plan:
            bar.phase(f"{ranks} ranks, {zero}, {arm}")
            work = common | {"ranks": ranks, "deepspeed": zero, "arm": arm}
            results.append(work | launch(work))
            console.say(
                f"{ranks} ranks  {zero}  {arm:<16} {results[-1]['tokens_a_second']:8.1f} tokens/s  "
                f"{size(results[-1]['peak_bytes'])} a rank"
            )
            bar.advance()
    by = {(r["ranks"], r["deepspeed"], r["arm"]): r for r in results}

    def cost(ranks: int, more: str, less: str) -> str:
        a, b = (by[ranks, "zero2", arm]["tokens_a_second"] for arm in (less, more))
        return f"{100 * (a / b - 1):+.1f} %"

    n = options.ranks
    console.table(
        "what a term adds to the time of a step (ZeRO-2)",
        ["term", "1 rank", f"{n} ranks"],
        [
            [
                "teacher and KL, on cross-entropy",
                *(cost(r, "+ KL", "cross-entropy") for r in (1, n)),
            ],
            ["SquareHead, on KL", *(cost(r, "+ SquareHead", "+ KL") for r in (1, n))],
            ["contrasts, on KL", *(cost(r, "KL + contrasts", "+ KL") for r in (1, n))],
        ],
    )
    one, several = (by[r, "zero2", "+ KL"]["tokens_a_second"] for r in (1, n))
    console.say(f"{n} ranks pass {several / one:.2f} times the tokens of one (ZeRO-2, + KL)")
    heads = [launch(common | {"ranks": 1, "head_tokens": t}) for t in HEAD_TOKENS]
    for head in heads:
        console.say(
            f"head losses of {head['tokens']} tokens: {size(head['extra_bytes'])} above their "
            f"inputs; one set of logits takes {size(head['logits_bytes'])}"
        )
    if options.out:
        Path(options.out).write_text(
            json.dumps({"lines": results, "heads": heads}, indent=2) + "\n"
        )
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model directory; default: SmolLM2-135M from its package")
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences at once, a rank")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a line")
    parser.add_argument("--ranks", type=int, default=2, help="of the lines with several ranks")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--out", help="JSON file for all figures")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def launch(work: dict) -> dict:
    """Runs one line in processes of its own."""
    threads = max(1, len(os.sched_getaffinity(0)) // work["ranks"])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(work["ranks"]), __file__]
        command += ["--work", json.dumps(work | {"out": str(out), "folder": folder})]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{work} failed:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text())


def measure(work: dict) -> int:
    """One line, on this rank."""
    from cap_llm.runtime.rundir import peak_memory
    from cap_llm.runtime.world import World

    world = World("auto")
    if "head_tokens" in work:
        result = head_memory(work)
    else:
        seconds = steps(work, world)
        tokens = work["ranks"] * work["micro_batch"] * work["length"]
        result = {
            "tokens_a_second": tokens / statistics.median(seconds),
            "seconds": [round(s, 3) for s in seconds],
            "peak_bytes": max(world.gather(peak_memory())),
        }
    if world.first:
        Path(work["out"]).write_text(json.dumps(result))
    world.barrier()
    sys.stdout.flush()
    os._exit(0)


def steps(work: dict, world) -> list[float]:
    """Seconds of each timed step of the training's own code."""
    import torch

    from cap_llm.config import ObjectiveConfig, RecoverConfig
    from cap_llm.recovery import engines, training
    from cap_llm.recovery.bank import Bank
    from cap_llm.recovery.contrasts import Contrast, Contrasts
    from cap_llm.recovery.recover import state_width
    from cap_llm.recovery.units import Encoder
    from cap_llm.recovery.zeros import keep_zeros
    from cap_llm.runtime.rundir import Run
    from cap_llm.text.corpora import read_corpus
    from cap_llm.text.packing import pack
    from cap_llm.text.tokenizers import load_tokenizer

    model, folder = Path(work["model"]), Path(work["folder"])
    weights = dict.fromkeys(("ce", "kl", "feature", "prc", "snc", "fic"), 0.0) | ARMS[work["arm"]]
    batch = world.size * work["micro_batch"]
    config = RecoverConfig(
        length=work["length"],
        batch=batch,
        micro_batch=work["micro_batch"],
        tokens=batch * work["length"] * (work["steps"] + 1),
        held_out=1,
        dtype=work["dtype"],
        deepspeed=work["deepspeed"],
        finetuned="given",
        objective=ObjectiveConfig(**weights),
    )
    engines.start(world)
    student_ds = engines.student_settings(config, world)
    teacher_ds = engines.teacher_settings(config, world, student_ds)
    corpus = read_corpus(work["text"], "train")
    text = pack(load_tokenizer(str(model)), corpus, 32, 1, config.length, 0)
    contrasts = Contrasts(None, config.contrast, batch, world)
    teacher = None
    if config.objective.kl:
        teacher = engines.load_teacher(model, teacher_ds, config, world)
    if config.contrasts:
        width = state_width(model)
        encoder = Encoder(text, config.contrast, width, config.SKIP, 0, world.device)
        contrasts = Contrasts(encoder, config.contrast, batch, world)
        shape = (len(text.ids), encoder.n_units, encoder.dim)
        banks = {name: Bank(folder / name, {}, shape, world) for name in ("online", "filled")}
        for name, bank in banks.items():
            ids = torch.arange(len(text.ids) if name == "filled" else 0)
            contrasts.fill(
                bank, lambda t: teacher(t, False)[0], ids, work["micro_batch"], name, Console(False)
            )
        for name, bank in (("prc", "online"), ("fic", "filled"), ("snc", "filled")):
            contrasts.terms.append(Contrast(name, 0.1, [banks[bank]], name == "prc"))
    engine = engines.load_student(model, student_ds, config, world)
    masks = {}
    for name, p in engine.module.named_parameters():
        if name.startswith("model.model.layers.") and name.endswith("proj.weight"):
            shape = getattr(p, "ds_shape", p.shape)
            masks[name] = torch.arange(shape.numel()).view(shape) % 2 == 0
    keep_zeros(engine, masks)
    job = training.Job(model, (), teacher, contrasts, text, folder, {}, "bench", "bench")
    run = Run.__new__(Run)
    run.world = world
    seconds = []
    for step in range(work["steps"] + 1):
        world.barrier()
        start = time.perf_counter()
        training.step_once(engine, job, step, config, run)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]  # the first one also allocates


def head_memory(work: dict) -> dict:
    """Memory that the head's losses take above their inputs and the head's own gradient."""
    import torch

    from cap_llm.models.checkpoint import config_dict
    from cap_llm.recovery.objectives import head_loss
    from cap_llm.recovery.recover import state_width

    vocabulary, width = (
        config_dict(Path(work["model"]))["vocab_size"],
        state_width(Path(work["model"])),
    )
    n = work["head_tokens"]
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, width).requires_grad_()
    other = torch.randn(vocabulary, width)
    states = torch.randn(n, width, requires_grad=True)
    target = torch.randint(0, vocabulary, (n,))

    def memory(key: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{key}:")[1].split()[0]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    total, _, _ = head_loss(
        states, weight, None, target, (states.detach(), other, None), 0.2, 0.8, 1.0
    )
    after = memory("VmHWM")
    total.backward()
    head = 4 * vocabulary * width  # its gradient, which every loss needs
    return {
        "tokens": n,
        "extra_bytes": max(after - before - head, 0),
        "logits_bytes": 4 * n * vocabulary,
    }


if __name__ == "__main__":
    sys.exit(main())

"""The README's recovery table: what each term of the objective is worth, on SmolLM2-135M.

    CAP_LLM_DATA=... python eval/study_recovery.py [WORK_DIR] [--arms "KL,KL + PrC"] [--seeds 0,1]
                     [--tokens 98304] [--whole] [--model DIR]

The arms of a seed start from one pruned model (SparseGPT + refit), see the same tokens in the same
order, and differ in their objective alone; the seed draws calibration, text, order and units. Arms
on a ladder start from the dense model and get as many tokens, split evenly over their rungs, each
of which passes the same share of the text: hold them against each other. The model of FiC is the
dense one, fine-tuned on the tokens of a rung, which are not counted. Text is split by document:
calibration, training and held-out C4 are three files. Scored on held-out C4 and on WikiText-2, its
first 32 windows or, with --whole, all of it.

Finished runs are kept in `eval/results/study_recovery.json` and not repeated; one that was stopped
goes on from its checkpoint in WORK_DIR. The defaults are the screen for two cores: hours. With a
GPU give --tokens 1007616 --seeds 0,1,2 --whole.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]

from cap_llm.runtime.console import Console, quiet_libraries  # noqa: E402

quiet_libraries()

import assets  # noqa: E402
import torch  # noqa: E402

from cap_llm.config import ObjectiveConfig  # noqa: E402
from cap_llm.runtime.files import read_json, write_json  # noqa: E402

RESULTS = ROOT / "eval" / "results" / "study_recovery.json"
OFF = dict.fromkeys(ObjectiveConfig.TERMS, 0.0)
KL = {"ce": 0.2, "kl": 0.8}
ALL = KL | {"feature": 1.0, "prc": 0.1, "snc": 0.1, "fic": 0.1}
UP, TO_2_4 = "0.3, 0.4, 0.5", "3:4, 2:4"
# arm -> (objective, ladder); without an objective, one-shot alone
ARMS = {
    "no training": (None, ""),
    "cross-entropy": ({"ce": 1.0}, ""),
    "KL": (KL, ""),
    "KL + SquareHead": (KL | {"feature": 1.0}, ""),
    "KL + PrC": (KL | {"prc": 0.1}, ""),
    "KL + FiC": (KL | {"fic": 0.1}, ""),
    "KL; ladder": (KL, UP),
    "KL + SnC; ladder": (KL | {"snc": 0.1}, UP),
    "all; ladder": (ALL, UP),
    "no training; 2:4": (None, TO_2_4),
    "KL; 2:4 ladder": (KL, TO_2_4),
    "KL + SnC; 2:4 ladder": (KL | {"snc": 0.1}, TO_2_4),
    "all; 2:4 ladder": (ALL, TO_2_4),
}
LENGTH, BATCH, FIRST = 512, 4, 32
C4_HELD_OUT = 64  # windows of 512 tokens of documents that nothing else reads
UNIT = 6 * BATCH * LENGTH  # tokens that 1, 2 and 3 rungs share evenly


def main() -> int:
    """Runs what is missing, prints the table; returns the exit code."""
    options = parse()
    console = Console()
    work = Path(options.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    model = Path(options.model).resolve() if options.model else assets.smollm2(console.say)
    texts = split(work)
    todo = [("dense", options.seeds[0])]
    todo += [(arm, seed) for seed in options.seeds for arm in options.arms]
    for n, (arm, seed) in enumerate(todo, 1):
        key = key_of(arm, seed, options)
        results = read_json(RESULTS) if RESULTS.exists() else {}
        if key in results:
            continue
        console.say(f"\n[{n}/{len(todo)}] {key}", style="bold")
        folder = folder_of(arm, seed, options)
        code = run(arm, seed, model, texts, work, options)
        if code:
            return code
        RESULTS.parent.mkdir(exist_ok=True)
        result = measured(work / folder, options) | {"model": name_of(options)}
        write_json(RESULTS, results | {key: result})
        console.say("\n".join(table(options)))
    console.say("\n".join(table(options)))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", nargs="?", default="runs/study-recovery")
    parser.add_argument("--arms", help=f"of: {', '.join(ARMS)}; default: all")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument(
        "--tokens", type=int, default=8 * UNIT, help=f"an arm, over all its rungs; n x {UNIT}"
    )
    parser.add_argument("--whole", action="store_true", help="score all of WikiText-2")
    parser.add_argument("--model", help="model directory; default: SmolLM2-135M from its package")
    options = parser.parse_args()
    options.arms = [a.strip() for a in options.arms.split(",")] if options.arms else list(ARMS)
    options.seeds = [int(s) for s in options.seeds.split(",")]
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        parser.error(f"there is no arm {unknown[0]!r}; the arms are {', '.join(ARMS)}")
    if options.tokens < UNIT or options.tokens % UNIT:
        # or a ladder would train on fewer tokens than the arms that it is compared with
        parser.error(f"--tokens {options.tokens} is no multiple of {UNIT}")
    return options


def split(work: Path) -> dict[str, Path]:
    """C4's local samples as three files of different documents."""
    root = Path(os.environ.get("CAP_LLM_DATA", ""))
    documents = []
    for name in ("c4.sample-2000.jsonl.gz", "c4.sample-1480.jsonl.gz"):
        path = root / "c4" / name
        if not path.is_file():
            raise SystemExit(f"{path} does not exist: set CAP_LLM_DATA to the folder of local data")
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            documents.append([json.loads(line)["text"] for line in lines])
    long, short = documents
    parts = {"calibration": long[:600], "training": long[600:1600] + short, "c4": long[1600:]}
    texts = {}
    for name, part in parts.items():
        texts[name] = work / f"{name}.jsonl"
        texts[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return texts


def run(arm: str, seed: int, model: Path, texts: dict, work: Path, options) -> int:
    """Runs the entry for one arm and seed: pruning, training, then the scores; the exit code."""
    on_cpu = not torch.cuda.is_available()
    ranks = 2 if on_cpu else 1
    common = ["--output_dir", str(work / folder_of(arm, seed, options)), "--name", arm]
    common += ["--calibration.corpus", str(texts["calibration"]), "--calibration.length", "512"]
    common += ["--calibration.seed", str(seed), "--oneshot.refit", "true"]
    objective, ladder = ARMS.get(arm, (None, ""))
    if not objective:
        common += ["--model.path", str(model)]
        common += ["--oneshot.pattern", "2:4"] if ladder else []
        stages = [] if arm == "dense" else ["oneshot"]
    else:
        start = work / folder_of("no training", seed, options) / "oneshot"
        if not ladder and not (start / "done.json").exists():
            code = run("no training", seed, model, texts, work, options)
            if code:
                return code
        stages = ["recover"]
        common += ["--model.path", str(model if ladder else start), "--recover.teacher", str(model)]
        tokens = options.tokens // len(ladder.split(","))
        common += ["--recover.corpus", str(texts["training"]), "--recover.length", str(LENGTH)]
        common += ["--recover.batch", str(BATCH), "--recover.micro_batch", str(2 // ranks)]
        common += ["--recover.tokens", str(tokens), "--recover.seed", str(seed)]
        common += ["--recover.lr", "2e-4", "--recover.deepspeed", "cpu" if on_cpu else "zero2"]
        common += ["--recover.dtype", "bfloat16", "--recover.evaluate_steps", "25"]
        common += ["--recover.checkpoint_steps", "25", "--recover.ladder", ladder]
        for name, weight in (OFF | objective).items():
            common += [f"--recover.objective.{name}", str(weight)]
        if objective.get("fic"):
            common += ["--recover.finetuned", "train"]
    if stages and (code := entry(ranks, [*common, "--stages", f"[{','.join(stages)}]"])):
        return code
    scored = ["--stages", f"[{','.join([*stages, 'evaluate'])}]", "--evaluate.dense", "false"]
    for corpus, window, most in (
        (texts["c4"], LENGTH, C4_HELD_OUT),
        ("wikitext2", 2048, None if options.whole else FIRST),
    ):
        place = ["--evaluate.corpora", f"[{corpus}]", "--evaluate.window", str(window)]
        place += ["--evaluate.max_windows", str(most)] if most else []
        if code := entry(1, [*common, *scored, *place]):
            return code
    return 0


def entry(ranks: int, options: list[str]) -> int:
    """Runs the entry, under a launcher where it takes several ranks; the exit code."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else [])]
    command += [str(ROOT / "cap_llm" / "train.py"), *options]
    return subprocess.run(command, env=environment, check=False).returncode


def name_of(options) -> str:
    """The model's name."""
    return Path(options.model).name if options.model else assets.MODEL_NAME


def key_of(arm: str, seed: int, options) -> str:
    """How a run is called in the results."""
    scope = "whole" if options.whole else f"first {FIRST}"
    tokens = "" if arm == "dense" or not ARMS[arm][0] else f", {options.tokens} tokens"
    model = f", {name_of(options)}" if options.model else ""
    return f"{arm}{tokens}{model}, seed {seed}, {scope}"


def folder_of(arm: str, seed: int, options) -> str:
    """The run's folder in the work directory: the same however much is scored."""
    key = key_of(arm, seed, options).rsplit(",", 1)[0]
    return "".join(c if c.isalnum() else "-" for c in key).lower()


def measured(folder: Path, options) -> dict:
    """What a finished run measured, with what a reader needs to compare it."""
    stage = next(s for s in ("recover", "oneshot", "dense") if (folder / s).exists())
    scores = read_json(folder / stage / "perplexity.json")["corpora"]
    most = "" if options.whole else f" first {FIRST}"
    keys = {"c4": f"c4.jsonl@{LENGTH} first {C4_HELD_OUT}", "wikitext2": f"wikitext2@2048{most}"}
    kept = ("ppl_token", "window", "windows", "tokens", "bos")
    result = {corpus: {k: scores[key][k] for k in kept} for corpus, key in keys.items()}
    if stage == "recover":
        done = read_json(folder / stage / "done.json")
        result |= {"tokens": done["tokens"], "rungs": done["rungs"]}
    if stage != "dense":
        counts = read_json(folder / stage / "sparsity.json")
        result["sparsity"] = counts["pruned_matrices"]["sparsity"]
    return result | assets.provenance(folder)


def table(options) -> list[str]:
    """The table of what is there: mean and spread over the seeds, as Markdown lines.

    The share of the gap that an arm closes is between the dense model and its pattern's one-shot
    model of the same seed.
    """
    results = read_json(RESULTS) if RESULTS.exists() else {}
    scope = "whole test set" if options.whole else f"first {FIRST} windows"
    lines = [
        f"| arm | held-out C4, ppl_token@{LENGTH} | WikiText-2, ppl_token@2048, {scope} | "
        "gap closed, C4 | WikiText-2 | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]

    def ppl(arm: str, corpus: str) -> dict[str, float]:
        """By seed, of all seeds that have been run."""
        found = {}
        for key, result in results.items():
            seed = key.rsplit("seed ", 1)[1].split(",")[0]
            if key == key_of(arm, int(seed), options):
                found[seed] = result[corpus]["ppl_token"]
        return found

    def cell(values: list[float], form: str) -> str:
        spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{spread}" if values else ""

    for arm in ("dense", *ARMS):
        figures, gaps = [], []
        for corpus in ("c4", "wikitext2"):
            mine, dense = ppl(arm, corpus), next(iter(ppl("dense", corpus).values()), None)
            figures.append(cell(list(mine.values()), ".2f"))
            start = ppl("no training; 2:4" if "2:4" in arm else "no training", corpus)
            both = [seed for seed in mine if seed in start and dense]
            gap = [100 * (start[s] - mine[s]) / (start[s] - dense) for s in both]
            gaps.append(f"{cell(gap, '.0f')} %" if gap else "")
        if mine:
            lines.append(f"| {' | '.join([arm, *figures, *gaps, str(len(mine))])} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

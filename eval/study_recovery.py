"""The README's recovery table: what each term of the objective is worth, on SmolLM2-135M.

    CAP_LLM_DATA=... python eval/study_recovery.py [WORK_DIR] [--arms A,B] [--seeds 0,1]
                     [--tokens 102400] [--whole]

Every arm starts from the same pruned model (SparseGPT + refit), sees the same tokens in the same
order, and differs in its objective alone; the seed draws text, order and units. Arms on a ladder
start from the dense model and get the same tokens over all rungs. Text is split by document:
calibration, training and held-out C4 are three files. Scored on held-out C4 and on WikiText-2, its
first 32 windows or, with --whole, all of it.

Finished runs are kept in `eval/results/study_recovery.json` and not repeated; one that was stopped
goes on from its checkpoint in WORK_DIR. The defaults are the screen for two cores: hours. With a
GPU give --tokens 1000000 --seeds 0,1,2 --whole.
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

from cap_llm.runtime.files import read_json, write_json  # noqa: E402

RESULTS = ROOT / "eval" / "results" / "study_recovery.json"
OFF = dict.fromkeys(("ce", "kl", "feature", "prc", "snc", "fic"), 0.0)
KL = {"ce": 0.2, "kl": 0.8}
# arm -> (objective, ladder); no objective: one-shot alone
ARMS = {
    "no training": (None, ""),
    "cross-entropy": ({"ce": 1.0}, ""),
    "KL": (KL, ""),
    "KL + SquareHead": (KL | {"feature": 1.0}, ""),
    "KL + PrC": (KL | {"prc": 0.1}, ""),
    "KL + FiC": (KL | {"fic": 0.1}, ""),
    "KL, ladder": (KL, "0.3, 0.4, 0.5"),
    "KL + SnC, ladder": (KL | {"snc": 0.1}, "0.3, 0.4, 0.5"),
    "all, ladder": (KL | {"feature": 1.0, "prc": 0.1, "snc": 0.1, "fic": 0.1}, "0.3, 0.4, 0.5"),
    "KL, 2:4 ladder": (KL, "3:4, 2:4"),
    "KL + SnC, 2:4 ladder": (KL | {"snc": 0.1}, "3:4, 2:4"),
    "all, 2:4 ladder": (
        KL | {"feature": 1.0, "prc": 0.1, "snc": 0.1, "fic": 0.1},
        "3:4, 2:4",
    ),
}
LENGTH, BATCH, FIRST = 512, 4, 32
C4_HELD_OUT = 64  # windows of 512 tokens of documents that nothing else reads


def main() -> int:
    """Runs what is missing, prints the table; returns the exit code."""
    options = parse()
    console = Console()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    model = assets.smollm2(console.say)
    texts = split(work)
    arms = [a.strip() for a in options.arms.split(",")] if options.arms else list(ARMS)
    seeds = [int(s) for s in options.seeds.split(",")]
    todo = [("dense", seeds[0]), *((arm, seed) for seed in seeds for arm in arms)]
    for n, (arm, seed) in enumerate(todo, 1):
        key = name_of(arm, seed, options)
        results = read_json(RESULTS) if RESULTS.exists() else {}
        if key in results:
            continue
        console.say(f"\n[{n}/{len(todo)}] {key}", style="bold")
        folder = work / key.replace(" ", "-").replace(",", "").replace(":", "of")
        code = run(arm, seed, model, texts, folder, options)
        if code:
            return code
        RESULTS.parent.mkdir(exist_ok=True)
        write_json(RESULTS, results | {key: measured(folder)})
        console.say("\n".join(table(options)))
    console.say("\n".join(table(options)))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", nargs="?", default="runs/study-recovery")
    parser.add_argument("--arms", help=f"of: {', '.join(ARMS)}; default: all")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--tokens", type=int, default=102400, help="an arm, over all its rungs")
    parser.add_argument("--whole", action="store_true", help="score all of WikiText-2")
    return parser.parse_args()


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


def run(arm: str, seed: int, model: Path, texts: dict, folder: Path, options) -> int:
    """Runs the entry for one arm and seed: training, then the scores; the exit code."""
    on_cpu = not torch.cuda.is_available()
    ranks = ["--num_accelerators", "2"] if on_cpu else ["--num_gpus", "1"]
    common = ["--output_dir", str(folder), "--model.path", str(model), "--name", arm]
    common += ["--calibration.corpus", str(texts["calibration"]), "--calibration.length", "512"]
    common += ["--calibration.seed", str(seed), "--oneshot.refit", "true"]
    if arm == "dense":
        stages, objective = [], None
    else:
        objective, ladder = ARMS[arm]
        stages = ["recover"] if ladder else ["oneshot"] + ["recover"] * bool(objective)
    if objective:
        rungs = max(1, len([r for r in ladder.split(",") if r.strip()]))
        tokens = options.tokens // rungs
        common += ["--recover.corpus", str(texts["training"]), "--recover.length", str(LENGTH)]
        common += ["--recover.batch", str(BATCH), "--recover.micro_batch", "1" if on_cpu else "2"]
        common += ["--recover.tokens", str(tokens), "--recover.seed", str(seed)]
        common += ["--recover.lr", "2e-4", "--recover.deepspeed", "cpu" if on_cpu else "zero2"]
        common += ["--recover.dtype", "bfloat16", "--recover.evaluate_steps", "25"]
        common += ["--recover.checkpoint_steps", "25"]
        for name, weight in (OFF | objective).items():
            common += [f"--recover.objective.{name}", str(weight)]
        if objective.get("fic"):
            common += ["--recover.finetuned", "train"]
        if ladder:
            common += ["--recover.ladder", ladder]
    if stages and (code := entry(ranks, [*common, "--stages", f"[{','.join(stages)}]"])):
        return code
    scored = ["--stages", f"[{','.join([*stages, 'evaluate'])}]", "--evaluate.dense", "false"]
    for corpus, window, most in (
        (texts["c4"], LENGTH, C4_HELD_OUT),
        ("wikitext2", 2048, None if options.whole else FIRST),
    ):
        place = ["--evaluate.corpora", f"[{corpus}]", "--evaluate.window", str(window)]
        place += ["--evaluate.max_windows", str(most)] if most else []
        if code := entry([], [*common, *scored, *place]):
            return code
    return 0


def entry(ranks: list[str], options: list[str]) -> int:
    """Runs the entry, under the launcher where it takes several ranks."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    launcher = (
        [str(Path(sys.executable).with_name("deepspeed")), *ranks] if ranks else [sys.executable]
    )
    command = [*launcher, str(ROOT / "cap_llm" / "train.py"), *options]
    return subprocess.run(command, env=environment, check=False).returncode


def name_of(arm: str, seed: int, options) -> str:
    """How a run is called in the results."""
    scope = "whole" if options.whole else f"first {FIRST}"
    tokens = "" if arm in ("dense", "no training") else f", {options.tokens} tokens"
    return f"{arm}{tokens}, seed {seed}, {scope}"


def measured(folder: Path) -> dict:
    """What a finished run measured, with what a reader needs to compare it."""
    stage = next(s for s in ("recover", "oneshot", "dense") if (folder / s).exists())
    scores = read_json(folder / stage / "perplexity.json")["corpora"]
    facts = read_json(folder / "environment.json")
    result = {
        ("wikitext2" if key.startswith("wikitext2") else "c4"): {
            k: entry[k] for k in ("ppl_token", "window", "windows", "tokens", "bos")
        }
        for key, entry in scores.items()
    }
    if stage == "recover":
        done = read_json(folder / stage / "done.json")
        result |= {"tokens": done["tokens"], "rungs": done["rungs"]}
    if stage != "dense":
        counts = read_json(folder / stage / "sparsity.json")
        result["sparsity"] = counts["pruned_matrices"]["sparsity"]
    versions = {k: facts["versions"][k] for k in ("torch", "transformers", "deepspeed")}
    return result | {"versions": versions, "commit": facts["commit"], "model": assets.MODEL_NAME}


def table(options) -> list[str]:
    """The table of what is there: mean and spread over the seeds, as Markdown lines."""
    results = read_json(RESULTS) if RESULTS.exists() else {}
    scope = "whole test set" if options.whole else f"first {FIRST} windows"
    lines = [
        f"| arm | held-out C4, ppl_token@{LENGTH} | WikiText-2, ppl_token@2048, {scope} | seeds |",
        "| --- | ---: | ---: | ---: |",
    ]
    for arm in ("dense", *ARMS):
        runs = []
        for key, result in results.items():
            seed = key.rsplit("seed ", 1)[1].split(",")[0]
            if key == name_of(arm, int(seed), options):
                runs.append(result)
        if not runs:
            continue
        cells = []
        for corpus in ("c4", "wikitext2"):
            values = [r[corpus]["ppl_token"] for r in runs]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        lines.append(f"| {arm} | {' | '.join(cells)} | {len(runs)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

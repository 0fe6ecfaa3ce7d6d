"""Training-free methods beside each other: one-shot solvers, SDS with its controls, reconstruction.

    CAP_LLM_DATA=... python eval/study_solvers.py [WORK_DIR] [--arms ALPS ...] [--patterns 2:4 ...]

Each cell is a run of the real entry on SmolLM2-135M: calibration on 128 x 512 tokens of C4; scored
on the first 32 windows (2048 tokens) of WikiText-2 and of held-out C4. At 50 % and 2:4 there are
three seeds of the calibration text, and the first one is scored on the whole of WikiText-2 as well.
Finished scores are kept in `eval/results/study_solvers.json` and not repeated; a stopped cell goes
on from its run in WORK_DIR. The tables are written beside it. All of it takes many hours on two
cores, a cell 3 to 30 minutes; `make study` stops at the one-shot arms of the first seed.

The controls of Sparse-Dense-Sparse (SDS), all from the same first prune: C1, a refit on its mask,
is "+ refit"; C2 is the adjustment alone, without the dense step; C3 is the dense step without
regularisers and without adjustment, which must give the first prune again.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]

from cap_llm.runtime.console import Console, quiet_libraries  # noqa: E402

quiet_libraries()

import assets  # noqa: E402

from cap_llm.runtime.files import atomic, read_json, write_json  # noqa: E402

RESULTS = ROOT / "eval" / "results" / "study_solvers.json"
WANDA = ["--oneshot.method", "wanda"]
NOTHING = ["--sds.mu", "0", "--sds.l1", "0", "--sds.l2", "0", "--sds.adjust", "false"]
ONESHOT = {  # arm -> options
    "magnitude": ["--oneshot.method", "magnitude"],
    "Wanda": WANDA,
    "Wanda + refit": [*WANDA, "--oneshot.refit", "true"],
    "SparseGPT": [],
    "SparseGPT + refit": ["--oneshot.refit", "true"],
    "ADMM-grad": ["--oneshot.method", "admm_grad"],
    "ALPS": ["--oneshot.method", "alps"],
}
LATER = {  # arm -> the arm whose model it starts from, stage, options
    "SDS on Wanda": ("Wanda", "sds", WANDA),
    "C2 on Wanda": ("Wanda", "sds", [*WANDA, "--sds.redensify", "false"]),
    "SDS on SparseGPT": ("SparseGPT", "sds", []),
    "C2 on SparseGPT": ("SparseGPT", "sds", ["--sds.redensify", "false"]),
    "C3 on SparseGPT": ("SparseGPT", "sds", [*NOTHING, "--calibration.held_out", "0"]),
    "ALPS + reconstruction": ("ALPS", "reconstruct", []),
    "ALPS + reconstruction, student": (
        "ALPS",
        "reconstruct",
        ["--reconstruct.inputs", "student"],
    ),
}
ARMS = (*ONESHOT, *LATER)
PATTERNS = {
    "50 %": ["--oneshot.sparsity", "0.5"],
    "2:4": ["--oneshot.pattern", "2:4"],
    "60 %": ["--oneshot.sparsity", "0.6"],
    "70 %": ["--oneshot.sparsity", "0.7"],
    "4:8": ["--oneshot.pattern", "4:8"],
}
SEVERAL = ("50 %", "2:4")  # three seeds, and the whole test set for the first
FIRST = 32  # windows
SCORES = {  # what is scored together: its keys in the results, options
    "first": (
        {"wikitext2": f"wikitext2@2048 first {FIRST}", "c4": f"c4@2048 first {FIRST}"},
        ["--evaluate.corpora", "[wikitext2, c4]", "--evaluate.max_windows", str(FIRST)],
    ),
    "whole": ({"whole": "wikitext2@2048"}, ["--evaluate.corpora", "[wikitext2]"]),
}


def main() -> int:
    """Runs the cells that are missing, prints the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", nargs="?", type=Path, default=Path("runs/study-solvers"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--seeds", nargs="+", type=int, choices=range(3), default=[0, 1, 2])
    args = parser.parse_args()
    console = Console()
    model = assets.smollm2(console.say)
    cells = [("dense", "", 0, "first"), ("dense", "", 0, "whole")]
    cells += [
        (arm, pattern, seed, scores)
        for seed in args.seeds
        for scores in SCORES
        for pattern in args.patterns
        for arm in args.arms
        if pattern in SEVERAL or (seed == 0 and scores == "first")
        if seed == 0 or scores == "first"
    ]
    for n, (arm, pattern, seed, scores) in enumerate(cells, 1):
        name = name_of(arm, pattern, seed)
        keys, options = SCORES[scores]
        if all(key in results().get(name, {}) for key in keys):
            continue
        console.say(f"\n[{n}/{len(cells)}] {name}, {', '.join(keys.values())}", style="bold")
        if code := run(arm, pattern, seed, model, args.work, options):
            return code
        RESULTS.parent.mkdir(exist_ok=True)
        known = results()
        known[name] = known.get(name, {}) | measured(arm, pattern, seed, args.work, keys)
        write_json(RESULTS, known)
        write_tables()
        console.say("\n".join(summary()))
    write_tables()
    console.say("\n".join(summary()))
    return 0


def name_of(arm: str, pattern: str, seed: int) -> str:
    """A cell's key in the results."""
    return arm if arm == "dense" else f"{arm}, {pattern}, seed {seed}"


def folder_of(arm: str, pattern: str, seed: int, work: Path) -> Path:
    """A cell's run directory."""
    name = name_of(arm, pattern, seed).lower().replace(":", "of").replace(" %", "")
    return work / name.replace(",", "").replace(" + ", "-").replace(" ", "-")


def run(arm: str, pattern: str, seed: int, model: Path, work: Path, scores: list[str]) -> int:
    """Runs the entry for one cell, after the one that it starts from; the exit code."""
    options = ["--calibration.length", "512", "--calibration.seed", str(seed)]
    options += PATTERNS.get(pattern, [])
    stages, start = ["oneshot"], model
    if arm == "dense":
        stages = []
    elif arm in ONESHOT:
        options += ONESHOT[arm]
    else:
        base, stage, more = LATER[arm]
        if code := run(base, pattern, seed, model, work, []):
            return code
        stages, start = [stage], folder_of(base, pattern, seed, work) / "oneshot"
        options += [*more, "--model.dense", str(model)]
    if scores:
        stages = [*stages, "evaluate"]
        options += ["--evaluate.window", "2048", *scores]
        options += ["--evaluate.dense", "true" if arm == "dense" else "false"]
    command = [
        *(sys.executable, str(ROOT / "cap_llm/train.py"), "--model.path", str(start)),
        *("--output_dir", str(folder_of(arm, pattern, seed, work))),
        *("--stages", f"[{', '.join(stages)}]", *options),
    ]
    return subprocess.run(command, check=False).returncode


def results() -> dict:
    """What is measured already, by cell."""
    return read_json(RESULTS) if RESULTS.exists() else {}


def measured(arm: str, pattern: str, seed: int, work: Path, keys: dict[str, str]) -> dict:
    """What a finished cell measured, with what a reader needs to compare it."""
    folder = folder_of(arm, pattern, seed, work)
    if arm == "dense":
        made, last = [], folder / "dense"
    elif arm in ONESHOT:
        made = [last := folder / "oneshot"]
    else:
        base, stage, _ = LATER[arm]
        made = [folder_of(base, pattern, seed, work) / "oneshot", last := folder / stage]
    corpora = read_json(last / "perplexity.json")["corpora"]
    result = {name: corpora[key]["ppl_token"] for name, key in keys.items()}
    if made:
        done = [read_json(stage / "done.json") for stage in made]
        result["seconds"] = round(sum(d["seconds"] for d in done), 1)
        result["peak_memory_bytes"] = max(d["peak_memory_bytes"] for d in done)
        result["calibration"] = done[-1]["calibration"]
        counts = read_json(last / "sparsity.json")
        result["sparsity"] = counts["pruned_matrices"]["sparsity"]
        kept = [row["kept"] for row in counts["rows"] if row.get("kept")]
        if kept:
            result["kept"] = {k: kept.count(k) for k in dict.fromkeys(kept)}
        if "blocks" in counts:
            result["epochs"] = [block["epoch"] for block in counts["blocks"]]
    return result | assets.provenance(folder)


def summary() -> list[str]:
    """One table, arms by patterns, of the first seed: WikiText-2, as much as was scored."""
    there = results()
    wholly = {p: p in SEVERAL for p in PATTERNS}
    head = [f"{p} ({'whole' if w else f'first {FIRST}'})" for p, w in wholly.items()]

    def cells(arm: str) -> list[str]:
        found = [there.get(name_of(arm, p, 0), {}) for p in PATTERNS]
        keys = ["whole" if w else "wikitext2" for w in wholly.values()]
        return [f"{r[k]:.2f}" if k in r else "" for r, k in zip(found, keys, strict=True)]

    rows = [[arm, *cells(arm)] for arm in ("dense", *ARMS)]
    return markdown(["WikiText-2, ppl_token@2048", *head], [r for r in rows if any(r[1:])])


def details() -> list[str]:
    """One table a pattern: scores with their spread over seeds, seconds and memory."""
    there, lines = results(), []
    head = [f"WikiText-2, first {FIRST}", f"C4, first {FIRST}", "WikiText-2, whole"]

    def scores(cells: list[dict]) -> list[str]:
        keys = ("wikitext2", "c4", "whole")
        return [_spread([cell[key] for cell in cells if key in cell]) for key in keys]

    for pattern in PATTERNS:
        rows = []
        for arm in ARMS:
            seeds = [r for s in range(3) if (r := there.get(name_of(arm, pattern, s)))]
            if seeds:
                gib = seeds[0]["peak_memory_bytes"] / 2**30
                rows.append([arm, *scores(seeds), f"{seeds[0]['seconds']:.0f}", f"{gib:.1f}"])
        if rows:
            rows.insert(0, ["dense", *scores([there["dense"]]), "", ""])
            lines += [*markdown([pattern, *head, "seconds", "GiB"], rows), ""]
    return lines


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table's lines."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def write_tables() -> None:
    """Writes `study_solvers.md` and, where two sparsities can be joined, `study_solvers.png`."""
    page = ["# Training-free methods on SmolLM2-135M", "", *_note(), "", *details()]
    drawn = figure(RESULTS.with_suffix(".png"))
    page += [f"![perplexity over sparsity]({RESULTS.stem}.png)"] if drawn else []
    with atomic(RESULTS.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(page).rstrip() + "\n")


def _note() -> list[str]:
    return [
        f"Made by `python eval/study_solvers.py` of {assets.MODEL_NAME}:",
        "calibration on 128 x 512 tokens of C4, ppl_token at windows of 2048, mean ± standard",
        "deviation where there are several seeds. Seconds and memory are those of all its pruning,",
        "for the first seed, on two cores; other work may have run beside it.",
    ]


def figure(path: Path) -> bool:
    """Draws perplexity over sparsity (unstructured, seed 0, first windows); whether it did."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    there = results()
    axes = plt.figure(figsize=(7, 4.5), layout="constrained").gca()
    for arm in ARMS:
        cells = {int(p.split()[0]): there.get(name_of(arm, p, 0), {}) for p in PATTERNS if "%" in p}
        points = sorted((s, cell["wikitext2"]) for s, cell in cells.items() if "wikitext2" in cell)
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker="o", label=arm)
    drawn = bool(axes.lines)
    if drawn:
        axes.set(xlabel="zeros, %", ylabel=f"WikiText-2 ppl_token@2048, first {FIRST} windows")
        axes.set_yscale("log")
        axes.legend(fontsize=8)
        plt.savefig(path, dpi=120)
    plt.close()
    return drawn


if __name__ == "__main__":
    sys.exit(main())

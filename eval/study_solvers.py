"""Training-free methods beside each other: solvers, SDS with its controls, block reconstruction.

    CAP_LLM_DATA=... python eval/study_solvers.py [WORK_DIR] [--arms ALPS ...] [--patterns 2:4 ...]

Each cell is a run of the real entry on SmolLM2-135M: calibration on 128 x 512 tokens of C4; scored
on the first 32 windows (2048 tokens) of WikiText-2 and of held-out C4. At 50 % and 2:4 there are
three seeds of the calibration text, and the first one is scored on the whole of WikiText-2 as well.
Finished cells are kept in `eval/results/study_solvers.json` and not repeated; a stopped one goes on
from its run in WORK_DIR. All of it takes many hours on two cores, a cell 6 to 20 minutes.

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

from cap_llm.runtime.files import read_json, write_json  # noqa: E402

RESULTS = ROOT / "eval" / "results" / "study_solvers.json"
FIGURE = RESULTS.with_suffix(".png")
MAGNITUDE, WANDA = ["--oneshot.method", "magnitude"], ["--oneshot.method", "wanda"]
ALPS = ["--oneshot.method", "alps"]
NOTHING = ["--sds.mu", "0", "--sds.l1", "0", "--sds.l2", "0", "--sds.adjust", "false"]
ARMS = {  # stages after oneshot, options
    "magnitude": ([], MAGNITUDE),
    "Wanda": ([], WANDA),
    "Wanda + refit": ([], [*WANDA, "--oneshot.refit", "true"]),
    "SparseGPT": ([], []),
    "SparseGPT + refit": ([], ["--oneshot.refit", "true"]),
    "ADMM-grad": ([], ["--oneshot.method", "admm_grad"]),
    "ALPS": ([], ALPS),
    "SDS on Wanda": (["sds"], WANDA),
    "C2 on Wanda": (["sds"], [*WANDA, "--sds.redensify", "false"]),
    "SDS on SparseGPT": (["sds"], []),
    "C2 on SparseGPT": (["sds"], ["--sds.redensify", "false"]),
    "C3 on SparseGPT": (["sds"], [*NOTHING, "--calibration.held_out", "0"]),
    "ALPS + reconstruction": (["reconstruct"], ALPS),
    "ALPS + reconstruction, student": (
        ["reconstruct"],
        [*ALPS, "--reconstruct.inputs", "student"],
    ),
}
PATTERNS = {
    "2:4": ["--oneshot.pattern", "2:4"],
    "50 %": ["--oneshot.sparsity", "0.5"],
    "60 %": ["--oneshot.sparsity", "0.6"],
    "70 %": ["--oneshot.sparsity", "0.7"],
    "4:8": ["--oneshot.pattern", "4:8"],
}
SEVERAL = ("2:4", "50 %")  # three seeds, and the whole test set for the first
FIRST = 32  # windows


def main() -> int:
    """Runs the cells that are missing, prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", nargs="?", type=Path, default=Path("runs/study-solvers"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--seeds", nargs="+", type=int, choices=range(3), default=[0, 1, 2])
    parser.add_argument("--no-whole", action="store_true", help="leave the whole test set out")
    args = parser.parse_args()
    console = Console()
    model = assets.smollm2(console.say)
    if code := cell(console, model, args.work, "dense", [], [], whole=not args.no_whole):
        return code
    for whole in (False, True):  # first of all what the arms are compared by
        for seed in args.seeds:
            for pattern in args.patterns:
                for arm in args.arms:
                    several = pattern in SEVERAL
                    if (seed and not several) or (whole and (args.no_whole or seed or not several)):
                        continue
                    stages, options = ARMS[arm]
                    options = [*PATTERNS[pattern], *options, "--calibration.seed", str(seed)]
                    name = f"{arm}, {pattern}, seed {seed}"
                    if code := cell(console, model, args.work, name, stages, options, whole):
                        return code
    console.say("\n".join(table()))
    figure()
    return 0


def cell(
    console: Console,
    model: Path,
    work: Path,
    name: str,
    stages: list[str],
    options: list[str],
    whole: bool,
) -> int:
    """Measures one cell, unless it is known; the exit code."""
    known = results().get(name, {})
    if "wikitext2" in known and ("whole" in known or not whole):
        return 0
    console.say(f"\n{name}", style="bold")
    slug = name.lower().replace(" %", "").replace(",", "").replace(" + ", "-").replace(" ", "-")
    folder = work / slug.replace(":", "of")
    stages = [] if name == "dense" else ["oneshot", *stages]
    command = [
        *(sys.executable, str(ROOT / "cap_llm/train.py"), "--output_dir", str(folder)),
        *("--model.path", str(model), "--calibration.length", "512", "--evaluate.window", "2048"),
        *("--stages", f"[{', '.join([*stages, 'evaluate'])}]", *options),
        *("--evaluate.dense", "true" if name == "dense" else "false"),
    ]
    scored = {"[wikitext2, c4]": ["--evaluate.max_windows", str(FIRST)]}
    if whole:
        scored["[wikitext2]"] = []
    for corpora, more in scored.items():
        code = subprocess.run([*command, "--evaluate.corpora", corpora, *more], check=False)
        if code.returncode:
            return code.returncode
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, results() | {name: measured(folder, stages)})
    return 0


def results() -> dict:
    """What is measured already, by cell."""
    return read_json(RESULTS) if RESULTS.exists() else {}


def measured(folder: Path, stages: list[str]) -> dict:
    """What a finished run measured, with what a reader needs to compare it."""
    last = folder / (stages[-1] if stages else "dense")
    corpora = read_json(last / "perplexity.json")["corpora"]
    facts = read_json(folder / "environment.json")
    keys = {"wikitext2": f"wikitext2@2048 first {FIRST}", "c4": f"c4@2048 first {FIRST}"}
    keys["whole"] = "wikitext2@2048"
    result = {name: corpora[key]["ppl_token"] for name, key in keys.items() if key in corpora}
    done = [read_json(folder / stage / "done.json") for stage in stages]
    if done:
        result["seconds"] = round(sum(d["seconds"] for d in done), 1)
        result["peak_memory_bytes"] = max(d["peak_memory_bytes"] for d in done)
        result["calibration"] = done[-1]["calibration"]
        counts = read_json(last / "sparsity.json")
        result["sparsity"] = counts["pruned_matrices"]["sparsity"]
        kept = [row.get("kept") for row in counts["rows"] if row.get("kept")]
        if kept:
            result["kept"] = {k: kept.count(k) for k in dict.fromkeys(kept)}
    versions = {k: facts["versions"][k] for k in ("torch", "transformers")}
    return result | {"versions": versions, "commit": facts["commit"], "model": assets.MODEL_NAME}


def table() -> list[str]:
    """The tables of what is there, as Markdown lines: one a pattern, arms by measures."""
    there = results()
    lines = []
    for pattern in PATTERNS:
        rows = []
        for arm in ARMS:
            seeds = [there[c] for s in range(3) if (c := f"{arm}, {pattern}, seed {s}") in there]
            if not seeds:
                continue
            rows.append(
                [
                    arm,
                    *(_spread([r[key] for r in seeds]) for key in ("wikitext2", "c4")),
                    f"{seeds[0]['whole']:.2f}" if "whole" in seeds[0] else "-",
                    f"{seeds[0]['seconds']:.0f}",
                    f"{seeds[0]['peak_memory_bytes'] / 2**30:.1f}",
                ]
            )
        if not rows:
            continue
        if "dense" in there:
            dense = there["dense"]
            whole = f"{dense['whole']:.2f}" if "whole" in dense else "-"
            scores = [f"{dense[key]:.2f}" for key in ("wikitext2", "c4")]
            rows.insert(0, ["dense", *scores, whole, "-", "-"])
        columns = [pattern, f"WikiText-2, first {FIRST}", f"C4, first {FIRST}", "WikiText-2, whole"]
        columns += ["seconds", "GiB"]
        lines += ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    return lines


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def figure() -> None:
    """Perplexity over sparsity (unstructured, seed 0, first windows), to `study_solvers.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    there = results()
    axes = plt.figure(figsize=(7, 4.5), layout="constrained").gca()
    for arm in ARMS:
        cells = {p: there.get(f"{arm}, {p}, seed 0") for p in PATTERNS if "%" in p}
        points = [(int(p.split()[0]), c["wikitext2"]) for p, c in cells.items() if c]
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker="o", label=arm)
    if axes.lines:
        axes.set(xlabel="zeros, %", ylabel=f"WikiText-2 ppl_token@2048, first {FIRST} windows")
        axes.set_yscale("log")
        axes.legend(fontsize=8)
        plt.savefig(FIGURE, dpi=120)
    plt.close()


if __name__ == "__main__":
    sys.exit(main())

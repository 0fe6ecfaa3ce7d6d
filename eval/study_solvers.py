"""Training-free methods side by side: one-shot solvers, SDS with its controls, reconstruction.

    CAP_LLM_DATA=... python eval/study_solvers.py [WORK_DIR] [--arms ALPS ...] [--patterns 2:4 ...]

Each cell is a run of the real entry on SmolLM2-135M, calibrated on 128 x 512 tokens of C4 and
scored on the first 32 windows (2048 tokens) of WikiText-2 and of held-out C4. At 50% and 2:4 there
are three seeds of the calibration text, and the first seed is scored on the whole of WikiText-2 as
well. The most informative cells come first: the main arms at 2:4 and 50%, first seed.

There are 110 cells. By their operation counts at 200 Gflop/s, the rate of two cores, they take
about 33 hours on an otherwise idle machine: 12 of scoring, 18 of pruning, and 3 for SDS in mode
`paper`, which comes last. `make study` stops at the one-shot arms of the first seed.

Finished scores are kept in `eval/results/study_solvers.json` and not repeated; an interrupted cell
resumes from its run in WORK_DIR. A cell that fails is named at the end (exit code 1). Weights are
deleted when they are fully scored and no other cell of this call starts from them, so WORK_DIR
holds at most seven models (4 GB), or more if `--scores first` postpones the whole test set. The
tables are written beside the results.

The controls of Sparse-Dense-Sparse (SDS): C1 is "+ refit", which refits each matrix as soon as it
is pruned, so later ones are pruned on refitted inputs: the same method, but different masks. C2 is
the adjustment alone, from SDS' own first prune, without the dense step. C3 is the dense step
without regularizers and without adjustment; it gives that prune again except for rounding errors
in a whole model. Reconstruction starts from ALPS and, as its control, from SparseGPT, because its
gain may not be the solver's merit.
"""

from __future__ import annotations

import collections
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import tables
from tables import arguments, markdown, mean_and_spread

from cap_llm.cli import assets
from cap_llm.cli.matrix import DENSE, Matrix, Row
from cap_llm.evaluation.scores import FILE, read_scores
from cap_llm.models import mask_file as masks
from cap_llm.models.files import remove_weights
from cap_llm.runtime.console import Console
from cap_llm.runtime.files import atomic, read_json

RESULTS = tables.RESULTS / "study_solvers.json"
SEEDS = range(3)
Cell = tuple[str, str, int]  # arm, pattern, seed

WANDA, REFIT = {"oneshot.method": "wanda"}, {"oneshot.refit": True}
# bfloat16 is what a GPU takes by default, five epochs are what the recipes have
RECONSTRUCT = {"reconstruct.dtype": "bfloat16", "reconstruct.epochs": 5}
TWO = RECONSTRUCT | {"reconstruct.epochs": 2}
ONLY = {"sds.redensify": False}  # the adjustment
NOTHING = {"sds.mu": 0, "sds.l1": 0, "sds.l2": 0, "sds.adjust": False, "calibration.held_out": 0}
ONESHOT = {  # arm -> options
    "magnitude": {"oneshot.method": "magnitude"},
    "Wanda": WANDA,
    "Wanda + refit": WANDA | REFIT,
    "SparseGPT": {},
    "SparseGPT + refit": REFIT,
    "ADMM-grad": {"oneshot.method": "admm_grad"},
    "ALPS": {"oneshot.method": "alps"},
}
LATER = {  # arm -> the arm whose model it starts from, stage, options
    "SDS on Wanda": ("Wanda", "sds", WANDA),
    "C2 on Wanda": ("Wanda", "sds", WANDA | ONLY),
    "SDS on SparseGPT": ("SparseGPT", "sds", {}),
    "C2 on SparseGPT": ("SparseGPT", "sds", ONLY),
    "C3 on SparseGPT": ("SparseGPT", "sds", NOTHING),
    "SDS (paper) on SparseGPT": ("SparseGPT", "sds", {"sds.mode": "paper"}),
    "SparseGPT + reconstruction": ("SparseGPT", "reconstruct", RECONSTRUCT),
    "ALPS + reconstruction": ("ALPS", "reconstruct", RECONSTRUCT),
    "ALPS + reconstruction, 2 epochs": ("ALPS", "reconstruct", TWO),
    "ALPS + reconstruction, dense inputs, 2 epochs": (
        *("ALPS", "reconstruct"),
        TWO | {"reconstruct.inputs": "dense"},
    ),
}
ARMS = (*ONESHOT, *LATER)
CONTROLS = {  # C1 and C2 of each SDS
    "SDS on Wanda": ("Wanda + refit", "C2 on Wanda"),
    "SDS on SparseGPT": ("SparseGPT + refit", "C2 on SparseGPT"),
    "SDS (paper) on SparseGPT": ("SparseGPT + refit", "C2 on SparseGPT"),
}
MAIN = (  # arms that come first
    *("SparseGPT", "SparseGPT + refit", "ALPS", "ALPS + reconstruction"),
    *("SDS on SparseGPT", "C2 on SparseGPT", "Wanda", "SDS on Wanda"),
)
# At 2:4 with one seed alone: controls, other settings of reconstruction, and what takes hours.
ONCE = (
    *("C3 on SparseGPT", "SparseGPT + reconstruction", "ALPS + reconstruction, 2 epochs"),
    *("ALPS + reconstruction, dense inputs, 2 epochs", "SDS (paper) on SparseGPT"),
)
PATTERNS = {
    "2:4": {"oneshot.pattern": "2:4"},
    "50%": {"oneshot.sparsity": 0.5},
    "60%": {"oneshot.sparsity": 0.6},
    "70%": {"oneshot.sparsity": 0.7},
    "4:8": {"oneshot.pattern": "4:8"},
}
SEVERAL = ("2:4", "50%")  # three seeds, and the whole test set for the first
FIRST = 32  # windows
COMMON = {"calibration.length": 512, "evaluate.window": 2048, "evaluate.dense": False}
SCORES = {  # what is scored together: its keys in the results with the scores' names, options
    "first": (
        {"wikitext2": f"wikitext2@2048 first {FIRST}", "c4": f"c4@2048 first {FIRST}"},
        {"evaluate.corpora": ["wikitext2", "c4"], "evaluate.max_windows": FIRST},
    ),
    "whole": ({"whole": "wikitext2@2048"}, {"evaluate.corpora": ["wikitext2"]}),
}


def main() -> int:
    """Runs the missing cells and prints the tables; returns the exit code."""
    parser = arguments(__doc__)
    add = parser.add_argument
    add("work", nargs="?", type=Path, default=Path("runs/study-solvers"))
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    add("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    add("--scores", nargs="+", choices=SCORES, default=list(SCORES))
    args = parser.parse_args()
    console = Console()
    runs = Matrix(args.work, assets.smollm2(console.say), COMMON)
    cells = {name_of(cell): cell for cell in plan(args.arms, args.patterns, args.seeds)}

    def work(row: Row) -> int:
        cell = cells[row.name]
        for scores in (s for s in missing(cell) if s in args.scores):
            keys, options = SCORES[scores]
            if code := runs.run(row, options):
                return code
            figures = results().get(row.name, {}) | measured(cell, runs, keys)
            tables.record(RESULTS, row.name, figures)
            write_tables()
            console.say("\n".join(summary()))
        clear(list(cells.values()), runs)
        return 0

    wanted = [c for c in cells.values() if set(missing(c)) & set(args.scores)]
    code = runs.run_all([row_of(cell) for cell in wanted], work, console)
    write_tables()
    console.say("\n".join(summary()))
    return code


# The cells


def plan(arms: list[str], patterns: list[str], seeds: list[int]) -> list[Cell]:
    """The cells of these arms, patterns and seeds, in the order in which they are run."""

    def wanted(arm: str, pattern: str, seed: int) -> bool:
        if arm in ONCE:
            return (pattern, seed) == ("2:4", 0)
        return seed == 0 or (pattern in SEVERAL and arm != "magnitude")  # it reads no text

    def place(cell: Cell) -> tuple:
        arm, pattern, seed = cell
        if arm in MAIN and pattern in SEVERAL and seed == 0:
            return 0, SEVERAL.index(pattern), MAIN.index(arm)
        return (2,) if arm == ONCE[-1] else (1, seed)

    every = ((a, p, s) for s in SEEDS for p in PATTERNS for a in ARMS if wanted(a, p, s))
    chosen = [(a, p, s) for a, p, s in every if a in arms and p in patterns and s in seeds]
    return [("dense", "", 0), *sorted(chosen, key=place)]


def missing(cell: Cell) -> list[str]:
    """What of SCORES is still to be measured of a cell."""
    arm, pattern, seed = cell
    known = results().get(name_of(cell), {})
    whole = seed == 0 and (arm == DENSE or pattern in SEVERAL)
    asked = ["first", "whole"] if whole else ["first"]
    return [scores for scores in asked if not known.keys() >= SCORES[scores][0].keys()]


def name_of(cell: Cell) -> str:
    """A cell's key in the results."""
    arm, pattern, seed = cell
    return arm if arm == DENSE else f"{arm}, {pattern}, seed {seed}"


def row_of(cell: Cell) -> Row:
    """The run that makes a cell's model."""
    arm, pattern, seed = cell
    if arm == DENSE:
        return Row(DENSE, stage=DENSE)
    base, stage, options = LATER.get(arm, (None, "oneshot", ONESHOT.get(arm)))
    start = {"model.path": row_of((base, pattern, seed))} if base else {}
    options = {"name": f"{arm} {pattern}", "calibration.seed": seed} | PATTERNS[pattern] | options
    return Row(name_of(cell), options | start, stage)


def base_of(cell: Cell) -> Cell:
    """The cell whose model a cell starts from; itself if it starts from the dense one."""
    arm, pattern, seed = cell
    return (LATER[arm][0] if arm in LATER else arm), pattern, seed


def clear(cells: list[Cell], runs: Matrix) -> None:
    """Deletes weights that are fully scored and that no unfinished cell of `cells` starts from."""
    needed = {base_of(cell) for cell in cells if missing(cell)}
    for cell in {*cells, *map(base_of, cells)} - needed:
        if not missing(cell):
            model = runs.model_of(row_of(cell))
            remove_weights(model)
            (model / masks.FILE).unlink(missing_ok=True)


# The results


def results() -> dict:
    """The figures that are measured already, by cell."""
    return tables.read_results(RESULTS)


def measured(cell: Cell, runs: Matrix, keys: dict[str, str]) -> dict:
    """What a finished cell measured, with what a reader needs to compare it."""
    last = runs.model_of(row_of(cell))
    scores = {score.name: score.value for score in read_scores(last / FILE).scores}
    result = {key: scores[name] for key, name in keys.items()}
    if cell[0] != DENSE:
        made = dict.fromkeys((runs.model_of(row_of(base_of(cell))), last))
        done = [read_json(stage / "done.json") for stage in made]
        result["seconds"] = round(sum(d["seconds"] for d in done), 1)
        result["peak_memory_bytes"] = max(d["peak_memory_bytes"] for d in done)
        result["calibration"] = done[-1]["calibration"]
        counts = read_json(last / "sparsity.json")
        result["sparsity"] = counts["pruned_matrices"]["sparsity"]
        errors = [row["error"] for row in counts["rows"] if row["error"] is not None]
        if errors:
            result["layer_error"] = statistics.mean(errors)
        kept = [row["kept"] for row in counts["rows"] if row.get("kept")]
        if kept:
            result["kept"] = collections.Counter(kept)
        if "blocks" in counts:
            result["epochs"] = [block["epoch"] for block in counts["blocks"]]
    return result | assets.provenance(last.parent)


def by_seed(pattern: str, key: str, *arms: str) -> list[tuple[float, ...]]:
    """A score of some arms, a tuple for each seed that all of them have; `dense` has every one."""
    known = results()
    cells = ([known.get(name_of((a, pattern, s)), {}) for a in arms] for s in SEEDS)
    return [tuple(c[key] for c in row) for row in cells if all(key in c for c in row)]


def score(pattern: str, key: str, arm: str) -> str:
    """An arm's score over its seeds, as a table shows it; `dense` has one."""
    values = [value for (value,) in by_seed(pattern, key, arm)]
    return mean_and_spread(values[:1] if arm == DENSE else values)


def percent(pattern: str, formula: Callable[..., float], *arms: str, form: str = ".1f") -> str:
    """A share of the WikiText-2 perplexities (first windows) of some arms, paired by seed."""
    shares = [100 * formula(*ppls) for ppls in by_seed(pattern, "wikitext2", *arms)]
    return f"{mean_and_spread(shares, form)}%" if shares else ""


def relative_to(pattern: str, arm: str, other: str) -> str:
    """How far an arm's perplexity lies from another one's."""
    return percent(pattern, lambda a, b: a / b - 1, arm, other, form="+.1f")


def gap_closed(pattern: str, arm: str, base: str) -> str:
    """How much of the gap between an arm's start and the dense model it closes."""
    return percent(pattern, lambda a, b, d: (b - a) / (b - d), arm, base, "dense")


def against_controls(pattern: str, key: str, sds: str) -> str:
    """What SDS gives less the better one of its controls C1 and C2, paired by seed; a verdict."""
    rows = by_seed(pattern, key, sds, *CONTROLS[sds])
    if not rows:
        return ""
    own, *controls = zip(*rows, strict=True)
    means = [statistics.mean(control) for control in controls]
    best = means.index(min(means))
    differences = [a - b for a, b in zip(own, controls[best], strict=True)]
    mean = statistics.mean(differences)
    if len(rows) == 1:
        verdict = "one seed"
    elif abs(mean) <= statistics.stdev(differences):
        verdict = "within the spread"
    else:
        verdict = "better" if mean < 0 else "no better"
    return f"{mean_and_spread(differences, '+.2f')} (C{best + 1}, {verdict})"


# The page


def summary() -> list[str]:
    """One table, arms by patterns: WikiText-2, its first windows and the whole test set."""
    keys = [(p, "wikitext2") for p in PATTERNS] + [(p, "whole") for p in SEVERAL]
    head = [pattern if key != "whole" else f"{pattern}, whole" for pattern, key in keys]

    rows = [[arm, *(score(*key, arm) for key in keys)] for arm in (DENSE, *ARMS)]
    title = f"WikiText-2, first {FIRST} windows"
    return markdown([title, *head], [r for r in rows if any(r[1:])])


def details(pattern: str) -> list[str]:
    """A pattern's table, and what its stages kept; no lines before there is a score."""
    keys = {"wikitext2": f"WikiText-2, first {FIRST}", "c4": f"C4, first {FIRST}"}
    keys |= {"whole": "WikiText-2, whole"} if pattern in SEVERAL else {}
    others = ["to SparseGPT", "gap closed", "layer error", "seconds", "GiB"]
    empty, rows, notes = [""] * len(others), [], []
    for arm in ARMS:
        scores = [score(pattern, key, arm) for key in keys]
        if not any(scores):
            continue
        closed = gap_closed(pattern, arm, "SparseGPT").removeprefix("-0.0%")
        closed = "" if closed.startswith("-") else closed
        beside = [relative_to(pattern, arm, "SparseGPT"), closed]
        first = results().get(name_of((arm, pattern, 0)), {})
        rows.append([arm, *scores, *beside, *_costs(first)])
        notes += _kept(arm, pattern, first)
        if arm in CONTROLS:
            differences = [against_controls(pattern, key, arm) for key in keys]
            if any(differences):
                rows.append(["– less its best control", *differences, *empty])
    if not rows:
        return []
    rows.insert(0, ["dense", *(score(pattern, key, "dense") for key in keys), *empty])
    alone = relative_to(pattern, "ALPS", "SparseGPT")
    both = relative_to(pattern, "ALPS + reconstruction", "SparseGPT + reconstruction")
    if alone and both:
        notes.append(f"- ALPS to SparseGPT: {alone}; the one reconstructed to the other: {both}")
    table = markdown([pattern, *keys.values(), *others], rows)
    return [f"## {pattern}", "", *table, "", *notes, *[""] * bool(notes)]


def _costs(cell: dict) -> list[str]:
    """Layer error, seconds and GiB of a cell."""
    forms = {"layer_error": (1, ".4f"), "seconds": (1, ".0f"), "peak_memory_bytes": (2**30, ".1f")}
    return [f"{cell[k] / unit:{form}}" if k in cell else "" for k, (unit, form) in forms.items()]


def _kept(arm: str, pattern: str, cell: dict) -> list[str]:
    """What a later stage kept, and what reconstruction is worth beside its own start."""
    if "kept" in cell:
        kept = ", ".join(f"{name} {n}" for name, n in cell["kept"].items())
        return [f"- {arm}: weights kept, by matrix: {kept}"]
    if "epochs" in cell:
        counts = sorted(collections.Counter(cell["epochs"]).items())
        epochs = ", ".join(f"{epoch} in {n} blocks" for epoch, n in counts)
        base = LATER[arm][0]
        closed = gap_closed(pattern, arm, base)
        worth = f"closes {closed} of the gap that {base} leaves; " if closed else ""
        return [f"- {arm}: {worth}epochs that paid: {epochs}"]
    return []


def write_tables() -> None:
    """Writes `study_solvers.md` and, where two sparsities can be joined, `study_solvers.png`."""
    page = ["# Training-free methods on SmolLM2-135M", "", *NOTE, "", *summary(), ""]
    for pattern in PATTERNS:
        page += details(pattern)
    drawn = figure(RESULTS.with_suffix(".png"))
    page += [f"![perplexity over sparsity]({RESULTS.stem}.png)"] if drawn else []
    with atomic(RESULTS.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")


NOTE = f"""\
Made by `python eval/study_solvers.py` of {assets.MODEL_NAME}:
calibration on 128 x 512 tokens of C4, ppl_token at windows of 2048, mean ± standard deviation
where there are several seeds. SDS and reconstruction see 16 more sequences, of other documents, by
which they judge what they made; the one-shot methods do not. Reconstruction is of five epochs on
the pruned model's own activations and multiplies in bfloat16, unless its name says otherwise.

"To SparseGPT" and "gap closed" (of the gap between SparseGPT and the dense model) are of
WikiText-2's first {FIRST} windows, paired by seed. Under SDS stands what it gives less the better
of its controls, also paired by seed: C1 is the refit (of each matrix as soon as it is pruned, so
that its later masks are not SDS'), C2 the adjustment of SDS' own first prune without the dense
step, and "within the spread" means a mean that is no larger than its standard deviation. The layer
error is the mean, over matrices, of the relative squared error that the last stage left on its
calibration text (of Wanda, on its first 16 sequences). It, seconds and memory are of the first
seed; seconds and memory those of all its pruning on two cores; other work may have run beside
it.""".split("\n")


def figure(path: Path) -> bool:
    """Draws perplexity over sparsity (unstructured, seed 0, first windows); whether it did.

    Magnitude, whose thousands would squeeze all others into one band, and controls are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    page = plt.figure(figsize=(8.5, 4.5), layout="constrained")
    axes = page.gca()
    arms = [a for a in ARMS if a != "magnitude" and a not in ONCE and not a.startswith("C2")]
    sparsities = {pattern: int(pattern[:-1]) for pattern in PATTERNS if "%" in pattern}
    for arm, marker, color in zip(arms, "osDd^v<>PX*", plt.get_cmap("tab20").colors, strict=False):
        cells = {s: results().get(name_of((arm, p, 0)), {}) for p, s in sparsities.items()}
        points = sorted((s, cell["wikitext2"]) for s, cell in cells.items() if "wikitext2" in cell)
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, color=color, label=arm)
    drawn = any(len(line.get_xdata()) > 1 for line in axes.lines)
    if drawn:
        for (ppl,) in by_seed("", "wikitext2", DENSE)[:1]:
            axes.axhline(ppl, color="black", ls="--", lw=1, label=DENSE)
        axes.set(xlabel="zeros, %", ylabel=f"WikiText-2 ppl_token@2048, first {FIRST} windows")
        axes.set(yscale="log", xticks=list(sparsities.values()))
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for numbers in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            numbers("{x:.0f}")
        page.legend(fontsize=8, loc="outside right upper")
        plt.savefig(path, dpi=120)
    plt.close()
    return drawn


if __name__ == "__main__":
    sys.exit(main())

"""The README's recovery table: what each term of the objective is worth, on SmolLM2-135M.

    CAP_LLM_DATA=... python eval/study_recovery.py [WORK_DIR] [--arms "KL,KL + PrC"] [--seeds 0,1]
                     [--tokens 98304] [--whole] [--model DIR] [--set recover.optimizer.lr=1e-4 ...]

The arms of a seed start from one pruned model (SparseGPT + refit), see the same tokens in the same
order, and differ only in their objective; the seed draws calibration, text, order and units. Arms
with a ladder start from the dense model and see the same text, split evenly over their rungs, so
compare them with each other. "dense + cross-entropy" is the dense model trained on these tokens: it
shows what the text alone is worth. It is also FiC's fine-tuned model; its training is not counted.
Text is split by document: calibration, training and held-out C4 are three files. Scored on held-out
C4 and on WikiText-2, its first 32 windows or, with --whole, all of it.

What a term adds is the difference to KL alone of the same seed, so what a seed does to both does
not count as spread. The arms that show whether PrC and FiC add to distillation come first, with all
their seeds before any other arm: three seeds, two for the others, unless --seeds is given. With
--set a setting is tried in every training of the arms (never in what they start from); such rows
are listed separately, and should be judged on the run's own held-out text, whose documents are not
those of the scores.

Finished runs are kept in `eval/results/study_recovery.json` and not repeated, and the tables are
written beside it. An interrupted run resumes from its checkpoint in WORK_DIR; a failed run is named
at the end. WORK_DIR keeps each run's model, 0.3 to 0.5 GB of SmolLM2. The training text holds
888,509 tokens of SmolLM2's, 879,616 of them beside each run's own held-out part: a larger budget
repeats some of it, and each run says so.

The defaults are the screen for two cores. At 158 tokens/s an arm trains for 10 minutes; with
pruning, banks and scores it takes about 15, with a ladder 25 to 40, and all of them 12 hours: 3.5
for the first arms, an hour and ten minutes per seed. With a GPU use --tokens 1007616 --whole, or
860160 for text that is seen only once.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import tables
import torch
from tables import arguments, markdown, mean_and_spread

from cap_llm.cli import assets
from cap_llm.cli.matrix import DENSE, Matrix, Row
from cap_llm.config import ObjectiveConfig
from cap_llm.evaluation.scores import FILE, read_scores
from cap_llm.runtime.console import Console
from cap_llm.runtime.files import atomic, read_json

RESULTS = tables.RESULTS / "study_recovery.json"
UP, TO_2_4 = "0.3, 0.4, 0.5", "3:4, 2:4"
PRUNED, PRUNED_2_4, TUNED = "no training", "no training; 2:4", "dense + cross-entropy"
OFF = dict.fromkeys(ObjectiveConfig.TERMS, 0.0)
KL, HALVES = {"kl": 1.0}, {"ce": 0.5, "kl": 0.5}
ALL = HALVES | {"feature": 1.0, "prc": 0.1, "snc": 0.1, "fic": 0.1}
ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Arm:
    """What is trained, from what; without an objective, one-shot alone.

    Attributes:
        objective: weights of its terms, the others 0.
        ladder: its rungs; it starts from the dense model.
        start: the arm whose model it starts from.
        teacher: the arm whose model teaches.
        base: the arm that it is compared with.
    """

    objective: dict | None = None
    ladder: str = ""
    start: str = DENSE
    teacher: str = DENSE
    base: str | None = None


def trained(objective: dict, teacher: str = DENSE) -> Arm:
    """An arm that trains the pruned model and is compared with KL alone."""
    return Arm(objective, start=PRUNED, teacher=teacher, base="KL")


ARMS = {
    DENSE: Arm(),
    PRUNED: Arm(),
    "KL": Arm(KL, start=PRUNED),
    "KL + PrC": trained(KL | {"prc": 0.1}),
    TUNED: Arm({"ce": 1.0}),
    "KL + FiC": trained(KL | {"fic": 0.1}),
    "cross-entropy": trained({"ce": 1.0}),
    "cross-entropy + KL": trained(HALVES),
    "KL to the trained dense model": trained(KL, TUNED),
    "cross-entropy + KL to the trained dense model": trained(HALVES, TUNED),
    "KL + SquareHead": trained(KL | {"feature": 1.0}),
    "KL; ladder": Arm(KL, UP),
    "KL + SnC; ladder": Arm(KL | {"snc": 0.1}, UP, base="KL; ladder"),
    "all terms; ladder": Arm(ALL, UP, base="KL; ladder"),
    PRUNED_2_4: Arm(),
    "KL; 2:4 ladder": Arm(KL, TO_2_4),
    "KL + SnC; 2:4 ladder": Arm(KL | {"snc": 0.1}, TO_2_4, base="KL; 2:4 ladder"),
    "all terms; 2:4 ladder": Arm(ALL, TO_2_4, base="KL; 2:4 ladder"),
}
FIRST_ARMS = (PRUNED, "KL", "KL + PrC", "KL + FiC")
LENGTH, BATCH, FIRST = 512, 4, 32
C4_HELD_OUT = 64  # windows of 512 tokens of documents that nothing else reads
UNIT = 6 * BATCH * LENGTH  # tokens that 1, 2 and 3 rungs share evenly
COMMON = {
    "runtime.keep_intermediate": False,
    "calibration.length": LENGTH,
    "oneshot.refit": True,
    "evaluate.dense": False,
}
TRAINING = {
    "recover.length": LENGTH,
    "recover.optimizer.batch": BATCH,
    "recover.engine.micro_batch": 2,
    "recover.optimizer.lr": 2e-4,
    "recover.engine.deepspeed": "zero2" if ON_GPU else "cpu",
    "recover.optimizer.dtype": "bfloat16",
    "recover.log.evaluate_every": 25,
    "recover.checkpoint.every": 25,
    "recover.checkpoint.keep": 1,
}


@dataclass(frozen=True)
class Cell:
    """One arm, seed and, in what it trains, settings of its own: `section.field=value`."""

    arm: str
    seed: int
    settings: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Its name in a table, without the seed."""
        return f"{self.arm} ({', '.join(self.settings)})" if self.settings else self.arm

    @property
    def needs(self) -> list[Cell]:
        """The cells whose models it reads."""
        arm = ARMS[self.arm]
        tuned = [TUNED] * bool(arm.objective and arm.objective.get("fic"))
        names = dict.fromkeys([arm.start, arm.teacher, *tuned])
        return [Cell(name, self.seed) for name in names if name != DENSE]


def main() -> int:
    """Runs what is missing and prints the tables; returns the exit code."""
    args = parse()
    console = Console()
    args.work.mkdir(parents=True, exist_ok=True)
    study = Study(args, args.model or assets.smollm2(console.say), split(args.work))
    todo = {study.row(cell).name: cell for cell in plan(args)}

    def work(row: Row) -> int:
        cell = todo[row.name]
        if code := study.measure(row):
            return code
        tables.record(RESULTS, study.key(cell), study.figures(cell, row))
        shutil.rmtree(study.runs.folder(row) / "recover" / "banks", ignore_errors=True)
        write_page(study)
        console.say("\n".join(quality(study)))
        return 0

    rows = [study.row(cell) for cell in todo.values() if not study.has(cell)]
    code = study.runs.run_all(rows, work, console)
    write_page(study)
    console.say("\n".join([*quality(study), "", *costs(study)]))
    return code


def parse() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    add = parser.add_argument
    add("work", nargs="?", type=Path, default=Path("runs/study-recovery"))
    add("--arms", default=",".join(list(ARMS)[1:]), help="separated by commas")
    add("--seeds", help="such as 0,1; without it three for the first arms, two for the others")
    add("--tokens", type=int, default=8 * UNIT, help=f"per arm, over all its rungs; n x {UNIT}")
    add("--whole", action="store_true", help="score all of WikiText-2")
    add("--model", type=Path, help="model directory; without it SmolLM2-135M from its package")
    setting = "a setting of every training of the arms; may be repeated"
    add("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help=setting)
    args = parser.parse_args()
    args.arms = [arm.strip() for arm in args.arms.split(",")]
    args.seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else None
    if unknown := [arm for arm in args.arms if arm not in ARMS]:
        parser.error(f"--arms: {unknown[0]!r} is not an arm; choose from {', '.join(ARMS)}")
    if wrong := [s for s in args.set if not s.startswith("recover.") or "=" not in s]:
        parser.error(f"--set {wrong[0]} is not of the form recover.FIELD=VALUE")
    if args.tokens < UNIT or args.tokens % UNIT:
        # or a ladder would train on fewer tokens than the arms that it is compared with
        parser.error(f"--tokens {args.tokens} is not a multiple of {UNIT}")
    return args


def plan(args: argparse.Namespace) -> list[Cell]:
    """What is to be done, in order: the first arms' seeds, then the others'; needs before."""
    first = [arm for arm in args.arms if arm in FIRST_ARMS]
    others = [arm for arm in args.arms if arm not in FIRST_ARMS]
    todo = [Cell(DENSE, 0)]
    for arms, seeds in ((first, [0, 1, 2]), (others, [0, 1])):
        for seed in args.seeds or seeds:
            for arm in arms:
                settings = tuple(sorted(args.set)) if ARMS[arm].objective else ()
                cell = Cell(arm, seed, settings)
                todo += [c for c in (*cell.needs, cell) if c not in todo]
    return todo


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
        texts[name].write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf-8"
        )
    return texts


class Study:
    """Runs on one model with one budget of tokens, and their figures."""

    def __init__(self, args: argparse.Namespace, model: Path, texts: dict[str, Path]):
        self.args, self.texts = args, texts
        common = COMMON | {"calibration.corpus": texts.get("calibration")}
        self.runs = Matrix(args.work.resolve(), model.resolve(), common)

    def name_of(self, cell: Cell) -> str:
        """The name of a run."""
        tokens = f", {self.args.tokens} tokens" if ARMS[cell.arm].objective else ""
        model = f", {self.args.model.resolve().name}" if self.args.model else ""
        return f"{cell.title}{tokens}{model}, seed {cell.seed}"

    def key(self, cell: Cell) -> str:
        """The name of its figures: they also depend on how much is scored."""
        return f"{self.name_of(cell)}, {'whole' if self.args.whole else f'first {FIRST}'}"

    def has(self, cell: Cell) -> bool:
        """Whether a run is in the results.

        Raises:
            SystemExit: it is, but with another objective than the arm has now.
        """
        key = self.key(cell)
        if key not in results():
            return False
        was, now = results()[key]["objective"], ARMS[cell.arm].objective
        if was != now:
            raise SystemExit(
                f"{RESULTS}: {key!r} has the objective {was}, and the arm now has {now}. Rename "
                f"the arm, or delete that row and {self.runs.folder(self.row(cell))}."
            )
        return True

    def row(self, cell: Cell) -> Row:
        """The run that makes a cell's model."""
        arm, name = ARMS[cell.arm], self.name_of(cell)
        options: dict = {"name": cell.title, "calibration.seed": cell.seed}
        if cell.arm == DENSE:
            return Row(name, options, DENSE)
        if not arm.objective:
            pattern = {"oneshot.pattern": "2:4"} if cell.arm == PRUNED_2_4 else {}
            return Row(name, options | pattern)
        needs = {need.arm: self.row(need) for need in cell.needs}
        tokens, n_rungs = self.args.tokens, len(arm.ladder.split(","))
        options |= {
            "model.path": needs.get(arm.start, self.runs.model),
            "recover.teacher": needs.get(arm.teacher, self.runs.model),
            "recover.optimizer.seed": cell.seed,
            "recover.corpus": self.texts.get("training"),
            # A ladder has the text of all its rungs: as many distinct tokens as the other arms.
            "recover.sequences": tokens // LENGTH,
            "recover.optimizer.tokens": tokens // n_rungs,
            "recover.masks.schedule": arm.ladder,
        }
        weights = (OFF | arm.objective).items()
        options |= TRAINING | {f"recover.objective.{name}": weight for name, weight in weights}
        if arm.objective.get("fic"):
            options["recover.finetuned"] = needs[TUNED]
        options |= dict(setting.split("=", 1) for setting in cell.settings)
        return Row(name, options, "recover", 1 if ON_GPU else 2)

    def measure(self, row: Row) -> int:
        """Makes a row's model and measures its perplexities; the exit code."""
        if not self.runs.has_model(row) and (code := self.runs.run(row)):
            return code
        for corpus, window, first in (
            (self.texts["c4"], LENGTH, C4_HELD_OUT),
            ("wikitext2", 2048, None if self.args.whole else FIRST),
        ):
            scores = {"evaluate.corpora": [corpus], "evaluate.window": window}
            scores |= {"evaluate.max_windows": first} if first else {}
            if code := self.runs.run(row, scores, ranks=1):
                return code
        return 0

    def figures(self, cell: Cell, row: Row) -> dict:
        """What a finished run measured, with what a reader needs to compare it."""
        folder = self.runs.model_of(row)
        scores = {score.name: score for score in read_scores(folder / FILE).scores}
        most = "" if self.args.whole else f" first {FIRST}"
        keys = {
            "c4": f"c4.jsonl@{LENGTH} first {C4_HELD_OUT}",
            "wikitext2": f"wikitext2@2048{most}",
        }
        result: dict = {"arm": cell.arm, "seed": cell.seed, "settings": list(cell.settings)}
        result["objective"] = ARMS[cell.arm].objective
        for corpus, score in ((corpus, scores[name]) for corpus, name in keys.items()):
            facts = {name: score.facts[name] for name in ("window", "windows", "bos")}
            result[corpus] = {"ppl_token": score.value, "tokens": score.n} | facts
        if cell.arm != DENSE:
            done = read_json(folder / "done.json")
            result |= {k: done[k] for k in ("seconds", "peak_memory_bytes")}
            counts = read_json(folder / "sparsity.json")
            result["sparsity"] = counts["pruned_matrices"]["sparsity"]
        if row.stage == "recover":
            rungs = done["levels"]
            result |= {"tokens": done["tokens"], "rungs": rungs}
            rate = statistics.harmonic_mean(r["tokens_per_second"] for r in rungs)
            result["tokens_per_second"] = round(rate, 1)
            result["held_out_ppl"] = list(rungs[-1]["held_out_ppl"].values())[-1]
        return result | assets.provenance(self.runs.folder(row)) | {"model": self.name}

    @property
    def name(self) -> str:
        """The dense model's name."""
        return self.runs.model.name if self.args.model else assets.MODEL_NAME

    def rows(self) -> dict[str, dict[int, dict]]:
        """The results of this model, budget and scope: by title in the tables' order, by seed."""
        found: dict[str, dict[int, dict]] = {}
        for key, result in results().items():
            cell = Cell(result["arm"], result["seed"], tuple(result["settings"]))
            if cell.arm in ARMS and key == self.key(cell):
                found.setdefault(cell.title, {})[cell.seed] = result
        order = list(ARMS)
        titles = sorted(found, key=lambda t: (order.index(_any(found[t])["arm"]), t))
        return {title: found[title] for title in titles}


def results() -> dict:
    """The figures that are measured already, by key."""
    return tables.read_results(RESULTS)


def quality(study: Study) -> list[str]:
    """The scores: mean and spread over the seeds, as Markdown lines."""
    rows, lines = study.rows(), []
    scope = "" if study.args.whole else f", first {FIRST} windows"
    head = ["arm", f"held-out C4, ppl_token@{LENGTH}", "less KL", "gap closed"]
    head += [f"WikiText-2, ppl_token@2048{scope}", "less KL", "gap closed", "seeds"]
    for title, seeds in rows.items():
        cells = [title]
        for corpus in ("c4", "wikitext2"):
            mine = _scores(rows, title, corpus)
            cells += [mean_and_spread(mine.values(), ".2f"), _less_base(rows, title, corpus)]
            start = PRUNED_2_4 if "2:4" in title else PRUNED
            dense, start = _scores(rows, DENSE, corpus).get(0), _scores(rows, start, corpus)
            both = [s for s in mine if s in start and dense and title not in (DENSE, PRUNED)]
            gap = [100 * (start[s] - mine[s]) / (start[s] - dense) for s in both]
            cells.append(f"{mean_and_spread(gap, '.0f')}%" if gap else "")
        lines.append([*cells, str(len(seeds))])
    return markdown(head, lines)


def costs(study: Study) -> list[str]:
    """Own held-out text, time and memory: mean over the seeds, as Markdown lines."""
    rows, lines = study.rows(), []
    head = ["arm", "own held-out ppl", "less KL", "minutes", "tokens/s", "GiB per rank"]
    for title, seeds in rows.items():
        if title == DENSE:
            continue

        own = _scores(rows, title, "held_out_ppl")
        cells = [mean_and_spread(own.values(), ".2f"), _less_base(rows, title, "held_out_ppl")]
        for key, unit, form in (
            ("seconds", 60, ".1f"),
            ("tokens_per_second", 1, ".0f"),
            ("peak_memory_bytes", 2**30, ".1f"),
        ):
            values = [run[key] / unit for run in seeds.values() if key in run]
            cells.append(f"{statistics.mean(values):{form}}" if values else "")
        lines.append([title, *cells])
    return markdown(head, lines)


NOTE = f"""\
- **arms**: cross-entropy, KL and SquareHead have weight 1, the first two a half each if combined,
  a contrast 0.1; all terms are {", ".join(f"{name} {weight:g}" for name, weight in ALL.items())}.
- **less KL**: the difference to KL alone (for a ladder: on the same ladder) of the same seed on the
  same kind of processor, because kinds accumulate 16-bit sums differently. Below 0 the arm is
  better. A row with settings of its own is compared with KL with these settings if there is such a
  row, else with KL.
- **gap closed**: of the gap between the one-shot model of the same seed and pattern and the dense
  model. Above 100% for `{TUNED}` is what the text alone is worth: it was never pruned.
- Training is in bfloat16 at a rate of 2e-4, scores are in float32.
- **own held-out**: 16 sequences of other documents of the training corpus, drawn by the seed; the
  text to choose settings by. Minutes cover a run's pruning and training; other work may have run at
  the same time.
""".split("\n")


def write_page(study: Study) -> None:
    """Writes the tables to `study_recovery.md`."""
    whole = " --whole" if study.args.whole else ""
    page = ["# What the terms of recovery are worth", ""]
    page += [f"Made by `python eval/study_recovery.py --tokens {study.args.tokens}{whole}` of"]
    page += [f"{study.name}: mean ± standard deviation over seeds.", ""]
    page += NOTE
    page += [*quality(study), "", *costs(study)]
    with atomic(RESULTS.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(page) + "\n", encoding="utf-8")


def _scores(rows: dict, title: str, name: str) -> dict[int, float]:
    """Perplexities by seed."""
    runs = {seed: run[name] for seed, run in rows.get(title, {}).items() if name in run}
    return {seed: r["ppl_token"] if isinstance(r, dict) else r for seed, r in runs.items()}


def _less_base(rows: dict, title: str, name: str) -> str:
    """Differences to the arm that this one is compared with, seed by seed."""
    run = _any(rows[title])
    base = ARMS[run["arm"]].base
    if run["settings"]:
        base = base or run["arm"]
        with_settings = Cell(base, 0, tuple(run["settings"])).title
        base = with_settings if with_settings in rows and with_settings != title else base
    if base is None:
        return ""
    mine, other = _scores(rows, title, name), _scores(rows, base, name)
    machines = [{s: run.get("processor") for s, run in rows[t].items()} for t in (title, base)]
    both = [s for s in mine if s in other and machines[0][s] == machines[1][s]]
    return mean_and_spread([mine[s] - other[s] for s in both], "+.2f")


def _any(seeds: dict[int, dict]) -> dict:
    return next(iter(seeds.values()))


if __name__ == "__main__":
    sys.exit(main())

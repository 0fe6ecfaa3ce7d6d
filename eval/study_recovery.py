"""The README's recovery table: what each term of the objective is worth, on SmolLM2-135M.

    CAP_LLM_DATA=... python eval/study_recovery.py [WORK_DIR] [--arms "KL,KL + PrC"] [--seeds 0,1]
                     [--tokens 98304] [--whole] [--model DIR] [--set recover.lr=1e-4 ...]

The arms of a seed start from one pruned model (SparseGPT + refit), see the same tokens in the same
order, and differ in their objective alone; the seed draws calibration, text, order and units. Arms
on a ladder start from the dense model and see the same text, split evenly over their rungs: hold
them against each other. "dense + cross-entropy" is the dense model trained on these tokens, so it
says what the text alone is worth; it is also FiC's fine-tuned model, whose training is not counted.
Text is split by document: calibration, training and held-out C4 are three files. Scored on held-out
C4 and on WikiText-2, its first 32 windows or, with --whole, all of it.

What a term adds is the difference to KL alone of the same seed, so that what a seed does to both
does not count as spread. The arms that say whether PrC and FiC add to distillation come first, all
their seeds before any other arm: three, the others two, unless --seeds says which. With --set a
setting is tried in every training of the arms (never in what they start from); such rows stand
apart, and are judged on the run's own held-out text, which is of other documents than the scores.

Finished runs are kept in `eval/results/study_recovery.json` and not repeated, and the tables are
written beside it; a run that was stopped goes on from its checkpoint in WORK_DIR, one that failed
is named at the end. WORK_DIR keeps each run's model, 0.3 to 0.5 GB of SmolLM2. The training text
holds 888,509 tokens of SmolLM2's, 879,616 of them beside each run's own held-out part: a larger
budget passes some of it again, and each run says so.

The defaults are the screen for two cores. At 158 tokens/s an arm trains for 10 minutes; with what
is pruned, banked, measured and scored it takes about 15, on a ladder 25 to 40, and all of them 12
hours: 3.5 for the first arms, an hour and ten minutes a seed. With a GPU give --tokens 1007616
--whole, or 860160 for text that is seen but once.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]

from cap_llm.runtime.console import Console, quiet_libraries  # noqa: E402

quiet_libraries()

import assets  # noqa: E402
import torch  # noqa: E402
from studies import STOPS, entry, markdown, spread  # noqa: E402

from cap_llm.config import ObjectiveConfig  # noqa: E402
from cap_llm.runtime.files import atomic, read_json, write_json  # noqa: E402

RESULTS = ROOT / "eval" / "results" / "study_recovery.json"
UP, TO_2_4 = "0.3, 0.4, 0.5", "3:4, 2:4"
PRUNED, DENSE, TUNED = "no training", "dense", "dense + cross-entropy"
OFF = dict.fromkeys(ObjectiveConfig.TERMS, 0.0)
KL = {"kl": 1.0}
ALL = {"ce": 0.5, "kl": 0.5, "feature": 1.0, "prc": 0.1, "snc": 0.1, "fic": 0.1}


@dataclass(frozen=True)
class Arm:
    """What is trained, from what; without an objective, one-shot alone.

    Attributes:
        objective: weights of its terms, the others 0.
        ladder: its rungs; it starts from the dense model.
        start: the arm whose model it starts from.
        teacher: the arm whose model teaches.
        base: the arm that it is held against.
    """

    objective: dict | None = None
    ladder: str = ""
    start: str = DENSE
    teacher: str = DENSE
    base: str | None = None

    @property
    def needs(self) -> list[str]:
        """The arms whose models it reads."""
        tuned = [TUNED] * bool(self.objective and self.objective.get("fic"))
        return [arm for arm in dict.fromkeys([self.start, self.teacher, *tuned]) if arm != DENSE]


ARMS = {
    PRUNED: Arm(),
    "KL": Arm(KL, start=PRUNED),
    "KL + PrC": Arm(KL | {"prc": 0.1}, start=PRUNED, base="KL"),
    TUNED: Arm({"ce": 1.0}),
    "KL + FiC": Arm(KL | {"fic": 0.1}, start=PRUNED, base="KL"),
    "cross-entropy": Arm({"ce": 1.0}, start=PRUNED, base="KL"),
    "cross-entropy + KL": Arm({"ce": 0.5, "kl": 0.5}, start=PRUNED, base="KL"),
    "KL to the trained dense model": Arm(KL, start=PRUNED, teacher=TUNED, base="KL"),
    "cross-entropy + KL to the trained dense model": Arm(
        {"ce": 0.5, "kl": 0.5}, start=PRUNED, teacher=TUNED, base="KL"
    ),
    "KL + SquareHead": Arm(KL | {"feature": 1.0}, start=PRUNED, base="KL"),
    "KL; ladder": Arm(KL, UP),
    "KL + SnC; ladder": Arm(KL | {"snc": 0.1}, UP, base="KL; ladder"),
    "all terms; ladder": Arm(ALL, UP, base="KL; ladder"),
    "no training; 2:4": Arm(),
    "KL; 2:4 ladder": Arm(KL, TO_2_4),
    "KL + SnC; 2:4 ladder": Arm(KL | {"snc": 0.1}, TO_2_4, base="KL; 2:4 ladder"),
    "all terms; 2:4 ladder": Arm(ALL, TO_2_4, base="KL; 2:4 ladder"),
}
FIRST_ARMS = (PRUNED, "KL", "KL + PrC", "KL + FiC")
LENGTH, BATCH, FIRST = 512, 4, 32
C4_HELD_OUT = 64  # windows of 512 tokens of documents that nothing else reads
UNIT = 6 * BATCH * LENGTH  # tokens that 1, 2 and 3 rungs share evenly


@dataclass(frozen=True)
class Cell:
    """One arm, seed and, in what it trains, settings of its own: `section.field=value`."""

    arm: str
    seed: int
    settings: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """A table's name of it, which leaves out the seed."""
        return f"{self.arm} ({', '.join(self.settings)})" if self.settings else self.arm

    @property
    def needs(self) -> list[Cell]:
        """The cells whose models it reads."""
        return [Cell(arm, self.seed) for arm in ARMS[self.arm].needs] if self.arm in ARMS else []


def main() -> int:
    """Runs what is missing, prints the tables; returns the exit code."""
    options = parse()
    console = Console()
    work = Path(options.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    model = Path(options.model).resolve() if options.model else assets.smollm2(console.say)
    texts = split(work)
    todo, failed = plan(options), []
    study = Study(model, texts, work, options)
    for n, cell in enumerate(todo, 1):
        key = study.key(cell)
        if study.has(key, cell):
            continue
        console.say(f"\n[{n}/{len(todo)}] {key}", style="bold")
        if any(need in failed for need in cell.needs):
            console.say("left out: what it starts from has failed")
            failed.append(cell)
            continue
        code = study.make(cell) or study.score(cell)
        if code in STOPS:
            return code
        if code:
            failed.append(cell)
            continue
        RESULTS.parent.mkdir(exist_ok=True)
        write_json(RESULTS, results() | {key: study.measured(cell)})
        shutil.rmtree(study.folder(cell) / "recover" / "banks", ignore_errors=True)
        write_page(study)
        console.say("\n".join(quality(study)))
    write_page(study)
    console.say("\n".join([*quality(study), "", *costs(study)]))
    for cell in failed:
        console.say(f"failed: {study.key(cell)}; its log: {study.folder(cell)}/log.txt")
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", nargs="?", default="runs/study-recovery")
    parser.add_argument("--arms", help=f"of: {', '.join(ARMS)}; default: all")
    parser.add_argument("--seeds", help="default: 0,1,2 for the first arms, 0,1 for the others")
    parser.add_argument(
        "--tokens", type=int, default=8 * UNIT, help=f"an arm, over all its rungs; n x {UNIT}"
    )
    parser.add_argument("--whole", action="store_true", help="score all of WikiText-2")
    parser.add_argument("--model", help="model directory; default: SmolLM2-135M from its package")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="a setting of every training of the arms; may be repeated",
    )
    options = parser.parse_args()
    options.arms = [a.strip() for a in options.arms.split(",")] if options.arms else list(ARMS)
    options.seeds = [int(s) for s in options.seeds.split(",")] if options.seeds else None
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        parser.error(f"there is no arm {unknown[0]!r}; the arms are {', '.join(ARMS)}")
    if wrong := [s for s in options.set if not s.startswith("recover.") or "=" not in s]:
        parser.error(f"--set {wrong[0]}: give recover.FIELD=VALUE")
    if options.tokens < UNIT or options.tokens % UNIT:
        # or a ladder would train on fewer tokens than the arms that it is compared with
        parser.error(f"--tokens {options.tokens} is no multiple of {UNIT}")
    return options


def plan(options) -> list[Cell]:
    """What is to be done, in order: the first arms' seeds, then the others'; needs before."""
    first = [arm for arm in options.arms if arm in FIRST_ARMS]
    others = [arm for arm in options.arms if arm not in FIRST_ARMS]
    todo = [Cell("dense", 0)]
    for arms, seeds in ((first, [0, 1, 2]), (others, [0, 1])):
        for seed in options.seeds or seeds:
            for arm in arms:
                settings = tuple(sorted(options.set)) if ARMS[arm].objective else ()
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


@dataclass
class Study:
    """Runs of the entry on one model, with one budget, and where they lie."""

    model: Path
    texts: dict[str, Path]
    work: Path
    options: argparse.Namespace

    def key(self, cell: Cell) -> str:
        """How a run is called in the results."""
        scope = "whole" if self.options.whole else f"first {FIRST}"
        return f"{self._name(cell)}, {scope}"

    def has(self, key: str, cell: Cell) -> bool:
        """Whether a run is in the results.

        Raises:
            SystemExit: it is, but with another objective than the arm has now.
        """
        if key not in results():
            return False
        was, now = results()[key]["objective"], objective(cell.arm)
        if was != now:
            raise SystemExit(
                f"{RESULTS} has {key!r} of the objective {was}, and the arm's is {now} now: call "
                f"the arm by another name, or take that row out and remove {self.folder(cell)}"
            )
        return True

    def folder(self, cell: Cell) -> Path:
        """The run's folder: the same however much is scored."""
        name = "".join(c if c.isalnum() else "-" for c in self._name(cell)).lower()
        return self.work / name

    def _name(self, cell: Cell) -> str:
        trains = cell.arm in ARMS and ARMS[cell.arm].objective
        tokens = f", {self.options.tokens} tokens" if trains else ""
        model = f", {self.model.name}" if self.options.model else ""
        return f"{cell.title}{tokens}{model}, seed {cell.seed}"

    def make(self, cell: Cell) -> int:
        """Prunes or trains a cell's model, after those that it reads; the exit code."""
        for need in cell.needs:
            if code := self.make(need):
                return code
        if cell.arm == "dense" or (self._model_of(cell) / "done.json").exists():
            return 0
        ranks = 1 if torch.cuda.is_available() else 2
        return entry([*self._settings(cell), "--stages", f"[{_stage(cell)}]"], ranks)

    def score(self, cell: Cell) -> int:
        """Measures the perplexities of a cell's model; the exit code."""
        stages = "evaluate" if cell.arm == "dense" else f"{_stage(cell)}, evaluate"
        for corpus, window, most in (
            (self.texts["c4"], LENGTH, C4_HELD_OUT),
            ("wikitext2", 2048, None if self.options.whole else FIRST),
        ):
            place = ["--evaluate.corpora", f"[{corpus}]", "--evaluate.window", str(window)]
            place += ["--evaluate.max_windows", str(most)] if most else []
            place += ["--stages", f"[{stages}]", "--evaluate.dense", "false"]
            if code := entry([*self._settings(cell), *place]):
                return code
        return 0

    def _model_of(self, cell: Cell) -> Path:
        return self.folder(cell) / _stage(cell)

    def _settings(self, cell: Cell) -> list[str]:
        """The entry's options, but for stages and scores."""
        arm = ARMS.get(cell.arm, Arm())
        start = Cell(arm.start, cell.seed)
        start = self.model if arm.start == DENSE else self._model_of(start)
        given = ["--output_dir", str(self.folder(cell)), "--name", cell.title]
        given += ["--model.path", str(start), "--runtime.keep_intermediate", "false"]
        given += ["--calibration.corpus", str(self.texts["calibration"])]
        given += ["--calibration.length", "512", "--calibration.seed", str(cell.seed)]
        given += ["--oneshot.refit", "true"]
        given += ["--oneshot.pattern", "2:4"] if cell.arm == "no training; 2:4" else []
        if not arm.objective:
            return given
        on_cpu, o = not torch.cuda.is_available(), self.options
        n_rungs = len(arm.ladder.split(","))
        teacher = self.model
        if arm.teacher != DENSE:
            teacher = self._model_of(Cell(arm.teacher, cell.seed))
            given += ["--model.dense", str(self.model)]
        given += ["--recover.teacher", str(teacher), "--recover.seed", str(cell.seed)]
        given += ["--recover.corpus", str(self.texts["training"]), "--recover.length", str(LENGTH)]
        # A ladder has the text of all its rungs: as many distinct tokens as the other arms.
        given += ["--recover.sequences", str(o.tokens // LENGTH)]
        given += ["--recover.tokens", str(o.tokens // n_rungs), "--recover.ladder", arm.ladder]
        given += ["--recover.batch", str(BATCH), "--recover.micro_batch", "2"]
        given += ["--recover.lr", "2e-4", "--recover.deepspeed", "cpu" if on_cpu else "zero2"]
        given += ["--recover.dtype", "bfloat16", "--recover.evaluate_steps", "25"]
        given += ["--recover.checkpoint_steps", "25", "--recover.keep_checkpoints", "1"]
        for name, weight in (OFF | arm.objective).items():
            given += [f"--recover.objective.{name}", str(weight)]
        if arm.objective.get("fic"):
            given += ["--recover.finetuned", str(self._model_of(Cell(TUNED, cell.seed)))]
        for setting in cell.settings:
            name, _, value = setting.partition("=")
            given += [f"--{name}", value]
        return given

    def measured(self, cell: Cell) -> dict:
        """What a finished run measured, with what a reader needs to compare it."""
        stage = self._model_of(cell)
        scores = read_json(stage / "perplexity.json")["corpora"]
        most = "" if self.options.whole else f" first {FIRST}"
        keys = {
            "c4": f"c4.jsonl@{LENGTH} first {C4_HELD_OUT}",
            "wikitext2": f"wikitext2@2048{most}",
        }
        kept = ("ppl_token", "window", "windows", "tokens", "bos")
        result: dict = {"arm": cell.arm, "seed": cell.seed, "settings": list(cell.settings)}
        result["objective"] = objective(cell.arm)
        result |= {corpus: {k: scores[key][k] for k in kept} for corpus, key in keys.items()}
        if cell.arm != "dense":
            done = read_json(stage / "done.json")
            result |= {k: done[k] for k in ("seconds", "peak_memory_bytes")}
            counts = read_json(stage / "sparsity.json")
            result["sparsity"] = counts["pruned_matrices"]["sparsity"]
        if stage.name == "recover":
            rungs = done["rungs"]
            result |= {"tokens": done["tokens"], "rungs": rungs}
            rate = statistics.harmonic_mean(r["tokens_a_second"] for r in rungs)
            result["tokens_a_second"] = round(rate, 1)
            result["held_out_ppl"] = list(rungs[-1]["held_out_ppl"].values())[-1]
        model = self.model.name if self.options.model else assets.MODEL_NAME
        return result | assets.provenance(self.folder(cell)) | {"model": model}

    def rows(self) -> dict[str, dict[int, dict]]:
        """The results of this model, budget and scope: by title in the tables' order, by seed."""
        found: dict[str, dict[int, dict]] = {}
        for key, result in results().items():
            cell = Cell(result["arm"], result["seed"], tuple(result["settings"]))
            if key == self.key(cell):
                found.setdefault(cell.title, {})[cell.seed] = result
        order = [DENSE, *ARMS]
        titles = sorted(found, key=lambda t: (order.index(_any(found[t])["arm"]), t))
        return {title: found[title] for title in titles}


def objective(arm: str) -> dict | None:
    """The weights that an arm trains with; None for what is not trained."""
    return ARMS[arm].objective if arm in ARMS else None


def results() -> dict:
    """What is measured already, by key."""
    return read_json(RESULTS) if RESULTS.exists() else {}


def quality(study: Study) -> list[str]:
    """The scores: mean and spread over the seeds, as Markdown lines."""
    rows, lines = study.rows(), []
    scope = "" if study.options.whole else f", first {FIRST} windows"
    head = ["arm", f"held-out C4, ppl_token@{LENGTH}", "less KL", "gap closed"]
    head += [f"WikiText-2, ppl_token@2048{scope}", "less KL", "gap closed", "seeds"]
    for title, seeds in rows.items():
        cells = [title]
        for corpus in ("c4", "wikitext2"):
            mine = _scores(rows, title, corpus)
            cells += [spread(mine.values(), ".2f"), _less_base(rows, title, corpus)]
            start = "no training; 2:4" if "2:4" in title else PRUNED
            dense, start = _scores(rows, DENSE, corpus).get(0), _scores(rows, start, corpus)
            both = [s for s in mine if s in start and dense and title not in (DENSE, PRUNED)]
            gap = [100 * (start[s] - mine[s]) / (start[s] - dense) for s in both]
            cells.append(f"{spread(gap, '.0f')} %" if gap else "")
        lines.append([*cells, str(len(seeds))])
    return markdown(head, lines)


def costs(study: Study) -> list[str]:
    """Own held-out text, time and memory: mean over the seeds, as Markdown lines."""
    rows, lines = study.rows(), []
    head = ["arm", "own held-out ppl", "less KL", "minutes", "tokens/s", "GiB a rank"]
    for title, seeds in rows.items():
        if title == DENSE:
            continue

        own = _scores(rows, title, "held_out_ppl")
        cells = [spread(own.values(), ".2f"), _less_base(rows, title, "held_out_ppl")]
        for key, unit, form in (
            ("seconds", 60, ".1f"),
            ("tokens_a_second", 1, ".0f"),
            ("peak_memory_bytes", 2**30, ".1f"),
        ):
            values = [run[key] / unit for run in seeds.values() if key in run]
            cells.append(f"{statistics.mean(values):{form}}" if values else "")
        lines.append([title, *cells])
    return markdown(head, lines)


def write_page(study: Study) -> None:
    """Writes the tables to `study_recovery.md`."""
    name = study.model.name if study.options.model else assets.MODEL_NAME
    whole = " --whole" if study.options.whole else ""
    page = ["# What the terms of recovery are worth", ""]
    page += [f"Made by `python eval/study_recovery.py --tokens {study.options.tokens}{whole}` of"]
    page += [f"{name}: mean ± standard deviation over seeds.", ""]
    weights = ", ".join(f"{name} {weight:g}" for name, weight in ALL.items())
    page += ["- **arms**: cross-entropy, KL and SquareHead weigh 1, the first two a half if they"]
    page += [f"  are together; a contrast 0.1; all terms are {weights}."]
    page += ["- **less KL**: the difference to KL alone (on a ladder: on the same one) of the same"]
    page += ["  seed on the same kind of processor, whose 16-bit sums differ by kind, below 0"]
    page += ["  where the arm is better. A row with settings of its own is held"]
    page += ["  against KL with these settings where there is such a row, else against KL."]
    page += ["- **gap closed**: of the gap between the one-shot model of the same seed and pattern"]
    page += ["  and the dense one. Above 100 % for `dense + cross-entropy` is what the text alone"]
    page += ["  is worth: it was never pruned."]
    page += ["- Training is in bfloat16 at a rate of 2e-4, scores are in float32."]
    page += ["- **own held-out**: 16 sequences of the training corpus' other documents, which a"]
    page += ["  seed draws; the text to choose settings by. Minutes are those of a run's pruning"]
    page += ["  and training, other work may have run beside it.", ""]
    page += [*quality(study), "", *costs(study)]
    with atomic(RESULTS.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(page) + "\n", encoding="utf-8")


def _stage(cell: Cell) -> str:
    if cell.arm == DENSE:
        return "dense"
    return "recover" if ARMS[cell.arm].objective else "oneshot"


def _scores(rows: dict, title: str, name: str) -> dict[int, float]:
    """Perplexities by seed."""
    runs = {seed: run[name] for seed, run in rows.get(title, {}).items() if name in run}
    return {seed: r["ppl_token"] if isinstance(r, dict) else r for seed, r in runs.items()}


def _less_base(rows: dict, title: str, name: str) -> str:
    """Differences to the arm that this one is held against, seed by seed."""
    run = _any(rows[title])
    base = ARMS[run["arm"]].base if run["arm"] in ARMS else None
    if run["settings"]:
        base = base or run["arm"]
        with_settings = Cell(base, 0, tuple(run["settings"])).title
        base = with_settings if with_settings in rows and with_settings != title else base
    if base is None:
        return ""
    mine, other = _scores(rows, title, name), _scores(rows, base, name)
    machines = [{s: run.get("processor") for s, run in rows[t].items()} for t in (title, base)]
    both = [s for s in mine if s in other and machines[0][s] == machines[1][s]]
    return spread([mine[s] - other[s] for s in both], "+.2f")


def _any(seeds: dict[int, dict]) -> dict:
    return next(iter(seeds.values()))


if __name__ == "__main__":
    sys.exit(main())

"""The comparison: models by measures, in columns that may be read from top to bottom.

Scores share a column only if they agree in all facts that they depend on. A note names the facts
that differ. Runs that differ only in their seeds share a row: mean ± standard deviation.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cap_llm.evaluation.lm_eval_tasks import SETS
from cap_llm.evaluation.scores import Score
from cap_llm.models.result import Result
from cap_llm.report.published import of_protocol, published, short_name
from cap_llm.report.runs import Model
from cap_llm.runtime.console import format_bytes, format_duration

_PAPERS = {"wanda": "Wanda", "sds": "SDS"}
NOTHING = "-"
PUBLISHED = "Published perplexities"
COST = "Cost"


@dataclass
class Column:
    """A measure whose values are comparable.

    Attributes:
        label: lines of its heading.
        get: value and standard error of a model.
        show: formats a value.
        better: 1 if higher is better, -1 if lower, 0 if no value is best.
        score: a score in it, for its facts.
    """

    label: list[str]
    get: Callable[[Model], tuple[float, float | None] | None]
    show: Callable[[float], str]
    better: int = 0
    score: Score | None = None

    @property
    def title(self) -> str:
        """The heading on one line."""
        return " ".join(self.label)


@dataclass
class Row:
    """One model, or several that differ only in their seeds.

    Attributes:
        models: the models; more than one with the same seeds is the same model scored twice.
        name: the row's name.
        runs: numbers of their runs; empty if these are all runs.
        group: rows that prune to the same pattern or sparsity; in the order of tables.
        baseline: whether later rows build on it.
    """

    models: list[Model]
    name: str = ""
    runs: list[int] = field(default_factory=list)
    group: tuple = ()
    baseline: bool = False

    @property
    def result(self) -> Result:
        """Of the first model."""
        return self.models[0].result

    @property
    def by_seeds(self) -> dict[tuple, Model]:
        """The first model of each set of seeds."""
        models: dict[tuple, Model] = {}
        for model in self.models:
            models.setdefault(tuple(model.result.seeds), model)
        return models

    def values(self, column: Column) -> list[tuple[float, float | None]]:
        """The values of a column, with standard errors; one per set of seeds."""
        values: dict[tuple, tuple] = {}
        for model in self.models:
            if (value := column.get(model)) is not None:
                values.setdefault(tuple(model.result.seeds), value)
        return list(values.values())

    def mean(self, column: Column) -> float | None:
        """The mean over seeds."""
        values = [value for value, _ in self.values(column)]
        return statistics.fmean(values) if values else None


@dataclass
class Cell:
    """What a table shows at one place; a row's name also has the numbers of its runs."""

    text: str
    best: bool = False
    baseline: bool = False
    runs: list[int] = field(default_factory=list)


@dataclass
class Table:
    """Rows of cells under headings; `starts` are the rows that open a group."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    starts: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Section:
    """All models that come from one dense model."""

    title: str
    rows: list[Row]
    perplexities: list[Column]
    tables: list[Table]


def compare(models: list[Model]) -> list[Section]:
    """A section per dense model; a row's `runs` count the run directories from 1."""
    runs = list(dict.fromkeys(model.run for model in models))
    by_dense: dict[str, list[Model]] = {}
    for model in models:
        by_dense.setdefault(model.result.dense, []).append(model)
    titles = [short_name(dense) for dense in by_dense]
    sections = []
    for title, (dense, group) in zip(titles, by_dense.items(), strict=True):
        section = _section(group, runs)
        section.title = dense if titles.count(title) > 1 else title
        sections.append(section)
    return sections


def _section(models: list[Model], runs: list[Path]) -> Section:
    rows, notes = _rows(models, runs), []
    perplexities = _score_columns(models, "ppl_token", notes)
    words = _score_columns(models, "word_perplexity", notes)
    tasks = _score_columns(models, "acc", notes)
    gaps = [g for c in perplexities if any(row.values(g := _gap(c, rows)) for row in rows)]
    main = [*perplexities, *gaps, *words, *_means(tasks, rows)]
    quality = _table("Quality", rows, main)
    quality.notes += notes
    for title, field_ in (("Calibrated", "calibration"), ("Trained", "training")):
        texts = {text for row in rows if (text := getattr(row.result, field_))}
        if len(texts) == 1:
            quality.notes.append(f"{title} on {texts.pop()}.")
    if any(cell.best for cells in quality.rows for cell in cells):
        quality.notes.append("Bold is the best of its pattern and sparsity.")
    if any(len(row.by_seeds) > 1 for row in rows):
        quality.notes.append("± is the standard deviation over seeds.")
    if gaps:
        quality.notes.append(
            "Gap closed: the share of the one-shot model's excess perplexity over the dense model "
            "that later stages removed."
        )
    tables = [quality]
    if tasks:
        tables.append(_table("Zero-shot accuracy, %", [r for r in rows if _any(r, tasks)], tasks))
        tables[-1].notes.append(
            "Bold is the best by more than the standard error, which report.csv has."
        )
    tables += [_costs(rows), *_beside_published(rows, perplexities)]
    return Section("", rows, perplexities, tables)


# rows


def _rows(models: list[Model], runs: list[Path]) -> list[Row]:
    """Folds seeds, sorts by pattern and sparsity (dense first), and marks the baselines."""
    rows: list[Row] = []
    for model in models:
        row = next((row for row in rows if all(_one_row(m, model) for m in row.models)), None)
        if row:
            row.models.append(model)
        else:
            rows.append(Row([model]))
    further = any(row.result.before for row in rows)
    for row in rows:
        row.group = _group(row.result)
        row.name = _common_name([model.name for model in row.by_seeds.values()])
        row.name += f" ({len(row.by_seeds)} seeds)" * (len(row.by_seeds) > 1)
        row.runs = sorted({runs.index(model.run) + 1 for model in row.models})
        row.runs = row.runs if len(row.runs) < len(runs) else []
        row.baseline = row.result.stage == "dense" or (further and row.result.stage == "oneshot")
    names = [row.name for row in rows]
    for row in rows:
        if names.count(row.name) > 1:
            row.name += f" ({row.models[0].run.resolve().name})"
    return sorted(rows, key=lambda row: row.group)


def _one_row(a: Model, b: Model) -> bool:
    """Whether two models differ only in their seeds, or are the same model."""
    x, y = a.result, b.result
    if (x.stage, x.identity, x.calibration) != (y.stage, y.identity, y.calibration):
        return False
    if x.seeds != y.seeds:
        return True
    pairs = ((s, t) for s in a.scores for t in b.scores if _key(s) == _key(t))
    return all(abs(s.value - t.value) <= 1e-3 * abs(s.value) for s, t in pairs)


def _group(result: Result) -> tuple:
    """What must be equal for the best to be a fair word; empty for a dense model."""
    if ":" in result.amount:
        return 1, result.amount
    if result.amount:
        return 0, float(result.amount.removesuffix("%"))
    return () if result.sparsity is None else (0, float(round(100 * result.sparsity)))


def _common_name(names: list[str]) -> str:
    """What the names of a row have in common: `KL, seed 0` and `KL, seed 1` are `KL`."""
    common = os.path.commonprefix(names)
    if len(set(names)) > 1:
        common = common.rstrip(" ,;:-_(").removesuffix("seed").rstrip(" ,;:-_(")
    return common or " / ".join(dict.fromkeys(names))


# columns


def _key(score: Score) -> tuple:
    """What scores in one column have in common."""
    return score.measure, score.data, score.n, frozenset(score.facts.items())


def _score_columns(models: list[Model], measure: str, notes: list[str]) -> list[Column]:
    """The columns of a measure; adds to `notes` why there is more than one for the same data."""
    scores: dict[tuple, Score] = {}
    for score in (score for model in models for score in model.scores):
        if score.measure == measure:
            scores.setdefault(_key(score), score)
    columns = []
    reasons: dict[str, list[str]] = {}
    for key, score in scores.items():
        same_data = [s for s in scores.values() if s.data == score.data]
        facts = _differing(same_data)
        label = [score.data, *_extent(score)]
        label += [text for fact in facts if (text := _fact(score, fact)) not in label]
        columns.append(_score_column(key, score, label))
        if score is same_data[0] and facts:
            values = {fact: dict.fromkeys(_fact(s, fact) for s in same_data) for fact in facts}
            why = "; ".join(f"{_words(fact)} ({', '.join(v)})" for fact, v in values.items())
            reasons.setdefault(why, []).append(score.data)
    notes += [f"{', '.join(d)}: the columns differ in {why}." for why, d in reasons.items()]
    return columns


def _score_column(key: tuple, score: Score, label: list[str]) -> Column:
    def get(model: Model) -> tuple[float, float | None] | None:
        return next(((s.value, s.stderr) for s in model.scores if _key(s) == key), None)

    accuracy = score.measure == "acc"
    return Column(label, get, percent if accuracy else perplexity, 1 if accuracy else -1, score)


def _differing(scores: list[Score]) -> list[str]:
    """The facts in which scores on the same data differ, checksums only if nothing else does."""
    names = dict.fromkeys(name for score in scores for name in score.facts)
    differing = [n for n in names if len({str(score.facts.get(n)) for score in scores}) > 1]
    if {"limit", "window"} & {*differing}:
        differing = [name for name in differing if name != "windows"]  # it follows from them
    return [n for n in differing if not n.endswith("sha256")] or differing[:1]


def _extent(score: Score) -> list[str]:
    """How much of the data was scored, for the heading."""
    if score.measure == "acc":
        return [_fact(score, "limit") if score.facts.get("limit") else f"{score.n:,} items"]
    window = score.facts.get("window")
    measure = f"{score.measure}@{window}" if window else score.measure
    return [measure, *([_fact(score, "limit")] if score.facts.get("limit") else [])]


def _fact(score: Score, name: str) -> str:
    """A fact for headings and notes."""
    value = score.facts.get(name)
    if name == "limit":
        unit = "windows" if "window" in score.facts else "items"
        return f"first {value} {unit}" if value else f"all {unit}"
    return f"{_words(name)} {'unknown' if value is None else value}"


def _words(fact: str) -> str:
    return fact.removesuffix("_sha256").replace("_", " ")


def _means(tasks: list[Column], rows: list[Row]) -> list[Column]:
    """The means over the tasks of each paper's set that a row has, also over a part of them."""
    means: dict[tuple, Column] = {}
    for name, members in SETS.items():
        for limit in dict.fromkeys(column.score.facts.get("limit") for column in tasks):
            own = [c for c in tasks if c.score.facts.get("limit") == limit]
            own = sorted((c for c in own if c.score.data in members), key=_task_order(members))
            for row in rows:
                part = [column for column in own if row.values(column)]
                if len(part) > 1:
                    n = len(part)
                    label = (
                        f"{n} tasks" if n == len(members) else f"{n} of {len(members)} (partial)"
                    )
                    extent = [f"first {limit} items"] * bool(limit)
                    column = _mean([f"{_PAPERS[name]}'s mean", label, *extent], part)
                    means.setdefault((name, *map(id, part)), column)
    return list(means.values())


def _task_order(members: tuple) -> Callable[[Column], int]:
    return lambda column: members.index(column.score.data)


def _mean(label: list[str], part: list[Column]) -> Column:
    def get(model: Model) -> tuple[float, float | None] | None:
        values = [column.get(model) for column in part]
        if None in values:
            return None
        errors = [error for _, error in values]
        error = None if None in errors else math.hypot(*errors) / len(errors)
        return statistics.fmean(value for value, _ in values), error

    return Column(label, get, percent, 1)


def _gap(column: Column, rows: list[Row]) -> Column:
    """The share of the one-shot model's excess perplexity that later stages removed."""
    models = [model for row in rows for model in row.models]
    scored = {m.result.weights: m for m in models if m.result.weights and column.get(m)}
    dense = next((row.mean(column) for row in rows if row.result.stage == "dense"), None)

    def get(model: Model) -> tuple[float, None] | None:
        first = model.result.before
        while first and first.stage != "oneshot" and first.before:
            first = first.before
        start = scored.get(first.weights) if first else None
        own = column.get(model)
        if not (start and own and dense) or _group(start.result) != _group(model.result):
            return None
        ppl = column.get(start)[0]
        return ((ppl - own[0]) / (ppl - dense), None) if ppl > dense else None

    return Column(["gap closed, %", *column.label], get, percent)


# tables


def _any(row: Row, columns: Iterable[Column]) -> bool:
    return any(row.values(column) for column in columns)


def _table(title: str, rows: list[Row], columns: list[Column]) -> Table:
    """Rows by columns, then sparsity, and the calibration if it differs."""
    texts = [row.result.calibration for row in rows]
    calibrated = len({text for text in texts if text}) > 1
    labels = ["model", *("\n".join(column.label) for column in columns), "sparsity"]
    table = Table(title, labels + ["calibration"] * calibrated, [])
    best = [_best(rows, column) for column in columns]
    for i, row in enumerate(rows):
        if i and row.group != rows[i - 1].group:
            table.starts.append(i)
        cells = [Cell(row.name, baseline=row.baseline, runs=row.runs)]
        cells += [Cell(_text(row, c), row.name in b) for c, b in zip(columns, best, strict=True)]
        sparsity = row.result.sparsity
        cells.append(Cell(NOTHING if sparsity is None else f"{sparsity:.2%}"))
        cells += [Cell(texts[i] or NOTHING)] * calibrated
        table.rows.append(cells)
    return table


def _text(row: Row, column: Column) -> str:
    values = [value for value, _ in row.values(column)]
    if not values:
        return NOTHING
    text, n = column.show(statistics.fmean(values)), len(row.by_seeds)
    if len(values) > 1:
        text += f" ± {column.show(statistics.stdev(values))}"
    return text + f" ({len(values)} of {n})" * (len(values) < n)


def _best(rows: list[Row], column: Column) -> set[str]:
    """The rows that are the best of their group, by more than a standard error."""
    best = set()
    for group in {(row.group, row.result.calibration) for row in rows if row.group}:
        rivals = [r for r in rows if (r.group, r.result.calibration) == group]
        rivals = [row for row in rivals if row.values(column)]
        values = sorted((row.mean(column) for row in rivals), reverse=column.better > 0)
        errors = [error or 0.0 for row in rivals for _, error in row.values(column)]
        if not column.better or len(values) < 2:
            continue
        if any(errors) and abs(values[1] - values[0]) <= max(errors):
            continue
        best |= {r.name for r in rivals if column.show(r.mean(column)) == column.show(values[0])}
    return best


_COSTS: dict[str, Callable[[Result], str | int]] = {
    "stored as": lambda r: r.dtype,
    "on disk": lambda r: r.n_bytes and format_bytes(r.n_bytes),
    "bit-packed": lambda r: r.packed_bytes and format_bytes(r.packed_bytes),
    "zeros in\nthe model": lambda r: r.whole_sparsity and f"{r.whole_sparsity:.2%}",
    "time": lambda r: r.seconds and format_duration(r.seconds),
    "memory\nper rank": lambda r: r.peak_memory_bytes and format_bytes(r.peak_memory_bytes),
    "GPU memory\nper rank": lambda r: r.peak_cuda_bytes and format_bytes(r.peak_cuda_bytes),
    "tokens\ntrained": lambda r: r.tokens and f"{r.tokens:,}",
    "machine": lambda r: r.machine,
}


def _costs(rows: list[Row]) -> Table:
    """What the model of each row took and takes; of the first seed."""
    columns = {label: [cost(row.result) or "" for row in rows] for label, cost in _COSTS.items()}
    shared = []  # what all models have in common is below the table
    for label in ("stored as", "on disk", "machine"):
        if len(values := set(columns[label]) - {""}) == 1:
            shared.append(f"{label} {values.pop()}")
            del columns[label]
    columns = {label: texts for label, texts in columns.items() if any(texts)}
    table = Table(COST, ["model", *columns], [])
    for row, *texts in zip(rows, *columns.values(), strict=True):
        name = Cell(row.name, baseline=row.baseline, runs=row.runs)
        table.rows.append([name, *(Cell(text or NOTHING) for text in texts)])
    table.notes += [f"All: {', '.join(shared)}."] * bool(shared)
    table.notes.append(
        "Time and memory include all stages up to the model. Files store the zeros; bit-packed is "
        "their size if pruned matrices were nonzero values and one bit per weight."
    )
    return table


def perplexity(value: float) -> str:
    """Formats a perplexity."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.0f}" if value < 1e6 else f"{value:g}"


def percent(value: float) -> str:
    """Formats an accuracy or a share as a number of percent."""
    return f"{100 * value:.1f}"


def _beside_published(rows: list[Row], columns: list[Column]) -> list[Table]:
    """Measured and published perplexities, for what was measured as in the papers."""
    model = short_name(rows[0].result.dense)
    labels = ["model", "perplexity", "measured", "published", "difference", "source"]
    table = Table(PUBLISHED, labels, [])
    for row in rows:
        for column in columns:
            measured, first = row.mean(column), row.result
            if measured is None or not of_protocol(column.score, first.calibration):
                continue
            for p in published():
                place = (p.model, p.method, p.amount, p.corpus, p.window)
                own = (model, first.method, first.amount, column.score.data)
                if place == (*own, column.score.facts["window"]):
                    texts = [row.name, column.title, perplexity(measured), f"{p.ppl:g}"]
                    texts += [f"{measured - p.ppl:+.2f}", p.source]
                    table.rows.append([Cell(text) for text in texts])
    table.notes.append(
        "Only models calibrated on 128 x 2048 tokens of C4 and scored on whole test sets are "
        "listed. Papers drew other samples of C4, so the last digits differ."
    )
    return [table] if table.rows else []

"""The comparison: models by measures, in columns that may be read from top to bottom.

Figures share a column only if all facts agree that they depend on; where they do not, there are
several columns, and a note that says which fact differs. Runs that differ in their seeds alone are
one row, mean ± standard deviation.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path

from cap_llm.evaluation.lm_eval_tasks import SETS
from cap_llm.report.published import of_protocol, published, short_name
from cap_llm.report.runs import (
    LIBRARIES,
    SCORES,
    Figure,
    Result,
)
from cap_llm.runtime.console import format_bytes, format_duration

_PAPERS = {"wanda": "Wanda", "sds": "SDS"}
# What has a best: not a gap closed, which is of each model's own start.
_LOWER_IS_BETTER = {"ppl": True, "word": True, "task": False, "mean": False}
BYTES = ("on disk", "bit-packed")
COSTS = (*BYTES, "time", "peak memory", "GPU memory", "trained")
NOTHING = "-"
_IN_LABELS = ("window", "tasks")  # facts that every heading tells in words of its own
PUBLISHED = "Beside published figures"
COST = "Cost"


@dataclass
class Column:
    """Figures that compare: of one measure, with the same facts."""

    kind: str
    name: str
    facts: dict
    label: list[str]

    def takes(self, figure: Figure) -> bool:
        """Whether a figure belongs here: all agrees, or only the calibration lacks."""
        if (figure.kind, figure.name) != (self.kind, self.name):
            return False
        return figure.facts == self.facts or (
            figure.facts.get("calibration") is None
            and figure.facts == self.facts | {"calibration": None}
        )


@dataclass
class Row:
    """One model, or several that differ in their seeds alone."""

    name: str
    results: list[Result]
    group: tuple = ()
    status: str = ""
    baseline: bool = False
    runs: list[int] = field(default_factory=list)

    def values(self, column: Column) -> list[float]:
        """The figures of a column, one a seed that has it."""
        found: dict[tuple, float] = {}
        for result in self.results:
            for figure in result.figures:
                if column.takes(figure):
                    found.setdefault(result.seeds, figure.value)
        return list(found.values())

    @property
    def n_seeds(self) -> int:
        """Runs that differ in their seeds; the same one twice counts once."""
        return len({r.seeds for r in self.results})

    def value(self, column: Column) -> float | None:
        """Their mean."""
        values = self.values(column)
        return statistics.mean(values) if values else None


@dataclass
class Cell:
    """What a table shows at one place. A row's name also has what is wrong with the row, whether it
    is a baseline, and the numbers of the runs behind it."""

    text: str
    best: bool = False
    status: str = ""
    baseline: bool = False
    runs: list[int] = field(default_factory=list)


@dataclass
class Table:
    """Rows of cells under labels; the first column is text. `starts` are rows that open a group."""

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
    columns: dict[str, list[Column]]
    tables: list[Table]


def compare(results: list[Result]) -> list[Section]:
    """A section for each dense model; a row's `runs` count the run directories from 1."""
    runs = list(dict.fromkeys(r.run for r in results))
    by_dense: dict[str, list[Result]] = {}
    for result in results:
        by_dense.setdefault(result.dense, []).append(result)
    short = [short_name(dense) for dense in by_dense]
    sections = []
    for dense, group in by_dense.items():
        title = short_name(dense)
        _tell_texts_apart(group)
        _add_means(group)
        rows = _rows(group, runs)
        splits: list[str] = []
        kinds = {"ppl": _columns(group, "ppl", splits), "task": _columns(group, "task", splits)}
        kinds |= {kind: _columns(group, kind, splits) for kind in ("word", "mean")}
        _add_gaps(rows, kinds["ppl"])
        kinds["gap"] = _columns(group, "gap", [])
        if len(kinds["ppl"]) == 1:
            kinds["gap"] = [replace(c, label=["gap", "closed, %"]) for c in kinds["gap"]]
        kinds |= {kind: _columns(group, kind, splits) for kind in COSTS}
        tables = _tables(rows, kinds)
        tables[0].notes = splits + _remarks(rows, kinds)
        sections.append(Section(dense if short.count(title) > 1 else title, rows, kinds, tables))
    if len(sections) > 1:
        note = "Models that come from different dense models do not compare: each has its tables."
        sections[0].tables[0].notes.insert(0, note)
    return sections


def _tell_texts_apart(results: list[Result]) -> None:
    """Adds a checksum to the name of a calibration text where other texts are called the same.

    They are others where one seed drew other ids. Which of them a further seed drew from nobody
    knows, so that seeds do not fold there.
    """
    drawn: dict[tuple, set] = {}
    for result in (r for r in results if r.calibration):
        seed, ids = result.drawn
        drawn.setdefault((result.calibration, seed), set()).update([ids] if ids else [])
    several = {text for (text, _), ids in drawn.items() if len(ids) > 1}
    for result in (r for r in results if r.calibration in several):
        result.calibration += f" (ids {result.drawn[1][:8]})"
        for figure in (f for f in result.figures if f.facts.get("calibration")):
            figure.facts["calibration"] = result.calibration


# rows


def _rows(results: list[Result], runs: list[Path]) -> list[Row]:
    """Folds seeds, sorts by pattern and sparsity (dense first), and marks the baselines."""
    rows: list[Row] = []
    for result in results:
        row = next((row for row in rows if all(_one_row(r, result) for r in row.results)), None)
        if not row:
            row = Row(result.name, [], _group(result))
            rows.append(row)
        row.results.append(result)
    further = any(row.results[0].stage not in ("dense", "oneshot") for row in rows)
    for row in rows:
        stage = row.results[0].stage
        row.name = "dense" if stage == "dense" else _common_name([r.name for r in row.results])
        row.name += f" ({row.n_seeds} seeds)" * (row.n_seeds > 1)
        row.runs = list(dict.fromkeys(runs.index(r.run) + 1 for r in row.results))
        row.baseline = stage == "dense" or (further and stage == "oneshot")
        row.status = "; ".join(row.results[0].status)
    names = [row.name for row in rows]
    for row in rows:
        if names.count(row.name) > 1:
            row.name += f" ({row.results[0].run.resolve().name})"
    return sorted(rows, key=lambda row: row.group)


def _one_row(known: Result, result: Result) -> bool:
    """Whether two results are one model made with two seeds, or the same model scored twice."""
    if known.stage == result.stage == "dense":
        return True
    of_known = (known.stage, known.recipe, known.calibration)
    if of_known != (result.stage, result.recipe, result.calibration):
        return False
    if known.status or result.status:
        return False
    if known.seeds != result.seeds:
        return True
    pairs = ((f, g) for f in known.figures_of(*SCORES) for g in result.figures_of(f.kind))
    pairs = ((f, g) for f, g in pairs if (f.name, f.facts) == (g.name, g.facts))
    return all(abs(f.value - g.value) <= 1e-3 * f.value for f, g in pairs)


def _group(result: Result) -> tuple:
    """What must be alike for the best to be a fair word, the amount that was asked for; in the
    order of tables. Empty for a dense model."""
    if result.stage == "dense":
        return ()
    if " by layer" in result.method and result.sparsity:
        return (2, round(100 * result.sparsity[1]))  # some matrices have a share of their own
    if ":" in result.amount:
        return (1, result.amount)
    if result.amount:
        return (0, float(result.amount.removesuffix(" %")))
    return (0, float(round(100 * result.sparsity[0])) if result.sparsity else 100.0)


def _common_name(names: list[str]) -> str:
    """What the names of a row's runs share: `KL, seed 0` and `KL, seed 1` are `KL`."""
    shared = os.path.commonprefix(names)
    if len(set(names)) > 1:
        shared = shared.rstrip(" ,;:-_(").removesuffix("seed").rstrip(" ,;:-_(")
    return shared or " / ".join(dict.fromkeys(names))


# derived figures


def _add_means(results: list[Result]) -> None:
    """Adds each result's mean over what it has of a paper's set, and over what all others have."""
    for name, tasks in SETS.items():
        limits = dict.fromkeys(f.facts["limit"] for r in results for f in r.figures_of("task"))
        parts: list[tuple] = []
        for result, limit in itertools.product(results, limits):
            part = (limit, *(t for t in tasks if _task(result, t, limit)))
            if len(part) > 2 and part not in parts:
                parts.append(part)
        for result in results:
            for limit, *part in parts:
                scores = [_task(result, t, limit) for t in part]
                if not all(scores):
                    continue
                facts = {"tasks": ", ".join(part), "of": len(tasks), "limit": limit}
                for key in ("shots", "computed in", *LIBRARIES, "calibration"):
                    facts[key] = scores[0].facts.get(key)
                # a pruned model's mean stands beside the dense one's, which was not calibrated
                alike = [{k: v for k, v in s.facts.items() if k != "calibration"} for s in scores]
                scored = str(alike)
                facts["scored"] = hashlib.sha256(scored.encode()).hexdigest()[:8]
                mean = statistics.mean(s.value for s in scores)
                errors = [s.stderr for s in scores]
                error = None if None in errors else math.hypot(*errors) / len(errors)
                result.figures.append(Figure("mean", name, mean, facts, error))


def _task(result: Result, task: str, limit: int | None) -> Figure | None:
    figures = (f for f in result.figures_of("task") if f.name == task)
    return next((f for f in figures if f.facts["limit"] == limit), None)


def _add_gaps(rows: list[Row], columns: list[Column]) -> None:
    """Adds the share of the one-shot model's loss that later stages won back."""
    dense = next((row for row in rows if row.results[0].stage == "dense"), None)
    if not dense:
        return
    everything = [r for row in rows for r in row.results]
    for column in columns:
        target = dense.value(column)
        for result in everything:
            if result.stage in ("dense", "oneshot", "given") or target is None:
                continue
            first = result.before
            while first and first.stage != "oneshot" and first.before:
                first = first.before
            # of a model that came pruned nobody says by what
            came = (r for r in everything if (r.run, r.stage) == (result.run, "given"))
            first = first or next(came, None)
            shares = [r.sparsity and round(100 * r.sparsity[0]) for r in (first, result) if r]
            if None not in shares and len(set(shares)) > 1:
                continue  # a schedule has gone beyond what was one-shot
            start, own = (Row("", [r]).value(column) if r else None for r in (first, result))
            if start is not None and own is not None and start > target:
                gap = (start - own) / (start - target)
                result.figures.append(Figure("gap", column.name, gap, dict(column.facts)))


# columns


def _columns(results: list[Result], kind: str, splits: list[str]) -> list[Column]:
    """The columns of a kind, in the order of appearance; says in `splits` why there are more."""
    found: dict[str, list[dict]] = {}
    for figure in (f for r in results for f in r.figures if f.kind == kind):
        known = found.setdefault(figure.name, [])
        if figure.facts not in known:
            known.append(figure.facts)
    columns: list[Column] = []
    reasons: dict[str, list[str]] = {}
    for name, known in found.items():
        # a figure without calibration stands beside every calibration
        calibrated = [f for f in known if f.get("calibration") is not None]
        for facts in known:
            alike = [f for f in calibrated if f | {"calibration": None} == facts]
            if facts.get("calibration") is None and alike:
                continue
            columns.append(Column(kind, name, facts, _label(kind, name, facts)))
        here = [c for c in columns if c.name == name]
        differing = _differing(here)
        for column in here:
            told = (_fact(kind, x, column.facts[x]) for x in differing if x not in _IN_LABELS)
            column.label += [line for line in told if line not in column.label]
        if len(here) > 1:
            values = {
                x: dict.fromkeys(_value(kind, x, c.facts[x]) for c in here) for x in differing
            }
            why = "; ".join(f"{x} ({', '.join(told)})" for x, told in values.items())
            reasons.setdefault(why, []).append(name or kind)
    for why, names in reasons.items():
        splits.append(f"{', '.join(names)}: columns do not compare, they differ in {why}.")
    return columns


def _differing(columns: list[Column]) -> list[str]:
    """The facts that tell columns of one measure apart, the plain ones first."""
    values = {k: {str(c.facts.get(k)) for c in columns} for c in columns for k in c.facts}
    if "calibration" in values:
        values["calibration"].discard("None")  # which agrees with any
    differing = [k for k, told in values.items() if len(told) > 1]
    if len(differing) > 1:  # a checksum says no more than what it sums up
        differing = [k for k in differing if k not in ("text", "scored")] or differing[:1]
    counts = ("windows", "items") if "limit" in differing else ()  # follow from it
    counts = ("windows",) if "window" in differing else counts
    return [k for k in differing if k not in counts]


def _label(kind: str, name: str, facts: dict) -> list[str]:
    """A column's heading, in lines."""
    limit = [_fact(kind, "limit", facts["limit"])] if facts.get("limit") else []
    if kind == "ppl":
        return [name, f"ppl_token@{facts['window']}", *limit]
    if kind == "gap":
        return ["gap closed, %", name, *limit]
    if kind == "mean":
        n = len(facts["tasks"].split(", "))
        part = f"{n} tasks" if n == facts["of"] else f"partial: {n} of {facts['of']}"
        return [f"{_PAPERS[name]}'s mean", part, *limit]
    if kind == "task":
        items = [_fact(kind, "items", facts["items"])] if facts.get("items") else []
        return [name, *(limit or items)]
    if kind == "word":
        return [name, "word_perplexity", *limit]
    if kind.endswith(" memory"):
        return [kind, "a rank"]
    return ["tokens", "trained"] if kind == "trained" else kind.split(" ", 1)


def _fact(kind: str, name: str, value) -> str:
    """A fact as a heading says it."""
    speaks = name in ("calibration", "machine", "limit", "items")
    return _value(kind, name, value) if speaks else f"{name} {_value(kind, name, value)}"


def _value(kind: str, name: str, value) -> str:
    if name == "limit":
        units, whole = "items", "all items"
        if kind in ("ppl", "gap"):
            units, whole = "windows", "whole text"
        return f"first {value} {units}" if value else whole
    if name == "items" and isinstance(value, int):
        return f"{value:,} items"
    return "unknown" if value is None else str(value)


# tables


def _tables(rows: list[Row], kinds: dict[str, list[Column]]) -> list[Table]:
    """Quality first, then the tasks one by one, then costs, then published figures."""
    tables = []
    main = [*kinds["ppl"], *kinds["gap"], *kinds["word"], *kinds["mean"]]
    tables.append(_table("Quality", rows, main, sparsity=True))
    if kinds["task"]:
        tables.append(_table("Zero-shot accuracy, %", rows, kinds["task"]))
        tables[-1].notes.append("Standard errors and normalised accuracies are in report.csv.")
    costs = [column for kind in COSTS for column in kinds[kind]]
    if costs:
        tables.append(_table(COST, rows, costs))
        tables[-1].notes.append(
            "Time: all stages up to the model. Bytes: in the type that stands there; "
            "bit-packed are the non-zero values and one bit a weight."
        )
    beside = _beside_published(rows, kinds["ppl"])
    return [*tables, beside] if beside else tables


def _table(title: str, rows: list[Row], columns: list[Column], sparsity: bool = False) -> Table:
    """A table of rows by columns, the best of each group in bold; empty rows are left out."""
    labels = ["model", *("\n".join(c.label) for c in columns)]
    sparse = sparsity and any(r.results[0].sparsity for r in rows)
    labels += ["sparsity", "whole\nmodel"] * sparse
    shown = [r for r in rows if any(r.values(c) for c in columns) or (sparsity and r.status)]
    table = Table(title, labels, [])
    for i, row in enumerate(shown):
        if i and row.group != shown[i - 1].group:
            table.starts.append(i)
        cells = [Cell(row.name, False, row.status, row.baseline, row.runs)]
        for column in columns:
            cells.append(Cell(_cell(row, column), _is_best(row, column, shown)))
        if sparse:
            shares = row.results[0].sparsity
            cells += [Cell(f"{100 * s:.2f} %") for s in shares] if shares else [Cell(NOTHING)] * 2
        table.rows.append(cells)
    return table


def _cell(row: Row, column: Column) -> str:
    values = row.values(column)
    if not values:
        return NOTHING
    mean = statistics.mean(values)
    if len(values) == 1 or column.kind in COSTS:
        text = show(column.kind, mean)
    else:
        text = f"{show(column.kind, mean)} ± {show(column.kind, statistics.stdev(values))}"
    if column.kind in BYTES:
        text += f" {row.results[0].stored_as}".rstrip()
    return text + f" ({len(values)} of {row.n_seeds})" * (len(values) < row.n_seeds)


def show(kind: str, value: float) -> str:
    """A figure as tables print it."""
    if kind in ("ppl", "word"):
        return f"{value:.2f}" if value < 1e4 else f"{value:.0f}" if value < 1e6 else f"{value:g}"
    if kind in ("task", "norm", "mean", "gap"):
        return f"{100 * value:.1f}"
    if kind == "trained":
        return f"{value:,.0f}"
    return format_duration(value) if kind == "time" else format_bytes(value)


def _is_best(row: Row, column: Column, rows: list[Row]) -> bool:
    """Whether no finished row of the group is better, at the digits that are shown, nor, where the
    measure has a standard error, as good within it."""
    if column.kind not in _LOWER_IS_BETTER or not row.group:
        return False
    sign = 1 if _LOWER_IS_BETTER[column.kind] else -1
    rivals = sorted(
        sign * r.value(column)
        for r in rows
        if r.group == row.group and r.value(column) is not None and not _unfinished(r)
    )
    own = row.value(column)
    if own is None or len(rivals) < 2 or _unfinished(row):
        return False
    errors = [f.stderr for r in row.results for f in r.figures if column.takes(f) and f.stderr]
    if errors and rivals[1] - rivals[0] <= max(errors):
        return False
    return show(column.kind, own) == show(column.kind, sign * rivals[0])


def _unfinished(row: Row) -> bool:
    return any(s.startswith("unfinished") for s in row.results[0].status)


def _beside_published(rows: list[Row], columns: list[Column]) -> Table | None:
    """Measured, published and their difference, for what was measured as the papers do."""
    model = short_name(rows[0].results[0].dense)
    table = Table(PUBLISHED, ["model", "perplexity", "measured", "published", "difference"], [])
    table.columns.append("source")
    others: dict[tuple, dict[str, float]] = {}
    matched = set()
    for column in columns:
        for row in rows:
            measured, first = row.value(column), row.results[0]
            # a dense model stands in the columns of every calibration and has none
            facts = column.facts | {"calibration": first.calibration}
            if measured is None or row.status or not of_protocol(column.name, facts):
                continue
            method = first.method if row.group else "dense"
            for p in published():
                place = (p.model, p.amount, p.corpus, p.window)
                if place != (model, first.amount, column.name, column.facts["window"]):
                    continue
                if p.method != method:
                    others.setdefault(place[1:], {}).setdefault(p.method, p.ppl)
                    continue
                matched.add((p.method, *place[1:]))
                strange = None if first.calibration else column.facts["calibration"]
                told = [line for line in column.label[2:] if line != strange]
                where = ", ".join([f"{p.corpus}@{p.window}", *told])
                texts = [row.name, where, show("ppl", measured), f"{p.ppl:g}"]
                texts += [f"{measured - p.ppl:+.2f}", p.source]
                if texts not in [[cell.text for cell in known] for known in table.rows]:
                    table.rows.append([Cell(t) for t in texts])
    if not table.rows:
        return None
    table.rows.sort(key=lambda cells: [row.name for row in rows].index(cells[0].text))
    names = [row[0].text for row in table.rows]
    table.starts = [i for i in range(1, len(names)) if names[i] != names[i - 1]]
    table.notes.append(
        "Whole test sets, calibrated on 128 x 2048 tokens of C4; what was measured otherwise is "
        "not here. Papers drew other samples, so that last digits differ."
    )
    for (amount, corpus, window), methods in others.items():
        told = {m: p for m, p in methods.items() if (m, amount, corpus, window) not in matched}
        if corpus == "wikitext2" and told:
            best = sorted(told.items(), key=lambda item: item[1])
            table.notes.append(
                f"Also published at {amount} on {corpus}@{window}: "
                + ", ".join(f"{method} {ppl:g}" for method, ppl in best)
            )
    return table


def _remarks(rows: list[Row], kinds: dict[str, list[Column]]) -> list[str]:
    """What a reader must know about these tables, only where it applies."""
    notes = []
    dense = [r for row in rows if row.results[0].stage == "dense" for r in row.results]
    for column in kinds["ppl"]:
        values = [f.value for r in dense for f in r.figures if column.takes(f)]
        if values and max(values) > 1.001 * min(values):
            notes.append(
                f"{column.name}: the runs' dense figures go from {min(values):.4f} to "
                f"{max(values):.4f} though all facts agree; the first one is shown."
            )
    shares = {r.results[0].sparsity for r in rows if r.results[0].sparsity}
    if len({f"{100 * s:.2f}" for s, _ in shares}) < len({f"{100 * s:.2f}" for _, s in shares}):
        notes.append(
            "Whole model: zeros outside the pruned matrices count too; some are there by chance."
        )
    if any(row.n_seeds > 1 for row in rows):
        notes.append("± is the standard deviation over seeds.")
    if kinds["gap"]:
        notes.append(
            "Gap closed: the share of the one-shot model's excess perplexity over dense that the "
            "later stages won back."
        )
    return notes

"""The report's pictures: only those that the figures support, a colour a model in all of them."""

from __future__ import annotations

import contextlib
import re
import statistics
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cap_llm.report.comparison import (
    Column,
    Row,
    Section,
    show,
)
from cap_llm.runtime.console import printable
from cap_llm.runtime.files import atomic

# Okabe and Ito's colours, told apart by colour-blind readers too; black is the dense model's.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#6B6B6B")
_MARKERS = "oD^v"  # once the colours are used up
_SIZE = (4.8, 3.2)  # inches; small, so that the text is read on a phone
_DPI = 220
_NAMES = ("perplexity-over-sparsity", "layers", "training", "zero-shot", "cost")


@dataclass
class Picture:
    """A written PNG and what it shows."""

    path: Path
    caption: str


def draw(sections: list[Section], folder: Path) -> tuple[dict[str, list[Picture]], str]:
    """Writes the pictures of each section to `folder`, and removes those of an earlier report.

    Returns:
        The pictures by the section's title, and what to say of those that are left out.
    """
    for name in _NAMES:
        for path in (*folder.glob(f"{name}.png"), *folder.glob(f"*-{name}.png")):
            with contextlib.suppress(OSError):  # writing to such a folder says what is wrong
                path.unlink()
    pictures: dict[str, list[Picture]] = {section.title: [] for section in sections}
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return pictures, "matplotlib is not installed, so the report has no pictures."
    missing = []
    for n, section in enumerate(sections, 1):
        # the number, as two models may share the rest
        model = re.sub(r"[^\w.-]+", "-", Path(section.title).name)[:60]
        prefix = f"{n}-{model}-" if len(sections) > 1 else ""
        painters = (_over_sparsity, _layers, _training, _zero_shot, _cost)
        for name, painter in zip(_NAMES, painters, strict=True):
            path = folder / f"{prefix}{name}.png"
            canvas = FigureCanvasAgg(Figure(figsize=_SIZE, layout="constrained"))
            try:
                # a dollar in a name is no formula; the font may lack a letter
                with rc_context({"text.parse_math": False}), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    caption = painter(section, canvas.figure)
                    if not caption:
                        continue
                    with atomic(path) as temporary:
                        canvas.figure.savefig(temporary, dpi=_DPI, format="png")
            except Exception as error:  # a report without it is better than none
                why = " ".join(f"{type(error).__name__}: {error}".split())
                missing.append(f"{path.name} is left out ({why}).")
                continue
            pictures[section.title].append(Picture(path, caption))
    return pictures, " ".join(missing)


def _styles(section: Section) -> dict[str, dict]:
    """Colour, marker and line of each row, the same in all pictures."""
    names = [row.name for row in section.rows if row.group]
    styles = {"dense": {"color": "black", "marker": "o", "linestyle": "-"}}
    for i, name in enumerate(names):
        again = i // len(_COLOURS) % len(_MARKERS)
        styles[name] = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[again]}
        styles[name]["linestyle"] = ("-", "--", ":")[min(again, 2)]
    return styles


def _first_perplexity(section: Section) -> Column | None:
    """The perplexity that most rows have."""
    columns = section.columns["ppl"]
    return max(columns, key=lambda c: sum(bool(r.values(c)) for r in section.rows), default=None)


def _dense_value(section: Section, column: Column) -> float | None:
    return next((r.value(column) for r in section.rows if not r.group), None)


def _mark_dense(axes, value: float | None, side: str) -> None:
    """A dotted line at the dense model's perplexity, labelled on the `left` or `right`."""
    if value is None:
        return
    axes.axhline(value, color="black", linewidth=1, linestyle=":")
    axes.annotate(
        f"dense {show('ppl', value)}",
        (0.01 if side == "left" else 0.99, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha=side,
        fontsize=8,
    )


def _scale(axes, values: list[float]) -> None:
    """A logarithmic axis with plain numbers of one size where the values spread widely."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    if max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.tick_params(which="both", axis="y", labelsize=8)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        if max(values) > 30 * min(values):
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_minor_formatter(FuncFormatter(_few))


def _few(value: float, _) -> str:
    """Labels the minor ticks 2, 3 and 5 of a decade."""
    return f"{value:g}" if f"{value:e}"[0] in "235" else ""


def _heading(column: Column) -> str:
    return _text(" ".join(column.label))


def _text(name: str) -> str:
    """A name as a picture shows it: matplotlib leaves labels that begin with `_` out of legends."""
    name = printable(" ".join(name.split()))
    return f" {name}" if name.startswith("_") else name


def _tidy(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e8", linewidth=0.7)
    axes.set_axisbelow(True)


def _legend(figure, axes) -> None:
    """Below the axes, in as many columns as names of this length allow; the picture grows by it."""
    handles, labels = axes.get_legend_handles_labels()
    n_columns = 1 if max(map(len, labels)) > 30 else min(2, len(labels))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.16 * (-(-len(labels) // n_columns)))
    place = "outside lower center"
    figure.legend(handles, labels, loc=place, ncols=n_columns, fontsize=8, frameon=False)


def _over_sparsity(section: Section, figure) -> str:
    """Perplexity over the share of zeros, a line a method."""
    column = _first_perplexity(section)
    if not column:
        return ""
    styles = _styles(section)
    lines: dict[str, list[tuple[float, float]]] = {}
    colours: dict[str, dict] = {}
    for row in section.rows:
        first, value = row.results[0], row.value(column)
        if row.group and first.sparsity and value is not None and not first.status:
            name = f"{first.method} {first.amount}" if ":" in first.amount else first.method
            lines.setdefault(name, []).append((100 * first.sparsity[0], value))
            colours.setdefault(name, styles[row.name])  # its first model's in other pictures
    if len({round(x, 1) for points in lines.values() for x, _ in points}) < 2:
        return ""
    axes = figure.add_subplot()
    for name, points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        style = colours[name] | {"marker": "s" if ":" in name else "o", "markersize": 4}
        axes.plot(x, y, label=_text(name), **style)
    _scale(axes, [y for points in lines.values() for _, y in points])
    _mark_dense(axes, _dense_value(section, column), "right")
    shares = sorted({round(x, 1) for points in lines.values() for x, _ in points})
    told = shares[:1]
    for share in shares[1:]:
        told += [share] if share - told[-1] >= 2 else []  # numbers nearer than this overlap
    if len(told) <= 8:
        axes.set_xticks(told, [f"{x:g}" for x in told])
    axes.set_xlabel("zeros in the pruned matrices, %")
    axes.set_ylabel("perplexity")
    _tidy(axes)
    _legend(figure, axes)
    return f"Perplexity ({_heading(column)}) over sparsity; N:M patterns are squares."


def _layers(section: Section, figure) -> str:
    """Sparsity and relative output error of each block's matrices."""
    rows, known, bare = [], set(), []
    # errors are measured on the calibration text, which recovery does without
    there = [r for r in section.rows if r.results[0].layers and r.results[0].stage != "recover"]
    there, text, others = _alike([r for r in there if r.group], "calibration")
    for row in there:
        blocks = _by_block(row.results[0].layers)
        if len(blocks) > 1 and str(blocks) not in known:
            known.add(str(blocks))
            rows.append((row, blocks))
            bare += [] if any(e for _, e in blocks) else [row.name]
    errors = any(e for _, blocks in rows for _, e in blocks)
    uneven = any(max(s) - min(s) > 0.002 for s in ([s for s, _ in blocks] for _, blocks in rows))
    if not (errors or uneven):
        return ""
    if not uneven:  # there is nothing to draw of those without errors
        rows = [(row, blocks) for row, blocks in rows if row.name not in bare]
    shown, styles = rows[: len(_COLOURS)], _styles(section)
    panels = figure.subplots(uneven + errors, 1, sharex=True, squeeze=False)[:, 0]
    if uneven and errors:
        figure.set_size_inches(_SIZE[0], 1.5 * _SIZE[1])
    for row, blocks in shown:
        places = range(1, len(blocks) + 1)
        style = styles[row.name] | {"label": _text(row.name), "linewidth": 1.4, "marker": None}
        if uneven:
            panels[0].plot(places, [100 * s for s, _ in blocks], **style)
        if errors and any(e for _, e in blocks):
            panels[-1].plot(places, [e or None for _, e in blocks], **style)
    if uneven:
        panels[0].set_ylabel("zeros, %")
    if errors:
        _scale(panels[-1], [e for _, blocks in shown for _, e in blocks if e])
        panels[-1].set_ylabel("relative output error")
    panels[-1].set_xlabel("block")
    panels[-1].locator_params(axis="x", integer=True)
    for axes in panels:
        _tidy(axes)
    _legend(figure, panels[-1 if errors else 0])
    what = [w for w, there in (("sparsity", uneven), ("output error", errors)) if there]
    even = "" if uneven else " Sparsity is the same in all blocks."
    rest = f" The first {len(shown)} of {len(rows)} models." * (len(shown) < len(rows))
    rest += f" No errors are known of {', '.join(bare)}." * bool(errors and bare)
    on = f", on {text}" * bool(errors and text)
    return f"Mean {' and '.join(what)} of the matrices of each block{on}.{even}{rest}{others}"


def _alike(rows: list[Row], fact: str) -> tuple[list[Row], str | None, str]:
    """The rows of which a fact is what it is of most, or is not there; the fact; and a sentence
    that names the rows of which it is another."""
    told = [getattr(row.results[0], fact) for row in rows]
    counts = Counter(text for text in told if text)
    most = counts.most_common(1)[0][0] if counts else None
    pairs = list(zip(rows, told, strict=True))
    others = [f"{row.name} ({text})" for row, text in pairs if text not in (None, most)]
    rest = f" Left out, as they are of other text: {', '.join(others)}." * bool(others)
    return [row for row, text in pairs if text in (None, most)], most, rest


def _by_block(
    layers: list[tuple[str, float, float | None]],
) -> list[tuple[float, float | None]]:
    """Mean sparsity and error over the matrices of each block, which the first number names."""
    blocks: dict[int, list[tuple[float, float | None]]] = {}
    for name, sparsity, error in layers:
        number = re.search(r"\.(\d+)\.", name)
        blocks.setdefault(int(number.group(1)) if number else 0, []).append((sparsity, error))
    means = []
    for _, members in sorted(blocks.items()):
        errors = [e for _, e in members if e is not None]
        means.append(
            (
                statistics.mean(s for s, _ in members),
                statistics.mean(errors) if errors else None,
            )
        )
    return means


def _training(section: Section, figure) -> str:
    """Held-out perplexity along the recovery, a line a run."""
    rows = [row for row in section.rows if any(len(c) > 1 for r in row.results for c in r.curve)]
    rows, text, others = _alike(rows, "training")
    if not rows:
        return ""
    axes, styles, values, dense = figure.add_subplot(), _styles(section), [], set()
    for row in rows:
        for i, result in enumerate(row.results):
            for j, points in enumerate(result.curve):
                x, y = zip(*points, strict=True)
                label = None if i or j else _text(row.name)
                style = styles[row.name] | {"label": label, "alpha": 0.5 if i else 1, "marker": "."}
                axes.plot(x, y, **style)
                values += y
            if result.curve_dense:
                dense.add(round(result.curve_dense, 2))
    for value in dense:
        _mark_dense(axes, value, "left")
    _scale(axes, [*values, *dense])
    axes.set_xlabel("tokens trained")
    axes.set_ylabel("held-out perplexity")
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    _tidy(axes)
    _legend(figure, axes)
    of = text or "the training corpus"
    return f"Perplexity along the recovery, on held-out text of {of}.{others}"


def _zero_shot(section: Section, figure) -> str:
    """Accuracies by task, with their standard errors."""
    columns = section.columns["task"]
    rows = [row for row in section.rows if any(row.values(c) for c in columns)]
    if not columns or not rows:
        return ""
    shown = rows[: len(_COLOURS) + 1]  # dense and one of each colour
    figure.set_size_inches(_SIZE[0], max(_SIZE[1], 0.6 + len(columns) * (0.1 + 0.09 * len(shown))))
    axes, styles = figure.add_subplot(), _styles(section)
    height = 0.84 / len(shown)
    for i, row in enumerate(shown):
        places, widths, errors = [], [], []
        for j, column in enumerate(columns):
            if row.values(column):
                figures = [f for r in row.results for f in r.figures if column.takes(f)]
                places.append(j + (i - (len(shown) - 1) / 2) * height)
                widths.append(100 * row.value(column))
                errors.append(100 * (figures[0].stderr or 0.0))
        axes.barh(
            places,
            widths,
            height,
            xerr=errors,
            color=styles[row.name]["color"],
            hatch="///" if styles[row.name]["linestyle"] != "-" else None,
            edgecolor="white",
            linewidth=0.3,
            label=_text(row.name),
            error_kw={"linewidth": 0.7, "ecolor": "#444444"},
        )
    axes.set_yticks(range(len(columns)), [_heading(c) for c in columns], fontsize=8)
    axes.set_ylim(len(columns) - 0.5, -0.5)
    axes.set_xlabel("accuracy, %")
    _tidy(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e4e4e8", linewidth=0.7)
    _legend(figure, axes)
    rest = f" The first {len(shown)} of {len(rows)} models." * (len(shown) < len(rows))
    return f"Zero-shot accuracy by task; whiskers are one standard error over the items.{rest}"


def _cost(section: Section, figure) -> str:
    """Perplexity over the seconds that made a model, on one machine."""
    column, times = _first_perplexity(section), section.columns["time"]
    if not column or not times:
        return ""
    time = max(times, key=lambda c: sum(bool(r.values(c)) for r in section.rows))
    points = [
        (row, row.value(time) / 60, row.value(column))
        for row in section.rows
        if row.value(time) is not None and row.value(column) is not None
    ]
    if len(points) < 2:
        return ""
    axes, styles = figure.add_subplot(), _styles(section)
    for row, minutes, ppl in points:
        style = styles[row.name] | {"linestyle": "none", "markersize": 6}
        axes.plot([minutes], [ppl], label=_text(row.name), **style)
    _scale(axes, [ppl for *_, ppl in points])
    _mark_dense(axes, _dense_value(section, column), "left")
    axes.set_xlabel("minutes, all stages")
    axes.set_ylabel("perplexity")
    axes.set_xlim(left=0)
    _tidy(axes)
    _legend(figure, axes)
    machine = time.facts.get("machine")
    return f"Perplexity ({_heading(column)}) against the time it took, on {machine}."

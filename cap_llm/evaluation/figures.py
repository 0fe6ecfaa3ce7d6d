"""The report's pictures: only those that the figures support, a colour a model in all of them."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from cap_llm.evaluation.comparison import Column, Section, show
from cap_llm.runtime.files import atomic

# Okabe and Ito's colours, told apart by colour-blind readers too; black is the dense model's.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#6B6B6B")
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
        The pictures by the section's title, and a line that says why there are none.
    """
    for name in _NAMES:
        for path in (*folder.glob(f"{name}.png"), *folder.glob(f"*-{name}.png")):
            path.unlink()
    pictures: dict[str, list[Picture]] = {section.title: [] for section in sections}
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return pictures, "matplotlib is not installed, so the report has no pictures."
    for section in sections:
        prefix = re.sub(r"[^\w.-]+", "-", section.title) + "-" if len(sections) > 1 else ""
        painters = (_over_sparsity, _layers, _training, _zero_shot, _cost)
        for name, painter in zip(_NAMES, painters, strict=True):
            canvas = FigureCanvasAgg(Figure(figsize=_SIZE, layout="constrained"))
            caption = painter(section, canvas.figure)
            if caption:
                path = folder / f"{prefix}{name}.png"
                with atomic(path) as temporary:
                    canvas.figure.savefig(temporary, dpi=_DPI, format="png")
                pictures[section.title].append(Picture(path, caption))
    return pictures, ""


def _colours(section: Section) -> dict[str, str]:
    """A colour for each row's name."""
    names = [row.name for row in section.rows if row.group]
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    return colours | {"dense": "black"}


def _first_perplexity(section: Section) -> Column | None:
    """The perplexity that most rows have."""
    columns = section.columns["ppl"]
    return max(columns, key=lambda c: sum(bool(r.values(c)) for r in section.rows), default=None)


def _dense_line(axes, section: Section, column: Column) -> None:
    dense = next((r.value(column) for r in section.rows if not r.group), None)
    if dense is not None:
        axes.axhline(dense, color="black", linewidth=1, linestyle=":")
        axes.annotate(
            f"dense {show('ppl', dense)}",
            (0.01, dense),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
        )


def _scale(axes, values: list[float]) -> None:
    """A logarithmic axis with plain numbers where the values spread over more than tenfold."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    if max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        if max(values) > 30 * min(values):
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_minor_formatter(FuncFormatter(_few))
            axes.tick_params(which="minor", labelsize=7)


def _few(value: float, _) -> str:
    """Labels the minor ticks 2, 3 and 5 of a decade."""
    return f"{value:g}" if f"{value:e}"[0] in "235" else ""


def _heading(column: Column) -> str:
    return " ".join(column.label)


def _tidy(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e8", linewidth=0.7)
    axes.set_axisbelow(True)


def _legend(figure, axes, n: int) -> None:
    """Below the axes, in as many columns as names of this length allow."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > 36 else 2
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(columns, n),
        fontsize=8,
        frameon=False,
    )


def _over_sparsity(section: Section, figure) -> str:
    """Perplexity over the share of zeros, a line a method."""
    column = _first_perplexity(section)
    if not column:
        return ""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in section.rows:
        first, value = row.results[0], row.value(column)
        if row.group and first.sparsity and value is not None and not first.status:
            name = f"{first.method} {first.amount}" if ":" in first.amount else first.method
            lines.setdefault(name, []).append((100 * first.sparsity[0], value))
    if len({round(x, 1) for points in lines.values() for x, _ in points}) < 2:
        return ""
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(lines.items()):
        marker = "s" if ":" in name else "o"
        x, y = zip(*sorted(points), strict=True)
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(x, y, marker=marker, markersize=4, color=colour, label=name)
    _scale(axes, [y for points in lines.values() for _, y in points])
    _dense_line(axes, section, column)
    axes.set_xlabel("zeros in the pruned matrices, %")
    axes.set_ylabel("perplexity")
    _tidy(axes)
    _legend(figure, axes, len(lines))
    return f"Perplexity ({_heading(column)}) over sparsity; N:M patterns are squares."


def _layers(section: Section, figure) -> str:
    """Sparsity and relative output error of each block's matrices."""
    rows, known = [], set()
    for row in section.rows:
        layers = row.results[0].layers
        if not row.group or not layers or row.results[0].stage == "recover":
            continue
        blocks = _by_block(layers)
        if len(blocks) > 1 and str(blocks) not in known:
            known.add(str(blocks))
            rows.append((row, blocks))
    errors = any(e for _, blocks in rows for _, e in blocks)
    uneven = any(max(s) - min(s) > 0.002 for s in ([s for s, _ in blocks] for _, blocks in rows))
    if not (errors or uneven):
        return ""
    shown, colours = rows[: len(_COLOURS)], _colours(section)
    panels = figure.subplots(uneven + errors, 1, sharex=True, squeeze=False)[:, 0]
    if uneven and errors:
        figure.set_size_inches(_SIZE[0], 1.5 * _SIZE[1])
    for row, blocks in shown:
        places = range(1, len(blocks) + 1)
        style = {"color": colours[row.name], "label": row.name, "linewidth": 1.4}
        if uneven:
            panels[0].plot(places, [100 * s for s, _ in blocks], **style)
        if errors and any(e for _, e in blocks):
            panels[-1].plot(places, [e or None for _, e in blocks], **style)
    if uneven:
        panels[0].set_ylabel("zeros, %")
    if errors:
        panels[-1].set_yscale("log")
        panels[-1].set_ylabel("relative output error")
    panels[-1].set_xlabel("block")
    for axes in panels:
        _tidy(axes)
    _legend(figure, panels[-1 if errors else 0], len(shown))
    what = [w for w, there in (("sparsity", uneven), ("output error", errors)) if there]
    even = "" if uneven else " Sparsity is the same in all blocks."
    rest = f" The first {len(shown)} of {len(rows)} models." * (len(shown) < len(rows))
    return f"Mean {' and '.join(what)} of the matrices of each block.{even}{rest}"


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
    if not rows:
        return ""
    axes, colours, values, dense = figure.add_subplot(), _colours(section), [], set()
    for row in rows:
        for i, result in enumerate(row.results):
            for j, points in enumerate(result.curve):
                x, y = zip(*points, strict=True)
                label = None if i or j else row.name
                axes.plot(
                    x,
                    y,
                    marker=".",
                    color=colours[row.name],
                    label=label,
                    alpha=1 if not i else 0.5,
                )
                values += y
            if result.curve_dense:
                dense.add(round(result.curve_dense, 2))
    for value in dense:
        axes.axhline(value, color="black", linewidth=1, linestyle=":")
    if len(dense) == 1:
        place = (0.01, *dense)
        axes.annotate(
            f"dense {show('ppl', *dense)}",
            place,
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
        )
    _scale(axes, [*values, *dense])
    axes.set_xlabel("tokens trained")
    axes.set_ylabel("held-out perplexity")
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    _tidy(axes)
    _legend(figure, axes, len(rows))
    return "Perplexity on held-out text of the training corpus along the recovery."


def _zero_shot(section: Section, figure) -> str:
    """Accuracies by task, with their standard errors."""
    columns = section.columns["task"]
    rows = [row for row in section.rows if any(row.values(c) for c in columns)]
    if not columns or not rows:
        return ""
    rows = rows[: len(_COLOURS) + 1]
    figure.set_size_inches(_SIZE[0], max(_SIZE[1], 0.5 + len(columns) * (0.25 + 0.11 * len(rows))))
    axes, colours = figure.add_subplot(), _colours(section)
    height = 0.8 / len(rows)
    for i, row in enumerate(rows):
        places, widths, errors = [], [], []
        for j, column in enumerate(columns):
            if row.values(column):
                figures = [f for r in row.results for f in r.figures if column.takes(f)]
                places.append(j + (i - (len(rows) - 1) / 2) * height)
                widths.append(100 * row.value(column))
                errors.append(100 * (figures[0].stderr or 0.0) / len(row.values(column)) ** 0.5)
        axes.barh(
            places,
            widths,
            height,
            xerr=errors,
            color=colours[row.name],
            label=row.name,
            error_kw={"linewidth": 0.7, "ecolor": "#444444"},
        )
    axes.set_yticks(range(len(columns)), [_heading(c) for c in columns], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy, %")
    _tidy(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e4e4e8", linewidth=0.7)
    _legend(figure, axes, len(rows))
    return "Zero-shot accuracy by task; whiskers are one standard error over the items."


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
    axes, colours = figure.add_subplot(), _colours(section)
    for row, minutes, ppl in points:
        marker = "s" if ":" in row.results[0].amount else "o"
        axes.plot([minutes], [ppl], marker, markersize=7, color=colours[row.name], label=row.name)
    _scale(axes, [ppl for *_, ppl in points])
    _dense_line(axes, section, column)
    axes.set_xlabel("minutes, all stages")
    axes.set_ylabel("perplexity")
    axes.set_xlim(left=0)
    _tidy(axes)
    _legend(figure, axes, len(points))
    machine = time.facts.get("machine")
    return f"Perplexity ({_heading(column)}) against the time it took, on {machine}."

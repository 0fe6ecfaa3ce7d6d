"""The report's pictures: perplexity by sparsity, errors by block, the course of the recovery."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cap_llm.report.comparison import Row, Section, perplexity
from cap_llm.runtime.console import printable
from cap_llm.runtime.errors import one_line
from cap_llm.runtime.files import atomic

# Okabe and Ito's colors, for color-blind readers too; black is the dense model's
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#6B6B6B")
_SIZE, _DPI = (4.8, 3.2), 220  # small, so that the text can be read on a phone
FOLDER = "figures"


@dataclass
class Picture:
    """A PNG and what it shows."""

    path: Path
    caption: str


def draw(sections: list[Section], folder: Path) -> tuple[dict[str, list[Picture]], list[str]]:
    """Writes the pictures that the results support, and removes those of an earlier report.

    Returns:
        The pictures by the section's title, and a line for each that could not be drawn.
    """
    pictures: dict[str, list[Picture]] = {section.title: [] for section in sections}
    for name in _PAINTERS:
        for path in folder.glob(f"*{name}.png"):
            with contextlib.suppress(OSError):  # writing into such a folder says what is wrong
                path.unlink()
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return pictures, ["The report has no pictures because matplotlib is not installed."]
    problems = []
    for n, section in enumerate(sections, 1):
        prefix = f"{n}-" * (len(sections) > 1)
        for name, paint in _PAINTERS.items():
            path = folder / f"{prefix}{name}.png"
            figure = FigureCanvasAgg(Figure(figsize=_SIZE, layout="constrained")).figure
            try:
                # a dollar sign in a name is not a formula; the font may lack a letter
                with rc_context({"text.parse_math": False}), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    caption = paint(section, figure.add_subplot())
                    if caption:
                        _legend(figure)
                        with atomic(path) as temporary:
                            figure.savefig(temporary, dpi=_DPI, format="png")
                        pictures[section.title].append(Picture(path, caption))
            except Exception as error:  # a report without it is better than none
                problems.append(f"{path.name}: {one_line(error)}")
    return pictures, problems


def _by_sparsity(section: Section, axes) -> str:
    """Perplexity over the share of zeros, a line per method."""
    columns = section.perplexities
    column = max(columns, key=lambda c: sum(bool(r.values(c)) for r in section.rows), default=None)
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in section.rows if column else ():
        result = row.result
        if row.group and result.sparsity and row.values(column):
            name = result.name if ":" in result.amount else result.method
            lines.setdefault(name, []).append((100 * result.sparsity, row.mean(column)))
    shares = sorted({round(x, 1) for points in lines.values() for x, _ in points})
    if len(shares) < 2:
        return ""
    for color, (name, points) in zip(_colors(), lines.items(), strict=False):
        marker = "s" if ":" in name else "o"
        axes.plot(
            *zip(*sorted(points), strict=True), marker, ls="-", color=color, label=_text(name)
        )
    _scale(axes, [y for points in lines.values() for _, y in points])
    _mark_dense(axes, [r.mean(column) for r in section.rows if not r.group and r.values(column)])
    if len(shares) <= 8:
        axes.set_xticks(shares, [f"{x:g}" for x in shares])
    axes.set(xlabel="zeros in the pruned matrices, %", ylabel="perplexity")
    return f"Perplexity ({_text(column.title)}) by sparsity. Squares are N:M patterns."


def _by_block(section: Section, axes) -> str:
    """Relative output error of the pruned matrices of each block, a line per model."""
    rows = [r for r in section.rows if len(r.result.block_errors) > 1 and not r.result.training]
    rows, text = _of_one_text(rows, "calibration")
    for color, row in zip(_colors(), rows, strict=False):
        errors = row.result.block_errors
        axes.plot(range(1, len(errors) + 1), errors, color=color, label=_text(row.name))
    if rows:
        _scale(axes, [error for row in rows for error in row.result.block_errors])
    axes.set(xlabel="block", ylabel="relative output error")
    axes.locator_params(axis="x", integer=True)
    return f"Mean relative output error of the pruned matrices of each block{text}." * bool(rows)


def _by_tokens(section: Section, axes) -> str:
    """Held-out perplexity along the recovery, a line per row and seed."""
    rows = [row for row in section.rows if row.result.curve]
    rows, text = _of_one_text(rows, "training")
    curves = [(row, level) for row in rows for m in row.models for level in m.result.curve]
    colors = dict(zip((row.name for row in rows), _colors(), strict=False))
    for row, points in curves:
        label = _text(row.name) if points is row.result.curve[0] else None
        color = colors.get(row.name, _COLORS[-1])
        axes.plot(*zip(*points, strict=True), marker=".", color=color, label=label)
    if not any(len(points) > 1 for _, points in curves):
        return ""
    dense = [row.result.dense_ppl for row in rows if row.result.dense_ppl]
    _scale(axes, [ppl for _, points in curves for _, ppl in points] + dense)
    _mark_dense(axes, dense)
    axes.set(xlabel="tokens trained", ylabel="held-out perplexity")
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    return f"Held-out perplexity along the recovery{text}."


_PAINTERS = {
    "perplexity-by-sparsity": _by_sparsity,
    "error-by-block": _by_block,
    "recovery": _by_tokens,
}


def _colors() -> Iterable[str]:
    return _COLORS * 4


def _of_one_text(rows: list[Row], field: str) -> tuple[list[Row], str]:
    """The rows that share their most frequent text, and words about the text for the caption."""
    texts = [getattr(row.result, field) for row in rows]
    text = Counter(texts).most_common(1)[0][0] if rows else None
    others = len(rows) - texts.count(text)
    words = f" on {text}" * bool(text) + f" ({others} models on other text are not shown)" * (
        others > 0
    )
    return [row for row in rows if getattr(row.result, field) == text], words


def _mark_dense(axes, values: list[float]) -> None:
    """A dotted line at the dense model's perplexity."""
    for value in values[:1]:
        axes.axhline(value, color="black", linewidth=1, linestyle=":")
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        text = f"dense {perplexity(value)}"
        axes.annotate(text, (0.99, value), xytext=(0, 3), ha="right", fontsize=8, **place)


def _scale(axes, values: list[float]) -> None:
    """A logarithmic axis with plain numbers if the values spread widely."""
    if max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        wide = max(values) > 30 * min(values)
        axes.yaxis.set_minor_formatter(
            lambda v, _: f"{v:g}" if not wide and f"{v:e}"[0] in "235" else ""
        )


def _text(name: str) -> str:
    """A name as a picture shows it: legends leave out labels that begin with `_`."""
    return re.sub("^_", " _", printable(" ".join(name.split())))


def _legend(figure) -> None:
    """Styles the axes and adds the legend below, which makes the picture higher."""
    (axes,) = figure.axes
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e8", linewidth=0.7)
    handles, labels = axes.get_legend_handles_labels()
    n_columns = 1 if max(map(len, labels)) > 30 else min(2, len(labels))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.16 * -(-len(labels) // n_columns))
    place = "outside lower center"
    figure.legend(handles, labels, loc=place, ncols=n_columns, fontsize=8, frameon=False)

"""The report over any runs: as Markdown, a page, CSV, pictures, and on the console."""

from __future__ import annotations

import base64
import copy
import csv
import io
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jinja2

from cap_llm.report.comparison import (
    COST,
    PUBLISHED,
    Cell,
    Section,
    Table,
    compare,
)
from cap_llm.report.figures import Picture, draw
from cap_llm.report.runs import Figure, Result
from cap_llm.runtime.console import Console, printable
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import atomic

_PAGE = jinja2.Environment(
    loader=jinja2.PackageLoader("cap_llm.report", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(results: list[Result], folder: Path, title: str, console: Console) -> Path:
    """Prints the main table; writes `report.md`, `report.html`, `report.csv` and `figures/`.

    Returns:
        The page's path.

    Raises:
        UserError: `folder` cannot be written.
    """
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the report cannot be written to {folder}: {error.strerror}") from None
    runs = list(dict.fromkeys(r.run for r in results))
    damaged = [run for run in runs if not _compares([r for r in results if r.run == run], console)]
    results = [r for r in results if r.run not in damaged]
    sections = compare(results)
    pictures, missing = draw(sections, folder / "figures")
    for section in sections:
        heading = title if len(sections) == 1 else f"{title}: {section.title}"
        _print(heading, section.tables[0], console)
        for _, _, meaning in (mark for mark in _legend(section) if mark[0] == "best"):
            console.say(f"* {meaning}")
        for table in section.tables[1:]:
            if table.title == PUBLISHED or (table.title == COST and len(table.rows) > 2):
                _print(table.title, table, console)
        for note in section.tables[0].notes:
            console.say(note)
    if missing:
        console.say(missing)
    told = [_provenance(run, results) for run in runs if run not in damaged]
    page = Page(title, sections, pictures, told, _common(told), missing)
    text = {"report.md": _markdown(page), "report.html": _html(page), "report.csv": _csv(results)}
    for name, content in text.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(printable(content), encoding="utf-8")
    return folder / "report.html"


def _compares(results: list[Result], console: Console) -> bool:
    """Whether the models of one run can be shown; says so if what they hold is too odd for it."""
    try:
        compare(copy.deepcopy(results))
    except Exception as error:  # of any kind: the files are not as any version writes them
        why = " ".join(f"{type(error).__name__}: {error}".split())
        console.say(
            f"{results[0].run} is skipped: it is not as this version writes it ({why})",
            style="yellow",
        )
        return False
    return True


# where it comes from


@dataclass
class Provenance:
    """A run directory and what it says of itself."""

    run: str
    facts: list[tuple[str, str]]


def _provenance(run: Path, results: Iterable[Result]) -> Provenance:
    own = [r for r in results if r.run == run]
    facts = [("models", ", ".join(f"{r.name} ({r.stage})" for r in own))]
    calibrated = [f"{r.calibration}, seed {r.drawn[0]}" for r in own if r.calibration]
    facts += [("calibration", text) for text in dict.fromkeys(calibrated)]
    trained = [r.training for r in own if r.training]
    facts += [("trained on", text) for text in dict.fromkeys(trained)]
    jobs = [(r.stage, r.environment) for r in own]
    jobs += [(f"scores of {r.stage}", f.environment) for r in own for f in r.figures]
    for name in ("command", "directory", "versions", "machine"):
        told: dict[str, list[str]] = {}  # what made it: one line for each distinct answer
        for work, environment in jobs:
            if name in environment:
                told.setdefault(environment[name], []).append(work)
        for text, works in told.items():
            whose = f" ({', '.join(dict.fromkeys(works))})" if len(told) > 1 else ""
            facts.append((name + whose, text))
    facts += [("incomplete", f"{r.name}: {'; '.join(r.status)}") for r in own if r.status]
    return Provenance(str(run), facts)


def _common(runs: list[Provenance]) -> list[tuple[str, str]]:
    """Takes out what all of several runs say alike."""
    if len(runs) < 2:
        return []
    common = [fact for fact in runs[0].facts if all(fact in run.facts for run in runs)]
    for run in runs:
        run.facts = [fact for fact in run.facts if fact not in common]
    return common


# files


@dataclass
class Page:
    """What the report shows, in whatever format.

    Attributes:
        title: of the whole.
        sections: one for each dense model.
        pictures: by the section's title.
        runs: where the figures come from.
        common: what all runs say alike.
        missing: why there are no pictures; empty if there are.
    """

    title: str
    sections: list[Section]
    pictures: dict[str, list[Picture]]
    runs: list[Provenance]
    common: list[tuple[str, str]]
    missing: str


def _print(title: str, table: Table, console: Console) -> None:
    """Prints a table: its texts wrapped, and as many columns as there is room for."""
    longest = max(8, console.width // 4)  # so that a name and a source leave the figures their half
    rows = [
        ["\n".join(textwrap.wrap(_named(c) + " *" * c.best, longest)) for c in row]
        for row in table.rows
    ]
    widths = [
        max(len(line) for text in (label, *texts) for line in text.split("\n")) + 3
        for label, *texts in zip(table.columns, *rows, strict=True)
    ]
    n = sum(1 for i in range(len(widths)) if sum(widths[: i + 1]) + 1 <= console.width)
    console.table(title, table.columns[:n], [row[:n] for row in rows])
    if n < len(widths):
        more = len(widths) - n
        console.say(f"{more} more column{'s' * (more > 1)} in report.html")


def _legend(section: Section) -> list[tuple[str, str, str]]:
    """How the section's tables mark cells, where they do: class, sample, meaning."""
    cells = [cell for table in section.tables for row in table.rows for cell in row]
    marks = []
    if any(c.best for c in cells):
        meaning = "best of its pattern and sparsity"
        meaning += ", accuracies by more than their standard error" * bool(section.columns["task"])
        marks.append(("best", "bold", meaning))
    if any(c.baseline and c.text != "dense" for c in cells):
        marks.append(("baseline", "italics", "baseline: dense or one-shot"))
    return marks


def _named(cell: Cell) -> str:
    return f"{cell.text} ({cell.status})" if cell.status else cell.text


def _markdown(page: Page) -> str:
    lines = [f"# {_plain(page.title)}", ""]
    for section in page.sections:
        lines += [f"## {_plain(section.title)}", ""] * (len(page.sections) > 1)
        for table in section.tables:
            columns = [_plain(c) for c in table.columns]
            lines += [f"### {table.title}", "", _line(columns)]
            lines.append(_line(["---"] + ["---:"] * (len(columns) - 1)))
            for row in table.rows:
                cells = [_plain(_named(c)) for c in row]
                cells = [f"**{t}**" if c.best else t for t, c in zip(cells, row, strict=True)]
                cells[0] = f"*{cells[0]}*" if row[0].baseline else cells[0]
                cells[0] += "".join(f" ({n})" for n in row[0].runs)
                lines.append(_line(cells))
            legend = _legend(section) if table is section.tables[0] else []
            signs = {"best": "**bold**", "baseline": "*italics*"}
            marks = [f"{signs[kind]}: {meaning}" for kind, _, meaning in legend]
            lines += ["", *(f"- {note}" for note in (*marks, *map(_plain, table.notes))), ""]
        for picture in page.pictures[section.title]:
            caption = _plain(picture.caption)
            lines += [f"![{caption}](figures/{picture.path.name})", "", caption, ""]
    lines += [_plain(page.missing), ""] * bool(page.missing)
    lines += ["## Where the figures come from", "", "By the numbers behind the models' names.", ""]
    facts = [_fact(name, value) for name, value in page.common]
    lines += [f"- all: {fact}" for fact in facts] + [""] * bool(facts)
    for n, run in enumerate(page.runs, 1):
        lines.append(f"{n}. {_code(run.run)}")
        lines += [f"   - {_fact(name, value)}" for name, value in run.facts]
    return "\n".join([*lines, ""])


def _plain(text: str) -> str:
    """Any text as Markdown that shows it on one line; `_` inside a word is no sign."""
    special = r"[\\`*\[\]<>|$~&]|(?<!\w)_|_(?!\w)"
    return re.sub(special, lambda sign: "\\" + sign.group(), " ".join(text.split()))


def _code(text: str) -> str:
    """Any text as Markdown's code, within more backticks than it has."""
    text, fence = " ".join(text.split()), "`"
    while fence in text:
        fence += "`"
    space = " " * (text[:1] == "`" or text[-1:] == "`")
    return f"{fence}{space}{text}{space}{fence}"


def _fact(name: str, value: str) -> str:
    return f"{_plain(name)}: {(_code if name.startswith('command') else _plain)(value)}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _html(page: Page) -> str:
    files = [p.path for some in page.pictures.values() for p in some]
    inline = {path.name: base64.b64encode(path.read_bytes()).decode() for path in files}
    template = _PAGE.get_template("report.html.j2")
    return template.render(vars(page), inline=inline, published=PUBLISHED, legend=_legend)


def _csv(results: list[Result]) -> str:
    """One line a figure, unfolded: everything that is known about it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["dense model", "model", "stage", "method", "amount", "stored as", "seeds", "status"]
    head += ["measure", "name", "value", "stderr", "facts", "run", "command", "machine"]
    writer.writerow(head)
    for r in results:
        seeds = " ".join(map(str, r.seeds))
        about = [r.dense, r.name, r.stage, r.method, r.amount, r.stored_as, seeds]
        about.append("; ".join(r.status))
        shares = zip(("sparsity", "sparsity of the whole model"), r.sparsity or (), strict=False)
        for f in (*(Figure(kind, "", share) for kind, share in shares), *r.figures):
            told = "; ".join(f"{k}={v}" for k, v in f.facts.items() if v is not None)
            job = f.environment or r.environment
            where = [r.run, job.get("command"), job.get("machine")]
            row = [*about, f.kind, f.name, f.value, f.stderr, told, *where]
            writer.writerow([_no_formula(x) if isinstance(x, str | Path) else x for x in row])
    return out.getvalue()


def _no_formula(text: str | Path) -> str:
    """A text that a spreadsheet takes for one, whatever it begins with."""
    return re.sub(r"^(?=[=+@\t\r-])", "'", str(text))

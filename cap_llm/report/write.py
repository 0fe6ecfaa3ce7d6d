"""The report of runs: Markdown, an HTML page, CSV, pictures, and the console."""

from __future__ import annotations

import base64
import csv
import io
import os
import re
import textwrap
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jinja2

import cap_llm
from cap_llm.report.comparison import COST, PUBLISHED, Section, Table, compare
from cap_llm.report.figures import FOLDER, Picture, draw
from cap_llm.report.runs import Model
from cap_llm.runtime.console import Console, printable
from cap_llm.runtime.environment import Environment, machine
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import atomic

_PAGE = jinja2.Environment(
    loader=jinja2.PackageLoader("cap_llm.report", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
_COSTS = ("sparsity", "whole_sparsity", "n_bytes", "packed_bytes", "seconds", "tokens")
_COSTS += ("peak_memory_bytes", "peak_cuda_bytes")


@dataclass
class Page:
    """The content of the report, in any format.

    Attributes:
        title: title of the report.
        intro: when it was written, and what its measures mean.
        sections: one per dense model.
        pictures: by the section's title.
        runs: where the numbers come from.
        problems: what could not be read or drawn.
    """

    title: str
    intro: list[str]
    sections: list[Section]
    pictures: dict[str, list[Picture]]
    runs: list[Source]
    problems: list[str]


@dataclass
class Source:
    """A run directory and its jobs; each job's facts are pairs of a name and a text."""

    run: str
    jobs: list[list[tuple[str, str]]]


def write_report(
    models: list[Model], problems: list[str], folder: Path, title: str, console: Console
) -> Path:
    """Prints the main tables; writes `report.md`, `report.html`, `report.csv` and `figures/`.

    Args:
        models: the models of all runs.
        problems: what could not be read; a line each.
        folder: where the report is written.
        title: title of the report.
        console: where the tables are printed.

    Returns:
        The page's path.

    Raises:
        UserError: `folder` is not writable.
    """
    try:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the report cannot be written to {folder}: {error.strerror}") from None
    sections = compare(models)
    pictures, missing = draw(sections, folder / FOLDER)
    for section in sections:
        heading = title if len(sections) == 1 else f"{title}: {section.title}"
        for table in section.tables:
            if table is section.tables[0] or table.title in (PUBLISHED, COST):
                _print(heading if table is section.tables[0] else table.title, table, console)
        for note in section.tables[0].notes:
            console.say(note)
    for problem in problems + missing:
        console.say(problem, style="yellow")
    page = Page(title, _intro(sections), sections, pictures, _sources(models), problems + missing)
    contents = {
        "report.md": _markdown(page),
        "report.html": _html(page),
        "report.csv": _csv(models),
    }
    for name, content in contents.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(printable(content), encoding="utf-8")
    return folder / "report.html"


def _intro(sections: list[Section]) -> list[str]:
    now = time.strftime("%Y-%m-%d %H:%M")
    lines = [f"Written by cap_llm {cap_llm.__version__} on {now}."]
    scores = [column.score for section in sections for column in section.perplexities]
    if windows := sorted({str(score.facts["window"]) for score in scores if score}, key=int):
        lines.append(
            f"ppl_token is the perplexity per token on separate windows of "
            f"{' or '.join(windows)} tokens; lower is better. Perplexities of different "
            "windows, texts or tokenizers are not comparable."
        )
    return lines


def _sources(models: list[Model]) -> list[Source]:
    runs = list(dict.fromkeys(model.run for model in models))
    paths = [run.resolve() for run in runs]
    parent = os.path.commonpath([path.parent for path in paths]) if paths else ""
    sources = []
    for run, path in zip(runs, paths, strict=True):
        own = [model for model in models if model.run == run]
        works = [("made", m.folder.name, m.result.job) for m in own if m.result.job]
        works += [("scored", m.folder.name, s.job) for m in own for s in m.scores if s.job]
        jobs: dict[str, tuple[Environment, dict[str, list[str]]]] = {}
        for work, folder, job in works:
            _, done = jobs.setdefault(f"{job['command']}{job['hardware']}", (job, {}))
            done.setdefault(work, []).append(folder)
        facts = [_job_facts(*entry) for entry in jobs.values()]
        sources.append(Source(os.path.relpath(path, parent), facts))
    return sources


def _job_facts(job: Environment, done: dict[str, list[str]]) -> list[tuple[str, str]]:
    works = [f"{work} {', '.join(dict.fromkeys(folders))}" for work, folders in done.items()]
    ranks = job["hardware"]["ranks"]
    versions = [f"{name} {version}" for name, version in job["versions"].items() if version]
    versions += [f"commit {job['commit']}"] if job["commit"] else []
    return [
        ("job", "; ".join(works)),
        ("command", job["command"]),
        ("directory", job["directory"]),
        ("started", job["started"]),
        ("machine", machine(job["hardware"]) + f", {ranks} ranks" * (ranks > 1)),
        ("versions", ", ".join(versions)),
    ]


def _print(title: str, table: Table, console: Console) -> None:
    """Prints a table with wrapped texts, and as many columns as fit."""
    longest = max(8, console.width // 4)
    rows = [
        ["\n".join(textwrap.wrap(cell.text + " *" * cell.best, longest)) for cell in row]
        for row in table.rows
    ]
    widths = [
        max(len(line) for text in (label, *texts) for line in text.split("\n")) + 3
        for label, *texts in zip(table.columns, *rows, strict=True)
    ]
    n = sum(1 for i in range(len(widths)) if sum(widths[: i + 1]) + 1 <= console.width)
    console.table(title, table.columns[:n], [row[:n] for row in rows])
    if n < len(widths):
        console.say(f"report.html has {len(widths) - n} more columns")


def _markdown(page: Page) -> str:
    lines = [f"# {_plain(page.title)}", "", *(f"{_plain(line)}\n" for line in page.intro)]
    for section in page.sections:
        lines += [f"## {_plain(section.title)}", ""]
        for table in section.tables:
            columns = [_plain(column) for column in table.columns]
            lines += [f"### {table.title}", "", _line(columns)]
            lines.append(_line(["---"] + ["---:"] * (len(columns) - 1)))
            for row in table.rows:
                cells = [f"**{_plain(c.text)}**" if c.best else _plain(c.text) for c in row]
                cells[0] = f"*{cells[0]}*" if row[0].baseline else cells[0]
                cells[0] += "".join(f" ({n})" for n in row[0].runs)
                lines.append(_line(cells))
            lines += ["", *(f"- {_plain(note)}" for note in table.notes), ""]
        for picture in page.pictures[section.title]:
            caption = _plain(picture.caption)
            lines += [f"![{caption}]({FOLDER}/{picture.path.name})", "", caption, ""]
    if page.problems:
        lines += ["## Left out", "", *(f"- {_plain(problem)}" for problem in page.problems), ""]
    lines += ["## Runs", ""]
    for n, run in enumerate(page.runs, 1):
        lines.append(f"{n}. {_code(run.run)}")
        for job in run.jobs:
            facts = [f"   - {k}: {(_code if k == 'command' else _plain)(v)}" for k, v in job[1:]]
            summary = f"   <details><summary>{_plain(job[0][1])}</summary>"
            lines += ["", summary, "", *facts, "", "   </details>"]
        lines.append("")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Any text as Markdown that shows it on one line; `_` inside a word has no meaning."""
    special = r"[\\`*\[\]<>|$~&]|(?<!\w)_|_(?!\w)"
    return re.sub(special, lambda sign: "\\" + sign.group(), " ".join(text.split()))


def _code(text: str) -> str:
    """Any text as code in Markdown, within more backticks than it has."""
    text, fence = " ".join(text.split()), "`"
    while fence in text:
        fence += "`"
    space = " " * (text[:1] == "`" or text[-1:] == "`")
    return f"{fence}{space}{text}{space}{fence}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _html(page: Page) -> str:
    files = [picture.path for pictures in page.pictures.values() for picture in pictures]
    inline = {path.name: base64.b64encode(path.read_bytes()).decode() for path in files}
    return _PAGE.get_template("report.html.j2").render(vars(page), inline=inline)


def _csv(models: list[Model]) -> str:
    """One line per number, with everything that is known about it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["dense model", "model", "stage", "method", "amount", "stored as", "seeds"]
    head += ["calibration", "measure", "data", "value", "stderr", "n", "facts", "run", "command"]
    writer.writerow([*head, "machine"])
    for model in models:
        r = model.result
        about = [r.dense, model.name, r.stage, r.method, r.amount, r.dtype]
        about += [" ".join(map(str, r.seeds)), r.calibration or ""]
        costs = [(name, getattr(r, name)) for name in _COSTS]
        rows = [[name, "", v, "", "", "", r.job] for name, v in costs if v]
        for s in model.scores:
            facts = "; ".join(f"{k}={v}" for k, v in s.facts.items() if v is not None)
            error = "" if s.stderr is None else s.stderr
            rows.append([s.measure, s.data, s.value, error, s.n, facts, s.job])
        for *row, job in rows:
            where = [job["command"], machine(job["hardware"])] if job else ["", ""]
            row = [*about, *row, str(model.run), *where]
            writer.writerow([_not_formula(x) if isinstance(x, str) else x for x in row])
    return out.getvalue()


def _not_formula(text: str) -> str:
    """A text that a spreadsheet does not take for a formula."""
    return re.sub(r"^(?=[=+@\t\r-])", "'", text)

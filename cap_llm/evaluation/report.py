"""The report: one table of runs, as Markdown, as a page, and on the console."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jinja2

from cap_llm.runtime.console import Console, duration, size
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import atomic, read_json

_PAGE = jinja2.Environment(
    loader=jinja2.PackageLoader("cap_llm.evaluation", "."), autoescape=True, trim_blocks=True
)


@dataclass
class Line:
    """One model of one run, as the table shows it.

    Attributes:
        name: the run's, or `dense`.
        perplexity: by `corpus@window`.
        sparsity: share of zeros in the pruned matrices and in the whole model.
        seconds: of the stage that made the model.
        peak: bytes of memory that stage held, a rank.
        calibration: the text the stage read.
        origin: the run directory.
    """

    name: str
    perplexity: dict[str, float]
    sparsity: tuple[float, float] | None
    seconds: float | None
    peak: int | None
    calibration: str | None
    origin: str


def collect(folder: Path) -> list[Line]:
    """The scored or finished models of a run directory.

    Raises:
        UserError: it is no run directory.
    """
    if not (folder / "environment.json").exists():
        raise UserError(f"{folder} is no run directory: it has no environment.json")
    title = read_json(folder / "environment.json")["run"]
    lines = []
    stages = [s for s in ("dense", "oneshot", "recover") if (folder / s).is_dir()]
    for stage in stages:
        place = folder / stage
        scored = place / "perplexity.json"
        done = place / "done.json"
        if not (scored.exists() or done.exists()):
            continue
        corpora = read_json(scored)["corpora"] if scored.exists() else {}
        summary = read_json(done) if done.exists() else {}
        sparsity = None
        if (place / "sparsity.json").exists():
            counts = read_json(place / "sparsity.json")
            sparsity = (counts["pruned_matrices"]["sparsity"], counts["whole_model"]["sparsity"])
        lines.append(
            Line(
                _name(stage, title, stages),
                {key: entry["ppl_token"] for key, entry in corpora.items()},
                sparsity,
                summary.get("seconds"),
                summary.get("peak_memory_bytes"),
                summary.get("calibration"),
                str(folder),
            )
        )
    return lines


def _name(stage: str, title: str, stages: list[str]) -> str:
    """What the table calls a stage's model: the run's last one bears the run's name."""
    if stage == "dense":
        return "dense"
    return title if stage == stages[-1] else f"{title}, {stage} only"


def write_report(lines: list[Line], folder: Path, title: str, console: Console) -> Path:
    """Prints the table and writes `report.md` and `report.html` to `folder`.

    Returns:
        The page's path.
    """
    measures = list(dict.fromkeys(key for line in lines for key in line.perplexity))
    columns = ["model"]
    for measure in measures:
        corpus, _, window = measure.partition("@")
        columns.append(f"{Path(corpus).stem}\nppl_token@{window}")
    columns += ["sparsity", "whole\nmodel", "time", "peak\nmemory"]
    rows = [
        [
            line.name,
            *(f"{line.perplexity[m]:.2f}" if m in line.perplexity else "-" for m in measures),
            f"{100 * line.sparsity[0]:.2f} %" if line.sparsity else "-",
            f"{100 * line.sparsity[1]:.2f} %" if line.sparsity else "-",
            duration(line.seconds) if line.seconds is not None else "-",
            size(line.peak) if line.peak else "-",
        ]
        for line in lines
    ]
    notes = list(dict.fromkeys(f"{ln.name}: {ln.calibration}" for ln in lines if ln.calibration))
    facts = read_json(Path(lines[0].origin) / "environment.json") if lines else {}
    console.table(title, columns, rows)
    columns = [" ".join(c.split()) for c in columns]
    markdown = [f"# {title}", "", "| " + " | ".join(columns) + " |"]
    markdown.append("| --- |" + " ---: |" * (len(columns) - 1))
    markdown += ["| " + " | ".join(row) + " |" for row in rows]
    markdown += ["", "Sparsity is the share of zeros in the pruned matrices. Calibration:", ""]
    markdown += [f"- {note}" for note in notes or ["none"]]
    versions = ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items())
    markdown += ["", f"Versions: {versions}.", ""]
    with atomic(folder / "report.md") as temporary:
        temporary.write_text("\n".join(markdown))
    page = folder / "report.html"
    html = _PAGE.get_template("report.html.j2").render(
        title=title, columns=columns, rows=rows, notes=notes, facts=facts
    )
    with atomic(page) as temporary:
        temporary.write_text(html)
    return page

"""Published perplexities (`published.yaml`) for the model, pattern, corpus and window measured."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib.resources import files

import yaml

from cap_llm.evaluation.runs import Figure, Result

CALIBRATION = "128 x 2048 of c4"


@dataclass(frozen=True)
class Published:
    """One figure of a paper. `window` in tokens; `amount` is empty for a dense model."""

    model: str
    method: str
    amount: str
    corpus: str
    window: int
    ppl: float
    source: str


@functools.cache
def published() -> tuple[Published, ...]:
    """All figures that come with the package."""
    content = yaml.safe_load((files("cap_llm.evaluation") / "published.yaml").read_text())
    figures = []
    for entry in content["figures"]:
        source = content["sources"][entry["source"]]
        title = source["title"] + ", second-hand" * source.get("second_hand", False)
        for model, ppl in entry["ppl"].items():
            place = (entry.get("corpus", "wikitext2"), entry.get("window", 2048))
            amount = entry.get("amount", "")
            figures.append(Published(model, entry["method"], amount, *place, ppl, title))
    return tuple(figures)


def short_name(model: str) -> str:
    """opt-125m of facebook/opt-125m, llama-3-8b of meta-llama/Meta-Llama-3-8B."""
    name = model.partition("@")[0].rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"-hf$", "", name.removeprefix("meta-"))


def comparable(result: Result, figure: Figure) -> bool:
    """Whether a measured perplexity follows the papers' protocol: the whole text, and their
    calibration or none."""
    calibration = figure.facts.get("calibration")
    whole = figure.kind == "ppl" and figure.facts.get("limit") is None
    return whole and not result.status and calibration in (None, CALIBRATION)


def beside(results: list[Result]) -> list[tuple[Published, list[float]]]:
    """Published figures at the model, patterns, corpora and windows that were measured.

    Args:
        results: models that come from one dense model.

    Returns:
        Each with the measured perplexities of the same method, one a seed; none where it was not
        measured.
    """
    measured: dict[tuple, list[float]] = {}
    for result in results:
        for figure in result.figures:
            if comparable(result, figure):
                place = (result.amount, figure.name, figure.facts["window"])
                method = "dense" if result.stage == "dense" else result.method
                measured.setdefault((method, *place), []).append(figure.value)
    places = {key[1:] for key in measured}
    return [
        (p, measured.get((p.method, p.amount, p.corpus, p.window), []))
        for p in published()
        if p.model == short_name(results[0].dense) and (p.amount, p.corpus, p.window) in places
    ]

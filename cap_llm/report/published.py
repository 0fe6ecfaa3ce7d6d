"""Published perplexities (`published.yaml`) for the model, pattern, corpus and window measured."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib.resources import files

import yaml

from cap_llm.evaluation.scores import Score
from cap_llm.text.reading import C4_WINDOWS

# C4's first training shard, from the hub or from CAP_LLM_DATA
CALIBRATIONS = tuple(
    f"128 x 2048 tokens of {origin}"
    for origin in ("allenai/c4 train", "c4-train.00000-of-01024.json.gz")
)


@dataclass(frozen=True)
class Published:
    """A perplexity in a paper; `window` in tokens, `amount` empty for a dense model."""

    model: str
    method: str
    amount: str
    corpus: str
    window: int
    ppl: float
    source: str


@functools.cache
def published() -> tuple[Published, ...]:
    """All perplexities of `published.yaml`."""
    content = yaml.safe_load(
        (files("cap_llm.report") / "published.yaml").read_text(encoding="utf-8")
    )
    figures = []
    for entry in content["figures"]:
        source = content["sources"][entry["source"]]
        title = source["title"] + ", second-hand" * source.get("second_hand", False)
        for model, ppl in entry["ppl"].items():
            place = (entry.get("corpus", "wikitext2"), entry.get("window", 2048))
            method, amount = entry["method"], entry.get("amount", "")
            figures.append(Published(model, method, amount, *place, ppl, title))
    return tuple(figures)


def short_name(model: str) -> str:
    """opt-125m of facebook/opt-125m, llama-3-8b of meta-llama/Meta-Llama-3-8B."""
    name = model.partition("@")[0].rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"-hf$", "", name.removeprefix("meta-"))


def of_protocol(score: Score, calibration: str | None) -> bool:
    """Whether a perplexity is measured as in the papers: the whole text, and their calibration.

    Of C4 that is 256 windows, which a local sample does not fill.
    """
    if score.data == "c4" and score.facts.get("windows") != C4_WINDOWS:
        return False
    return score.facts.get("limit") is None and calibration in (None, *CALIBRATIONS)

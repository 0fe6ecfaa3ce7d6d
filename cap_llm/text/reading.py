"""All the text that a run needs, read before its long work starts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from cap_llm.config import Config
from cap_llm.runtime.files import read_json
from cap_llm.text.corpora import calibration_corpus, evaluation_text
from cap_llm.text.tokenizers import bos_rule, load_tokenizer
from cap_llm.text.windows import calibration_windows, evaluation_windows


@dataclass
class ScoredText:
    """The windows [n, window] of one corpus, and what must be known to compare their perplexity.

    `limit` is the number of first windows that was asked for, None for all.
    """

    name: str
    windows: torch.Tensor
    origin: str
    bos: str
    limit: int | None

    @property
    def key(self) -> str:
        """What results call it: `wikitext2@2048`, `wikitext2@2048 first 32`."""
        part = f" first {self.limit}" if self.limit else ""
        return f"{Path(self.name).name}@{self.windows.shape[1]}{part}"

    @property
    def digest(self) -> str:
        """A checksum of the ids: of the text, the tokenizer and the cut."""
        return hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()[:16]


@dataclass
class Texts:
    """Calibration ids [N, T] with their origin, where a stage reads them, and the scored texts."""

    calibration: torch.Tensor | None
    origin: str | None
    scored: list[ScoredText]


def read_texts(config: Config, model: Path) -> Texts:
    """Reads and tokenises the calibration text and the texts to score.

    Args:
        config: the run's settings.
        model: the directory of the dense model.

    Raises:
        UserError: a corpus is missing, malformed or too short, or the tokenizer does not fit.
    """
    vocab_size = read_json(model / "config.json").get("vocab_size")
    tokenizer = load_tokenizer(config.model.tokenizer or str(model), vocab_size)
    texts = Texts(None, None, [])
    if "evaluate" in config.stages:
        e = config.evaluate
        for name in e.corpora:
            text, origin = evaluation_text(name)
            windows = evaluation_windows(tokenizer, text, origin, e.window, e.max_windows)
            texts.scored.append(
                ScoredText(name, windows, origin, bos_rule(tokenizer), e.max_windows)
            )
    if config.uses_calibration:
        c = config.calibration
        corpus = calibration_corpus(c.corpus)
        texts.calibration = calibration_windows(tokenizer, corpus, c.sequences, c.length, c.seed)
        texts.origin = f"{c.sequences} x {c.length} tokens of {corpus.origin}, seed {c.seed}"
    return texts

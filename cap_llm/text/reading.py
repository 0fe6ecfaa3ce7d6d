"""All the text that a run needs, read before its long work starts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from cap_llm.config import Config, same_text
from cap_llm.runtime.console import SILENT, Console
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import read_json
from cap_llm.text.corpora import (
    NAMES,
    calibration_corpus,
    corpus_file,
    evaluation_text,
)
from cap_llm.text.packing import PackedText, pack
from cap_llm.text.tokenizers import bos_rule, load_tokenizer
from cap_llm.text.windows import calibration_windows, evaluation_windows

C4_WINDOWS = 256  # as many the papers score of C4's validation documents


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
        return _digest(self.windows)


@dataclass
class Texts:
    """What the stages read; None or empty where none of them does.

    Attributes:
        calibration: ids [N, T] that solvers see.
        origin: where these are from.
        scored: the texts that perplexity is measured on.
        recovery: the text to train on.
        held_out: calibration ids [M, T] of other documents, which only judge.
    """

    calibration: torch.Tensor | None
    origin: str | None
    scored: list[ScoredText]
    recovery: PackedText | None = None
    held_out: torch.Tensor | None = None

    @property
    def ids(self) -> list[torch.Tensor]:
        """All token ids that are here."""
        ids = [self.calibration, self.held_out, *(text.windows for text in self.scored)]
        ids += [self.recovery.ids, self.recovery.held_out] if self.recovery else []
        return [part for part in ids if part is not None]

    @property
    def calibration_digest(self) -> str | None:
        """A checksum of the calibration ids."""
        return None if self.calibration is None else _digest(self.calibration)


def read_texts(config: Config, model: Path, console: Console = SILENT) -> Texts:
    """Reads and tokenizes the calibration text and the texts to score.

    Args:
        config: the run's settings.
        model: the directory of the dense model.
        console: takes warnings and the bars of long texts.

    Raises:
        UserError: a corpus is missing, malformed or too short, or the tokenizer does not fit.
    """
    texts = Texts(None, None, [])
    scores = "evaluate" in config.stages and config.evaluate.corpora
    if not (scores or config.uses_calibration or "recover" in config.stages):
        return texts
    facts = read_json(model / "config.json")
    vocab_size = (facts.get("text_config") or facts).get("vocab_size")
    tokenizer = load_tokenizer(config.model.tokenizer or str(model), vocab_size)
    if "evaluate" in config.stages:
        _refuse_scored_file(config)
        e = config.evaluate
        for name in e.corpora:
            text, origin = evaluation_text(name, console)
            most = min(e.max_windows or C4_WINDOWS, C4_WINDOWS) if name == "c4" else e.max_windows
            windows = evaluation_windows(tokenizer, text, origin, e.window, most, console)
            texts.scored.append(
                ScoredText(name, windows, origin, bos_rule(tokenizer), e.max_windows)
            )
    if config.uses_calibration:
        c = config.calibration
        corpus = calibration_corpus(c.corpus, console)
        n_held_out = c.held_out if config.holds_out else 0
        windows = calibration_windows(
            tokenizer, corpus, c.sequences, c.length, c.seed, n_held_out, console
        )
        texts.calibration, texts.held_out = windows.split([c.sequences, n_held_out])
        texts.origin = f"{c.sequences} x {c.length} tokens of {corpus.origin}, seed {c.seed}"
    if "recover" in config.stages:
        r = config.recover
        corpus = calibration_corpus(r.corpus, console)
        texts.recovery = pack(
            tokenizer, corpus, r.n_sequences, r.held_out, r.length, r.optimizer.seed, console
        )
    for ids in texts.ids:
        if vocab_size and len(ids) and (highest := int(ids.max())) >= vocab_size:
            raise UserError(
                f"a text holds {tokenizer.convert_ids_to_tokens(highest)!r}, token {highest} of a "
                f"model that has {vocab_size}: take it out of the text"
            )
    return texts


def _digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]


def _refuse_scored_file(config: Config) -> None:
    """Refuses to calibrate or train on the file that a scored corpus is read from.

    Of two corpora by name, `Config.check` has judged, and their documents differ.
    """
    for name in config.evaluate.corpora:
        scored = corpus_file(name, "validation" if name == "c4" else "test")
        for option, corpus, remedy in config.not_to_be_scored:
            learnt = corpus_file(corpus, "train")
            by_name = name in NAMES and corpus in NAMES
            if scored and learnt and not by_name and same_text(scored, learnt):
                raise UserError(
                    f"{option} {corpus} is the text of {name}, which evaluate scores: choose "
                    f"another text{remedy}"
                )

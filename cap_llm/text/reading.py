"""The texts of a run: calibration, training, scoring."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from cap_llm.config import CalibrationConfig, EvaluateConfig, RecoverConfig
from cap_llm.runtime.console import SILENT, Console
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import read_json
from cap_llm.text.corpora import calibration_corpus, evaluation_text
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
class Calibration:
    """Calibration text.

    Attributes:
        ids: [N, T], which the solvers see.
        held_out: [M, T], of other documents, on which results are compared.
        origin: of the text, in words.
    """

    ids: torch.Tensor
    held_out: torch.Tensor
    origin: str

    @property
    def digest(self) -> str:
        """A checksum of `ids`."""
        return _digest(self.ids)


class TextReader:
    """Reads and tokenizes texts for a model. Each method reads one section's text.

    Args:
        model: directory of the model.
        tokenizer: `model.tokenizer`, if the model has none.
        console: prints warnings, and the progress of long texts.

    Raises:
        UserError: from the methods: a corpus is missing, malformed or too short, or the tokenizer
            does not fit the model.
    """

    def __init__(self, model: Path, tokenizer: str | None = None, console: Console = SILENT):
        self.model, self._name, self.console = model, tokenizer or str(model), console

    @functools.cached_property
    def _vocab_size(self) -> int | None:
        facts = read_json(self.model / "config.json")
        return (facts.get("text_config") or facts).get("vocab_size")

    @functools.cached_property
    def _tokenizer(self):
        return load_tokenizer(self._name, self._vocab_size)

    def scored(self, settings: EvaluateConfig) -> list[ScoredText]:
        """The texts to measure perplexity on."""
        texts = []
        for name in settings.corpora:
            text, origin = evaluation_text(name, self.console)
            limit = settings.max_windows
            n_windows = min(limit or C4_WINDOWS, C4_WINDOWS) if name == "c4" else limit
            windows = evaluation_windows(
                self._tokenizer, text, origin, settings.window, n_windows, self.console
            )
            self._check(windows)
            texts.append(ScoredText(name, windows, origin, bos_rule(self._tokenizer), limit))
        return texts

    def calibration(self, settings: CalibrationConfig, n_held_out: int) -> Calibration:
        """The calibration text, with `n_held_out` sequences of other documents."""
        s, corpus = settings, calibration_corpus(settings.corpus, self.console)
        windows = calibration_windows(
            self._tokenizer, corpus, s.sequences, s.length, s.seed, n_held_out, self.console
        )
        self._check(windows)
        origin = f"{s.sequences} x {s.length} tokens of {corpus.origin}, seed {s.seed}"
        ids, held_out = windows.split([s.sequences, n_held_out])
        return Calibration(ids, held_out, origin)

    def packed(self, settings: RecoverConfig) -> PackedText:
        """The text to train on."""
        s, corpus = settings, calibration_corpus(settings.corpus, self.console)
        text = pack(
            self._tokenizer,
            corpus,
            s.n_sequences,
            s.held_out,
            s.length,
            s.optimizer.seed,
            self.console,
        )
        self._check(text.ids)
        self._check(text.held_out)
        return text

    def _check(self, ids: torch.Tensor) -> None:
        highest, size = int(ids.max()) if len(ids) else 0, self._vocab_size
        if size and highest >= size:
            raise UserError(
                f"Text contains token {self._tokenizer.convert_ids_to_tokens(highest)!r} (id "
                f"{highest}), outside the model's vocabulary of {size}."
            )


def _digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]

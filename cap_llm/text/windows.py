"""Windows of token ids, drawn and cut exactly as in SparseGPT and Wanda."""

from __future__ import annotations

import random

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from cap_llm.runtime.console import SILENT, Console
from cap_llm.runtime.errors import UserError
from cap_llm.text.corpora import Corpus
from cap_llm.text.tokenizers import token_pieces, tokenize

MAX_REJECTED = 1000  # draws per held-out crop


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    n: int,
    length: int,
    seed: int,
    held_out: int = 0,
    console: Console = SILENT,
) -> torch.Tensor:
    """Random crops of random documents: ids [n + held_out, length].

    Documents are drawn with replacement until one has more than `length` tokens, then a crop of it
    is drawn (sparsegpt, `get_c4`). In a corpus of one document only crops are drawn
    (`get_wikitext2`). Draws use Python's `random`, so a seed gives the same crops as there. The
    last `held_out` crops come from documents that the first `n` do not use; in a corpus of one
    document they do not overlap the first `n`.

    Raises:
        UserError: no document is long enough, or too little text is left to hold out.
    """
    rng = random.Random(seed)
    documents = corpus.documents
    several = len(documents) > 1
    tokenized, long = set(), {}  # numbers of the tokenized documents; ids of the long ones

    def draw_document() -> int:
        while True:
            i = rng.randrange(len(documents)) if several else 0
            if i in long:
                return i
            if i in tokenized:
                continue
            tokenized.add(i)
            where = f"{corpus.origin}, document {i + 1}" if several else corpus.origin
            ids = tokenize(tokenizer, documents[i], where, SILENT if several else console)
            bar.advance()
            if len(ids) > length:
                long[i] = torch.from_numpy(ids).long()
                return i
            if not long and len(tokenized) == len(documents):
                raise UserError(
                    f"no document of {corpus.origin} is longer than {length} tokens. Lower "
                    "--calibration.length, or use a corpus of longer documents."
                )

    windows, crops, used, n_rejected = [], [], set(), 0  # crops: (document, start) per window
    title = f"calibration text: documents of {corpus.origin}"
    with (console if several else SILENT).bar(title, len(documents), "tokenized") as bar:
        while len(windows) < n + held_out:
            i = draw_document()
            start = rng.randint(0, len(long[i]) - length - 1)
            if len(windows) >= n and (
                i in used if several else any(abs(start - s) < length for _, s in crops[:n])
            ):
                n_rejected += 1
                none_left = several and len(tokenized) == len(documents) and used.issuperset(long)
                if none_left or n_rejected > MAX_REJECTED * held_out:
                    raise UserError(
                        f"{corpus.origin} has too little text for {held_out} held-out sequences of "
                        f"{length} tokens. Lower --calibration.sequences or "
                        "--calibration.held_out, or use a larger corpus."
                    )
                continue
            crops.append((i, start))
            if len(windows) < n:
                used.add(i)
            windows.append(long[i][start : start + length])
    return torch.stack(windows)


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    origin: str,
    window: int,
    max_windows: int | None,
    console: Console = SILENT,
) -> torch.Tensor:
    """Ids [n, window] of the text, tokenized once and cut into windows that do not overlap.

    The tail that does not fill a window is dropped, as in the papers. A long text is tokenized only
    as far as `max_windows` need.

    Raises:
        UserError: the text is shorter than one window.
    """
    pieces, n_ids = [], 0
    for ids in token_pieces(tokenizer, text, origin, console):
        pieces.append(ids)
        n_ids += len(ids)
        if max_windows and n_ids >= max_windows * window:
            break
    n = n_ids // window
    if n == 0:
        raise UserError(
            f"{origin} has {n_ids} tokens, fewer than one window of {window}. Lower "
            "--evaluate.window, or use a longer text."
        )
    n = min(n, max_windows or n)
    return torch.from_numpy(np.concatenate(pieces)[: n * window]).long().reshape(n, window)

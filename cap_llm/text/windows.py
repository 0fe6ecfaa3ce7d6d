"""Windows of token ids, drawn and cut exactly as SparseGPT and Wanda do."""

from __future__ import annotations

import random

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from cap_llm.runtime.console import SILENT, Console
from cap_llm.runtime.errors import UserError
from cap_llm.text.corpora import Corpus
from cap_llm.text.tokenizers import token_pieces, tokenize

MOST_REFUSED = 1000  # draws for one held-out crop


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

    A document is drawn until one has more than `length` tokens, then a crop of it is drawn; a
    document can be drawn twice (sparsegpt, `get_c4`); of a corpus of one document only crops are
    drawn (`get_wikitext2`). The draws are Python's own, so that a seed means the same crops as
    there. The last `held_out` crops come of documents that the first `n`
    do not use; in a corpus of one document they overlap none of these.

    Raises:
        UserError: no document is long enough, or nothing is left to hold out.
    """
    draw = random.Random(seed)
    documents = corpus.documents
    several = len(documents) > 1
    seen, long = set(), {}  # documents that have been tokenized; the ids of the long ones

    def draw_document() -> int:
        while True:
            i = draw.randrange(len(documents)) if several else 0
            if i in long:
                return i
            if i in seen:
                continue
            seen.add(i)
            where = f"{corpus.origin}, document {i + 1}" if several else corpus.origin
            ids = tokenize(tokenizer, documents[i], where, SILENT if several else console)
            bar.advance()
            if len(ids) > length:
                long[i] = torch.from_numpy(ids).long()
                return i
            if not long and len(seen) == len(documents):
                raise UserError(
                    f"no document of {corpus.origin} is longer than {length} tokens; "
                    "lower --calibration.length or give a corpus of longer documents"
                )

    windows, taken, used, refused = [], [], set(), 0
    title = f"calibration text: documents of {corpus.origin}"
    with (console if several else SILENT).bar(title, len(documents), "tokenized") as bar:
        while len(windows) < n + held_out:
            i = draw_document()
            start = draw.randint(0, len(long[i]) - length - 1)
            if len(windows) >= n and (
                i in used if several else any(abs(start - s) < length for _, s in taken[:n])
            ):
                refused += 1
                none_left = several and len(seen) == len(documents) and used.issuperset(long)
                if none_left or refused > MOST_REFUSED * held_out:
                    raise UserError(
                        f"{corpus.origin} has too little text of {length} tokens and more beside "
                        "the calibration sequences to hold out any; lower --calibration.sequences "
                        "or --calibration.held_out, or give a larger corpus"
                    )
                continue
            taken.append((i, start))
            if len(windows) < n:
                used.add(i)
            windows.append(long[i][start : start + length])
    return torch.stack(windows)


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    origin: str,
    window: int,
    most: int | None,
    console: Console = SILENT,
) -> torch.Tensor:
    """The text tokenized once and cut into windows that do not overlap: ids [n, window].

    The tail that does not fill a window is dropped, as in the papers. A long text is tokenized as
    far as `most` windows need.

    Raises:
        UserError: the text is shorter than one window.
    """
    pieces, n_ids = [], 0
    for ids in token_pieces(tokenizer, text, origin, console):
        pieces.append(ids)
        n_ids += len(ids)
        if most and n_ids >= most * window:
            break
    n = n_ids // window
    if n == 0:
        raise UserError(
            f"{origin} has {n_ids} tokens, fewer than one window of {window}; "
            "lower --evaluate.window or give a longer text"
        )
    n = min(n, most or n)
    return torch.from_numpy(np.concatenate(pieces)[: n * window]).long().reshape(n, window)

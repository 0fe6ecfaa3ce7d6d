"""Windows of token ids, drawn and cut exactly as SparseGPT and Wanda do."""

from __future__ import annotations

import random

import torch
from transformers import PreTrainedTokenizerBase

from cap_llm.runtime.errors import UserError
from cap_llm.text.corpora import Corpus

MOST_REFUSED = 1000  # draws for one held-out crop


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    n: int,
    length: int,
    seed: int,
    held_out: int = 0,
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
    tokens: dict[int, torch.Tensor] = {}  # long documents are drawn again and again

    def ids_of(i: int) -> torch.Tensor:
        if i not in tokens:
            ids = tokenizer(corpus.documents[i]).input_ids
            tokens[i] = torch.tensor(ids if len(ids) > length else [], dtype=torch.long)
        return tokens[i]

    windows, taken, refused = [], [], 0
    several = len(corpus.documents) > 1
    while len(windows) < n + held_out:
        i = draw.randint(0, len(corpus.documents) - 1) if several else 0
        ids = ids_of(i)
        if len(ids):
            start = draw.randint(0, len(ids) - length - 1)
            if len(windows) >= n and any(
                i == j and (several or abs(start - s) < length) for j, s in taken[:n]
            ):
                refused += 1
                if refused > MOST_REFUSED * held_out:
                    raise UserError(
                        f"{corpus.origin} has too little text of {length} tokens and more beside "
                        "the calibration sequences to hold out any; lower --calibration.sequences "
                        "or --calibration.held_out, or give a larger corpus"
                    )
                continue
            taken.append((i, start))
            windows.append(ids[start : start + length])
        elif len(tokens) == len(corpus.documents) and not any(len(t) for t in tokens.values()):
            raise UserError(
                f"no document of {corpus.origin} is longer than {length} tokens; "
                "lower --calibration.length or give a corpus of longer documents"
            )
    return torch.stack(windows)


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, origin: str, window: int, most: int | None
) -> torch.Tensor:
    """The text tokenised once and cut into windows that do not overlap: ids [n, window].

    The tail that does not fill a window is dropped, as in the papers.

    Raises:
        UserError: the text is shorter than one window.
    """
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    n = len(ids) // window
    if n == 0:
        raise UserError(
            f"{origin} has {len(ids)} tokens, fewer than one window of {window}; "
            "lower --evaluate.window or give a longer text"
        )
    n = min(n, most or n)
    return ids[: n * window].reshape(n, window)

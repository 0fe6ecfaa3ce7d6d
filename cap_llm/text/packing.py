"""The recovery text: documents packed into sequences, and their order in training."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from cap_llm.runtime.console import SILENT, Console
from cap_llm.runtime.errors import UserError
from cap_llm.text.corpora import Corpus
from cap_llm.text.tokenizers import tokenize, tokenize_rows

AT_ONCE = 64  # documents per call of the tokenizer


@dataclass
class PackedText:
    """Sequences of equal length without padding, and the document of each token.

    Attributes:
        ids: [N, T]; a sequence's row number is its id everywhere.
        documents: [N, T], numbered in the order of packing.
        held_out: [n, T], from documents that `ids` does not contain.
        origin: the corpus, for messages.
    """

    ids: torch.Tensor
    documents: torch.Tensor
    held_out: torch.Tensor
    origin: str

    @property
    def digest(self) -> str:
        """A checksum of everything: text, tokenizer, packing and order."""
        sha = hashlib.sha256()
        for tensor in (self.ids, self.documents, self.held_out):
            sha.update(repr(tuple(tensor.shape)).encode())
            sha.update(np.ascontiguousarray(tensor.numpy()).tobytes())
        return sha.hexdigest()[:16]

    def most_frequent(self, n: int) -> torch.Tensor:
        """The `n` most frequent token ids of the text."""
        return self.ids.flatten().bincount().argsort(descending=True, stable=True)[:n]

    def draws(self, start: int, end: int, seed: int) -> torch.Tensor:
        """Ids [end - start] of the sequences at positions `start` to `end` of the whole training.

        Each epoch is a seeded permutation. A batch may span the end of one epoch and the start of
        the next.
        """
        n, parts = len(self.ids), [np.empty(0, dtype=np.int64)]
        for epoch in range(start // n, -(-end // n)):
            order = _permutation(n, seed, epoch)
            parts.append(order[max(0, start - epoch * n) : end - epoch * n])
        return torch.from_numpy(np.concatenate(parts))


@functools.lru_cache(2)  # a batch usually spans at most two epochs
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def pack(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    n: int,
    n_held_out: int,
    length: int,
    seed: int,
    console: Console = SILENT,
) -> PackedText:
    """Packs documents, in a seeded order, into `n_held_out` sequences and at most `n` to train on.

    The tokenizer's own special tokens mark where a document begins. If it adds none, the
    end-of-text token follows each document. No document is in both parts. A corpus of one document
    is cut into sequences that each count as a document; the last ones are held out.

    Raises:
        UserError: the corpus is too short for the held-out part and one more sequence.
    """
    if len(corpus.documents) == 1:
        ids = torch.from_numpy(tokenize(tokenizer, corpus.documents[0], corpus.origin, console))
        ids = ids[: len(ids) // length * length].view(-1, length)
        n = max(0, min(n, len(ids) - n_held_out))
        documents = torch.arange(n)[:, None].expand(-1, length)
        return _checked(ids[:n], documents, ids[len(ids) - n_held_out :], n_held_out, corpus)
    stream = enumerate(_tokenized(tokenizer, corpus, seed))
    parts = []
    with console.bar(f"packing {corpus.origin}", (n_held_out + n) * length, "tokens") as bar:
        for n_sequences in (n_held_out, n):
            pieces, numbers, n_tokens = [np.empty(0, np.int32)], [0], 0
            while n_tokens < n_sequences * length and (document := next(stream, None)):
                numbers.append(document[0])
                pieces.append(document[1])
                n_tokens += len(pieces[-1])
                bar.advance(len(pieces[-1]))
            n_full = min(n_sequences, n_tokens // length)
            ids = np.concatenate(pieces)[: n_full * length]
            documents = np.repeat(np.int32(numbers), [len(p) for p in pieces])[: n_full * length]
            parts.append([torch.from_numpy(x).view(n_full, length) for x in (ids, documents)])
    (held_out, _), (train, documents) = parts
    return _checked(train, documents, held_out, n_held_out, corpus)


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, seed: int
) -> Iterator[np.ndarray]:
    """Each document's ids with its special tokens, in a seeded order.

    They are int32 arrays, because lists take 34 bytes per token.
    """
    order = np.random.default_rng(seed).permutation(len(corpus.documents))
    has_marks = len(tokenizer("").input_ids) > 0 or tokenizer.eos_token_id is None
    tail = np.array([] if has_marks else [tokenizer.eos_token_id], np.int32)
    for at in range(0, len(order), AT_ONCE):
        rows = order[at : at + AT_ONCE]
        for ids in tokenize_rows(tokenizer, corpus.documents, rows, corpus.origin):
            yield np.concatenate([ids, tail])


def _checked(train, documents, held_out, n_held_out: int, corpus: Corpus) -> PackedText:
    if len(held_out) < n_held_out or not len(train):
        raise UserError(
            f"{corpus.origin} fills {len(held_out) + len(train)} sequences, but "
            f"{n_held_out} are held out and one must remain for training. Lower "
            "--recover.held_out or --recover.length, or use more text."
        )
    return PackedText(train.long(), documents.int(), held_out.long(), corpus.origin)

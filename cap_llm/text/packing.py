"""The recovery text: documents packed into sequences, and the order in which training sees them."""

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

AT_ONCE = 64  # documents that are tokenized at once


@dataclass
class PackedText:
    """Sequences of equal length without padding, and which document each token comes from.

    Attributes:
        ids: [N, T]; a sequence's row is its id everywhere.
        documents: [N, T], numbered in the order they are packed.
        held_out: [n, T], of documents that `ids` holds nothing of.
        origin: what it was read from.
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
        """The `n` most frequent ids of the text."""
        return self.ids.flatten().bincount().argsort(descending=True, stable=True)[:n]

    def batch(self, step: int, size: int, seed: int) -> torch.Tensor:
        """Ids [size] of the sequences of a step (from 0), whatever the number of ranks."""
        return self.draws(step * size, (step + 1) * size, seed)

    def draws(self, start: int, end: int, seed: int) -> torch.Tensor:
        """Ids of the sequences that are drawn at places `start` to `end` of the whole training.

        An epoch is a seeded permutation; the next one begins where it ends, within a batch too.
        """
        n, places = len(self.ids), [np.empty(0, dtype=np.int64)]
        for epoch in range(start // n, -(-end // n)):
            order = _permutation(n, seed, epoch)
            places.append(order[max(0, start - epoch * n) : end - epoch * n])
        return torch.from_numpy(np.concatenate(places))


@functools.lru_cache(2)  # a training reads one epoch at a time, or the end of one and the next
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
    """Packs documents, in a seeded order, into at most `n` sequences after `n_held_out` others.

    Documents follow each other, each begun as the tokenizer begins one or, where it adds nothing,
    ended with its end-of-text token. No document lies in both parts. A corpus of one document is
    cut into sequences that count as documents each; its end is held out.

    Raises:
        UserError: the corpus is too short for the held-out part and one sequence.
    """
    if len(corpus.documents) == 1:
        ids = torch.from_numpy(tokenize(tokenizer, corpus.documents[0], corpus.origin, console))
        ids = ids[: len(ids) // length * length].view(-1, length)
        n = min(n, len(ids) - n_held_out)
        documents = torch.arange(max(0, n))[:, None].expand(-1, length)
        return _checked(
            ids[: max(0, n)], documents, ids[len(ids) - n_held_out :], n_held_out, corpus
        )
    stream = enumerate(_tokenized(tokenizer, corpus, seed))
    parts = []
    with console.bar(f"packing {corpus.origin}", (n_held_out + n) * length, "tokens") as bar:
        for wanted in (n_held_out, n):
            pieces, numbers, n_tokens = [np.empty(0, np.int32)], [0], 0
            while n_tokens < wanted * length and (following := next(stream, None)):
                numbers.append(following[0])
                pieces.append(following[1])
                n_tokens += len(pieces[-1])
                bar.advance(len(pieces[-1]))
            whole = min(wanted, n_tokens // length)
            ids = np.concatenate(pieces)[: whole * length]
            documents = np.repeat(np.int32(numbers), [len(p) for p in pieces])[: whole * length]
            parts.append([torch.from_numpy(x).view(whole, length) for x in (ids, documents)])
    (held_out, _), (train, documents) = parts
    return _checked(train, documents, held_out, n_held_out, corpus)


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, seed: int
) -> Iterator[np.ndarray]:
    """Each document's ids with its mark, in a seeded order; int32, as lists take 34 bytes per
    token."""
    order = np.random.default_rng(seed).permutation(len(corpus.documents))
    begins = len(tokenizer("").input_ids) > 0 or tokenizer.eos_token_id is None
    tail = np.array([] if begins else [tokenizer.eos_token_id], np.int32)
    for at in range(0, len(order), AT_ONCE):
        rows = order[at : at + AT_ONCE]
        for ids in tokenize_rows(tokenizer, corpus.documents, rows, corpus.origin):
            yield np.concatenate([ids, tail])


def _checked(train, documents, held_out, n_held_out: int, corpus: Corpus) -> PackedText:
    if len(held_out) < n_held_out or not len(train):
        raise UserError(
            f"{corpus.origin} fills {len(held_out) + len(train)} sequences, too few for "
            f"{n_held_out} held-out ones and one to train on; lower --recover.held_out or "
            "--recover.length, or give more text"
        )
    return PackedText(train.long(), documents.int(), held_out.long(), corpus.origin)

"""Packing keeps documents apart and in order, and a step's batch is the same for every job."""

from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cap_llm.runtime.errors import UserError
from cap_llm.text import packing
from cap_llm.text.corpora import Corpus
from cap_llm.text.packing import PackedText, pack


class Letters:
    """A tokenizer whose ids are the characters' code points, with a start or an end token."""

    START, END = 1, 2

    def __init__(self, start: bool = True):
        self.eos_token_id, self._start = self.END, [self.START] * start

    def __call__(self, text: str | list[str]):
        if isinstance(text, str):
            return _Encoding([*self._start, *map(ord, text)])
        return _Encoding([self(part).input_ids for part in text])


class _Encoding:
    def __init__(self, input_ids):
        self.input_ids = input_ids


def corpus(lengths, first: int = 100) -> Corpus:
    """A document for each length, of one letter of its own."""
    return Corpus([chr(first + i) * n for i, n in enumerate(lengths)], "these documents")


LENGTHS = st.lists(st.integers(0, 30), min_size=2, max_size=25)
SIZES = {
    "lengths": LENGTHS,
    "n": st.integers(1, 12),
    "n_held_out": st.integers(1, 4),
    "length": st.integers(2, 12),
    "seed": st.integers(0, 99),
    "start": st.booleans(),
}


def packed(lengths, n, n_held_out, length, seed, start=True) -> PackedText:
    """Packed documents; what is too short is no example."""
    try:
        return pack(Letters(start), corpus(lengths), n, n_held_out, length, seed)
    except UserError:
        assume(False)


@given(**SIZES)
@settings(max_examples=60, deadline=None)
def test_no_document_is_in_both_parts(**sizes):
    text = packed(**sizes)
    marks = {Letters.START, Letters.END}
    trained = set(text.ids.flatten().tolist()) - marks
    assert not trained & (set(text.held_out.flatten().tolist()) - marks)


@given(**SIZES)
@settings(max_examples=60, deadline=None)
def test_documents_follow_each_other_whole_each_with_its_mark(**sizes):
    """The packed stream is cut only at its end, and the mark stands where the tokenizer puts it."""
    text = packed(**sizes)
    lengths, start = sizes["lengths"], sizes["start"]
    stream = list(zip(text.ids.flatten().tolist(), text.documents.flatten().tolist(), strict=True))
    numbers = [number for _, number in stream]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(numbers[0], numbers[-1] + 1))  # none is left out
    seen = []
    for number in range(numbers[0], numbers[-1] + 1):
        ids = [i for i, at in stream if at == number]
        letters = [i for i in ids if i not in (Letters.START, Letters.END)]
        if number < numbers[-1]:
            mark = [Letters.START] if start else [Letters.END]
            assert ids == (mark + letters if start else letters + mark)
            assert not letters or len(letters) == lengths[letters[0] - 100]
        seen += sorted(set(letters))
    assert len(seen) == len(set(seen))  # no document twice


@given(**SIZES)
@settings(max_examples=60, deadline=None)
def test_there_are_as_many_sequences_as_asked_for_or_as_the_text_fills(**sizes):
    text = packed(**sizes)
    length, n, n_held_out = sizes["length"], sizes["n"], sizes["n_held_out"]
    assert text.held_out.shape == (n_held_out, length)
    assert text.ids.shape == text.documents.shape == (len(text.ids), length)
    assert len(text.ids) <= n
    if len(text.ids) < n:  # then hardly anything is left over
        everything = sum(sizes["lengths"]) + len(sizes["lengths"])
        longest = max(sizes["lengths"]) + 1
        assert everything - text.ids.numel() - text.held_out.numel() < longest + length
    assert text.ids.dtype == text.held_out.dtype == torch.long


def test_the_text_comes_back_from_the_ids(tokenizer, text_file):
    """Of a real tokenizer: each whole document, decoded, is one of the corpus."""
    documents = text_file.read_text().splitlines()[:300]
    text = pack(tokenizer, Corpus(documents, "lines"), 40, 4, 64, 0)
    ids, numbers = text.ids.flatten(), text.documents.flatten()
    for number in range(numbers[0], numbers[-1]):
        mine = ids[numbers == number].tolist()
        assert mine[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in mine[1:]
        assert tokenizer.decode(mine[1:]) in documents


def test_documents_tokenised_at_once_are_those_tokenised_one_by_one(
    monkeypatch, tokenizer, text_file
):
    documents = [*text_file.read_text().splitlines()[:100], ""]

    def digest(at_once: int) -> str:
        monkeypatch.setattr(packing, "AT_ONCE", at_once)
        return pack(tokenizer, Corpus(documents, "lines"), 20, 4, 64, 0).digest

    assert digest(1) == digest(7) == digest(1000)


def test_the_digest_changes_with_seed_text_and_length_and_with_nothing_else():
    def digest(lengths=(20, 30, 25, 40, 10, 35), n=8, n_held_out=2, length=10, seed=0):
        return packed(lengths, n, n_held_out, length, seed).digest

    others = [
        digest(seed=1),
        digest(lengths=(20, 30, 25, 40, 10, 36)),
        digest(length=9),
        digest(n=7),
        digest(n_held_out=3),
    ]
    assert digest() == digest()
    assert len({digest(), *others}) == 6


def test_the_digest_sees_a_single_token_of_either_part():
    text = packed((20, 30, 25, 40), 6, 2, 10, 0)
    before = text.digest
    for tensor in (text.ids, text.documents, text.held_out):
        tensor[-1, -1] += 1
        assert text.digest != before
        tensor[-1, -1] -= 1
    assert text.digest == before


@pytest.mark.parametrize("n,expected", [(3, 3), (100, 8)])
def test_a_corpus_of_one_document_is_cut_and_its_end_is_held_out(n, expected):
    letters = "".join(chr(100 + i) for i in range(109))
    text = pack(Letters(), Corpus([letters], "a book"), n, 3, 10, 0)  # 110 tokens with the start
    assert text.ids.flatten().tolist() == [1, *map(ord, letters)][: 10 * expected]
    assert text.held_out.flatten().tolist() == [1, *map(ord, letters)][80:110]
    for i, row in enumerate(text.documents.tolist()):
        assert row == [i] * 10


@pytest.mark.parametrize("lengths", [(5,), (40,), (5, 5), (20, 20), (30, 3, 3)])
def test_a_corpus_that_is_too_short_is_refused(lengths):
    """Room for four held-out sequences of ten tokens and one to train on is needed."""
    with pytest.raises(UserError) as refused:
        pack(Letters(), corpus(lengths), 8, 4, 10, 0)
    for part in ("these documents", "4 are held out", "--recover.held_out"):
        assert part in str(refused.value)


@pytest.mark.parametrize("lengths", [(49,), (25, 24, 12)])
def test_a_corpus_that_is_just_long_enough_is_taken(lengths):
    for seed in range(4):
        try:
            text = pack(Letters(), corpus(lengths), 8, 2, 10, seed)
        except UserError:
            assert len(lengths) > 1  # the order decides how much the held-out part uses up
        else:
            assert len(text.ids) >= 1
    if len(lengths) == 1:
        assert len(pack(Letters(), corpus(lengths), 8, 4, 10, 0).ids) == 1


def sequences(n: int) -> PackedText:
    ids = torch.arange(3 * n).view(n, 3)
    return PackedText(ids, ids, ids[:0], "a test")


@given(n=st.integers(1, 30), size=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_every_epoch_sees_each_sequence_once(n, size, seed):
    text, end = sequences(n), (3 * n // size + 1) * size
    stream = [i for at in range(0, end, size) for i in text.draws(at, at + size, seed).tolist()]
    assert len(stream) == end
    for at in range(0, len(stream) - n + 1, n):
        assert sorted(stream[at : at + n]) == list(range(n))


@given(n=st.integers(1, 30), step=st.integers(0, 20), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_batch_depends_on_the_seed_and_what_was_seen_alone(n, step, seed):
    """Neither on global generators nor on the size of steps: two small ones are one large one."""
    torch.manual_seed(step)
    start, end = 8 * step, 8 * step + 8
    batch = sequences(n).draws(start, end, seed)
    torch.manual_seed(step + 1)
    assert torch.equal(batch, sequences(n).draws(start, end, seed))
    halves = [sequences(n).draws(at, at + 4, seed) for at in (start, start + 4)]
    assert torch.equal(batch, torch.cat(halves))


def test_epochs_and_seeds_have_orders_of_their_own():
    text = sequences(50)
    orders = [text.draws(start, start + 50, seed).tolist() for start in (0, 50) for seed in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    assert list(range(50)) not in orders


@given(ids=st.lists(st.integers(0, 9), min_size=1, max_size=60), n=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_most_frequent_ids(ids, n):
    ids = torch.tensor(ids)[None]
    counts = Counter(ids.flatten().tolist())
    got = PackedText(ids, ids, ids[:0], "a test").most_frequent(n).tolist()
    assert len(set(got)) == len(got) <= n
    expected = sorted((counts[i] for i in range(10)), reverse=True)[: len(got)]
    assert [counts[i] for i in got] == expected
    assert len(got) == n or set(counts) <= set(got)


def test_frequent_ids_of_the_held_out_part_do_not_count():
    ids = torch.tensor([[3, 3, 4]])
    text = PackedText(ids, ids, torch.tensor([[5, 5, 5]]), "a test")
    assert text.most_frequent(2).tolist() == [3, 4]

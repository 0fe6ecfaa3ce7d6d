"""Banks on disk: rows are found by their sequence, written once, and refused when they say nothing.

And what contrasts take from them: the same rows on every repeat, never one that is not there yet.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cap_llm.config import ContrastConfig
from cap_llm.contrast.bank import Bank
from cap_llm.contrast.terms import ContrastiveObjective, ContrastTerm
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.world import World
from cap_llm.tasks.language_modeling import TextUnits
from cap_llm.text.packing import PackedText

ALONE = World.alone(torch.device("cpu"))
QUIET = Console(enabled=False)
SHAPE = (10, 3, 4)
FACTS = {"text": "ab12", "model": "dense", "segments": 3}


def rows(n: int = SHAPE[0], seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *SHAPE[1:], generator=torch.Generator().manual_seed(seed))


def stored(values: torch.Tensor) -> torch.Tensor:
    """What a bank gives back."""
    return values.bfloat16().float()


@given(order=st.permutations(range(SHAPE[0])), asked=st.lists(st.integers(0, SHAPE[0] - 1)))
@settings(max_examples=20, deadline=None)
def test_rows_are_found_by_id_in_whatever_order_they_were_written(tmp_path_factory, order, asked):
    bank = Bank(tmp_path_factory.mktemp("bank"), FACTS, SHAPE, ALONE)
    values, order = rows(), torch.tensor(order)
    for part in order.split(3):
        bank.write(part, values[part])
    asked = torch.tensor(asked, dtype=torch.long)
    assert torch.equal(bank.read(asked), stored(values)[asked])


def test_a_bank_knows_which_rows_it_has(tmp_path):
    bank = Bank(tmp_path, FACTS, SHAPE, ALONE)
    assert not bank.has(torch.arange(SHAPE[0])).any()
    bank.write(torch.tensor([7, 2]), rows(2))
    assert bank.has(torch.tensor([2, 3, 4, 7])).tolist() == [True, False, False, True]


def test_a_row_that_a_crash_has_left_without_a_unit_is_none(tmp_path):
    bank, part = Bank(tmp_path, FACTS, SHAPE, ALONE), rows(1)
    part[0, 1] = 0  # its page had not reached the disk when its mark had
    bank.write(torch.tensor([7, 4]), torch.cat([rows(1), part]))
    assert bank.has(torch.tensor([4, 7])).tolist() == [False, True]


def test_a_row_that_was_written_but_cannot_be_seen_is_an_error(tmp_path):
    bank = Bank(tmp_path, FACTS, SHAPE, ALONE)
    bank.write(torch.tensor([7, 2]), rows(2))
    bank.require(torch.tensor([2, 7]))
    with pytest.raises(UserError, match="NFS"):
        bank.require(torch.tensor([2, 3]))


def test_rows_are_rounded_to_bfloat16_and_read_as_fp32(tmp_path):
    bank = Bank(tmp_path, FACTS, SHAPE, ALONE)
    values = rows(1)
    bank.write(torch.tensor([0]), values)
    got = bank.read(torch.tensor([0]))
    assert got.dtype == torch.float32
    assert not torch.equal(got, values)
    assert ((got - values).abs() <= 2**-8 * values.abs()).all()


def test_what_was_read_is_not_the_bank_itself(tmp_path):
    bank = Bank(tmp_path, FACTS, SHAPE, ALONE)
    bank.write(torch.tensor([0]), rows(1))
    bank.read(torch.tensor([0])).zero_()
    assert torch.equal(bank.read(torch.tensor([0])), stored(rows(1)))


def test_everything_survives_reopening(tmp_path):
    bank = Bank(tmp_path / "runs" / "prc", FACTS, SHAPE, ALONE)
    assert bank.center is None
    bank.write(torch.tensor([5, 1]), rows(2))
    bank.set_center(torch.arange(4.0), 0.25, 3.5)
    bank.flush()
    again = Bank(tmp_path / "runs" / "prc", FACTS, SHAPE, ALONE)
    assert torch.equal(again.read(torch.tensor([1, 5])), stored(rows(2)).flip(0))
    assert again.has(torch.arange(10)).nonzero().flatten().tolist() == [1, 5]
    assert torch.equal(again.center, torch.arange(4.0))
    assert (again.mean_cosine, again.effective_rank) == (0.25, 3.5)


@pytest.mark.parametrize(
    "name,value", [("text", "cd34"), ("model", "other"), ("segments", 8), ("shape", None)]
)
def test_a_bank_of_other_facts_is_refused_by_their_name_and_left_as_it_is(tmp_path, name, value):
    bank = Bank(tmp_path, FACTS, SHAPE, ALONE)
    bank.write(torch.tensor([3]), rows(1))
    facts = FACTS if name == "shape" else FACTS | {name: value}
    shape = (11, *SHAPE[1:]) if name == "shape" else SHAPE
    with pytest.raises(UserError) as refused:
        Bank(tmp_path, facts, shape, ALONE)
    was, now = (SHAPE[0], 11) if name == "shape" else (FACTS[name], value)
    for part in (str(tmp_path), f"({name}: ", str(was), str(now)):
        assert part in str(refused.value)
    again = Bank(tmp_path, FACTS, SHAPE, ALONE)
    assert torch.equal(again.read(torch.tensor([3])), stored(rows(1)))


@pytest.mark.parametrize("name", ["rows.bin", "valid.bin"])
@pytest.mark.parametrize("left", [None, 7])
def test_a_bank_that_lacks_a_part_of_its_files_is_made_anew(tmp_path, name, left):
    bank = Bank(tmp_path, FACTS, SHAPE, ALONE)
    bank.write(torch.tensor([3]), rows(1))
    bank.set_center(torch.arange(4.0), 0.25, 3.5)
    bank.flush()
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if left:
        (tmp_path / name).write_bytes(content[:left])
    again = Bank(tmp_path, FACTS, SHAPE, ALONE)
    assert not again.has(torch.arange(10)).any()
    assert again.center is None


# Contrasts on banks.

N, T, WIDTH, BATCH = 24, 20, 16, 4


class WatchedBank(Bank):
    """A bank that remembers which sequences were written and read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.written: list[int] = []
        self.asked: list[list[int]] = []

    def write(self, ids, rows):
        self.written += ids.tolist()
        super().write(ids, rows)

    def read(self, ids):
        self.asked.append(ids.tolist())
        return super().read(ids)


class Model:
    """Final states that depend on the token and its place; remembers what it has seen."""

    def __init__(self, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        self.tokens = torch.randn(50, WIDTH, generator=g)
        self.places = torch.randn(T, WIDTH, generator=g)
        self.seen: list[list[int]] = []

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.seen += ids.tolist()
        return self.tokens[ids] + self.places


def text() -> PackedText:
    """Sequences, each of a document of its own, no two alike."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (N, T)))
    return PackedText(ids, torch.arange(N)[:, None].expand(N, T).int(), ids[:0], "a test")


def of_examples(model):
    """A model of tokens as one of examples."""
    return lambda ids: model(text().ids[ids])


def contrasts(**sizes) -> ContrastiveObjective:
    sizes = {"segments": 2, "token_positions": 5, "dim": 8, "extra_negatives": 6} | sizes
    sizes = ContrastConfig(**({"n_unlabeled_frequent": 5} | sizes))
    units = TextUnits(text(), sizes, WIDTH, 4, 0, ALONE.device)
    return ContrastiveObjective(units, sizes.extra_negatives, BATCH, ALONE)


def bank_of(c: ContrastiveObjective, folder, model=None, ids=None) -> WatchedBank:
    """A bank in `folder`, filled by `model` if there is one."""
    e = c.extractor
    bank = WatchedBank(folder, {}, (len(e.text.ids), e.n_units, e.dim), ALONE)
    if model is not None:
        everyone = torch.arange(N) if ids is None else ids
        c.fill(bank, of_examples(model), everyone, 3, "a bank", QUIET)
    return bank


def test_fill_writes_each_row_once_and_later_only_the_missing_ones(tmp_path):
    c, model = contrasts(), Model()
    some = torch.tensor([9, 2, 17, 4])
    bank = bank_of(c, tmp_path, model, some)
    assert sorted(bank.written) == sorted(some.tolist())
    centre = bank.center
    bank.written, model.seen = [], []
    c.fill(bank, of_examples(model), torch.arange(N), 3, "a bank", QUIET)
    missing = [i for i in range(N) if i not in some.tolist()]
    assert sorted(bank.written) == missing
    assert model.seen == c.extractor.text.ids.tolist()  # in whole rounds: each has a gap
    assert torch.equal(bank.center, centre)
    bank.written, model.seen = [], []
    c.fill(bank, of_examples(model), torch.arange(N), 3, "a bank", QUIET)
    again = bank_of(c, tmp_path, model)
    assert bank.written == again.written == model.seen == []


def test_a_rank_without_a_sequence_helps_to_measure_the_centre(tmp_path):
    class Last(World):
        """The last of so many ranks that its share of some round is empty."""

        size, rank = N + 1, N

        def __init__(self):
            self.device = ALONE.device

        def sum(self, tensor):
            return tensor + 1

        def gather(self, value):
            return [torch.randn(9, 8) if value.is_floating_point() else value]

    c, model = contrasts(), Model()
    c.world = Last()
    bank = bank_of(c, tmp_path)
    c.fill(bank, of_examples(model), torch.arange(0), 1, "a bank", QUIET)
    assert bank.center is not None and len(model.seen) == 1


def test_filled_rows_are_centred_projected_vectors_of_length_one(tmp_path):
    c, model = contrasts(), Model()
    bank, e = bank_of(c, tmp_path, model), c.extractor
    raw = [e.raw(model(e.text.ids[i : i + 1]), torch.tensor([i]))[0] for i in range(N)]
    centre = sum(sum(r) for r in raw) / (N * e.n_units)
    torch.testing.assert_close(bank.center, centre, rtol=1e-4, atol=1e-5)
    for i in (0, 11, N - 1):
        moved = raw[i] - centre
        expected = moved / moved.norm(dim=1, keepdim=True)
        torch.testing.assert_close(bank.read(torch.tensor([i]))[0], expected, rtol=2**-7, atol=1e-4)


def test_the_micro_batch_does_not_change_a_bank(tmp_path):
    c = contrasts()
    one = bank_of(c, tmp_path / "a", Model())
    other = WatchedBank(tmp_path / "b", {}, one.shape, ALONE)
    c.fill(other, of_examples(Model()), torch.arange(N).flip(0), 7, "a bank", QUIET)
    every = torch.arange(N)
    torch.testing.assert_close(one.read(every), other.read(every), rtol=2**-7, atol=1e-4)


CONSTANTS = {
    "zeros": torch.zeros(WIDTH),
    "ones": torch.ones(WIDTH),
    "any": torch.randn(WIDTH, generator=torch.Generator().manual_seed(5)),
}


@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_model_that_gives_one_state_for_everything_is_refused(tmp_path, constant):
    c = contrasts()
    with pytest.raises(UserError, match="prc is degenerate"):
        bank_of(c, tmp_path / "prc", lambda ids: CONSTANTS[constant].expand(*ids.shape, WIDTH))


def test_a_model_whose_states_are_one_but_for_a_few_is_refused_and_stays_refused(tmp_path):
    def model(ids):
        states = CONSTANTS["any"].expand(*ids.shape, WIDTH).clone()
        states[(ids == c.extractor.text.ids[0]).all(1)] = 100 * torch.arange(1.0, WIDTH + 1)
        return states

    c = contrasts()
    for _ in range(2):
        with pytest.raises(UserError, match="prc is degenerate"):
            bank_of(c, tmp_path / "prc", model)


def test_a_model_that_gives_no_numbers_is_refused(tmp_path):
    c = contrasts()
    with pytest.raises(UserError, match="prc"):
        bank_of(c, tmp_path / "prc", lambda ids: Model()(ids) * torch.nan)


def batch_ids(c: ContrastiveObjective, step: int) -> torch.Tensor:
    return c.extractor.text.draws(step * BATCH, (step + 1) * BATCH, c.extractor.seed)


def step_losses(c: ContrastiveObjective, student: Model, teacher: Model | None, step: int) -> dict:
    ids = batch_ids(c, step)
    tokens = c.extractor.text.ids[ids]
    seen = teacher(tokens) if teacher else None
    return c.losses(student(tokens), seen, ids, ids, step, 0)


def test_the_further_rows_of_a_step_are_the_same_on_every_repeat(tmp_path):
    drawn = []
    for _ in range(2):
        c = contrasts()
        bank = bank_of(c, tmp_path, Model())
        c.terms = [ContrastTerm("fic", 0.1, [bank])]
        for step in range(4):
            step_losses(c, Model(1), None, step)
        drawn.append(bank.asked)
    assert drawn[0] == drawn[1]
    own = [batch_ids(c, step).tolist() for step in range(4)]
    further = [ids for ids in drawn[0] if ids not in own]
    assert len(further) == 4 and len(set(map(tuple, further))) == 4  # anew for each step
    assert all(len(set(ids)) == 6 for ids in further)


def test_a_row_of_the_step_itself_that_cannot_be_seen_is_an_error(tmp_path):
    c = contrasts(extra_negatives=0)
    bank = bank_of(c, tmp_path, Model())
    c.terms = [ContrastTerm("fic", 0.1, [bank])]
    step_losses(c, Model(1), None, 0)
    bank.write(batch_ids(c, 1)[:1], torch.zeros(1, *bank.shape[1:]))
    with pytest.raises(UserError, match="not visible on this node"):
        step_losses(c, Model(1), None, 1)


def test_rows_that_are_missing_are_made_as_they_were(tmp_path):
    """Among the same sequences, since a row may depend on those that are passed with it."""
    c, passed = contrasts(), []

    def model(tokens):
        passed.append(tokens)
        return Model()(tokens)

    bank = bank_of(c, tmp_path, model)
    everyone = torch.arange(N)
    before, n = bank.read(everyone), len(passed)
    bank.write(torch.tensor([1, 2, 17]), torch.zeros(3, *bank.shape[1:]))
    c.fill(bank, of_examples(model), everyone, 3, "again", QUIET)
    assert torch.equal(bank.read(everyone), before)
    expected = torch.cat([c.extractor.text.ids[at : at + 3] for at in (0, 15)])
    assert torch.equal(torch.cat(passed[n:]), expected)


def test_every_contrast_of_a_step_has_the_same_further_sequences(tmp_path):
    c = contrasts()
    first, second = (bank_of(c, tmp_path / n, Model(i)) for i, n in enumerate("ab"))
    c.terms = [ContrastTerm("snc", 0.1, [first, second]), ContrastTerm("fic", 0.1, [first])]
    step_losses(c, Model(2), None, 1)
    assert second.asked == first.asked[:2] == first.asked[2:]


def test_rows_of_an_online_contrast_are_only_of_steps_before(tmp_path):
    c, teacher = contrasts(extra_negatives=N), Model()
    bank = bank_of(c, tmp_path, teacher, torch.arange(0))
    c.terms = [ContrastTerm("prc", 0.1, [bank], online=True)]
    assert bank.center is not None and not bank.has(torch.arange(N)).any()
    before: set[int] = set()
    for step in range(9):  # an epoch and a half
        bank.asked = []
        step_losses(c, Model(1), teacher, step)
        assert [set(ids) for ids in bank.asked] == [before]  # all of them, as N are asked for
        before |= set(batch_ids(c, step).tolist())
    assert before == set(range(N))


def test_an_online_contrast_draws_as_many_as_are_asked_for_once_they_are_there(tmp_path):
    c, teacher = contrasts(extra_negatives=6), Model()
    bank = bank_of(c, tmp_path, teacher, torch.arange(0))
    c.terms = [ContrastTerm("prc", 0.1, [bank], online=True)]
    for step in range(5):
        bank.asked = []
        step_losses(c, Model(1), teacher, step)
        ((*ids,),) = bank.asked
        assert len(set(ids)) == len(ids) == min(6, step * BATCH)


def test_a_bank_needs_only_the_share_of_its_training(tmp_path):
    c, share = contrasts(), torch.tensor([1, 4, 5, 7, 11, 12, 20, 23])
    c.example_ids = share
    bank = bank_of(c, tmp_path, Model(), share)
    c.terms = [ContrastTerm("fic", 0.1, [bank])]
    tokens = c.extractor.text.ids
    for step in range(4):
        ids = share[4 * (step % 2) :][:4]
        c.losses(Model(1)(tokens[ids]), None, ids, ids, step, 0)
    assert {i for ids in bank.asked for i in ids} <= set(share.tolist())
    assert all(bank.has(torch.tensor(ids)).all() for ids in bank.asked)


def test_an_online_contrast_ends_up_as_one_from_a_bank_that_was_filled_before(tmp_path):
    teacher, student = Model(), Model(1)
    c, d = contrasts(), contrasts()
    c.terms = [ContrastTerm("prc", 0.1, [bank_of(c, tmp_path / "filled", teacher)])]
    online = bank_of(d, tmp_path / "online", teacher, torch.arange(0))
    d.terms = [ContrastTerm("prc", 0.1, [online], online=True)]
    for step in range(8):
        expected = step_losses(c, student, None, step)["prc"].item()
        got = step_losses(d, student, teacher, step)["prc"].item()
        if step * BATCH >= N:  # before, candidates are missing
            assert got == pytest.approx(expected, rel=1e-3)
            d.terms[0].online = False  # a row is the same whenever it is read
            assert step_losses(d, student, None, step)["prc"].item() == got
            d.terms[0].online = True
    every = torch.arange(N)
    torch.testing.assert_close(
        online.read(every), c.terms[0].banks[0].read(every), rtol=2**-7, atol=1e-4
    )


def test_a_resumed_online_contrast_does_as_one_that_was_never_interrupted(tmp_path):
    teacher, student = Model(), Model(1)
    expected, got = [], []
    for folder, losses, stop in (("a", expected, None), ("b", got, 3)):
        c = contrasts()
        bank = bank_of(c, tmp_path / folder, teacher, torch.arange(0))
        c.terms = [ContrastTerm("prc", 0.1, [bank], online=True)]
        for step in range(6):
            if step == stop:  # two steps are done again, from the folder alone
                c = contrasts()
                bank = bank_of(c, tmp_path / folder, teacher, torch.arange(0))
                c.terms = [ContrastTerm("prc", 0.1, [bank], online=True)]
                for again in (1, 2):
                    assert step_losses(c, student, teacher, again)["prc"].item() == losses[again]
            losses.append(step_losses(c, student, teacher, step)["prc"].item())
    assert expected == got


def test_a_contrast_changes_only_its_own_term(tmp_path):
    c = contrasts()
    terms = [
        ContrastTerm(name, 0.1, [bank_of(c, tmp_path / name, Model(seed))])
        for seed, name in enumerate(("prc", "fic", "snc"))
    ]
    c.terms = terms
    together = step_losses(c, Model(5), None, 0)
    assert set(together) == {"prc", "fic", "snc"}
    for term in terms:
        c.terms = [term]
        assert step_losses(c, Model(5), None, 0) == {term.name: together[term.name]}
    c.terms = []
    assert step_losses(c, Model(5), None, 0) == {}


def test_segments_and_tokens_add_up_by_their_weights(tmp_path):
    losses = []
    for segments, tokens in ((1, 0), (0, 1), (2, 3)):
        c = contrasts(segment_weight=segments, token_weight=tokens)
        c.terms = [ContrastTerm("fic", 0.1, [bank_of(c, tmp_path, Model())])]
        losses.append(step_losses(c, Model(1), None, 0)["fic"].item())
    assert losses[2] == pytest.approx(2 * losses[0] + 3 * losses[1])


def test_a_student_that_is_the_banks_model_has_the_lowest_loss_and_others_a_gradient(tmp_path):
    c = contrasts()
    c.terms = [ContrastTerm("fic", 0.1, [bank_of(c, tmp_path, Model())])]
    least = step_losses(c, Model(), None, 0)["fic"]
    student = Model(1)
    student.tokens.requires_grad_()
    loss = step_losses(c, student, None, 0)["fic"]
    loss.backward()
    assert least < 0.5 * loss.detach()
    assert student.tokens.grad.isfinite().all() and student.tokens.grad.any()

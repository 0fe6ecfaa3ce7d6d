"""The contrastive losses against loops over anchors and candidates, and the units they compare."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cap_llm.config import ContrastConfig, ObjectiveConfig, RecoverConfig
from cap_llm.contrast.loss import Units, cap_compat, contrastive_loss
from cap_llm.contrast.units import anisotropy, normalize
from cap_llm.runtime.errors import UserError
from cap_llm.tasks.language_modeling import TextUnits
from cap_llm.text.packing import PackedText

CPU = torch.device("cpu")


def vectors(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """[n, d] of length 1."""
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def units(keys, documents, labels) -> Units:
    """Units of keys; a document is a number, or a pair of the first and the last one."""
    pairs = [d if isinstance(d, tuple) else (d, d) for d in documents]
    first, last = zip(*pairs, strict=True)
    return Units(*(torch.tensor(x) for x in (list(keys), first, last, list(labels))))


def scene(seed: int = 0, n: int = 6, extra: int = 5, d: int = 8):
    """What `contrastive_loss` is given: n units of a batch, as the student and the bank see them,
    and further units of the bank. Documents overlap and labels repeat."""
    draw = np.random.default_rng(seed)
    first = draw.integers(0, 5, n + extra)
    documents = [(int(a), int(a + draw.integers(0, 2))) for a in first]
    labels = draw.integers(-1, 3, n + extra).tolist()
    every = units(range(n + extra), documents, labels)
    mine = every[:n]
    anchors = vectors(n, d, seed)
    candidates = torch.cat([anchors, vectors(n + extra, d, seed + 1)])
    from_bank = torch.arange(len(candidates)) >= n
    return anchors, mine, candidates, Units.join([mine, every]), from_bank


def relation(a: Units, i: int, c: Units, j: int) -> tuple[bool, bool]:
    """Whether unit i of `a` is unit j of `c`, and whether they share a document."""
    mine = set(range(int(a.first_document[i]), int(a.last_document[i]) + 1))
    other = set(range(int(c.first_document[j]), int(c.last_document[j]) + 1))
    return a.key[i].item() == c.key[j].item(), bool(mine & other)


def loop(anchors, a, candidates, c, from_bank, temperature, unsupervised, supervised):
    """The loss and the number of anchors with a positive, one logit at a time."""
    total, known = 0.0, 0
    for i in range(len(anchors)):
        logits, positives, partners = {}, [], []
        for j in range(len(candidates)):
            same, shared = relation(a, i, c, j)
            if same and from_bank[j]:
                positives.append(j)
            elif same or shared:
                continue
            elif a.label[i] >= 0 and a.label[i] == c.label[j]:
                partners.append(j)
            logits[j] = float(anchors[i].detach().double() @ candidates[j].double()) / temperature
        if not positives:
            continue
        known += 1
        normaliser = math.log(sum(math.exp(x) for x in logits.values()))
        for weight, chosen in ((unsupervised, positives), (supervised, partners)):
            if chosen:
                total -= weight * sum(logits[j] - normaliser for j in chosen) / len(chosen)
    return total, known


@given(seed=st.integers(0, 10**6), temperature=st.sampled_from([0.07, 0.5, 1.0]))
@settings(max_examples=40, deadline=None)
def test_the_loss_is_the_loop_over_anchors_and_candidates(seed, temperature):
    given_ = scene(seed)
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.1)):
        expected, known = loop(*given_, temperature, *weights)
        got, n = contrastive_loss(*given_, temperature, *weights)
        assert n == known
        assert got.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_several_bank_rows_of_a_unit_are_all_positive():
    anchors, mine, candidates, every, from_bank = scene()
    snapshot = vectors(len(mine.key), anchors.shape[1], 7)
    given_ = (
        anchors,
        mine,
        torch.cat([candidates, snapshot]),
        Units.join([every, mine]),
        torch.cat([from_bank, torch.ones(len(snapshot), dtype=torch.bool)]),
    )
    assert contrastive_loss(*given_, 0.1, 1.0, 0.3)[0].item() == pytest.approx(
        loop(*given_, 0.1, 1.0, 0.3)[0], rel=1e-4
    )


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan])
def test_a_temperature_that_is_not_above_0_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        contrastive_loss(*scene(0), temperature)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_order_of_candidates_does_not_matter(seed):
    anchors, mine, candidates, every, from_bank = scene(seed)
    expected, n = contrastive_loss(anchors, mine, candidates, every, from_bank, 0.1, 1.0, 0.5)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(candidates)))
    got, m = contrastive_loss(
        anchors, mine, candidates[order], every[order], from_bank[order], 0.1, 1.0, 0.5
    )
    assert m == n
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_anchors_own_documents_have_no_influence_but_its_own_bank_rows_have():
    _, every, candidates, all_units, from_bank = scene(3)
    for i in range(len(every.key)):
        anchor, mine = vectors(1, 8, 9), every[i : i + 1]
        before = contrastive_loss(anchor, mine, candidates, all_units, from_bank, 0.1, 1.0, 0.5)
        for j in range(len(candidates)):
            same, shared = relation(mine, 0, all_units, j)
            changed = candidates.clone()
            changed[j] = -anchor[0]
            after = contrastive_loss(anchor, mine, changed, all_units, from_bank, 0.1, 1.0, 0.5)
            ignored = (same or shared) and not (same and from_bank[j])
            assert torch.equal(before[0], after[0]) == ignored
            if same and from_bank[j]:  # a positive: the further away, the worse
                assert after[0] > before[0]


def test_a_student_that_is_its_bank_has_nearly_the_least_loss():
    n, temperature = 16, 0.1
    mine = units(range(n), range(n), [-1] * n)
    given_ = (mine, torch.eye(n).repeat(2, 1), Units.join([mine, mine]), torch.arange(2 * n) >= n)
    loss, known = contrastive_loss(torch.eye(n), *given_, temperature)
    floor = math.log1p(2 * (n - 1) * math.exp(-1 / temperature))  # all others are orthogonal
    assert known == n
    assert loss.item() / n == pytest.approx(floor, rel=1e-3)
    for noise in (0.3, 1.0, 3.0):
        moved = F.normalize(torch.eye(n) + noise * vectors(n, n), dim=1)
        assert contrastive_loss(moved, *given_, temperature)[0] > loss


def test_anchors_without_a_partner_add_nothing_to_the_supervised_part():
    anchors, candidates = vectors(3, 8), vectors(6, 8, 1)
    from_bank = torch.arange(6) >= 3
    mine = units(range(3), range(3), [5, 6, 5])  # the second has no partner
    every = Units.join([mine, mine])
    both = contrastive_loss(anchors, mine, candidates, every, from_bank, 0.1, 0.0, 1.0)[0]
    rest = torch.tensor([0, 2])
    without = contrastive_loss(
        anchors[rest], mine[rest], candidates, every, from_bank, 0.1, 0.0, 1.0
    )[0]
    torch.testing.assert_close(both, without)
    alone = contrastive_loss(anchors[1:2], mine[1:2], candidates, every, from_bank, 0.1, 0.0, 1.0)
    assert alone[0].item() == 0 and alone[1] == 1


def test_units_without_a_label_are_nobodys_partner():
    anchors, candidates = vectors(3, 8), vectors(6, 8, 1)
    mine = units(range(3), range(3), [-1, -1, -1])
    given_ = (anchors, mine, candidates, Units.join([mine, mine]), torch.arange(6) >= 3, 0.1)
    assert contrastive_loss(*given_, 0.0, 1.0)[0].item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("banked", [True, False])
def test_loss_and_gradient_are_finite_where_every_other_candidate_is_masked(dtype, banked):
    anchors = vectors(4, 8).to(dtype).requires_grad_()
    mine = units(range(4), [0] * 4, [1] * 4)  # one document
    candidates = torch.cat([anchors.detach(), vectors(4, 8, 1).to(dtype)])
    from_bank = torch.arange(8) >= (4 if banked else 8)
    given_ = (anchors, mine, candidates, Units.join([mine, mine]), from_bank, 0.07, 1.0, 1.0)
    loss, known = contrastive_loss(*given_)
    loss.backward()
    assert loss.item() == 0  # the positive is the only candidate, or there is no anchor at all
    assert known == (4 if banked else 0)
    assert not anchors.grad.any()


def test_16_bit_vectors_give_the_loss_in_fp32():
    anchors, mine, candidates, every, from_bank = scene()
    anchors = anchors.bfloat16().requires_grad_()
    given_ = (anchors, mine, candidates.bfloat16(), every, from_bank, 0.07, 1.0, 0.5)
    loss, _ = contrastive_loss(*given_)
    loss.backward()
    assert loss.item() == pytest.approx(loop(*given_)[0], rel=1e-4)
    assert anchors.grad.isfinite().all() and anchors.grad.any()


def caps_term(anchors, ids, bank, extra_ids, temperature, unsupervised, supervised, labels):
    """One contrastive term as CAP's code makes it (METHODS 1.2), entry by entry in float64."""
    n, r = len(anchors), bank.shape[1]
    candidates = [(ids[i], anchors[i].detach()) for i in range(n)]
    for example in [*ids, *extra_ids]:
        candidates += [(example, bank[example, k]) for k in range(r)]
    log_p = torch.zeros(n, len(candidates), dtype=torch.float64)
    for i in range(n):
        scores = []
        for c, (_, vector) in enumerate(candidates):
            score = (anchors[i].double() * vector.double()).sum() / temperature
            scores.append(score if c != i else torch.tensor(-1e6, dtype=torch.float64))
        log_p[i] = torch.stack(scores).log_softmax(0)
    term = torch.zeros((), dtype=torch.float64)
    for weight, alike in (
        (unsupervised, lambda i, example: example == ids[i]),
        (supervised, lambda i, example: labels[example] == labels[ids[i]]),
    ):
        by_anchor, n_positives = torch.zeros((), dtype=torch.float64), 0
        for i in range(n):
            mine = [c for c, (example, _) in enumerate(candidates) if alike(i, example) and c != i]
            by_anchor = by_anchor + sum(log_p[i, c] for c in mine) / len(mine)
            n_positives += len(mine)
        term = term - weight * by_anchor / n_positives  # the second division
    return term


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("extra", [[], [7, 8, 2], [0, 9]])  # 0 and 2 are of the batch too
@pytest.mark.parametrize("weights", [(0.1, 0.0), (0.0, 10.0), (0.1, 10.0)])
def test_cap_compat_is_the_published_term(rows, extra, weights):
    n, d = 10, 6
    bank = vectors(n * rows, d, 1).view(n, rows, d)
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 0, 1])
    ids = [4, 0, 2, 5]
    anchors = vectors(len(ids), d, 2).double().requires_grad_()
    expected = caps_term(anchors, ids, bank, extra, 0.1, *weights, labels.tolist())
    (expected_gradient,) = torch.autograd.grad(expected, anchors)
    fp32 = anchors.detach().float().requires_grad_()
    got = cap_compat(
        fp32,
        torch.tensor(ids),
        bank,
        torch.tensor(extra, dtype=torch.long),
        0.1,
        *weights,
        labels,
    )
    (gradient,) = torch.autograd.grad(got, fp32)
    assert got.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)


# The units.

N, T, WIDTH, SKIP = 9, 40, 12, 4


def text(seed: int = 0, n: int = N, length: int = T) -> PackedText:
    """Sequences of documents of 1 to 30 tokens; low ids are frequent."""
    draw = np.random.default_rng(seed)
    ids = torch.from_numpy(draw.geometric(0.2, (n, length)))
    documents = []
    while len(documents) < n * length:
        number = documents[-1] + 1 if documents else 3
        documents += [number] * int(draw.integers(1, 30))
    documents = torch.tensor(documents[: n * length]).view(n, length)
    return PackedText(ids, documents.int(), ids[:1] * 0, "a test")


def encoder(
    packed: PackedText | None = None, width: int = WIDTH, seed: int = 0, **sizes
) -> TextUnits:
    sizes = {"segments": 3, "token_positions": 7, "n_unlabeled_frequent": 2, "dim": width} | sizes
    return TextUnits(packed or text(), ContrastConfig(**sizes), width, SKIP, seed, CPU)


def places(n: int = N, length: int = T, width: int = WIDTH) -> torch.Tensor:
    """States [n, T, H] that say where they are: sequence, position, then zeros."""
    states = torch.zeros(n, length, width)
    for b in range(n):
        for t in range(length):
            states[b, t, 0], states[b, t, 1] = b, t
    return states


def seen_at(e: TextUnits, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The sequence and the (mean) position that each unit looks at, [B, S + m, 2]."""
    return (e.raw(states, ids) @ e.projection.T)[..., :2]  # width == dim: an inverse


def test_the_projection_is_orthonormal_and_the_same_for_every_encoder_of_a_seed():
    e = encoder(width=20, dim=6)
    torch.testing.assert_close(e.projection.T @ e.projection, torch.eye(6), rtol=0, atol=1e-5)
    assert e.projection.shape == (20, 6) and e.dim == 6
    torch.manual_seed(99)
    assert torch.equal(e.projection, encoder(text(1), width=20, dim=6).projection)
    assert not torch.equal(e.projection, encoder(width=20, dim=6, seed=1).projection)


def test_a_projection_never_has_more_dimensions_than_the_states():
    e = encoder(width=5, dim=64)
    assert e.dim == 5 and e.raw(torch.randn(1, T, 5), torch.tensor([0])).shape == (1, 10, 5)


def test_token_positions_depend_on_the_sequences_id_and_the_seed_alone():
    e, other_text, other_seed = encoder(), encoder(text(1, n=30)), encoder(seed=1)
    everywhere = set()
    for i in range(N):
        at = e.positions(i).tolist()
        assert at == sorted(set(at)) and len(at) == 7
        assert at[0] >= SKIP and at[-1] < T - 1  # the last position has no next token
        assert at == e.positions(i).tolist() == other_text.positions(i).tolist()
        assert at != other_seed.positions(i).tolist()
        everywhere.add(tuple(at))
    assert len(everywhere) == N


def test_all_positions_can_be_asked_for():
    e = encoder(token_positions=T - SKIP - 1)
    assert e.positions(0).tolist() == list(range(SKIP, T - 1))


@given(ids=st.lists(st.integers(0, N - 1), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_units_say_what_raw_looks_at(ids):
    packed = text()
    e = encoder(packed)
    ids = torch.tensor(ids)
    units = e.units(ids).flatten()
    seen = seen_at(e, places()[ids], ids).flatten(0, 1)
    frequent = sorted(packed.ids.unique().tolist(), key=lambda i: -(packed.ids == i).sum().item())
    edges = [SKIP, 13, 26, T]
    keys = []
    for k, (sequence, at) in enumerate(seen.tolist()):
        b, place = divmod(k, e.n_units)
        assert round(sequence, 3) == ids[b]
        documents = packed.documents[ids[b]]
        if place < e.n_segments:
            inside = range(edges[place], edges[place + 1])
            assert at == pytest.approx(sum(inside) / len(inside), abs=1e-3)
            assert units.label[k] == -1
        else:
            inside = [round(at)]
            assert at == pytest.approx(e.positions(int(ids[b]))[place - e.n_segments], abs=1e-3)
            following = packed.ids[ids[b], inside[0] + 1].item()
            assert units.label[k] == (-1 if following in frequent[:2] else following)
        assert units.first_document[k] == min(documents[t] for t in inside)
        assert units.last_document[k] == max(documents[t] for t in inside)
        keys.append((int(ids[b]), place))
    pairs = set(zip(keys, units.key.tolist(), strict=True))  # one number for each unit
    assert len({key for _, key in pairs}) == len({place for place, _ in pairs}) == len(pairs)


def test_the_batch_that_a_sequence_comes_in_does_not_change_its_units():
    e, states = encoder(), torch.randn(N, T, WIDTH)
    ids = torch.tensor([5, 1, 8])
    together, together_units = e.raw(states[ids], ids), e.units(ids)
    for b in range(3):
        alone = ids[b : b + 1]
        torch.testing.assert_close(e.raw(states[alone], alone)[0], together[b])
        part = together_units[b : b + 1]
        for name in ("key", "first_document", "last_document", "label"):
            assert torch.equal(getattr(e.units(alone), name), getattr(part, name))


def test_frequent_ids_are_no_labels_and_without_such_ids_every_token_has_one():
    packed = text()
    every = torch.arange(N)
    assert (encoder(packed, n_unlabeled_frequent=0).units(every).label[:, 3:] >= 0).all()
    assert (encoder(packed, n_unlabeled_frequent=10**6).units(every).label == -1).all()


@pytest.mark.parametrize("sizes", [{"segments": 0}, {"token_positions": 0}, {"segments": 1}])
def test_either_kind_of_unit_can_be_left_out(sizes):
    e = encoder(**sizes)
    ids = torch.tensor([3, 4])
    units, seen = e.units(ids), seen_at(e, places()[ids], ids)
    assert seen.shape == (2, e.n_units, 2)
    for name in ("key", "label", "first_document", "last_document"):
        assert getattr(units, name).shape == (2, e.n_units)
    if e.n_segments:
        end = T // e.n_segments
        assert seen[0, 0, 1].item() == pytest.approx((SKIP + end - 1) / 2, abs=1e-3)


def test_the_first_positions_touch_no_unit_and_every_later_one_a_segment():
    e, ids = encoder(), torch.tensor([2])
    states = torch.randn(1, T, WIDTH)
    before = e.raw(states, ids)
    for t in range(T):
        moved = states.clone()
        moved[:, t] += 1e3
        differs = (e.raw(moved, ids) != before).any(2)[0]
        assert differs[:3].sum() == (t >= SKIP)
        assert differs[3:].tolist() == [at == t for at in e.positions(2)]


@pytest.mark.parametrize("length,segments", [(8, 1), (16, 3), (24, 8), (32, 8), (40, 8), (8, 16)])
def test_settings_that_are_accepted_give_every_unit_a_number(length, segments):
    contrast = ContrastConfig(segments=segments, token_positions=2)
    try:
        RecoverConfig(length=length, contrast=contrast, objective=ObjectiveConfig(prc=0.1))
    except UserError as error:
        assert "segments" in str(error)
        return
    e = TextUnits(text(length=length), contrast, WIDTH, RecoverConfig.SKIP, 0, CPU)
    assert e.raw(torch.randn(N, length, WIDTH), torch.arange(N)).isfinite().all()


def test_units_are_fp32_whatever_the_states_are():
    e, ids = encoder(), torch.tensor([2])
    states = torch.randn(1, T, WIDTH).bfloat16()
    assert torch.equal(e.raw(states, ids), e.raw(states.float(), ids))


def test_normalised_units_have_length_one_around_the_centre():
    raw, centre = torch.randn(3, 5, 8) + 4, torch.full((8,), 4.0)
    unit = normalize(raw, centre)
    for b in range(3):
        for k in range(5):
            moved = raw[b, k] - 4
            torch.testing.assert_close(unit[b, k], moved / moved.norm())


@given(n=st.integers(2, 12), d=st.integers(1, 9), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_spread_is_the_mean_cosine_and_the_effective_rank(n, d, seed):
    v = vectors(n, d, seed) + 0.3
    v = F.normalize(v, dim=1)
    cosines = [float(v[i].double() @ v[j].double()) for i in range(n) for j in range(i)]
    mean_cosine, rank = anisotropy(v)
    assert mean_cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    p = np.linalg.svd(v.double().numpy(), compute_uv=False) ** 2
    p = [x for x in p / p.sum() if x > 1e-12]
    assert rank == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-4)


def test_spread_of_one_vector_and_of_an_orthonormal_set():
    mean_cosine, rank = anisotropy(vectors(1, 8).repeat(10, 1))
    assert mean_cosine == pytest.approx(1) and rank == pytest.approx(1, rel=1e-4)
    mean_cosine, rank = anisotropy(torch.eye(8))
    assert mean_cosine == pytest.approx(0, abs=1e-9) and rank == pytest.approx(8)

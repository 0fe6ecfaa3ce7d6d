"""Masks are chosen by count: exact for every pattern, whatever the scores, inside any mask."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cap_llm.runtime.errors import UserError
from cap_llm.sparsity.choose import choose, drop_lowest
from cap_llm.sparsity.pattern import Pattern

N_OF_M = ["1:2", "1:4", "2:4", "3:4", "2:8", "4:8", "5:8", "3:5", "1:16", "31:32"]
SPARSITIES = [0.001, 0.1, 1 / 3, 0.5, 0.7, 0.99, 0.9999]


def zeros(mask: torch.Tensor) -> int:
    return int((~mask).sum())


def quantised(rows: int, columns: int) -> torch.Tensor:
    """Magnitudes on 16 levels, zero among them, as de-quantised weights have."""
    g = torch.Generator().manual_seed(3)
    return torch.randint(0, 16, (rows, columns), generator=g).float() / 16


SCORES = {
    "distinct": torch.rand(24, 160, generator=torch.Generator().manual_seed(0)),
    "all equal": torch.full((24, 160), 0.25),
    "all zero": torch.zeros(24, 160),
    "mostly zero": torch.relu(reference.gaussian(24, 160) - 1.5),
    "quantised": quantised(24, 160),
    "tiny and huge": 10.0 ** (60 * torch.rand(24, 160) - 30),
    "a column of infinities": torch.ones(24, 160).index_fill(1, torch.tensor([7]), torch.inf),
}


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("kind", SCORES)
def test_unstructured_sparsity_is_exact(kind, sparsity):
    mask = choose(SCORES[kind], Pattern.parse("unstructured"), sparsity)
    assert zeros(mask) == round(sparsity * mask.numel())


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("kind", SCORES)
def test_every_row_has_its_exact_share(kind, sparsity):
    mask = choose(SCORES[kind], Pattern.parse("row"), sparsity)
    assert {zeros(row) for row in mask} == {round(sparsity * 160)}


@pytest.mark.parametrize("text", N_OF_M)
@pytest.mark.parametrize("kind", SCORES)
def test_every_group_keeps_exactly_n_of_m(kind, text):
    pattern = Pattern.parse(text)
    mask = choose(SCORES[kind], pattern, 0)
    assert set(mask.reshape(-1, pattern.m).sum(1).tolist()) == {pattern.n}


@pytest.mark.parametrize("text", ["unstructured", "row", "2:4"])
@pytest.mark.parametrize("kind", SCORES)
def test_what_stays_scores_at_least_what_goes(kind, text):
    score = SCORES[kind]
    pattern = Pattern.parse(text)
    width = {"unstructured": score.numel(), "row": 160}.get(text, 4)
    mask = choose(score, pattern, 0.6).reshape(-1, width)
    score = score.reshape(-1, width)
    lowest_kept = score.masked_fill(~mask, torch.inf).amin(1)
    highest_gone = score.masked_fill(mask, 0).amax(1)
    assert bool((lowest_kept >= highest_gone).all())


@pytest.mark.parametrize("text", ["unstructured", "row", "2:4", "3:5"])
def test_a_mask_inside_another_keeps_the_exact_count(text):
    pattern = Pattern.parse(text)
    score = quantised(20, 80)
    allowed = choose(torch.rand(20, 80), Pattern("row"), 0.3)
    mask = choose(score, pattern, 0.75, allowed)
    assert not bool((mask & ~allowed).any())
    if text == "unstructured":
        assert zeros(mask) == 1200
    elif text == "row":
        assert {zeros(row) for row in mask} == {60}
    else:
        inside = allowed.reshape(-1, pattern.m).sum(1)
        assert torch.equal(mask.reshape(-1, pattern.m).sum(1), inside.clamp(max=pattern.n))


@pytest.mark.parametrize("text", ["unstructured", "row"])
def test_a_mask_that_is_already_sparser_is_left_alone(text):
    allowed = choose(torch.rand(8, 40), Pattern("row"), 0.8)
    assert torch.equal(choose(torch.rand(8, 40), Pattern.parse(text), 0.5, allowed), allowed)


def test_pruning_in_steps_equals_pruning_at_once():
    score = quantised(16, 64)
    for text in ("unstructured", "row"):
        pattern = Pattern.parse(text)
        half = choose(score, pattern, 0.5)
        assert torch.equal(choose(score, pattern, 0.8, half), choose(score, pattern, 0.8))


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("counts", ["one", "one a row"])
@pytest.mark.parametrize("inside", [None, torch.rand(24, 160) > 0.3])
def test_the_lowest_go_as_a_sort_says(kind, counts, inside):
    score = SCORES[kind]
    allowed = torch.ones(24, 160, dtype=torch.bool) if inside is None else inside
    most = int(allowed.sum(1).min())
    for first in (0, 1, most // 2, most):
        n_drop = torch.tensor([first]) if counts == "one" else (first + torch.arange(24)) % most
        mask = drop_lowest(score, n_drop, inside)
        for r, n in enumerate(n_drop.expand(24).tolist()):
            kept = reference.keep_highest(score[r].tolist(), n, allowed[r].tolist())
            assert mask[r].tolist() == kept


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("sparsity", [1e-9, 0.4, 0.6, 1 - 1e-9])
def test_tiny_matrices_and_extreme_sparsities_are_exact(shape, sparsity):
    score = torch.rand(shape)
    assert zeros(choose(score, Pattern("unstructured"), sparsity)) == round(
        sparsity * score.numel()
    )
    mask = choose(score, Pattern("row"), sparsity)
    assert {zeros(row) for row in mask} == {round(sparsity * shape[1])}


def test_the_layout_in_memory_does_not_change_the_mask():
    score = quantised(12, 20)
    transposed = score.T.contiguous().T
    for text in ("unstructured", "row", "2:4"):
        pattern = Pattern.parse(text)
        assert torch.equal(choose(transposed, pattern, 0.5), choose(score, pattern, 0.5))


@st.composite
def problems(draw):
    pattern = Pattern.parse(draw(st.sampled_from(["unstructured", "row", "1:2", "2:4", "3:5"])))
    rows = draw(st.integers(1, 5))
    columns = draw(st.integers(1, 4)) * pattern.m if pattern.m else draw(st.integers(1, 17))
    values = draw(
        st.sampled_from(
            [st.sampled_from([0.0, 1.0]), st.integers(0, 4).map(float), st.floats(0, width=32)]
        )
    )
    size = rows * columns
    score = torch.tensor(draw(st.lists(values, min_size=size, max_size=size)))
    allowed = draw(st.none() | st.lists(st.booleans(), min_size=size, max_size=size))
    if allowed is not None:
        allowed = torch.tensor(allowed).reshape(rows, columns)
    return score.reshape(rows, columns), pattern, draw(st.floats(0, 1)), allowed


@given(problems())
@settings(deadline=None, max_examples=400)
def test_the_mask_is_that_of_a_sort(problem):
    assert torch.equal(choose(*problem), reference.choose(*problem))


@pytest.mark.parametrize("text", ["unstructured", "row", "2:4", "1:2", "3:5", "7:16"])
def test_a_pattern_prints_as_it_is_written(text):
    assert str(Pattern.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "2of4", "2:4:8", "-1:4", "2.0:4", " 2:4", "2:4 ", "Row", "rows", "structured", ":"]
)
def test_an_unknown_pattern_is_refused_with_the_known_ones(text):
    with pytest.raises(UserError, match=r"unstructured, row or N:M"):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "0:0", "1:1"])
def test_a_pattern_that_keeps_none_or_all_is_refused(text):
    with pytest.raises(UserError, match=text):
        Pattern.parse(text)


def test_only_n_of_m_fixes_the_sparsity():
    assert Pattern.parse("2:4").fixed_sparsity == 0.5
    assert Pattern.parse("1:4").fixed_sparsity == 0.75
    assert Pattern.parse("3:5").fixed_sparsity == pytest.approx(0.4)
    assert Pattern.parse("row").fixed_sparsity is None
    assert Pattern.parse("unstructured").fixed_sparsity is None


def test_a_matrix_that_n_of_m_does_not_divide_is_refused_by_name_and_shape():
    with pytest.raises(UserError, match=r"h\.3\.fc .*\[8, 30\].*30.*4"):
        Pattern.parse("2:4").check("h.3.fc", torch.Size([8, 30]))
    Pattern.parse("2:4").check("h.3.fc", torch.Size([30, 8]))
    Pattern.parse("row").check("h.3.fc", torch.Size([8, 31]))


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, 50, float("nan")])
@pytest.mark.parametrize("text", ["unstructured", "row"])
def test_a_sparsity_that_is_not_a_share_is_refused(text, sparsity):
    with pytest.raises(UserError, match="sparsity"):
        choose(SCORES["distinct"], Pattern.parse(text), sparsity)

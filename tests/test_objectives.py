"""The losses against plain autograd: chunks, a teacher, a bias and 16 bits change nothing."""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from cap_llm.training import objectives
from cap_llm.training.objectives import head_loss, square_head

N, H, V = 50, 12, 37


def problem(
    bias=True, teacher_width: int | None = H, dtype=torch.float32, seed: int = 0, n: int = N
):
    """States [n, H], head [V, H] and bias [V] that want gradients; targets; a teacher or None."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    student = [draw(n, H), draw(V, H), draw(V) if bias else None]
    for t in student[: 2 + bias]:
        t.requires_grad_()
    targets = torch.randint(V, (n,), generator=g)
    teacher = None
    if teacher_width:
        teacher = (draw(n, teacher_width), draw(V, teacher_width), draw(V) if bias else None)
    return student, targets, teacher


def plain(student, targets, teacher, ce_weight, kl_weight, temperature):
    """total, CE, T^2 KL from all logits [N, V] at once, in fp32."""
    student = [None if t is None else t.float() for t in student]
    logits = F.linear(*student)
    ce = F.cross_entropy(logits, targets)
    if teacher is None:
        return ce_weight * ce, ce, torch.tensor(torch.nan)
    p = F.linear(*(None if t is None else t.float() for t in teacher)).div(temperature).softmax(1)
    q = logits.div(temperature).log_softmax(1)
    kl = temperature**2 * F.kl_div(q, p, reduction="batchmean")
    return ce_weight * ce + kl_weight * kl, ce, kl


def gradients(loss, student):
    wanted = [t for t in student if t is not None and t.requires_grad]
    return torch.autograd.grad(loss, wanted, retain_graph=True)


@pytest.mark.parametrize("n", [N, 7])
@pytest.mark.parametrize("tokens_at_once", [1, 20, 25, N, 10**6])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("teacher_width", [None, H, H + 5])
def test_loss_and_gradients_are_those_of_plain_autograd(
    monkeypatch, n, tokens_at_once, bias, teacher_width
):
    monkeypatch.setattr(objectives, "CHUNK_BYTES", 4 * V * tokens_at_once)
    monkeypatch.setattr(objectives, "LEAST_CHUNKS", 1)
    student, targets, teacher = problem(bias, teacher_width, n=n)
    for factors in (
        (0.2, 0.8, 1.0),
        (1.0, 0.5, 2.0),
        (0.0, 1.0, 0.7),
        (0.3, 0.0, 1.0),
        (0.0, 0.0, 1.0),
    ):
        expected = plain(student, targets, teacher, *factors)
        got = head_loss(*student, targets, teacher, *factors)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
        expected = gradients(3 * expected[0], student)
        torch.testing.assert_close(gradients(3 * got[0], student), expected, rtol=1e-4, atol=1e-6)


def most_bytes(work) -> int:
    """Most bytes of tensors that stood at once while `work` ran, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(n for _, n in changes))


@pytest.mark.parametrize(
    "n, width, dtype",
    [(n, h, t) for n, h in ((512, 64), (64, 256)) for t in (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("factors", [(0.2, 0.8, 1.0), (0.0, 1.0, 2.0), (1.0, 0.0, 1.0)])
def test_less_than_one_set_of_logits_stands_in_memory(n, width, dtype, factors):
    """Beside the inputs and their gradients, forward and backward; of many tokens also beside the
    sum of the head's in fp32."""
    vocabulary = 2 * objectives.SLICE
    states = torch.randn(n, width, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (n,))
    teacher = (states.detach(), head.detach().flip(0), None)

    def work():
        head_loss(states, head, None, targets, teacher, *factors)[0].backward()

    work()  # what is allocated but once
    states.grad = head.grad = None
    sums = 4 * n * width + (4 if n > width else dtype.itemsize) * vocabulary * width
    assert most_bytes(work) - sums < 4 * n * vocabulary


def test_what_a_teachers_vocabulary_is_padded_with_is_left_out():
    student, targets, (states, weight, bias) = problem()
    padded = (states, torch.cat([weight, 9 * weight[:5]]), torch.cat([bias, bias[:5] + 9]))
    expected = head_loss(*student, targets, (states, weight, bias), 0.2, 0.8, 1.0)
    assert head_loss(*student, targets, padded, 0.2, 0.8, 1.0) == expected


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2), (0, 1)])
def test_what_is_frozen_changes_no_other_gradient(frozen):
    student, targets, teacher = problem()
    for i in frozen:
        student[i].requires_grad_(False)
    factors = (0.2, 0.8, 2.0)
    expected = gradients(plain(student, targets, teacher, *factors)[0], student)
    got = gradients(head_loss(*student, targets, teacher, *factors)[0], student)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_goes_on_to_what_made_the_states_and_never_to_the_teacher():
    (states, *head), targets, teacher = problem()
    teacher[0].requires_grad_()
    mix = torch.eye(H).mul_(0.5).requires_grad_()
    got = head_loss(states @ mix, *head, targets, teacher, 0.2, 0.8, 1.0)[0]
    expected = plain((states @ mix, *head), targets, teacher, 0.2, 0.8, 1.0)[0]
    torch.testing.assert_close(gradients(got, [mix]), gradients(expected, [mix]))
    got = head_loss(states @ mix, *head, targets, teacher, 0.2, 0.8, 1.0)[0]
    assert torch.autograd.grad(got, teacher[0], allow_unused=True, retain_graph=True) == (None,)
    with pytest.raises(RuntimeError, match="differentiated once"):
        got.backward()


def test_without_gradients_the_figures_are_the_same_and_nothing_is_recorded():
    student, targets, teacher = problem()
    expected = head_loss(*student, targets, teacher, 0.2, 0.8, 1.0)
    assert not expected[1].requires_grad and not expected[2].requires_grad
    with torch.no_grad():
        got = head_loss(*student, targets, teacher, 0.2, 0.8, 1.0)
    assert all(
        torch.equal(a, b) and not a.requires_grad for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient(temperature):
    student, targets, _ = problem()
    teacher = tuple(t.detach().clone() for t in student)
    total, _, kl = head_loss(*student, targets, teacher, 0.0, 1.0, temperature)
    assert kl.item() == 0 and total.item() == 0
    assert not any(g.any() for g in gradients(total, student))


@pytest.mark.parametrize("teacher_width", [None, H + 5])
@pytest.mark.parametrize("n", [N, 7])  # of few tokens the head's gradient comes late
def test_16_bits_stay_near_fp32_and_gradients_have_their_parameters_type(teacher_width, n):
    student, targets, teacher = problem(True, teacher_width, torch.bfloat16, n=n)
    factors = (0.2, 0.8 if teacher_width else 0.0, 2.0)
    expected = plain(student, targets, teacher, *factors)
    got = head_loss(*student, targets, teacher, *factors)
    assert all(g.dtype == torch.float32 for g in got)
    torch.testing.assert_close(got, expected, rtol=0.01, atol=0.01, equal_nan=True)
    for a, b in zip(gradients(got[0], student), gradients(expected[0], student), strict=True):
        assert a.dtype == torch.bfloat16
        assert ((a.float() - b.float()).norm() / b.float().norm()).item() < 0.02


def outputs(n_blocks: int = 3, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [10**i * torch.randn(2, 7, 5, generator=g) for i in range(n_blocks)]


@pytest.mark.parametrize("skip", [0, 1, 4])
def test_square_head_is_the_mean_of_relative_errors(skip):
    student, teacher = outputs(seed=0), outputs(seed=1)
    ratios = []
    for s, t in zip(student, teacher, strict=True):
        for b in range(2):
            wrong, size = 0.0, 0.0
            for i in range(skip, 7):
                for h in range(5):
                    wrong += (s[b, i, h].item() - t[b, i, h].item()) ** 2
                    size += t[b, i, h].item() ** 2
            n = (7 - skip) * 5
            ratios.append((wrong / n) / (size / n + 1e-6))
    assert square_head(student, teacher, skip).item() == pytest.approx(sum(ratios) / 6, rel=1e-5)


def test_square_head_is_the_mean_over_sequences_however_they_are_batched():
    student, teacher = outputs(seed=0), outputs(seed=1)
    alone = [
        square_head([s[b, None] for s in student], [t[b, None] for t in teacher], 1)
        for b in range(2)
    ]
    together = square_head(student, teacher, 1).item()
    assert together == pytest.approx(sum(alone).item() / 2, rel=1e-6)


def test_square_head_of_equal_outputs_is_zero_and_of_nothing_is_one():
    teacher = outputs()
    assert square_head(teacher, teacher, 1).item() == 0
    nothing = [torch.zeros_like(t) for t in teacher]
    assert square_head(nothing, teacher, 1).item() == pytest.approx(1, rel=1e-4)


def test_square_head_does_not_look_at_the_first_positions():
    student, teacher = outputs(seed=0), outputs(seed=1)
    before = square_head(student, teacher, 2)
    for tensor in (*student, *teacher):
        tensor[:, :2] = 1e6
        tensor.requires_grad_()
    after = square_head(student, teacher, 2)
    assert torch.equal(before, after.detach())
    after.backward()
    assert not any(s.grad[:, :2].any() for s in student)


def test_square_head_of_16_bits_is_computed_in_fp32():
    student = [t.bfloat16() for t in outputs(seed=0)]
    teacher = [t.bfloat16() for t in outputs(seed=1)]
    expected = square_head([t.float() for t in student], [t.float() for t in teacher], 1)
    assert torch.equal(square_head(student, teacher, 1), expected)

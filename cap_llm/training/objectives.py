"""The losses of recovery that compare a student with its teacher token by token.

Symbols: N tokens, H hidden, V vocabulary, B batch, T tokens of a sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# A chunk's fp32 logits [tokens, V] are at most this large, and at most this part of all tokens': a
# handful of such buffers stand at once, together less than one set of logits [N, V].
CHUNK_BYTES, LEAST_CHUNKS = 2**26, 8
SLICE = 2**13  # rows of the head whose gradient stands in 16 bits at once


def head_loss(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    teacher: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None,
    ce_weight: float,
    kl_weight: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy and distillation from final states, without the logits [N, V] in memory.

    total = ce_weight * CE + kl_weight * temperature^2 * KL(teacher || student), means over tokens.
    The heads are applied to a chunk of tokens at a time, and the gradients with respect to the
    states and to the student's head are made on the way, so that nothing is computed twice; it can
    be differentiated once. Of few tokens in 16 bits, the gradient with respect to the logits is
    kept instead of the head's in fp32, which is larger then: of 1,024 tokens of LLaMA-3-8B 0.26 GB
    instead of 2.1.

    Args:
        states: the student's, [N, H], that its head reads.
        weight: of the student's head, [V, H].
        bias: of the student's head, [V], or None.
        targets: the next token's id, [N].
        teacher: its states [N, H'], head weight [V', H'] and bias, or None without distillation;
            of V' > V rows the last are padding and left out.
        ce_weight, kl_weight, temperature: see above.

    Returns:
        total, which carries the gradient, CE, and temperature^2 * KL (NaN without a teacher).
    """
    teacher_states, *teacher_head = teacher or (None, None, None)
    teacher_weight, teacher_bias = (x if x is None else x[: len(weight)] for x in teacher_head)
    learns = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (states, weight, bias)
    )
    return _HeadLoss.apply(
        states,
        weight,
        bias,
        targets,
        teacher_states,
        teacher_weight,
        teacher_bias,
        (ce_weight, kl_weight, temperature),
        learns,
    )


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, targets, t_states, t_weight, t_bias, factors, needs):
        ce_weight, kl_weight, temperature = factors
        n, vocabulary = states.shape[0], weight.shape[0]
        chunk = max(1, min(CHUNK_BYTES // (4 * vocabulary), n // LEAST_CHUNKS))
        # Sums of many chunks are kept in fp32; without the 1/N, so that fp16 does not underflow.
        d_states = torch.zeros_like(states, dtype=torch.float32) if needs else None
        narrow = weight.element_size() < 4  # else the sum in fp32 is the head's gradient itself
        late = needs and narrow and n * weight.element_size() < 4 * weight.shape[1]
        d_logits = weight.new_zeros(n, vocabulary) if late else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs and not late else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs and bias is not None else None
        ce = torch.zeros((), dtype=torch.float64, device=states.device)
        kl = torch.zeros_like(ce)
        for at in range(0, n, chunk):
            s = states[at : at + chunk]
            target = targets[at : at + chunk, None]
            logits = F.linear(s, weight, bias).float()
            normaliser = logits.logsumexp(1, keepdim=True)
            ce += (normaliser - logits.gather(1, target)).sum()
            d = None  # of the loss with respect to the logits, [chunk, V]
            if t_states is not None:
                ours = normaliser
                if temperature != 1:
                    ours = logits.div(temperature).logsumexp(1, keepdim=True)
                t_logits = F.linear(t_states[at : at + chunk], t_weight, t_bias).float()
                q = t_logits / temperature
                theirs = q.logsumexp(1, keepdim=True)
                q.sub_(theirs).exp_()
                # sum of q (log q - log p), where log p is the scaled logits less their normaliser
                gap = t_logits.sub_(logits).mul_(q).sum(1) / temperature
                kl += temperature**2 * (gap + (ours - theirs)[:, 0]).sum()
                if needs and kl_weight:
                    # d(T^2 KL)/d logits = T (softmax(student / T) - softmax(teacher / T))
                    d = torch.div(logits, temperature, out=t_logits).sub_(ours).exp_()
                    d.sub_(q).mul_(kl_weight * temperature)
                del q, t_logits
            if needs and ce_weight:
                p = logits.sub_(normaliser).exp_()
                p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
                p.mul_(ce_weight)
                d = p if d is None else d.add_(p)
                del p
            del logits
            if d is not None:
                d = d.to(weight.dtype)
                d_states[at : at + chunk] = d @ weight
                if late:
                    d_logits[at : at + chunk] = d
                elif d.dtype == torch.float32:
                    d_weight.addmm_(d.T, s)
                else:
                    for rows, part in zip(d_weight.split(SLICE), d.T.split(SLICE), strict=True):
                        rows += part @ s  # 16-bit factors, fp32 sum
                if d_bias is not None:
                    d_bias += d.sum(0)
        ctx.made = d_states, d_weight, d_bias, d_logits, states.detach() if late else None
        ctx.n, ctx.dtypes = n, (states.dtype, weight.dtype)
        ce, kl = (ce / n).float(), (kl / n).float()
        total = ce_weight * ce
        if t_states is None:
            kl.fill_(float("nan"))
        else:
            total = total + kl_weight * kl
        ctx.mark_non_differentiable(ce, kl)
        return total, ce, kl

    @staticmethod
    def backward(ctx, gradient, *_):
        if ctx.made is None:
            raise RuntimeError("head_loss can be differentiated once")
        d_states, d_weight, d_bias, d_logits, states = ctx.made
        ctx.made = None  # scaled in place where the type stays
        (state_type, head_type), factor = ctx.dtypes, gradient / ctx.n
        if d_logits is not None:
            d_weight = d_logits.new_empty(d_logits.shape[1], states.shape[1])
            for to, d in zip(d_weight.split(SLICE), d_logits.split(SLICE, 1), strict=True):
                torch.mm((d * factor).T, states, out=to)  # scaled before, so that fp16 holds it
        else:
            d_weight = _scaled(d_weight, factor, head_type)
        d_bias = None if d_bias is None else _scaled(d_bias, factor, head_type)
        return (_scaled(d_states, factor, state_type), d_weight, d_bias, *[None] * 6)


def _scaled(d: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """d * factor in a type, in place or by slices: no second fp32 [V, H] stands in between."""
    if d.dtype == dtype:
        return d.mul_(factor)
    result = torch.empty_like(d, dtype=dtype)
    for to, part in zip(result.split(SLICE), d.split(SLICE), strict=True):
        to.copy_(part * factor)
    return result


def square_head(
    student: list[torch.Tensor], teacher: list[torch.Tensor], skip: int
) -> torch.Tensor:
    """SquareHead: the relative squared error of each block's output, averaged over the blocks.

    MSE(student, teacher) / (mean teacher^2 + 1e-6), Kurtic et al. 2023 (arXiv 2310.06927), but a
    sequence at a time: a ratio of means over the micro-batch would change with its size and with
    the ranks.

    Args:
        student: outputs [B, T, H] of the blocks.
        teacher: the dense model's, in the same shapes.
        skip: first positions left out: their few huge activations would rule the error.
    """
    total = torch.zeros((), device=student[0].device)
    for s, t in zip(student, teacher, strict=True):
        s, t = s[:, skip:].float(), t[:, skip:].float()
        error, size = (x.square().mean((1, 2)) for x in (s - t, t))
        total = total + (error / (size + 1e-6)).mean()
    return total / len(student)

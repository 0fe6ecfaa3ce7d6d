"""Language modeling: packed text, cross-entropy and distillation losses, held-out perplexity.

One forward pass provides all inputs of the losses. `head_loss` applies the head to chunks of
tokens, so the logits [B, T, V] are never in memory.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from cap_llm.config import ContrastConfig, ObjectiveConfig
from cap_llm.contrast.loss import Units
from cap_llm.contrast.units import UnitExtractor, UnitKind
from cap_llm.models.skeleton import find_blocks, states_of
from cap_llm.runtime.world import World
from cap_llm.text.packing import PackedText
from cap_llm.training.engine import gathered
from cap_llm.training.objectives import head_loss, square_head
from cap_llm.training.task import Losses


class LanguageModeling:
    """Next-token prediction on packed text, with a teacher of the same vocabulary.

    Args:
        text: training and held-out sequences; a sequence is an example.
        objective: weights of the terms.
        skip: number of initial positions excluded from the feature loss.
        seed: of the data order.
        device: of the models.
    """

    unit, metric, metric_label = "tokens", "held_out_ppl", "held-out ppl"

    def __init__(
        self,
        text: PackedText,
        objective: ObjectiveConfig,
        skip: int,
        seed: int,
        device: torch.device,
    ):
        self.text, self.objective, self.skip = text, objective, skip
        self.seed, self.device, self.per_example = seed, device, text.ids.shape[1]

    def draws(self, start: int, end: int) -> torch.Tensor:
        """Returns the ids of the sequences `start` to `end` in training order."""
        return self.text.draws(start, end, self.seed)

    def student(self, model: PreTrainedModel) -> nn.Module:
        """Wraps the model to train, with its losses."""
        return CausalLMWithLosses(model, self.objective, self.skip)

    def teacher(self, model: PreTrainedModel) -> nn.Module:
        """Wraps a frozen model."""
        return CausalLM(model)

    def states(self, engine, ids: torch.Tensor) -> torch.Tensor:
        """Returns the final states [B, T, H] of a frozen model for sequences [B]."""
        return engine(self.text.ids[ids].to(self.device), False)[0]

    def losses(self, student, teacher, ids: torch.Tensor) -> Losses:
        """Computes cross-entropy, distillation and feature losses of sequences [B]."""
        objective, tokens = self.objective, self.text.ids[ids].to(self.device)
        teacher_out = head = None
        if teacher is not None:
            with torch.no_grad():
                teacher_out = teacher(tokens, bool(objective.feature))
            head = teacher.module.head if objective.kl else None
        with gathered(head.parameters() if head is not None else ()):
            weights = None
            if head is not None:
                bias = None if head.bias is None else head.bias.detach()
                weights = head.weight.detach(), bias
            total, ce, kl, feature, states = student(tokens, teacher_out, weights)
        parts = {"ce": ce}
        if objective.kl:
            parts["kl"] = kl
        if objective.feature:
            parts["feature"] = feature
        teacher_states = teacher_out[0] if teacher_out else None
        return Losses(total + objective.feature * feature, parts, states, teacher_states)

    @torch.no_grad()
    def evaluate(self, student, micro_batch: int, world: World) -> float:
        """Returns the perplexity of the held-out sequences, over all ranks."""
        held_out, batch = self.text.held_out, world.size * micro_batch
        nll = torch.zeros((), dtype=torch.float64, device=self.device)
        student.eval()
        for part in held_out.split(batch):
            own = part[world.rank :: world.size]
            ids = (own if len(own) else held_out[:1]).to(self.device)  # all ranks run ZeRO-3
            _, ce, *_ = student(ids)
            nll += ce.double() * len(own)
        student.train()
        return math.exp(min(700.0, world.sum(nll).item() / len(held_out)))


class CausalLM(nn.Module):
    """A causal language model, split into final states and head.

    Args:
        model: of transformers; its logits must be the head's output.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    @property
    def head(self) -> nn.Linear:
        """The linear layer from final states to logits."""
        return self.model.get_output_embeddings()

    def forward(self, ids: torch.Tensor, features: bool) -> tuple[torch.Tensor, ...]:
        """Returns the final states [B, T, H] (after the last norm) of ids [B, T], followed by the
        output of each block if `features`."""
        outputs: list[torch.Tensor] = []
        handles = []
        if features:
            for block in find_blocks(self.model)[1]:
                handles.append(
                    block.register_forward_hook(lambda _, __, out: outputs.append(states_of(out)))
                )
        try:
            states = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        return states, *outputs


class CausalLMWithLosses(CausalLM):
    """The trained model with the losses that need its head.

    One forward pass uses all parameters, as ZeRO-3 requires.

    Args:
        model: the model.
        objective: weights and temperature of the terms.
        skip: number of initial positions excluded from the feature loss.
    """

    def __init__(self, model: PreTrainedModel, objective: ObjectiveConfig, skip: int):
        super().__init__(model)
        self.objective, self.skip = objective, skip
        self.loss_head = LossHead(self.head)

    def forward(self, ids: torch.Tensor, teacher=None, head=None):
        """Computes the losses of ids [B, T].

        Args:
            ids: the batch.
            teacher: output of the teacher's `CausalLM`, or None without distillation.
            head: the teacher's head (weight, bias).

        Returns:
            The weighted head loss with gradient, CE, KL, the feature loss, and the final states.
        """
        objective = self.objective
        states, *outputs = super().forward(ids, bool(objective.feature) and teacher is not None)
        flat = states[:, :-1].flatten(0, 1)
        target = ids[:, 1:].flatten()
        t = None
        if teacher is not None and objective.kl:
            t = (teacher[0][:, :-1].flatten(0, 1), *head)
        factors = objective.ce, objective.kl, objective.temperature
        total, ce, kl = self.loss_head(flat, target, t, factors)
        feature = torch.zeros((), device=ids.device)
        if outputs:
            feature = square_head(outputs, list(teacher[1:]), self.skip)
        return total, ce, kl, feature, states


class LossHead(nn.Module):
    """A model's head that returns losses instead of logits.

    It shares the head's parameters. Being a module, ZeRO-3 gathers them for its forward pass. Its
    state dict is empty: checkpoints store the parameters under the head's name.
    """

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def _save_to_state_dict(self, *_) -> None:
        pass

    def _load_from_state_dict(self, *_) -> None:
        pass

    def forward(self, states: torch.Tensor, targets: torch.Tensor, teacher, factors: tuple):
        """See `head_loss`; `factors`: the weights of CE and KL, and the temperature."""
        return head_loss(states, self.weight, self.bias, targets, teacher, *factors)


class TextUnits(UnitExtractor):
    """The units of packed text: S segments and m token positions per sequence.

    The initial positions are excluded, because their states differ strongly from all others.

    Args:
        text: the recovery text.
        settings: sizes, weights and temperatures.
        width: H, of the states.
        skip: number of initial positions excluded.
        seed: of positions, projection and data order.
        device: of the states.
    """

    def __init__(
        self,
        text: PackedText,
        settings: ContrastConfig,
        width: int,
        skip: int,
        seed: int,
        device: torch.device,
    ):
        self.n_segments, self.n_tokens = settings.segments, settings.token_positions
        n_units = self.n_segments + self.n_tokens
        super().__init__(len(text.ids), n_units, width, settings.dim, seed, device)
        self.text, self.skip = text, skip
        s = settings
        self.kinds = [
            UnitKind(slice(0, s.segments), s.segment_weight, s.segment_temperature),
            UnitKind(slice(s.segments, None), s.token_weight, s.token_temperature, s.supervised),
        ]
        counts = (s.segments, s.token_positions)
        self.kinds = [kind for kind, n in zip(self.kinds, counts, strict=True) if n and kind.weight]
        self.facts = {
            "text": text.digest,
            "segments": self.n_segments,
            "token_positions": self.n_tokens,
            "skip": skip,
            "seed": seed,
        }
        self._frequent = text.most_frequent(settings.n_unlabeled_frequent)
        self._cuts = np.linspace(0, text.ids.shape[1], self.n_segments + 1).astype(int)
        self._cuts = self._cuts if self.n_segments else self._cuts[:0]
        self._cuts[:1] = skip

    def draws(self, start: int, end: int) -> torch.Tensor:
        """Returns the ids of the sequences `start` to `end` in training order."""
        return self.text.draws(start, end, self.seed)

    def pooled(self, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Returns segment means and token states, [B, S + m, H], of states [B, T, H]."""
        parts = [states[:, a:b].mean(1) for a, b in zip(self._cuts, self._cuts[1:], strict=False)]
        parts = [torch.stack(parts, 1)] if parts else []
        if self.n_tokens:
            positions = self._positions(ids).to(states.device)[..., None]
            parts.append(states.gather(1, positions.expand(-1, -1, states.shape[-1])))
        return torch.cat(parts, 1)

    def positions(self, sequence: int) -> np.ndarray:
        """Draws the token positions [m] of a sequence, sorted, each with a next token."""
        rng = np.random.default_rng([self.seed, sequence])
        last = self.text.ids.shape[1] - 1
        return np.sort(rng.choice(np.arange(self.skip, last), self.n_tokens, replace=False))

    def _positions(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the token positions [B, m] of sequences [B]."""
        rows = [self.positions(i) for i in ids.tolist()]
        return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(len(ids), self.n_tokens))

    def units(self, ids: torch.Tensor) -> Units:
        """Returns the units [B, S + m] of sequences [B]; a token's label is its next token."""
        documents, tokens = self.text.documents[ids], self.text.ids[ids]
        positions = self._positions(ids)
        cuts = torch.from_numpy(self._cuts)
        next_tokens = tokens.gather(1, positions + 1)
        label = next_tokens.masked_fill(torch.isin(next_tokens, self._frequent), -1)
        parts = (
            ids[:, None] * self.n_units + torch.arange(self.n_units),
            torch.cat([documents[:, cuts[:-1]], documents.gather(1, positions)], 1),
            torch.cat([documents[:, cuts[1:] - 1], documents.gather(1, positions)], 1),
            torch.cat([torch.full((len(ids), self.n_segments), -1), label], 1),
        )
        return Units(*(p.long().to(self.device) for p in parts))

"""What a training is about: a task brings data, head, losses and a metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from cap_llm.runtime.world import World


@dataclass
class Losses:
    """The losses of one micro-batch on one rank.

    Attributes:
        total: weighted sum, a scalar with gradient.
        parts: unweighted scalars for the log, by term.
        states: the student's states [B, T, H] that contrasts read, with gradient.
        teacher_states: the teacher's [B, T, H], or None without a teacher.
    """

    total: torch.Tensor
    parts: dict[str, torch.Tensor]
    states: torch.Tensor
    teacher_states: torch.Tensor | None = None


class Task(Protocol):
    """A task of the training loop.

    An example is known by its id everywhere: in the data order, in banks, in error messages.

    Attributes:
        unit: what throughput counts, such as `tokens`.
        per_example: units per example.
        metric: name of the held-out measure in the metrics, such as `held_out_ppl`.
        metric_label: the same for people, such as `held-out ppl`.
    """

    unit: str
    per_example: int
    metric: str
    metric_label: str

    def draws(self, start: int, end: int) -> torch.Tensor:
        """Ids of the examples at places `start` to `end` of the training, in one global order that
        does not depend on the number of ranks."""
        ...

    def student(self, model: PreTrainedModel) -> nn.Module:
        """Wraps the model to train, as its attribute `model`. One forward uses all parameters, as
        ZeRO-3 requires."""
        ...

    def teacher(self, model: PreTrainedModel) -> nn.Module:
        """Wraps a frozen model, as its attribute `model`."""
        ...

    def states(self, engine, ids: torch.Tensor) -> torch.Tensor:
        """States [B, T, H] of a frozen model for examples [B]."""
        ...

    def losses(self, student, teacher, ids: torch.Tensor) -> Losses:
        """The losses of examples [B] from one forward each of the student's and the teacher's
        engine; `teacher` is None where no term needs it."""
        ...

    def evaluate(self, student, micro_batch: int, world: World) -> float:
        """The metric on the held-out examples, over all ranks."""
        ...

"""The contrastive loss between a student's units and the banked units of frozen models.

A unit is a vector with an identity (`units.py`). An anchor is a unit of the student, with gradient.
Its candidates are the units of all ranks' batches, both the student's (detached) and those of the
bank's model, and extra rows of the bank. The positives are the bank rows of the same unit and, with
labels, candidates with the same label. Other units of the anchor's documents are excluded.

The three contrasts of CAP (Xu et al., AAAI 2022) apply this loss to three banks: the pre-trained
model (PrC), snapshots of the student (SnC) and a fine-tuned model (FiC).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Units:
    """Identities of units, tensors of one shape.

    Attributes:
        key: unique number of the unit in the data set.
        first_document, last_document: range of documents that the unit covers.
        label: class of the unit; -1: none.
    """

    key: torch.Tensor
    first_document: torch.Tensor
    last_document: torch.Tensor
    label: torch.Tensor

    def __getitem__(self, index) -> Units:
        return Units(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def flatten(self) -> Units:
        """Returns the units in one dimension."""
        return Units(*(getattr(self, name).flatten() for name in self.__dataclass_fields__))

    @classmethod
    def join(cls, parts: list[Units]) -> Units:
        """Concatenates units."""
        return cls(*(torch.cat([getattr(p, n) for p in parts]) for n in cls.__dataclass_fields__))


def contrastive_loss(
    anchors: torch.Tensor,
    anchor_units: Units,
    candidates: torch.Tensor,
    candidate_units: Units,
    from_bank: torch.Tensor,
    temperature: float,
    unsupervised: float = 1.0,
    supervised: float = 0.0,
) -> tuple[torch.Tensor, int]:
    """InfoNCE with an optional supervised contrastive part.

    The loss of an anchor is -(unsupervised / |P| * sum_P l + supervised / |Q| * sum_Q l). P are the
    bank rows of its own unit, Q the other units with its label, and l is the log-softmax of the
    cosines over the temperature. Unlike CAP's code (`cap_compat`), each part is a plain mean.

    Args:
        anchors: [A, d], unit length, with gradient.
        anchor_units: their identities, [A].
        candidates: [C, d], unit length.
        candidate_units: their identities, [C].
        from_bank: [C], false for the student's vectors.
        temperature: of the softmax.
        unsupervised: weight of the InfoNCE part.
        supervised: weight of the supervised part; zero for anchors whose label no other unit has.

    Returns:
        The sum over the anchors with a positive, and their number.

    Raises:
        ValueError: `temperature` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}. It must be positive.")
    own = anchor_units.key[:, None] == candidate_units.key
    same_document = (anchor_units.first_document[:, None] <= candidate_units.last_document) & (
        candidate_units.first_document <= anchor_units.last_document[:, None]
    )
    positive = own & from_bank
    excluded = (own | same_document) & ~positive
    scores = anchors.float() @ candidates.float().T / temperature
    log_p = scores.masked_fill(excluded, -torch.inf).log_softmax(1)
    counted = positive.any(1)
    total = unsupervised * _masked_mean(log_p, positive)[counted].sum()
    if supervised:
        label = anchor_units.label[:, None]
        same_label = (label == candidate_units.label) & (label >= 0) & ~own & ~excluded
        total = total + supervised * _masked_mean(log_p, same_label)[counted].sum()
    return -total, int(counted.sum())


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the mean [A] of values [A, C] over a mask [A, C]; 0 for an empty row."""
    return values.masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)


def cap_compat(
    anchors: torch.Tensor,
    ids: torch.Tensor,
    bank: torch.Tensor,
    extra_ids: torch.Tensor,
    temperature: float,
    unsupervised: float,
    supervised: float,
    labels: torch.Tensor,
) -> torch.Tensor:
    """CAP's contrastive loss exactly as its published code computes it, for parity tests.

    Each part is divided by its number of positives twice, per anchor and in total, so its weight
    decreases with the number of positives.

    Args:
        anchors: the student's vectors of a batch, [B, d], unit length, with gradient.
        ids: of the batch's examples, [B]; rows of `bank`.
        bank: a frozen model's vectors, [n, R, d], unit length.
        extra_ids: of extra examples whose bank rows are candidates, [E].
        temperature: of the softmax.
        unsupervised: weight of the part with the anchor's own example as positive.
        supervised: weight of the part with the anchor's label as positive.
        labels: of all examples, [n].

    Returns:
        The loss, a scalar.
    """
    n, r = anchors.shape[0], bank.shape[1]
    rows = torch.cat([ids, extra_ids])
    candidates = torch.cat([anchors.detach(), bank[rows].flatten(0, 1)]).float()
    owner = torch.cat([ids, rows.repeat_interleave(r)])
    itself = torch.zeros(n, len(owner), dtype=torch.bool, device=anchors.device)
    itself.fill_diagonal_(True)
    scores = (anchors.float() @ candidates.T / temperature).masked_fill(itself, -1e6)
    log_p = F.log_softmax(scores, 1)
    loss = anchors.new_zeros((), dtype=torch.float32)
    for weight, positive in (
        (unsupervised, ids[:, None] == owner),
        (supervised, labels[ids][:, None] == labels[owner]),
    ):
        positive = positive & ~itself
        count = positive.sum(1)
        loss = loss - weight * ((log_p * positive).sum(1) / count).sum() / count.sum()
    return loss

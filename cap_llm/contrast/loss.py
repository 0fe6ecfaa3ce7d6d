"""The contrastive losses: of a student's units with the banked units of frozen models.

A unit is a vector of a segment or of a token position (`units.py`). An anchor is a unit of the
student's, with gradient. Its candidates are the units of all ranks' batches, as the student sees
them now (detached) and as the bank's models saw them, and further rows of the bank. Positive are
the bank's rows of the anchor's own unit; with labels also the candidates of the same label. Other
units of the anchor's own documents are neither.

The three contrasts of CAP (Xu et al., AAAI 2022) are this one loss on three banks: of the
pre-trained model (PrC), of the student at earlier levels (SnC), and of a fine-tuned model (FiC).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Units:
    """What units are, of any shape: which one, which documents it covers, and its label.

    Attributes:
        key: one number for each unit of the recovery text.
        first_document, last_document: of the packed documents that it reaches into.
        label: the next token's id for a token unit; -1 for none.
    """

    key: torch.Tensor
    first_document: torch.Tensor
    last_document: torch.Tensor
    label: torch.Tensor

    def __getitem__(self, index) -> Units:
        return Units(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def flatten(self) -> Units:
        """The same units in one row."""
        return Units(*(getattr(self, name).flatten() for name in self.__dataclass_fields__))

    @classmethod
    def join(cls, parts: list[Units]) -> Units:
        """Units one after another."""
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
    """InfoNCE and supervised contrast of anchors with their candidates.

    For each anchor i with positives P and, of its label and another unit, Q:
    -(unsupervised / |P| * sum_P l + supervised / |Q| * sum_Q l), where l is the log-softmax of the
    cosines over the temperature. Unlike the original (`cap_compat`), each part is a plain mean.

    Args:
        anchors: [A, d], of length 1, with gradient.
        anchor_units: what they are, [A].
        candidates: [C, d], of length 1.
        candidate_units: what they are, [C].
        from_bank: [C], false for the student's own vectors.
        temperature: of the softmax.
        unsupervised: weight of the part whose positives are the anchor's own bank rows.
        supervised: weight of the part whose positives have the anchor's label; anchors without a
            partner contribute nothing to it.

    Returns:
        The sum over the anchors that have a positive, and their number.

    Raises:
        ValueError: `temperature` is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"the temperature is {temperature}; it must be above 0")
    own = anchor_units.key[:, None] == candidate_units.key
    same_document = (anchor_units.first_document[:, None] <= candidate_units.last_document) & (
        candidate_units.first_document <= anchor_units.last_document[:, None]
    )
    positive = own & from_bank
    out = (own | same_document) & ~positive
    scores = (anchors.float() @ candidates.float().T / temperature).masked_fill(out, -torch.inf)
    log_p = scores.log_softmax(1)
    known = positive.any(1)
    total = unsupervised * _mean_over(log_p, positive)[known].sum()
    if supervised:
        label = anchor_units.label[:, None]
        partner = (label == candidate_units.label) & (label >= 0) & ~own & ~out
        total = total + supervised * _mean_over(log_p, partner)[known].sum()
    return -total, int(known.sum())


def _mean_over(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of values [A, C] where mask [A, C], [A]; 0 where there is none."""
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
    """CAP's contrastive term exactly as its published code computes it, for parity.

    Each part is divided by its number of positives twice, once for each anchor and once for all,
    so that the weight of a part falls with its number of positives.

    Args:
        anchors: the student's vectors of a batch, [B, d], of length 1, with gradient.
        ids: of the batch's examples, [B], rows of `bank`.
        bank: a frozen model's vectors, [n, R, d], of length 1.
        extra_ids: further examples whose bank rows are candidates, [E].
        temperature: of the softmax.
        unsupervised: weight where positives are the rows of the anchor's own example.
        supervised: weight where positives are the candidates of the anchor's label.
        labels: of all examples, [n].

    Returns:
        The term, a scalar.
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

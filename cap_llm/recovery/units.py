"""Units of contrast: from a decoder's final states to short vectors of segments and tokens.

States after the final norm are far from isotropic: a few channels and the first positions rule all
cosines. So the first positions are left out, the vectors are centred by the mean over a sample of
the text, projected to fewer dimensions by one fixed orthonormal matrix, and only then normalised.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from cap_llm.config import ContrastConfig
from cap_llm.recovery.contrast import Units
from cap_llm.text.packing import PackedText


class Encoder:
    """The units of a packed text: S segments and m token positions for each sequence.

    A unit's place depends on its sequence's id and the seed alone, so that frozen models can be
    banked before or beside the training.

    Args:
        text: the recovery text.
        settings: sizes.
        width: H, of the states.
        skip: first positions left out of everything.
        seed: of positions and projection.
        device: where states are.
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
        self.text, self.settings, self.skip, self.seed = text, settings, skip, seed
        self.n_segments, self.n_tokens = settings.segments, settings.token_positions
        self.n_units = self.n_segments + self.n_tokens
        self.dim = min(settings.dim, width)
        generator = torch.Generator().manual_seed(seed)
        square = torch.randn(width, self.dim, generator=generator, dtype=torch.float64)
        self.projection = torch.linalg.qr(square).Q.float().to(device)  # [H, d]
        self.device = device
        self._frequent = text.most_frequent(settings.frequent_ids)
        self._cuts = np.linspace(0, text.ids.shape[1], self.n_segments + 1).astype(int)
        self._cuts = self._cuts if self.n_segments else self._cuts[:0]
        self._cuts[:1] = skip

    def raw(self, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Projected units [B, S + m, d], not centred yet, fp32, of final states [B, T, H].

        Args:
            states: with gradient or without.
            ids: of the sequences, [B].
        """
        states = states.float()
        parts = [states[:, a:b].mean(1) for a, b in zip(self._cuts, self._cuts[1:], strict=False)]
        parts = [torch.stack(parts, 1)] if parts else []
        if self.n_tokens:
            at = self._at(ids).to(states.device)[..., None]
            parts.append(states.gather(1, at.expand(-1, -1, states.shape[-1])))
        return torch.cat(parts, 1) @ self.projection

    def positions(self, sequence: int) -> np.ndarray:
        """The token positions [m] of a sequence, sorted; the last one has no next token."""
        draw = np.random.default_rng([self.seed, sequence])
        most = self.text.ids.shape[1] - 1
        return np.sort(draw.choice(np.arange(self.skip, most), self.n_tokens, replace=False))

    def _at(self, ids: torch.Tensor) -> torch.Tensor:
        """The token positions [B, m] of sequences [B]."""
        places = [self.positions(i) for i in ids.tolist()]
        return torch.from_numpy(np.array(places, dtype=np.int64).reshape(len(ids), self.n_tokens))

    def units(self, ids: torch.Tensor) -> Units:
        """What the units of sequences [B] are, [B, S + m]."""
        documents, tokens = self.text.documents[ids], self.text.ids[ids]
        at = self._at(ids)
        cuts = torch.from_numpy(self._cuts)
        following = tokens.gather(1, at + 1)
        label = following.masked_fill(torch.isin(following, self._frequent), -1)
        parts = (
            ids[:, None] * self.n_units + torch.arange(self.n_units),
            torch.cat([documents[:, cuts[:-1]], documents.gather(1, at)], 1),
            torch.cat([documents[:, cuts[1:] - 1], documents.gather(1, at)], 1),
            torch.cat([torch.full((len(ids), self.n_segments), -1), label], 1),
        )
        return Units(*(p.long().to(self.device) for p in parts))


def normalise(raw: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Units [..., d] moved by the bank's centre [d] and brought to length 1."""
    return F.normalize(raw - centre, dim=-1)


def spread(vectors: torch.Tensor) -> tuple[float, float]:
    """How well vectors [n, d] of length 1 fill their space.

    Returns:
        The mean cosine of two of them, and the effective rank: exp of the entropy of the
        eigenvalues of their second moment (Roy and Vetterli 2007).
    """
    vectors = vectors.double()
    n = len(vectors)
    total = vectors.sum(0).square().sum()
    mean_cosine = (total - n) / (n * (n - 1)) if n > 1 else torch.ones(())
    p = torch.linalg.eigvalsh(vectors.T @ vectors / n).clamp(min=1e-12)
    p = p / p.sum()
    return mean_cosine.item(), (-(p * p.log()).sum()).exp().item()

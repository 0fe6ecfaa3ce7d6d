"""The contrasts of a training: which banks they have, how these are filled, and their losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from cap_llm.config import ContrastConfig
from cap_llm.recovery.bank import Bank
from cap_llm.recovery.contrast import Units, contrastive_loss
from cap_llm.recovery.units import Encoder, normalise, spread
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.world import World

SAMPLE = 64  # sequences that a bank's centre and spread are measured on
MOST_COSINE = 0.7  # above, the vectors are nearly one, and a contrast of them says nothing
LEAST_RANK = 2  # below, they lie on a line
LEAST_AROUND = 1e-4  # of their norm: what is left of the vectors when their mean is taken away


@dataclass
class Contrast:
    """One contrast: the pre-trained model (prc), snapshots (snc) or a fine-tuned model (fic).

    Attributes:
        name: prc, snc or fic.
        weight: in the objective.
        banks: one, or one for each snapshot.
        online: whether its rows come from the teacher's forward of the same step.
    """

    name: str
    weight: float
    banks: list[Bank] = field(default_factory=list)
    online: bool = False

    @property
    def centre(self) -> torch.Tensor:
        """What the student's units are centred by, [d]."""
        return torch.stack([bank.centre for bank in self.banks]).mean(0)


class Contrasts:
    """All contrasts of a training, with the candidates that they share.

    Args:
        encoder: of units.
        settings: sizes, temperatures, weights.
        batch: sequences a step, over all ranks.
        world: the ranks.
        share: ids of the sequences that this training sees, which banks must hold; all by default.
    """

    def __init__(
        self,
        encoder: Encoder,
        settings: ContrastConfig,
        batch: int,
        world: World,
        share: torch.Tensor | None = None,
    ):
        self.encoder, self.settings, self.batch, self.world = encoder, settings, batch, world
        self.share = torch.arange(len(encoder.text.ids)) if encoder and share is None else share
        self.terms: list[Contrast] = []

    def losses(
        self,
        states: torch.Tensor,
        teacher_states: torch.Tensor | None,
        mine: torch.Tensor,
        everyone: torch.Tensor,
        place: int,
        micro: int,
    ) -> dict[str, torch.Tensor]:
        """Each contrast's loss for this rank's part of a micro-batch.

        Args:
            states: the student's final states [B, T, H], with gradient.
            teacher_states: the pre-trained model's, for a contrast that is online.
            mine: ids of the sequences of this rank, [B].
            everyone: ids of all ranks', in rank order, [W * B].
            place: steps that have been taken from the text before this one, by all rungs.
            micro: the micro-batch of the step, from 0.
        """
        if not self.terms:
            return {}
        encoder, device = self.encoder, states.device
        raw = encoder.raw(states, mine)
        all_raw = self.world.concat(raw.detach())
        own_units, all_units = encoder.units(mine), encoder.units(everyone)
        losses = {}
        for term in self.terms:
            if term.online:
                rows = normalise(encoder.raw(teacher_states, mine), term.banks[0].centre.to(device))
                # as the bank keeps them, so that a row is the same whenever it is read
                rows = rows.to(torch.bfloat16).float()
                term.banks[0].write(mine, rows)
                rows = self.world.concat(rows)[None]
            else:
                rows = _demanded(term.banks, everyone).to(device)
            extra = self._extra(term, place, micro)
            further = _demanded(term.banks, extra).to(device)
            centre = term.centre.to(device)
            losses[term.name] = self._loss(
                normalise(raw, centre),
                own_units,
                normalise(all_raw, centre),
                all_units,
                torch.cat([rows, further], 1),
                Units.join([all_units, encoder.units(extra)]),
            )
        return losses

    def _loss(self, anchors, own_units, seen, seen_units, banked, banked_units):
        """A contrast of anchors [B, U, d] with what all ranks' students have `seen` [W * B, U, d]
        and with the rows of R banks [R, W * B + E, U, d]."""
        s, total = self.settings, anchors.new_zeros(())
        segments, tokens = slice(0, s.segments), slice(s.segments, None)
        for part, weight, temperature, supervised in (
            (segments, s.segment_weight * bool(s.segments), s.segment_temperature, 0.0),
            (tokens, s.token_weight * bool(s.token_positions), s.token_temperature, s.supervised),
        ):
            if not weight:
                continue
            ours, theirs = seen[:, part].flatten(0, 1), banked[:, :, part].flatten(0, 2)
            units = [seen_units[:, part].flatten()]
            units += [banked_units[:, part].flatten()] * len(banked)
            from_bank = torch.arange(len(ours) + len(theirs), device=anchors.device) >= len(ours)
            loss, n = contrastive_loss(
                anchors[:, part].flatten(0, 1),
                own_units[:, part].flatten(),
                torch.cat([ours, theirs]),
                Units.join(units),
                from_bank,
                temperature,
                1.0,
                supervised,
            )
            # All ranks have equally many anchors: the mean over ranks is the mean over anchors.
            total = total + weight * loss / max(1, n)
        return total

    def _extra(self, term: Contrast, place: int, micro: int) -> torch.Tensor:
        """Further sequences whose rows are candidates: the same on every rank, and on a resume.

        An online contrast has rows of the steps before this one, of all rungs.
        """
        among = self.seen(place) if term.online else self.share
        draw = np.random.default_rng([self.encoder.seed, place, micro])
        n = min(self.settings.extra_sequences, len(among))
        return torch.from_numpy(draw.choice(among.numpy(), n, replace=False))

    def seen(self, place: int) -> torch.Tensor:
        """Ids of the sequences of the first `place` steps."""
        text = self.encoder.text
        if place * self.batch >= len(text.ids):
            return torch.arange(len(text.ids))
        return text.draws(0, place * self.batch, self.encoder.seed)

    @torch.no_grad()
    def fill(
        self,
        bank: Bank,
        model: Callable,
        ids: torch.Tensor,
        micro_batch: int,
        title: str,
        console: Console,
    ) -> None:
        """Measures a bank's centre if it has none, and writes the rows [ids] that are missing.

        Args:
            bank: to fill.
            model: gives final states for token ids [B, T].
            ids: sequences.
            micro_batch: sequences a rank passes at once.
            title: of the bar.
            console: for the bar and the bank's facts.

        Raises:
            UserError: the bank has collapsed: nearly all its vectors are one.
        """
        encoder, text, device = self.encoder, self.encoder.text, self.world.device

        def rounds(ids: torch.Tensor):
            """This rank's sequences, in as many rounds as every other rank has."""
            each = micro_batch * self.world.size
            for at in range(0, len(ids), each):
                part = ids[at : at + each]
                yield part[self.world.rank :: self.world.size], len(part)

        def raw(mine: torch.Tensor) -> torch.Tensor:
            # sharded models run on all ranks together, also where one has no sequence left
            asked = mine if len(mine) else torch.zeros(1, dtype=torch.long)
            units = encoder.raw(model(text.ids[asked].to(device)), asked)
            return units[: len(mine)]

        if bank.centre is None:
            sample = [raw(m) for m, _ in rounds(torch.arange(min(SAMPLE, len(text.ids))))]
            sample = torch.cat(sample).flatten(0, 1)
            total = torch.cat([sample.sum(0), sample.new_tensor([len(sample)])])
            total = self.world.sum(total)
            centre = total[:-1] / total[-1]
            everyone = torch.cat(self.world.gather(sample.cpu()))
            around = (everyone - centre.cpu()).norm() / everyone.norm()
            if not around > LEAST_AROUND:  # NaN too
                raise UserError(
                    f"the bank {bank.folder} has collapsed: its model gives one state for all "
                    "text, or none that is finite; check it, or set the contrast's weight to 0"
                )
            bank.settle(centre.cpu(), *spread(normalise(everyone, centre.cpu())))
            console.say(
                f"bank {bank.folder.name}: mean cosine {bank.mean_cosine:.3f}, effective rank "
                f"{bank.effective_rank:.0f} of {encoder.dim}"
            )
        if bank.mean_cosine > MOST_COSINE or bank.effective_rank < LEAST_RANK:
            raise UserError(
                f"the bank {bank.folder} has collapsed: the mean cosine of its vectors is "
                f"{bank.mean_cosine:.2f} (at most {MOST_COSINE}), their effective rank "
                f"{bank.effective_rank:.1f} (at least {LEAST_RANK}); a contrast with them says "
                "nothing: check the model, or set its weight to 0"
            )
        # the first rank's view counts, and all have looked before anyone writes
        has = self.world.gather(bank.has(ids))[0]
        if has.all():
            return
        with console.bar(title, len(ids), "sequences") as bar:
            there = has.split(micro_batch * self.world.size)
            for (mine, n), done in zip(rounds(ids), there, strict=True):
                # a whole round passes again, also where only a part of it is missing: made among
                # other sequences a row may be another in its last bits
                if not done.all():
                    rows = normalise(raw(mine), bank.centre.to(device))
                    missing = ~done[self.world.rank :: self.world.size]
                    bank.write(mine[missing], rows[missing.to(device)])
                bar.advance(n)
        bank.flush()
        self.world.barrier()


def _demanded(banks: list[Bank], ids: torch.Tensor) -> torch.Tensor:
    """The rows [R, B, U, d] of sequences [B] in R banks.

    Raises:
        UserError: one is missing.
    """
    for bank in banks:
        bank.demand(ids)
    return torch.stack([bank.read(ids) for bank in banks])

"""The contrasts of a training: which banks they have, how these are filled, and their losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from cap_llm.contrast.bank import Bank
from cap_llm.contrast.loss import Units, contrastive_loss
from cap_llm.contrast.units import UnitExtractor, anisotropy, normalize
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.world import World

SAMPLE = 64  # examples that a bank's center and anisotropy are measured on
MAX_COSINE = 0.7  # above, the vectors are nearly one, and a contrast of them carries no signal
MIN_RANK = 2  # below, they lie on a line
MIN_SPREAD = 1e-4  # of their norm: what is left of the vectors when their mean is subtracted


@dataclass
class ContrastTerm:
    """One contrast: the pre-trained model (prc), snapshots (snc) or a fine-tuned model (fic).

    Attributes:
        name: prc, snc or fic.
        weight: in the objective.
        banks: one, or one per snapshot.
        online: whether its rows come from the teacher's forward of the same step.
    """

    name: str
    weight: float
    banks: list[Bank] = field(default_factory=list)
    online: bool = False

    @property
    def center(self) -> torch.Tensor:
        """What the student's units are centered by, [d]."""
        return torch.stack([bank.center for bank in self.banks]).mean(0)


class NoContrast:
    """The objective of a training without contrasts."""

    terms: tuple = ()

    def losses(self, *_) -> dict[str, torch.Tensor]:
        """No losses."""
        return {}

    def refill(self, *_) -> None:
        """Nothing to fill."""


class ContrastiveObjective:
    """All contrasts of a training, with the candidates that they share.

    Args:
        extractor: of units.
        extra_negatives: further examples per micro-batch whose bank rows are candidates.
        batch: examples per step, over all ranks.
        world: the ranks.
        share: ids of the examples that this training sees, which banks must hold; all by default.
    """

    def __init__(
        self,
        extractor: UnitExtractor,
        extra_negatives: int,
        batch: int,
        world: World,
        share: torch.Tensor | None = None,
    ):
        self.extractor, self.extra_negatives = extractor, extra_negatives
        self.batch, self.world = batch, world
        self.share = torch.arange(extractor.n_examples) if share is None else share
        self.terms: list[ContrastTerm] = []

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
            states: the student's states [B, T, H], with gradient.
            teacher_states: the pre-trained model's, for a contrast that is online.
            mine: ids of this rank's examples, [B].
            everyone: ids of all ranks' examples, in rank order, [W * B].
            place: steps that have been taken from the data before this one, by all stages of the
                schedule.
            micro: the micro-batch of the step, from 0.
        """
        extractor, device = self.extractor, states.device
        raw = extractor.raw(states, mine)
        all_raw = self.world.all_gather(raw.detach())
        own_units, all_units = extractor.units(mine), extractor.units(everyone)
        losses = {}
        for term in self.terms:
            if term.online:
                center = term.banks[0].center.to(device)
                rows = normalize(extractor.raw(teacher_states, mine), center)
                # as the bank keeps them, so that a row is the same whenever it is read
                rows = rows.to(torch.bfloat16).float()
                term.banks[0].write(mine, rows)
                rows = self.world.all_gather(rows)[None]
            else:
                rows = _required(term.banks, everyone).to(device)
            extra = self._extra(term, place, micro)
            further = _required(term.banks, extra).to(device)
            center = term.center.to(device)
            losses[term.name] = self._loss(
                normalize(raw, center),
                own_units,
                normalize(all_raw, center),
                all_units,
                torch.cat([rows, further], 1),
                Units.join([all_units, extractor.units(extra)]),
            )
        return losses

    def _loss(self, anchors, own_units, seen, seen_units, banked, banked_units):
        """A contrast of anchors [B, U, d] with what all ranks' students have `seen` [W * B, U, d]
        and with the rows of R banks [R, W * B + E, U, d]."""
        total = anchors.new_zeros(())
        for kind in self.extractor.kinds:
            part = kind.place
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
                kind.temperature,
                1.0,
                kind.supervised,
            )
            # All ranks have equally many anchors: the mean over ranks is the mean over anchors.
            total = total + kind.weight * loss / max(1, n)
        return total

    def _extra(self, term: ContrastTerm, place: int, micro: int) -> torch.Tensor:
        """Further examples whose rows are candidates: the same on every rank, and on a resume.

        An online contrast has rows of the steps before this one, of all stages of the schedule.
        """
        among = self.seen(place) if term.online else self.share
        draw = np.random.default_rng([self.extractor.seed, place, micro])
        n = min(self.extra_negatives, len(among))
        return torch.from_numpy(draw.choice(among.numpy(), n, replace=False))

    def refill(self, teacher: Callable, place: int, micro_batch: int, console: Console) -> None:
        """Fills missing rows of online contrasts: those of the first `place` steps.

        Args: see `fill`; `teacher` is the model whose forward gives their rows.
        """
        for term in self.terms:
            if term.online:
                title = f"{term.name}: rebuilding the bank"
                ids = self.seen(place)
                self.fill(term.banks[0], teacher, ids, micro_batch, title, console)

    def seen(self, place: int) -> torch.Tensor:
        """Ids of the examples of the first `place` steps."""
        if place * self.batch >= self.extractor.n_examples:
            return torch.arange(self.extractor.n_examples)
        return self.extractor.draws(0, place * self.batch)

    @torch.no_grad()
    def fill(
        self,
        bank: Bank,
        model: Callable[[torch.Tensor], torch.Tensor],
        ids: torch.Tensor,
        micro_batch: int,
        title: str,
        console: Console,
    ) -> None:
        """Measures a bank's center if it has none, and writes the rows [ids] that are missing.

        Args:
            bank: to fill.
            model: gives states [B, T, H] for examples [B].
            ids: of the examples.
            micro_batch: examples per rank and forward.
            title: of the bar.
            console: for the bar and the bank's facts.

        Raises:
            UserError: the bank is degenerate: nearly all its vectors are one.
        """
        extractor, device = self.extractor, self.world.device

        def rounds(ids: torch.Tensor):
            """This rank's examples, in as many rounds as every other rank has."""
            each = micro_batch * self.world.size
            for at in range(0, len(ids), each):
                part = ids[at : at + each]
                yield part[self.world.rank :: self.world.size], len(part)

        def raw(mine: torch.Tensor) -> torch.Tensor:
            # sharded models run on all ranks together, also where one has no example left
            asked = mine if len(mine) else torch.zeros(1, dtype=torch.long)
            return extractor.raw(model(asked), asked)[: len(mine)]

        if bank.center is None:
            sample = [raw(m) for m, _ in rounds(torch.arange(min(SAMPLE, extractor.n_examples)))]
            sample = torch.cat(sample).flatten(0, 1)
            total = torch.cat([sample.sum(0), sample.new_tensor([len(sample)])])
            total = self.world.sum(total)
            center = total[:-1] / total[-1]
            everyone = torch.cat(self.world.gather(sample.cpu()))
            around = (everyone - center.cpu()).norm() / everyone.norm()
            if not around > MIN_SPREAD:  # NaN too
                raise UserError(
                    f"Bank {bank.folder} is degenerate: its model gives one state for all data, or "
                    "none that is finite. Check the model, or set the weight of the contrast to 0."
                )
            bank.set_center(center.cpu(), *anisotropy(normalize(everyone, center.cpu())))
            console.say(
                f"bank {bank.folder.name}: mean cosine {bank.mean_cosine:.3f}, effective rank "
                f"{bank.effective_rank:.0f} of {extractor.dim}"
            )
        if bank.mean_cosine > MAX_COSINE or bank.effective_rank < MIN_RANK:
            raise UserError(
                f"Bank {bank.folder} is degenerate, so a contrast carries no signal: mean cosine "
                f"{bank.mean_cosine:.2f} (at most {MAX_COSINE}), effective rank "
                f"{bank.effective_rank:.1f} (at least {MIN_RANK}). Check the model, or set the "
                "weight of the contrast to 0."
            )
        # the first rank's view counts, and all have looked before anyone writes
        has = self.world.gather(bank.has(ids))[0]
        if has.all():
            return
        with console.bar(title, len(ids), "examples") as bar:
            written = has.split(micro_batch * self.world.size)
            for (mine, n), done in zip(rounds(ids), written, strict=True):
                # a whole round passes again, also where only a part of it is missing: made among
                # other examples a row may be another in its last bits
                if not done.all():
                    rows = normalize(raw(mine), bank.center.to(device))
                    missing = ~done[self.world.rank :: self.world.size]
                    bank.write(mine[missing], rows[missing.to(device)])
                bar.advance(n)
        bank.flush()
        self.world.barrier()


def _required(banks: list[Bank], ids: torch.Tensor) -> torch.Tensor:
    """The rows [R, B, U, d] of examples [B] in R banks.

    Raises:
        UserError: one is missing.
    """
    for bank in banks:
        bank.require(ids)
    return torch.stack([bank.read(ids) for bank in banks])

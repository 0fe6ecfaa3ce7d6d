"""The contrastive objective of a training: its terms, their banks and losses."""

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

SAMPLE = 64  # examples that determine a bank's center and anisotropy
MAX_COSINE = 0.7  # mean cosine; above, the vectors are nearly equal and carry no signal
MIN_RANK = 2  # effective rank; below, the vectors lie on a line
MIN_SPREAD = 1e-4  # norm of the centered vectors, relative to the vectors


@dataclass
class ContrastTerm:
    """One term: the contrast with the pre-trained model, snapshots or a fine-tuned model.

    Attributes:
        name: prc, snc or fic.
        weight: in the objective.
        banks: one, or one per snapshot.
        online: the teacher's forward pass of each step writes the rows.
    """

    name: str
    weight: float
    banks: list[Bank] = field(default_factory=list)
    online: bool = False

    @property
    def center(self) -> torch.Tensor:
        """The center [d] of the student's units: the mean over the banks."""
        return torch.stack([bank.center for bank in self.banks]).mean(0)


class NoContrast:
    """The contrastive objective without terms."""

    terms: tuple = ()

    def losses(self, *_) -> dict[str, torch.Tensor]:
        """Returns no losses."""
        return {}

    def refill(self, *_) -> None:
        """Does nothing."""


class ContrastiveObjective:
    """All contrastive terms of a training; they share their candidates.

    Args:
        extractor: of units.
        extra_negatives: extra examples per micro-batch whose bank rows are candidates.
        batch: examples per step, over all ranks.
        world: the ranks.
        example_ids: of the training, which the banks must hold; default: all.
    """

    def __init__(
        self,
        extractor: UnitExtractor,
        extra_negatives: int,
        batch: int,
        world: World,
        example_ids: torch.Tensor | None = None,
    ):
        self.extractor, self.extra_negatives = extractor, extra_negatives
        self.batch, self.world = batch, world
        self.example_ids = (
            torch.arange(extractor.n_examples) if example_ids is None else example_ids
        )
        self.terms: list[ContrastTerm] = []

    def losses(
        self,
        states: torch.Tensor,
        teacher_states: torch.Tensor | None,
        ids: torch.Tensor,
        all_ids: torch.Tensor,
        step: int,
        micro_step: int,
    ) -> dict[str, torch.Tensor]:
        """Returns the loss of each term for this rank's part of a micro-batch.

        Args:
            states: the student's states [B, T, H], with gradient.
            teacher_states: the pre-trained model's states, for an online term.
            ids: of this rank's examples, [B].
            all_ids: of all ranks' examples, in rank order, [W * B].
            step: number of steps before this one, over all stages of the schedule.
            micro_step: micro-batch within the step, from 0.
        """
        extractor, device = self.extractor, states.device
        raw = extractor.raw(states, ids)
        all_raw = self.world.all_gather(raw.detach())
        units, all_units = extractor.units(ids), extractor.units(all_ids)
        losses = {}
        for term in self.terms:
            if term.online:
                center = term.banks[0].center.to(device)
                rows = normalize(extractor.raw(teacher_states, ids), center)
                # rounded as in the bank, so that a row does not depend on when it is read
                rows = rows.to(torch.bfloat16).float()
                term.banks[0].write(ids, rows)
                rows = self.world.all_gather(rows)[None]
            else:
                rows = _read(term.banks, all_ids).to(device)
            extra_ids = self._extra_ids(term, step, micro_step)
            extra_rows = _read(term.banks, extra_ids).to(device)
            center = term.center.to(device)
            losses[term.name] = self._loss(
                normalize(raw, center),
                units,
                normalize(all_raw, center),
                all_units,
                torch.cat([rows, extra_rows], 1),
                Units.join([all_units, extractor.units(extra_ids)]),
            )
        return losses

    def _loss(self, anchors, anchor_units, student, student_units, bank, bank_units):
        """Returns the loss of anchors [B, U, d] with candidates from all ranks' students
        [W * B, U, d] and from R banks [R, W * B + E, U, d]."""
        total = anchors.new_zeros(())
        for kind in self.extractor.kinds:
            part = kind.units
            student_part, bank_part = student[:, part].flatten(0, 1), bank[:, :, part].flatten(0, 2)
            candidates = torch.cat([student_part, bank_part])
            candidate_units = [student_units[:, part].flatten()]
            candidate_units += [bank_units[:, part].flatten()] * len(bank)
            from_bank = torch.arange(len(candidates), device=anchors.device) >= len(student_part)
            loss, n = contrastive_loss(
                anchors[:, part].flatten(0, 1),
                anchor_units[:, part].flatten(),
                candidates,
                Units.join(candidate_units),
                from_bank,
                kind.temperature,
                1.0,
                kind.supervised,
            )
            # ranks have the same number of anchors, so averaging over ranks is exact
            total = total + kind.weight * loss / max(1, n)
        return total

    def _extra_ids(self, term: ContrastTerm, step: int, micro_step: int) -> torch.Tensor:
        """Draws the extra examples, identical on all ranks and after a resume.

        The bank of an online term only has rows of previous steps.
        """
        pool = self._ids_before(step) if term.online else self.example_ids
        rng = np.random.default_rng([self.extractor.seed, step, micro_step])
        n = min(self.extra_negatives, len(pool))
        return torch.from_numpy(rng.choice(pool.numpy(), n, replace=False))

    def refill(self, teacher: Callable, step: int, micro_batch: int, console: Console) -> None:
        """Fills the missing rows of the first `step` steps in the banks of online terms.

        Args: see `fill`; `teacher` is the model.
        """
        for term in self.terms:
            if term.online:
                title, ids = f"{term.name}: rebuilding the bank", self._ids_before(step)
                self.fill(term.banks[0], teacher, ids, micro_batch, title, console)

    def _ids_before(self, step: int) -> torch.Tensor:
        if step * self.batch >= self.extractor.n_examples:
            return torch.arange(self.extractor.n_examples)
        return self.extractor.draws(0, step * self.batch)

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
        """Measures a bank's center if it has none, and writes the missing rows.

        Args:
            bank: the bank.
            model: returns states [B, T, H] of examples [B].
            ids: of the examples.
            micro_batch: examples per rank and forward pass.
            title: of the progress bar.
            console: for the progress bar and the bank's anisotropy.

        Raises:
            UserError: the bank is degenerate: its vectors are nearly equal.
        """
        extractor, device = self.extractor, self.world.device

        def rounds(ids: torch.Tensor):
            """Yields this rank's examples and the round's size; every rank has all rounds."""
            for part in ids.split(micro_batch * self.world.size) if len(ids) else ():
                yield part[self.world.rank :: self.world.size], len(part)

        def raw(own: torch.Tensor) -> torch.Tensor:
            # a sharded model runs on all ranks, even on one without an example in this round
            inputs = own if len(own) else torch.zeros(1, dtype=torch.long)
            return extractor.raw(model(inputs), inputs)[: len(own)]

        if bank.center is None:
            sample = [raw(m) for m, _ in rounds(torch.arange(min(SAMPLE, extractor.n_examples)))]
            sample = torch.cat(sample).flatten(0, 1)
            total = torch.cat([sample.sum(0), sample.new_tensor([len(sample)])])
            total = self.world.sum(total)
            center = total[:-1] / total[-1]
            sample = torch.cat(self.world.gather(sample.cpu()))
            spread = (sample - center.cpu()).norm() / sample.norm()
            if not spread > MIN_SPREAD:  # also true for NaN
                raise UserError(
                    f"Bank {bank.folder} is degenerate: the states of its model are constant or "
                    "not finite. Check the model, or set the weight of the contrast to 0."
                )
            bank.set_center(center.cpu(), *anisotropy(normalize(sample, center.cpu())))
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
        # rank 0's view, taken before any rank writes
        has = self.world.gather(bank.has(ids))[0]
        if has.all():
            return
        with console.bar(title, len(ids), "examples") as bar:
            written = has.split(micro_batch * self.world.size)
            for (own, n), present in zip(rounds(ids), written, strict=True):
                # recompute whole rounds: the last bits of a row depend on the rest of its batch
                if not present.all():
                    rows = normalize(raw(own), bank.center.to(device))
                    missing = ~present[self.world.rank :: self.world.size]
                    bank.write(own[missing], rows[missing.to(device)])
                bar.advance(n)
        bank.flush()
        self.world.barrier()


def _read(banks: list[Bank], ids: torch.Tensor) -> torch.Tensor:
    """Returns the rows [R, B, U, d] of examples [B] in R banks.

    Raises:
        UserError: a row is missing.
    """
    for bank in banks:
        bank.require(ids)
    return torch.stack([bank.read(ids) for bank in banks])

"""The banks of a recovery: units of the pre-trained model, of a fine-tuned one, of snapshots."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from cap_llm.config import RecoverConfig
from cap_llm.contrast.bank import Bank
from cap_llm.contrast.terms import ContrastiveObjective, ContrastTerm, NoContrast
from cap_llm.contrast.units import UnitExtractor
from cap_llm.models.directory import ModelDirectory
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.rundir import Run
from cap_llm.training import engine as engines
from cap_llm.training.task import Task


class Banks:
    """Makes and fills the banks that the contrasts of a training need.

    Args:
        folder: to keep them in.
        dense: the pre-trained model, for PrC.
        task: whose examples are banked.
        extractor: of their units.
        settings: of the recovery.
        teacher_ds: DeepSpeed settings of frozen models, or None.
        run: the run directory.
    """

    def __init__(
        self,
        folder: Path,
        dense: ModelDirectory,
        task: Task,
        extractor: UnitExtractor,
        settings: RecoverConfig,
        teacher_ds: dict | None,
        run: Run,
    ):
        self.folder, self.dense, self.task, self.extractor = folder, dense, task, extractor
        self.settings, self.teacher_ds, self.run = settings, teacher_ds, run
        self.shape = extractor.n_examples, extractor.n_units, extractor.dim

    def check_size(self) -> None:
        """Refuses a bank that would be too large.

        Raises:
            UserError: it takes more than `recover.contrast.bank_gib`.
        """
        gib, limit = 2 * math.prod(self.shape) / 2**30, self.settings.contrast.bank_gib
        if gib > limit:
            n, units, dim = self.shape
            raise UserError(
                f"recover.contrast.bank_gib is {limit:g}, but a bank of {n} sequences x {units} "
                f"units x {dim} takes {gib:.2g} GiB. Raise it, or lower recover.sequences, "
                "contrast.token_positions or contrast.dim."
            )

    def contrasts(
        self,
        share: torch.Tensor,
        online_teacher,
        finetuned: Callable[[], ModelDirectory] | None,
        snapshots: dict[int, ModelDirectory],
    ) -> ContrastiveObjective | NoContrast:
        """The contrasts that are on, their banks filled as far as a training needs them.

        Args:
            share: ids of the examples that the training sees.
            online_teacher: the engine of the pre-trained model where it runs in every step, whose
                forward then gives the rows of PrC; else None.
            finetuned: gives the fine-tuned model, for FiC.
            snapshots: earlier students by their number, for SnC.
        """
        settings, o = self.settings, self.settings.objective
        if not settings.contrasts:
            return NoContrast()
        extra = settings.contrast.extra_negatives
        made = ContrastiveObjective(
            self.extractor, extra, settings.optimizer.batch, self.run.world, share
        )
        if o.prc:
            bank = self._bank("pretrained", self.dense)
            if online_teacher is not None:  # its rows come with the steps; here only its center
                self._fill(made, bank, online_teacher, "PrC", share[:0])
            else:
                self._fill_from(made, bank, self.dense, "PrC")
            made.terms.append(ContrastTerm("prc", o.prc, [bank], online_teacher is not None))
        if o.fic and finetuned:
            path = finetuned()
            bank = self._bank("finetuned", path)
            self._fill_from(made, bank, path, "FiC")
            made.terms.append(ContrastTerm("fic", o.fic, [bank]))
        if o.snc and snapshots:
            banks = self._snapshots(made, snapshots)
            made.terms.append(ContrastTerm("snc", o.snc / len(banks), banks))
        return made if made.terms else NoContrast()

    def _snapshots(self, made: ContrastiveObjective, snapshots: dict) -> list[Bank]:
        """The banks of the latest students, filled; those of earlier ones are removed."""
        banks = []
        kept = sorted(snapshots)[-self.settings.contrast.snapshots :]
        for n, student in snapshots.items():
            name = f"snapshot-{n}"
            if n in kept:
                banks.append(self._bank(name, student))
                self._fill_from(made, banks[-1], student, f"SnC, snapshot {n}")
            elif self.run.world.is_main:
                shutil.rmtree(self.folder / name, ignore_errors=True)
        return banks

    def _bank(self, name: str, model: ModelDirectory) -> Bank:
        """A bank of the examples' units as a model sees them."""
        dtype = engines.compute_dtype(self.settings, self.run.world)
        facts = self.extractor.facts | {"model": model.fingerprint, "dtype": str(dtype)}
        return Bank(self.folder / name, facts, self.shape, self.run.world)

    def _fill(self, made: ContrastiveObjective, bank: Bank, engine, title: str, ids) -> None:
        """Fills the rows [ids] of a bank from an open engine."""
        made.fill(
            bank,
            lambda examples: self.task.states(engine, examples),
            ids,
            self.settings.engine.micro_batch,
            f"{title}: banking",
            self.run.console,
        )

    def _fill_from(self, made: ContrastiveObjective, bank: Bank, model: ModelDirectory, title: str):
        """Fills a bank by a pass of a model."""
        complete = bool(bank.has(made.example_ids).all())
        if self.run.world.gather(complete)[0]:
            return
        engine = engines.load_teacher(
            model, self.teacher_ds, self.settings, self.run.world, self.task.teacher
        )
        self._fill(made, bank, engine, title, made.example_ids)
        engines.release(engine)

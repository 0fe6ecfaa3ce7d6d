"""The stage `recover`: the schedule of levels, each of them bank, prune, train.

recover/                 the recovered model directory; done.json is written last
  recovery.json          held-out perplexity before and after each level, tokens, seconds
  banks/                 pretrained, finetuned, and a snapshot for each level
  levels/1/pruned         the student, pruned to the level
  levels/1/trained        and trained; the last level's is the stage's own folder
  finetuned/             the dense model trained on the recovery text (recover.finetuned train)
"""

from __future__ import annotations

import dataclasses
import gc
import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from cap_llm.blockwise.oneshot import run as prune_directory
from cap_llm.blockwise.perplexity import streamed_nll
from cap_llm.config import Level, MasksConfig, ObjectiveConfig, OneshotConfig, RecoverConfig
from cap_llm.config.section import identity
from cap_llm.contrast.terms import ContrastiveObjective, NoContrast
from cap_llm.models.blocks import BlockModel
from cap_llm.models.directory import ModelDirectory
from cap_llm.models.files import remove_weights, weights_and_masks
from cap_llm.models.result import (
    Result,
    finish_result,
    read_result,
    result_of,
)
from cap_llm.recovery.banks import Banks
from cap_llm.recovery.check import check, cost, state_width
from cap_llm.runtime.console import format_duration
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import holding, read_json, write_json
from cap_llm.runtime.memory import Memory, max_peaks, peaks, reset_peak_memory
from cap_llm.runtime.rundir import with_contents
from cap_llm.runtime.trackers import TensorBoard, Wandb
from cap_llm.stages import Inputs
from cap_llm.tasks.language_modeling import LanguageModeling, TextUnits
from cap_llm.text.packing import PackedText
from cap_llm.text.reading import Calibration
from cap_llm.training import checkpoints, ds_config
from cap_llm.training import engine as engines
from cap_llm.training.export import export
from cap_llm.training.loop import Job, Trained, train
from cap_llm.training.masks import Fixed

__all__ = ["check", "cost", "run"]

STAGE = "recover"


def run(
    inputs: Inputs,
    recover: RecoverConfig,
    text: PackedText,
    oneshot: OneshotConfig | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Runs the stage.

    Args:
        inputs: `start` is pruned, or dense with a schedule; `dense` is also the teacher, unless
            `recover.teacher` names one.
        recover: settings of the training.
        text: to train on.
        oneshot: how to prune to the levels of a schedule; None without one.
        calibration: text for that pruning; None if it needs none.

    Raises:
        UserError: a setting or an input is invalid. Finished levels and checkpoints remain on disk.
    """
    run, settings, world = inputs.run, recover, inputs.run.world
    folder, done = run.stage(STAGE, inputs.recipe)
    if done:
        run.console.say(f"recover: done already, in {folder}")
        return
    reset_peak_memory()
    engines.start(world)
    levels, student = settings.levels, inputs.start
    times = settings.examples / len(text.ids)
    if times > 1:
        run.console.say(
            f"recover: {text.origin} fills {len(text.ids):,} sequences of {settings.length} "
            f"tokens; the training passes them {times:.2f} times",
            style="yellow",
        )
    work = _Recovery(inputs, settings, text, oneshot, calibration, folder)
    work.check()
    run.bind(folder, inputs.recipe)
    work.keep_inputs()
    if settings.log.tensorboard and world.is_main:
        run.add_tracker(TensorBoard(run.path))
    if settings.log.wandb and world.is_main:
        run.add_tracker(
            Wandb(run.path, settings.log.wandb, run.name or run.path.name, inputs.recipe)
        )
    for n, level in enumerate(levels or [None], 1):
        last = n == max(1, len(levels))
        target = folder if last else folder / "levels" / str(n) / "trained"
        student = work.climb(student, level, n, len(levels), target)
    work.close()
    seconds = time.monotonic() - work.began
    summary = {
        "seconds": round(seconds, 2),
        **max_peaks(work.records),
        "calibration": calibration.origin if calibration else None,
        "recovery": text.origin,
        "tokens": settings.examples * settings.length,
        "distinct_tokens": text.ids.numel(),
        "levels": work.records,
    }
    if world.is_main:
        write_json(folder / "recovery.json", summary)
        pruned = read_result(folder / "levels" / str(len(levels)) / "pruned") or work.before
        per_step = settings.optimizer.batch * settings.length
        curve = [
            [
                ((n * settings.steps + int(step)) * per_step, ppl)
                for step, ppl in record["held_out_ppl"].items()
            ]
            for n, record in enumerate(work.records)
        ]
        finish_result(
            *(run, folder, STAGE, label(settings, pruned), inputs.recipe, work.before, summary),
            calibration=calibration.origin if calibration else None,
            ids_sha256=calibration.digest if calibration else None,
            training=f"{text.origin} in sequences of {settings.length} tokens",
            tokens=summary["tokens"],
            curve=curve,
            dense_ppl=work.records[-1]["dense_held_out_ppl"],
        )
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if not inputs.keep_intermediate:
            for path in (*folder.glob("levels/*/*"), folder / "finetuned"):
                remove_weights(path)
            shutil.rmtree(folder / "banks", ignore_errors=True)
    run.finish_stage(folder, summary, weights_and_masks(folder) if world.is_main else ())
    run.console.say(f"recover: done in {format_duration(seconds)}, in {folder}")


def label(settings: RecoverConfig, before: Result | None) -> tuple[str, str]:
    """Method and amount of a result, for reports.

    Args:
        settings: of the recovery.
        before: the pruned model that was trained last; None if it was dense.
    """
    method, amount = (before.method, before.amount) if before else ("dense", "")
    return f"{method} + recovery" + " on a schedule" * bool(settings.levels), amount


class _Recovery:
    """What the levels of one schedule share: the teacher, the text, the banks."""

    def __init__(
        self,
        inputs: Inputs,
        settings: RecoverConfig,
        text: PackedText,
        oneshot: OneshotConfig | None,
        calibration: Calibration | None,
        folder: Path,
    ):
        self.inputs, self.run, self.world = inputs, inputs.run, inputs.run.world
        self.start, self.dense = inputs.start, inputs.dense
        self.teacher = inputs.models.get("recover.teacher", self.dense)
        self.settings, self.text, self.folder = settings, text, folder
        self.oneshot, self.calibration = oneshot, calibration
        self.masks = self.start.masks(self.world)
        self.student_ds = ds_config.student_settings(self.settings, self.world)
        self.teacher_ds = ds_config.teacher_settings(self.settings, self.world, self.student_ds)
        self.began = time.monotonic()  # less what earlier jobs have spent, once that is known
        self.records: list[dict] = []
        # by level, as it stood before: the snapshots
        self._students: dict[int, ModelDirectory] = {}
        self._teacher = None
        s = self.settings
        device = self.world.device
        self.task = LanguageModeling(text, s.objective, s.SKIP, s.optimizer.seed, device)
        self.banks = None
        if s.contrasts:
            width = state_width(self.start)
            units = TextUnits(text, s.contrast, width, s.SKIP, s.optimizer.seed, device)
            self.banks = Banks(
                folder / "banks", self.dense, self.task, units, s, self.teacher_ds, self.run
            )
        self._dense_ppl: float | None = None
        self._models = {"start": self.start, "teacher": self.teacher, "dense": self.dense}
        # by the first rank's view: a shared file system may show ranks different things
        models = self._models.items() if self.world.is_main else ()
        prints = {name: model.fingerprint for name, model in models}
        self._inputs = self.world.gather({"text": text.digest} | prints)[0]
        self.before = self.world.decide(self._read_before)

    def _read_before(self) -> Result | None:
        """The result of the model that the stage starts from; None if it is dense."""
        if not self.masks:
            return read_result(self.start.path)
        model = dataclasses.asdict(self.inputs.model)
        model |= {"dense": self.settings.teacher} if self._taught_by_dense else {}
        return result_of(self.start.path, "given", model)

    def check(self) -> None:
        """Raises:
        UserError: a masked weight of the student is not zero, it is its own teacher, the first
            level is no sparser than it is, or a bank would be too large.
        """
        self.masks.check()
        own = [k for k in ("teacher", "dense") if self._inputs[k] == self._inputs["start"]]
        if self.masks and own:
            option = "recover.teacher" if self.settings.teacher else "model.dense"
            raise UserError(
                f"{self.start} is pruned, and {option} names it, or a copy of it, too: give the "
                "model that it was pruned from"
            )
        sparsity = self.masks.sparsity if self.masks else 0.0
        self.settings.check_first_level(self.start, sparsity)
        if self.banks:
            self.banks.check_size()

    def keep_inputs(self) -> None:
        """Writes what goes in: text and models, and to the run directory the DeepSpeed settings.

        Raises:
            UserError: a level is finished that was made from other ones.
        """
        path = self.folder / "inputs.json"
        known = read_json(path, holding(text=str)) if path.exists() else {}
        finished = next(self.folder.glob("levels/*/trained/level.json"), None)
        finished = finished or (self.folder / "finetuned" / "done.json").exists()
        changed = [k for k, now in self._inputs.items() if known.get(k, now) != now]
        changed = self.world.gather(changed if finished else [])[0]
        if changed:
            found = self._models.get(changed[0])
            what = f"the weights in {found} have" if found else "the recovery text has"
            raise UserError(
                f"{what} changed since {self.folder} was begun, and a level of it is finished; "
                "bring back what it was, or choose another output_dir"
            )
        if self.world.is_main:
            write_json(path, self._inputs | {"teacher_is_dense": self._taught_by_dense})
            write_json(self.run.path / "ds_config.json", self.student_ds)
            if self.teacher_ds:
                write_json(self.run.path / "ds_config_teacher.json", self.teacher_ds)

    def climb(
        self, student: ModelDirectory, level: Level | None, n: int, of: int, target: Path
    ) -> ModelDirectory:
        """Banks, prunes and trains one level; the directory of its model."""
        run, settings = self.run, self.settings
        title = f"level {n}/{of} ({level})" if level else STAGE
        record_file = target / "level.json"
        kinds = {"held_out_ppl": dict, "stage_seconds": float}
        known = read_json(record_file, holding(**kinds)) if record_file.exists() else None
        known = run.world.gather(known)[0]
        pruned = student
        if settings.objective.snc and of and (n > 1 or self.masks):  # a dense one is PrC's
            self._students[n] = student
        if known:
            self.records.append(known)
            self.began = time.monotonic() - known["stage_seconds"]
            self._check_ppl_ratio(title, target, known)
            return ModelDirectory(target)
        if level:
            run.console.say(f"{title}: pruning", style="bold")
            pruned = self._prune(student, level, n)
        masks = pruned.masks(self.world)
        if masks.from_zeros and masks.description:
            run.console.say(f"{title}: {masks.description}", style=None if masks else "yellow")
        if not masks:
            run.console.say(f"{title}: {pruned} is not pruned: it is fine-tuned as it is")
        if self._dense_ppl is None:
            self._dense_ppl = self._held_out_perplexity(self.dense)
            run.console.say(f"{title}: {self._measure}'s held-out ppl is {self._dense_ppl:.3f}")
        if self._online and self._teacher is None:
            self._teacher = engines.load_teacher(
                self.teacher, self.teacher_ds, settings, run.world, self.task.teacher
            )
        contrasts = self._contrasts(n)
        job = Job(
            student=pruned,
            task=self.task,
            masks=Fixed(masks.in_parameter_shape()),
            teacher=self._teacher,
            contrasts=contrasts,
            folder=self._checkpoints(n),
            recipe=self._recipe(n, contrasts),
            title=title,
            stage=STAGE if not of else f"{STAGE}/{n}",
            before=(n - 1) * settings.steps,
            began=self.began,
        )
        checkpoint = dataclasses.replace(settings.checkpoint, resume=self._resume(n))
        settings = dataclasses.replace(settings, checkpoint=checkpoint)
        trained, result = self._train(job, settings, target, masks)
        held_out = trained.held_out
        self._verify(result, held_out[settings.steps])
        record = {
            "level": str(level) if level else None,
            "held_out_ppl": {str(k): round(v, 4) for k, v in held_out.items()},
            "dense_held_out_ppl": self._dense_ppl,
            "stage_seconds": round(time.monotonic() - self.began, 2),
            **max_peaks(self.world.gather(peaks())),
        } | trained.summary
        if self.world.is_main:
            write_json(record_file, record)
        self._remove_checkpoints(n)
        self.world.barrier()
        self.records.append(record)
        self._check_ppl_ratio(title, target, record)
        return result

    def _prune(self, student: ModelDirectory, level: Level, n: int) -> ModelDirectory:
        """Prunes level `n`'s student, inside its mask; the directory of the result."""
        settings = level.apply(self.oneshot)
        if student == self.start and self.masks and self.masks.from_zeros:
            settings = dataclasses.replace(settings, initial_mask="zeros")
        recipe = {k: v for k, v in self.inputs.recipe.items() if k in ("model", "calibration")}
        recipe["oneshot"] = identity(settings)
        inputs = dataclasses.replace(self.inputs, start=student, recipe=recipe)
        folder = f"{STAGE}/levels/{n}/pruned"
        return prune_directory(inputs, settings, self.calibration, folder)

    def _check_ppl_ratio(self, title: str, target: Path, record: dict) -> None:
        """Stops the schedule after a level that has lost too much, also in a rerun."""
        ratio, dense = self.settings.log.max_ppl_ratio, record["dense_held_out_ppl"]
        after = list(record["held_out_ppl"].values())[-1]
        if ratio and dense and after > ratio * dense:
            raise UserError(
                f"recover.log.max_ppl_ratio is {ratio:g}, but {title} ends with a held-out "
                f"perplexity of {after:.2f}, {after / dense:.2f} times {self._measure}'s "
                f"{dense:.2f}. Its model is {target}: raise the ratio, or start over with more "
                "recover.optimizer.tokens or smaller levels."
            )

    def _resume(self, n: int) -> bool | str:
        """`recover.checkpoint.resume` as level `n` takes it.

        What is asked for is meant for the first level that trains; those after it go on by
        themselves, unless it is a checkpoint of theirs.
        """
        asked = self.settings.checkpoint.resume
        if not self.records or asked is False or checkpoints.level_of(asked) == n:
            return asked
        return "auto"

    def _train(
        self, job: Job, config: RecoverConfig, target: Path, masks: Mapping
    ) -> tuple[Trained, ModelDirectory]:
        """Trains a model and writes it, with its masks, to `target`."""
        trained = train(job, config, self.run)
        self.began = trained.began
        dtype = ds_config.DTYPES.get(config.save_dtype)
        engine, trained.engine = trained.engine, None  # its memory is needed from here on
        result = export(engine, job.student, target, masks, self.world, dtype)
        engines.release(engine)
        del engine
        gc.collect()
        return trained, result

    def _checkpoints(self, level: int | str) -> Path:
        return self.folder / "checkpoints" / str(level)

    def _remove_checkpoints(self, level: int | str) -> None:
        """What is written needs them no more."""
        if self.world.is_main:
            shutil.rmtree(self._checkpoints(level), ignore_errors=True)

    def _recipe(self, level: int | str, contrasts: ContrastiveObjective | NoContrast) -> dict:
        """What a checkpoint must have been made with."""
        recipe = self.inputs.recipe.items()
        settings = {k: v for k, v in recipe if k not in ("model", "start")}  # see the fingerprints
        settings = with_contents(settings, self.run.contents)
        recipe = {"settings": settings, "level": level} | self._inputs
        # Sequences that are contrasted with each other are part of what a training is.
        at_once = self.world.size * self.settings.engine.micro_batch if contrasts.terms else None
        return recipe | {"at_once": at_once}

    @property
    def _taught_by_dense(self) -> bool:
        """Whether the teacher that was named is also what the student was pruned from."""
        return bool(self.settings.teacher) and self._teacher_is_dense

    @property
    def _teacher_is_dense(self) -> bool:
        prints = self._inputs["teacher"], self._inputs["dense"]
        return self.dense == self.teacher or prints[0] == prints[1] is not None

    @property
    def _measure(self) -> str:
        """What the held-out perplexity is compared with."""
        return "the teacher" if self._taught_by_dense else "the dense model"

    @property
    def _online(self) -> bool:
        """Whether the teacher runs in every step."""
        return bool(self.settings.objective.kl or self.settings.objective.feature)

    def close(self) -> None:
        """Lets go of the teacher."""
        if self._teacher is not None:
            engines.release(self._teacher)
            self._teacher = None

    def _contrasts(self, n: int) -> ContrastiveObjective | NoContrast:
        """The contrasts of level `n` that are on."""
        settings, o = self.settings, self.settings.objective
        if o.fic and not settings.finetuned:
            self.run.console.say("FiC is off: recover.finetuned names no fine-tuned model")
        if o.snc and not self._students:
            self.run.console.say("SnC is off on this level: there is no snapshot before it")
        if not self.banks:
            return NoContrast()
        per_level = settings.steps * settings.optimizer.batch
        share = self.task.draws((n - 1) * per_level, n * per_level).unique()
        online = self._teacher if self._online and self._teacher_is_dense else None
        finetuned = self._finetuned if settings.finetuned else None
        return self.banks.contrasts(share, online, finetuned, self._students)

    def _finetuned(self) -> ModelDirectory:
        """The fine-tuned model: given, or the dense one trained on the recovery text."""
        settings, run = self.settings, self.run
        if settings.finetuned != "train":
            return self.inputs.models["recover.finetuned"]
        folder = self.folder / "finetuned"
        if run.world.gather((folder / "done.json").exists())[0]:
            return ModelDirectory(folder)
        run.console.say("FiC: fine-tuning the dense model on the recovery text", style="bold")
        only_ce = dataclasses.replace(
            settings,
            objective=ObjectiveConfig(ce=1.0, kl=0, feature=0, prc=0, snc=0, fic=0),
            masks=MasksConfig(),
            checkpoint=dataclasses.replace(
                settings.checkpoint, resume=settings.checkpoint.resume is not False and "auto"
            ),
        )
        task = LanguageModeling(
            self.text, only_ce.objective, settings.SKIP, settings.optimizer.seed, self.world.device
        )
        none = NoContrast()
        job = Job(
            student=self.dense,
            task=task,
            masks=Fixed(()),
            teacher=None,
            contrasts=none,
            folder=self._checkpoints("finetuned"),
            recipe=self._recipe("finetuned", none),
            title="fine-tuning",
            stage=f"{STAGE}/finetuned",
            began=self.began,
        )
        trained, result = self._train(job, only_ce, folder, {})
        before, after = trained.held_out[0], trained.held_out[settings.steps]
        if after > before:
            run.console.say(
                f"FiC: the fine-tuned model's held-out ppl is {after:.3f}, worse than the dense "
                f"model's {before:.3f}: lower --recover.optimizer.lr, or name a better one by "
                "--recover.finetuned",
                style="yellow",
            )
        files = weights_and_masks(folder) if run.world.is_main else ()
        run.finish_stage(folder, {"held_out_ppl": after}, files)
        self._remove_checkpoints("finetuned")
        return result

    def _held_out_perplexity(self, directory: ModelDirectory) -> float:
        """Of a model, a block in memory at a time."""
        engines.restore_linear()
        run, text = self.run, self.text
        dtype = engines.compute_dtype(self.settings, self.world)
        with tempfile.TemporaryDirectory(dir=run.path, prefix=".scratch-") as scratch:
            model = BlockModel.open(directory, run.world.device, dtype)
            memory = Memory.plan(run.world.device, run.world.activation_gib)
            nll = streamed_nll(model, text.held_out, run.world, memory, Path(scratch))
        return math.exp(min(700.0, nll / (len(text.held_out) * (text.held_out.shape[1] - 1))))

    def _verify(self, model: ModelDirectory, expected: float) -> None:
        """Reloads a written model and holds its perplexity against the engine's."""
        run, ppl = self.run, self._held_out_perplexity(model)
        dtype = engines.compute_dtype(self.settings, self.world)
        stored = getattr(torch, model.settings["dtype"])
        tolerance = 1e-4 if dtype.itemsize == 4 else 1e-2
        if stored.itemsize < dtype.itemsize:
            tolerance = 5e-2  # the stored weights are rounded
        if not abs(ppl / expected - 1) < tolerance:
            raise UserError(
                f"the model in {model} has a held-out perplexity of {ppl:.4f}, the trained "
                f"one {expected:.4f}; the files are not what was trained: please report this"
            )
        run.console.say(
            f"verified: reloaded from {model}, held-out ppl {ppl:.4f} (engine {expected:.4f}), "
            "zeros exact"
        )

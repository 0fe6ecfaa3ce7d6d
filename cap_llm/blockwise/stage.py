"""A stage that works a block at a time: what is durable, how it goes on, how it ends.

Each finished block lies in the stage's folder as its shard of the model, with its masks and rows in
`blocks/`, so that a killed job goes on with the blocks that are not there. At the end the parts are
joined and the model is read again and held against its masks, before `done.json` says so.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from cap_llm.blockwise.prune import PrunedBlock
from cap_llm.models import mask_file as mask_files
from cap_llm.models.blocks import BlockModel
from cap_llm.models.checkpoint import ShardWriter
from cap_llm.models.directory import ModelDirectory, Row
from cap_llm.models.files import weights_and_masks
from cap_llm.models.masks import PRUNED, Masks
from cap_llm.models.result import (
    Result,
    finish_result,
    read_result,
    result_of,
)
from cap_llm.runtime.console import format_bytes, format_duration
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import digests, read_json, write_json
from cap_llm.runtime.files import verify as verify_files
from cap_llm.runtime.memory import max_peaks, peaks, reset_peak_memory
from cap_llm.runtime.rundir import Run
from cap_llm.stages import Preview
from cap_llm.text.reading import Calibration

INPUTS = "calibration.json"  # checksums of what a stage is made from


class BlockStage:
    """One stage of a run that rewrites a model block by block.

    Args:
        name: its folder in the run directory, and what the log and the metrics call it.
        recipe: what its result depends on.
        run: the run directory.
        source: the model that it starts from.
        dense: the model whose outputs it aims at, if it is not the source.

    Attributes:
        folder: where the result lies.
        result: the result, once it is written.
        done: whether it is finished.
        before: the result of the pruned model that it starts from.
        model: the model whose blocks are rewritten, once `begin` was called.

    Raises:
        UserError: the stage was begun with other settings, or from other weights.
    """

    def __init__(
        self,
        name: str,
        recipe: dict,
        run: Run,
        source: ModelDirectory,
        dense: ModelDirectory | None = None,
    ):
        self.name, self.recipe, self.run, self._source = name, recipe, run, source
        self.folder, done = run.stage(name, recipe)
        self.result = ModelDirectory(self.folder)
        self.done = done is not None
        self.parts = self.folder / "blocks"
        self.before = run.world.decide(lambda: self._read_before(dense))
        self._inputs = {}
        for field, model in (("model", source), ("dense", dense)):
            self._inputs[field] = model.fingerprint if model and run.world.is_main else None
            self._refuse_other_inputs(field, f"the weights in {model} have")
        if self.done:
            if run.world.is_main:
                shutil.rmtree(self.parts, ignore_errors=True)  # if it was killed before it could
            run.console.say(f"{self.name}: done already, in {self.folder}")

    def _read_before(self, dense: ModelDirectory | None) -> Result | None:
        """The result of the model that the stage starts from; None if it is dense."""
        if dense is None:
            return read_result(self._source.path)
        return result_of(self._source.path, "given", self.recipe["model"])

    def begin(self, calibration: Calibration | None, dtype: torch.dtype | None = None) -> None:
        """Opens the model and looks for what is finished.

        It computes in `dtype`, by default as `BlockModel.open` says.

        Raises:
            UserError: it is other text than the finished blocks'.
        """
        reset_peak_memory()
        run = self.run
        self._calibration = calibration
        self.model = BlockModel.open(self._source, run.world.device, dtype)
        if run.world.is_main:
            if not (self.folder / "recipe.json").exists():
                # of a job that finished nothing: nobody knows with what settings
                shutil.rmtree(self.parts, ignore_errors=True)
            self.parts.mkdir(parents=True, exist_ok=True)
            for place in (self.folder, self.parts):
                for path in place.glob(".*.tmp"):  # what a killed writer left half-written
                    path.unlink()
            self._inputs["ids_sha256"] = calibration.digest if calibration else None
            self._refuse_other_inputs("ids_sha256", "the calibration text or tokenizer has")
            write_json(self.folder / INPUTS, self._inputs)
        run.world.barrier()
        self.writer = ShardWriter(self.folder, len(self.model))
        # The first rank's view counts, as for `done`. The clock goes on from its last block, and
        # so does the most memory: a job that only joins the parts needs next to none.
        self.finished: set[int]
        self.finished, spent, self._peaks = run.world.decide(self._finished)
        self._start = time.monotonic() - spent
        n_blocks = len(self.model)
        self.resumed_at = next((i for i in range(n_blocks) if i not in self.finished), n_blocks)
        if self.finished:
            run.console.say(f"{self.name}: going on at block {self.resumed_at + 1} of {n_blocks}")

    @contextmanager
    def work(self) -> Iterator[tuple]:
        """A bar over the blocks, and a scratch folder that vanishes."""
        with (
            tempfile.TemporaryDirectory(dir=self.run.path, prefix=".scratch-") as scratch,
            self.run.console.bar(self.name, len(self.model), "blocks") as bar,
        ):
            yield bar, Path(scratch)

    def load(self, i: int, block: nn.Module) -> None:
        """Gives `block` the weights of finished block i, as they were written."""
        stored = load_file(self.writer.path(i))
        prefix = self.model.block_name(i) + "."
        for name, parameter in block.named_parameters():
            parameter.data.copy_(stored[self.model.key(prefix + name)])

    def write(self, i: int, weights: dict[str, torch.Tensor], result: PrunedBlock) -> None:
        """Makes block i durable; the first one binds the stage to its recipe.

        Args:
            i: the block's number.
            weights: the parameters that have changed, by their name in the model.
            result: its masks and rows.
        """
        self.run.record(self.folder, self.recipe)
        tensors = self.model.checkpoint.read(self.model.block_keys(i))
        for name, weight in weights.items():
            key = self.model.key(name)
            tensors[key] = weight.to(tensors[key].dtype)
        self.writer.write(i, tensors)
        if result.masks:
            mask_files.save_masks(result.masks, self._mask_file(i))
        write_json(
            self._row_file(i),
            {
                "elapsed": round(time.monotonic() - self._start, 3),
                **peaks(),
                "files": digests(self.folder, self._files(i)),
                "rows": [asdict(r) for r in result.rows],
                **({"error": result.error} if result.error else {}),
            },
        )

    def report(self, i: int, result: PrunedBlock) -> None:
        """One row of the log, and the metrics."""
        head = f"block {i + 1:>3}/{len(self.model)}  {result.seconds:6.1f} s"
        if not result.rows and not result.error:
            self.run.console.say(f"{head}  left dense")
            return
        weights = sum(r.shape[0] * r.shape[1] for r in result.rows)
        sparsity = sum(r.zeros for r in result.rows) / max(1, weights)
        text = f"{head}  sparsity {sparsity:.4f}"
        values = {"sparsity": sparsity, "seconds": result.seconds, "blocks": len(self.model)}
        errors = {r.kind: r.error for r in result.rows if r.error is not None}
        if errors:
            mean = sum(errors.values()) / len(errors)
            worst = max(errors, key=errors.get)
            text += f"  error {mean:.4f} (worst {worst} {errors[worst]:.4f})"
            values["error"] = mean
        damping = {r.damping for r in result.rows if r.damping is not None}
        if damping:
            text += f"  damping {max(damping):g}"
            values["damping"] = max(damping)
        kept = [r.kept for r in result.rows if r.kept]
        if kept:
            text += "  kept " + ", ".join(f"{kept.count(k)} {k}" for k in dict.fromkeys(kept))
        if result.error:
            before, after = result.error["before"], result.error["after"]
            text += f"  error of the block {before:.4f} -> {after:.4f}"
            text += f" (epoch {result.error['epoch']} of {result.error['epochs']})"
            values |= {"error_before": before, "error_after": after}
        self.run.console.say(text)
        self.run.metric(self.name, i + 1, values)

    def finish(self, label: tuple[str, str], **facts) -> ModelDirectory:
        """Joins and verifies the model, writes `result.json` and `done.json`.

        Args:
            label: method and amount, for reports.
            facts: further entries of `done.json`.

        Raises:
            UserError: what lies on disk is not what was written.
        """
        run, world = self.run, self.run.world
        memory = max_peaks([self._peaks, *world.gather(peaks())])
        world.barrier()
        if world.is_main:
            self._join()
        seconds = time.monotonic() - self._start
        summary = {
            "seconds": round(seconds, 2),
            "resumed_at_block": self.resumed_at,
            **memory,
            "calibration": self._calibration.origin if self._calibration else None,
            **facts,
        }
        if world.is_main:
            reads = "calibration" in self.recipe
            finish_result(
                *(run, self.folder, self.name, label, self.recipe, self.before, summary),
                calibration=self._calibration.origin if reads else None,
                ids_sha256=self._inputs["ids_sha256"] if reads else None,
            )
        files = weights_and_masks(self.folder) if world.is_main else ()
        run.finish_stage(self.folder, summary, files)
        if world.is_main:
            shutil.rmtree(self.parts)
        peak = format_bytes(memory["peak_memory_bytes"])
        run.console.say(
            f"{self.name}: done in {format_duration(seconds)}, {peak} at most, in {self.folder}"
        )
        return self.result

    def _join(self) -> None:
        """Writes what lies outside the blocks, joins the parts, and verifies the whole."""
        model, n_blocks = self.model, len(self.model)
        inside = {key for i in range(n_blocks) for key in model.block_keys(i)}
        outside = [key for key in model.checkpoint.names() if key not in inside]
        # what the model uses was looked at; old files hold masks of -inf, which are no weights
        self.writer.write(None, model.checkpoint.read(outside, finite=False))
        self.writer.finish(self._source.path)
        mask_files.join(sorted(self.parts.glob("*.safetensors")), self.folder / mask_files.FILE)
        parts = [read_json(self._row_file(i), _record) for i in range(n_blocks)]
        rows = [Row(**r) for part in parts for r in part["rows"]]
        whole = self.result.verify(rows)
        blocks = [part["error"] for part in parts if "error" in part]
        name = self._source.path.name
        zeros, pruned = self.result.write_sparsity(name, rows, whole, blocks)
        if blocks:
            before, after = (sum(e[k] for e in blocks) / n_blocks for k in ("before", "after"))
            self.run.console.say(f"mean error of the blocks {before:.4f} -> {after:.4f}")
        else:
            self._table(rows)
        self.run.console.say(
            f"verified: {zeros:,} zeros in {pruned:,} pruned weights ({zeros / pruned:.2%}), "
            f"{whole[0] / whole[1]:.2%} of the whole model"
        )

    def _table(self, rows: list[Row]) -> None:
        """One line for each kind of matrix."""
        by_kind: dict[str, list[Row]] = {}
        for row in rows:
            by_kind.setdefault(row.kind, []).append(row)
        table = []
        for name, group in by_kind.items():
            weights = sum(r.shape[0] * r.shape[1] for r in group)
            errors = [r.error for r in group if r.error is not None]
            shapes = {"x".join(map(str, r.shape)) for r in group}
            table.append(
                [
                    name,
                    str(len(group)),
                    ", ".join(sorted(shapes)),
                    f"{sum(r.zeros for r in group) / weights:.4f}",
                    f"{sum(errors) / len(errors):.4f}" if errors else "-",
                    f"{max(errors):.4f}" if errors else "-",
                    f"{sum(r.seconds for r in group):.1f}",
                ]
            )
        columns = ["matrix", "count", "shape", "sparsity", "mean error", "worst", "solver s"]
        self.run.console.table("pruned matrices", columns, table)

    def _refuse_other_inputs(self, field: str, what: str) -> None:
        """Holds the calibration ids or the weights against those of what is finished."""
        path, now = self.folder / INPUTS, self._inputs[field]
        begun = path.exists() and (self.folder / "recipe.json").exists()
        was = read_json(path, lambda c: c.get(field, now)) if begun else now
        if now != was and (now or field == "ids_sha256"):  # weights may be gone when they are done
            raise UserError(
                f"{what} changed since {self.folder} was begun; bring back what it was, or choose "
                "another output_dir"
            )

    def _finished(self) -> tuple[set[int], float, dict]:
        """The blocks that are wholly there (the row file is written last), and what they took."""
        rows = {}
        for i in range(len(self.model)):
            if self.writer.path(i).exists() and self._row_file(i).exists():
                row = read_json(self._row_file(i), _record)
                if changed := verify_files(self.folder, row.get("files", {})):
                    self.run.console.say(f"{self.folder / changed}: block {i + 1} is made again")
                else:
                    rows[i] = row
        spent = max((row["elapsed"] for row in rows.values()), default=0.0)
        return set(rows), spent, max_peaks(rows.values())

    def _row_file(self, i: int) -> Path:
        return self.parts / f"{i:05d}.json"

    def _mask_file(self, i: int) -> Path:
        return self.parts / f"{i:05d}.safetensors"

    def _files(self, i: int) -> list[str]:
        """The files of block i by their names in the stage's folder."""
        paths = (self.writer.path(i), self._mask_file(i))
        return [str(path.relative_to(self.folder)) for path in paths if path.exists()]


def _record(content: dict) -> dict:
    """What the row file of a block holds, if it is whole."""
    for row in content["rows"]:
        Row(**row)
    return content | {"elapsed": float(content["elapsed"])}


def check_dense(preview: Preview) -> None:
    """Checks that `model.dense` is not the pruned model that a stage starts from.

    Raises:
        UserError: it is.
    """
    dense = preview.models.get("model.dense")
    mark = dense.fingerprint if dense and not preview.from_run else None
    if mark and mark == preview.start.fingerprint:
        raise UserError(
            f"model.dense {dense} is the model to start from; give the model that it was pruned "
            "from"
        )


def start_masks(start: ModelDirectory, run: Run) -> Masks:
    """The masks of the pruned model that a stage starts from; says so where they are its zeros.

    Raises:
        UserError: all matrices are dense, or weights and masks disagree.
    """
    masks = start.masks(run.world)
    masks.check()
    if not masks:
        raise UserError(
            f"{start} is not pruned: none of its matrices has a mask or {PRUNED:.0%} of zeros; "
            "let --stages begin with oneshot, or give a pruned model"
        )
    if masks.from_zeros:
        run.console.say(masks.description)
    return masks


def masks_of_block(model: BlockModel, i: int, masks: Masks) -> dict[str, torch.Tensor]:
    """The masks [R, C] of block i by the linears' names in it, on the model's device."""
    names = {n: model.weight_name(i, n) for n in model.linears(i)}
    return {n: masks[name].to(model.device) for n, name in names.items() if name in masks}

"""What a run will take: memory, disk, operations, a little on the safe side."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cap_llm.blockwise.sds import SGD_BATCH
from cap_llm.config import MODELS, Config
from cap_llm.models.blocks import BlockModel
from cap_llm.models.skeleton import LINEARS, matrix
from cap_llm.runtime.console import format_bytes
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.memory import Memory
from cap_llm.runtime.world import World
from cap_llm.solvers.redensify import STEPS as SGD_STEPS

RESERVE = 2**28  # bytes of disk for logs, masks' parts and file systems' own needs
WINDOWS = 160  # that are scored of a corpus unless said; about WikiText-2's of 2048 tokens


@dataclass
class Estimate:
    """What a run takes."""

    forwards: float
    """Floating-point operations in the models' type, of all ranks together."""
    solving: float
    """The same in fp32: of second moments and solvers."""
    dtype: torch.dtype
    """What the models compute in."""
    memory: int
    """Bytes a rank holds at most."""
    activations: int
    """Of these bytes."""
    disk: int
    """Bytes that are written, by all ranks."""


class _Sizes:
    """A model's matrices and weights.

    Attributes:
        blocks: the shapes [R, C] of each block's linears.
        linears: all of them.
        weights: entries of each block's linears.
        outside: entries of all that is no linear of a block.
        hidden: columns of a block's first linear.
        columns: the most that a linear has.
        largest: entries of the largest linear.
    """

    def __init__(self, model: BlockModel):
        self.blocks = [
            [matrix(m).shape for m in model.linears(i).values()] for i in range(len(model))
        ]
        self.linears = [shape for shapes in self.blocks for shape in shapes]
        self.weights = [sum(r * c for r, c in shapes) for shapes in self.blocks]
        self.outside = sum(p.numel() for p in model.model.parameters()) - sum(self.weights)
        self.hidden = max((c for shapes in self.blocks for _, c in shapes[:1]), default=0)
        self.columns = max((c for _, c in self.linears), default=0)
        self.largest = max((r * c for r, c in self.linears), default=0)


def estimate(
    model: BlockModel, n_bytes: int, made: list[str], config: Config, world: World
) -> Estimate:
    """What a run will take.

    Args:
        model: its shapes.
        n_bytes: the size of the model's files.
        made: the stages that rewrite it block by block.
        config: the run's settings.
        world: the ranks.
    """
    sizes = _Sizes(model)
    # on a card the stored type
    stored = round(n_bytes / (sizes.outside + sum(sizes.weights)))
    width = 2 if world.device.type == "cuda" and stored < 4 else 4
    # Two streams begin with an embedding each. Blocks are trained in fp32.
    two = "reconstruct" in made and config.reconstruct.inputs == "student"
    two = two or ("sds" in made and config.sds.data == "dense")
    loaded = (1 + two) * sizes.outside + 2 * max(sizes.weights)
    memory = (4 if "reconstruct" in made else width) * loaded
    memory += _working_memory(model, sizes, made, config, width)
    allowed = Memory.plan(world.device, config.runtime.activation_gib)
    kept, waiting = _activations(sizes, made, config, world, width)
    activations = min(kept + waiting, allowed.device)
    memory += activations
    if "evaluate" in config.stages and config.evaluate.tasks:  # the whole model at once
        memory = max(memory, width * (sizes.outside + sum(sizes.weights)))
    # of pinned memory torch takes powers of two
    disk = RESERVE + max(0, kept - allowed.device - allowed.host // 2) * world.size
    n_kept = len(made) if config.runtime.keep_intermediate else min(len(made), 2)
    disk += n_kept * (n_bytes + sum(sizes.weights) // 4)  # the masks twice, once in parts
    if "sds" in made and config.uses_calibration and config.sds.data == "redense":
        disk += width * sum(sizes.weights)  # what a resumed run sends text through
    forwards, solving = _operations(model, sizes, made, config)
    dtype = torch.bfloat16 if width == 2 else torch.float32
    return Estimate(forwards, solving, dtype, memory, activations, disk)


def _operations(
    model: BlockModel, sizes: _Sizes, made: list[str], config: Config
) -> tuple[float, float]:
    """Floating-point operations of the models' forwards, and of second moments and solvers."""
    passing = solving = 0.0
    if made and config.uses_calibration:
        n = config.calibration.sequences * config.calibration.length
        # walks of the text: one for oneshot, three more for OWL and its guard, two for sds
        walks = ("oneshot" in made) * (4 if config.oneshot.allocation == "owl" else 1)
        walks += 2 * ("sds" in made)
        forwards = walks
        if "reconstruct" in made:  # a backward counts twice
            forwards += 1 + 3 * config.reconstruct.epochs
        attention = 2 * config.calibration.length * sizes.hidden * len(model)
        passing += forwards * n * 2 * (sum(sizes.weights) + attention)
        solving += walks * n * 2 * sum(map(_second_moments, model.blocks))
        each = 2  # times R C^2, for each matrix
        if config.oneshot.refits or "sds" in made:
            each += 100
        if "sds" in made and config.sds.mode == "paper":
            each += 4 * SGD_STEPS * _sgd_batches(config)
        solving += each * sum(r * c * c for r, c in sizes.linears)
    if "evaluate" in config.stages and config.evaluate.corpora:
        n = _scored_tokens(config) * len(config.evaluate.corpora)
        n_models = len(set(config.stages) & set(MODELS)) + config.evaluate.dense or 1
        passing += n_models * n * 2 * (sizes.outside + sum(sizes.weights))
    return passing, solving


def _working_memory(
    model: BlockModel, sizes: _Sizes, made: list[str], config: Config, width: int
) -> int:
    """Bytes of solvers, training and logits, beside weights and activations."""
    work = 4 * 4 * sizes.largest if made else 0
    if made and config.uses_calibration:
        squares, copies = 3, 4  # fp32 matrices [C, C] and [R, C] that a solver holds at most
        if config.oneshot.method in ("alps", "admm_grad") or "sds" in made:
            squares, copies = 6 + ("sds" in made), 8  # sds: held-out moments, too
        if "sds" in made and config.sds.mode == "paper":
            squares += _sgd_batches(config)
        work = max(work, 4 * (squares * sizes.columns**2 + copies * sizes.largest))
        if "sds" in made:  # the dense block; sparse, dense and free weights in fp32
            work += (width + 3 * 4) * max(sizes.weights)
        if "reconstruct" in made:
            # gradients, Adam's two moments, the weights as trained and as best, the masks
            work += 6 * 4 * max(sizes.weights)
    if "evaluate" in config.stages and config.evaluate.corpora:
        vocabulary = model.model.config.get_text_config().vocab_size
        work = max(work, 2 * 4 * config.evaluate.window * vocabulary)
    return work


def _activations(
    sizes: _Sizes, made: list[str], config: Config, world: World, width: int
) -> tuple[int, int]:
    """Bytes of the hidden states that a rank keeps between blocks, and of the inputs of linears
    that wait until all micro-batches are there."""
    tokens, waiting = [], 0
    if made and config.uses_calibration:
        tokens.append(config.calibration.sequences * config.calibration.length)
    if "evaluate" in config.stages and config.evaluate.corpora:
        tokens.append(_scored_tokens(config))
    if not tokens:
        return 0, 0
    streams = [max(tokens) // world.size * width]
    for stage in made:  # a block is trained in fp32
        value = 4 if stage == "reconstruct" else width
        streams.append(_stream_tokens(stage, config, world) * value)
    if config.uses_calibration:
        n = config.calibration.sequences * config.calibration.length
        waiting = n // world.size * width * max(sum(map(sum, shapes)) for shapes in sizes.blocks)
    return sizes.hidden * max(streams), waiting


def _scored_tokens(config: Config) -> int:
    """Tokens of one corpus that are scored."""
    return (config.evaluate.max_windows or WINDOWS) * config.evaluate.window


def _sgd_batches(config: Config) -> int:
    """Batches of SDS' mode `paper`, each with second moments of its own."""
    return -(-config.calibration.sequences // SGD_BATCH)


def _stream_tokens(stage: str, config: Config, world: World) -> int:
    """Tokens whose hidden states a rank keeps between blocks, over all streams of a stage."""
    c = config.calibration
    every, share = (c.sequences + c.held_out) * c.length, c.sequences * c.length // world.size
    if stage == "reconstruct":
        dense = config.reconstruct.inputs == "dense"  # every rank needs all of the text
        return (4 if config.reconstruct.split_attention else 3) * (
            every if dense else every // world.size
        )
    if stage == "sds":
        return share * config.sds.redensify + every // world.size
    return share


def _second_moments(block: nn.Module) -> int:
    """Multiplications of one token's second moments, of a block's linears.

    Of the linears of one module the last one reads what the others made, which share their input:
    q, k and v one, o its own; gate and up one, down its own.
    """
    columns: dict[tuple, int] = {}
    for parent in block.modules():
        linears = [m for m in parent.children() if isinstance(m, LINEARS)]
        for m in linears:
            columns[parent, m is linears[-1]] = matrix(m).shape[1]
    return sum(c * c for c in columns.values())


def check_disk(needed: int, made: list[str], config: Config) -> None:
    """Refuses a run whose stages `made` write more than is free; what is there already counts.

    Raises:
        UserError: it does not fit.
    """
    place = Path(config.output_dir).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    folders = [Path(config.output_dir) / stage for stage in made]
    done = made and all((folder / "done.json").exists() for folder in folders)
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    written = sum(p.stat().st_size for p in files)
    if not done and needed - written > free:
        raise UserError(
            f"output_dir {config.output_dir} needs {format_bytes(needed - written)} of disk and "
            f"{format_bytes(free)} are free; free some or choose another output_dir"
        )

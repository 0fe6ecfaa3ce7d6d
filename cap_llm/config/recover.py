"""Settings of recovery training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from cap_llm.config.blockwise import OneshotConfig
from cap_llm.config.section import (
    AtLeast0,
    AtLeast1,
    AtLeast2,
    Place,
    Positive,
    Weight,
    section,
)
from cap_llm.runtime.errors import UserError
from cap_llm.sparsity.pattern import Pattern


@dataclass(frozen=True)
class Level:
    """One level of a gradual pruning schedule: a fraction of zeros, or an N:M pattern."""

    text: str
    sparsity: float

    @classmethod
    def parse(cls, text: str) -> Level:
        """Reads `0.5` or `2:4`.

        Raises:
            UserError: the text is neither.
        """
        if ":" in text:
            return cls(text, Pattern.parse(text).fixed_sparsity)
        try:
            sparsity = float(text)
        except ValueError:
            sparsity = 0.0
        if not 0 < sparsity < 1:
            raise UserError(
                f"recover.masks.schedule has the level {text!r}. "
                "Give fractions of zeros in (0, 1) or N:M patterns."
            )
        return cls(text, sparsity)

    def __str__(self) -> str:
        return self.text

    def apply(self, oneshot: OneshotConfig) -> OneshotConfig:
        """The one-shot settings that prune to this level, inside the mask of the level before."""
        pattern = self.text if ":" in self.text else oneshot.pattern
        if ":" not in self.text and ":" in pattern:
            pattern = "unstructured"
        sparsity = None if ":" in pattern else self.sparsity
        return dataclasses.replace(oneshot, pattern=pattern, sparsity=sparsity, initial_mask="auto")


@section("recover.optimizer")
class OptimizerConfig:
    """AdamW and how long it trains."""

    lr: Positive = 1e-4
    """Peak learning rate. It decays to a tenth by a cosine."""
    warmup: Annotated[float, Interval(ge=0, lt=1)] = 0.03
    """Warmup as a fraction of the steps, at least 5 steps (a quarter of fewer than 20). 0: none."""
    weight_decay: Weight = 0.0
    """Weight decay of AdamW."""
    clip: Weight = 1.0
    """Maximum norm of the gradient. 0: no limit."""
    batch: AtLeast1 = 16
    """Sequences per optimizer step, over all ranks."""
    tokens: AtLeast1 = 2_000_000
    """Tokens to train on, per level of a schedule."""
    seed: AtLeast0 = 0
    """Seed of packing, order, positions and sampling."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type of the models. Master weights are float32. auto: float32 on CPUs, bfloat16 on
    GPUs."""


@section("recover.masks")
class MasksConfig:
    """What happens to the masks during training. Without a schedule they are fixed."""

    schedule: str = ""
    """Gradual pruning schedule: levels to prune to before each training, such as "0.3, 0.4, 0.5" or
    "3:4, 2:4". Empty: train the model as it is."""

    @property
    def levels(self) -> list[Level]:
        """The levels of the schedule, in order.

        Raises:
            UserError: a level is neither a fraction of zeros nor N:M.
        """
        return [Level.parse(text.strip()) for text in self.schedule.split(",") if text.strip()]

    def __post_init__(self):
        for before, level in zip(self.levels, self.levels[1:], strict=False):
            if level.sparsity <= before.sparsity:
                raise UserError(
                    f"recover.masks.schedule goes from {before} to {level}. Masks only grow: each "
                    "level must be sparser than the one before."
                )


@section("recover.objective")
class ObjectiveConfig:
    """The loss of recovery: a weighted sum. A weight of 0 switches a term off."""

    ce: Weight = 0.5
    """Cross-entropy of the next token."""
    kl: Weight = 0.5
    """KL divergence from the dense model's next-token distribution."""
    temperature: Positive = 1.0
    """Temperature of both distributions. The term is multiplied by its square."""
    feature: Weight = 0.0
    """SquareHead: relative squared error of each block's output against the dense model's."""
    prc: Weight = 0.0
    """Contrast with the pre-trained (dense) model. CAP uses 0.1; in our tests it raised
    perplexity."""
    snc: Weight = 0.0
    """Contrast with snapshots of the student at earlier levels, divided by their number. CAP uses
    0.1; in our tests it gained nothing."""
    fic: Weight = 0.1
    """Contrast with a fine-tuned model (recover.finetuned). Off without one."""

    TERMS = ("ce", "kl", "feature", "prc", "snc", "fic")


@section("recover.contrast")
class ContrastConfig:
    """The units of the contrasts, their negatives, and the loss on them."""

    segments: AtLeast0 = 8
    """Units per sequence that are means over equal parts of it. 0: none."""
    token_positions: AtLeast0 = 64
    """Units per sequence that are single tokens, at positions sampled once. 0: none."""
    segment_weight: Weight = 1.0
    """Weight of the segments' mean loss."""
    token_weight: Weight = 1.0
    """Weight of the tokens' mean loss."""
    segment_temperature: Positive = 0.1
    """Softmax temperature of the segments."""
    token_temperature: Positive = 0.07
    """Softmax temperature of the tokens."""
    supervised: Weight = 0.1
    """Weight of the supervised part, whose positives share the next token."""
    n_unlabeled_frequent: AtLeast0 = 200
    """The N most frequent tokens are not used as labels of the supervised part."""
    extra_negatives: AtLeast0 = 32
    """Sequences of the bank whose units are additional negatives, sampled per micro-batch."""
    dim: AtLeast2 = 256
    """Dimensions after the random projection."""
    bank_gib: Weight = 16.0
    """Maximum disk space of one bank, in GiB."""
    snapshots: AtLeast1 = 4
    """Maximum number of snapshots: those of the latest levels."""

    def __post_init__(self):
        if not self.segments * self.segment_weight + self.token_positions * self.token_weight:
            raise UserError(
                "recover.contrast has no units: segments and token_positions are both 0 or have "
                "weight 0. Set one above 0, or set recover.objective.prc, snc and fic to 0."
            )


@section("recover.engine", identity=False)
class EngineConfig:
    """How DeepSpeed runs the models. Results stay the same up to rounding."""

    deepspeed: Place = "zero2"
    """zero0, zero1, zero2, zero3, zero3_offload, cpu (ZeRO-2 with small buckets, for CPU ranks), or
    a DeepSpeed JSON file."""
    teacher_deepspeed: Place = "auto"
    """Settings of the teacher, used under ZeRO-3 only: auto (sharded if the student is),
    teacher_zero3, teacher_zero3_offload, or a file."""
    micro_batch: AtLeast1 = 1
    """Sequences that a rank processes at once. Contrasts sample negatives per micro-batch of all
    ranks, so with a contrast, ranks x micro_batch is part of the result."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""


@section("recover.checkpoint", identity=False)
class CheckpointConfig:
    """Checkpoints of the training."""

    resume: bool | Place = "auto"
    """auto: from the last complete checkpoint if there is one; true: require one; false: start the
    level over; or the folder of a checkpoint. DeepSpeed checkpoints are pickles, which can execute
    code: only name folders that you trust."""
    every: AtLeast1 = 200
    """Steps between checkpoints."""
    keep: AtLeast1 = 2
    """Complete checkpoints to keep."""


@section("recover.log", identity=False)
class LogConfig:
    """How the training is watched."""

    evaluate_every: AtLeast1 = 100
    """Steps between evaluations of the held-out perplexity."""
    max_ppl_ratio: Annotated[float, Gt(1)] | None = None
    """Stop a schedule with an error after a level whose held-out perplexity is more than this many
    times the dense model's."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the package tensorboard)."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (needs the package wandb)."""


@section("recover")
class RecoverConfig:
    """Training of the pruned model toward the dense one, with its zeros kept."""

    teacher: Place | None = None
    """Model to learn from, with the same vocabulary (directory or hub name), for example a larger
    one. Default: the dense model."""
    finetuned: Place | None = None
    """Fine-tuned model of the same width for FiC: a directory, a hub name, or `train`, which first
    trains the dense model on the recovery text."""
    corpus: Place = "c4"
    """Text to train on: c4, wikitext2, ptb, or a file."""
    length: Annotated[int, Ge(8)] = 1024
    """Tokens per sequence."""
    sequences: AtLeast1 | None = None
    """Distinct sequences to train on. Default: enough for the tokens of all levels. Each level
    continues in the text where the one before it ended."""
    held_out: AtLeast1 = 16
    """Held-out sequences from other documents of the corpus, never trained on."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the saved weights. Default: that of the model's own files."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    masks: MasksConfig = field(default_factory=MasksConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    # The states of the first positions are attention sinks, unlike all others: contrasts skip them.
    SKIP = 4

    def __post_init__(self):
        if self.optimizer.tokens < self.optimizer.batch * self.length:
            raise UserError(
                f"recover.optimizer.tokens is {self.optimizer.tokens}, less than one step of "
                f"{self.optimizer.batch} x {self.length} tokens. Raise it, or lower "
                "recover.optimizer.batch or recover.length."
            )
        o = self.objective
        if not (o.ce or o.kl or o.feature or o.prc or (o.fic and self.finetuned)):
            raise UserError(
                "recover.objective: every term has weight 0 or lacks its input (snc needs an "
                "earlier level, fic needs recover.finetuned). Set another weight, such as kl."
            )
        if self.contrasts and self.contrast.segments * (self.SKIP + 1) > self.length:
            raise UserError(
                f"recover.contrast.segments is {self.contrast.segments}, too many for sequences of "
                f"{self.length} tokens whose first {self.SKIP} are skipped. Lower it."
            )
        n_positions = self.length - self.SKIP - 1
        if self.contrasts and self.contrast.token_positions > n_positions:
            raise UserError(
                f"recover.contrast.token_positions is {self.contrast.token_positions}, but a "
                f"sequence of {self.length} tokens has {n_positions}. Lower it."
            )

    @property
    def levels(self) -> list[Level]:
        """The levels of the schedule; empty without one."""
        return self.masks.levels

    @property
    def steps(self) -> int:
        """Optimizer steps per level."""
        return self.optimizer.tokens // (self.optimizer.batch * self.length)

    @property
    def examples(self) -> int:
        """Sequences that all levels train on, counting repeats."""
        return self.steps * self.optimizer.batch * max(1, len(self.levels))

    @property
    def n_sequences(self) -> int:
        """Distinct sequences to read."""
        return self.sequences or self.examples

    @property
    def contrasts(self) -> bool:
        """Whether any contrast is on, at any level."""
        o = self.objective
        return bool(o.prc or (o.snc and self.levels) or (o.fic and self.finetuned))

    def check_first_level(self, start: object, sparsity: float) -> None:
        """Checks that the schedule begins above the sparsity of the model it starts from.

        Raises:
            UserError: it does not.
        """
        if self.levels and self.levels[0].sparsity <= sparsity + 1e-6:
            raise UserError(
                f"recover.masks.schedule begins with {self.levels[0]}, but {start} is already "
                f"{100 * sparsity:.1f}% sparse, and masks only grow. Begin above that."
            )

    def accumulation(self, ranks: int) -> int:
        """Micro-batches per optimizer step.

        Raises:
            UserError: the batch is not a multiple of ranks x micro_batch.
        """
        batch, micro_batch = self.optimizer.batch, self.engine.micro_batch
        if batch % (ranks * micro_batch):
            raise UserError(
                f"recover.optimizer.batch is {batch}, not a multiple of {ranks} ranks x "
                f"micro_batch {micro_batch}. Change recover.optimizer.batch or "
                "recover.engine.micro_batch."
            )
        return batch // (ranks * micro_batch)

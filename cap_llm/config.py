"""The settings of a run: nested, documented, checked dataclasses.

A YAML file (a recipe) is the source of truth; `--section.field VALUE` overrides it. Defaults, help
texts and the option table of the README all come from here. Each field's type holds its range;
what only several fields can tell is refused in `__post_init__`, before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import filecmp
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from cap_llm.runtime.errors import UserError
from cap_llm.runtime.sections import (
    AtLeast0,
    AtLeast1,
    AtLeast2,
    Place,
    Positive,
    Share,
    Weight,
    section,
)
from cap_llm.sparsity.pattern import Pattern


@section("model")
class ModelConfig:
    """The dense model."""

    path: Place = ""
    """A model directory, or a name on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: Place | None = None
    """Directory, hub name or `tokenizer.model` file, where the model brings no tokenizer."""
    dense: Place | None = None
    """The dense model (directory or hub name), where `path` is one pruned elsewhere."""


@section("calibration")
class CalibrationConfig:
    """The text that shows the solvers what the inputs of each matrix look like."""

    corpus: Place = "c4"
    """c4, wikitext2, ptb, or a file: .txt or .jsonl (field `text`), also as .gz, or .parquet."""
    sequences: AtLeast1 = 128
    """Number of sequences, drawn as in SparseGPT and Wanda."""
    length: AtLeast2 = 2048
    """Tokens a sequence."""
    seed: AtLeast0 = 0
    """Seed of the draw."""
    held_out: AtLeast0 = 16
    """Further sequences, of other documents, by which sds and reconstruct judge what they made; 0:
    they take their last result."""
    allow_scored_corpus: bool = False
    """Allow a calibration corpus that `evaluate` scores too. Its perplexity then flatters."""


@section("oneshot.owl")
class OwlConfig:
    """OWL: blocks with many outlying activations keep more weights (Yin et al. 2024)."""

    strength: Annotated[float, Interval(gt=0, lt=0.5)] = 0.08
    """Half of the range that the blocks' sparsities span (the paper's lambda)."""
    threshold: Annotated[float, Gt(1)] = 5.0
    """A score this many times the block's mean is an outlier (the paper's M)."""
    guard_sequences: AtLeast0 = 16
    """Calibration sequences, held out, on which OWL must beat uniform to be used; 0: no test."""


@section("oneshot")
class OneshotConfig:
    """One-shot pruning, block by block."""

    method: Literal["magnitude", "wanda", "sparsegpt", "admm_grad", "alps"] = "sparsegpt"
    """How weights are chosen; sparsegpt, admm_grad and alps also move the ones that stay, and alps
    ends with the refit."""
    pattern: str = "unstructured"
    """unstructured (wanda: by row), row (equal sparsity in each output row), or N:M: keep N of M
    inputs."""
    sparsity: Share | None = None
    """Share of zeros, in (0, 1). Default 0.5; an N:M pattern fixes it."""
    refit: bool = False
    """Then re-solve the weights that stay by least squares on the same mask (alps always does)."""
    damping: Share = 0.01
    """Ridge on the Hessian, as a share of its mean diagonal; raised tenfold where it fails."""
    block_size: AtLeast1 = 128
    """SparseGPT: columns between two choices of the mask; N:M rounds it to a multiple of M."""
    budget: Literal["uniform", "owl"] = "uniform"
    """How the sparsity is spread over the blocks."""
    owl: OwlConfig = field(default_factory=OwlConfig)
    layers: dict[str, Annotated[float, Interval(ge=0, lt=1)]] = field(default_factory=dict)
    """Sparsity by hand: {"*.down_proj": 0.4, "model.layers.0.*": 0}; 0 leaves a layer dense."""
    earlier_mask: Literal["auto", "zeros", "ignore"] = "auto"
    """Prune inside an earlier mask: auto reads the masks beside the model if there are any, zeros
    takes the zeros of its weights as the mask."""

    def __post_init__(self):
        pattern = Pattern.parse(self.pattern)
        if pattern.m and self.sparsity not in (None, pattern.fixed_sparsity):
            raise UserError(
                f"oneshot.sparsity is {self.sparsity:g} but the pattern {self.pattern} fixes it at "
                f"{pattern.fixed_sparsity:g}; leave sparsity out"
            )
        if self.budget == "owl" and pattern.fixed_sparsity is not None:
            raise UserError(
                f"oneshot.budget owl spreads sparsity unevenly, which {self.pattern} does not "
                "allow; use budget uniform or an unstructured pattern"
            )
        for name, sparsity in self.layers.items():
            if sparsity and pattern.fixed_sparsity not in (None, sparsity):
                raise UserError(
                    f"oneshot.layers gives {name!r} the sparsity {sparsity:g} but the pattern "
                    f"{self.pattern} fixes it at {pattern.fixed_sparsity:g}; use 0 or leave it out"
                )

    @property
    def amount(self) -> float:
        """Share of zeros that is asked for, whatever the pattern."""
        fixed = Pattern.parse(self.pattern).fixed_sparsity
        return fixed if fixed is not None else 0.5 if self.sparsity is None else self.sparsity

    @property
    def uses_calibration(self) -> bool:
        """Whether the method reads text; magnitude alone does not."""
        return self.method != "magnitude" or self.refit or self.budget == "owl"

    @property
    def refits(self) -> bool:
        """Whether the weights that stay are re-solved by least squares in the end."""
        return self.refit or self.method == "alps"

    @property
    def second_order(self) -> bool:
        """Whether the Hessian is factorised."""
        return self.refits or self.method in ("sparsegpt", "admm_grad")


@section("sds")
class SdsConfig:
    """Sparse-Dense-Sparse: the pruned model is made dense again, more prunable, and pruned again by
    `oneshot`'s method (Li et al. 2025)."""

    mode: Literal["gram", "paper"] = "gram"
    """gram: solved to the end on second moments. paper: 200 passes of SGD at a rate of 0.1
    (lower where that diverges), our reading of the paper, which names no optimiser; slow."""
    data: Literal["dense", "sparse", "redense"] = "sparse"
    """Whose activations re-densification sees: the dense model's, the pruned one's, or those of the
    model as re-densified so far."""
    redensify: bool = True
    """The dense step; off, only the adjustment is left, as a control."""
    adjust: bool = True
    """After pruning again, move weights and mask towards the dense weights."""
    mu: Weight = 0.1
    """gram: pull towards the pruned weights; inputs are scaled to unit energy."""
    l1: Weight | None = None
    """Weight of the L1 norm. Default: 0.02 (gram), 0.1 (paper, of the mean |W|)."""
    l2: Weight | None = None
    """Weight of the squared L2 norm. Default: 0.01 (gram), 0.1 (paper, of the mean square)."""

    def __post_init__(self):
        if not (self.redensify or self.adjust):
            raise UserError("sds.redensify and sds.adjust are both off; nothing is left to do")

    @property
    def regularisers(self) -> tuple[float, float]:
        """The weights of the L1 and of the squared L2 norm."""
        l1, l2 = (0.02, 0.01) if self.mode == "gram" else (0.1, 0.1)
        return l1 if self.l1 is None else self.l1, l2 if self.l2 is None else self.l2


@section("reconstruct")
class ReconstructConfig:
    """Block reconstruction: the weights that stay are trained, a block at a time, to give the dense
    block's output (Shin et al. 2024)."""

    inputs: Literal["dense", "student"] = "student"
    """What a block reads while it is trained: what the blocks reconstructed before it give, or the
    dense model's activations, so that blocks are independent and ranks take them in turn."""
    epochs: AtLeast1 = 2
    """Passes over the calibration text, at most: two without a gain on held-out text end it."""
    lr: Positive = 0.01
    """Adam's learning rate as a share of each tensor's root mean square; after a warm-up over the
    first tenth of the steps it falls linearly to 0."""
    batch: AtLeast1 = 2
    """Sequences a step; with student inputs no more ranks than these have work. For n times as many
    raise `lr` by the root of n."""
    halves: bool = False
    """Train the attention and the rest of a block one after the other."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What matrices are multiplied in (autocast); weights and errors are fp32. auto: float32 on
    CPUs, else bfloat16."""
    seed: AtLeast0 = 0
    """Seed of the order of sequences."""


@section("recover.objective")
class ObjectiveConfig:
    """What recovery minimises: a weighted sum. A weight of 0 switches a term off."""

    ce: Weight = 0.5
    """Cross-entropy of the next token."""
    kl: Weight = 0.5
    """Divergence from the dense model's next-token distribution."""
    temperature: Positive = 1.0
    """Of the two distributions; the term is scaled by its square."""
    feature: Weight = 0.0
    """SquareHead: relative squared error of each block's output against the dense model's."""
    prc: Weight = 0.0
    """Contrast with the pre-trained (dense) model; CAP's is 0.1. Measured, it cost perplexity."""
    snc: Weight = 0.0
    """Contrast with the student's own snapshots of earlier rungs, divided by their number; CAP's is
    0.1. Measured, it gained nothing."""
    fic: Weight = 0.1
    """Contrast with a fine-tuned model (recover.finetuned); off without one."""

    TERMS = ("ce", "kl", "feature", "prc", "snc", "fic")


@section("recover.contrast")
class ContrastConfig:
    """The units of the contrasts, their candidates, and the loss on them."""

    segments: AtLeast0 = 8
    """Units a sequence that are means over equal parts of it; 0: none."""
    token_positions: AtLeast0 = 64
    """Units a sequence that are single tokens, at positions drawn once; 0: none."""
    segment_weight: Weight = 1.0
    """Of the segments' mean in a contrast; the tokens' is added to it."""
    token_weight: Weight = 1.0
    """Of the tokens' mean in a contrast."""
    segment_temperature: Positive = 0.1
    """Of the softmax over a segment's candidates."""
    token_temperature: Positive = 0.07
    """Of the softmax over a token's candidates."""
    supervised: Weight = 0.1
    """Weight, within a contrast, of the part whose positives have the same next token."""
    frequent_ids: AtLeast0 = 200
    """The most frequent ids of the text are no labels."""
    extra_sequences: AtLeast0 = 32
    """Further sequences of the bank whose units are candidates, drawn anew each micro-batch."""
    dim: AtLeast2 = 256
    """Dimensions after the random projection."""
    bank_gib: Weight = 16.0
    """Most disk that one bank may take, in GiB."""
    snapshots: AtLeast1 = 4
    """Most snapshots that are kept: the latest rungs."""

    def __post_init__(self):
        if not self.segments * self.segment_weight + self.token_positions * self.token_weight:
            raise UserError(
                "recover.contrast has neither segments nor token_positions with a weight; give "
                "one, or set the weights recover.objective.prc, snc and fic to 0"
            )


@section("recover")
class RecoverConfig:
    """Training of the pruned model towards the dense one, its zeros kept."""

    teacher: Place | None = None
    """Another model to learn from, of the same vocabulary (directory or hub name), a larger one,
    say. Default: the dense model."""
    finetuned: Place | None = None
    """A fine-tuned model of the same width for FiC: a directory, a hub name, or `train`, which
    first trains the dense model on the recovery text."""
    corpus: Place = "c4"
    """Text to train on: c4, wikitext2, ptb, or a file."""
    length: Annotated[int, Ge(8)] = 1024
    """Tokens a sequence."""
    sequences: AtLeast1 | None = None
    """Distinct sequences to train on. Default: as many as the tokens of all rungs fill; a rung goes
    on in the text where the one before it ended."""
    held_out: AtLeast1 = 16
    """Sequences of other documents of the corpus, never trained on, for the gate and the curve."""
    tokens: AtLeast1 = 2_000_000
    """Tokens to train on, each rung."""
    batch: AtLeast1 = 16
    """Sequences a step, over all ranks."""
    micro_batch: AtLeast1 = 1
    """Sequences a rank passes at once. Contrasts find their candidates in one micro-batch of all
    ranks, so ranks x micro_batch is part of what a run is where a contrast is on."""
    ladder: str = ""
    """Rungs to prune to before each training: "0.3, 0.4, 0.5" or "3:4, 2:4". Empty: train the model
    as it is."""
    gate: Annotated[float, Gt(1)] | None = None
    """The ladder ends with an error at a rung whose held-out perplexity, after training, is more
    than this many times the dense model's."""
    lr: Positive = 1e-4
    """Peak learning rate."""
    warmup: Annotated[float, Interval(ge=0, lt=1)] = 0.03
    """Share of a rung's steps until it is reached, and at least 5 of them (a quarter where there
    are fewer than 20), unless 0; then it falls to a tenth by a cosine."""
    weight_decay: Weight = 0.0
    """AdamW's."""
    clip: Weight = 1.0
    """Largest norm of the gradient; 0: no limit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the models compute in; master weights are fp32. auto: float32 on CPUs, else bfloat16."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type that the recovered weights are stored in. Default: that of the model's own files."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    seed: AtLeast0 = 0
    """Seed of packing, order, positions and draws."""
    deepspeed: Place = "zero2"
    """zero0, zero1, zero2, zero3, zero3_offload, cpu (ZeRO-2 in small buckets, for ranks on CPUs),
    or a DeepSpeed JSON file."""
    teacher_deepspeed: Place = "auto"
    """The teacher's, which has any under ZeRO-3 only: auto (sharded if the student is),
    teacher_zero3, teacher_zero3_offload, or a file."""
    resume: bool | Place = "auto"
    """auto: from the last complete checkpoint if there is one; true: there must be one; false:
    train this rung from its start; or a checkpoint's folder. DeepSpeed's checkpoints are pickles,
    which run code when they are loaded: name only a folder that you trust."""
    checkpoint_steps: AtLeast1 = 200
    """Steps between two checkpoints."""
    keep_checkpoints: AtLeast1 = 2
    """Complete checkpoints that are kept."""
    evaluate_steps: AtLeast1 = 100
    """Steps between two measurements of the held-out perplexity."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the package tensorboard)."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (needs the package wandb)."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)

    # What a model sees of its first positions is unlike all others: attention sinks. `length` has
    # twice as many at least.
    SKIP = 4

    def __post_init__(self):
        if self.tokens < self.batch * self.length:
            raise UserError(
                f"recover.tokens is {self.tokens}, less than one step of {self.batch} x "
                f"{self.length} tokens; raise it, or lower batch or length"
            )
        o = self.objective
        if not (o.ce or o.kl or o.feature or o.prc or (o.fic and self.finetuned)):
            raise UserError(
                "recover.objective has nothing to train towards: snc needs a rung before, fic a "
                "model in recover.finetuned; give another weight above 0, such as kl"
            )
        for before, rung in zip(self.rungs, self.rungs[1:], strict=False):
            if rung.sparsity <= before.sparsity:
                raise UserError(
                    f"recover.ladder goes from {before} to {rung}; masks only grow: each rung must "
                    "be sparser than the one before"
                )
        if self.contrasts and self.contrast.segments * (self.SKIP + 1) > self.length:
            raise UserError(
                f"recover.contrast.segments is {self.contrast.segments}, too many for sequences of "
                f"{self.length} tokens, whose first {self.SKIP} are left out; lower it"
            )
        most = self.length - self.SKIP - 1
        if self.contrasts and self.contrast.token_positions > most:
            raise UserError(
                f"recover.contrast.token_positions is {self.contrast.token_positions}, but a "
                f"sequence of {self.length} tokens has {most}; lower it"
            )

    @property
    def rungs(self) -> list[Rung]:
        """The ladder's rungs.

        Raises:
            UserError: one is neither a share of zeros nor N:M.
        """
        return [Rung.parse(text.strip()) for text in self.ladder.split(",") if text.strip()]

    @property
    def steps(self) -> int:
        """Optimizer steps of a rung."""
        return self.tokens // (self.batch * self.length)

    @property
    def passed(self) -> int:
        """Sequences that all rungs train on, each as often as it is passed."""
        return self.steps * self.batch * max(1, len(self.rungs))

    @property
    def n_sequences(self) -> int:
        """Distinct sequences that are asked for."""
        return self.sequences or self.passed

    @property
    def contrasts(self) -> bool:
        """Whether any contrast is on, on some rung."""
        o = self.objective
        return bool(o.prc or (o.snc and self.rungs) or (o.fic and self.finetuned))

    def accumulation(self, ranks: int) -> int:
        """Micro-batches of a step.

        Raises:
            UserError: micro-batches and ranks do not make the batch.
        """
        at_once = ranks * self.micro_batch
        if self.batch % at_once:
            raise UserError(
                f"recover.batch is {self.batch}, no multiple of {ranks} ranks x micro_batch "
                f"{self.micro_batch}; change --recover.batch or --recover.micro_batch"
            )
        return self.batch // at_once


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: a share of zeros, or an N:M pattern."""

    text: str
    sparsity: float

    @classmethod
    def parse(cls, text: str) -> Rung:
        """Reads `0.5` or `2:4`.

        Raises:
            UserError: it is neither.
        """
        if ":" in text:
            return cls(text, Pattern.parse(text).fixed_sparsity)
        try:
            sparsity = float(text)
        except ValueError:
            sparsity = 0.0
        if not 0 < sparsity < 1:
            raise UserError(
                f"recover.ladder has the rung {text!r}; give a share of zeros in (0, 1) or N:M"
            )
        return cls(text, sparsity)

    def __str__(self) -> str:
        return self.text

    def apply(self, oneshot: OneshotConfig) -> OneshotConfig:
        """The one-shot settings that prune to this rung, inside the earlier mask."""
        pattern = self.text if ":" in self.text else oneshot.pattern
        if ":" not in self.text and ":" in pattern:
            pattern = "unstructured"
        sparsity = None if ":" in pattern else self.sparsity
        return dataclasses.replace(oneshot, pattern=pattern, sparsity=sparsity, earlier_mask="auto")


@section("evaluate")
class EvaluateConfig:
    """Perplexity as the papers measure it (rows joined, one BOS, non-overlapping windows), and
    zero-shot scores by lm-eval."""

    corpora: list[Place] = field(default_factory=lambda: ["wikitext2"])
    """wikitext2, c4, ptb, or files."""
    window: AtLeast2 = 2048
    """Tokens a window; figures of different windows do not compare."""
    max_windows: AtLeast1 | None = None
    """Score only the first windows of each corpus."""
    tasks: list[Place] = field(default_factory=list)
    """Zero-shot tasks: wanda, sds (the papers' sets), tasks of lm-eval, or its task files."""
    task_data: Place | None = None
    """Folder of the tasks' rows (see README). Default: `zeroshot` in CAP_LLM_DATA; what is not
    there comes from the hub."""
    limit: AtLeast1 | None = None
    """Score only the first items of each task."""
    batch_size: AtLeast1 = 8
    """Requests a batch of a task; a batch is padded to its longest."""
    dense: bool = True
    """Score the dense model too."""


@section("runtime")
class RuntimeConfig:
    """Where and how the work is done; nothing here changes a result beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda."""
    activation_gib: Weight | None = None
    """Memory for activations, in GiB (2^30 bytes) a rank; what does not fit is computed again or
    goes to disk. Default: half of what is free when the work starts."""
    keep_intermediate: bool = True
    """Keep the weights of a stage when the next one is done, and recover's banks. Off, they are
    scored and dropped then, so that a pipeline never holds more than two pruned models; a ladder
    holds those of its rungs until it ends."""


STAGES = ("oneshot", "sds", "reconstruct", "recover", "evaluate")
MODELS = STAGES[:-1]  # the stages that make a model

# Settings of recover that change how it is computed or watched, not what it gives beyond rounding.
_NOT_OF_THE_RESULT = (
    "micro_batch",
    "gate",
    "gradient_checkpointing",
    "deepspeed",
    "teacher_deepspeed",
    "resume",
    "checkpoint_steps",
    "keep_checkpoints",
    "evaluate_steps",
    "tensorboard",
    "wandb",
)


@section("")
class Config:
    """A pipeline over one model."""

    output_dir: Place = ""
    """The run directory. The same command goes on where an earlier one stopped."""
    name: str = ""
    """What the report calls this run. Default: what was done, as in "SparseGPT 50 % + recovery"."""
    stages: list[Literal["oneshot", "sds", "reconstruct", "recover", "evaluate"]] = field(
        default_factory=lambda: ["oneshot", "evaluate"]
    )
    """What is done, in this order: oneshot, sds, reconstruct, recover, evaluate. What the run
    directory already holds of an earlier stage is where the next one starts."""
    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    oneshot: OneshotConfig = field(default_factory=OneshotConfig)
    sds: SdsConfig = field(default_factory=SdsConfig)
    reconstruct: ReconstructConfig = field(default_factory=ReconstructConfig)
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def check(self, makes_run: bool = True) -> None:
        """What only the whole can tell; a dry run makes no run, and needs no directory.

        Raises:
            UserError: something is missing or contradicts something else.
        """
        if not self.model.path:
            raise UserError("no model: give --model.path DIRECTORY_OR_HUB_NAME")
        if makes_run and not self.output_dir:
            raise UserError("no run directory: give --output_dir DIRECTORY")
        if not self.stages:
            raise UserError(f"stages is empty; name some of {', '.join(STAGES)}")
        if self.stages != [s for s in STAGES if s in self.stages]:
            raise UserError(
                f"stages is [{', '.join(self.stages)}]; name some of {', '.join(STAGES)}, each "
                "once and in this order"
            )
        if "evaluate" in self.stages and not (self.evaluate.corpora or self.evaluate.tasks):
            raise UserError(
                "evaluate.corpora is empty, and so is evaluate.tasks; name a corpus or a task, or "
                "leave evaluate out"
            )
        if "recover" in self.stages and (rungs := self.recover.rungs):
            for rung in rungs:
                rung.apply(self.oneshot)  # refused now, not after the rungs before it
            o = self.oneshot
            if "oneshot" in self.stages and not o.layers and rungs[0].sparsity <= o.amount:
                raise UserError(
                    f"recover.ladder begins with {rungs[0]}, and oneshot prunes to {o.amount:g} "
                    "before it; masks only grow: begin above that, or leave oneshot out of stages"
                )
        names = [Path(name).name for name in self.evaluate.corpora]
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"evaluate.corpora has two files called {name}, which results could not tell "
                    "apart; rename one"
                )
        if "evaluate" in self.stages:
            # C4's training and validation documents differ: to calibrate on the one and score the
            # other is the papers' own protocol. WikiText-2's splits share their style and topics.
            scored = [name for name in self.evaluate.corpora if name != "c4"]
            for option, corpus, remedy in self.not_to_be_scored:
                if any(same_text(corpus, name) for name in scored):
                    raise UserError(
                        f"{option} {corpus!r} is also scored by evaluate: choose another text"
                        f"{remedy}"
                    )

    @property
    def not_to_be_scored(self) -> list[tuple[str, str, str]]:
        """The texts that a model is made with: the option, the corpus, and a further remedy."""
        texts = []
        if self.uses_calibration and not self.calibration.allow_scored_corpus:
            remedy = ", or set --calibration.allow_scored_corpus true"
            texts.append(("calibration.corpus", self.calibration.corpus, remedy))
        if "recover" in self.stages:
            texts.append(("recover.corpus", self.recover.corpus, ""))
        return texts

    @property
    def uses_calibration(self) -> bool:
        """Whether any stage reads the calibration text."""
        prunes = "oneshot" in self.stages or ("recover" in self.stages and self.recover.ladder)
        return self.holds_out or bool(prunes and self.oneshot.uses_calibration)

    @property
    def holds_out(self) -> bool:
        """Whether any stage judges its work on held-out calibration sequences."""
        return "sds" in self.stages or "reconstruct" in self.stages

    def start(self, stage: str) -> str | None:
        """The stage whose model `stage` starts from, done or to be done; None: the model itself."""
        for earlier in reversed(MODELS[: MODELS.index(stage)]):
            done = Path(self.output_dir) / earlier / "done.json"
            if earlier in self.stages or done.exists():
                return earlier
        return None

    def recipe(self, stage: str) -> dict:
        """All settings that the result of a stage depends on."""
        settings = {"model": dataclasses.asdict(self.model)}
        if stage in ("dense", "given"):
            return settings
        prunes = stage in ("oneshot", "sds") or (stage == "recover" and self.recover.ladder)
        holds_out = stage in ("sds", "reconstruct")
        if prunes:
            settings["oneshot"] = dataclasses.asdict(self.oneshot)
            settings["oneshot"]["sparsity"] = self.oneshot.amount
        if holds_out or (prunes and self.oneshot.uses_calibration):
            settings["calibration"] = dataclasses.asdict(self.calibration)
            del settings["calibration"]["allow_scored_corpus"]
            if not holds_out:
                del settings["calibration"]["held_out"]
        if stage in MODELS[1:]:
            settings[stage] = dataclasses.asdict(getattr(self, stage))
            settings["start"] = self.start(stage)
        if stage == "recover":
            for name in _NOT_OF_THE_RESULT:
                del settings["recover"][name]
        return settings


def same_text(a: str | Path, b: str | Path) -> bool:
    """Whether two names of corpora mean one text: the same name, or files of the same content."""
    both = Path(a).is_file() and Path(b).is_file()
    return str(a) == str(b) or (both and filecmp.cmp(a, b, shallow=False))

"""Settings of the stages that work block by block."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from annotated_types import Gt, Interval

from cap_llm.config.section import (
    NOT_IDENTITY,
    AtLeast0,
    AtLeast1,
    AtLeast2,
    Place,
    Positive,
    Share,
    Weight,
    section,
)
from cap_llm.runtime.errors import UserError
from cap_llm.sparsity.pattern import Pattern


@section("calibration")
class CalibrationConfig:
    """The text whose activations the solvers see."""

    corpus: Place = "c4"
    """c4, wikitext2, ptb, or a file: .txt or .jsonl (field `text`), also as .gz, or .parquet."""
    sequences: AtLeast1 = 128
    """Number of sequences, sampled as in SparseGPT and Wanda."""
    length: AtLeast2 = 2048
    """Tokens per sequence."""
    seed: AtLeast0 = 0
    """Seed of the sample."""
    held_out: AtLeast0 = 16
    """Held-out sequences from other documents, used by sds and reconstruct to select the best
    weights. 0: keep the last weights."""
    allow_scored_corpus: Annotated[bool, NOT_IDENTITY] = False
    """Allow a calibration corpus that `evaluate` also scores. Its perplexity is then too low."""


@section("oneshot.owl")
class OwlConfig:
    """OWL: blocks with more activation outliers keep more weights (Yin et al. 2024)."""

    strength: Annotated[float, Interval(gt=0, lt=0.5)] = 0.08
    """Half the range of the blocks' sparsities (lambda in the paper)."""
    threshold: Annotated[float, Gt(1)] = 5.0
    """A score this many times the mean of its block is an outlier (M in the paper)."""
    guard_sequences: AtLeast0 = 16
    """Held-out calibration sequences on which OWL must beat uniform to be used. 0: no test."""


@section("oneshot")
class OneshotConfig:
    """One-shot pruning, block by block."""

    method: Literal["magnitude", "wanda", "sparsegpt", "admm_grad", "alps"] = "sparsegpt"
    """How weights are selected. sparsegpt, admm_grad and alps also update the remaining weights;
    alps ends with the refit."""
    pattern: str = "unstructured"
    """unstructured (wanda: per row), row (equal sparsity in each output row), or N:M (keep N of M
    inputs)."""
    sparsity: Share | None = None
    """Fraction of zeros, in (0, 1). Default 0.5; an N:M pattern fixes it."""
    refit: bool = False
    """Then solve for the remaining weights by least squares, with the mask fixed (alps always
    does)."""
    damping: Share = 0.01
    """Ridge on the Hessian as a fraction of its mean diagonal, multiplied by 10 if the
    factorization fails."""
    block_size: AtLeast1 = 128
    """SparseGPT: columns per mask selection, rounded to a multiple of M for N:M."""
    allocation: Literal["uniform", "owl"] = "uniform"
    """How the sparsity is distributed over the blocks."""
    owl: OwlConfig = field(default_factory=OwlConfig)
    layers: dict[str, Annotated[float, Interval(ge=0, lt=1)]] = field(default_factory=dict)
    """Sparsity per layer: {"*.down_proj": 0.4, "model.layers.0.*": 0}. 0 leaves a layer dense."""
    initial_mask: Literal["auto", "zeros", "ignore"] = "auto"
    """Mask to prune inside of. auto: the mask file of the model if there is one; zeros: the zeros
    of its weights; ignore: none."""

    def __post_init__(self):
        pattern = Pattern.parse(self.pattern)
        if pattern.m and self.sparsity not in (None, pattern.fixed_sparsity):
            raise UserError(
                f"oneshot.sparsity is {self.sparsity:g}, but the pattern {self.pattern} fixes it "
                f"at {pattern.fixed_sparsity:g}. Leave sparsity out."
            )
        if self.allocation == "owl" and pattern.fixed_sparsity is not None:
            raise UserError(
                f"oneshot.allocation owl needs a different sparsity per block, but the pattern "
                f"{self.pattern} fixes it. Use allocation uniform or pattern unstructured."
            )
        for name, sparsity in self.layers.items():
            if sparsity and pattern.fixed_sparsity not in (None, sparsity):
                raise UserError(
                    f"oneshot.layers sets {name!r} to {sparsity:g}, but the pattern {self.pattern} "
                    f"fixes it at {pattern.fixed_sparsity:g}. Use 0 or leave it out."
                )

    @property
    def target_sparsity(self) -> float:
        """Fraction of zeros asked for, for any pattern."""
        fixed = Pattern.parse(self.pattern).fixed_sparsity
        return fixed if fixed is not None else 0.5 if self.sparsity is None else self.sparsity

    @property
    def uses_calibration(self) -> bool:
        """Whether any text is read; magnitude alone reads none."""
        return self.method != "magnitude" or self.refit or self.allocation == "owl"

    @property
    def refits(self) -> bool:
        """Whether the remaining weights are solved for by least squares at the end."""
        return self.refit or self.method == "alps"

    @property
    def second_order(self) -> bool:
        """Whether the Hessian is factorized."""
        return self.refits or self.method in ("sparsegpt", "admm_grad")


@section("sds")
class SdsConfig:
    """Sparse-Dense-Sparse: make the pruned model dense again, easier to prune, and prune it again
    by the method of `oneshot` (Li et al. 2025)."""

    mode: Literal["gram", "paper"] = "gram"
    """gram: solve on second moments until convergence. paper: 200 epochs of SGD at learning rate
    0.1 (lower if it diverges), our reading of the paper, which names no optimizer; slow."""
    data: Literal["dense", "sparse", "redense"] = "sparse"
    """Model whose activations the dense step sees: the dense model, the pruned one, or the one that
    is made dense so far."""
    redensify: bool = True
    """Do the dense step. false: only the adjustment, as a control."""
    adjust: bool = True
    """After the second pruning, move weights and mask toward the dense weights."""
    mu: Weight = 0.1
    """gram: pull toward the pruned weights, with inputs scaled to unit energy."""
    l1: Weight | None = None
    """Weight of the L1 norm. Default: 0.02 (gram), 0.1 (paper, of the mean |W|)."""
    l2: Weight | None = None
    """Weight of the squared L2 norm. Default: 0.01 (gram), 0.1 (paper, of the mean square)."""

    def __post_init__(self):
        if not (self.redensify or self.adjust):
            raise UserError("sds.redensify and sds.adjust are both false. Set one of them to true.")

    @property
    def regularizers(self) -> tuple[float, float]:
        """Weights of the L1 norm and of the squared L2 norm."""
        l1, l2 = (0.02, 0.01) if self.mode == "gram" else (0.1, 0.1)
        return l1 if self.l1 is None else self.l1, l2 if self.l2 is None else self.l2


@section("reconstruct")
class ReconstructConfig:
    """Block reconstruction: train the remaining weights, one block at a time, toward the output of
    the dense block (Shin et al. 2024)."""

    inputs: Literal["dense", "student"] = "student"
    """What a block reads during training: the output of the reconstructed blocks before it, or the
    activations of the dense model. With dense, blocks are independent and ranks share them out."""
    epochs: AtLeast1 = 2
    """Maximum passes over the calibration text. Training stops after two without a gain on the
    held-out text."""
    lr: Positive = 0.01
    """Learning rate of Adam as a fraction of the root mean square of each tensor. It warms up over
    the first tenth of the steps and then decays linearly to 0."""
    batch: AtLeast1 = 2
    """Sequences per optimizer step. With `inputs: student`, more ranks than that idle. For a batch
    n times as large, multiply `lr` by the square root of n."""
    split_attention: bool = False
    """Train the attention and the rest of a block one after the other."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products (autocast). Weights and errors are float32. auto: float32 on CPUs,
    bfloat16 on GPUs."""
    seed: AtLeast0 = 0
    """Seed of the order of sequences."""

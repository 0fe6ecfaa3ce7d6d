"""Settings of the evaluation."""

from __future__ import annotations

from dataclasses import field

from cap_llm.config.section import AtLeast1, AtLeast2, Place, section


@section("evaluate")
class EvaluateConfig:
    """Perplexity as in the papers (rows joined, one BOS, non-overlapping windows) and zero-shot
    scores by lm-eval."""

    corpora: list[Place] = field(default_factory=lambda: ["wikitext2"])
    """wikitext2, c4, ptb, or files."""
    window: AtLeast2 = 2048
    """Tokens per window. Perplexities of different windows are not comparable."""
    max_windows: AtLeast1 | None = None
    """Score only the first windows of each corpus."""
    tasks: list[Place] = field(default_factory=list)
    """Zero-shot tasks: wanda, sds (the sets of the papers), tasks of lm-eval, or its task files."""
    task_data: Place | None = None
    """Folder with the rows of the tasks (guides/evaluation.md). Default: `zeroshot` in
    CAP_LLM_DATA. Rows that are not there come from the hub."""
    limit: AtLeast1 | None = None
    """Score only the first items of each task."""
    batch_size: AtLeast1 = 8
    """Requests per batch of a task. A batch is padded to its longest request."""
    dense: bool = True
    """Score the dense model too."""

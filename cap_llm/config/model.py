"""Settings of the model and of the machine."""

from __future__ import annotations

from typing import Literal

from cap_llm.config.section import Place, Weight, section


@section("model")
class ModelConfig:
    """The model to prune."""

    path: Place = ""
    """Model directory, or name on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: Place | None = None
    """Directory, hub name or `tokenizer.model` file, if the model comes without a tokenizer."""
    dense: Place | None = None
    """The dense model (directory or hub name), if `path` is already pruned."""


@section("runtime", identity=False)
class RuntimeConfig:
    """Where and how the work is done. Results stay the same up to rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda."""
    activation_gib: Weight | None = None
    """Memory for activations per rank, in GiB (2^30 bytes). The rest is recomputed or written to
    disk. Default: half of the free memory when the work starts."""
    keep_intermediate: bool = True
    """Keep the weights of a stage after the next one is done, and the banks of recover. If false,
    each stage is scored and then deleted, so a pipeline holds at most two pruned models. A
    schedule keeps its levels until it ends."""

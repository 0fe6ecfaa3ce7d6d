"""Models of published shapes with random weights, for benchmarks that need no quality."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

SHAPES = {  # width, heads, blocks of OPT (Zhang et al. 2022, table 1)
    "opt-125m": (768, 12, 12),
    "opt-1.3b": (2048, 32, 24),
    "opt-2.7b": (2560, 32, 32),
    "opt-6.7b": (4096, 32, 32),
    "opt-13b": (5120, 40, 40),
    "opt-30b": (7168, 56, 48),
    "opt-66b": (9216, 72, 64),
}
TEXT = "random-words.jsonl"  # beside the weights
BELOW = Path(tempfile.gettempdir()) / "cap_llm_bench"


def random_model(name: str, blocks: int | None = None, below: Path = BELOW) -> Path:
    """A model directory of a shape in fp16, written once; `blocks` limits its depth."""
    from transformers import OPTConfig

    width, heads, all_blocks = SHAPES[name]
    blocks = blocks or all_blocks
    folder = below / f"{name}-{blocks}"
    config = OPTConfig(
        hidden_size=width,
        ffn_dim=4 * width,
        num_attention_heads=heads,
        num_hidden_layers=blocks,
        word_embed_proj_dim=width,
        vocab_size=50272,
        max_position_embeddings=2048,
        architectures=["OPTForCausalLM"],
        dtype="float16",
    )
    if not (folder / "model.safetensors.index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=below) as scratch:
            config.save_pretrained(scratch)
            _write_text(folder, config.vocab_size)
            _write(folder, Path(scratch))
    return folder


def _write_text(folder: Path, n_words: int) -> None:
    """A tokenizer whose tokens are `w0`, `w1`, ..., and documents of random words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(n_words)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    with open(folder / TEXT, "w", encoding="utf-8") as file:
        for _ in range(64):
            ids = torch.randint(4, n_words, (2100,), generator=draw).tolist()
            file.write(json.dumps({"text": " ".join(f"w{i}" for i in ids)}) + "\n")


def _write(folder: Path, empty: Path) -> None:
    """Writes random weights for the config in `empty`, with one block in memory at a time."""
    from cap_llm.models.checkpoint import ShardWriter
    from cap_llm.models.directory import ModelDirectory
    from cap_llm.models.skeleton import find_blocks

    model = ModelDirectory(empty).skeleton
    prefix, blocks = find_blocks(model)
    writer = ShardWriter(folder, len(blocks))
    draw = torch.Generator().manual_seed(0)
    for i in [None, *range(len(blocks))]:
        tensors = {}
        for name, p in model.named_parameters():
            inside = name.removeprefix(f"{prefix}.")
            block = None if inside == name else int(inside.split(".")[0])
            if block == i and name != "lm_head.weight":  # OPT's head is its embedding
                ones = name.endswith("norm.weight")
                values = (
                    torch.ones(p.shape) if ones else torch.randn(p.shape, generator=draw) * 0.02
                )
                tensors[name] = values.half()
        writer.write(i, tensors)
    writer.finish(empty)

"""What the tests share that is no fixture: families of tiny models, where the project lies."""

from __future__ import annotations

import os
from pathlib import Path

from cap_llm.models.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 512
POSITIONS = 256

# family -> (configuration class, model class, settings of a model of two blocks)
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _SMALL | {"intermediate_size": 64, "num_key_value_heads": 2}
_OPT = _SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
FAMILIES = {
    "opt": ("OPTConfig", "OPTForCausalLM", _OPT),
    "opt350": (
        "OPTConfig",
        "OPTForCausalLM",
        _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _LLAMA | {"head_dim": 8}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _LLAMA),
    # caps its logits after the head
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _LLAMA | {"head_dim": 8}),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _SMALL | {"intermediate_size": 64}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "bert": ("BertConfig", "BertForMaskedLM", _SMALL | {"intermediate_size": 64}),
}


def environment() -> dict[str, str]:
    """Of a process that runs the entry: one thread, no hub, no GPU."""
    ours = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ours |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return os.environ | ours | {"PYTHONPATH": path}


def weights(folder: Path) -> dict:
    """All tensors of a model directory, by name."""
    checkpoint = Checkpoint(folder)
    return checkpoint.read(checkpoint.names())

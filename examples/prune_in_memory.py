"""Prune a transformers model in memory, without a run directory or files.

    python examples/prune_in_memory.py

The model is tiny and random, so this runs on a CPU within seconds. In practice, use
`AutoModelForCausalLM.from_pretrained(...)` and the token ids of real text.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cap_llm import perplexity, prune
from cap_llm.config import OneshotConfig


def tiny_model() -> LlamaForCausalLM:
    """Two LLaMA blocks with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Prunes with three methods and prints the perplexity after each."""
    ids = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(1))  # [N, T]
    print(f"dense: ppl {perplexity(tiny_model(), ids):.2f}")
    for method in ("magnitude", "sparsegpt", "alps"):
        model = tiny_model()
        masks = prune(model, ids, OneshotConfig(method=method, pattern="2:4"))
        name, mask = next(iter(masks.items()))  # [R, C], True for weights that remain
        weight = model.get_parameter(name)
        assert not weight[~mask].any()
        zeros = sum(int((~m).sum()) for m in masks.values())
        share = zeros / sum(m.numel() for m in masks.values())
        ppl = perplexity(model, ids)
        print(f"{method}: {share:.0%} zeros in {len(masks)} matrices, ppl {ppl:.2f}")


if __name__ == "__main__":
    main()

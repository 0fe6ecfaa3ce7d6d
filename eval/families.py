"""Which of transformers' causal language models can be pruned: tries tiny ones of all classes.

    python eval/families.py [MODEL_TYPE ...]

For each class of `AutoModelForCausalLM` a random model of a few small blocks is written to disk and
streamed from there block by block; its loss is compared with that of the model's own forward. In
memory SparseGPT prunes it to 50%. A class works if all linear layers of its blocks are pruned and
the losses agree. Else cap_llm rejects it with a message, or transformers builds no tiny model from
default settings, which says nothing. The table is in `eval/results/families.md`. This takes about
5 minutes on one core and needs no data and no network.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from tables import RESULTS, arguments, markdown
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES
from transformers.utils.logging import disable_progress_bar

from cap_llm.blockwise.perplexity import next_token_nll, streamed_nll
from cap_llm.blockwise.prune import prune
from cap_llm.config import OneshotConfig
from cap_llm.models.blocks import BlockModel
from cap_llm.models.directory import ModelDirectory
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import atomic
from cap_llm.runtime.memory import Memory
from cap_llm.runtime.world import World

PAGE = RESULTS / "families.md"
MAX_SECONDS, MAX_PARAMETERS = 60, 3 * 10**7  # per class
TOLERANCE = 1e-5  # between the losses per token, in float32
WORKS, REJECTED, WRONG, UNTRIED = "works", "rejected", "wrong", "not tried"
# the names of sizes in configurations
WIDTHS = {"hidden_size": 64, "n_embd": 64, "d_model": 64, "word_embed_proj_dim": 64}
WIDTHS |= dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"), 128)
WIDTHS |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 128)
WIDTHS |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "rotary_dim": 8}
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
HEADS = dict.fromkeys((*HEADS, "decoder_attention_heads"), 4) | {"num_key_value_heads": 2}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
LATENT |= {"v_head_dim": 16}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
OTHER = dict.fromkeys(EXPERTS, 4) | {"num_experts_per_tok": 2, "vocab_size": 512}
OTHER |= {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16}
OTHER |= dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256)
OTHER |= {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "num_kv_shared_layers": 0}
OTHER |= {
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}  # one of two blocks has experts


def main() -> int:
    """Tries the classes, prints and writes the table; returns the exit code."""
    parser = arguments(__doc__)
    parser.add_argument("types", nargs="*", metavar="MODEL_TYPE", help="e.g. llama; default: all")
    types = parser.parse_args().types
    if unknown := [name for name in types if name not in NAMES]:
        parser.error(f"transformers has no causal model type {unknown[0]!r}")
    torch.set_num_threads(1)
    disable_progress_bar()
    transformers.logging.set_verbosity_error()
    console = Console()
    classes: dict[str, list[str]] = {}
    for model_type, names in NAMES.items():
        name = names if isinstance(names, str) else names[0]
        if not types or model_type in types:
            classes.setdefault(name, []).append(model_type)
    rows = []
    signal.signal(signal.SIGALRM, _too_long)
    for name, model_types in classes.items():
        signal.alarm(MAX_SECONDS)
        try:
            result = attempt(getattr(transformers, name))
        except Exception as error:  # any type: 180 models by as many authors
            result = UNTRIED, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        signal.alarm(0)
        rows.append((name, ", ".join(model_types), *result))
        console.say("  ".join(rows[-1]))
    if not types:
        write_page(rows)
    return int(any(row[2] == WRONG for row in rows))


def attempt(kind: type) -> tuple[str, str]:
    """Whether a class works, and the evidence.

    Raises:
        Exception: transformers cannot build or run a tiny model of it.
    """
    model = tiny(kind)
    size = sum(p.numel() for p in model.parameters())
    if size > MAX_PARAMETERS:
        return UNTRIED, f"{size:,} parameters are not tiny"
    ids = torch.randint(3, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    alone = World.alone(torch.device("cpu"))
    with torch.no_grad():
        own = next_token_nll(model(ids).logits, ids).item() / (4 * 63)
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            streamed = BlockModel.open(ModelDirectory(Path(folder)), alone.device, torch.float32)
            nll = streamed_nll(streamed, ids, alone, Memory(2**30), Path(folder)) / (4 * 63)
        blocks = len(streamed)
        masks = prune(model, ids, OneshotConfig(sparsity=0.5))
    except UserError as error:
        return REJECTED, str(error)
    except TimeoutError:
        raise
    except Exception as error:  # transformers' own forward raised none
        return WRONG, f"{type(error).__name__}: {error}"
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    share = zeros / sum(mask.numel() for mask in masks.values())
    works = abs(nll - own) < TOLERANCE and abs(share - 0.5) < 1e-3
    return (WORKS if works else WRONG), (
        f"{len(masks)} matrices of {blocks} blocks, {100 * share:.1f}% zeros, "
        f"losses differ by {abs(nll - own):.0e}"
    )


def tiny(kind: type):
    """A random model of a class with a few small blocks, at least one per layer type."""
    config = kind.config_class(**small(kind.config_class))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(0)
    model = kind(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.05)  # so that the blocks matter
    return model


def small(kind: type) -> dict:
    """Settings that make a configuration and its sub-configurations tiny."""
    base = kind()
    fields = set(base.to_dict())
    sizes = WIDTHS | HEADS | OTHER | {"head_dim": 16}
    if "kv_lora_rank" in fields:
        sizes |= LATENT | {"num_key_value_heads": 4}
        del sizes["head_dim"]
    types = getattr(base, "layer_types", None)
    if types and "layer_types" in fields:
        sizes["layer_types"] = (list(dict.fromkeys(types)) * 2)[: max(2, len(set(types)))]
    depth = len(sizes.get("layer_types", "12"))
    sizes |= dict.fromkeys((*DEPTHS, "decoder_layers"), depth)
    if "attention_types" in fields:
        sizes["attention_types"] = [[["global", "local"], 1]]
    parts = {name: getattr(base, name, None) for name in getattr(base, "sub_configs", ())}
    sizes |= {name: small(type(part)) for name, part in parts.items() if part is not None}
    return {name: sizes[name] for name in sizes if name in fields}


def write_page(rows: list[tuple[str, str, str, str]]) -> None:
    """Writes the table."""
    counts = {state: sum(row[2] == state for row in rows) for state in (WORKS, REJECTED, UNTRIED)}
    version = transformers.__version__
    page = ["# Which causal language models can be pruned", ""]
    page += [
        f"Generated by `python eval/families.py` with transformers {version}, from a tiny random"
    ]
    page += [f"model of each of the {len(rows)} classes of `AutoModelForCausalLM`: {counts[WORKS]}"]
    page += [f"work, {counts[REJECTED]} are rejected with a message, and for {counts[UNTRIED]}"]
    page += ["transformers builds no tiny model from default settings.", ""]
    page += ["- **works**: streamed block by block, the model has its own loss to 1e-5 per token,"]
    page += ["  and SparseGPT prunes the linear layers of its blocks to 50%.", ""]
    for state in (WRONG, WORKS, REJECTED, UNTRIED):
        lines = [[row[0], row[1], row[3].replace("|", "/")] for row in rows if row[2] == state]
        if lines:
            page += [f"## {state} ({len(lines)})", ""]
            page += [*markdown(["class", "model types", ""], lines), ""]
    with atomic(PAGE) as temporary:
        temporary.write_text("\n".join(page), encoding="utf-8")


def _too_long(number, frame) -> None:
    raise TimeoutError(f"more than {MAX_SECONDS} s")


if __name__ == "__main__":
    sys.exit(main())

"""Which of transformers' causal language models can be pruned: all of them, tried on tiny ones.

    python eval/families.py [KIND ...]

For each class of `AutoModelForCausalLM` a random model of a few small blocks is written to disk. It
is streamed from there block by block, and its loss held against that of the model's own forward; in
memory SparseGPT prunes it to 50%. So a family works (all linear layers of its blocks are pruned,
and the loss is the model's own), or cap_llm refuses it by a message, or transformers makes no tiny
one of it from plain settings, which says nothing. `eval/results/families.md` has the table. Takes
about 5 minutes on one core; needs no data, no network and no other files.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from tables import RESULTS, arguments, markdown
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KINDS
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
SECONDS, LARGEST = 60, 3 * 10**7  # of a family; parameters of what is still tiny
CLOSE = 1e-5  # difference of two losses a token, in float32
WORKS, REFUSED, WRONG, UNTRIED = "works", "refused", "wrong", "not tried"
# what configurations call their sizes
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
OTHER |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # one of two has experts


def main() -> int:
    """Tries the families, prints and writes the table; returns the exit code."""
    parser = arguments(__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="as llama; default: all")
    asked = parser.parse_args().kinds
    if unknown := [kind for kind in asked if kind not in KINDS]:
        parser.error(f"transformers knows no causal model type {unknown[0]!r}")
    torch.set_num_threads(1)
    disable_progress_bar()
    transformers.logging.set_verbosity_error()
    console = Console()
    classes: dict[str, list[str]] = {}
    for kind, found in KINDS.items():
        name = found if isinstance(found, str) else found[0]
        if not asked or kind in asked:
            classes.setdefault(name, []).append(kind)
    rows = []
    signal.signal(signal.SIGALRM, _too_long)
    for name, kinds in classes.items():
        signal.alarm(SECONDS)
        try:
            result = attempt(getattr(transformers, name))
        except Exception as error:  # of any kind: 180 models by as many authors
            result = UNTRIED, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        signal.alarm(0)
        rows.append((name, ", ".join(kinds), *result))
        console.say("  ".join(rows[-1]))
    if not asked:
        write_page(rows)
    return int(any(row[2] == WRONG for row in rows))


def attempt(kind: type) -> tuple[str, str]:
    """What becomes of a family, and how it shows.

    Raises:
        Exception: transformers makes or runs no tiny model of it.
    """
    model = tiny(kind)
    size = sum(p.numel() for p in model.parameters())
    if size > LARGEST:
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
        return REFUSED, str(error)
    except TimeoutError:
        raise
    except Exception as error:  # where transformers' own forward has none
        return WRONG, f"{type(error).__name__}: {error}"
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    share = zeros / sum(mask.numel() for mask in masks.values())
    fine = abs(nll - own) < CLOSE and abs(share - 0.5) < 1e-3
    return (WORKS if fine else WRONG), (
        f"{len(masks)} matrices of {blocks} blocks, {100 * share:.1f}% zeros, "
        f"losses differ by {abs(nll - own):.0e}"
    )


def tiny(kind: type):
    """A random model of a class, of a few small blocks, at least one of each type of layer."""
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
    """Settings that make a configuration, and those inside it, a tiny one."""
    base = kind()
    known = set(base.to_dict())
    wanted = WIDTHS | HEADS | OTHER | {"head_dim": 16}
    if "kv_lora_rank" in known:
        wanted |= LATENT | {"num_key_value_heads": 4}
        del wanted["head_dim"]
    types = getattr(base, "layer_types", None)
    if types and "layer_types" in known:
        wanted["layer_types"] = (list(dict.fromkeys(types)) * 2)[: max(2, len(set(types)))]
    depth = len(wanted.get("layer_types", "12"))
    wanted |= dict.fromkeys((*DEPTHS, "decoder_layers"), depth)
    if "attention_types" in known:
        wanted["attention_types"] = [[["global", "local"], 1]]
    inside = {name: getattr(base, name, None) for name in getattr(base, "sub_configs", ())}
    wanted |= {name: small(type(part)) for name, part in inside.items() if part is not None}
    return {name: wanted[name] for name in wanted if name in known}


def write_page(rows: list[tuple[str, str, str, str]]) -> None:
    """Writes the table, what works first."""
    counts = {state: sum(row[2] == state for row in rows) for state in (WORKS, REFUSED, UNTRIED)}
    page = ["# Which causal language models can be pruned", ""]
    page += [f"Made by `python eval/families.py` with transformers {transformers.__version__}: of"]
    page += [f"{len(rows)} classes of `AutoModelForCausalLM`, each as a tiny random model,"]
    page += [f"{counts[WORKS]} work, {counts[REFUSED]} are refused by a message, and of"]
    page += [f"{counts[UNTRIED]} transformers made no tiny model from plain settings.", ""]
    page += ["- **works**: streamed block by block the model has its own loss to 1e-5 a token, and"]
    page += ["  SparseGPT prunes the linear layers of its blocks to 50%.", ""]
    for state in (WRONG, WORKS, REFUSED, UNTRIED):
        lines = [[row[0], row[1], row[3].replace("|", "/")] for row in rows if row[2] == state]
        if lines:
            page += [f"## {state} ({len(lines)})", ""]
            page += [*markdown(["class", "model types", ""], lines), ""]
    with atomic(PAGE) as temporary:
        temporary.write_text("\n".join(page), encoding="utf-8")


def _too_long(number, frame) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


if __name__ == "__main__":
    sys.exit(main())

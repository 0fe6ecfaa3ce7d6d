"""Where a contrast pulls: its gradient at a pruned model's final states, beside distillation's.

    python eval/probe_contrast.py PRUNED --dense DENSE --corpus FILE [--sequences 8] [--length 512]

Of one batch, without any training (two minutes for SmolLM2-135M on two cores): PrC as `recover`
has it and with other units, temperatures and candidates. For each the gradient with respect to the
final states [B, T, H] is held against that of the KL, of weight 1, and against the way from these
states to the dense model's:

- norm: as a share of the KL's norm over the same positions (a contrast reads a sample of them)
- with KL: the cosine of the two descents; above 0 they help each other
- to dense: the cosine of the descent with the way to the dense model's states
- at dense: the norm that is left where the student is the dense model, as a share of that at the
  pruned one. A loss that only asks for the teacher's states has none.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from tables import arguments
from transformers import AutoModelForCausalLM

from cap_llm.config import ContrastConfig, RecoverConfig
from cap_llm.contrast.bank import Bank
from cap_llm.contrast.terms import ContrastiveObjective, ContrastTerm
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.world import World
from cap_llm.tasks.language_modeling import CausalLM, TextUnits
from cap_llm.text.corpora import calibration_corpus
from cap_llm.text.packing import pack
from cap_llm.text.tokenizers import load_tokenizer
from cap_llm.training.objectives import head_loss

TOKENS, SEGMENTS = {"segments": 0}, {"token_positions": 0}
ARMS = {
    "PrC": {},
    "tokens only": TOKENS,
    "tokens, temperature 0.03": TOKENS | {"token_temperature": 0.03},
    "tokens, temperature 0.2": TOKENS | {"token_temperature": 0.2},
    "tokens, no labels": TOKENS | {"supervised": 0.0},
    "tokens, no further sequences": TOKENS | {"extra_negatives": 0},
    "segments only": SEGMENTS,
}
EXTRA = ContrastConfig().extra_negatives


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("pruned", type=Path, help="directory of the pruned model")
    parser.add_argument("--dense", type=Path, required=True, help="directory of the dense one")
    parser.add_argument("--corpus", required=True, help="text, as in recover.corpus")
    parser.add_argument("--sequences", type=int, default=8, help="of the batch")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    args = parser.parse_args()
    console = Console()
    try:
        show(args, console)
    except UserError as error:
        console.say(f"error: {error}")
        return 2
    return 0


def show(args: argparse.Namespace, console: Console) -> None:
    """Computes and prints the table."""
    world = World("auto")
    tokenizer = load_tokenizer(str(args.dense))
    corpus, n = calibration_corpus(args.corpus), args.sequences
    text = pack(tokenizer, corpus, n + EXTRA, 1, args.length, 0)
    dense, head = states_and_head(args.dense, text.ids, world.device)
    pruned, _ = states_and_head(args.pruned, text.ids[:n], world.device)
    way = dense[:n] - pruned

    def kl(states: torch.Tensor) -> torch.Tensor:
        flat, target = states[:, :-1].flatten(0, 1), text.ids[:n, 1:].flatten().to(states.device)
        teacher = (dense[:n, :-1].flatten(0, 1), head, None)
        return head_loss(flat, head, None, target, teacher, 0.0, 1.0, 1.0)[0]

    of_kl = gradient(kl, pruned)
    rows = [["KL", "1.00", "", f"{cosine(-of_kl, way):+.2f}", f"{ratio(kl, dense[:n], of_kl):.2f}"]]
    with tempfile.TemporaryDirectory() as scratch, console.bar("probing", len(ARMS), "arms") as bar:
        for k, (title, changes) in enumerate(ARMS.items()):
            loss = contrast(text, dense, n, changes, Path(scratch) / str(k), world)
            found = gradient(loss, pruned)
            read = found.abs().sum(-1, keepdim=True) > 0  # the positions that it reads
            rows.append(
                [
                    title,
                    f"{(found.norm() / (of_kl * read).norm()).item():.2f}",
                    f"{cosine(found, of_kl * read):+.2f}",
                    f"{cosine(-found, way * read):+.2f}",
                    f"{ratio(loss, dense[:n], found):.2f}",
                ]
            )
            bar.advance()
    heads = ["loss, of weight 1", "norm", "with KL", "to dense", "at dense"]
    console.table("the gradient at the final states", heads, rows)
    world.close()


@torch.no_grad()
def states_and_head(
    folder: Path, ids: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final states [N, T, H] of a model directory and its head's weight [V, H], in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    decoder = CausalLM(model.eval().to(device))
    states = torch.cat([decoder(part.to(device), False)[0] for part in ids.split(4)])
    return states, decoder.head.weight.detach()


def contrast(text, dense: torch.Tensor, n: int, changes: dict, folder: Path, world: World):
    """PrC on the first n sequences, with the others' rows as further candidates."""
    settings = ContrastConfig(**changes)
    units = TextUnits(text, settings, dense.shape[-1], RecoverConfig.SKIP, 0, world.device)
    bank = Bank(folder, {}, (len(text.ids), units.n_units, units.dim), world)
    others = torch.arange(n, len(text.ids))
    contrasts = ContrastiveObjective(units, settings.extra_negatives, n, world, others)
    everyone = torch.arange(len(text.ids))
    contrasts.fill(bank, lambda ids: dense[ids], everyone, 4, "banking", Console(enabled=False))
    contrasts.terms.append(ContrastTerm("prc", 1.0, [bank]))
    mine = everyone[:n]
    return lambda states: contrasts.losses(states, None, mine, mine, 0, 0)["prc"]


def gradient(loss, states: torch.Tensor) -> torch.Tensor:
    states = states.clone().requires_grad_()
    loss(states).backward()
    return states.grad


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a * b).sum() / (a.norm() * b.norm())).item()


def ratio(loss, there: torch.Tensor, found: torch.Tensor) -> float:
    """The gradient's norm at the states `there`, as a share of another one's."""
    return (gradient(loss, there).norm() / found.norm()).item()


if __name__ == "__main__":
    sys.exit(main())

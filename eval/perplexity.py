"""Perplexity of a model directory as the papers measure it: `ppl_token` at a window.

    python eval/perplexity.py MODEL [--corpora wikitext2 c4] [--window 2048] [--max_windows N]
    torchrun --nproc_per_node 2 eval/perplexity.py MODEL

MODEL is a directory, dense or pruned, or a name on the hub. The model is streamed block by block,
so it may be larger than memory. The figures are printed and kept in `perplexity.json` in the
model's directory, or in FILE; what that holds already is not scored again. Not to be mixed with
lm-eval's `word_perplexity`, which `eval/zeroshot.py MODEL --tasks wikitext` gives.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]

from cap_llm.runtime.console import Console, quiet_libraries  # noqa: E402

quiet_libraries()

from zeroshot import add_model, place_of_results, without_sections  # noqa: E402

from cap_llm.config import Config, EvaluateConfig, ModelConfig, RuntimeConfig  # noqa: E402
from cap_llm.runtime.errors import UserError  # noqa: E402
from cap_llm.train import guarded, leave  # noqa: E402


def main() -> int:
    """Runs the command; returns its exit code."""
    options = parse()

    @without_sections()
    def work(console: Console) -> None:
        from cap_llm.evaluation.evaluate import FILE, score_corpora
        from cap_llm.evaluation.results import facts_of
        from cap_llm.models.hub import locate, needs_conversion
        from cap_llm.preflight import check_everything
        from cap_llm.runtime.world import World
        from cap_llm.text.reading import read_texts

        config = Config(
            stages=["evaluate"],
            model=ModelConfig(path=options.model, tokenizer=options.tokenizer),
            evaluate=EvaluateConfig(
                corpora=options.corpora, window=options.window, max_windows=options.max_windows
            ),
            runtime=RuntimeConfig(device=options.device, activation_gib=options.activation_gib),
        )
        world = World(options.device)
        folder = locate(config.model)
        path = place_of_results(options, folder, FILE, console)
        check_everything(folder, config, console, world)
        if needs_conversion(folder):
            raise UserError(
                f"{folder} holds no safetensors; give cap-llm --model.path {folder} "
                "--stages [evaluate] --output_dir DIRECTORY, which rewrites them"
            )
        scored = read_texts(config, folder, console).scored
        facts = facts_of(folder, config, world)
        score_corpora(folder, scored, config, facts, path, None, world, console)
        world.barrier()
        world.close()

    return guarded(work, "perplexity.py")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument(
        "--corpora",
        nargs="+",
        default=["wikitext2"],
        help="wikitext2, c4, ptb, or files; default: wikitext2",
    )
    parser.add_argument("--window", type=int, default=2048, help="tokens a window; default: 2048")
    parser.add_argument("--max_windows", type=int, help="score only the first windows of a corpus")
    parser.add_argument(
        "--activation_gib", type=float, help="memory for activations, in GiB a rank"
    )
    return parser.parse_args()


if __name__ == "__main__":
    leave(main())

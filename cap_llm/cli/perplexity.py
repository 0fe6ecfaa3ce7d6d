"""`cap-llm perplexity`: perplexity of a model, measured as in the pruning papers."""

from __future__ import annotations

from cap_llm.cli.options import make_score_parser, parse, scoring, without_sections
from cap_llm.config import Config, EvaluateConfig, ModelConfig, RuntimeConfig
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError

_EXAMPLES = (
    "runs/opt/oneshot",
    "runs/opt/oneshot --corpora wikitext2 c4",
    "facebook/opt-125m --window 1024 -o opt-125m.json",
)
_MORE = """The result is ppl_token with non-overlapping windows. It is not comparable with lm-eval's
word_perplexity (cap-llm zeroshot MODEL --tasks wikitext). The model is streamed block by block, so
it may be larger than memory. The scores are printed and written to scores.json in the model's
directory, or to FILE. Corpora that are already in the file are skipped.
On several GPUs: torchrun --nproc_per_node N -m cap_llm perplexity MODEL"""


@without_sections()
def main(argv: list[str], console: Console) -> None:
    """Measures the perplexity of a model.

    Raises:
        UserError: a corpus is missing, or the model cannot be scored.
    """
    what = "Measure the perplexity of a model."
    parser = make_score_parser("perplexity", what, _EXAMPLES, _MORE)
    corpora = parser.add_argument("--corpora", nargs="+", default=["wikitext2"])
    corpora.help = "wikitext2, c4, ptb, or files; default: wikitext2"
    window = parser.add_argument("--window", type=int, default=2048)
    window.help = "tokens per window; default: 2048"
    parser.add_argument("--max_windows", type=int, help="score only the first N windows per corpus")
    memory = parser.add_argument("--activation_gib", type=float)
    memory.help = "memory for activations, in GiB per rank"
    args = parse(parser, argv)
    from cap_llm.evaluation.evaluate import score_corpora
    from cap_llm.evaluation.scores import ScoreFile
    from cap_llm.preflight import preflight
    from cap_llm.text.reading import TextReader

    config = Config(
        stages=["evaluate"],
        model=ModelConfig(path=args.model, tokenizer=args.tokenizer),
        evaluate=EvaluateConfig(
            corpora=args.corpora, window=args.window, max_windows=args.max_windows
        ),
        runtime=RuntimeConfig(device=args.device, activation_gib=args.activation_gib),
    )
    with scoring(args, config.model, console) as (world, folder, path):
        world.activation_gib = args.activation_gib
        preflight(folder, config, console, world)
        if not folder.has_safetensors:
            raise UserError(
                f"{folder} is not in safetensors format. Convert and score it with cap-llm "
                f"--model.path {folder} --stages [evaluate] --output_dir DIRECTORY"
            )
        texts = TextReader(folder.path, args.tokenizer, console).scored(config.evaluate)
        score_corpora(ScoreFile(folder, path, folder.path.name, world, console), texts)

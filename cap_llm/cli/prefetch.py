"""`cap-llm prefetch RECIPE`: brings what a recipe needs from the hub into one directory.

    cap-llm prefetch llama-3-8b-50 --to fetched [--section.field VALUE ...]

For clusters whose jobs see no internet: run it on a login node. Models come to DIR/hub, the Hugging
Face cache; corpora to DIR/data. Jobs find them with HF_HOME=DIR and CAP_LLM_DATA=DIR/data.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cap_llm.cli.command_line import read_config
from cap_llm.cli.options import make_parser, parse
from cap_llm.config import Config, ModelConfig
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError
from cap_llm.stages import TEXT_OPTIONS, further_models, named, scored_corpora

_EXAMPLES = (
    "opt-125m-50",
    "llama-3-8b-50 --to $SCRATCH/fetched",
    "my.yaml --evaluate.corpora [wikitext2, c4]",
)
_MORE = """For clusters whose jobs have no internet access: run it on a login node. Models go to
DIR/hub, the Hugging Face cache, corpora to DIR/data. Jobs find them with HF_HOME=DIR and
CAP_LLM_DATA=DIR/data. All options of cap-llm run are allowed behind the recipe."""


def main(argv: list[str], console: Console) -> None:
    """Fetches all, then checks that a job without the hub finds it.

    Raises:
        UserError: something cannot be downloaded.
    """
    what = "Download the models and texts that a recipe needs."
    parser = make_parser("prefetch", what, _EXAMPLES, _MORE)
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's name or a YAML file")
    folder = parser.add_argument("--to", type=Path, metavar="DIR", default=Path("fetched"))
    folder.help = "where to; default: fetched"
    args, options = parse(parser, argv, others=True)
    command = ["--config", args.recipe, "--output_dir", "runs/none", *options]
    config, *_ = read_config(command)
    config.check()
    root = args.to.resolve()
    os.environ["HF_HOME"] = str(root)  # before the hub's library reads it
    fetch(config, root / "data", console)
    places = {"HF_HOME": str(root), "CAP_LLM_DATA": str(root / "data")}
    console.say("without the hub:")
    check = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "train.py"), *command, "--dry-run"],
        env=os.environ | places | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        check=False,
    )
    if check.returncode:
        raise UserError(f"what {root} holds is not enough for a job without the hub, see above")
    console.say(f"jobs of slurm/ look in ./fetched, or set FETCHED={root}; elsewhere set")
    console.say("  " + " ".join(f"{name}={value}" for name, value in places.items()))


def fetch(config: Config, data: Path, console: Console) -> None:
    """Brings models to the hub's cache and corpora to the folder `data`.

    Raises:
        UserError: something cannot be had.
    """
    from cap_llm.evaluation.lm_eval_tasks import find_tasks
    from cap_llm.models.hub import locate
    from cap_llm.text.corpora import NAMES, fetch_corpus, scored_split
    from cap_llm.text.tokenizers import load_tokenizer

    models = map(lambda path: ModelConfig(path=path), further_models(config).values())
    for model in (config.model, *models):
        console.say(f"model {model.path}: {locate(model)}")
    if config.model.tokenizer:
        load_tokenizer(config.model.tokenizer)
        console.say(f"tokenizer {config.model.tokenizer}")
    corpora = [(name, "train") for name in named(config, TEXT_OPTIONS).values()]
    corpora += [(name, scored_split(name)) for name in scored_corpora(config)]
    for name, split in dict.fromkeys(corpora):
        if name in NAMES:
            console.say(f"{name} ({split}): {fetch_corpus(name, split, data)}")
    for task in find_tasks(config.evaluate, console) if "evaluate" in config.stages else ():
        console.say(f"task {task.name}: {task.origin}")

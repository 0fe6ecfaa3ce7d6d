"""Zero-shot scores of a model directory by lm-eval.

    python eval/zeroshot.py MODEL [--tasks wanda piqa] [--limit N] [--data DIR] [--output FILE]
    torchrun --nproc_per_node 2 eval/zeroshot.py MODEL

MODEL is a directory, dense or pruned, or a name on the hub. The scores are printed and kept in
`zeroshot.json` in the model's directory, or in FILE; what that holds already is not scored again.
Tasks whose rows lie in DIR (by default `zeroshot` in `CAP_LLM_DATA`) need no network.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cap_llm.runtime.console import Console, quiet_libraries  # noqa: E402

quiet_libraries()

from cap_llm.config import EvaluateConfig, ModelConfig  # noqa: E402
from cap_llm.runtime.errors import UserError  # noqa: E402
from cap_llm.train import guarded, leave  # noqa: E402


def main() -> int:
    """Runs the command; returns its exit code."""
    options = parse()

    @without_sections()
    def work(console: Console) -> None:
        from cap_llm.config import Config
        from cap_llm.evaluation.lm_eval_tasks import find_tasks
        from cap_llm.evaluation.results import facts_of
        from cap_llm.evaluation.zeroshot import FILE, check_causal, score_tasks
        from cap_llm.models.hub import locate
        from cap_llm.runtime.world import World

        names = [name for text in options.tasks for name in text.split(",") if name]
        settings = EvaluateConfig(
            tasks=names,
            task_data=options.data,
            limit=options.limit,
            batch_size=options.batch_size,
        )
        if not names:
            raise UserError("--tasks names none; give some, such as wanda")
        model = ModelConfig(path=options.model, tokenizer=options.tokenizer)
        world = World(options.device)
        folder = locate(model)
        path = place_of_results(options, folder, FILE, console)
        check_causal(folder)
        tasks = find_tasks(settings, console)
        facts = facts_of(folder, Config(model=model), world)
        score_tasks(folder, tasks, settings, facts, path, world, console, model.tokenizer)
        world.barrier()
        world.close()

    return guarded(work, "zeroshot.py")


@contextlib.contextmanager
def without_sections() -> Iterator[None]:
    """Lets errors name options as these scripts spell them: `--window`, where the configuration
    has `--evaluate.window`."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"\b(evaluate|runtime)\.(?=[a-z_]+\b)", "", str(error))
        raise UserError(text.replace("[FILE]", "FILE")) from None


def place_of_results(
    options: argparse.Namespace, folder: Path, name: str, console: Console
) -> Path | None:
    """The file for the results; None where no file was named and the model's folder is not ours.

    Raises:
        UserError: the model is no directory, or the named file's folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no model directory; to score it as it is give cap-llm --model.path "
            f"{folder} --stages [evaluate] --output_dir DIRECTORY"
        )
    if options.output:
        path = Path(options.output)
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UserError(f"--output {path} is no file in an existing directory")
        return path
    if Path(options.model).is_dir() and os.access(folder, os.W_OK):
        return folder / name
    console.say("the results are printed only; give --output FILE to keep them")
    return None


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["wanda"],
        help="wanda, sds (the papers' sets), tasks of lm-eval, or its task files; default: wanda",
    )
    parser.add_argument("--limit", type=int, help="score only the first items of each task")
    parser.add_argument("--data", help="folder of the tasks' rows; default: CAP_LLM_DATA/zeroshot")
    parser.add_argument("--batch_size", type=int, default=8, help="requests a batch; default: 8")
    return parser.parse_args()


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that every script on one model has."""
    parser.add_argument("model", metavar="MODEL", help="a model directory or a name on the hub")
    parser.add_argument("--output", metavar="FILE", help="default: beside the model")
    parser.add_argument("--tokenizer", help="where the model brings none")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default: auto")


if __name__ == "__main__":
    leave(main())

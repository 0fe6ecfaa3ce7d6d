"""`cap-llm zeroshot`: zero-shot scores of a model directory by lm-eval.

cap-llm zeroshot MODEL [--tasks wanda piqa] [--limit N] [--data DIR] [-o FILE]
torchrun --nproc_per_node 2 -m cap_llm zeroshot MODEL
"""

from __future__ import annotations

from cap_llm.cli.options import (
    add_scored_model,
    make_parser,
    parse,
    results_file,
    without_sections,
)
from cap_llm.config import Config, EvaluateConfig, ModelConfig
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError

_EXAMPLES = (
    "runs/opt/oneshot",
    "runs/opt/oneshot --tasks piqa boolq --limit 100",
    "facebook/opt-125m --tasks sds -o opt-125m.json",
)
_MORE = """The scores are printed and written to zeroshot.json in the model's directory, or to FILE.
Tasks that the file already holds are not scored again. Tasks whose rows are in the data folder
need no network. On several GPUs: torchrun --nproc_per_node N -m cap_llm zeroshot MODEL"""


@without_sections()
def main(argv: list[str], console: Console) -> None:
    """Scores the model.

    Raises:
        UserError: a task is unknown, or the model cannot be scored.
    """
    what = "Measure the zero-shot accuracy of a model with lm-eval."
    usage = "cap-llm zeroshot [OPTIONS] MODEL"
    parser = make_parser("zeroshot", what, _EXAMPLES, _MORE, usage=usage)
    add_scored_model(parser)
    tasks = parser.add_argument("--tasks", nargs="+", default=["wanda"])
    tasks.help = "wanda or sds (the papers' sets), tasks of lm-eval, or task files; default: wanda"
    parser.add_argument("--limit", type=int, help="score only the first items of each task")
    parser.add_argument("--data", help="folder of the tasks' rows; default: CAP_LLM_DATA/zeroshot")
    parser.add_argument("--batch_size", type=int, default=8, help="requests per batch; default: 8")
    args = parse(parser, argv)
    from cap_llm.evaluation.lm_eval_tasks import find_tasks
    from cap_llm.evaluation.results import facts_of
    from cap_llm.evaluation.zeroshot import FILE, check_causal, score_tasks
    from cap_llm.models.hub import locate
    from cap_llm.runtime.world import World

    names = [name for text in args.tasks for name in text.split(",") if name]
    settings = EvaluateConfig(
        tasks=names, task_data=args.data, limit=args.limit, batch_size=args.batch_size
    )
    if not names:
        raise UserError("--tasks is empty; name some, such as wanda")
    model = ModelConfig(path=args.model, tokenizer=args.tokenizer)
    world = World(args.device)
    folder = locate(model)
    path = results_file(args, folder, FILE, console)
    check_causal(folder)
    tasks = find_tasks(settings, console)
    facts = facts_of(folder, Config(model=model), world)
    score_tasks(folder, tasks, settings, facts, path, world, console, model.tokenizer)
    world.barrier()
    world.close()

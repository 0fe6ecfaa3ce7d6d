"""`cap-llm zeroshot`: zero-shot accuracy of a model, measured with lm-eval."""

from __future__ import annotations

from cap_llm.cli.options import make_score_parser, parse, scoring, without_sections
from cap_llm.config import EvaluateConfig, ModelConfig
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError

_EXAMPLES = (
    "runs/opt/oneshot",
    "runs/opt/oneshot --tasks piqa boolq --limit 100",
    "facebook/opt-125m --tasks sds -o opt-125m.json",
)
_MORE = """The scores are printed and written to scores.json in the model's directory, or to FILE.
Tasks that are already in the file are skipped. Tasks with local data need no network.
On several GPUs: torchrun --nproc_per_node N -m cap_llm zeroshot MODEL"""


@without_sections()
def main(argv: list[str], console: Console) -> None:
    """Measures the zero-shot accuracy of a model.

    Raises:
        UserError: a task is unknown, or the model cannot be scored.
    """
    what = "Measure the zero-shot accuracy of a model with lm-eval."
    parser = make_score_parser("zeroshot", what, _EXAMPLES, _MORE)
    tasks = parser.add_argument("--tasks", nargs="+", default=["wanda"])
    tasks.help = "wanda or sds (the papers' sets), lm-eval tasks, or task files; default: wanda"
    parser.add_argument("--limit", type=int, help="score only the first N items per task")
    parser.add_argument("--data", help="folder of local task data; default: CAP_LLM_DATA/zeroshot")
    parser.add_argument("--batch_size", type=int, default=8, help="requests per batch; default: 8")
    args = parse(parser, argv)
    from cap_llm.evaluation.lm_eval_tasks import find_tasks
    from cap_llm.evaluation.scores import ScoreFile
    from cap_llm.evaluation.zeroshot import check_causal, score_tasks

    names = [name for text in args.tasks for name in text.split(",") if name]
    if not names:
        raise UserError("--tasks is empty; choose tasks such as wanda")
    settings = EvaluateConfig(
        tasks=names, task_data=args.data, limit=args.limit, batch_size=args.batch_size
    )
    model = ModelConfig(path=args.model, tokenizer=args.tokenizer)
    with scoring(args, model, console) as (world, folder, path):
        check_causal(folder)
        tasks = find_tasks(settings, console)
        file = ScoreFile(folder, path, folder.path.name, world, console)
        score_tasks(file, tasks, settings, model.tokenizer)

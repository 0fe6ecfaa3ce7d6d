"""`cap-llm run`, and `cap-llm` without a subcommand: a recipe's pipeline, one call per stage.

    cap-llm --config opt-125m-50 --output_dir runs/opt
    deepspeed cap_llm/train.py --config opt-125m-50 --output_dir runs/opt
    torchrun --nproc_per_node 2 cap_llm/train.py --config my.yaml

On one GPU, several, or CPUs. The same command resumes where an earlier one stopped.
"""

from __future__ import annotations

from cap_llm.cli.command_line import read_config
from cap_llm.runtime.console import Console


def main(argv: list[str], console: Console) -> None:
    """Runs the pipeline that `argv` describes, or checks it."""
    console.quiet = "--quiet" in argv
    config, config_yaml, only_check = read_config(argv)
    config.check(makes_run=not only_check)
    from cap_llm.pipeline import dry_run, pipeline  # late, so that `--help` is quick

    if only_check:
        dry_run(config, console)
    else:
        pipeline(config, config_yaml, console)

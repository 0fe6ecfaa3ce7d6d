"""`cap-llm run`, the default subcommand: runs or checks the pipeline of a recipe."""

from __future__ import annotations

from cap_llm.cli.command_line import read_config
from cap_llm.runtime.console import Console


def main(argv: list[str], console: Console) -> None:
    """Runs the pipeline, or checks it with `--dry-run`."""
    console.quiet = "--quiet" in argv
    config, config_yaml, only_check = read_config(argv)
    config.check(makes_run=not only_check)
    from cap_llm.pipeline import dry_run, pipeline  # imports torch, which `--help` does not need

    if only_check:
        dry_run(config, console)
    else:
        pipeline(config, config_yaml, console)

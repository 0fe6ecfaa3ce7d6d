"""Shared parts of the subcommands: parsers, common options, and the frame for scoring a model."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cap_llm.config import ModelConfig
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError

if TYPE_CHECKING:
    from cap_llm.models.directory import ModelDirectory
    from cap_llm.runtime.world import World


def make_parser(
    name: str, what: str, examples: Sequence[str], more: str = "", **options
) -> argparse.ArgumentParser:
    """A parser of `cap-llm NAME` whose help begins with examples."""
    prog = f"cap-llm {name}".strip()
    return argparse.ArgumentParser(
        prog=prog,
        description=describe(prog, what, examples),
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )


def describe(prog: str, what: str, examples: Sequence[str]) -> str:
    """The beginning of a help text: examples, then a summary."""
    lines = [f"  {prog} {example}".rstrip() for example in examples]
    return "\n".join(["examples:", *lines, "", what])


def parse(parser: argparse.ArgumentParser, argv: list[str], others: bool = False) -> Any:
    """Parses the arguments, or completes them if the shell asks for completions.

    Returns:
        The arguments; with `others`, also a list of unknown arguments.
    """
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser.parse_known_args(argv) if others else parser.parse_args(argv)


def add_out(parser: argparse.ArgumentParser, metavar: str, text: str, **options) -> None:
    """Adds the option for the output."""
    parser.add_argument("-o", "--out", type=Path, metavar=metavar, help=text, **options)


def make_score_parser(
    name: str, what: str, examples: Sequence[str], more: str
) -> argparse.ArgumentParser:
    """A parser of a subcommand that scores a model."""
    parser = make_parser(name, what, examples, more, usage=f"cap-llm {name} [OPTIONS] MODEL")
    parser.add_argument("model", metavar="MODEL", help="a model directory or a name on the hub")
    add_out(parser, "FILE", "file for the results; default: in the model's directory")
    parser.add_argument("--tokenizer", help="tokenizer, if the model has none")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default: auto")
    return parser


@contextlib.contextmanager
def scoring(
    args: argparse.Namespace, model: ModelConfig, console: Console
) -> Iterator[tuple[World, ModelDirectory, Path | None]]:
    """Starts the ranks and locates the model that the body scores.

    Yields:
        The ranks, the model's directory, and the file of scores: `--out`, or that of a local model
        directory. Without either it is None.

    Raises:
        UserError: the model is not a directory, or the results file is not writable.
    """
    from cap_llm.evaluation.scores import FILE
    from cap_llm.models.hub import locate
    from cap_llm.runtime.world import World

    world = World(args.device)
    folder = locate(model)
    if not folder.path.is_dir():
        raise UserError(
            f"{folder} is not a model directory. Score it with cap-llm --model.path {folder} "
            "--stages [evaluate] --output_dir DIRECTORY"
        )
    path = args.out and writable_file(args.out)
    if not path and Path(args.model).is_dir() and os.access(folder.path, os.W_OK):
        path = folder.path / FILE
    if not path:
        console.say("--out is not set; the results are printed but not saved")
    yield world, folder, path
    world.close()


@contextlib.contextmanager
def without_sections() -> Iterator[None]:
    """Lets errors name the options of the subcommands: `--window` for `--evaluate.window`."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"(?:(?<=--)|(?<= )|^)(evaluate|runtime)\.(?=[a-z_]+\b)", "", str(error))
        raise UserError(text.replace("[FILE]", "FILE")) from None


def writable_file(path: Path) -> Path:
    """Returns `path` if it can be written.

    Raises:
        UserError: it is a directory, or its folder is missing or read-only.
    """
    parent = path.absolute().parent
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {path} is not writable. Choose a file in an existing directory.")
    return path

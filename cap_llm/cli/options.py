"""What the parsers of the subcommands share: their help, and options of one name and meaning."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from cap_llm.runtime.errors import UserError


def make_parser(
    name: str, what: str, examples: Sequence[str], more: str = "", **options
) -> argparse.ArgumentParser:
    """A parser of `cap-llm NAME` whose help begins with examples of its arguments."""
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
    """The top of a help: examples, then a line of what the command does."""
    lines = [f"  {prog} {example}".rstrip() for example in examples]
    return "\n".join(["examples:", *lines, "", what])


def parse(parser: argparse.ArgumentParser, argv: list[str], others: bool = False):
    """Reads the arguments, or completes them where the shell asks for that.

    Returns:
        The arguments; with `others`, also a list of those that the parser does not know.
    """
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser.parse_known_args(argv) if others else parser.parse_args(argv)


def add_out(parser: argparse.ArgumentParser, metavar: str, text: str, **options) -> None:
    """Where results go."""
    parser.add_argument("-o", "--out", type=Path, metavar=metavar, help=text, **options)


def add_scored_model(parser: argparse.ArgumentParser) -> None:
    """The model to score, and on what."""
    parser.add_argument("model", metavar="MODEL", help="a model directory or a name on the hub")
    add_out(parser, "FILE", "file for the results; default: in the model's directory")
    parser.add_argument("--tokenizer", help="tokenizer, where the model has none")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default: auto")


@contextlib.contextmanager
def without_sections() -> Iterator[None]:
    """Lets errors name options as the subcommands spell them: `--window`, where the configuration
    has `--evaluate.window`."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"(?:(?<=--)|(?<= )|^)(evaluate|runtime)\.(?=[a-z_]+\b)", "", str(error))
        raise UserError(text.replace("[FILE]", "FILE")) from None


def results_file(args: argparse.Namespace, folder: Path, name: str, console) -> Path | None:
    """The file for a model's scores; None where no file was named and the model's directory is not
    the user's.

    Raises:
        UserError: the model is not a directory, or the named file's folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a model directory. Score it with cap-llm --model.path {folder} "
            "--stages [evaluate] --output_dir DIRECTORY"
        )
    if args.out:
        return writable_file(args.out)
    if Path(args.model).is_dir() and os.access(folder, os.W_OK):
        return folder / name
    console.say("the results are only printed; give --out FILE to keep them")
    return None


def writable_file(path: Path) -> Path:
    """`path`, if a file can be written there.

    Raises:
        UserError: it is a directory, or its folder does not exist or cannot be written.
    """
    parent = path.absolute().parent
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {path} is not a file in a writable directory")
    return path

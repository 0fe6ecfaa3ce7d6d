"""The subcommands: one table, and what chooses from it.

Their modules are imported when they are called, and import what is heavy after they have read the
command line: help, version and `status` load no torch.
"""

from __future__ import annotations

import difflib
import importlib
import os

import cap_llm
from cap_llm.cli.options import make_parser, parse
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError

# name: one line of help; the module of that name has `main(argv, console)`, which does the work
COMMANDS = {
    "run": "prune, recover and evaluate a model (the default)",
    "status": "show how far a run is",
    "prefetch": "download what a recipe needs, for jobs without internet",
    "compare": "write one report over several runs",
    "perplexity": "measure the perplexity of a model",
    "zeroshot": "measure the zero-shot accuracy of a model with lm-eval",
    "bench": "measure what the zeros of a pruned model save on this machine",
    "demo": "prune and recover a real 135M model on two CPU cores",
    "push": "upload a finished model and its card to the Hugging Face hub",
}
_EXAMPLES = (
    "--config opt-125m-50 --output_dir runs/opt",
    "--model.path MODEL --output_dir runs/mine --oneshot.method alps --calibration.corpus my.txt",
    "status runs/opt",
)
_MORE = """
Without a subcommand, `run` is meant; `cap-llm run --help` lists its options.
On several GPUs: deepspeed cap_llm/train.py ..., or torchrun --nproc_per_node N -m cap_llm ...

Completion in bash and zsh: pip install "cap_llm[completion]", and put this line in ~/.bashrc
or ~/.zshrc: eval "$(register-python-argcomplete cap-llm)"
"""


def dispatch(argv: list[str], console: Console) -> None:
    """Runs the subcommand that `argv` begins with; without one, `run`.

    Raises:
        UserError: there is no such subcommand, or it cannot do its work.
    """
    if "_ARGCOMPLETE" in os.environ:  # the shell wants completions of a line, not work
        argv = _words_to_complete()
    # the deepspeed launcher adds it; LOCAL_RANK has the same value
    argv = [a for a in argv if not a.startswith(("--local_rank=", "--local-rank="))]
    first = argv[0] if argv else ""
    if first in COMMANDS:
        importlib.import_module(f"cap_llm.cli.{first}").main(argv[1:], console)
    elif argv == ["--version"]:
        console.say(f"cap-llm {cap_llm.__version__}")
    elif argv in ([], ["-h"], ["--help"]):
        parse(_parser(), argv)
        _parser().print_help()
        raise SystemExit(2)
    elif first.startswith("-"):
        dispatch(["run", *argv], console)
    else:
        raise UserError(f"unknown subcommand {first}{_hint(first)}")


def _parser():
    """The parser of the help over all subcommands."""
    what = "Prune transformer language models and recover their quality."
    parser = make_parser("", what, _EXAMPLES, usage="cap-llm [SUBCOMMAND] [ARGUMENTS]")
    lines = [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    parser.epilog = "subcommands:\n" + "\n".join(lines) + "\n" + _MORE
    parser.add_argument("--version", action="store_true", help="show the version")
    command = parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="SUBCOMMAND")
    command.help = "one of the subcommands below"
    return parser


def _hint(word: str) -> str:
    """What a first word that is not a subcommand may have meant."""
    from cap_llm.cli.command_line import misplaced

    if hint := misplaced(word):
        return hint
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    return f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(COMMANDS)}"


def _words_to_complete() -> list[str]:
    """The subcommand of the line that argcomplete reads, which it is told to read behind that."""
    line = os.environ["COMP_LINE"][: int(os.environ.get("COMP_POINT", 10**6))]
    words = (line + "|").split()[1:]  # the last one is being written
    if len(words) > 1 and words[0] in COMMANDS:
        os.environ["_ARGCOMPLETE"] = "2"
        return words[:1]
    return ["run"] if words[0].startswith("-") or len(words) > 1 else []

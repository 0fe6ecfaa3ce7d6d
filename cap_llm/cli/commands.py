"""The table of subcommands and their dispatch.

A subcommand's module is imported when it is called, and imports torch only after it has parsed the
command line. Help, version and `status` do not load torch.
"""

from __future__ import annotations

import difflib
import importlib
import os

import cap_llm
from cap_llm.cli.options import make_parser, parse
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError

# name: help text; the module of that name defines `main(argv, console)`
COMMANDS = {
    "run": "prune, recover and evaluate a model (the default)",
    "status": "show the progress of a run",
    "prefetch": "download what a recipe needs, for jobs without internet",
    "compare": "write one report of several runs",
    "perplexity": "measure the perplexity of a model",
    "zeroshot": "measure the zero-shot accuracy of a model with lm-eval",
    "bench": "measure the memory and time that sparse formats save",
    "demo": "prune and recover a real 135M model on two CPU cores",
    "push": "upload a finished model and its card to the Hugging Face hub",
}
_EXAMPLES = (
    "--config opt-125m-50 --output_dir runs/opt",
    "--model.path MODEL --output_dir runs/mine --oneshot.method alps --calibration.corpus my.txt",
    "status runs/opt",
)
_MORE = """
The default subcommand is `run`; `cap-llm run --help` lists its options.
On several GPUs: deepspeed cap_llm/train.py ..., or torchrun --nproc_per_node N -m cap_llm ...

For completion in bash and zsh, run pip install "cap_llm[completion]" and add this line to ~/.bashrc
or ~/.zshrc: eval "$(register-python-argcomplete cap-llm)"
"""


def dispatch(argv: list[str], console: Console) -> None:
    """Runs the subcommand that `argv` begins with; the default is `run`.

    Raises:
        UserError: the subcommand is unknown, or it failed.
    """
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
        argv = _words_to_complete()
    # The deepspeed launcher adds this option; LOCAL_RANK has the same value.
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
    """The parser of the overall help."""
    what = "Prune transformer language models and recover their quality."
    parser = make_parser("", what, _EXAMPLES, usage="cap-llm [SUBCOMMAND] [ARGUMENTS]")
    lines = [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    parser.epilog = "subcommands:\n" + "\n".join(lines) + "\n" + _MORE
    parser.add_argument("--version", action="store_true", help="show the version")
    command = parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="SUBCOMMAND")
    command.help = "one of the subcommands below"
    return parser


def _hint(word: str) -> str:
    """A suggestion for an unknown subcommand."""
    from cap_llm.cli.command_line import misplaced

    if hint := misplaced(word):
        return hint
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    return f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(COMMANDS)}"


def _words_to_complete() -> list[str]:
    """The subcommand of the line to complete; argcomplete then completes what follows it."""
    line = os.environ["COMP_LINE"][: int(os.environ.get("COMP_POINT", 10**6))]
    words = (line + "|").split()[1:]  # the last word is incomplete
    if len(words) > 1 and words[0] in COMMANDS:
        os.environ["_ARGCOMPLETE"] = "2"
        return words[:1]
    return ["run"] if words[0].startswith("-") or len(words) > 1 else []

"""The command line: a recipe or file, then `--section.field VALUE`, read into the settings.

jsonargparse makes the options from the dataclasses of `config.py`; this module finds recipes and
says in one line what is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import sys
import types
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from cap_llm.config import Config
from cap_llm.runtime.errors import UserError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def read_config(argv: list[str] | None = None) -> tuple[Config, str, bool]:
    """Reads the command line: a recipe or file, then overrides.

    Returns:
        The settings, the same as YAML, and whether only a dry run was asked for.

    Raises:
        UserError: an option is unknown, misspelt or of the wrong type.
    """
    argv = _resolve_recipe(list(sys.argv[1:] if argv is None else argv))
    parser = make_parser()
    if argv[:1] == ["--config"] and not _check_file(Path(argv[1]), parser):
        argv = argv[2:]  # a file of comments: the defaults
    try:
        parsed = parser.parse_args(argv)
        dry_run = parsed.pop("dry_run")
        parsed.pop("config")
        for name, value in parsed.as_flat().__dict__.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name} is {value}; it must be a finite number")
        text = parser.dump(parsed, skip_none=False)
        config = parser.instantiate_classes(parsed)
    except (jsonargparse.ArgumentError, argparse.ArgumentError) as error:
        raise UserError(_explain(str(error), parser)) from None
    settings = Config(**{f.name: config[f.name] for f in dataclasses.fields(Config)})
    return settings, text, dry_run


def make_parser() -> jsonargparse.ArgumentParser:
    """The parser of the command; its help shows every option with meaning and default."""
    parser = jsonargparse.ArgumentParser(
        prog="cap-llm",
        exit_on_error=False,
        description="Prunes a language model and measures it. Recipes: " + ", ".join(recipes()),
    )
    parser.add_argument(
        "--config", action=jsonargparse.ActionConfigFile, help="A recipe's name or a YAML file."
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Check all that can be checked, predict memory, disk and hours, and stop.",
    )
    parser.add_class_arguments(Config)
    return parser


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = files("cap_llm") / "recipes"
    names = (path.name for path in folder.iterdir())
    return sorted(n.removesuffix(".yaml") for n in names if n.endswith(".yaml"))


def _resolve_recipe(argv: list[str]) -> list[str]:
    """Puts `--config PATH` first, so that every other option overrides it; a recipe's name becomes
    its path. Drops `--local_rank=N`, which the deepspeed launcher adds: `LOCAL_RANK` says the same.
    """
    argv = [a for a in argv if not a.startswith(("--local_rank=", "--local-rank="))]
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if argv.count("--config") > 1:
        raise UserError("--config is given twice; give one recipe or file, and options after it")
    if "--config" not in argv:
        return argv
    at = argv.index("--config")
    if at + 1 == len(argv):
        raise UserError(
            "--config needs a recipe's name or a file; recipes: " + ", ".join(recipes())
        )
    name, rest = argv[at + 1], argv[:at] + argv[at + 2 :]
    if name in recipes():
        name = str(files("cap_llm") / "recipes" / f"{name}.yaml")
    elif not Path(name).is_file():
        near = difflib.get_close_matches(name, recipes(), n=1)
        hint = f"did you mean {near[0]}?" if near else "recipes: " + ", ".join(recipes())
        raise UserError(f"--config {name}: neither a file nor a recipe; {hint}")
    return ["--config", name, *rest]


def _check_file(path: Path, parser: jsonargparse.ArgumentParser) -> bool:
    """Refuses a settings file that is not YAML or holds an unknown field, by its name.

    Returns:
        Whether it sets anything.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"--config {path} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(
            f"--config {path} holds {str(content)[:40]!r} instead of settings; see the recipes"
        )
    known = _options(parser)

    def check(fields: dict, prefix: str) -> None:
        for key, value in fields.items():
            option = f"{prefix}{key}"
            if option not in known:
                raise UserError(f"{path} sets {option}, which is unknown{_near(option, known)}")
            if isinstance(value, dict) and not option.endswith(".layers"):
                check(value, f"{option}.")

    check(content, "")
    return bool(content)


def _explain(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """jsonargparse's message as one line in this command's words."""
    message = " ".join(message.split())
    key = re.search(r'Parser key "([\w.]+)"', message)
    value = re.search(r"(?:Got value|Given value): (.*)$", message)
    if key and value:
        kind = _field_type(key.group(1))
        text = f"{key.group(1)} is {value.group(1)!r}; it must be {_describe(kind)}"
        choices = [c for k in (kind, *get_args(kind)) for c in get_args(k) if isinstance(c, str)]
        if kind is str:
            text += " (put it in quotes: YAML reads it as something else)"
        near = difflib.get_close_matches(value.group(1), choices, n=1)
        if get_origin(kind) is list and (near or not choices):
            return f'{text}; did you mean "[{near[0] if near else value.group(1)}]"?'
        return text + (f"; did you mean {near[0]}?" if near else "")
    unknown = re.search(r"unrecognized arguments: (\S+)", message)
    if unknown:
        option = unknown.group(1).split("=")[0]
        known = [f"--{o}" for o in _options(parser)]
        return f"unknown option {option}{_near(option, known)} (see --help)"
    return f"{message} (see --help)"


def _options(parser: jsonargparse.ArgumentParser) -> list[str]:
    return [o.removeprefix("--") for action in parser._actions for o in action.option_strings]


def _near(option: str, known: list[str]) -> str:
    near = difflib.get_close_matches(option, known, n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def _field_type(key: str) -> type:
    kind: type = Config
    for part in key.split("."):
        kind = get_type_hints(kind)[part]
    return kind


def _describe(kind) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is list:
        return f"a list, like [a, b], of {_describe(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return 'names with numbers, like {"*.down_proj": 0.4}'
    if isinstance(kind, types.UnionType):
        return " or ".join(_describe(k) for k in get_args(kind))
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    return names.get(kind, "null")

"""The command line: a recipe or file, then `--section.field VALUE`, read into the settings.

jsonargparse makes the options from the dataclasses of `config.py`; this module finds recipes and
says in one line what is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import os
import re
import reprlib
import textwrap
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jsonargparse
import yaml

from cap_llm.cli.options import describe
from cap_llm.config import Config
from cap_llm.config.section import refused
from cap_llm.runtime.errors import UserError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

_EXAMPLES = (
    "--config opt-125m-50 --output_dir runs/opt",
    "--config opt-125m-50 --output_dir runs/opt --oneshot.sparsity 0.6 --dry-run",
    "--model.path MODEL --output_dir runs/mine --stages [oneshot] --calibration.corpus my.txt",
)


class _Help(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    pass


def read_config(argv: list[str]) -> tuple[Config, str, bool]:
    """Reads the arguments of `cap-llm run`: a recipe or file, then overrides.

    Returns:
        The settings, the same as YAML, and whether only a dry run was asked for.

    Raises:
        UserError: an option is unknown, misspelt, or its value is of the wrong type or range.
    """
    file, argv = _resolve_recipe(argv)
    dry_run = "--dry-run" in argv  # not a setting: --print_config leaves it out
    argv = [a for a in argv if a not in ("--dry-run", "--quiet")]
    parser = make_parser()
    try:
        content = parser.parse_object(_read_file(file)) if file else None
        parsed = parser.parse_args(argv, namespace=content).as_dict()
    except (jsonargparse.ArgumentError, argparse.ArgumentError) as error:
        raise UserError(_explain(str(error), parser)) from None
    config = Config(**{field.name: parsed[field.name] for field in dataclasses.fields(Config)})
    return config, as_yaml(config), dry_run


def as_yaml(config: Config) -> str:
    """The settings as a file that `--config` reads."""
    content = dataclasses.asdict(config)
    return yaml.safe_dump(content, allow_unicode=True, sort_keys=False)


def make_parser() -> jsonargparse.ArgumentParser:
    """The parser of the command; its help shows every option with meaning and default."""
    what = "Prune a language model, recover its quality and evaluate it. The recipes:\n"
    what += textwrap.fill(", ".join(recipes()), 78, initial_indent="  ", subsequent_indent="  ")
    parser = jsonargparse.ArgumentParser(
        prog="cap-llm",
        usage="cap-llm [run] [--config RECIPE_OR_FILE] [--section.field VALUE ...]",
        exit_on_error=False,
        description=describe("cap-llm", what, _EXAMPLES),
        formatter_class=_Help,
    )
    parser.add_argument(
        "--config", action=jsonargparse.ActionConfigFile, help="A recipe's name or a YAML file."
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Check all that can be checked, predict memory, disk and hours, and stop.",
    )
    parser.add_argument(
        "--quiet",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Print only warnings, errors and the path of the report; log.txt has all.",
    )
    parser.add_class_arguments(Config)
    if "_ARGCOMPLETE" in os.environ:
        for action in parser._actions:
            action.completer = functools.partial(_values, action.dest)
    return parser


def _values(option: str, **options) -> list[str]:
    """What the shell offers as the value of an option: jsonargparse itself knows no literals."""
    from argcomplete.completers import FilesCompleter

    kind = str if option in ("config", "print_config") else _field_type(option)
    if kind is bool:
        return ["true", "false"]
    choices = [c for k in (kind, *get_args(kind)) for c in get_args(k) if isinstance(c, str)]
    names = recipes() if option == "config" else []
    return choices or [*names, *FilesCompleter()(**options)]


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = files("cap_llm") / "recipes"
    names = (path.name for path in folder.iterdir())
    return sorted(n.removesuffix(".yaml") for n in names if n.endswith(".yaml"))


def _resolve_recipe(argv: list[str]) -> tuple[Path | None, list[str]]:
    """The file that `--config` names, also by a recipe's name, and the other arguments."""
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if argv.count("--config") > 1:
        raise UserError("--config is given twice; give one recipe or file, and options after it")
    if "--config" not in argv:
        return None, argv
    at = argv.index("--config")
    if at + 1 == len(argv):
        raise UserError(
            "--config needs a recipe's name or a file; recipes: " + ", ".join(recipes())
        )
    name, rest = argv[at + 1], argv[:at] + argv[at + 2 :]
    if name in recipes():
        return Path(str(files("cap_llm") / "recipes" / f"{name}.yaml")), rest
    if not Path(name).expanduser().is_file():
        near = difflib.get_close_matches(name, recipes(), n=1)
        hint = f"did you mean {near[0]}?" if near else "recipes: " + ", ".join(recipes())
        raise UserError(f"--config {name}: neither a file nor a recipe; {hint}")
    return Path(name).expanduser(), rest


def _read_file(path: Path) -> dict:
    """The settings of a YAML file.

    Raises:
        UserError: it is not YAML, sets one field twice, or holds an unknown field or a section
            that is not one.
    """
    try:
        content = _load_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"--config {path} is not valid YAML: {why}") from None
    return _checked(content, Config(), path)


def _checked(content: object, section: object, path: Path, prefix: str = "") -> dict:
    """What a file sets of a section, without what is left empty."""
    if content is None:  # all its fields are comments
        return {}
    if not isinstance(content, dict):
        what = f"sets {prefix.rstrip('.')} to" if prefix else "holds"
        raise UserError(f"--config {path} {what} {reprlib.repr(content)} instead of settings")
    fields = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    found = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if key not in fields:
            near = _near(name, [prefix + other for other in fields])
            raise UserError(f"--config {path} sets {name}, which is unknown{near}")
        is_section = dataclasses.is_dataclass(fields[key])
        found[key] = _checked(value, fields[key], path, f"{name}.") if is_section else value
    return found


def _load_yaml(text: str) -> object:
    """Reads YAML, in files and in options' values.

    Raises:
        YAMLError: also where a mapping holds a key twice: YAML's own readers take the last.
    """
    try:
        _refuse_twice(yaml.compose(text, Loader=yaml.SafeLoader), set())
        return _READ_YAML(text)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def _refuse_twice(node: yaml.Node | None, seen: set[int]) -> None:
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))  # an anchor may stand inside itself
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item, seen)
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        _refuse_twice(value, seen)
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(
                    f"{key.value} is set twice, in line {lines[key.value]} and line {line}"
                )
            lines[key.value] = line


_READ_YAML = jsonargparse.get_loader("yaml")
jsonargparse.set_loader("yaml", _load_yaml, exceptions=(yaml.YAMLError,))


def _explain(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """jsonargparse's message as one line in this command's words."""
    message = " ".join(message.split())
    key = re.search(r'Parser key "([\w.]+)"', message)
    value = re.search(r"(?:Got value|Given value): (.*)$", message)
    if key and value:
        kind = _field_type(key.group(1))
        text = str(refused(key.group(1), value.group(1), kind))
        if kind is str:
            text += " (put it in quotes: YAML reads it as something else)"
        return text
    whole = re.search(r'Parser key "(\w+)": Unable to load', message)
    if whole and (first := next((o for o in _options(parser) if o.startswith(f"{whole[1]}.")), "")):
        return f"--{whole[1]} is a section of settings; did you mean --{first}?"
    unknown = re.search(r"unrecognized arguments: (\S+)", message)
    if unknown:
        option = unknown.group(1).split("=")[0]
        if not option.startswith("-"):
            return f"{option} does not belong to an option{misplaced(option) or ' (see --help)'}"
        known = [f"--{o}" for o in _options(parser)]
        return f"unknown option {option}{_near(option, known)} (see --help)"
    return f"{message} (see --help)"


def misplaced(word: str) -> str:
    """What a word that does not belong to an option may have meant; empty if nothing is near."""
    if word in recipes() or (word.endswith((".yaml", ".yml")) and Path(word).is_file()):
        return f"; did you mean --config {word}?"
    if (Path(word) / "config.json").is_file():
        return f"; did you mean --model.path {word}?"
    near = difflib.get_close_matches(word, recipes(), n=1)
    return f"; did you mean --config {near[0]}?" if near else ""


def _options(parser: jsonargparse.ArgumentParser) -> list[str]:
    return [o.removeprefix("--") for action in parser._actions for o in action.option_strings]


def _near(option: str, known: list[str]) -> str:
    near = difflib.get_close_matches(option, known, n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def _field_type(key: str) -> Any:
    kind: Any = Config
    for part in key.split("."):
        kind = get_type_hints(kind)[part]
    return kind

"""Parses the command line: a recipe or YAML file, then `--section.field VALUE` overrides.

jsonargparse builds the options from the dataclasses of `config.py`. This module finds recipes and
shortens error messages to one line.
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
    """Parses the arguments of `cap-llm run`.

    Returns:
        The config, the config as YAML, and whether `--dry-run` is set.

    Raises:
        UserError: an option is unknown, or its value has the wrong type or is out of range.
    """
    file, argv = _resolve_recipe(argv)
    dry_run = "--dry-run" in argv  # not part of the config
    parser = make_parser()
    argv = [_full_name(a, parser) for a in argv if a not in ("--dry-run", "--quiet")]
    try:
        content = parser.parse_object(_read_file(file)) if file else None
        parsed = parser.parse_args(argv, namespace=content).as_dict()
    except (jsonargparse.ArgumentError, argparse.ArgumentError) as error:
        raise UserError(_explain(str(error), parser)) from None
    config = Config(**{field.name: parsed[field.name] for field in dataclasses.fields(Config)})
    return config, as_yaml(config), dry_run


def _full_name(argument: str, parser: jsonargparse.ArgumentParser) -> str:
    """Completes an option without its inner section: `--recover.lr` to `--recover.optimizer.lr`."""
    option, equals, value = argument.partition("=")
    section, _, name = option.removeprefix("--").partition(".")
    options = _options(parser)
    if not option.startswith("--") or option[2:] in options or "." in name:
        return argument
    inner = [
        o for o in options if re.fullmatch(rf"{re.escape(section)}\.\w+\.{re.escape(name)}", o)
    ]
    return f"--{inner[0]}{equals}{value}" if len(inner) == 1 else argument


def as_yaml(config: Config) -> str:
    """The config as YAML for `--config`."""
    return yaml.safe_dump(dataclasses.asdict(config), allow_unicode=True, sort_keys=False)


def make_parser() -> jsonargparse.ArgumentParser:
    """The parser of `cap-llm run`; its help lists all options with their defaults."""
    what = "Prune a language model, recover its quality and evaluate it. Recipes:\n"
    what += textwrap.fill(", ".join(recipes()), 78, initial_indent="  ", subsequent_indent="  ")
    parser = jsonargparse.ArgumentParser(
        prog="cap-llm",
        usage="cap-llm [run] [--config RECIPE_OR_FILE] [--section.field VALUE ...]",
        exit_on_error=False,
        description=describe("cap-llm", what, _EXAMPLES),
        formatter_class=_Help,
    )
    parser.add_argument(
        "--config", action=jsonargparse.ActionConfigFile, help="Name of a recipe, or a YAML file."
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Check the run and estimate its memory, disk and time, without running it.",
    )
    parser.add_argument(
        "--quiet",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Print only warnings, errors and the report's path; log.txt has all output.",
    )
    parser.add_class_arguments(Config)
    if "_ARGCOMPLETE" in os.environ:
        for action in parser._actions:
            action.completer = functools.partial(_values, action.dest)
    return parser


def _values(option: str, **options) -> list[str]:
    """Completions of an option's value; jsonargparse itself does not complete literals."""
    from argcomplete.completers import FilesCompleter

    kind = str if option in ("config", "print_config") else _field_type(option)
    if kind is bool:
        return ["true", "false"]
    choices = [c for k in (kind, *get_args(kind)) for c in get_args(k) if isinstance(c, str)]
    names = recipes() if option == "config" else []
    return choices or [*names, *FilesCompleter()(**options)]


def recipes() -> list[str]:
    """Names of the package's recipes."""
    folder = files("cap_llm") / "recipes"
    names = (path.name for path in folder.iterdir())
    return sorted(n.removesuffix(".yaml") for n in names if n.endswith(".yaml"))


def _resolve_recipe(argv: list[str]) -> tuple[Path | None, list[str]]:
    """The file of `--config`, given as a path or a recipe, and the other arguments."""
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if argv.count("--config") > 1:
        raise UserError("--config is set twice. Pass one recipe or file, then override options.")
    if "--config" not in argv:
        return None, argv
    at = argv.index("--config")
    if at + 1 == len(argv):
        raise UserError(
            "--config needs a value. Pass a YAML file or one of " + ", ".join(recipes())
        )
    name, rest = argv[at + 1], argv[:at] + argv[at + 2 :]
    if name in recipes():
        return Path(str(files("cap_llm") / "recipes" / f"{name}.yaml")), rest
    if not Path(name).expanduser().is_file():
        near = difflib.get_close_matches(name, recipes(), n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Recipes: {', '.join(recipes())}."
        raise UserError(f"--config {name} is neither a file nor a recipe. {hint}")
    return Path(name).expanduser(), rest


def _read_file(path: Path) -> dict:
    """Reads a YAML config.

    Raises:
        UserError: it is not valid YAML, sets a field twice, or has unknown fields.
    """
    try:
        content = _load_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path} is not valid YAML: {reason}") from None
    return _check_fields(content, Config(), path)


def _check_fields(content: object, section: object, path: Path, prefix: str = "") -> dict:
    """The fields of a section that a file sets, without empty subsections."""
    if content is None:
        return {}
    if not isinstance(content, dict):
        where = f"sets {prefix.rstrip('.')} to" if prefix else "contains"
        raise UserError(f"--config {path} {where} {reprlib.repr(content)}, not a mapping")
    fields = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    result = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if key not in fields:
            near = _near(name, [prefix + other for other in fields])
            raise UserError(f"--config {path} sets {name}, which is unknown{near}")
        is_section = dataclasses.is_dataclass(fields[key])
        result[key] = _check_fields(value, fields[key], path, f"{name}.") if is_section else value
    return result


def _load_yaml(text: str) -> object:
    """Loads YAML, from a file or an option's value.

    Raises:
        YAMLError: it is invalid, or a mapping has a duplicate key, which PyYAML accepts.
    """
    try:
        _reject_duplicates(yaml.compose(text, Loader=yaml.SafeLoader), set())
        return _READ_YAML(text)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def _reject_duplicates(node: yaml.Node | None, visited: set[int]) -> None:
    if not isinstance(node, yaml.CollectionNode) or id(node) in visited:
        return
    visited.add(id(node))  # an anchor may contain itself
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _reject_duplicates(item, visited)
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        _reject_duplicates(value, visited)
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(
                    f"{key.value} is set twice, on line {lines[key.value]} and line {line}"
                )
            lines[key.value] = line


_READ_YAML = jsonargparse.get_loader("yaml")
jsonargparse.set_loader("yaml", _load_yaml, exceptions=(yaml.YAMLError,))


def _explain(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """Rewrites an error message of jsonargparse as one line that names the option."""
    message = " ".join(message.split())
    key = re.search(r'Parser key "([\w.]+)"', message)
    value = re.search(r"(?:Got value|Given value): (.*)$", message)
    if key and value:
        kind = _field_type(key.group(1))
        text = str(refused(key.group(1), value.group(1), kind))
        if kind is str:
            text += ". Quote it, so that YAML reads it as a string."
        return text
    name = re.search(r'Parser key "(\w+)": Unable to load', message)
    if name and (first := next((o for o in _options(parser) if o.startswith(f"{name[1]}.")), "")):
        return f"--{name[1]} is a config section; did you mean --{first}?"
    unknown = re.search(r"unrecognized arguments: (\S+)", message)
    if unknown:
        option = unknown.group(1).split("=")[0]
        if not option.startswith("-"):
            return f"{option} does not belong to an option{misplaced(option) or ' (see --help)'}"
        options = [f"--{o}" for o in _options(parser)]
        return f"unknown option {option}{_near(option, options)} (see --help)"
    return f"{message} (see --help)"


def misplaced(word: str) -> str:
    """A suggestion for a word that does not belong to an option, or an empty string."""
    if word in recipes() or (word.endswith((".yaml", ".yml")) and Path(word).is_file()):
        return f"; did you mean --config {word}?"
    if (Path(word) / "config.json").is_file():
        return f"; did you mean --model.path {word}?"
    near = difflib.get_close_matches(word, recipes(), n=1)
    return f"; did you mean --config {near[0]}?" if near else ""


def _options(parser: jsonargparse.ArgumentParser) -> list[str]:
    return [o.removeprefix("--") for action in parser._actions for o in action.option_strings]


def _near(option: str, options: list[str]) -> str:
    near = difflib.get_close_matches(option, options, n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def _field_type(key: str) -> Any:
    kind: Any = Config
    for part in key.split("."):
        kind = get_type_hints(kind)[part]
    return kind

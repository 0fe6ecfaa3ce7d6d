"""The settings of a run: nested, documented, checked dataclasses.

A YAML file (a recipe) is the source of truth; `--section.field VALUE` overrides it. Defaults, help
texts and the option table of the README all come from here. Nonsense is refused in `__post_init__`,
before anything is loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
import types
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from cap_llm.runtime.errors import UserError
from cap_llm.sparsity.patterns import Pattern

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass
class ModelConfig:
    """The dense model."""

    path: str = ""
    """A model directory, or a name on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: str | None = None
    """Directory, hub name or `tokenizer.model` file, where the model brings no tokenizer."""


@dataclass
class CalibrationConfig:
    """The text that shows the solvers what the inputs of each matrix look like."""

    corpus: str = "c4"
    """c4, wikitext2, ptb, or a file: .txt or .jsonl (field `text`), also as .gz, or .parquet."""
    sequences: int = 128
    """Number of sequences, drawn as in SparseGPT and Wanda."""
    length: int = 2048
    """Tokens a sequence."""
    seed: int = 0
    """Seed of the draw."""
    allow_scored_corpus: bool = False
    """Allow a calibration corpus that `evaluate` scores too. Its perplexity then flatters."""

    def __post_init__(self):
        _at_least("calibration.sequences", self.sequences, 1)
        _at_least("calibration.length", self.length, 2)


@dataclass
class OwlConfig:
    """OWL: blocks with many outlying activations keep more weights (Yin et al. 2024)."""

    strength: float = 0.08
    """Largest departure of a block's sparsity from the mean (the paper's lambda)."""
    threshold: float = 5.0
    """A score this many times the block's mean is an outlier (the paper's M)."""
    guard_sequences: int = 16
    """Calibration sequences, held out, on which OWL must beat uniform to be used; 0: no test."""

    def __post_init__(self):
        if not 0 < self.strength < 0.5:
            raise UserError(f"oneshot.owl.strength is {self.strength}; it must lie in (0, 0.5)")
        if self.threshold <= 1:
            raise UserError(f"oneshot.owl.threshold is {self.threshold}; it must be above 1")
        _at_least("oneshot.owl.guard_sequences", self.guard_sequences, 0)


@dataclass
class OneshotConfig:
    """One-shot pruning, block by block."""

    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    """How weights are chosen; sparsegpt also moves the ones that stay."""
    pattern: str = "unstructured"
    """unstructured, row (equal sparsity in each output row), or N:M: keep N of M inputs."""
    sparsity: float | None = None
    """Share of zeros, in (0, 1). Default 0.5; an N:M pattern fixes it."""
    refit: bool = False
    """Then re-solve the weights that stay by least squares on the same mask."""
    damping: float = 0.01
    """Ridge on the Hessian, as a share of its mean diagonal; raised tenfold where it fails."""
    block_size: int = 128
    """SparseGPT: columns between two choices of the mask."""
    budget: Literal["uniform", "owl"] = "uniform"
    """How the sparsity is spread over the blocks."""
    owl: OwlConfig = field(default_factory=OwlConfig)
    layers: dict[str, float] = field(default_factory=dict)
    """Sparsity by hand: {"*.down_proj": 0.4, "model.layers.0.*": 0}; 0 leaves a layer dense."""
    earlier_mask: Literal["auto", "zeros", "ignore"] = "auto"
    """Prune inside an earlier mask: auto reads masks.safetensors of the model if it has one, zeros
    takes the zeros of its weights as the mask."""

    def __post_init__(self):
        pattern = Pattern.parse(self.pattern)
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise UserError(
                f"oneshot.sparsity is {self.sparsity:g}; it is the share of zeros, in (0, 1)"
            )
        if pattern.m and self.sparsity not in (None, pattern.fixed_sparsity):
            raise UserError(
                f"oneshot.sparsity is {self.sparsity:g} but the pattern {self.pattern} fixes it at "
                f"{pattern.fixed_sparsity:g}; leave sparsity out"
            )
        if self.budget == "owl" and pattern.fixed_sparsity is not None:
            raise UserError(
                f"oneshot.budget owl spreads sparsity unevenly, which {self.pattern} does not "
                "allow; use budget uniform or an unstructured pattern"
            )
        for name, sparsity in self.layers.items():
            if not 0 <= sparsity < 1:
                raise UserError(
                    f"oneshot.layers gives {name!r} the sparsity {sparsity:g}; it must lie in "
                    "[0, 1), and 0 leaves the layer dense"
                )
            if sparsity and pattern.fixed_sparsity not in (None, sparsity):
                raise UserError(
                    f"oneshot.layers gives {name!r} the sparsity {sparsity:g} but the pattern "
                    f"{self.pattern} fixes it at {pattern.fixed_sparsity:g}; use 0 or leave it out"
                )
        if not 0 < self.damping < 1:
            raise UserError(f"oneshot.damping is {self.damping:g}; it must lie in (0, 1)")
        _at_least("oneshot.block_size", self.block_size, 1)
        if pattern.m and self.block_size % pattern.m:
            raise UserError(
                f"oneshot.block_size {self.block_size} is no multiple of {pattern.m} "
                f"(pattern {self.pattern}); choose one that is"
            )

    @property
    def amount(self) -> float:
        """Share of zeros that is asked for, whatever the pattern."""
        fixed = Pattern.parse(self.pattern).fixed_sparsity
        return fixed if fixed is not None else 0.5 if self.sparsity is None else self.sparsity

    @property
    def uses_calibration(self) -> bool:
        """Whether the method reads text; magnitude alone does not."""
        return self.method != "magnitude" or self.refit or self.budget == "owl"


@dataclass
class EvaluateConfig:
    """Perplexity as the papers measure it: rows joined, one BOS, non-overlapping windows."""

    corpora: list[str] = field(default_factory=lambda: ["wikitext2"])
    """wikitext2, c4, ptb, or files."""
    window: int = 2048
    """Tokens a window; figures of different windows do not compare."""
    max_windows: int | None = None
    """Score only the first windows of each corpus."""
    dense: bool = True
    """Score the dense model too."""

    def __post_init__(self):
        _at_least("evaluate.window", self.window, 2)
        if self.max_windows is not None:
            _at_least("evaluate.max_windows", self.max_windows, 1)


@dataclass
class RuntimeConfig:
    """Where and how the work is done; nothing here changes a result beyond rounding."""

    device: str = "auto"
    """auto, cpu or cuda."""
    activation_gib: float | None = None
    """Memory for activations, in GiB (2^30 bytes) a rank; what does not fit is computed again or
    goes to disk. Default: half of what is free when the work starts."""
    keep_intermediate: bool = True
    """Keep the weights of a stage when the next one is done. Off, a pipeline holds one model."""

    def __post_init__(self):
        if self.activation_gib is not None and self.activation_gib < 0:
            raise UserError(
                f"runtime.activation_gib is {self.activation_gib:g}; it must be at least 0"
            )


STAGES = ("oneshot", "evaluate")


@dataclass
class Config:
    """A pipeline over one model."""

    output_dir: str = ""
    """The run directory. The same command goes on where an earlier one stopped."""
    name: str = ""
    """What the report calls this run. Default: made from the method and the pattern."""
    stages: list[Literal["oneshot", "evaluate"]] = field(default_factory=lambda: list(STAGES))
    """What is done, in this order: oneshot, evaluate."""
    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    oneshot: OneshotConfig = field(default_factory=OneshotConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def check(self) -> None:
        """What only the whole can tell.

        Raises:
            UserError: something is missing or contradicts something else.
        """
        if not self.model.path:
            raise UserError("no model: give --model.path DIRECTORY_OR_HUB_NAME")
        if not self.output_dir:
            raise UserError("no run directory: give --output_dir DIRECTORY")
        if not self.stages:
            raise UserError(f"stages is empty; name some of {', '.join(STAGES)}")
        if self.stages != [s for s in STAGES if s in self.stages]:
            raise UserError(
                f"stages is [{', '.join(self.stages)}]; name some of {', '.join(STAGES)}, each "
                "once and in this order"
            )
        if "evaluate" in self.stages and not self.evaluate.corpora:
            raise UserError("evaluate.corpora is empty; name a corpus or leave evaluate out")
        names = [Path(name).name for name in self.evaluate.corpora]
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"evaluate.corpora has two files called {name}, which results could not tell "
                    "apart; rename one"
                )
        if self.uses_calibration and "evaluate" in self.stages:
            # C4's training and validation documents differ: to calibrate on the one and score the
            # other is the papers' own protocol. WikiText-2's splits share their style and topics.
            scored = [_corpus_key(name) for name in self.evaluate.corpora if name != "c4"]
            if _corpus_key(self.calibration.corpus) in scored and (
                not self.calibration.allow_scored_corpus
            ):
                raise UserError(
                    f"calibration.corpus {self.calibration.corpus!r} is also scored by evaluate: "
                    "choose another one, or set --calibration.allow_scored_corpus true"
                )

    @property
    def uses_calibration(self) -> bool:
        """Whether any stage reads the calibration text."""
        return "oneshot" in self.stages and self.oneshot.uses_calibration

    @property
    def title(self) -> str:
        """What the report calls this run."""
        if self.name:
            return self.name
        if "oneshot" not in self.stages:
            return "dense"
        o = self.oneshot
        amount = o.pattern if ":" in o.pattern else f"{100 * o.amount:g} %"
        return " ".join(
            [o.method, *(["+ refit"] if o.refit else []), amount]
            + (["row"] if o.pattern == "row" else [])
            + (["OWL"] if o.budget == "owl" else [])
        )

    def recipe(self, stage: str) -> dict:
        """All settings that the result of a stage depends on."""
        settings = {"model": dataclasses.asdict(self.model)}
        if stage == "oneshot":
            settings["oneshot"] = dataclasses.asdict(self.oneshot) | {
                "sparsity": self.oneshot.amount
            }
            if self.uses_calibration:
                settings["calibration"] = dataclasses.asdict(self.calibration)
                del settings["calibration"]["allow_scored_corpus"]
        return settings


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
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
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


def _corpus_key(corpus: str) -> str:
    return str(Path(corpus).resolve()) if Path(corpus).exists() else corpus


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name} is {value}; it must be at least {least}")

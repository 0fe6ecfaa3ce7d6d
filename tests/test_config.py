"""The settings: recipes and DeepSpeed files parse, overrides win, what is written reads back, and
the help says it all."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import yaml

from cap_llm import config as config_module
from cap_llm.command_line import make_parser, read_config, recipes
from cap_llm.config import Config, OneshotConfig
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.rundir import difference

ROOT = Path(__file__).resolve().parent.parent
HERE = ["--model.path", "some/model", "--output_dir", "runs/x"]
SHIPPED = sorted(path.stem for path in (ROOT / "cap_llm" / "recipes").glob("*.yaml"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


def fields(cls: type = Config, prefix: str = "") -> list[tuple[str, str]]:
    """Every option with its help: the string below each field of the dataclasses."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    helps = {
        node.target.id: inspect.cleandoc(below.value.value)
        for node, below in zip(body, [*body[1:], None], strict=True)
        if isinstance(node, ast.AnnAssign)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }
    found = []
    for f in dataclasses.fields(cls):
        inner = getattr(config_module, str(f.type).strip("'\""), None)
        if dataclasses.is_dataclass(inner):
            found += fields(inner, f"{prefix}{f.name}.")
        else:
            found.append((prefix + f.name, " ".join(helps.get(f.name, "").split())))
    return found


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# recipes


def test_the_shipped_recipes_are_the_known_ones():
    assert SHIPPED
    assert recipes() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_parses_and_checks(name):
    config, text, dry_run = read_config(["--config", name, *HERE])
    config.check()
    assert not dry_run
    assert yaml.safe_load(text) == dataclasses.asdict(config)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_value_of_a_shipped_recipe_arrives(name):
    config, _, _ = read_config(["--config", name, *HERE])
    resolved = dataclasses.asdict(config)

    def compare(given: dict, got: dict, path: str) -> None:
        for key, value in given.items():
            if isinstance(value, dict) and key != "layers":
                compare(value, got[key], f"{path}{key}.")
            elif f"{path}{key}" not in ("model.path", "output_dir"):
                assert got[key] == value, f"{path}{key}"

    file = ROOT / "cap_llm" / "recipes" / f"{name}.yaml"
    compare(yaml.safe_load(file.read_text()), resolved, "")


@pytest.mark.parametrize("file", DS_CONFIGS, ids=lambda path: path.name)
def test_a_deepspeed_file_parses(file):
    settings = json.loads(file.read_text())
    assert isinstance(settings, dict)
    assert settings["zero_optimization"]["stage"] in (0, 1, 2, 3)
    deepspeed = pytest.importorskip("deepspeed")
    filled = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    numbers = {k: v for k, v in settings.items() if v != "auto"}
    deepspeed.runtime.config.DeepSpeedConfig({**numbers, **filled})


# the command line


@pytest.mark.parametrize("options", [["--config", "demo"], ["--config=demo"]])
def test_a_recipe_is_given_by_its_name_in_both_forms(options):
    config, _, _ = read_config([*options, *HERE])
    assert config.calibration.length == 512
    assert config.evaluate.dense is False


@pytest.mark.parametrize("joined", [False, True])
def test_a_file_is_given_by_its_path_in_both_forms(tmp_path, joined):
    file = write(tmp_path / "mine.yaml", "oneshot: {sparsity: 0.61, pattern: row}\n")
    config, _, _ = read_config([*([f"--config={file}"] if joined else ["--config", file]), *HERE])
    assert (config.oneshot.sparsity, config.oneshot.pattern) == (0.61, "row")


def test_a_file_may_give_everything_so_that_no_option_is_needed(tmp_path):
    text = "output_dir: runs/y\nmodel: {path: m}\noneshot:\n  layers: {'*.down_proj': 0.4, a: 0}\n"
    config, _, _ = read_config(["--config", write(tmp_path / "all.yaml", text)])
    config.check()
    assert config.oneshot.layers == {"*.down_proj": 0.4, "a": 0}


def test_an_option_wins_over_the_file(tmp_path):
    file = write(tmp_path / "mine.yaml", "oneshot: {sparsity: 0.61}\nstages: [oneshot]\n")
    config, text, _ = read_config(["--config", file, "--oneshot.sparsity", "0.7", *HERE])
    assert config.oneshot.sparsity == 0.7
    assert config.stages == ["oneshot"]
    assert yaml.safe_load(text)["oneshot"]["sparsity"] == 0.7


def test_an_option_before_config_wins_too(tmp_path):
    file = write(tmp_path / "mine.yaml", "oneshot: {sparsity: 0.61}\n")
    config, _, _ = read_config(["--oneshot.sparsity", "0.7", "--config", file, *HERE])
    assert config.oneshot.sparsity == 0.7


def test_an_override_keeps_its_neighbours_in_a_nested_section(tmp_path):
    file = write(tmp_path / "mine.yaml", "oneshot: {budget: owl, owl: {strength: 0.1}}\n")
    config, _, _ = read_config(["--config", file, "--oneshot.owl.threshold", "7", *HERE])
    assert (config.oneshot.owl.strength, config.oneshot.owl.threshold) == (0.1, 7.0)
    assert config.oneshot.budget == "owl"


def test_options_take_an_equals_sign_too():
    config, _, _ = read_config(["--oneshot.sparsity=0.7", "--stages=[oneshot]", *HERE])
    assert (config.oneshot.sparsity, config.stages) == (0.7, ["oneshot"])


@pytest.mark.parametrize("option", ["--local_rank=1", "--local-rank=1"])
def test_the_launchers_own_option_is_dropped(option):
    config, _, _ = read_config([option, *HERE])
    assert config.output_dir == "runs/x"


def test_a_dry_run_is_asked_for_by_an_option():
    assert read_config(["--dry-run", *HERE])[2] is True


def test_no_option_gives_the_defaults_of_the_dataclasses():
    config, _, _ = read_config([])
    assert config == Config()


# the resolved settings


RESOLVED = {
    "defaults": [],
    "2:4": ["--oneshot.pattern", "2:4"],
    "layers": ["--oneshot.layers", '{"*.q_proj": 0.25, "model.layers.0.*": 0}'],
    "owl": ["--oneshot.budget", "owl", "--oneshot.owl.strength", "0.04"],
    "nulls": ["--runtime.activation_gib", "null", "--evaluate.max_windows", "null"],
    "numbers": ["--runtime.activation_gib", "0.5", "--oneshot.damping", "1e-3"],
    "words": ["--name", "yes: #1 'quoted' 2:4", "--evaluate.corpora", "[a b.txt, c4]"],
    "empty": ["--evaluate.corpora", "[]", "--stages", "[oneshot]"],
}


@pytest.mark.parametrize("options", RESOLVED.values(), ids=RESOLVED.keys())
def test_the_written_settings_read_back_as_the_same_run(tmp_path, options):
    config, text, _ = read_config([*HERE, *options])
    again, text_again, _ = read_config(["--config", write(tmp_path / "config.yaml", text)])
    assert again == config
    assert text_again == text
    assert yaml.safe_load(text) == dataclasses.asdict(config)


# N:M fixes the sparsity


def test_a_pattern_of_half_leaves_no_sparsity_to_give():
    config, _, _ = read_config([*HERE, "--oneshot.pattern", "4:8"])
    assert config.oneshot.sparsity is None and config.oneshot.amount == 0.5


@pytest.mark.parametrize("pattern", ["1:4", "3:4", "2:8", "1:16"])
def test_any_pattern_can_be_given_without_a_sparsity(tmp_path, pattern):
    config, _, _ = read_config([*HERE, "--oneshot.pattern", pattern])
    n, m = map(int, pattern.split(":"))
    assert config.oneshot.amount == 1 - n / m
    file = write(tmp_path / "mine.yaml", f"oneshot: {{pattern: '{pattern}'}}\n")
    assert read_config(["--config", file, *HERE])[0].oneshot.pattern == pattern


def test_a_pattern_alone_is_enough_for_the_dataclass():
    assert OneshotConfig(pattern="1:4").sparsity is None
    assert OneshotConfig(pattern="1:4").amount == 0.75
    assert OneshotConfig().amount == 0.5


# derived quantities


@pytest.mark.parametrize(
    ("oneshot", "stages", "expected"),
    [
        ({}, ["oneshot"], True),
        ({}, ["evaluate"], False),
        ({"method": "magnitude"}, ["oneshot"], False),
        ({"method": "magnitude", "refit": True}, ["oneshot"], True),
        ({"method": "magnitude", "budget": "owl"}, ["oneshot"], True),
    ],
)
def test_only_methods_that_read_text_ask_for_calibration(oneshot, stages, expected):
    config = Config(oneshot=OneshotConfig(**oneshot), stages=stages)
    assert config.uses_calibration is expected


def test_magnitude_may_be_scored_on_any_corpus():
    config, _, _ = read_config(
        [*HERE, "--oneshot.method", "magnitude", "--calibration.corpus", "wikitext2"]
    )
    config.check()


def test_one_file_under_two_paths_is_one_corpus(tmp_path, monkeypatch):
    write(tmp_path / "text.txt", "words")
    monkeypatch.chdir(tmp_path)
    config, _, _ = read_config(
        [
            *HERE,
            *("--calibration.corpus", "text.txt"),
            *("--evaluate.corpora", f"[{tmp_path / 'text.txt'}]"),
        ]
    )
    with pytest.raises(UserError, match="also scored by evaluate"):
        config.check()


# the help


def test_every_field_has_a_help_text():
    assert len(fields()) > 25
    assert [name for name, text in fields() if not text] == []


def test_the_help_names_every_field_with_its_text(capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, text in fields():
        assert f"--{name} " in shown, name
        assert text.rstrip(".") in shown, name
    assert "--config" in shown
    assert "--dry-run" in shown
    for name in recipes():
        assert name in shown


@pytest.mark.parametrize("words", [["--help"], ["status", "--help"], ["prefetch", "--help"]])
def test_a_help_text_is_all_that_is_said(command, words):
    result = command(*words)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: cap-llm")


@pytest.mark.parametrize("word", ["status", "prefetch"])
def test_a_command_without_its_argument_says_how_it_is_used(command, word):
    result = command(word)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: cap-llm") and "Traceback" not in result.stderr


# recipes of run directories


def test_a_setting_that_one_version_does_not_have_is_none_there():
    old, new = {"a": {"b": 1, "gone": None}}, {"a": {"b": 1, "added": None}}
    assert difference(old, new) is None
    assert difference(old, new | {"c": 3}) == ("c", None, 3)
    assert difference(old, {"a": {"b": 2}}) == ("a.b", 1, 2)

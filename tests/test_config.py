"""The settings: recipes and DeepSpeed files parse, overrides win, what is written reads back, and
the help says it all."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import json
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import yaml

from cap_llm import config as config_module
from cap_llm.cli.command_line import make_parser, read_config, recipes
from cap_llm.config import Config, OneshotConfig
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.rundir import difference
from cap_llm.solvers.methods import METHODS
from cap_llm.sparsity.pattern import Pattern

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
    file = write(tmp_path / "mine.yaml", "oneshot: {allocation: owl, owl: {strength: 0.1}}\n")
    config, _, _ = read_config(["--config", file, "--oneshot.owl.threshold", "7", *HERE])
    assert (config.oneshot.owl.strength, config.oneshot.owl.threshold) == (0.1, 7.0)
    assert config.oneshot.allocation == "owl"


def test_options_take_an_equals_sign_too():
    config, _, _ = read_config(["--oneshot.sparsity=0.7", "--stages=[oneshot]", *HERE])
    assert (config.oneshot.sparsity, config.stages) == (0.7, ["oneshot"])


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
    "owl": ["--oneshot.allocation", "owl", "--oneshot.owl.strength", "0.04"],
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
    assert config.oneshot.sparsity is None and config.oneshot.target_sparsity == 0.5


@pytest.mark.parametrize("pattern", ["1:4", "3:4", "2:8", "1:16"])
def test_any_pattern_can_be_given_without_a_sparsity(tmp_path, pattern):
    config, _, _ = read_config([*HERE, "--oneshot.pattern", pattern])
    n, m = map(int, pattern.split(":"))
    assert config.oneshot.target_sparsity == 1 - n / m
    file = write(tmp_path / "mine.yaml", f"oneshot: {{pattern: '{pattern}'}}\n")
    assert read_config(["--config", file, *HERE])[0].oneshot.pattern == pattern


def test_a_pattern_alone_is_enough_for_the_dataclass():
    assert OneshotConfig(pattern="1:4").sparsity is None
    assert OneshotConfig(pattern="1:4").target_sparsity == 0.75
    assert OneshotConfig().target_sparsity == 0.5


# derived quantities


@pytest.mark.parametrize(
    ("oneshot", "stages", "expected"),
    [
        ({}, ["oneshot"], True),
        ({}, ["evaluate"], False),
        ({"method": "magnitude"}, ["oneshot"], False),
        ({"method": "magnitude", "refit": True}, ["oneshot"], True),
        ({"method": "magnitude", "allocation": "owl"}, ["oneshot"], True),
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


# from Python


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("Oneshot", {"method": "sparse_gpt"}, ["oneshot.method", "mean sparsegpt?"]),
        ("Oneshot", {"methd": "wanda"}, ["oneshot.methd is unknown", "mean method?"]),
        ("Oneshot", {"pattern": "2:4:8"}, ["2:4:8"]),
        ("Oneshot", {"layers": {"a": 3}}, ["oneshot.layers['a'] is 3", "[0, 1)"]),
        ("Oneshot", {"owl": {"strength": 2}}, ["oneshot.owl.strength is 2", "(0, 0.5)"]),
        ("Oneshot", {"sparsity": float("nan")}, ["oneshot.sparsity is nan", "finite"]),
        ("Owl", {"threshold": 1}, ["oneshot.owl.threshold is 1", "> 1"]),
        ("Sds", {"mode": "papers"}, ["sds.mode", "gram, paper"]),
        ("Reconstruct", {"lr": 0}, ["reconstruct.lr is 0", "> 0"]),
        ("Objective", {"kl": -1}, ["recover.objective.kl is -1", ">= 0"]),
        ("Contrast", {"dim": 1}, ["recover.contrast.dim is 1", ">= 2"]),
        ("Optimizer", {"warmup": 1}, ["recover.optimizer.warmup is 1", "[0, 1)"]),
        ("Recover", {"teacher": "a\0b"}, ["recover.teacher", "null byte"]),
        ("Runtime", {"device": "gpu"}, ["runtime.device", "auto, cpu, cuda"]),
        ("", {"stages": ["onesho"]}, ["stages[0] is 'onesho'", "mean oneshot?"]),
        ("", {"recover": {"objective": {"kl": -1}}}, ["recover.objective.kl is -1"]),
    ],
)
def test_a_wrong_setting_is_refused_in_python_too(section, values, expected):
    with pytest.raises(UserError) as error:
        getattr(config_module, f"{section}Config")(**values)
    assert all(part in str(error.value) for part in expected), error.value
    assert "\n" not in str(error.value)


def test_a_setting_is_held_against_its_type_when_it_changes():
    config = Config()
    with pytest.raises(UserError, match="oneshot.method"):
        config.oneshot.method = "sparse_gpt"
    with pytest.raises(UserError, match="oneshot.method"):
        dataclasses.replace(config.oneshot, method="sparse_gpt")
    assert config == Config() == copy.deepcopy(config)


def test_numbers_of_numpy_and_paths_are_taken():
    oneshot = OneshotConfig(sparsity=np.float32(0.5), block_size=np.int64(64))
    assert (oneshot.sparsity, oneshot.block_size) == (0.5, 64)
    assert config_module.ModelConfig(path=Path("a/b")).path == "a/b"


def test_every_method_has_a_solver():
    methods = get_type_hints(OneshotConfig)["method"]
    assert set(METHODS) == set(get_args(methods))


@pytest.mark.parametrize(
    "values", [("rows",), ("n:m",), ("row", 2, 4), ("n:m", 4, 2), ("2:4",), ("unstructured", 1)]
)
def test_an_unknown_pattern_is_refused_in_python_too(values):
    with pytest.raises(UserError, match="pattern"):
        Pattern(*values)


# files


def test_the_printed_settings_read_back(tmp_path, capsys):
    options = [
        "--oneshot.layers",
        '{"*.q_proj": 0.25}',
        "--recover.checkpoint.resume",
        "false",
        *HERE,
    ]
    with pytest.raises(SystemExit):
        read_config([*options, "--dry-run", "--print_config"])
    file = write(tmp_path / "printed.yaml", capsys.readouterr().out)
    assert read_config(["--config", file])[0] == read_config(options)[0]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffoneshot: {sparsity: 0.61}\n",
        "oneshot:\n  <<: {sparsity: 0.6, refit: false}\n  sparsity: 0.61\n",
        "oneshot: {sparsity: 0.61}\nevaluate:\n  # nothing yet\nmodel: null\n",
        "---\noneshot: {sparsity: 61e-2}\n...\n",
        "oneshot: {sparsity: &s 0.61, layers: {a: *s}}\n",
    ],
    ids=["byte-order mark", "merge", "empty sections", "document", "anchor"],
)
def test_yaml_that_is_right_is_taken(tmp_path, text):
    config, _, _ = read_config(["--config", write(tmp_path / "mine.yaml", text), *HERE])
    assert config.oneshot.sparsity == 0.61
    assert config.evaluate == Config().evaluate


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = "model: {path: ~/m}\nevaluate: {corpora: [c4, ~/a.txt]}\n"
    config, _, _ = read_config(
        ["--config", write(tmp_path / "mine.yaml", text), "--output_dir=~/runs/a, b"]
    )
    assert config.model.path == "/home/me/m"
    assert config.evaluate.corpora == ["c4", "/home/me/a.txt"]
    assert config.output_dir == "/home/me/runs/a, b"


# recipes of run directories


def test_a_setting_that_one_version_does_not_have_is_none_there():
    old, new = {"a": {"b": 1, "gone": None}}, {"a": {"b": 1, "added": None}}
    assert difference(old, new) is None
    assert difference(old, new | {"c": 3}) == ("c", None, 3)
    assert difference(old, {"a": {"b": 2}}) == ("a.b", 1, 2)


def test_a_path_may_be_another_where_it_names_the_same_content():
    old = {"model": {"path": "a", "dense": "x"}, "contents": {"model.path": "1"}}
    new = {"model": {"path": "b", "dense": "x"}, "contents": {"model.path": "1"}}
    assert difference(old, new) is None
    assert difference({"settings": old}, {"settings": new}) is None
    assert difference(old, new | {"contents": {"model.path": "2"}}) == ("model.path", "a", "b")
    assert difference(old, new | {"contents": {}}) == ("model.path", "a", "b")
    other = {"model": {"path": "b", "dense": "y"}, "contents": {"model.path": "1"}}
    assert difference(old, other) == ("model.dense", "x", "y")

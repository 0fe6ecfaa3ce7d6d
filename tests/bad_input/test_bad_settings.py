"""Options, recipes and files of settings."""

from __future__ import annotations

import pytest

# options

OPTIONS = {
    "unknown": (["--frobnicate", "3"], ["--frobnicate", "--help"]),
    "unknown section": (["--oneshott.zzz", "3"], ["--oneshott.zzz"]),
    "positional": (["oneshot"], ["oneshot", "--help"]),
    "without value": (["--oneshot.method"], ["--oneshot.method", "expected one argument"]),
    "misspelt": (["--oneshot.sparsty", "0.7"], ["--oneshot.sparsty", "mean --oneshot.sparsity?"]),
    "misspelt section": (["--oneshto.method", "x"], ["--oneshto.method", "mean --oneshot.method?"]),
    "misspelt nested": (["--oneshot.owl.strenght=1"], ["did you mean --oneshot.owl.strength?"]),
    "no number": (["--oneshot.sparsity", "half"], ["oneshot.sparsity", "half"]),
    "no whole number": (["--calibration.sequences", "2.5"], ["calibration.sequences", "2.5"]),
    "no truth value": (["--oneshot.refit", "perhaps"], ["oneshot.refit", "perhaps"]),
    "not a list": (["--stages", "oneshot"], ["stages", "list"]),
    "not a dict": (["--oneshot.layers", "all"], ["oneshot.layers", "all"]),
    "unknown method": (
        ["--oneshot.method", "sparsegtp"],
        ["oneshot.method", "sparsegtp", "magnitude", "wanda", "sparsegpt"],
    ),
    "unknown stage": (["--stages", "[prune]"], ["stages", "prune", "oneshot", "evaluate"]),
    "no stage": (["--stages", "[]"], ["stages is empty", "oneshot", "evaluate"]),
    "unknown budget": (
        ["--oneshot.allocation", "even"],
        ["oneshot.allocation", "even", "uniform", "owl"],
    ),
    "unknown device": (["--runtime.device", "gpu"], ["runtime.device", "gpu", "cuda"]),
    "sparsity 0": (["--oneshot.sparsity", "0"], ["oneshot.sparsity is 0;", "(0, 1)"]),
    "sparsity 1": (["--oneshot.sparsity", "1"], ["oneshot.sparsity is 1;", "(0, 1)"]),
    "sparsity 1.5": (["--oneshot.sparsity", "1.5"], ["oneshot.sparsity is 1.5;", "(0, 1)"]),
    "sparsity -1": (["--oneshot.sparsity", "-1"], ["oneshot.sparsity is -1;", "(0, 1)"]),
    "sparsity NaN": (["--oneshot.sparsity", ".nan"], ["oneshot.sparsity is nan;", "finite number"]),
    "unknown pattern": (["--oneshot.pattern", "random"], ["'random'", "unstructured, row or N:M"]),
    "three numbers": (["--oneshot.pattern", "2:4:8"], ["'2:4:8'", "unstructured, row or N:M"]),
    "empty pattern": (["--oneshot.pattern", ""], ["pattern ''", "unstructured, row or N:M"]),
    "all of four": (["--oneshot.pattern", "4:4"], ["4:4 would keep 4 of 4", "1..M-1"]),
    "none of four": (["--oneshot.pattern", "0:4"], ["0:4 would keep 0 of 4", "1..M-1"]),
    "pattern and sparsity": (
        ["--oneshot.pattern", "2:4", "--oneshot.sparsity", "0.7"],
        ["sparsity is 0.7", "2:4 fixes it at 0.5"],
    ),
    "pattern and budget": (
        ["--oneshot.pattern", "2:4", "--oneshot.allocation", "owl"],
        ["oneshot.allocation owl", "2:4"],
    ),
    "block of none": (["--oneshot.block_size", "0"], ["oneshot.block_size is 0", ">= 1"]),
    "damping 0": (["--oneshot.damping", "0"], ["oneshot.damping is 0", "(0, 1)"]),
    "OWL too strong": (
        ["--oneshot.owl.strength", "0.7"],
        ["oneshot.owl.strength is 0.7", "(0, 0.5)"],
    ),
    "OWL threshold": (["--oneshot.owl.threshold", "1"], ["oneshot.owl.threshold is 1", "> 1"]),
    "layer of 1.3": (
        ["--oneshot.layers", '{"*.q_proj": 1.3}'],
        ["oneshot.layers", "'*.q_proj'", "1.3", "[0, 1)"],
    ),
    "layer and pattern": (
        ["--oneshot.pattern", "2:4", "--oneshot.layers", '{"*.q_proj": 0.3}'],
        ["oneshot.layers", "'*.q_proj'", "0.3", "2:4 fixes it at 0.5"],
    ),
    "no sequence": (["--calibration.sequences", "0"], ["calibration.sequences is 0", ">= 1"]),
    "one token": (["--calibration.length", "1"], ["calibration.length is 1", ">= 2"]),
    "window of one": (["--evaluate.window", "1"], ["evaluate.window is 1", ">= 2"]),
    "no window": (["--evaluate.max_windows", "0"], ["evaluate.max_windows is 0", ">= 1"]),
    "a layer twice": (["--oneshot.layers", '{"a": 0.4, "a": 0.5}'], ["oneshot.layers", "unique"]),
    "an alias": (["--oneshot.layers", "*a"], ["oneshot.layers", "'*a'"]),
    "no model": (["--model.path", ""], ["model.path"]),
    "no directory": (["--output_dir", ""], ["output_dir"]),
}


@pytest.mark.parametrize(("args", "expected"), OPTIONS.values(), ids=OPTIONS.keys())
def test_a_bad_option_is_refused(refuse, args, expected):
    message = refuse(*args)
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    "args",
    [
        ["--oneshot.sparsity", "half"],
        ["--oneshot.method", "sparsegtp"],
        ["--calibration.sequences", "2.5"],
        ["--runtime.activation_gib", "lots"],
    ],
)
def test_a_wrong_value_is_explained_in_words_and_not_in_types(refuse, args):
    message = refuse(*args)
    assert args[0].removeprefix("--") in message and args[1] in message
    for word in ("<class", "typing.", "Union", "Subtypes", "Parser key"):
        assert word not in message


def test_a_misspelt_method_gets_the_near_one_suggested(refuse):
    assert "did you mean sparsegpt?" in refuse("--oneshot.method", "sparsegtp")


def test_negative_memory_is_refused(refuse):
    assert "runtime.activation_gib is -1" in refuse("--runtime.activation_gib", "-1", "--dry-run")


@pytest.mark.parametrize("stages", ["[evaluate, oneshot]", "[oneshot, oneshot]"])
def test_stages_in_an_order_that_cannot_be_kept_are_refused(refuse, stages):
    assert "stages" in refuse("--stages", stages, "--dry-run")


def test_evaluate_without_a_corpus_is_refused(refuse):
    message = refuse("--stages", "[evaluate]", "--evaluate.corpora", "[]")
    assert "evaluate.corpora" in message


# recipes and files of settings


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dmo", "mean demo?"),
        ("xyzzy-plugh", "opt-125m-50"),
        ("/nowhere/x.yaml", "neither a file nor a recipe"),
    ],
)
def test_an_unknown_recipe_is_refused(refuse, name, expected):
    message = refuse("--config", name)
    assert f"--config {name}" in message
    assert expected in message


YAML = {
    "broken": ("oneshot:\n  sparsity: [0.5\n", ["line 2"]),
    "tabs": ("oneshot:\n\tsparsity: 0.5\n", ["line 2"]),
    "no mapping": ("just text\n", ["just text"]),
    "misspelt section": ("oneshott:\n  sparsity: 0.5\n", ["oneshott", "mean oneshot?"]),
    "misspelt field": ("oneshot:\n  sparsty: 0.5\n", ["oneshot", "sparsty"]),
    "wrong type": ("oneshot:\n  sparsity: high\n", ["oneshot.sparsity", "high"]),
    "wrong value": ("oneshot:\n  sparsity: 1.5\n", ["oneshot.sparsity is 1.5", "(0, 1)"]),
    "a number as a section": ("oneshot: 3\n", ["oneshot to 3"]),
    "a list as a section": ("oneshot:\n  - sparsity: 0.5\n", ["oneshot to ["]),
    "false as a section": ("evaluate: false\n", ["evaluate to False"]),
    "a text as a nested section": ("oneshot: {owl: strong}\n", ["oneshot.owl to 'strong'"]),
    "a list": ("- oneshot\n", ["['oneshot']"]),
    "a field twice": (
        "oneshot:\n  sparsity: 0.5\n  sparsity: 0.6\n",
        ["sparsity is set twice", "line 2", "line 3"],
    ),
    "a section twice": ("oneshot: {refit: true}\noneshot: {sparsity: 0.5}\n", ["oneshot is set"]),
    "a layer twice": ("oneshot: {layers: {'a': 0.5, \"a\": 0.6}}\n", ["a is set twice"]),
    "nested deeply": ("oneshot: " + 5000 * "[" + 5000 * "]" + "\n", ["mine.yaml", "deep"]),
    "two documents": ("name: a\n---\nname: b\n", ["mine.yaml", "document"]),
    "a null byte": ('model: {tokenizer: "a\\0b"}\n', ["model.tokenizer", "null byte"]),
    "a raw null byte": ("name: a\0b\n", ["mine.yaml"]),
    "the command's own option": ("config: mine.yaml\n", ["config, which is unknown"]),
    "code": ("oneshot: !!python/object/apply:os.abort []\n", ["mine.yaml", "python"]),
    "a number as a key": ("5: 3\n", ["sets 5, which is unknown"]),
    "unquoted N:M": ("oneshot:\n  pattern: 2:4\n", ["oneshot.pattern"]),
}


@pytest.mark.parametrize(("text", "expected"), YAML.values(), ids=YAML.keys())
def test_a_bad_file_of_settings_is_refused(refuse, tmp_path, text, expected):
    (tmp_path / "mine.yaml").write_text(text)
    message = refuse("--config", tmp_path / "mine.yaml")
    for part in expected:
        assert part in message


def test_a_misspelt_field_in_a_file_gets_the_near_one_suggested(refuse, tmp_path):
    (tmp_path / "mine.yaml").write_text("oneshot:\n  sparsty: 0.5\n")
    assert "oneshot.sparsity?" in refuse("--config", tmp_path / "mine.yaml")


def test_a_broken_file_of_settings_is_named(refuse, tmp_path):
    (tmp_path / "mine.yaml").write_text("oneshot:\n  sparsity: [0.5\n")
    assert "mine.yaml" in refuse("--config", tmp_path / "mine.yaml")


def test_an_unquoted_pattern_in_a_file_is_told_to_be_quoted(refuse, tmp_path):
    (tmp_path / "mine.yaml").write_text("oneshot:\n  pattern: 2:4\n")
    assert "Quote" in refuse("--config", tmp_path / "mine.yaml")


def test_a_file_of_settings_that_is_no_text_is_refused(refuse, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\x00\xff\xfe")
    assert "mine.yaml" in refuse("--config", tmp_path / "mine.yaml")


def test_an_empty_file_of_settings_is_the_defaults(accept, tmp_path):
    (tmp_path / "mine.yaml").write_text("# nothing yet\n")
    accept("--config", tmp_path / "mine.yaml", "--dry-run")

"""All that a user can get wrong: one line that names the value and the remedy, exit code 2, no
traceback, before long work; and what was finished by then is kept.

Most cases call the entry in process (an import costs seconds); the ones about streams, signals and
ranks are real processes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cap_llm import train
from cap_llm.blockwise import oneshot as oneshot_stage
from cap_llm.blockwise import plan, prune
from cap_llm.runtime.errors import UserError
from cap_llm.solvers.hessian import factorise

DOWN_0, DOWN_1 = (f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1))
UP_0, UP_1 = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    """No hub, and the process as it was: the entry sets a signal handler and a thread count."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # tiny matrices lose time by threads
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def llama(tiny) -> Path:
    """A sound model of two blocks; not to be changed."""
    return tiny("llama")


@pytest.fixture
def broken(llama, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture(scope="session")
def scored(text_file, tmp_path_factory) -> Path:
    """Another text, for `evaluate`."""
    path = tmp_path_factory.mktemp("scored") / "scored.txt"
    path.write_text(" ".join(reversed(text_file.read_text().split()[:2000])))
    return path


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def base(llama, text_file, out) -> list[str]:
    """The options of a small sound run of the stage `oneshot`."""
    return [
        *("--model.path", str(llama), "--output_dir", str(out), "--stages", "[oneshot]"),
        *("--calibration.corpus", str(text_file), "--calibration.sequences", "4"),
        *("--calibration.length", "32"),
        *("--evaluate.window", "32", "--evaluate.max_windows", "4"),
    ]


@pytest.fixture
def call(monkeypatch, capfd):
    """Runs the entry in this process: exit code, stdout, stderr."""

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cap-llm", *map(str, args)])
        capfd.readouterr()
        code = train.main()
        streams = capfd.readouterr()
        return code, streams.out, streams.err

    return run


@pytest.fixture
def refuse(call, base, out):
    """Runs the entry with `base` and further options, which must be refused: the message."""

    def run(*args, started: bool = False) -> str:
        code, _, err = call(*base, *args)
        assert_one_line(code, err)
        if not started:
            assert not out.exists(), "something was written before the refusal"
        return err.removeprefix("cap-llm: error: ").rstrip("\n")

    return run


@pytest.fixture
def accept(call, base):
    """Runs the entry with `base` and further options, which must work: what it printed."""

    def run(*args) -> str:
        code, said, err = call(*base, *args)
        assert code == 0, err
        return said

    return run


def assert_one_line(code: int, err: str) -> None:
    assert code == 2, err
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert err.startswith("cap-llm: error: "), err
    assert "Traceback" not in err


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def finished_blocks(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "oneshot" / "blocks").glob("*.json"))


def leftovers(out: Path) -> list[str]:
    return [str(p) for p in out.rglob("*") if p.name.endswith(".tmp") or "scratch" in p.name]


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
    "not a dict": (["--oneshot.layers", "all"], ["oneshot.layers", "all", "names with numbers"]),
    "unknown method": (
        ["--oneshot.method", "sparsegtp"],
        ["oneshot.method", "sparsegtp", "magnitude", "wanda", "sparsegpt"],
    ),
    "unknown stage": (["--stages", "[prune]"], ["stages", "prune", "oneshot", "evaluate"]),
    "no stage": (["--stages", "[]"], ["stages is empty", "oneshot", "evaluate"]),
    "unknown budget": (["--oneshot.budget", "even"], ["oneshot.budget", "even", "uniform", "owl"]),
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
        ["sparsity is 0.7", "2:4 fixes it at 0.5", "leave sparsity out"],
    ),
    "pattern and budget": (
        ["--oneshot.pattern", "2:4", "--oneshot.budget", "owl"],
        ["oneshot.budget owl", "2:4", "use budget uniform"],
    ),
    "block of none": (["--oneshot.block_size", "0"], ["oneshot.block_size is 0", "at least 1"]),
    "damping 0": (["--oneshot.damping", "0"], ["oneshot.damping is 0", "(0, 1)"]),
    "OWL too strong": (
        ["--oneshot.owl.strength", "0.7"],
        ["oneshot.owl.strength is 0.7", "(0, 0.5)"],
    ),
    "OWL threshold": (["--oneshot.owl.threshold", "1"], ["oneshot.owl.threshold is 1", "above 1"]),
    "layer of 1.3": (
        ["--oneshot.layers", '{"*.q_proj": 1.3}'],
        ["oneshot.layers", "'*.q_proj'", "1.3", "[0, 1)"],
    ),
    "layer and pattern": (
        ["--oneshot.pattern", "2:4", "--oneshot.layers", '{"*.q_proj": 0.3}'],
        ["oneshot.layers", "'*.q_proj'", "0.3", "2:4 fixes it at 0.5"],
    ),
    "no sequence": (["--calibration.sequences", "0"], ["calibration.sequences is 0", "at least 1"]),
    "one token": (["--calibration.length", "1"], ["calibration.length is 1", "at least 2"]),
    "window of one": (["--evaluate.window", "1"], ["evaluate.window is 1", "at least 2"]),
    "no window": (["--evaluate.max_windows", "0"], ["evaluate.max_windows is 0", "at least 1"]),
    "no model": (["--model.path", ""], ["no model", "--model.path"]),
    "no directory": (["--output_dir", ""], ["no run directory", "--output_dir"]),
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
    assert "evaluate.corpora is empty" in message


# recipes and files of settings


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dmo", "did you mean demo?"),
        ("xyzzy-plugh", "recipes: "),
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
    assert "quote" in refuse("--config", tmp_path / "mine.yaml")


def test_a_file_of_settings_that_is_no_text_is_refused(refuse, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\x00\xff\xfe")
    assert "mine.yaml" in refuse("--config", tmp_path / "mine.yaml")


def test_an_empty_file_of_settings_is_the_defaults(accept, tmp_path):
    (tmp_path / "mine.yaml").write_text("# nothing yet\n")
    accept("--config", tmp_path / "mine.yaml", "--dry-run")


# the model


def test_an_unknown_model_directory_is_refused_with_the_near_one(refuse, llama):
    wrong = str(llama)[:-1] + "x"
    message = refuse("--model.path", wrong)
    assert f"model.path {wrong} is not a directory" in message
    assert "did you mean " in message


def test_a_file_as_a_model_is_not_offered_itself(refuse, text_file):
    message = refuse("--model.path", text_file)
    assert str(text_file) in message
    assert "did you mean" not in message


def test_a_hub_name_with_the_hub_switched_off_is_refused(refuse):
    message = refuse("--model.path", "nobody/no-model")
    assert "'nobody/no-model' is neither a directory" in message
    assert "HF_HUB_OFFLINE" in message


def test_a_directory_without_a_configuration_is_refused(refuse, broken):
    (broken / "config.json").unlink()
    assert f"{broken} is no model directory: it has no config.json" in refuse(
        "--model.path", broken
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": ', "is not valid JSON"),
        ("{}", "cannot read"),
        ('{"model_type": "martian"}', "martian"),
        pytest.param("[]", "config.json"),
    ],
)
def test_a_configuration_that_is_none_is_refused(refuse, broken, text, expected):
    (broken / "config.json").write_text(text)
    message = refuse("--model.path", broken)
    assert str(broken / "config.json") in message
    assert expected in message


def test_a_configuration_that_contradicts_itself_is_refused(refuse, broken):
    change_config(broken, num_attention_heads=5)
    assert "5" in refuse("--model.path", broken)


def test_weights_and_configuration_of_different_models_are_refused(refuse, broken):
    change_config(broken, hidden_size=48)
    message = refuse("--model.path", broken, started=True)
    assert "model.embed_tokens.weight" in message
    assert "[512, 32]" in message and "[512, 48]" in message


def test_weights_that_lack_a_block_are_refused(refuse, broken):
    change_config(broken, num_hidden_layers=3)
    assert "model.layers.2" in refuse("--model.path", broken, started=True)


def test_a_quantised_model_is_refused(refuse, broken):
    change_config(broken, quantization_config={"quant_method": "gptq", "bits": 4})
    message = refuse("--model.path", broken)
    assert "quantised (gptq)" in message and "unquantised" in message


def test_weights_stored_as_integers_are_refused(refuse, broken):
    change_weights(broken, lambda t: t.update({DOWN_1: t[DOWN_1].to(torch.int8)}))
    message = refuse("--model.path", broken, started=True)
    assert DOWN_1 in message and "I8" in message and "float32" in message


def test_a_model_with_fused_experts_is_refused_by_the_modules_name(refuse, tokenizer, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 64, "num_local_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = MixtralConfig(vocab_size=512, max_position_embeddings=256, **small, **heads)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    tokenizer.save_pretrained(tmp_path / "mixtral")
    message = refuse("--model.path", tmp_path / "mixtral")
    assert "model.layers.0.mlp." in message
    assert "no linear layer" in message and "fused experts" in message


def test_blocks_without_linears_are_refused():
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)

    class NoLinears(PreTrainedModel):
        config_class = PreTrainedConfig
        _no_split_modules = ["Block"]

        def __init__(self, config):
            super().__init__(config)
            self.layers = nn.ModuleList([Block(), Block()])
            self.post_init()

    with pytest.raises(UserError, match="blocks layers of NoLinears hold no linear layer"):
        prune.prune(NoLinears(PreTrainedConfig()), None)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "silly"},
        {"architectures": ["BertForMaskedLM"]},
        {"architectures": ["AutoModel"]},
        {"max_position_embeddings": "many"},
        {"num_attention_heads": 5},
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(refuse, broken, change):
    facts = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(facts | change))
    assert f"cannot read {broken}/config.json: " in refuse("--model.path", broken)


def test_weights_that_changed_since_a_run_was_begun_are_refused(refuse, accept, broken):
    accept("--model.path", broken)
    flip_a_byte(broken / "model.safetensors")
    message = refuse("--model.path", broken, started=True)
    assert f"the weights in {broken} have changed since" in message
    flip_a_byte(broken / "model.safetensors")
    accept("--model.path", broken)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_dry_run_sees_a_mask_that_would_have_to_shrink(refuse, accept, broken, out, tmp_path):
    accept("--model.path", broken, "--oneshot.sparsity", "0.6")
    again = ["--model.path", out / "oneshot", "--output_dir", tmp_path / "again", "--dry-run"]
    message = refuse(*again, started=True)
    assert "60.0 % zeros already and 50 % are asked for; masks only grow" in message


def test_a_dry_run_predicts_what_a_model_in_bin_takes(accept, broken):
    import torch
    from safetensors.torch import load_file

    said = accept("--model.path", broken, "--dry-run")
    stored = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    torch.save(stored, broken / "pytorch_model.bin")
    converted = accept("--model.path", broken, "--dry-run")
    assert "rewritten once" in converted and "estimate: memory" in converted and ", time" in said


def test_a_truncated_shard_is_refused(refuse, broken):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    message = refuse("--model.path", broken)
    assert f"{file} is truncated or corrupt" in message and "again" in message


def test_an_empty_shard_is_refused(refuse, broken):
    (broken / "model.safetensors").write_bytes(b"")
    assert "model.safetensors is truncated or corrupt" in refuse("--model.path", broken)


def test_a_directory_without_weights_is_refused(refuse, broken):
    (broken / "model.safetensors").unlink()
    assert "model.safetensors" in refuse("--model.path", broken, started=True)


def shard(folder: Path) -> dict[str, str]:
    """Splits a model's file in two; the map of the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first = {k: v for k, v in tensors.items() if ".1." not in k}
    second = {k: v for k, v in tensors.items() if ".1." in k}
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, part in zip(names, (first, second), strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    weight_map = {k: names[k in second] for k in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def test_a_missing_shard_is_refused(refuse, broken):
    shard(broken)
    (broken / "model-00002-of-00002.safetensors").unlink()
    message = refuse("--model.path", broken)
    assert "model-00002-of-00002.safetensors does not exist" in message
    assert "not complete" in message


def test_an_index_that_is_no_json_is_refused(refuse, broken):
    shard(broken)
    (broken / "model.safetensors.index.json").write_text("[1")
    message = refuse("--model.path", broken)
    assert "model.safetensors.index.json cannot be read as JSON" in message


def test_an_index_that_leaves_a_shard_out_is_refused_by_the_missing_tensor(refuse, broken):
    kept = {k: v for k, v in shard(broken).items() if ".1." not in k}
    index = {"weight_map": kept}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.layers.1." in refuse("--model.path", broken, started=True)


def test_a_matrix_that_the_pattern_does_not_divide_is_named(refuse, tiny):
    odd = tiny("llama", intermediate_size=66)
    message = refuse("--model.path", odd, "--oneshot.pattern", "2:4")
    assert "model.layers.0.mlp.down_proj.weight [32, 66]" in message
    assert "66 inputs are no multiple of 4" in message and "--oneshot.layers" in message


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ('{"*.nothing": 0.3}', ["'*.nothing'", "matches no", "model.layers.0.self_attn.q_proj"]),
        ('{"*": 0}', ["leaves every matrix dense"]),
    ],
)
def test_layers_that_name_nothing_are_refused(refuse, layers, expected):
    message = refuse("--oneshot.layers", layers)
    for part in expected:
        assert part in message


# tokenizers


def test_a_model_without_a_tokenizer_is_refused(refuse, broken):
    for file in broken.glob("token*"):
        file.unlink()
    message = refuse("--model.path", broken)
    assert f"no tokenizer can be read from {broken}" in message
    assert "--model.tokenizer" in message


def test_a_tokenizer_directory_that_is_not_there_is_said_not_to_exist(refuse):
    message = refuse("--model.tokenizer", "/nowhere/tokenizer")
    assert "Repo id" not in message
    assert "/nowhere/tokenizer" in message


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        pytest.param("tokenizer.json", "{}"),
        ("tokenizer.model", "no pieces"),
    ],
)
def test_a_broken_tokenizer_is_refused(refuse, broken, file, text):
    (broken / "tokenizer.json").unlink()
    (broken / file).write_text(text)
    assert str(broken) in refuse("--model.path", broken)


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(refuse, tiny):
    message = refuse("--model.path", tiny("llama", vocab_size=300))
    assert "512 entries but the model 300" in message and "--model.tokenizer" in message


def test_lengths_beyond_the_models_positions_are_refused(refuse, scored):
    message = refuse("--calibration.length", "257")
    assert "calibration.length is 257" in message and "--calibration.length 256" in message
    stages = ["--stages", "[oneshot, evaluate]", "--evaluate.corpora", f"[{scored}]"]
    message = refuse(*stages, "--evaluate.window", "257")
    assert "evaluate.window is 257" in message and "--evaluate.window 256" in message


def test_positions_that_the_padding_takes_are_not_the_models(refuse, accept, tmp_path, broken):
    """RoBERTa numbers its positions from pad_token_id + 1 on."""
    import transformers

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.RobertaConfig(
        **size, intermediate_size=64, vocab_size=512, max_position_embeddings=34, pad_token_id=1
    )
    folder = tmp_path / "roberta"
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((broken / name).read_bytes())
    message = refuse("--model.path", folder, "--calibration.length", "33")
    assert "--calibration.length 32 or less" in message
    accept("--model.path", folder)  # 32


@pytest.mark.parametrize("stages", ["[evaluate]", "[oneshot, evaluate]"])
def test_an_encoder_has_no_perplexity(refuse, tiny, scored, stages):
    corpora = ["--evaluate.corpora", f"[{scored}]"]
    message = refuse("--model.path", tiny("bert"), "--stages", stages, *corpora)
    assert "BertForMaskedLM gives no next-token logits" in message
    if "oneshot" in stages:
        assert "--stages [oneshot]" in message


# corpora

BAD_CORPORA = {
    "empty": ("a.txt", b"", ["a.txt", "holds no text"]),
    "blank": ("a.txt", b" \n\n \n", ["a.txt", "holds no text"]),
    "no lines": ("a.jsonl", b"", ["a.jsonl", "holds no text"]),
    "short": ("a.txt", b"a few words", ["a.txt", "longer than 32 tokens", "--calibration.length"]),
    "no text": ("a.txt", b"\xff\xfe\x00", ["a.txt", "cannot be read as .txt"]),
    "no gzip": ("a.txt.gz", b"plain", ["a.txt.gz", "cannot be read"]),
    "no json": (
        "a.jsonl",
        b'{"text": "a"}\n{"text":\n',
        ["a.jsonl, line 2", "JSON object"],
    ),
    "no field": ("a.jsonl", b'{"txt": "a"}\n', ["a.jsonl", "text"]),
    "no parquet": ("a.parquet", b"PAR1", ["a.parquet", "cannot be read as .parquet"]),
}


@pytest.mark.parametrize(("name", "body", "expected"), BAD_CORPORA.values(), ids=BAD_CORPORA.keys())
def test_a_bad_calibration_corpus_is_refused(refuse, out, tmp_path, name, body, expected):
    (tmp_path / name).write_bytes(body)
    message = refuse("--calibration.corpus", tmp_path / name, started=True)
    for part in expected:
        assert part in message
    assert not finished_blocks(out)


@pytest.mark.parametrize("line", ['["text"]', '"text"', '{"text": 3}', '{"text": null}'])
def test_a_line_of_another_shape_is_refused(refuse, tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    assert "a.jsonl" in refuse("--calibration.corpus", tmp_path / "a.jsonl", started=True)


def test_a_malformed_line_is_named_by_its_number(refuse, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text":\n')
    assert "line 3" in refuse("--calibration.corpus", tmp_path / "a.jsonl", started=True)


def test_a_parquet_file_without_the_column_is_refused_in_one_line(refuse, tmp_path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"txt": ["a"]}), tmp_path / "a.parquet")
    assert "text" in refuse("--calibration.corpus", tmp_path / "a.parquet", started=True)


@pytest.mark.parametrize("corpus", ["/nowhere/text.txt", "c5"])
def test_a_missing_corpus_is_refused(refuse, corpus):
    assert f"corpus '{corpus}' is neither a file nor one of c4" in refuse(
        "--calibration.corpus", corpus
    )
    message = refuse("--stages", "[oneshot, evaluate]", "--evaluate.corpora", f"[{corpus}]")
    assert f"corpus '{corpus}' is neither a file nor one of c4" in message


def test_a_corpus_that_only_the_hub_has_is_refused_when_it_is_off(refuse, monkeypatch):
    monkeypatch.delenv("CAP_LLM_DATA", raising=False)
    message = refuse("--calibration.corpus", "c4")
    assert "corpus 'c4' (train)" in message
    assert "CAP_LLM_DATA" in message and "HF_HUB_OFFLINE" in message


def test_the_remedy_for_a_scored_corpus_names_the_right_option(refuse, monkeypatch):
    monkeypatch.delenv("CAP_LLM_DATA", raising=False)
    message = refuse("--stages", "[evaluate]", "--evaluate.corpora", "[ptb]")
    assert "corpus 'ptb' (test)" in message
    assert "--evaluate.corpora" in message


def test_calibrating_on_the_scored_corpus_is_refused_unless_allowed(refuse, accept, text_file):
    stages = ["--stages", "[oneshot, evaluate]", "--evaluate.corpora", f"[{text_file}]"]
    message = refuse(*stages)
    assert str(text_file) in message and "--calibration.allow_scored_corpus true" in message
    accept(*stages, "--calibration.allow_scored_corpus", "true", "--dry-run")


def test_a_text_shorter_than_a_window_is_refused(refuse, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    corpora = ["--evaluate.corpora", f"[{tmp_path / 'short.txt'}]"]
    message = refuse("--stages", "[evaluate]", *corpora, started=True)
    assert "short.txt has" in message
    assert "fewer than one window of 32" in message and "--evaluate.window" in message


@pytest.mark.parametrize("text", ["a few words", "", "\ufeff"])
def test_a_text_that_cannot_be_scored_is_refused_before_the_pruning(refuse, out, tmp_path, text):
    (tmp_path / "short.txt").write_text(text)
    stages = ["--stages", "[oneshot, evaluate]"]
    refuse(*stages, "--evaluate.corpora", f"[{tmp_path / 'short.txt'}]", started=True)
    assert not (out / "oneshot").exists()


def test_two_texts_of_one_name_are_refused(refuse, scored, tmp_path):
    (tmp_path / "scored.txt").write_text(scored.read_text()[::-1])
    corpora = f"[{scored}, {tmp_path / 'scored.txt'}]"
    message = refuse("--stages", "[evaluate]", "--evaluate.corpora", corpora)
    assert "two files called scored.txt" in message and "rename" in message


def test_a_changed_text_of_the_same_name_is_scored_anew(accept, out, scored, tmp_path):
    figures, path = [], tmp_path / "mine.txt"
    for text in (scored.read_text(), scored.read_text()[::-1]):
        path.write_text(text)
        accept("--stages", "[evaluate]", "--evaluate.corpora", f"[{path}]")
        (entry,) = json.loads((out / "dense" / "perplexity.json").read_text())["corpora"].values()
        figures.append(entry["ppl_token"])
    assert figures[0] != figures[1]


@pytest.mark.parametrize(
    ("name", "trouble"),
    [("corpus.csv", "of an unknown kind: give .txt"), ("corpus.json", "line 1: not a JSON object")],
)
def test_a_file_that_is_no_text_is_not_read_as_one(refuse, tmp_path, name, trouble):
    path = tmp_path / name
    path.write_text('["a list", "of texts"]\n' * 2000)
    assert trouble in refuse("--calibration.corpus", path)


@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_a_number_that_is_none_is_refused(refuse, value):
    assert "runtime.activation_gib is" in refuse("--runtime.activation_gib", value)


@pytest.mark.parametrize(
    ("share", "which"), [("1e-9", "no weight"), ("0.999999999", "every weight")]
)
def test_a_sparsity_of_nothing_or_all_is_refused(refuse, share, which):
    assert f"removes {which} of" in refuse("--oneshot.sparsity", share)


# the run directory


def test_a_directory_of_other_files_is_refused(refuse, out):
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    message = refuse(started=True)
    assert f"output_dir {out} holds other files (thesis.tex" in message
    assert "choose a new directory" in message
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_a_file_as_the_run_directory_is_refused(refuse, out):
    out.write_text("a file")
    assert f"output_dir {out} is a file" in refuse(started=True)
    assert f"output_dir {out} is a file" in refuse("--dry-run", started=True)
    assert out.read_text() == "a file"


def test_a_dry_run_refuses_the_directory_of_another_run(accept, refuse, out):
    accept()
    message = refuse("--oneshot.sparsity", "0.6", "--dry-run", started=True)
    assert "oneshot.sparsity was 0.5 there and is 0.6 now" in message


@pytest.mark.parametrize(
    ("args", "field", "was", "now"),
    [
        (["--oneshot.sparsity", "0.6"], "oneshot.sparsity", "0.5", "0.6"),
        (["--oneshot.method", "wanda"], "oneshot.method", "'sparsegpt'", "'wanda'"),
        (["--calibration.seed", "3"], "calibration.seed", "0", "3"),
        (["--oneshot.layers", '{"*.q_proj": 0}'], "oneshot.layers.*.q_proj", "None", "0"),
    ],
)
def test_a_directory_of_another_run_is_refused(accept, refuse, out, args, field, was, now):
    accept()
    before = (out / "oneshot" / "recipe.json").read_text()
    message = refuse(*args, started=True)
    assert f"holds another run: {field} was {was} there and is {now}" in message
    assert "output_dir" in message
    assert (out / "oneshot" / "recipe.json").read_text() == before


def test_a_refused_run_leaves_the_settings_of_the_finished_one(accept, refuse, out):
    accept()
    before = (out / "config.yaml").read_text()
    refuse("--oneshot.sparsity", "0.6", started=True)
    assert (out / "config.yaml").read_text() == before


def test_a_directory_of_another_dense_model_is_refused(accept, refuse, tiny, scored):
    stage = ["--stages", "[evaluate]", "--evaluate.corpora", f"[{scored}]"]
    accept(*stage)
    assert "model" in refuse(*stage, "--model.path", tiny("llama", seed=1), started=True)


def test_a_directory_with_another_models_conversion_is_refused(
    accept, refuse, llama, scored, tmp_path
):
    for i in (1, 2):
        folder = Path(shutil.copytree(llama, tmp_path / f"bin{i}"))
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save({k: v * i for k, v in tensors.items()}, folder / "pytorch_model.bin")
    stage = ["--stages", "[evaluate]", "--evaluate.corpora", f"[{scored}]"]
    accept(*stage, "--model.path", tmp_path / "bin1")
    other = ["--model.path", tmp_path / "bin2", "--evaluate.window", "64"]
    assert "bin1" in refuse(*stage, *other, started=True)


def test_a_directory_in_use_is_refused(refuse, accept, out):
    accept()
    with open(out / "run.lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        message = refuse(started=True)
    assert f"output_dir {out} is in use by another job" in message
    assert "wait" in message
    assert "done already" in accept()  # the lock goes with its holder


def test_a_mask_only_grows(accept, refuse, out, tmp_path):
    accept()
    args = ["--model.path", out / "oneshot", "--oneshot.sparsity", "0.3"]
    for source in ("auto", "zeros"):
        attempt = ["--output_dir", tmp_path / source, "--oneshot.earlier_mask", source]
        message = refuse(*args, *attempt, started=True)
        assert "model.layers.0.self_attn.q_proj.weight is 50.0 % zeros already" in message
        assert "30 %" in message and "--oneshot.earlier_mask ignore" in message
    accept(*args, "--output_dir", tmp_path / "third", "--oneshot.earlier_mask", "ignore")


def test_the_remedy_for_a_short_text_works_in_the_same_directory(refuse, accept, tmp_path):
    (tmp_path / "short.txt").write_text("a few words of text")
    corpus = ["--calibration.corpus", tmp_path / "short.txt"]
    assert "lower --calibration.length" in refuse(*corpus, started=True)
    accept(*corpus, "--calibration.length", "6")


def test_the_remedy_for_an_earlier_mask_works_in_the_same_directory(accept, refuse, out, tmp_path):
    accept()
    args = ["--model.path", out / "oneshot", "--oneshot.sparsity", "0.3"]
    args += ["--output_dir", tmp_path / "second"]
    assert "set --oneshot.earlier_mask ignore" in refuse(*args, started=True)
    accept(*args, "--oneshot.earlier_mask", "ignore")


def test_too_little_disk_is_refused_before_the_work(refuse, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda place: usage)
    message = refuse()
    assert "needs" in message and "are free" in message and "output_dir" in message


# what shows only during the work; finished blocks are kept


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named_and_the_block_before_is_kept(
    refuse, broken, out, value
):
    change_weights(broken, lambda t: t[DOWN_1].__setitem__((3, 5), value))
    message = refuse("--model.path", broken, started=True)
    assert DOWN_1 in message and "NaN or infinite" in message and "model.safetensors" in message
    assert finished_blocks(out) == ["00000.json"]
    assert not leftovers(out)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
@pytest.mark.parametrize(("weight", "kept"), [(UP_0, []), (UP_1, ["00000.json"])])
def test_activations_that_overflow_are_named_and_finished_blocks_are_kept(
    refuse, broken, out, method, weight, kept
):
    change_weights(broken, lambda t: t[weight].fill_(1e30))
    message = refuse("--model.path", broken, "--oneshot.method", method, started=True)
    assert f"the input of {weight.replace('up_proj.weight', 'down_proj')} is not finite" in message
    assert "overflows" in message and "bfloat16 or float32" in message
    assert finished_blocks(out) == kept
    assert not leftovers(out)


def test_a_hessian_that_no_damping_mends_is_named():
    indefinite = torch.tensor([[1.0, 100.0], [100.0, 1.0]])
    with pytest.raises(UserError, match=r"Hessian of blocks\.3\.fc1.*damping 10:.*sequences"):
        factorise(indefinite, 0.01, "blocks.3.fc1")


def test_a_hessian_that_fails_in_a_later_block_keeps_the_finished_ones(
    refuse, accept, out, monkeypatch
):
    def spoilt(hessian, damping, name):
        if "layers.1." in name:
            far = 1e6 * hessian.diagonal().mean()
            hessian[0, 1] = hessian[1, 0] = far  # no longer a matrix of second moments
        return factorise(hessian, damping, name)

    with monkeypatch.context() as patch:
        patch.setattr(prune, "factorise", spoilt)
        message = refuse(started=True)
    assert "the Hessian of model.layers.1.self_attn.q_proj is not positive definite" in message
    assert "--calibration.sequences" in message
    assert finished_blocks(out) == ["00000.json"]
    assert "going on at block 2 of 2" in accept()


def test_a_model_whose_perplexity_overflows_is_refused(refuse, broken, scored):
    change_weights(broken, lambda t: t["lm_head.weight"].fill_(1e38))
    stage = ["--stages", "[evaluate]", "--evaluate.corpora", f"[{scored}]"]
    message = refuse("--model.path", broken, *stage, started=True)
    assert f"perplexity of {broken} is not finite" in message and "overflows" in message


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of its own size, which can be full."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def grow(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=8m", str(place)], check=True)


@pytest.fixture
def six_blocks(tiny) -> Path:
    """Blocks of 120 kB each."""
    return tiny("llama", num_hidden_layers=6, intermediate_size=256)


def test_a_full_disk_is_named_and_the_same_command_goes_on(
    refuse, accept, six_blocks, small_disk, monkeypatch
):
    run = small_disk / "run"
    args = ["--model.path", six_blocks, "--output_dir", run]
    monkeypatch.setattr(plan, "_check_disk", lambda needed, config: None)
    message = refuse(*args, started=True)
    assert f"the disk of {run / 'oneshot'}" in message and "is full" in message
    assert "free some space and give the same command again" in message
    kept = finished_blocks(run)
    assert 1 <= len(kept) < 6
    assert not leftovers(run)
    grow(small_disk)
    assert f"going on at block {len(kept) + 1} of 6" in accept(*args)
    assert (run / "oneshot" / "done.json").exists()


def test_a_disk_that_is_full_from_the_start_is_named_and_can_be_freed(
    refuse, accept, small_disk, monkeypatch
):
    run = small_disk / "run"
    monkeypatch.setattr(plan, "_check_disk", lambda needed, config: None)
    with pytest.raises(OSError) as full, open(small_disk / "ballast", "wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    assert full.value.errno == errno.ENOSPC
    message = refuse("--output_dir", run, started=True)
    assert "is full" in message
    (small_disk / "ballast").unlink()
    accept("--output_dir", run)


# real processes


def test_a_bad_option_is_one_line_of_a_real_process_too(command):
    result = command("--oneshot.sparsty", "0.7")
    assert_one_line(result.returncode, result.stderr)
    assert "did you mean --oneshot.sparsity?" in result.stderr
    assert result.stdout == ""


def test_a_failure_during_the_work_is_one_line_of_a_real_process_too(command, base, broken, out):
    change_weights(broken, lambda t: t[DOWN_1].fill_(float("nan")))
    result = command(*base, "--model.path", broken)
    assert_one_line(result.returncode, result.stderr)
    assert DOWN_1 in result.stderr
    assert "block   1/2" in result.stdout
    assert finished_blocks(out) == ["00000.json"]


def test_more_ranks_than_sequences_are_refused(base, out):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    result = subprocess.run(
        [sys.executable, *launcher, train.__file__, *base, "--calibration.sequences", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("cap-llm: error: ")]
    assert len(said) == 1
    assert "calibration.sequences is 1, fewer than the 2 ranks" in said[0]
    assert "at least one sequence a rank" in said[0]
    assert not finished_blocks(out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_job_says_how_to_go_on_and_does(base, command, out, tiny, number, code):
    args = [*base, "--model.path", str(tiny("llama", num_hidden_layers=40))]
    with subprocess.Popen(
        [sys.executable, train.__file__, *args],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        for line in job.stdout:
            if line.startswith("block   3/40"):
                job.send_signal(number)
                break
        _, err = job.communicate(timeout=60)
    assert job.returncode == code
    assert err == "cap-llm: stopped; give the same command again to go on\n"
    kept = len(finished_blocks(out))
    assert 3 <= kept < 40
    assert not leftovers(out)
    if number == signal.SIGTERM:
        again = command(*args)
        assert again.returncode == 0, again.stderr
        assert f"going on at block {kept + 1} of 40" in again.stdout
        assert (out / oneshot_stage.STAGE / "done.json").exists()

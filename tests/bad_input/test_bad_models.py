"""Model directories and tokenizers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from damage import DOWN_1, change_config, change_weights
from safetensors.torch import load_file, save_file

from cap_llm.blockwise import prune, stage
from cap_llm.config import ModelConfig
from cap_llm.models.hub import locate
from cap_llm.models.mask_file import FILE, save_masks
from cap_llm.runtime.errors import UserError

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
    assert "model.path 'nobody/no-model'" in message
    assert "HF_HUB_OFFLINE" in message


def test_a_directory_without_a_configuration_is_refused(refuse, broken):
    (broken / "config.json").unlink()
    message = refuse("--model.path", broken)
    assert str(broken) in message and "config.json" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": ', "cannot be read as JSON"),
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
    assert "quantized (gptq)" in message


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
    assert "fused experts" in message


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

    with pytest.raises(UserError, match="blocks layers of NoLinears"):
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
    assert f"{broken}/config.json" in refuse("--model.path", broken)


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
    assert "safetensors" in converted and "estimate: memory" in converted and ", time" in said


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
    assert "incomplete" in message


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
    assert "66 inputs" in message and "--oneshot.layers" in message


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
    assert str(broken) in message and "--model.tokenizer" in message


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
    assert "512" in message and "300" in message and "--model.tokenizer" in message


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
    assert "BertForMaskedLM" in message and "next-token logits" in message
    if "oneshot" in stages:
        assert "--stages [oneshot]" in message


# files of a model directory that are none, or lie elsewhere


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/other.safetensors", "in/it.safetensors", "vocab.txt", "..", "a\0.b"]
    + ["x" * 300 + ".safetensors"],
)
def test_an_index_that_names_no_file_of_its_directory_is_refused(refuse, broken, name):
    weight_map = shard(broken)
    (broken.parent / "other.safetensors").write_bytes(b"secret")
    index = {"metadata": {}, "weight_map": {**weight_map, DOWN_1: name}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert str(broken) in refuse("--model.path", broken)


@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"weight_map": 3}', "[" * 100_000])
@pytest.mark.parametrize("file", ["model.safetensors.index.json", "config.json"])
def test_json_of_another_form_is_refused_by_its_file(refuse, broken, file, content):
    shard(broken)
    (broken / file).write_text(content)
    assert f"{broken}/{file}" in refuse("--model.path", broken)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "notes.txt"])
def test_a_pipe_is_not_read(refuse, broken, file):
    (broken / file).unlink(missing_ok=True)
    os.mkfifo(broken / file)
    assert f"{broken / file}" in refuse("--model.path", broken)


def test_a_shard_that_is_a_pipe_is_not_read(refuse, broken):
    file = broken / shard(broken)[DOWN_1]
    file.unlink()
    os.mkfifo(file)
    assert f"{file} is not a regular file" in refuse("--model.path", broken)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_may_not_be_read_is_named(refuse, broken, monkeypatch, file):
    access = os.access
    may = lambda path, mode: Path(path).name != file and access(path, mode)  # noqa: E731
    monkeypatch.setattr(os, "access", may)
    assert f"{broken / file} cannot be read: Permission denied" in refuse("--model.path", broken)


@pytest.mark.parametrize("path", ["x" * 300, "./" + "x" * 5000, "a/../" * 2000])
@pytest.mark.parametrize("option", ["model.path", "model.tokenizer", "model.dense"])
def test_a_name_that_is_too_long_is_refused(refuse, option, path):
    assert path[:200] in refuse(f"--{option}", path)


def test_a_null_byte_in_a_path_is_refused():
    with pytest.raises(UserError, match=r"model.path"):
        locate(ModelConfig(path="./a\0b"))


@pytest.mark.parametrize("file", ["notes.txt", "generation_config.json", "chat_template.jinja"])
def test_a_link_out_of_the_directory_is_not_followed(refuse, broken, file):
    secret = broken.parent / "secret"
    secret.write_text("{}")
    (broken / file).unlink(missing_ok=True)
    (broken / file).symlink_to(secret)
    message = refuse("--model.path", broken)
    assert str(broken / file) in message and str(secret) in message
    secret.unlink()
    assert f"{broken / file} does not exist" in refuse("--model.path", broken)


def test_links_inside_the_directory_and_of_the_hubs_cache_are_followed(accept, broken, out):
    cache = broken.parent / "models--one--model"
    snapshot, blobs = cache / "snapshots" / "revision", cache / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for i, file in enumerate(broken.iterdir()):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    (snapshot / "notes.txt").symlink_to("config.json")
    (snapshot / "checkpoints.txt").mkdir()
    accept("--model.path", snapshot)
    copied = out / "oneshot" / "tokenizer.json"
    assert not copied.is_symlink()
    assert copied.read_bytes() == (snapshot / "tokenizer.json").read_bytes()


# compressed-tensors


@pytest.mark.parametrize(
    "marks",
    [
        {"quant_method": "compressed-tensors", "format": "dense"},
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
    ],
)
def test_plain_weights_that_compressed_tensors_marks_are_read(accept, broken, out, marks):
    change_config(broken, quantization_config=marks)
    accept("--model.path", broken)
    assert "quantization_config" not in json.loads((out / "oneshot" / "config.json").read_text())


@pytest.mark.parametrize("end", ["_packed", ".compressed", ".bitmask"])
@pytest.mark.parametrize("marks", [{}, {"quant_method": "compressed-tensors", "format": "dense"}])
def test_compressed_weights_are_refused_by_what_they_are(refuse, broken, end, marks):
    change_config(broken, quantization_config=marks)
    change_weights(broken, lambda t: t.update({DOWN_1 + end: t.pop(DOWN_1).to(torch.int32)}))
    message = refuse("--model.path", broken)
    assert DOWN_1 + end in message and "compressed" in message


# what a run has written


@pytest.mark.parametrize("damage", ["truncated", "changed", "masks"])
def test_a_file_of_a_finished_stage_that_changed_is_noticed(accept, refuse, out, damage):
    accept()
    shards = sorted((out / "oneshot").glob("model-*.safetensors"))
    file = out / "oneshot" / FILE if damage == "masks" else shards[1]
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        flip_a_byte(file)
    assert str(file) in refuse(started=True)


def test_a_finished_block_that_changed_is_made_again(accept, out, monkeypatch):
    accept()
    good = (out / "oneshot" / FILE).read_bytes()
    shutil.rmtree(out)
    with monkeypatch.context() as patch:
        patch.setattr(stage.BlockStage, "finish", lambda self, label, **facts: self.result)
        accept()
    shard = sorted((out / "oneshot").glob("model-*.safetensors"))[0]
    flip_a_byte(shard)
    assert f"{shard.name} has changed since it was written: block" in "".join(accept().split("\n"))
    assert (out / "oneshot" / FILE).read_bytes() == good


RECORDS = {
    "sparsity.json": ["{}", "[]", '{"rows": 3}', '{"rows": [{}]}', "[" * 100_000],
    "done.json": ["{}", "[]", '{"environment": {}, "files": 3}'],
    "recipe.json": ["3", "[1]"],
    "calibration.json": ["[]"],
}


def test_records_of_another_form_are_refused_by_their_file(accept, refuse, out):
    accept()
    for file, contents in RECORDS.items():
        path = out / "oneshot" / file
        before = path.read_text()
        again = ["--model.path", out / "oneshot", "--output_dir", out.with_name("again")]
        for content in contents:
            path.write_text(content)
            message = refuse(*(again if file == "sparsity.json" else ()), started=True)
            assert str(path) in message
        path.write_text(before)


@pytest.mark.parametrize("content", ["{}", '{"rows": [{}], "elapsed": 1}', '{"rows": []}'])
def test_a_block_without_its_record_is_refused(accept, refuse, out, monkeypatch, content):
    with monkeypatch.context() as patch:
        patch.setattr(stage.BlockStage, "finish", lambda self, label, **facts: self.result)
        accept()
    file = out / "oneshot" / "blocks" / "00000.json"
    file.write_text(content)
    assert str(file) in refuse(started=True)


def test_masks_of_another_model_are_refused(refuse, broken):
    save_masks({"model.layers.7.mlp.up_proj.weight": torch.ones(2, 8) > 0}, broken / FILE)
    for stages in ("[oneshot]", "[reconstruct]"):
        message = refuse("--model.path", broken, "--stages", stages, started=True)
        assert str(broken / FILE) in message or "--model.dense" in message


# what a dry run sees without the work

RECOVER = [
    "--stages",
    "[oneshot, recover]",
    "--recover.optimizer.tokens",
    "1152",
    "--recover.optimizer.batch",
    "4",
]
RECOVER += ["--recover.length", "48", "--recover.held_out", "2", "--recover.contrast.segments", "4"]
RECOVER += [
    "--recover.contrast.token_positions",
    "8",
    "--recover.contrast.n_unlabeled_frequent",
    "5",
]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("damage", ["lacks", "shape", "none"])
def test_a_dry_run_sees_damaged_weights_by_their_headers(refuse, broken, kind, damage):
    tensors = load_file(broken / "model.safetensors")
    if damage == "lacks":
        del tensors[DOWN_1]
    elif damage == "shape":
        tensors[DOWN_1] = tensors[DOWN_1][:-1].contiguous()
    (broken / "model.safetensors").unlink()
    if damage != "none" and kind == "bin":
        torch.save(tensors, broken / "pytorch_model.bin")
    elif damage != "none":
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    message = refuse("--model.path", broken, "--dry-run")
    assert str(broken) in message
    assert ("has no weights" if damage == "none" else DOWN_1.partition(".weight")[0]) in message


@pytest.mark.parametrize("option", ["model.dense", "recover.teacher", "recover.finetuned"])
def test_a_dry_run_sees_damage_of_further_models(call, base, broken, option, text_file):
    change_weights(broken, lambda t: t.pop(DOWN_1))
    args = [*RECOVER, "--recover.corpus", text_file, "--dry-run"]
    code, _, err = call(*base, *args, f"--{option}", broken)
    assert code == 2, err
    assert DOWN_1 in err.splitlines()[-1]  # DeepSpeed's import may speak before


@pytest.fixture
def hub(llama, tmp_path, monkeypatch):
    """A hub that can only be asked for a model's config.json, and notes what it is asked for."""
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder, asked = tmp_path / "snapshot", []
    folder.mkdir()
    (folder / "config.json").write_bytes((llama / "config.json").read_bytes())

    def download(name, file, **_):
        asked.append((name, file))
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_a_dry_run_of_a_model_on_the_hub_fetches_its_config_alone(accept, refuse, hub):
    said = accept("--model.path", "someone/llama", "--dry-run")
    assert hub == [("someone/llama", "config.json")]
    assert "estimate: memory" in said
    assert "256 positions" in refuse(
        "--model.path", "someone/llama", "--calibration.length", "257", "--dry-run"
    )


def test_a_dry_run_without_a_hub_asks_for_nothing(refuse, hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in refuse("--model.path", "someone/llama", "--dry-run")
    assert hub == []


def test_a_dry_run_needs_no_output_directory(call, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at = base.index("--output_dir")
    code, said, err = call(*base[:at], *base[at + 2 :], "--dry-run")
    assert code == 0, err
    assert "estimate: memory" in said
    assert list(tmp_path.iterdir()) == []


# code of a model's directory


@pytest.fixture
def nothing_runs(monkeypatch, tmp_path):
    """Fails where a library asks, or where the code of a directory runs."""
    ran = tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    yield f"open({str(ran)!r}, 'w').close()\n"
    assert not ran.exists()


def with_code(folder: Path, code: str) -> Path:
    (folder / "modeling_my.py").write_text(code)
    auto_map = {"AutoConfig": "modeling_my.A", "AutoModelForCausalLM": "modeling_my.B"}
    change_config(folder, model_type="mine", architectures=["B"], auto_map=auto_map)
    return folder


@pytest.mark.parametrize(
    "option", ["model.path", "model.dense", "recover.teacher", "recover.finetuned"]
)
def test_code_of_a_model_is_refused_without_a_question(
    call, base, broken, nothing_runs, option, text_file
):
    args = [*RECOVER, "--recover.corpus", text_file]
    code, _, err = call(*base, *args, f"--{option}", with_code(broken, nothing_runs))
    message = err.splitlines()[-1]
    assert code == 2 and str(broken) in message
    assert "auto_map" in message and "trust_remote_code" not in message


def test_code_beside_a_known_model_does_not_run(accept, broken, nothing_runs):
    (broken / "modeling_my.py").write_text(nothing_runs)
    (broken / "custom_generate").mkdir()
    (broken / "custom_generate" / "generate.py").write_text(nothing_runs)
    change_config(broken, auto_map={"AutoModelForCausalLM": "modeling_my.B"})
    accept("--model.path", broken)


def test_code_of_a_tokenizer_is_refused_without_a_question(refuse, broken, nothing_runs):
    folder = with_code(broken, nothing_runs)
    path = folder / "tokenizer_config.json"
    facts = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["modeling_my.C", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    message = refuse("--model.tokenizer", folder)
    assert "auto_map" in message and "--model.tokenizer" in message
    assert "trust_remote_code" not in message


def test_an_attention_kernel_of_the_hub_is_refused(refuse, broken):
    change_config(broken, attn_implementation="someone/kernel")
    assert "someone/kernel" in refuse("--model.path", broken)


def test_links_to_the_files_of_another_model_directory_are_followed(accept, refuse, llama, broken):
    for file in broken.iterdir():
        file.unlink()
        file.symlink_to(llama / file.name)
    accept("--model.path", broken)
    (broken / "notes.txt").symlink_to(llama / "tokenizer.json")  # another name
    assert str(broken / "notes.txt") in refuse("--model.path", broken, started=True)

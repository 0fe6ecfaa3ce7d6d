"""A model seen block by block is the model: every family, bit for bit."""

import json

import pytest
import torch
import transformers
from bad_input.damage import change_config
from safetensors.torch import load_file, save_file
from support import FAMILIES, weights

from cap_llm.models.blocks import BlockModel
from cap_llm.models.checkpoint import Checkpoint
from cap_llm.models.directory import ModelDirectory
from cap_llm.models.files import weight_files
from cap_llm.models.hub import convert, load_whole
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.world import World
from cap_llm.train import main

CPU = torch.device("cpu")
IDS = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(0))


def logits_block_by_block(model: BlockModel) -> torch.Tensor:
    hidden, calls = model.embed(IDS)
    for i in range(len(model)):
        with model.block(i) as block, torch.no_grad():
            hidden = calls[i].run(block, hidden)
    return model.head(IDS, hidden)


def streamed(folder) -> BlockModel:
    return BlockModel.open(ModelDirectory(folder), CPU)


def whole(folder) -> torch.nn.Module:
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    return cls.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_blockwise_forward_equals_the_models_own(tiny, family):
    folder = tiny(family, num_hidden_layers=3) if family not in ("bloom", "gpt2") else tiny(family)
    with torch.no_grad():
        expected = whole(folder)(input_ids=IDS).logits
    assert torch.equal(logits_block_by_block(streamed(folder)), expected)
    assert torch.equal(logits_block_by_block(BlockModel(whole(folder), CPU)), expected)


@pytest.mark.parametrize(
    "family, kwargs",
    [
        ("mistral", {"sliding_window": 8}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ("neox", {"use_parallel_residual": False}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_blockwise_forward_holds_for_variants(tiny, family, kwargs):
    folder = tiny(family, **kwargs)
    with torch.no_grad():
        expected = whole(folder)(input_ids=IDS).logits
    assert torch.equal(logits_block_by_block(streamed(folder)), expected)


_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT |= {"intermediate_size": 64, "vocab_size": 512, "max_position_embeddings": 64}
_DEBERTA = _BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}


@pytest.mark.parametrize(
    "name, head, settings",
    [
        ("DistilBert", "MaskedLM", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
        ("Electra", "MaskedLM", _BERT | {"embedding_size": 32}),
        ("DebertaV2", "MaskedLM", _DEBERTA),  # a block returns two values
        ("BioGpt", "CausalLM", _BERT),
        ("OpenAIGPT", "LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4}),  # a list
    ],
)
def test_a_model_that_names_no_class_of_blocks_is_walked_all_the_same(name, head, settings):
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}For{head}".replace("ForLM", "LM"))(config).eval()
    assert not model._no_split_modules
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    assert torch.equal(logits_block_by_block(BlockModel(model, CPU)), expected)


def test_a_model_that_runs_its_blocks_more_than_once_is_refused():
    config = transformers.AlbertConfig(**_BERT, embedding_size=16)
    with pytest.raises(UserError, match="list of blocks with one per layer, but has none"):
        BlockModel(transformers.AlbertForMaskedLM(config), CPU)


def groups_of(folder) -> list[list[str]]:
    model = streamed(folder)
    hidden, calls = model.embed(IDS)
    return [group.names for group in model.groups(0, calls[0], hidden)]


def test_linears_that_read_one_input_share_a_group(tiny):
    attention = [f"self_attn.{n}_proj" for n in "qkv"]
    assert groups_of(tiny("llama")) == [
        attention,
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert groups_of(tiny("opt")) == [attention, ["self_attn.out_proj"], ["fc1"], ["fc2"]]
    assert groups_of(tiny("gpt2"))[0] == ["attn.c_attn"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_every_block_is_prunable_and_nothing_else(tiny, family):
    folder = tiny(family)
    model = streamed(folder)
    names = {model.weight_name(i, n) for i in range(len(model)) for n in model.linears(i)}
    inside = tuple(model.block_name(i) + "." for i in range(len(model)))
    matrices = {
        n for n, p in whole(folder).named_parameters() if n.startswith(inside) and p.dim() == 2
    }
    assert names == matrices
    assert not any("embed" in n or "head" in n or "norm" in n for n in names)


def test_streaming_holds_one_block_at_a_time(tiny):
    model = streamed(tiny("llama"))
    with model.block(0) as block:
        assert all(not p.is_meta for p in block.parameters())
        assert all(p.is_meta for p in model.blocks[1].parameters())
    assert all(p.is_meta for b in model.blocks for p in b.parameters())


def test_files_saved_from_the_base_model_are_read(tiny, tmp_path):
    folder = tiny("gpt2")
    with torch.no_grad():
        expected = whole(folder)(input_ids=IDS).logits
    whole(folder).transformer.save_pretrained(tmp_path)  # names lack `transformer.`
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert "wte.weight" in Checkpoint(tmp_path)
    assert torch.equal(logits_block_by_block(streamed(tmp_path)), expected)


def test_buffers_that_are_stored_are_read(tmp_path):
    """Gemma 4 scales each block's output by a stored buffer."""
    config = transformers.Gemma4TextConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    )
    torch.manual_seed(0)
    model = transformers.Gemma4ForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.layer_scalar.fill_(0.3)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = whole(tmp_path)(input_ids=IDS).logits
    assert torch.equal(logits_block_by_block(streamed(tmp_path)), expected)


def add(folder, **tensors: torch.Tensor) -> None:
    """Stores tensors in a model directory's file, beside or instead of what is there."""
    file = folder / "model.safetensors"
    stored = load_file(file) | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file(stored, file, metadata={"format": "pt"})


def test_a_head_that_is_stored_beside_the_embedding_it_is_tied_to_does_not_count(tiny):
    folder = tiny("llama", tie_word_embeddings=True)
    embedding = Checkpoint(folder).read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    model = streamed(folder)
    expected = logits_block_by_block(model)
    add(folder, lm_head__weight=embedding)
    assert "lm_head.weight" not in ModelDirectory(folder).keys
    assert torch.equal(logits_block_by_block(streamed(folder)), expected)
    add(folder, lm_head__weight=embedding + 1)  # transformers would not tie these
    with pytest.raises(UserError, match='set "tie_word_embeddings": false'):
        streamed(folder)


def test_left_over_masks_of_old_files_neither_set_the_type_nor_stop_the_work(
    tiny, text_file, tmp_path, monkeypatch
):
    """GPT-NeoX's files on the hub: a table of booleans, and what is -inf in fp16."""
    folder = tiny("neox", dtype=torch.float16)
    prefix = "gpt_neox__layers__0__attention__"
    left = {"bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()}
    left["masked_bias"] = torch.tensor(-1e9).half()
    add(folder, **{prefix + name: tensor for name, tensor in left.items()})
    meta = torch.device("meta")  # as a GPU: the type is the stored one
    assert BlockModel.open(ModelDirectory(folder), meta).dtype == torch.float16
    words = ["--model.path", folder, "--output_dir", tmp_path / "run", "--stages", "[oneshot]"]
    words += ["--oneshot.method", "magnitude", "--runtime.device", "cpu"]
    monkeypatch.setattr("sys.argv", ["cap-llm", *map(str, words)])
    assert main() == 0


def test_a_bin_checkpoint_is_converted(tiny, tmp_path):
    folder = tiny("opt")
    model = whole(folder)
    old = tmp_path / "old"
    old.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".json":
            (old / file.name).write_bytes(file.read_bytes())
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    convert(ModelDirectory(old), tmp_path / "new")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    assert torch.equal(logits_block_by_block(streamed(tmp_path / "new")), expected)
    assert (tmp_path / "new" / "tokenizer.json").exists()


def test_a_block_that_reads_the_text_itself_is_refused(tiny):
    model = whole(tiny("llama"))

    class Reader(torch.nn.Module):
        """Passes something to the blocks that depends on the ids."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, **kwargs):
            self.inner.rotary_emb.scale = input_ids.float().mean()
            return self.inner(input_ids=input_ids, **kwargs)

    rotary = type(model.model.rotary_emb).forward

    def scaled(self, x, position_ids, **kwargs):
        cos, sin = rotary(self, x, position_ids, **kwargs)
        return cos * self.scale, sin

    model.model.rotary_emb.forward = scaled.__get__(model.model.rotary_emb)
    model.model = Reader(model.model)
    model.model.config = model.config
    with pytest.raises(UserError, match="position_embeddings, which depends on the text"):
        BlockModel(model, CPU).embed(IDS)


def test_a_block_that_does_not_read_its_predecessor_is_refused(tiny):
    model = whole(tiny("llama"))
    hook = model.model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] + 1, *args[1:]), kwargs), with_kwargs=True
    )
    with pytest.raises(UserError, match=r"layers\.1 does not read the output of \S*layers\.0"):
        BlockModel(model, CPU).embed(IDS)
    hook.remove()


def test_zeros_that_are_too_few_for_a_mask_are_told(tiny, tmp_path):
    """They would train away without a word."""
    folder = tiny("llama")
    stored = weights(folder)
    for part, share in (("q_proj", 0.15), ("up_proj", 0.4)):
        name = f"model.layers.0.{'self_attn' if part == 'q_proj' else 'mlp'}.{part}.weight"
        stored[name].view(-1)[: int(share * stored[name].numel())] = 0
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    masks = ModelDirectory(folder).masks(World.alone(CPU))
    assert list(masks) == ["model.layers.0.mlp.up_proj.weight"]
    assert "zeros of 1 matrices as masks" in masks.description
    assert "zeros of 1 matrices, fewer than 20%" in masks.description
    assert "model.layers.0.self_attn.q_proj.weight, 14.9%" in masks.description
    assert not ModelDirectory(tiny("llama")).masks(World.alone(CPU)).description


# what of a directory is read


def other(model: torch.nn.Module, add: float) -> dict[str, torch.Tensor]:
    return {name: tensor + add for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "there",
    [
        ["safetensors", "index", "bin"],
        ["index", "bin", "bin index"],
        ["bin", "bin index"],
        ["bin index"],
        ["named", "safetensors", "index"],
    ],
)
def test_the_weights_are_those_that_transformers_takes(tiny, tmp_path, there):
    """Of several in one directory, as a second save may leave them."""
    folder = tiny("llama")
    model = whole(folder)
    (folder / "model.safetensors").unlink()
    for i, kind in enumerate(there):
        tensors = other(model, 0.01 * i)
        if kind == "named":
            change_config(folder, transformers_weights="mine.safetensors")
            save_file(tensors, folder / "mine.safetensors", metadata={"format": "pt"})
        elif kind == "safetensors":
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        elif kind == "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            ending, save = ("bin", torch.save) if "bin" in kind else ("safetensors", save_file)
            stem = "pytorch_model" if "bin" in kind else "model"
            shard = f"{stem}-00001-of-00001.{ending}"
            save(tensors, folder / shard)
            index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
            (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    seen = whole(folder).state_dict()
    read = folder
    if not ModelDirectory(folder).has_safetensors:
        convert(ModelDirectory(folder), read := tmp_path / "converted")
    stored = weights(read)
    assert all(torch.equal(stored[name], tensor) for name, tensor in seen.items())


def test_what_a_second_save_leaves_is_read(tiny):
    folder = tiny("llama")
    model = whole(folder)
    model.save_pretrained(folder, max_shard_size="20KB")
    model.save_pretrained(folder)  # removes the shards and leaves their index
    assert (folder / "model.safetensors.index.json").exists()
    assert len(weight_files(folder)) == 1
    assert ModelDirectory(folder).keys


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("stored_as", ["safetensors", "bin"])
def test_names_are_read_without_the_prefix_of_a_wrapper(tiny, tmp_path, prefix, stored_as):
    folder = tiny("gpt2")  # with names that transformers itself renames
    with torch.no_grad():
        expected = whole(folder)(input_ids=IDS).logits
    tensors = {prefix + name: tensor for name, tensor in weights(folder).items()}
    if stored_as == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert prefix in ModelDirectory(folder).notice
        read = folder
    else:
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        convert(ModelDirectory(folder), read := tmp_path / "converted")
    assert not any(name.startswith(prefix) for name in Checkpoint(read).names())
    assert torch.equal(logits_block_by_block(streamed(read)), expected)
    with torch.no_grad():
        assert torch.equal(
            load_whole(ModelDirectory(read), dtype="float32")(input_ids=IDS).logits, expected
        )


def test_names_of_which_only_some_have_a_prefix_are_left(tiny):
    folder = tiny("llama")
    tensors = weights(folder)
    tensors["module.lm_head.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint(folder).prefix == ""


@pytest.mark.parametrize(
    ("family", "body"), [("bert", "BertModel"), ("llama", "LlamaModel"), ("opt", "OPTModel")]
)
@pytest.mark.parametrize("stored_as", ["safetensors", "bin"])
def test_a_body_without_its_head_is_read(tiny, tmp_path, family, body, stored_as):
    """As sentence encoders are stored: config.json names a class with a head."""
    folder = tiny(family, tie_word_embeddings=False)
    named = json.loads((folder / "config.json").read_text())["architectures"]
    model = getattr(transformers, body)(transformers.AutoConfig.from_pretrained(folder)).eval()
    model.save_pretrained(folder)
    change_config(folder, architectures=named)
    read = folder
    if stored_as == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        convert(ModelDirectory(folder), read := tmp_path / "converted")
    else:
        assert named[0] in ModelDirectory(folder).notice
    assert type(ModelDirectory(read).skeleton).__name__ == body
    blocks = streamed(read)
    assert not blocks.is_causal
    hidden, calls = blocks.embed(IDS)
    for i in range(len(blocks)):
        with blocks.block(i) as block, torch.no_grad():
            hidden = calls[i].run(block, hidden)
    with torch.no_grad():
        found = load_whole(ModelDirectory(read), dtype="float32")(input_ids=IDS).last_hidden_state
        expected = model(input_ids=IDS).last_hidden_state
    assert torch.equal(found, expected)


def test_a_body_that_lacks_a_tensor_is_not_read_without_its_head(tiny):
    folder = tiny("llama")
    tensors = weights(folder)
    del tensors["lm_head.weight"], tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert type(ModelDirectory(folder).skeleton).__name__ == "LlamaForCausalLM"
    with pytest.raises(UserError, match=r"model.norm.weight"):
        ModelDirectory(folder).keys  # noqa: B018

"""The walk gives what the model gives, however little memory it has."""

import gc

import pytest
import torch
import transformers
from support import FAMILIES

import cap_llm.runtime.memory as memory_module
import cap_llm.solvers.methods as methods_module
from cap_llm.blockwise.cache import ActivationCache
from cap_llm.blockwise.prune import prune
from cap_llm.blockwise.walk import MICRO_TOKENS, Walk
from cap_llm.config import OneshotConfig
from cap_llm.models.blocks import BlockModel
from cap_llm.models.directory import ModelDirectory
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.memory import Memory

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 512, (150, 32), generator=torch.Generator().manual_seed(1))


def walked(folder, memory: int, tmp_path, change=None) -> list[torch.Tensor]:
    """The last block's outputs, and the inputs of every linear group, in order."""
    model = BlockModel.open(ModelDirectory(folder), CPU)
    walk = Walk(model, WINDOWS, Memory(memory), tmp_path)
    seen = []

    def note(block):
        def inner(group, inputs):
            seen.append(torch.cat([x.reshape(-1, x.shape[-1]).clone() for x in inputs]))
            for name in group.names:
                block.get_submodule(name).weight.data.mul_(0.5)

        return inner

    for i in range(len(model)):
        with model.block(i) as block:
            walk.visit(i, block, note(block))
    return seen + [walk.hidden[k] for k in range(len(walk.ids))]


def test_batches_are_several_and_the_last_one_is_smaller():
    assert len(WINDOWS) % (MICRO_TOKENS // WINDOWS.shape[1]) != 0
    assert len(WINDOWS) > MICRO_TOKENS // WINDOWS.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_waiting_running_again_and_spilling_give_the_same_bits(tiny, family, tmp_path):
    folder = tiny(family)
    plenty = walked(folder, 2**30, tmp_path)
    state = 2048 * 32 * 4  # bytes of one full micro-batch's hidden states
    for memory in (state * 4, state, 0):  # some wait; none wait and one is in memory; all on disk
        for a, b in zip(plenty, walked(folder, memory, tmp_path), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_later_linears_see_the_changed_earlier_ones(tiny, family, tmp_path):
    folder = tiny(family)
    config = transformers.AutoConfig.from_pretrained(folder)
    halved = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    wrapped = BlockModel(halved, CPU)
    for i in range(len(wrapped)):
        for linear in wrapped.linears(i).values():
            linear.weight.data.mul_(0.5)
    hidden, calls = wrapped.embed(WINDOWS[:64])
    for i in range(len(wrapped)):
        with torch.no_grad():
            hidden = calls[i].run(wrapped.blocks[i], hidden)
    last = walked(folder, 2**30, tmp_path)[-len(WINDOWS.split(64))]
    assert torch.equal(last, hidden)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4", "1:4", "4:8"])
@pytest.mark.parametrize("refit", [False, True])
def test_pruning_in_memory_gives_the_exact_sparsity(tiny, method, pattern, refit):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("llama"))
    sparsity = None if ":" in pattern else 0.6
    config = OneshotConfig(method=method, pattern=pattern, sparsity=sparsity, refit=refit)
    masks = prune(model, WINDOWS[:8], config)
    assert len(masks) == 2 * 7
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight != 0, mask)
        if ":" in pattern:
            n, m = map(int, pattern.split(":"))
            assert (mask.reshape(-1, m).sum(1) == n).all()
        elif pattern == "row" or method == "wanda":
            assert (mask.sum(1) == mask.shape[1] - round(0.6 * mask.shape[1])).all()
        else:
            assert int((~mask).sum()) == round(0.6 * mask.numel())


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "opt350"])
def test_waiting_micro_batches_hold_no_more_than_is_planned(tiny, tmp_path, family):
    model = BlockModel(transformers.AutoModelForCausalLM.from_pretrained(tiny(family)), CPU)
    windows = torch.randint(0, 500, (5, 250), generator=torch.Generator().manual_seed(0))
    walk = Walk(model, windows, Memory(2**30), tmp_path, micro_tokens=250)
    planned = walk._held_bytes(model.blocks[0], model.groups(0, walk.calls[0][0], walk.hidden[0]))
    held = []

    def look(group, inputs):
        for x in inputs:
            del x
        held.append(live_bytes() - before)

    with model.block(0) as block:
        before = live_bytes()
        walk.visit(0, block, look)
    assert len(held) > 2 and max(held) <= len(windows) * planned


def live_bytes() -> int:
    """Of all tensors that are alive."""
    gc.collect()
    tensors = (o for o in gc.get_objects() if type(o) is torch.Tensor)
    return sum({s._cdata: s.nbytes() for t in tensors if (s := t.untyped_storage())}.values())


def test_conv1d_is_pruned_along_its_inputs(tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("gpt2"))
    masks = prune(model, WINDOWS[:8], OneshotConfig(pattern="2:4"))
    mask = masks["transformer.h.0.attn.c_attn.weight"]
    weight = model.transformer.h[0].attn.c_attn.weight  # [inputs, outputs]
    assert mask.shape == (96, 32) and torch.equal(weight.T != 0, mask)
    assert (mask.reshape(96, -1, 4).sum(-1) == 2).all()


def test_pruning_in_memory_refuses_what_was_changed_to_nonsense(tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("gpt2"))
    config = OneshotConfig()
    config.layers["*"] = 3.0
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=r"oneshot\.layers\['\*'\] is 3"):
        prune(model, WINDOWS[:8], config)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_pruning_in_memory_is_in_full_precision_and_leaves_the_process_as_it_was(tiny, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("llama")).train()
    embedding, seen = model.get_input_embeddings().weight.requires_grad_(False), []
    solve = methods_module.sparsegpt
    monkeypatch.setattr(
        methods_module,
        "sparsegpt",
        lambda *a: seen.append(torch.get_float32_matmul_precision()) or solve(*a),
    )
    torch.set_float32_matmul_precision("high")
    try:
        prune(model, WINDOWS[:8], OneshotConfig())
        assert set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert model.training and model.config.use_cache
    assert not embedding.requires_grad and model.lm_head.weight.requires_grad


def test_overwriting_the_cache_takes_no_further_memory(tmp_path):
    cache = ActivationCache(CPU, Memory(2**20), tmp_path)
    for _ in range(5):
        for k in range(3):
            cache[k] = torch.full((1000,), float(k))
        assert cache.left == 2**20 - 3 * 4000
    assert [cache[k][0].item() for k in range(3)] == [0, 1, 2] and not cache.spilled


def test_the_limit_of_any_control_group_above_the_process_counts(tmp_path, monkeypatch):
    """Version 2, as in a SLURM job: the limit is the job's, the cache is given back."""
    job = tmp_path / "slice" / "job_7"
    (job / "step_0").mkdir(parents=True)
    for name, content in (
        ("memory.max", "5000000"),
        ("memory.current", "4000000"),
        ("memory.stat", "anon 1\ninactive_file 2500000\nactive_file 7"),
    ):
        (job / name).write_text(content)
    mine = tmp_path / "cgroup"
    mine.write_text("4:cpu:/elsewhere\n0::/slice/job_7/step_0\n")
    groups = list(memory_module._control_groups(mine, tmp_path))
    assert groups == [job / "step_0", job, tmp_path / "slice", tmp_path]
    monkeypatch.setattr(memory_module, "_control_groups", lambda file: groups)
    assert memory_module.free_memory(CPU) == 3500000

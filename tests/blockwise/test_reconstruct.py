"""The stage `reconstruct` through the real entry: what it trains, what it keeps."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from commands import options
from support import weights

import cap_llm.blockwise.reconstruct as reconstruct_module
from cap_llm.cli import assets
from cap_llm.models.mask_file import FILE
from cap_llm.runtime.files import read_json
from cap_llm.train import main


def test_the_error_of_a_block_is_relative_token_by_token(monkeypatch):
    """The first positions' activations are hundreds of times the others'."""
    target = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    target[:, 0] *= 500
    section = object.__new__(reconstruct_module._Section)
    section.trainer = SimpleNamespace(autocast=contextlib.nullcontext)
    section.calls = section.inputs = [None]
    section.block = section.module = None
    section.targets = [target]
    for wrong, error in ((0, 0.01 / 6), (3, 0.01 / 6), (slice(None), 0.01)):
        output = target.clone()
        output[:, wrong] *= 1.1
        monkeypatch.setattr(reconstruct_module, "_output", lambda *_, out=output: out)
        assert section._error(0).item() == pytest.approx(error, rel=1e-3)


def test_reconstruction_brings_a_trained_model_closer_to_the_dense_one(
    smollm2, calibration_ids, tmp_path, monkeypatch
):
    """The first two blocks of a real model: the whole's error on text that no one has seen."""
    from cap_llm.text.tokenizers import load_tokenizer

    small = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    small.model.layers = small.model.layers[:2]
    small.config.num_hidden_layers = 2
    small.config.layer_types = None
    source = tmp_path / "two-blocks"
    small.save_pretrained(source)
    tokenizer = load_tokenizer(str(smollm2))
    tokenizer.save_pretrained(source)
    text, _ = assets.wikipedia()
    words = options(source, text, tmp_path / "run", "--stages", "[oneshot, reconstruct]")
    words += ["--calibration.sequences", "48", "--calibration.length", "128"]
    words += ["--calibration.held_out", "8", "--oneshot.pattern", "2:4"]
    monkeypatch.setattr(sys, "argv", ["cap-llm", *words])
    assert main() == 0

    def distance(stage: str) -> float:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / stage)
        with torch.no_grad():
            states = [m.model(calibration_ids[:, :128]).last_hidden_state for m in (model, small)]
        return (states[0] - states[1])[:, 1:].square().mean().item()

    assert distance("reconstruct") < 0.95 * distance("oneshot")


def test_a_model_pruned_elsewhere_goes_on_beside_its_dense_one(tiny, entry, capsys):
    dense = tiny("llama")
    folder, code = entry(dense, "--stages", "[oneshot]", out="first")
    assert code == 0
    pruned = folder / "oneshot"
    (pruned / FILE).unlink()  # the zeros say it too
    (pruned / "sparsity.json").unlink()
    more = ("--stages", "[reconstruct]", "--model.dense", dense)
    capsys.readouterr()
    folder, code = entry(pruned, *more, out="second")
    assert code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "zeros of 14 matrices as masks (50.0%" in said
    rows = read_json(folder / "reconstruct" / "sparsity.json")["rows"]
    assert {r["pattern"] for r in rows} == {"as found"}
    before, after = weights(pruned), weights(folder / "reconstruct")
    for row in rows:
        assert torch.equal(before[row["name"]] == 0, after[row["name"]] == 0)


def blocks_of(folder) -> list[dict]:
    return read_json(folder / "reconstruct" / "sparsity.json")["blocks"]


def test_reconstruction_does_not_ask_for_the_scale_of_the_weights(tiny, entry):
    """A block whose factors are 64 times as large and as small computes the same, and its training
    goes the same way."""
    dense = tiny("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    for block in model.model.layers:
        block.mlp.up_proj.weight.data.mul_(64)
        block.mlp.down_proj.weight.data.div_(64)
    scaled = dense.with_name(f"{dense.name}-scaled")
    model.save_pretrained(scaled)
    transformers.AutoTokenizer.from_pretrained(dense).save_pretrained(scaled)
    more = ("--stages", "[oneshot, reconstruct]", "--oneshot.method", "magnitude")
    runs = [entry(model, *more, out=model.name) for model in (dense, scaled)]
    ours, theirs = (blocks_of(folder) for folder, _ in runs)
    assert all(b["after"] < 0.95 * b["before"] for b in ours)
    for key in ("before", "after"):
        assert [b[key] for b in ours] == pytest.approx([b[key] for b in theirs], rel=1e-3)


@pytest.mark.parametrize(
    "errors, kept",
    [([1.0, 1.1, 0.9, 0.8, 0.7], 4), ([1.0, 0.9, 1.1, 1.2, 0.1], 1), ([1.0, 1.1, 1.2, 0.1], 0)],
)
def test_the_best_epoch_is_kept_and_two_worse_ones_end_it(tiny, entry, monkeypatch, errors, kept):
    left = []

    def judge(section, epoch: int = 0) -> float:
        if not left:
            left.extend(errors)
        return left.pop(0)

    monkeypatch.setattr(reconstruct_module._Section, "judge", judge)
    more = ("--stages", "[oneshot, reconstruct]", "--reconstruct.epochs", len(errors) - 1)
    folder, code = entry(tiny("llama", num_hidden_layers=1), *more)
    assert code == 0
    (block,) = blocks_of(folder)
    assert (block["epoch"], block["after"]) == (kept, errors[kept])
    assert len(left) == (0 if kept == 4 else 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_block_is_trained_on_and_judged_by(tiny, entry, monkeypatch, dtype):
    section, trained, judged, rates, types = reconstruct_module._Section, [], [], [], set()
    error, step = section._error, torch.optim.Adam.step

    def watch_error(self, k):
        (trained if torch.is_grad_enabled() else judged).append(k)
        value = error(self, k)
        types.add(torch.is_autocast_enabled("cpu"))
        return value

    def watch_step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(section, "_error", watch_error)
    monkeypatch.setattr(torch.optim.Adam, "step", watch_step)
    more = ("--reconstruct.batch", 3, "--reconstruct.epochs", 3, "--reconstruct.dtype", dtype)
    dense = tiny("llama", num_hidden_layers=1)
    folder, code = entry(dense, "--stages", "[oneshot, reconstruct]", *more)
    assert code == 0
    assert types == {dtype == "bfloat16"}
    epochs = [trained[20 * e : 20 * (e + 1)] for e in range(3)]  # 20 sequences, 6 held out
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert judged == [*range(20, 26)] * 4
    assert len(rates) == 21  # steps of three sequences, and of two at an epoch's end
    assert rates[0] < 0.6 * rates[1]  # the warm-up, over a tenth; then a line to zero
    assert rates[2:] == pytest.approx([rates[2] * (21 - n) / 19 for n in range(2, 21)])


def test_halves_train_the_attention_first_and_the_rest_after(tiny, entry):
    model, stages = tiny("llama"), ("--stages", "[oneshot, reconstruct]")
    stages += ("--reconstruct.inputs", "dense")  # so that no block sees the ones before it
    whole, _ = entry(model, *stages, out="whole")
    folder, code = entry(model, *stages, "--reconstruct.split_attention", "true", out="halves")
    assert code == 0
    for block, other in zip(blocks_of(folder), blocks_of(whole), strict=True):
        (attention,) = block["sections"]
        assert attention["after"] <= attention["before"]
        assert block["before"] == other["before"]  # the pruned block's, before any half of it
        assert block["after"] < block["before"]


def test_a_block_that_its_halves_make_worse_stays_as_it_was_pruned(tiny, entry, monkeypatch):
    train = reconstruct_module._Section.train

    def spoil(section, phase):
        error = train(section, phase)
        if section.module:  # an attention that is better by itself and worse for its block
            for p in section.parameters:
                p.data.mul_(2)
        return error

    monkeypatch.setattr(reconstruct_module._Section, "train", spoil)
    more = ("--reconstruct.split_attention", "true", "--reconstruct.lr", "1e-7")
    folder, code = entry(tiny("llama"), "--stages", "[oneshot, reconstruct]", *more)
    assert code == 0
    assert all(b["after"] == b["before"] and b["epoch"] == 0 for b in blocks_of(folder))
    before, after = weights(folder / "oneshot"), weights(folder / "reconstruct")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_dense_model_of_other_shape_is_refused(tiny, entry, capsys):
    other = tiny("llama", intermediate_size=96)
    more = ("--stages", "[reconstruct]", "--model.dense", other)
    _, code = entry(tiny("llama"), *more)
    assert code == 2
    assert "model.dense" in capsys.readouterr().err


def test_a_dense_model_of_a_smaller_vocabulary_is_refused(tiny, entry, capsys):
    dense = tiny("llama", vocab_size=500)
    assert entry(tiny("llama"), "--stages", "[oneshot, sds]", "--model.dense", dense)[1] == 2
    assert "model.dense" in capsys.readouterr().err


def test_a_diverging_block_is_named(tiny, entry, capsys):
    model, more = tiny("llama"), ("--stages", "[oneshot, reconstruct]")
    _, code = entry(model, *more, "--reconstruct.lr", "1e30")
    assert code == 2
    assert "reconstruct.lr" in capsys.readouterr().err
    assert entry(model, *more)[1] == 0  # the remedy works in the same run directory


def test_zeros_that_4_bit_rounding_makes_are_no_mask(tiny, entry, capsys, tmp_path):
    """Q4_0: a scale for 32 weights, of which the largest becomes -8."""
    dense = tiny("llama", hidden_size=64)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    zeros = []
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            groups = module.weight.data.view(-1, 32)
            scale = groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -8
            groups.copy_((groups / scale).round().clamp(-8, 7) * scale)
            zeros.append((groups == 0).float().mean().item())
    assert min(zeros) > 0.08
    model.save_pretrained(tmp_path / "rounded")
    transformers.AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "rounded")
    more = ("--stages", "[reconstruct]", "--model.dense", dense)
    assert entry(tmp_path / "rounded", *more)[1] == 2
    assert "none of its matrices has a mask or 20% of zeros" in capsys.readouterr().err


def test_the_error_after_reconstruction_is_that_of_the_stored_weights(tiny, entry):
    """Steps that are smaller than bfloat16 tells apart change nothing."""
    more = ("--stages", "[oneshot, reconstruct]", "--reconstruct.lr", "1e-9")
    folder, code = entry(tiny("llama", dtype=torch.bfloat16), *more)
    assert code == 0
    for block in read_json(folder / "reconstruct" / "sparsity.json")["blocks"]:
        assert block["after"] == block["before"] and block["epoch"] == 0

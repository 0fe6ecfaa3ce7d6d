"""The stages `sds` and `reconstruct` through the real entry: files, numbers, resuming, ranks."""

import contextlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import assets
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import ROOT, environment, weights

import cap_llm.blockwise.reconstruct as reconstruct_module
from cap_llm.blockwise import sds as sds_module
from cap_llm.blockwise import stage as stage_module
from cap_llm.blockwise.perplexity import perplexity
from cap_llm.models.masks import Masks
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import read_json
from cap_llm.runtime.world import World
from cap_llm.sparsity.masks import MaskFile
from cap_llm.train import main

ALL = "[oneshot, sds, reconstruct]"


def options(model, text_file, folder, *more) -> list[str]:
    words = ["--output_dir", folder, "--model.path", model, "--calibration.corpus", text_file]
    words += ["--calibration.sequences", 20, "--calibration.length", 48]
    words += ["--calibration.held_out", 6, "--runtime.device", "cpu"]
    return [str(w) for w in [*words, *more]]


def run_entry(words: list[str], ranks: int = 1) -> subprocess.CompletedProcess:
    """Runs the entry in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*(launcher if ranks > 1 else []), str(ROOT / "cap_llm/train.py"), *words]
    return subprocess.run(
        [sys.executable, *command], env=environment(), capture_output=True, text=True, check=False
    )


@pytest.fixture
def entry(monkeypatch, text_file, tmp_path):
    """Runs the entry in this process; returns the run directory and the exit code."""

    def run(model, *more, out="run"):
        words = options(model, text_file, tmp_path / out, *more)
        monkeypatch.setattr(sys, "argv", ["cap-llm", *words])
        return tmp_path / out, main()

    return run


@pytest.mark.parametrize(
    "family, more",
    [
        ("llama", ["--reconstruct.halves", "true", "--reconstruct.inputs", "dense"]),
        ("opt", ["--oneshot.pattern", "2:4", "--sds.data", "dense"]),
        ("gpt2", ["--oneshot.method", "wanda", "--sds.data", "redense"]),
        ("neox", ["--oneshot.method", "alps", "--reconstruct.inputs", "dense"]),
        ("opt350", ["--oneshot.pattern", "row", "--sds.mode", "paper"]),
        ("bloom", ["--oneshot.method", "admm_grad", "--oneshot.sparsity", "0.6"]),
        ("bert", ["--oneshot.method", "magnitude", "--reconstruct.halves", "true"]),
    ],
)
def test_each_stage_leaves_a_model_that_transformers_loads_with_exact_zeros(
    tiny, entry, family, more
):
    dtype = torch.bfloat16 if family == "opt" else torch.float32
    folder, code = entry(tiny(family, dtype=dtype), "--stages", ALL, *more)
    assert code == 0
    for stage in ("oneshot", "sds", "reconstruct"):
        place = folder / stage
        counts = read_json(place / "sparsity.json")
        stored = weights(place)
        masks = MaskFile(place / "masks.safetensors")
        auto = transformers.AutoModel if family == "bert" else transformers.AutoModelForCausalLM
        auto.from_pretrained(place)
        assert {t.dtype for t in stored.values()} == {dtype}
        for row in counts["rows"]:
            mask = masks.read(row["name"])
            keys = [k for k in stored if k == row["name"] or row["name"].endswith(k)]
            weight = stored[keys[0]]
            weight = weight.T if family == "gpt2" else weight
            assert not weight[~mask].any()
            zeros = 0.6 if family == "bloom" else 0.5
            assert int((~mask).sum()) == pytest.approx(zeros * mask.numel(), abs=len(mask))
        assert (place / "done.json").exists()
    assert all(row["kept"] for row in read_json(folder / "sds" / "sparsity.json")["rows"])
    for block in read_json(folder / "reconstruct" / "sparsity.json")["blocks"]:
        assert block["after"] <= block["before"]


@pytest.fixture
def watched(monkeypatch) -> tuple[dict, dict, list]:
    """By name: second moments that re-densification sees, weights that it gives; and the text."""
    seen, free, ids = {}, {}, []
    redensify = sds_module._Step._redensify

    def watch(step, names, prefix, sparse, target, batches):
        seen[f"{prefix}{names[0]}.weight"] = batches[0].hessian.clone()
        made = redensify(step, names, prefix, sparse, target, batches)
        free.update({f"{prefix}{n}.weight": w.clone() for n, w in made.items()})
        ids[:] = step.first.ids
        return made

    monkeypatch.setattr(sds_module._Step, "_redensify", watch)
    return seen, free, ids


@pytest.mark.parametrize("data", ["dense", "sparse", "redense"])
def test_redensification_sees_the_activations_that_are_asked_for(tiny, entry, watched, data):
    dense = tiny("llama")
    folder, code = entry(dense, "--stages", "[oneshot, sds]", "--sds.data", data)
    assert code == 0
    seen, free, ids = watched
    source = dense if data == "dense" else folder / "oneshot"
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    for name, weight in free.items() if data == "redense" else ():
        model.get_parameter(name).data.copy_(weight)
    name = "model.layers.1.self_attn.q_proj"
    inputs = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(torch.cat(ids))
    x = inputs[0].flatten(0, 1)
    torch.testing.assert_close(seen[f"{name}.weight"], x.T @ x / len(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spoilt, kept", [("the adjustment", "again"), ("both", "first")])
def test_a_matrix_takes_what_has_the_least_error(tiny, entry, monkeypatch, spoilt, kept):
    monkeypatch.setattr(sds_module.Solver, "refit", lambda solver, w, *_: torch.zeros_like(w))
    if spoilt == "both":
        noise = torch.Generator().manual_seed(0)
        monkeypatch.setattr(
            sds_module, "redensify", lambda w, *_: torch.randn(w.shape, generator=noise)
        )
    folder, code = entry(tiny("llama"), "--stages", "[oneshot, sds]", "--sds.l1", 0)
    assert code == 0
    found = [row["kept"] for row in read_json(folder / "sds" / "sparsity.json")["rows"]]
    assert found.count(kept) > len(found) / 2 and "adjusted" not in found
    if kept == "first":
        assert set(found) == {"first"}


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


def test_sds_without_regularisers_or_adjustment_is_its_base(tiny, entry, watched):
    """Re-densified to the dense weights, the second prune is the first one."""
    dense, (_, free, _) = tiny("llama"), watched
    folder, code = entry(
        dense,
        *("--stages", "[oneshot, sds]", "--calibration.held_out", 0, "--sds.adjust", "false"),
        *("--sds.mu", 0, "--sds.l1", 0, "--sds.l2", 0),
    )
    assert code == 0
    for name, weight in weights(dense).items():
        if name in free:
            assert (free[name] - weight).norm() <= 2e-3 * weight.norm()
    assert len(free) == 14
    first, second = (MaskFile(folder / s / "masks.safetensors") for s in ("oneshot", "sds"))
    same = [(first.read(n) == second.read(n)).float().mean().item() for n in first.columns]
    assert min(same) > 0.99
    a, b = weights(folder / "oneshot"), weights(folder / "sds")
    assert all((a[k] - b[k]).norm() <= 0.05 * a[k].norm() for k in a)


def test_sds_never_has_more_error_on_held_out_text_than_its_start(tiny, entry):
    folder, code = entry(tiny("llama"), "--stages", "[oneshot, sds]", "--oneshot.method", "wanda")
    assert code == 0
    before, after = (
        {r["name"]: r["error"] for r in read_json(folder / s / "sparsity.json")["rows"]}
        for s in ("oneshot", "sds")
    )
    assert all(after[n] < 1.02 * before[n] for n in before)
    assert sum(after.values()) < 0.8 * sum(before.values())


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
    (pruned / "masks.safetensors").unlink()  # the zeros say it too
    (pruned / "sparsity.json").unlink()
    more = ("--stages", "[reconstruct]", "--model.dense", dense)
    capsys.readouterr()
    folder, code = entry(pruned, *more, out="second")
    assert code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the zeros of 14 matrices are taken as theirs, 50.0 % of the weights" in said
    rows = read_json(folder / "reconstruct" / "sparsity.json")["rows"]
    assert {r["pattern"] for r in rows} == {"as found"}
    before, after = weights(pruned), weights(folder / "reconstruct")
    for row in rows:
        assert torch.equal(before[row["name"]] == 0, after[row["name"]] == 0)


def test_zeros_that_are_too_few_for_a_mask_are_told(tiny, tmp_path):
    """They would train away without a word."""
    folder = tiny("llama")
    stored = weights(folder)
    for part, share in (("q_proj", 0.15), ("up_proj", 0.4)):
        name = f"model.layers.0.{'self_attn' if part == 'q_proj' else 'mlp'}.{part}.weight"
        stored[name].view(-1)[: int(share * stored[name].numel())] = 0
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    masks = Masks(folder, World.alone(torch.device("cpu")))
    assert list(masks) == ["model.layers.0.mlp.up_proj.weight"]
    assert "the zeros of 1 matrices are taken as theirs" in masks.told
    assert "1 matrices have zeros that will not stay, fewer than 20%" in masks.told
    assert "model.layers.0.self_attn.q_proj.weight has most (14.9 %)" in masks.told
    assert not Masks(tiny("llama"), World.alone(torch.device("cpu"))).told


def test_what_a_later_prune_leaves_as_it_is_keeps_its_earlier_zeros(tiny, entry):
    """Its mask goes with the model: what trains later must not take its zeros for weights."""
    first, _ = entry(tiny("llama"), "--stages", "[oneshot]", "--oneshot.sparsity", 0.6, out="first")
    left = ("--oneshot.sparsity", 0.7, "--oneshot.layers", '{"*.mlp.*": 0}')
    folder, code = entry(first / "oneshot", "--stages", ALL, *left, out="second")
    assert code == 0
    earlier = MaskFile(first / "oneshot" / "masks.safetensors")
    for stage in ("oneshot", "sds", "reconstruct"):
        masks, stored = MaskFile(folder / stage / "masks.safetensors"), weights(folder / stage)
        assert masks.columns.keys() == earlier.columns.keys()
        for name in masks.columns:
            mask = masks.read(name)
            assert not stored[name][~mask].any()
            if ".mlp." in name:
                assert torch.equal(mask, earlier.read(name))
            else:
                assert int((~mask).sum()) == pytest.approx(0.7 * mask.numel(), abs=1)


def test_sds_starts_from_a_model_of_another_format_that_was_pruned_elsewhere(tiny, entry, tmp_path):
    dense = tiny("llama")
    first, _ = entry(dense, "--stages", "[oneshot]", out="first")
    pruned = first / "oneshot"
    torch.save(weights(pruned), pruned / "pytorch_model.bin")
    for path in [*pruned.glob("*.safetensors*"), pruned / "sparsity.json"]:
        path.unlink()
    folder, code = entry(pruned, "--stages", "[sds]", "--model.dense", dense, out="second")
    assert code == 0
    for row in read_json(folder / "sds" / "sparsity.json")["rows"]:
        assert row["masked"] == pytest.approx(0.5 * row["shape"][0] * row["shape"][1], abs=1)


@pytest.mark.parametrize("pattern", ["1:4", "2:8"])
def test_sds_takes_any_pattern_of_a_model_that_was_pruned_elsewhere(tiny, entry, pattern):
    dense = tiny("llama")
    asked = ("--oneshot.pattern", pattern)
    first, _ = entry(dense, "--stages", "[oneshot]", *asked, out="first")
    for name in ("masks.safetensors", "sparsity.json"):
        (first / "oneshot" / name).unlink()
    start = ("--stages", "[sds]", "--model.dense", dense)
    folder, code = entry(first / "oneshot", *start, *asked, out="second")
    assert code == 0
    for row in read_json(folder / "sds" / "sparsity.json")["rows"]:
        assert row["masked"] == 0.75 * row["shape"][0] * row["shape"][1]


@pytest.mark.parametrize(
    "made, asked, words",
    [
        (["--oneshot.pattern", "2:4"], [], ["is pruned to 2:4", "give --oneshot.pattern 2:4"]),
        (
            ["--oneshot.pattern", "1:4"],
            ["--oneshot.pattern", "2:4"],
            ["is pruned to 1:4", "give --oneshot.pattern 1:4"],
        ),
        (
            [],
            ["--oneshot.pattern", "2:4"],
            ["is pruned to unstructured", "give --oneshot.pattern unstructured"],
        ),
        ([], ["--oneshot.sparsity", "0.7"], ["to 50.0 % zeros", "give --oneshot.sparsity 0.5"]),
    ],
)
def test_sds_does_not_change_what_a_model_was_pruned_to_elsewhere(
    tiny, entry, capsys, made, asked, words
):
    dense = tiny("llama")
    folder, code = entry(dense, "--stages", "[oneshot]", *made, out="first")
    assert code == 0
    pruned = folder / "oneshot"
    (pruned / "masks.safetensors").unlink()
    (pruned / "sparsity.json").unlink()
    capsys.readouterr()
    more = ("--stages", "[sds]", "--model.dense", dense)
    assert entry(pruned, *more, *asked, out="second")[1] == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert entry(pruned, *more, *made, out="second")[1] == 0


@pytest.mark.parametrize("stage", ["sds", "reconstruct"])
def test_a_dense_model_that_is_none_is_refused(tiny, entry, capsys, stage):
    folder, code = entry(tiny("llama"), "--stages", "[oneshot]", out="first")
    assert code == 0
    more = ("--stages", f"[{stage}]", "--model.dense", folder / "oneshot")
    for start in (folder / "oneshot", tiny("llama")):
        assert entry(start, *more, out="second")[1] == 2
        assert "give the model that it was pruned from" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["sds", "reconstruct"])
def test_a_dense_model_that_changed_on_the_way_is_refused(
    tiny, entry, capsys, monkeypatch, tmp_path, stage
):
    dense = shutil.copytree(tiny("llama", num_hidden_layers=3), tmp_path / "dense")
    folder, code = entry(dense, "--stages", "[oneshot]", out="first")
    assert code == 0
    more = ("--stages", f"[{stage}]", "--model.dense", dense)
    write = stage_module.BlockStage.write

    def stop_at_the_second(work, i, *rest):
        if i == 1:
            raise UserError("the plug was pulled")
        write(work, i, *rest)

    monkeypatch.setattr(stage_module.BlockStage, "write", stop_at_the_second)
    assert entry(folder / "oneshot", *more, out="second")[1] == 2
    monkeypatch.undo()
    stored = load_file(dense / "model.safetensors")
    stored = {k: 1.5 * v if "proj" in k else v for k, v in stored.items()}
    save_file(stored, dense / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert entry(folder / "oneshot", *more, out="second")[1] == 2
    message = capsys.readouterr().err
    assert f"the weights in {dense} have changed since" in message


def test_sds_on_wanda_keeps_wandas_budget_by_row(tiny, entry):
    folder, code = entry(
        tiny("llama"), "--stages", "[oneshot, sds]", "--oneshot.method", "wanda", "--sds.redensify",
        "false", "--calibration.held_out", 0,
    )  # fmt: skip
    assert code == 0
    masks = MaskFile(folder / "sds" / "masks.safetensors")
    for name in masks.columns:
        kept = masks.read(name).sum(1)
        assert kept.min() == kept.max()


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

    def judge(section) -> float:
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


def test_halves_train_the_attention_first_and_the_rest_after(tiny, entry):
    model, stages = tiny("llama"), ("--stages", "[oneshot, reconstruct]")
    stages += ("--reconstruct.inputs", "dense")  # so that no block sees the ones before it
    whole, _ = entry(model, *stages, out="whole")
    folder, code = entry(model, *stages, "--reconstruct.halves", "true", out="halves")
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
    more = ("--reconstruct.halves", "true", "--reconstruct.lr", "1e-7")
    folder, code = entry(tiny("llama"), "--stages", "[oneshot, reconstruct]", *more)
    assert code == 0
    assert all(b["after"] == b["before"] and b["epoch"] == 0 for b in blocks_of(folder))
    before, after = weights(folder / "oneshot"), weights(folder / "reconstruct")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_stages_compose_up_to_recovery(tiny, text_file, tmp_path):
    more = ["--stages", "[oneshot, sds, reconstruct, recover]", "--recover.corpus", text_file]
    more += ["--recover.length", 48, "--recover.tokens", 6 * 4 * 48, "--recover.batch", 4]
    more += ["--recover.held_out", 2, "--recover.contrast.segments", 4, "--recover.lr", 0.003]
    more += ["--recover.contrast.token_positions", 8, "--recover.contrast.frequent_ids", 5]
    command = options(tiny("llama"), text_file, tmp_path / "run", *more)
    done = run_entry(command)
    assert done.returncode == 0, done.stderr
    stages = [tmp_path / "run" / s for s in ("oneshot", "sds", "reconstruct", "recover")]
    masks = [MaskFile(folder / "masks.safetensors") for folder in stages]
    stored = [weights(folder) for folder in stages]
    for n, (earlier, later) in enumerate(itertools.pairwise(stages)):
        assert read_json(later / "recipe.json")["start"] == earlier.name
        before, after = stored[n : n + 2]
        assert not all(torch.equal(before[key], after[key]) for key in before)
    for name in masks[0].columns:
        made = [file.read(name) for file in masks]
        assert torch.equal(made[1], made[2]) and torch.equal(made[1], made[3])
        assert all(not w[name][~mask].any() for w, mask in zip(stored, made, strict=True))


# the entry, which is killed when all of a block is written but the row that says so
KILLED_AT = """
import os, signal, sys
from cap_llm import train
from cap_llm.blockwise import stage

write = stage.write_json

def write_or_die(path, value):
    if str(path) == {path!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, value)

stage.write_json = write_or_die
sys.exit(train.main())
"""


@pytest.mark.parametrize(
    "stage, more",
    [
        ("sds", ["--sds.data", "redense"]),
        ("sds", ["--sds.mode", "paper", "--oneshot.pattern", "row"]),
        ("reconstruct", []),
        ("reconstruct", ["--reconstruct.inputs", "dense"]),
    ],
)
def test_killed_and_started_again_gives_the_same_bits(tiny, text_file, tmp_path, stage, more):
    model = tiny("llama", num_hidden_layers=5)
    more = ["--stages", f"[oneshot, {stage}]", *more]
    killed = options(model, text_file, tmp_path / "killed", *more)
    fourth = tmp_path / "killed" / stage / "blocks" / "00003.json"
    python = [sys.executable, "-c", KILLED_AT.format(path=str(fourth)), *map(str, killed)]
    done = subprocess.run(python, env=environment(), capture_output=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    third = fourth.with_name("00002.json")
    assert third.exists() and not fourth.exists()
    before = read_json(third) | {"elapsed": 7200.0, "peak_memory_bytes": 2**50}
    third.write_text(json.dumps(before))
    # blocks that are independent may go on on other ranks than they were begun on
    for name, ranks in (("killed", 2 if "dense" in more else 1), ("whole", 1)):
        done = run_entry(options(model, text_file, tmp_path / name, *more), ranks)
        assert done.returncode == 0, done.stderr
    a, b = (tmp_path / name / stage for name in ("killed", "whole"))
    facts = json.loads((a / "done.json").read_text())
    assert facts["resumed_at_block"] == 3
    assert facts["seconds"] > 7200 and facts["peak_memory_bytes"] == 2**50  # of both jobs
    for path in [*b.glob("model*.safetensors"), b / "masks.safetensors"]:
        assert path.read_bytes() == (a / path.name).read_bytes()


@pytest.mark.parametrize(
    "stage, more",
    [
        ("reconstruct", ["--reconstruct.inputs", "dense"]),
        ("reconstruct", []),
        ("sds", ["--sds.data", "redense", "--sds.adjust", "false"]),
        ("sds", ["--sds.mode", "paper", "--oneshot.pattern", "row"]),
    ],
)
def test_two_ranks_equal_one(tiny, text_file, tmp_path, stage, more):
    """From one start; blocks in turn are equal bit for bit, shared sequences up to summation.

    ALPS' iterations, as which SDS adjusts, may go another way from a last bit on; what they are
    given is also what the second prune is.
    """
    model = tiny("llama", num_hidden_layers=3)
    pattern = more[2:] if "--oneshot.pattern" in more else []
    start = options(model, text_file, tmp_path / "start", "--stages", "[oneshot]", *pattern)
    more = [*more, "--calibration.held_out", 5]  # no multiple of the ranks
    more += ["--model.dense", model, "--stages", f"[{stage}]"]
    pruned = tmp_path / "start" / "oneshot"
    one, two = (options(pruned, text_file, tmp_path / n, *more) for n in ("one", "two"))
    for command, ranks in ((start, 1), (one, 1), (two, 2)):
        done = run_entry(command, ranks)
        assert done.returncode == 0, done.stderr
    before = weights(pruned)
    a, b = (weights(tmp_path / n / stage) for n in ("one", "two"))
    for key in a:
        if "dense" in more:
            assert torch.equal(a[key], b[key])
        # of how far it has gone: with half of the text it would go elsewhere
        assert (a[key] - b[key]).norm() <= 0.1 * (a[key] - before[key]).norm()


@pytest.mark.parametrize(
    "pruned_to, asked, words",
    [
        (["--oneshot.pattern", "2:4"], [], ["to 2:4", "--oneshot.pattern 2:4"]),
        ([], ["--oneshot.pattern", "2:4"], ["--oneshot.pattern unstructured"]),
        (["--oneshot.sparsity", "0.3"], [], ["30.0 % zeros", "--oneshot.sparsity 0.3"]),
    ],
)
def test_sds_refuses_to_prune_again_to_another_pattern(
    tiny, entry, capsys, pruned_to, asked, words
):
    dense = tiny("llama")
    folder, _ = entry(dense, "--stages", "[oneshot]", *pruned_to, out="first")
    start = ("--stages", "[sds]", "--model.dense", dense)
    capsys.readouterr()
    again, code = entry(folder / "oneshot", *start, *asked, out="second")
    assert code == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert not list(again.glob("sds/*"))
    _, code = entry(folder / "oneshot", *start, *pruned_to, out="second")  # the remedy it names
    assert code == 0


@pytest.mark.parametrize(
    "pruned_to, asked",
    [
        (["--oneshot.pattern", "row"], []),  # Wanda's unstructured is by row, too
        (["--oneshot.layers", '{"*.down_proj": 0.25, "*.q_proj": 0}'], []),
        (["--oneshot.sparsity", "0.3333"], ["--oneshot.sparsity", "0.333"]),
    ],
)
def test_sds_takes_a_start_of_its_own_pattern_and_any_uneven_budget(tiny, entry, pruned_to, asked):
    dense, wanda = tiny("llama"), ("--oneshot.method", "wanda")
    first, _ = entry(dense, "--stages", "[oneshot]", *wanda, *pruned_to, out="first")
    start = ("--stages", "[sds]", "--model.dense", dense, *wanda)
    second, code = entry(first / "oneshot", *start, *asked, out="second")
    assert code == 0
    before, after = (
        {r["name"]: r["masked"] for r in read_json(place / "sparsity.json")["rows"]}
        for place in (first / "oneshot", second / "sds")
    )
    assert before == after


def test_sds_stays_inside_an_earlier_mask(tiny, entry):
    """The dense model of the second run is itself pruned, as on a ladder."""
    earlier, _ = entry(tiny("llama"), "--stages", "[oneshot]", "--oneshot.sparsity", 0.3, out="a")
    more = ("--stages", "[oneshot, sds]", "--oneshot.sparsity", 0.6)
    folder, code = entry(earlier / "oneshot", *more, out="b")
    assert code == 0
    files = [MaskFile(f / "masks.safetensors") for f in (earlier / "oneshot", folder / "sds")]
    stored, kept = weights(folder / "sds"), read_json(folder / "sds" / "sparsity.json")["rows"]
    assert {row["kept"] for row in kept} - {"first"}
    for name in files[0].columns:
        allowed, mask = (file.read(name) for file in files)
        assert not (mask & ~allowed).any() and not stored[name][~mask].any()
        assert int((~mask).sum()) == round(0.6 * mask.numel())


@pytest.mark.parametrize(
    "more, words",
    [
        (["--stages", "[sds]"], ["sds starts from", "--model.dense"]),
        (["--stages", "[reconstruct]"], ["reconstruct starts from", "--model.dense"]),
        (
            ["--stages", "[sds]", "--sds.redensify", "false", "--sds.adjust", "false"],
            ["both off"],
        ),
        (["--stages", ALL, "--sds.mu", "-1"], ["sds.mu is -1"]),
        (["--stages", ALL, "--reconstruct.lr", "0"], ["reconstruct.lr is 0"]),
        (["--stages", ALL, "--reconstruct.epochs", "0"], ["reconstruct.epochs is 0"]),
        (["--stages", "[sds, oneshot]"], ["in this order"]),
        (
            ["--stages", ALL, "--calibration.sequences", "4000", "--calibration.held_out", "1"],
            ["to hold out any"],
        ),
    ],
)
def test_bad_input_is_one_line_before_any_work(tiny, entry, capsys, more, words):
    model = tiny("llama")
    capsys.readouterr()
    folder, code = entry(model, *more)
    assert code == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert not list(folder.glob("*/blocks"))


def test_a_dense_model_of_other_shape_is_refused(tiny, entry, capsys):
    other = tiny("llama", intermediate_size=96)
    more = ("--stages", "[reconstruct]", "--model.dense", other)
    _, code = entry(tiny("llama"), *more)
    assert code == 2
    assert "give the model that it was pruned from" in capsys.readouterr().err


def test_a_stage_added_before_a_finished_one_is_refused(tiny, entry, capsys):
    model = tiny("llama")
    assert entry(model, "--stages", "[oneshot, reconstruct]")[1] == 0
    assert entry(model, "--stages", "[sds, reconstruct]")[1] == 2
    assert "start was 'oneshot' there and is 'sds' now" in capsys.readouterr().err


def test_a_diverging_block_is_named(tiny, entry, capsys):
    model, more = tiny("llama"), ("--stages", "[oneshot, reconstruct]")
    _, code = entry(model, *more, "--reconstruct.lr", "1e30")
    assert code == 2
    assert "lower --reconstruct.lr" in capsys.readouterr().err
    assert entry(model, *more)[1] == 0  # the remedy works in the same run directory


@pytest.mark.parametrize("stage", ["sds", "reconstruct"])
def test_a_start_that_nobody_pruned_is_refused(tiny, entry, capsys, stage):
    model, dense = tiny("llama"), tiny("llama", seed=1)
    folder, code = entry(model, "--stages", f"[{stage}]", "--model.dense", dense)
    assert code == 2
    assert "is not pruned" in capsys.readouterr().err
    assert not list(folder.glob("*/model*.safetensors"))


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


def test_scores_of_every_stage_are_those_of_its_model(tiny, entry, text_file, tmp_path):
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(text_file.read_text()[::-1])
    folder, code = entry(
        tiny("llama"),
        *("--stages", "[oneshot, sds, reconstruct, evaluate]", "--evaluate.window", 48),
        *("--evaluate.corpora", f"[{held_out}]", "--evaluate.max_windows", 5),
    )
    assert code == 0
    from cap_llm.text.tokenizers import load_tokenizer
    from cap_llm.text.windows import evaluation_windows

    for stage in ("sds", "reconstruct"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / stage)
        tokenizer = load_tokenizer(str(folder / stage))
        windows = evaluation_windows(tokenizer, held_out.read_text(), "text", 48, 5)
        (score,) = read_json(folder / stage / "perplexity.json")["corpora"].values()
        assert score["ppl_token"] == pytest.approx(perplexity(model, windows), rel=1e-4)
        assert load_file(folder / stage / "masks.safetensors")

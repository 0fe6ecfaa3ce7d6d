"""What holds for `sds` and `reconstruct` alike: files, chains, resuming, ranks, bad input."""

import functools
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import processes
import pytest
import torch
import transformers
from commands import ALL, options
from safetensors.torch import load_file, save_file
from support import weights

from cap_llm.blockwise import stage as stage_module
from cap_llm.blockwise.perplexity import perplexity
from cap_llm.models.mask_file import FILE, MaskFile
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import read_json


@pytest.mark.parametrize(
    "family, more",
    [
        ("llama", ["--reconstruct.split_attention", "true", "--reconstruct.inputs", "dense"]),
        ("opt", ["--oneshot.pattern", "2:4", "--sds.data", "dense"]),
        ("gpt2", ["--oneshot.method", "wanda", "--sds.data", "redense"]),
        ("neox", ["--oneshot.method", "alps", "--reconstruct.inputs", "dense"]),
        ("opt350", ["--oneshot.pattern", "row", "--sds.mode", "paper"]),
        ("bloom", ["--oneshot.method", "admm_grad", "--oneshot.sparsity", "0.6"]),
        ("bert", ["--oneshot.method", "magnitude", "--reconstruct.split_attention", "true"]),
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
        masks = MaskFile(place / FILE)
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


def test_what_a_later_prune_leaves_as_it_is_keeps_its_earlier_zeros(tiny, entry):
    """Its mask goes with the model: what trains later must not take its zeros for weights."""
    first, _ = entry(tiny("llama"), "--stages", "[oneshot]", "--oneshot.sparsity", 0.6, out="first")
    left = ("--oneshot.sparsity", 0.7, "--oneshot.layers", '{"*.mlp.*": 0}')
    folder, code = entry(first / "oneshot", "--stages", ALL, *left, out="second")
    assert code == 0
    earlier = MaskFile(first / "oneshot" / FILE)
    for stage in ("oneshot", "sds", "reconstruct"):
        masks, stored = MaskFile(folder / stage / FILE), weights(folder / stage)
        assert masks.columns.keys() == earlier.columns.keys()
        for name in masks.columns:
            mask = masks.read(name)
            assert not stored[name][~mask].any()
            if ".mlp." in name:
                assert torch.equal(mask, earlier.read(name))
            else:
                assert int((~mask).sum()) == pytest.approx(0.7 * mask.numel(), abs=1)


@pytest.mark.parametrize("stage", ["sds", "reconstruct"])
def test_a_dense_model_that_is_none_is_refused(tiny, entry, capsys, stage):
    folder, code = entry(tiny("llama"), "--stages", "[oneshot]", out="first")
    assert code == 0
    more = ("--stages", f"[{stage}]", "--model.dense", folder / "oneshot")
    for start in (folder / "oneshot", tiny("llama")):
        assert entry(start, *more, out="second")[1] == 2
        assert "model.dense" in capsys.readouterr().err


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


def test_the_stages_compose_up_to_recovery(tiny, text_file, tmp_path):
    more = ["--stages", "[oneshot, sds, reconstruct, recover]", "--recover.corpus", text_file]
    more += [
        "--recover.length",
        48,
        "--recover.optimizer.tokens",
        6 * 4 * 48,
        "--recover.optimizer.batch",
        4,
    ]
    more += [
        "--recover.held_out",
        2,
        "--recover.contrast.segments",
        4,
        "--recover.optimizer.lr",
        0.003,
    ]
    more += ["--recover.contrast.token_positions", 8, "--recover.contrast.n_unlabeled_frequent", 5]
    command = options(tiny("llama"), text_file, tmp_path / "run", *more)
    done = processes.run(command)
    assert done.returncode == 0, done.stderr
    stages = [tmp_path / "run" / s for s in ("oneshot", "sds", "reconstruct", "recover")]
    masks = [MaskFile(folder / FILE) for folder in stages]
    stored = [weights(folder) for folder in stages]
    for n, (earlier, later) in enumerate(itertools.pairwise(stages)):
        assert read_json(later / "recipe.json")["start"] == earlier.name
        before, after = stored[n : n + 2]
        assert not all(torch.equal(before[key], after[key]) for key in before)
    for name in masks[0].columns:
        made = [file.read(name) for file in masks]
        assert torch.equal(made[1], made[2]) and torch.equal(made[1], made[3])
        assert all(not w[name][~mask].any() for w, mask in zip(stored, made, strict=True))


def kill_at(path: Path) -> None:
    """Kills this process when all of a block is written except its record at `path`."""
    write = stage_module.write_json

    def write_or_die(target, value):
        if target == path:
            os.kill(os.getpid(), signal.SIGKILL)
        write(target, value)

    stage_module.write_json = write_or_die


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
    done = processes.run(killed, before=functools.partial(kill_at, fourth))
    assert done.returncode == -signal.SIGKILL, done.stderr
    third = fourth.with_name("00002.json")
    assert third.exists() and not fourth.exists()
    before = read_json(third) | {"elapsed": 7200.0, "peak_memory_bytes": 2**50}
    third.write_text(json.dumps(before))
    # blocks that are independent may go on on other ranks than they were begun on
    for name, ranks in (("killed", 2 if "dense" in more else 1), ("whole", 1)):
        done = processes.run(options(model, text_file, tmp_path / name, *more), ranks)
        assert done.returncode == 0, done.stderr
    a, b = (tmp_path / name / stage for name in ("killed", "whole"))
    facts = json.loads((a / "done.json").read_text())
    assert facts["resumed_at_block"] == 3
    assert facts["seconds"] > 7200 and facts["peak_memory_bytes"] == 2**50  # of both jobs
    for path in [*b.glob("model*.safetensors"), b / FILE]:
        assert path.read_bytes() == (a / path.relative_to(b)).read_bytes()


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
        done = processes.run(command, ranks)
        assert done.returncode == 0, done.stderr
    before = weights(pruned)
    a, b = (weights(tmp_path / n / stage) for n in ("one", "two"))
    for key in a:
        if "dense" in more:
            assert torch.equal(a[key], b[key])
        # of how far it has gone: with half of the text it would go elsewhere
        assert (a[key] - b[key]).norm() <= 0.1 * (a[key] - before[key]).norm()


@pytest.mark.parametrize(
    "more, words",
    [
        (["--stages", "[sds]"], ["sds starts from", "--model.dense"]),
        (["--stages", "[reconstruct]"], ["reconstruct starts from", "--model.dense"]),
        (
            ["--stages", "[oneshot, sds]", "--model.dense", "/nowhere/dense"],
            ["model.dense", "/nowhere/dense is not a directory"],
        ),
        (
            ["--stages", "[sds]", "--sds.redensify", "false", "--sds.adjust", "false"],
            ["sds.redensify", "sds.adjust"],
        ),
        (["--stages", ALL, "--sds.mu", "-1"], ["sds.mu is -1"]),
        (["--stages", ALL, "--reconstruct.lr", "0"], ["reconstruct.lr is 0"]),
        (["--stages", ALL, "--reconstruct.epochs", "0"], ["reconstruct.epochs is 0"]),
        (["--stages", "[sds, oneshot]"], ["in this order"]),
        (
            ["--stages", ALL, "--calibration.sequences", "4000", "--calibration.held_out", "1"],
            ["--calibration.held_out"],
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


def test_a_stage_added_before_a_finished_one_is_refused(tiny, entry, capsys):
    model = tiny("llama")
    assert entry(model, "--stages", "[oneshot, reconstruct]")[1] == 0
    assert entry(model, "--stages", "[sds, reconstruct]")[1] == 2
    assert "start: 'oneshot', now 'sds'" in capsys.readouterr().err


def test_sds_with_its_adjustment_is_as_good_on_two_ranks(tiny, text_file, tmp_path):
    """ALPS' iterations may go another way from a last bit on, and end as near."""
    model = tiny("llama", num_hidden_layers=2)
    more = ["--stages", "[oneshot, sds]", "--calibration.held_out", 5]
    for n, ranks in (("one", 1), ("two", 2)):
        done = processes.run(options(model, text_file, tmp_path / n, *more), ranks)
        assert done.returncode == 0, done.stderr
    one, two = (read_json(tmp_path / n / "sds" / "sparsity.json")["rows"] for n in ("one", "two"))
    assert {row["kept"] for row in two} == {"adjusted"}
    for a, b in zip(one, two, strict=True):
        assert b["name"] == a["name"] and b["error"] == pytest.approx(a["error"], rel=0.05)
    masks = [MaskFile(tmp_path / n / "sds" / FILE) for n in ("one", "two")]
    for name in masks[0].columns:
        assert (masks[0].read(name) == masks[1].read(name)).float().mean() > 0.9


@pytest.mark.parametrize("stage", ["sds", "reconstruct"])
def test_activations_that_overflow_are_named_by_block(tiny, entry, capsys, stage):
    dense = tiny("llama", num_hidden_layers=2)
    folder, _ = entry(dense, "--stages", "[oneshot]", out="first")
    pruned = folder / "oneshot"
    name = "model.layers.1.mlp.up_proj.weight"
    file = pruned / read_json(pruned / "model.safetensors.index.json")["weight_map"][name]
    stored = load_file(file)
    stored[name].mul_(1e38)
    save_file(stored, file, metadata={"format": "pt"})
    capsys.readouterr()
    more = ("--stages", f"[{stage}]", "--model.dense", dense)
    assert entry(pruned, *more, out="second")[1] == 2
    message = capsys.readouterr().err
    assert "model.layers.1" in message and "not finite" in message
    assert "--reconstruct.lr" not in message  # which nothing has followed yet


@pytest.mark.parametrize("stage", ["sds", "reconstruct"])
def test_a_start_that_nobody_pruned_is_refused(tiny, entry, capsys, stage):
    model, dense = tiny("llama"), tiny("llama", seed=1)
    folder, code = entry(model, "--stages", f"[{stage}]", "--model.dense", dense)
    assert code == 2
    assert "is not pruned" in capsys.readouterr().err
    assert not list(folder.glob("*/model*.safetensors"))


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
        (score,) = read_json(folder / stage / "scores.json")["scores"]
        assert score["value"] == pytest.approx(perplexity(model, windows), rel=1e-4)
        assert load_file(folder / stage / FILE)

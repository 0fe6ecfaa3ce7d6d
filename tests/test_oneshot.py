"""The real entry on small models: files, numbers, resuming, ranks."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import processes
import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import FAMILIES, ROOT, environment, weights

from cap_llm.blockwise.perplexity import perplexity
from cap_llm.evaluation.scores import read_scores
from cap_llm.models.files import fingerprint
from cap_llm.models.mask_file import FILE, MaskFile, save_masks
from cap_llm.train import main


@pytest.fixture
def entry(monkeypatch, text_file, tmp_path):
    """Runs the entry in this process on a model; returns the run directory and the exit code."""

    def run(model, *options, out="run"):
        folder = tmp_path / out
        held_out = tmp_path / "held-out.txt"
        if not held_out.exists():
            held_out.write_text(text_file.read_text()[::-1])
        words = ["cap-llm", "--output_dir", folder, "--model.path", model]
        words += ["--calibration.corpus", text_file, "--calibration.sequences", 24]
        words += ["--calibration.length", 64, "--evaluate.corpora", f"[{held_out}]"]
        words += ["--evaluate.window", 64, "--evaluate.max_windows", 9, "--runtime.device", "cpu"]
        monkeypatch.setattr(sys, "argv", [str(w) for w in [*words, *options]])
        return folder, main()

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_leaves_a_model_that_transformers_loads_with_exact_zeros(tiny, entry, family):
    source = tiny(family)
    stages = ["--stages", "[oneshot]"] if family == "bert" else []
    folder, code = entry(source, *stages)
    assert code == 0
    stage = folder / "oneshot"
    config = transformers.AutoConfig.from_pretrained(stage)
    cls = getattr(transformers, config.architectures[0])
    model, info = cls.from_pretrained(stage, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    masks = MaskFile(stage / FILE)
    report = json.loads((stage / "sparsity.json").read_text())
    assert {row["name"] for row in report["rows"]} == set(masks.columns)
    for row in report["rows"]:
        weight = model.get_parameter(row["name"])
        if isinstance(
            model.get_submodule(row["name"].removesuffix(".weight")),
            transformers.pytorch_utils.Conv1D,
        ):
            weight = weight.T
        assert torch.equal(weight != 0, masks.read(row["name"]))
        assert row["zeros"] == row["masked"] == weight.numel() // 2
        assert 0 < row["error"] < 1 and row["damping"] == 0.01
    assert report["pruned_matrices"]["sparsity"] == 0.5
    everything = weights(stage)
    zeros = sum(int((t == 0).sum()) for t in everything.values())
    assert report["whole_model"]["zeros"] == zeros
    dense = weights(source)
    assert dense.keys() == everything.keys()
    changed = {k for k in dense if not torch.equal(dense[k], everything[k])}
    assert len(changed) == len(report["rows"])  # and nothing else was touched
    assert json.loads((stage / "done.json").read_text())["peak_memory_bytes"] > 2**20
    for name in ("config.yaml", "environment.json", "log.txt", "metrics.jsonl", "report.html"):
        assert (folder / name).exists()
    assert not (stage / "blocks").exists() and not list(folder.glob(".scratch*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_type_of_the_weights_is_kept(tiny, entry, dtype):
    folder, code = entry(tiny("llama", dtype=dtype), "--oneshot.refit", "true")
    assert code == 0
    assert {t.dtype for t in weights(folder / "oneshot").values()} == {dtype}


def test_streamed_perplexity_equals_the_whole_models(tiny, entry, tmp_path):
    source = tiny("llama")
    folder, code = entry(source)
    assert code == 0
    from cap_llm.text.corpora import evaluation_text
    from cap_llm.text.tokenizers import load_tokenizer
    from cap_llm.text.windows import evaluation_windows

    text, origin = evaluation_text(str(tmp_path / "held-out.txt"))
    windows = evaluation_windows(load_tokenizer(str(source)), text, origin, 64, 9)
    for stage, model in (("dense", source), ("oneshot", folder / "oneshot")):
        (score,) = read_scores(folder / stage / "scores.json").scores
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
        assert score.value == pytest.approx(perplexity(loaded, windows), rel=1e-6)
        assert (score.name, score.n) == ("held-out.txt@64 first 9", 9 * 63)
        assert (score.facts["windows"], score.facts["bos"]) == (9, "<s>")


def test_the_same_command_again_repeats_nothing(tiny, entry):
    source = tiny("llama")
    folder, _ = entry(source)
    before = {p: p.stat().st_mtime_ns for p in (folder / "oneshot").iterdir()}
    _, code = entry(source)
    assert code == 0
    assert {p: p.stat().st_mtime_ns for p in (folder / "oneshot").iterdir()} == before


def test_a_later_pass_prunes_inside_the_earlier_mask(tiny, entry):
    first, _ = entry(tiny("llama"), out="first")
    second, code = entry(first / "oneshot", "--oneshot.sparsity", "0.75", out="second")
    assert code == 0
    old = MaskFile(first / "oneshot" / FILE)
    new = MaskFile(second / "oneshot" / FILE)
    for name in new.columns:
        a, b = old.read(name), new.read(name)
        assert not (b & ~a).any() and int((~b).sum()) == round(0.75 * b.numel())


def test_the_zeros_of_a_model_pruned_elsewhere_are_a_mask(tiny, entry):
    first, _ = entry(tiny("llama"), out="first")
    (first / "oneshot" / FILE).unlink()
    options = ["--oneshot.pattern", "2:4", "--oneshot.initial_mask", "zeros"]
    second, code = entry(first / "oneshot", *options, out="second")
    assert code == 0
    old, new = weights(first / "oneshot"), weights(second / "oneshot")
    masks = MaskFile(second / "oneshot" / FILE)
    for name in masks.columns:
        assert not ((new[name] != 0) & (old[name] == 0)).any()
        assert (masks.read(name).reshape(-1, 4).sum(1) <= 2).all()


def test_layers_by_hand_are_obeyed(tiny, entry):
    layers = json.dumps({"*.down_proj": 0.25, "model.layers.0.*": 0})
    folder, code = entry(tiny("llama"), "--oneshot.layers", layers)
    assert code == 0
    rows = json.loads((folder / "oneshot" / "sparsity.json").read_text())["rows"]
    assert {r["name"].split(".")[2] for r in rows} == {"1"}
    for row in rows:
        share = row["zeros"] / (row["shape"][0] * row["shape"][1])
        assert share == (0.25 if "down_proj" in row["name"] else 0.5)


def test_magnitude_reads_no_calibration_text(tiny, entry):
    options = ["--oneshot.method", "magnitude", "--calibration.corpus", "c4"]
    folder, code = entry(tiny("opt"), *options)
    assert code == 0
    assert json.loads((folder / "oneshot" / "done.json").read_text())["calibration"] is None


@pytest.mark.parametrize("guard", [0, 8])
def test_owl_keeps_the_overall_sparsity(tiny, entry, guard):
    options = ["--oneshot.allocation", "owl", "--oneshot.owl.guard_sequences", guard]
    folder, code = entry(tiny("llama", num_hidden_layers=4), *options)
    assert code == 0
    report = json.loads((folder / "oneshot" / "sparsity.json").read_text())
    assert report["pruned_matrices"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    record = json.loads((folder / "oneshot" / "owl.json").read_text())
    if guard:
        better = record["guard_nll"]["owl"] < record["guard_nll"]["uniform"]
        assert (len(set(record["sparsity"].values())) > 1) == better
    else:
        assert len(set(record["sparsity"].values())) > 1


def test_owl_spreads_what_is_not_set_by_hand(tiny, entry):
    layers = json.dumps({"*.up_proj": 0.25, "model.layers.0.*": 0})
    options = ["--oneshot.allocation", "owl", "--oneshot.owl.guard_sequences", "0"]
    folder, code = entry(tiny("llama", num_hidden_layers=4), *options, "--oneshot.layers", layers)
    assert code == 0
    rows = json.loads((folder / "oneshot" / "sparsity.json").read_text())["rows"]
    free = [r for r in rows if "up_proj" not in r["name"]]
    sizes = [r["shape"][0] * r["shape"][1] for r in free]
    assert sum(r["zeros"] for r in free) / sum(sizes) == pytest.approx(0.5, abs=1e-3)
    assert len({r["zeros"] for r in free if "down_proj" in r["name"]}) > 1  # uneven
    assert not any(r["name"].startswith("model.layers.0.") for r in rows)


def test_owl_on_a_schedule_never_asks_for_less_than_is_gone(tiny, entry):
    owl = ("--oneshot.allocation", "owl", "--oneshot.owl.guard_sequences", 0)
    strong = ("--oneshot.owl.strength", 0.3, "--oneshot.sparsity", 0.5)
    first, code = entry(tiny("llama", num_hidden_layers=4), *owl, *strong, out="first")
    assert code == 0
    mild = ("--oneshot.owl.strength", 0.01, "--oneshot.sparsity", 0.52)
    second, code = entry(first / "oneshot", *owl, *mild, out="second")
    assert code == 0
    before, after = (
        {r["name"]: r["masked"] for r in json.loads(path.read_text())["rows"]}
        for path in (f / "oneshot" / "sparsity.json" for f in (first, second))
    )
    weights = 0
    for name, n in before.items():
        assert after[name] >= n
        weights += n
    assert sum(after.values()) == pytest.approx(weights * 0.52 / 0.5, rel=0.01)


def test_an_intermediate_conversion_can_be_dropped(tiny, entry, tmp_path):
    source, old = tiny("opt"), tmp_path / "old"
    old.mkdir()
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    for file in source.glob("*.json"):
        (old / file.name).write_bytes(file.read_bytes())
    folder, code = entry(old, "--runtime.keep_intermediate", "false")
    assert code == 0
    assert not list((folder / "source").glob("*.safetensors"))
    transformers.AutoModelForCausalLM.from_pretrained(folder / "oneshot")
    again, code = entry(old, "--runtime.keep_intermediate", "false")
    assert code == 0


def test_models_between_stages_are_scored_and_dropped(tiny, entry):
    more = (
        "--stages",
        "[oneshot, sds, reconstruct, evaluate]",
        "--runtime.keep_intermediate",
        False,
    )
    model = tiny("llama")
    for _ in range(2):  # the second time there is nothing to do
        folder, code = entry(model, *more)
        assert code == 0
        for stage in ("oneshot", "sds"):
            assert not (folder / stage / "model.safetensors.index.json").exists()
            assert read_scores(folder / stage / "scores.json").scores
        transformers.AutoModelForCausalLM.from_pretrained(folder / "reconstruct")
        # a removal that was killed half-way: the index goes first
        shutil.copyfile(
            next((folder / "reconstruct").glob("model-*.safetensors")),
            folder / "oneshot" / "model-00001-of-00003.safetensors",
        )
        assert fingerprint(folder / "oneshot") is None


def test_a_mask_of_another_model_is_refused(tiny, entry, capsys):
    first, code = entry(tiny("llama"), out="first")
    assert code == 0
    masks = load_file(first / "oneshot" / FILE)
    name = next(iter(masks))
    save_masks({name: torch.ones(3, 8, dtype=torch.bool)}, first / "oneshot" / FILE)
    _, code = entry(first / "oneshot", "--oneshot.sparsity", 0.7, out="second")
    assert code == 2
    assert name in capsys.readouterr().err


def test_fewer_zeros_than_there_are_is_refused_before_any_block(tiny, entry, capsys):
    first, _ = entry(tiny("llama"), "--oneshot.sparsity", 0.6, out="first")
    folder, code = entry(first / "oneshot", "--oneshot.sparsity", 0.5, out="second")
    assert code == 2
    assert "oneshot.initial_mask" in capsys.readouterr().err
    assert not list(folder.glob("oneshot/*.safetensors"))
    left = ("--oneshot.sparsity", 0.7, "--oneshot.layers", '{"*.mlp.*": 0}')
    assert entry(first / "oneshot", *left, out="third")[1] == 0  # what stays as it is may be sparse


def test_stored_buffers_are_no_weights(tiny, entry, tmp_path):
    """Older GPT-2 files hold a triangle of ones in each block."""
    source = Path(shutil.copytree(tiny("gpt2"), tmp_path / "old"))
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    n_weights = sum(t.numel() for t in tensors.values())
    key = next(k for k in tensors if k.endswith("attn.c_attn.weight"))
    tensors[key.replace("c_attn.weight", "bias")] = torch.ones(1, 1, 64, 64).tril()
    save_file(tensors, file, metadata={"format": "pt"})
    folder, code = entry(source)
    assert code == 0
    whole = json.loads((folder / "oneshot" / "sparsity.json").read_text())["whole_model"]
    assert whole["weights"] == n_weights


def test_the_peak_is_the_stages_own(entry, tiny):
    before = psutil.Process().memory_info().rss
    torch.ones(2**27).sum()  # half a GiB, as a conversion of a model would take
    folder, code = entry(tiny("llama"), "--stages", "[oneshot]")
    done = json.loads((folder / "oneshot" / "done.json").read_text())
    assert code == 0 and done["peak_memory_bytes"] < before + 2**28


def arguments(model, text_file, out, *options) -> list[str]:
    words = ["--output_dir", out, "--model.path", model, "--calibration.corpus", text_file]
    words += ["--calibration.sequences", 7, "--calibration.length", 250, "--stages", "[oneshot]"]
    return [str(w) for w in [*words, "--runtime.device", "cpu", *options]]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_started_again_gives_the_same_bits(tiny, text_file, tmp_path, end):
    model = tiny("llama", num_hidden_layers=24)
    options = ["--oneshot.refit", "true"]
    killed = arguments(model, text_file, tmp_path / "killed", *options)
    done = processes.killed(killed, tmp_path / "killed" / "log.txt", "block   3/24", end)
    assert done.returncode == (143 if end == signal.SIGTERM else -end), done.stderr
    assert ("cap-llm: interrupted" in done.stderr) == (end == signal.SIGTERM)
    assert not (tmp_path / "killed" / "oneshot" / "done.json").exists()
    for name in ("killed", "whole"):
        command = arguments(model, text_file, tmp_path / name, *options)
        assert processes.run(command).returncode == 0
    a, b = (tmp_path / name / "oneshot" for name in ("killed", "whole"))
    assert json.loads((a / "done.json").read_text())["resumed_at_block"] >= 3
    for path in [*b.glob("model*.safetensors"), b / FILE]:
        assert path.read_bytes() == (a / path.relative_to(b)).read_bytes()


@pytest.mark.parametrize(
    "family, method, refit",
    [("llama", "sparsegpt", "true"), ("gpt2", "wanda", "true"), ("opt", "wanda", "false")],
)
def test_two_ranks_equal_one(tiny, text_file, tmp_path, family, method, refit):
    """Seven sequences: an uneven split. Equal up to the order of summation."""
    model = tiny(family)
    options = ["--oneshot.method", method, "--oneshot.refit", refit]
    one = arguments(model, text_file, tmp_path / "one", *options)
    two = arguments(model, text_file, tmp_path / "two", *options)
    for command, ranks in ((one, 1), (two, 2)):
        done = processes.run(command, ranks)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("verified:") == 1  # the second rank is silent
    a, b = (MaskFile(tmp_path / n / "oneshot" / FILE) for n in ("one", "two"))
    agree = sum(int((a.read(n) == b.read(n)).sum()) for n in a.columns)
    assert agree / sum(a.read(n).numel() for n in a.columns) > 0.995
    x, y = weights(tmp_path / "one" / "oneshot"), weights(tmp_path / "two" / "oneshot")
    rows = {}
    for name in ("one", "two"):
        report = json.loads((tmp_path / name / "oneshot" / "sparsity.json").read_text())
        rows[name] = {r["name"]: r for r in report["rows"]}
    for name in a.columns:
        assert rows["one"][name]["zeros"] == rows["two"][name]["zeros"]
        assert rows["one"][name]["error"] == pytest.approx(rows["two"][name]["error"], rel=0.02)
        same = a.read(name) == b.read(name)
        same = same.T if family == "gpt2" else same
        assert (x[name] - y[name])[same].norm() < 0.02 * x[name].norm()


def test_the_deepspeed_launcher_runs_it_and_tells_its_exit_code(tiny, text_file, tmp_path):
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    out = tmp_path / "run"
    command = [launcher, str(ROOT / "cap_llm/train.py")]
    good = arguments(tiny("opt"), text_file, out)
    done = subprocess.run([*command, *good], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (out / "oneshot" / "done.json").exists()
    assert "\x1b" not in done.stdout.split("cmd =")[-1]  # no control characters in a log
    bad = subprocess.run([*command, "--oneshot.sparsity", "2"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert "oneshot.sparsity is 2" in bad.stderr


def test_masks_and_weights_survive_a_shared_scratch(tiny, entry):
    """Activations that do not fit go to disk; the result is the same to the bit."""
    source = tiny("llama")
    plenty, _ = entry(source, out="plenty")
    tight, code = entry(source, "--runtime.activation_gib", "0", out="tight")
    assert code == 0
    for path in (plenty / "oneshot").glob("model*.safetensors"):
        a, b = load_file(path), load_file(tight / "oneshot" / path.name)
        assert all(torch.equal(a[k], b[k]) for k in a)

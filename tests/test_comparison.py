"""The comparison: what may share a column, what is one row and the best, published perplexities."""

import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from made_runs import C4, accuracy, best, dense, model, ppl, quality, table
from safetensors.torch import load_file, save_file
from support import ROOT

from cap_llm.blockwise import oneshot, reconstruct, sds
from cap_llm.config import (
    EvaluateConfig,
    ModelConfig,
    OneshotConfig,
    ReconstructConfig,
    RecoverConfig,
    SdsConfig,
)
from cap_llm.evaluation.evaluate import outside_models
from cap_llm.evaluation.scores import read_scores
from cap_llm.models import mask_file as mask_files
from cap_llm.models.directory import ModelDirectory
from cap_llm.models.masks import count_zeros
from cap_llm.models.result import Result, read_result
from cap_llm.recovery import recover
from cap_llm.report import published as papers
from cap_llm.report.comparison import compare
from cap_llm.report.runs import read_runs
from cap_llm.runtime.console import Console
from cap_llm.runtime.rundir import Run
from cap_llm.runtime.world import World
from cap_llm.stages import Inputs
from cap_llm.train import main

# columns

SPLITS = {
    "window": ({"window": 32, "windows": 80}, "window (window 2048, window 32)"),
    "windows": ({"windows": 5, "text_sha256": "x"}, "windows (windows 40, windows 5)"),
    "limit": ({"limit": 5, "windows": 5}, "limit (all windows, first 5 windows)"),
    "text": ({"text_sha256": "x"}, "text (text abc, text x)"),
    "BOS": ({"bos": "none"}, "bos ("),
    "torch": ({"torch": "2.8.0"}, "torch ("),
    "type": ({"computed_in": "bfloat16"}, "computed in ("),
}


@pytest.mark.parametrize("facts, why", SPLITS.values(), ids=SPLITS)
def test_scores_of_other_facts_have_columns_of_their_own(facts, why):
    labels, rows, notes = quality(model("a", ppl(30)), model("b", ppl(31, **facts)))
    columns = [label for label in labels if "ppl_token" in label]
    assert len(columns) == len(set(columns)) == 2
    assert rows["a"][:2] == ["30.00", "-"] and rows["b"][:2] == ["-", "31.00"]
    assert any(note.startswith(f"text: the columns differ in {why}") for note in notes)


def test_models_of_another_dense_model_have_tables_of_their_own():
    models = [model("a", ppl(30)), model("b", ppl(30), dense="other/opt")]
    assert [(s.title, len(s.rows)) for s in compare(models)] == [("model", 1), ("opt", 1)]
    models[1].result.dense = "other/model"
    assert [s.title for s in compare(models)] == ["some/model", "other/model"]


def test_a_differing_calibration_is_in_the_table_and_has_a_best_of_its_own():
    models = [model("a", ppl(30)), model("b", ppl(20), calibration="other")]
    labels, rows, _ = quality(*models)
    assert labels[-1] == "calibration" and rows["b"][-1] == "other"
    assert best(table([*models, model("c", ppl(31))], "Quality"), "ppl_token") == {"a"}
    *_, notes = quality(models[0], dense(ppl(5)))
    assert "Calibrated on text." in notes


def test_the_best_is_bold_among_models_of_its_own_pattern():
    models = [model("worse", ppl(50)), model("better", ppl(40), sparsity=0.4938)]
    models.append(model("far better", ppl(2), amount="2:4"))
    models.append(model("by layer", ppl(2), amount="", sparsity=0.3))
    assert best(table(models, "Quality"), "ppl_token") == {"better"}


@pytest.mark.parametrize(
    "ahead, task_is_best, mean_is_best",
    [(0.006, False, False), (0.009, False, True), (0.011, True, True)],
)
def test_an_accuracy_within_a_standard_error_of_another_is_not_the_best(
    ahead, task_is_best, mean_is_best
):
    """The standard error is 0.01 of a task, and so 0.007 of the mean of two."""
    models = [
        model(name, accuracy(0.6 + more, "boolq"), accuracy(0.6 + more, "rte"))
        for name, more in (("first", ahead), ("second", 0))
    ]
    assert best(table(models, "Quality"), "Wanda's mean") == ({"first"} if mean_is_best else set())
    assert best(table(models, "Zero-shot"), "boolq") == ({"first"} if task_is_best else set())


# rows


def test_runs_that_differ_only_in_their_seeds_are_one_row():
    models = [
        model(f"method, seed {seed}", ppl(value), identity="x", seeds=[seed], run=str(seed))
        for seed, value in ((0, 30.0), (1, 34.0))
    ]
    _, rows, notes = quality(*models)
    assert list(rows) == ["method (2 seeds)"] and rows["method (2 seeds)"][0] == "32.00 ± 2.83"
    assert any("standard deviation" in note for note in notes)
    models[1].scores = []
    assert quality(*models)[1]["method (2 seeds)"][0] == "30.00 (1 of 2)"


def test_the_same_model_scored_twice_is_one_row_and_other_results_are_two():
    assert list(quality(model("a", ppl(30)), model("a", ppl(30), run="b"))[1]) == ["a"]
    _, rows, _ = quality(model("a", ppl(30), run="one"), model("a", ppl(31), run="two"))
    assert set(rows) == {"a (one)", "a (two)"}
    _, rows, _ = quality(dense(ppl(30), run="one"), dense(ppl(31), run="two"))
    assert set(rows) == {"dense (one)", "dense (two)"}


@pytest.mark.parametrize("amount, gap", [("50%", "75.0"), ("70%", "-")])
def test_the_share_of_the_loss_that_was_removed(amount, gap):
    """One-shot 40, dense 20, recovered 25: three quarters, unless it was pruned further."""
    start = model("oneshot", ppl(40))
    middle = model("sds", stage="sds", before=start.result)
    last = model("last", ppl(25), stage="recover", before=middle.result, amount=amount)
    labels, rows, _ = quality(dense(ppl(20)), start, middle, last)
    gaps = [i for i, label in enumerate(labels) if label.startswith("gap closed")]
    assert [rows["last"][i] for i in gaps] == [gap] * (gap != "-")
    assert all(rows["oneshot"][i] == "-" for i in gaps)


def test_bytes_stand_with_the_type_if_it_differs():
    models = [model(x, dtype=x, n_bytes=2**20) for x in ("float32", "bfloat16")]
    assert "stored as" in table(models, "Cost").columns
    assert "stored as" not in table(models[:1], "Cost").columns


# results of stages

BEFORE = Result("oneshot", "SparseGPT", "2:4")
LABELS = [
    (oneshot.label(OneshotConfig()), ("SparseGPT", "50%")),
    (oneshot.label(OneshotConfig(method="alps", pattern="2:4")), ("ALPS", "2:4")),
    (oneshot.label(OneshotConfig(pattern="row", refit=True)), ("SparseGPT by row + refit", "50%")),
    (oneshot.label(OneshotConfig(method="wanda", pattern="row")), ("Wanda", "50%")),
    (oneshot.label(OneshotConfig(layers={"*.mlp.*": 0})), ("SparseGPT by layer", "")),
    (sds.label(SdsConfig(mode="paper"), BEFORE), ("SparseGPT + SDS", "2:4")),
    (sds.label(SdsConfig(), BEFORE), ("SparseGPT + SDS (gram)", "2:4")),
    (sds.label(SdsConfig(redensify=False), BEFORE), ("SparseGPT + adjustment", "2:4")),
    (
        sds.label(SdsConfig(adjust=False), BEFORE),
        ("SparseGPT + SDS (gram) without adjustment", "2:4"),
    ),
    (reconstruct.label(ReconstructConfig(), BEFORE), ("SparseGPT + reconstruction", "2:4")),
    (recover.label(RecoverConfig(), BEFORE), ("SparseGPT + recovery", "2:4")),
    (recover.label(RecoverConfig(), None), ("dense + recovery", "")),
]


@pytest.mark.parametrize("label, expected", LABELS, ids=lambda x: " ".join(x))
def test_a_label_says_what_was_done(label, expected):
    """Controls and variants must not stand beside the published perplexity of a method."""
    assert label == expected


def test_a_model_of_another_run_keeps_its_history(real, tmp_path, monkeypatch):
    config = yaml.safe_load((real / "config.yaml").read_text())
    words = ["cap-llm", "--config", real / "config.yaml", "--output_dir", tmp_path / "run"]
    words += ["--name", "", "--model.path", real / "oneshot"]
    words += ["--model.dense", config["model"]["path"], "--stages", "[reconstruct, evaluate]"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    assert main() == 0
    first, last = (read_result(r) for r in (real / "oneshot", tmp_path / "run" / "reconstruct"))
    assert last.name == "SparseGPT + reconstruction 50%" and last.before == first
    assert last.seconds > first.seconds and last.dense == first.dense
    assert last.calibration == first.calibration == "8 x 64 tokens of text.txt"
    models, problems = read_runs([real, tmp_path / "run"])
    assert not problems
    (section,) = compare(models)
    assert [row.name for row in section.rows] == ["dense", "a method", last.name]
    assert len(section.rows[1].models) == 2  # also as the model that the second run was given


# models that no stage made


def zeroed(model: Path, folder: Path, share: float) -> Path:
    """A copy of a model with this share of zeros in the matrices of its blocks, and no more."""
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, weight in tensors.items():
        if ".layers." in name and weight.dim() == 2 and share:
            least = weight.abs().flatten().kthvalue(max(1, int(share * weight.numel()))).values
            weight[weight.abs() <= least] = 0
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "share, masks, pruned, shown",
    [(0.5, 0, True, 0.5), (0.1, 0, False, 0.1), (0.001, 0, False, None), (0.1, 1, True, 0.1)],
)
def test_zeros_of_the_weights_tell_what_is_pruned(tiny, tmp_path, share, masks, pruned, shown):
    folder = zeroed(tiny("llama"), tmp_path / "model", share)
    if masks:
        (folder / mask_files.FILE).parent.mkdir()
        save_file({"x": torch.zeros(1)}, folder / mask_files.FILE)
    rows, (zeros, n), is_pruned = count_zeros(ModelDirectory(folder), World("cpu"))
    assert is_pruned == pruned and 0 < zeros < share * n + 64
    shares = [z / math.prod(shape) for shape, z in rows.values()]
    assert shares == pytest.approx([shown] * len(shares), abs=0.01) and bool(shares) == bool(shown)


def test_files_beside_weights_without_zeros_make_no_pruned_model(tiny, tmp_path):
    """As a dense fine-tuning leaves them, saved to the directory of the pruned model."""
    folder = shutil.copytree(tiny("gpt2"), tmp_path / "model")
    (folder / mask_files.FILE).parent.mkdir()
    save_file({"x": torch.zeros(1)}, folder / mask_files.FILE)
    assert count_zeros(ModelDirectory(folder), World("cpu"))[::2] == ({}, False)


OUTSIDE = {
    "alone": (0.5, {}, {"given"}),
    "with few zeros": (0.001, {}, {"dense"}),
    "with the dense model": (0.5, {"model.dense": "dense"}, {"given", "dense"}),
    "a copy of the dense model": (0.0, {"model.dense": "dense"}, {"dense"}),
    "without its scores": (0.5, {"model.dense": "dense", "score": False}, {"given"}),
    "with a teacher": (0.5, {"teacher": "dense"}, {"given", "dense"}),
    "with a larger teacher": (0.5, {"teacher": "larger"}, {"given"}),
    "dense, with a teacher": (0.0, {"teacher": "other"}, {"dense"}),
}


@pytest.mark.parametrize("share, settings, folders", OUTSIDE.values(), ids=OUTSIDE)
def test_what_a_run_scores_besides_its_own(tiny, tmp_path, share, settings, folders):
    shutil.copytree(tiny("llama"), tmp_path / "dense")
    source = zeroed(tmp_path / "dense", tmp_path / "model", share)
    if "teacher" in settings and settings["teacher"] != "dense":
        overrides = {"num_hidden_layers": 3} if settings["teacher"] == "larger" else {"seed": 1}
        shutil.copytree(tiny("llama", **overrides), tmp_path / settings["teacher"])
    dense, teacher = (
        tmp_path / settings[k] if k in settings else None for k in ("model.dense", "teacher")
    )
    further = {"model.dense": dense, "recover.teacher": teacher}
    opened = ModelDirectory(source)
    run = Run(str(tmp_path / "run"), World("cpu"), Console(False))
    inputs = Inputs(
        run=run,
        recipe={},
        model=ModelConfig(path=str(source), dense=dense),
        keep_intermediate=True,
        source=opened,
        start=opened,
        dense=opened,
        from_run=False,
        models={o: ModelDirectory(path) for o, path in further.items() if path},
        finished={"recover": opened} if teacher else {},
    )
    models = outside_models(inputs, EvaluateConfig(dense=settings.get("score", True)))
    run.close()
    assert set(models) == folders
    assert models.get("given", opened) == opened
    for name in folders:
        result = read_result(run.path / name)
        assert (result.stage, result.weights) == (name, models[name].fingerprint)
        dense_path = {"given": dense or teacher, "dense": models[name]}[name] or source
        assert (run.path / name / "sparsity.json").exists() and result.n_bytes
        if folders == {"given", "dense"}:
            assert result.dense == str(dense_path)


def test_a_model_pruned_elsewhere_stands_beside_its_dense_one(
    tiny, text_file, tmp_path, monkeypatch
):
    dense = shutil.copytree(tiny("llama"), tmp_path / "model")
    pruned = zeroed(dense, tmp_path / "pruned", 0.5)
    words = ["cap-llm", "--output_dir", tmp_path / "run", "--model.path", pruned]
    words += ["--model.dense", dense, "--stages", "[evaluate]", "--runtime.device", "cpu"]
    words += ["--evaluate.corpora", f"[{text_file}]", "--evaluate.window", 64]
    words += ["--evaluate.max_windows", 5]
    monkeypatch.setattr(sys, "argv", [str(w) for w in words])
    assert main() == 0
    labels, rows, _ = quality(*read_runs([tmp_path / "run"])[0])
    assert list(rows) == ["dense", "given model"]
    at = labels.index("sparsity")
    assert (rows["dense"][at], rows["given model"][at]) == ("-", "50.00%")
    assert "-" not in (rows["dense"][0], rows["given model"][0])
    assert rows["dense"][0] != rows["given model"][0]
    assert read_scores(tmp_path / "run" / "dense" / "scores.json").model == str(dense)


# zero-shot

SEVEN = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def test_a_mean_over_a_part_of_a_papers_set_is_called_partial():
    whole = [accuracy(0.57 if task == "rte" else 0.5, task) for task in SEVEN]
    part = model("part", accuracy(0.6, "boolq"), accuracy(0.7, "rte"))
    labels, rows, _ = quality(model("whole", *whole), part)
    seven, two = labels.index("Wanda's mean 7 tasks"), labels.index("Wanda's mean 2 of 7 (partial)")
    assert (rows["whole"][seven], rows["whole"][two]) == ("51.0", "53.5")
    assert (rows["part"][seven], rows["part"][two]) == ("-", "65.0")


def test_a_mean_is_over_scores_of_one_limit_and_says_which():
    scores = [accuracy(0.6, "boolq"), accuracy(0.8, "boolq", n=40, limit=40)]
    scores += [accuracy(0.5, "rte"), accuracy(0.9, "rte", n=40, limit=40)]
    labels, rows, _ = quality(model("a", *scores))
    means = {label: rows["a"][i] for i, label in enumerate(labels) if "mean" in label}
    part = "Wanda's mean 2 of 7 (partial)"
    assert means == {part: "55.0", f"{part} first 40 items": "85.0"}


def test_accuracies_of_other_versions_do_not_share_a_column():
    models = [model("a", accuracy(0.6, "x")), model("b", accuracy(0.7, "x", lm_eval="0.4.8"))]
    assert table(models, "Zero-shot").columns[1:-1] == [
        "x\n100 items\nlm eval 0.4.13",
        "x\n100 items\nlm eval 0.4.8",
    ]


def test_the_number_of_items_is_in_the_heading():
    scores = accuracy(0.5, "piqa", n=1000), accuracy(0.5, "rte", n=40, limit=40)
    columns = table([model("a", *scores)], "Zero-shot").columns
    assert columns[1:-1] == ["piqa\n1,000 items", "rte\nfirst 40 items"]


# published perplexities


def published(*models) -> list[list[str]]:
    tables = compare(list(models))[0].tables
    return [[c.text for c in row] for t in tables if "Published" in t.title for row in t.rows]


def opt(value: float = 37.0, method: str = "SparseGPT", calibration: str = C4, **fields):
    facts = fields.pop("facts", {})
    fields = {"dense": "facebook/opt-125m", "calibration": calibration, "method": method} | fields
    return model("a", ppl(value, "wikitext2", **facts), **fields)


def test_a_measured_perplexity_stands_beside_the_published_one():
    rows = published(opt(), dense(ppl(27.65, "wikitext2"), dense="facebook/opt-125m"))
    title = "wikitext2 ppl_token@2048"
    assert ["a", title, "37.00", "36.85", "+0.15"] in [row[:5] for row in rows]
    assert ["dense", "27.66"] in [[row[0], row[3]] for row in rows]
    assert all(row[5] for row in rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": "128 x 2048 tokens of c4.sample-2000.jsonl.gz"},
        {"facts": {"window": 1024}},
        {"facts": {"limit": 32}},
        {"amount": "1:4"},
        {"method": "SparseGPT + refit"},
        {"method": "SparseGPT by row"},
        {"method": "Wanda + reconstruction"},
    ],
    ids=str,
)
def test_what_was_measured_in_another_way_does_not(changes):
    assert published(opt(**changes)) == []


def test_the_hubs_own_file_is_c4_as_published():
    assert published(opt(calibration="128 x 2048 tokens of c4-train.00000-of-01024.json.gz"))


def test_published_perplexities_name_known_models_and_sources():
    entries = papers.published()
    assert len(entries) > 300 and all(p.ppl > 1 and p.source for p in entries)
    recipes = [yaml.safe_load(p.read_text()) for p in (ROOT / "cap_llm/recipes").glob("opt-*.yaml")]
    names = {papers.short_name(recipe["model"]["path"]) for recipe in recipes}
    assert names <= {p.model for p in entries}
    assert papers.short_name("meta-llama/Meta-Llama-3-8B") == "llama-3-8b"
    assert papers.short_name("meta-llama/Llama-2-7b-hf@main") == "llama-2-7b"

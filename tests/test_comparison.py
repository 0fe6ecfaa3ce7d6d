"""The comparison: what may share a column, what is one row and the best, published figures."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from made_runs import PERPLEXITY, STAGES, as_opt, named, other, quality, scored, seeded, zeroshot
from safetensors.torch import load_file, save_file
from support import ROOT

from cap_llm.config import EvaluateConfig, ModelConfig
from cap_llm.evaluation.evaluate import outside_models
from cap_llm.models.directory import ModelDirectory
from cap_llm.models.mask_file import FILE as MASKS
from cap_llm.models.masks import count_zeros
from cap_llm.report import published as papers
from cap_llm.report.comparison import compare
from cap_llm.report.runs import Result, _describe, collect
from cap_llm.runtime.console import Console
from cap_llm.runtime.rundir import Run
from cap_llm.runtime.world import World
from cap_llm.stages import Inputs
from cap_llm.train import main

# columns

SPLITS = {
    "windows": ({PERPLEXITY: scored(windows=5, text_sha256="x")}, "windows (9, 5)"),
    "window": ({PERPLEXITY: scored(window=32, text_sha256="x")}, "window (64, 32)"),
    "text": ({PERPLEXITY: scored(text_sha256="fff")}, "text ("),
    "BOS": ({PERPLEXITY: scored(bos="none")}, "BOS ("),
    "torch": (
        {PERPLEXITY: scored(versions={"torch": "2.8.0"})},
        "torch (",
    ),
    "calibration": (
        {"oneshot/done.json": lambda c: c.update(calibration="8 x 64 tokens of b.txt, seed 0")},
        "calibration (8 x 64 tokens of text.txt, 8 x 64 tokens of b.txt)",
    ),
    "another calibration text of the same name": (
        {"oneshot/calibration.json": lambda c: c.update(ids_sha256="fff")},
        "8 x 64 tokens of text.txt (ids fff)",
    ),
}


@pytest.mark.parametrize("changes, why", SPLITS.values(), ids=SPLITS)
def test_figures_that_do_not_compare_stand_in_columns_of_their_own(copy, changes, why):
    changes = {"oneshot/recipe.json": other} | named("second") | changes
    labels, rows, notes = quality(copy("a", named("first")), copy("b", changes))
    figures = [label for label in labels if "ppl_token" in label]
    assert len(figures) == len(set(figures)) == 2
    first, second = rows["first"][:2], rows["second"][:2]
    assert first[1] == second[0] == "-" and "-" not in (first[0], second[1])
    assert any("do not compare" in note and why in note for note in notes)


def test_another_build_of_the_same_release_compares(copy):
    def change(content):
        (entry,) = content["corpora"].values()
        entry["versions"]["torch"] = torch.__version__.partition("+")[0] + "+cu130"

    changes = named("second") | {PERPLEXITY: change}
    labels, *_ = quality(copy("a", named("first")), copy("b", changes))
    assert sum("ppl_token" in label for label in labels) == 1


def test_dense_and_uncalibrated_models_stand_beside_every_calibration(copy):
    more = {"oneshot/done.json": lambda c: c.update(calibration="99 x 64 tokens of b, seed 0")}
    without = {"oneshot/recipe.json": lambda c: other(c) or (c.pop("calibration") and None)}
    runs = [copy("a", named("first")), copy("b", named("second") | more)]
    _, rows, _ = quality(*runs, copy("c", named("third") | without))
    for name in ("dense", "third"):
        assert rows[name][0] == rows[name][1] != "-"


def test_models_of_another_dense_model_have_tables_of_their_own(copy):
    def moved(recipe):
        recipe["model"]["path"] = "somebody/another-model"

    change = {f"{stage}/recipe.json": moved for stage in ("dense", "oneshot")}
    runs = [copy("a"), copy("b", change)]
    sections = compare([r for run in runs for r in collect(run)])
    assert sections[1].title == "another-model" and len(sections) == 2
    assert all(len(section.rows) == 2 for section in sections)


def test_the_best_is_bold_among_models_of_its_own_pattern(copy):
    def two_of_four(recipe):
        recipe["oneshot"].update(pattern="2:4")

    runs = [
        copy("a", named("worse") | {PERPLEXITY: scored(ppl_token=50.0)}),
        copy("b", named("better") | {PERPLEXITY: scored(ppl_token=40.0)}),
        copy("c", named("far better") | {PERPLEXITY: scored(ppl_token=2.0)}),
    ]
    for run, changes in ((runs[1], other), (runs[2], two_of_four)):
        path = run / "oneshot" / "recipe.json"
        recipe = json.loads(path.read_text())
        changes(recipe)
        path.write_text(json.dumps(recipe))
    table = compare([r for run in runs for r in collect(run)])[0].tables[0]
    assert {row[0].text for row in table.rows if any(c.best for c in row)} == {"better"}


# rows


def test_runs_that_differ_in_their_seeds_alone_are_one_row(copy):
    runs = [copy(f"s{seed}", seeded(seed, ppl)) for seed, ppl in ((0, 30.0), (1, 34.0))]
    _, rows, notes = quality(*runs)
    assert rows["method (2 seeds)"][0] == "32.00 ± 2.83"
    assert len(rows) == 2 and any("standard deviation" in note for note in notes)


def test_seeds_draw_other_ids_of_one_text_and_still_are_one_row(copy):
    def drawn(seed):
        return seeded(seed, 30.0 + seed) | {
            "oneshot/calibration.json": lambda c: c.update(ids_sha256=f"of seed {seed}"),
            "oneshot/done.json": lambda c: c.update(
                calibration=c["calibration"].replace("seed 0", f"seed {seed}")
            ),
        }

    labels, rows, _ = quality(*(copy(f"s{seed}", drawn(seed)) for seed in (0, 1)))
    assert sum("ppl_token" in label for label in labels) == 1
    assert rows["method (2 seeds)"][0] == "30.50 ± 0.71"


def test_the_same_model_scored_twice_is_one_row_and_no_spread(copy):
    _, rows, _ = quality(copy("one", named("same")), copy("two", named("same")))
    assert set(rows) == {"dense", "same"} and "±" not in rows["same"][0]


def test_the_same_seed_with_other_results_is_a_row_of_its_own(copy):
    other_result = {PERPLEXITY: scored(ppl_token=31.0)}
    _, rows, _ = quality(copy("one", named("same")), copy("two", named("same") | other_result))
    assert {"same (one)", "same (two)"} < set(rows)


def test_the_share_of_the_loss_won_back(copy):
    """One-shot 40, dense 20, recovered 25: three quarters of the gap."""
    run = copy(
        "a",
        {
            "dense/perplexity.json": scored(ppl_token=20.0),
            PERPLEXITY: scored(ppl_token=40.0),
        },
    )
    shutil.copytree(run / "oneshot", run / "recover")
    recipe = json.loads((run / "oneshot" / "recipe.json").read_text())
    changed = {
        "model": recipe["model"],
        "start": "oneshot",
        "recover": {"optimizer": {"batch": 4, "seed": 0}, "length": 8},
    }
    (run / "recover" / "recipe.json").write_text(json.dumps(changed))
    scores = json.loads((run / "recover" / "perplexity.json").read_text())
    scored(ppl_token=25.0)(scores)
    (run / "recover" / "perplexity.json").write_text(json.dumps(scores))
    labels, rows, _ = quality(run)
    gap = labels.index("gap closed, %")
    assert rows["a method"][gap] == "75.0"
    assert rows["SparseGPT 50 %"][gap] == "-"
    other = shutil.copytree(run, run.with_name("b"))
    changed["recover"]["batch"] = 8
    (other / "recover" / "recipe.json").write_text(json.dumps(changed))
    scored(ppl_token=30.0)(scores)
    (other / "recover" / "perplexity.json").write_text(json.dumps(scores))
    table = compare([*collect(run), *collect(other)])[0].tables[0]
    shown = [row[gap + 1] for row in table.rows]  # of other starts: they have no best
    assert {"75.0", "50.0"} < {c.text for c in shown} and not any(c.best for c in shown)


def test_a_schedule_that_went_on_has_no_gap_to_what_it_came_from(copy):
    """The model it started from is 50 % sparse, by whatever hand; itself it is 70 %."""
    scores = {"dense/perplexity.json": scored(ppl_token=20.0), PERPLEXITY: scored(ppl_token=40.0)}
    run = copy("a", scores)
    shutil.copytree(run / "oneshot", run / "recover")
    schedule = {"start": "oneshot", "recover": {"masks": {"schedule": "0.7"}}}
    (run / "recover" / "recipe.json").write_text(json.dumps(schedule))
    counts = json.loads((run / "recover" / "sparsity.json").read_text())
    for share, closes in ((0.5, True), (0.7, False)):
        counts["pruned_matrices"]["sparsity"] = share
        (run / "recover" / "sparsity.json").write_text(json.dumps(counts))
        labels, *_ = quality(run)
        assert ("gap closed, %" in labels) == closes


def test_a_model_of_which_layers_stay_dense_is_not_the_best_of_its_amount(copy):
    def by_layer(recipe):
        recipe["oneshot"]["layers"] = {"*.mlp.*": 0.0}

    part = {"oneshot/recipe.json": by_layer, PERPLEXITY: scored(ppl_token=1.0)}
    more = {"oneshot/recipe.json": other, PERPLEXITY: scored(ppl_token=30.0)}
    whole = {PERPLEXITY: scored(ppl_token=40.0)}
    runs = [copy(n, named(n) | c) for n, c in (("a", whole), ("b", more), ("c", part))]
    (section,) = compare([r for run in runs for r in collect(run)])
    best = {row[0].text: row[1].best for row in section.tables[0].rows}
    assert best == {"dense": False, "a": False, "b": True, "c": False}


def test_a_run_that_nobody_named_is_called_by_what_was_done(copy):
    run = copy("a", named(""))
    shutil.copytree(run / "oneshot", run / "recover")
    (run / "recover" / "recipe.json").write_text(
        json.dumps({"model": {}, "start": "oneshot", "recover": {}})
    )
    names = [r.name for r in collect(run)]
    assert names == ["dense", "SparseGPT 50 %", "SparseGPT 50 % + recovery"]


def test_a_model_that_came_pruned_is_not_taken_for_the_dense_one(copy):
    """In a run of a version that did not count the zeros of the model it was given."""
    run = copy("a")
    (run / "dense" / "sparsity.json").unlink()
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["recover"]["teacher"] = "somebody/dense-model"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "oneshot").rename(run / "recover")
    recipe = {"model": settings["model"], "recover": {"teacher": "somebody/dense-model"}}
    (run / "recover" / "recipe.json").write_text(json.dumps(recipe))
    (section,) = compare(collect(run))
    assert [row.name for row in section.rows] == ["dense", "a method"]  # a larger one, say
    (run / "recover" / "inputs.json").write_text(json.dumps({"teacher_is_dense": True}))
    (section,) = compare(collect(run))
    assert section.title == "dense-model"
    assert [row.name for row in section.rows] == ["a method", "given model"]
    assert not any(row.baseline for row in section.rows)


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
        (folder / MASKS).parent.mkdir()
        save_file({"x": torch.zeros(1)}, folder / MASKS)
    rows, (zeros, n), is_pruned = count_zeros(ModelDirectory(folder), World("cpu"))
    assert is_pruned == pruned and 0 < zeros < share * n + 64
    shares = [z / math.prod(shape) for shape, z in rows.values()]
    assert shares == pytest.approx([shown] * len(shares), abs=0.01) and bool(shares) == bool(shown)


def test_files_beside_weights_without_zeros_make_no_pruned_model(tiny, tmp_path):
    """As a dense fine-tuning leaves them, saved to the directory of the pruned model."""
    folder = shutil.copytree(tiny("gpt2"), tmp_path / "model")
    (folder / MASKS).parent.mkdir()
    save_file({"x": torch.zeros(1)}, folder / MASKS)
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
    options = {"model.dense": "model.dense", "teacher": "recover.teacher"}
    models = {o: tmp_path / settings[k] for k, o in options.items() if k in settings}
    run = Run(str(tmp_path / "run"), World("cpu"), Console(False))
    inputs = Inputs(
        run=run,
        recipe={},
        model=ModelConfig(path=str(source)),
        keep_intermediate=True,
        source=ModelDirectory(source),
        start=ModelDirectory(source),
        dense=ModelDirectory(source),
        from_run=False,
        models={o: ModelDirectory(p) for o, p in models.items()},
        finished={"recover": ModelDirectory(source)} if "teacher" in settings else {},
    )
    outside = outside_models(inputs, EvaluateConfig(dense=settings.get("score", True)))
    run.close()
    assert set(outside) == folders
    assert outside.get("given", ModelDirectory(source)).path == source
    assert all((run.path / name / "sparsity.json").exists() for name in folders)


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
    labels, rows, _ = quality(tmp_path / "run")
    assert list(rows) == ["dense", "given model"]
    at = labels.index("sparsity")
    assert (rows["dense"][at], rows["given model"][at]) == ("-", "50.00 %")
    assert "-" not in (rows["dense"][0], rows["given model"][0])
    assert rows["dense"][0] != rows["given model"][0]
    scores = json.loads((tmp_path / "run" / "dense" / "perplexity.json").read_text())
    assert scores["model"] == str(dense)


def test_a_teacher_that_is_the_dense_model_shares_a_table_with_its_student(copy):
    run = copy("a")
    shutil.copytree(run / "dense", run / "given")
    (run / "oneshot").rename(run / "recover")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["recover"]["teacher"] = "somebody/dense-model"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    recipe = {"model": settings["model"], "recover": settings["recover"]}
    (run / "recover" / "recipe.json").write_text(json.dumps(recipe))
    (section,) = compare(collect(run))
    assert section.title == "dense-model"
    assert [row.name for row in section.rows] == ["dense", "given model", "a method"]


def test_a_model_of_another_run_keeps_its_history(copy):
    """A later stage in a run of its own: named, counted and compared as in one pipeline."""
    scores = {"dense": 20.0, "oneshot": 40.0}
    first = copy("a", {f"{s}/perplexity.json": scored(ppl_token=p) for s, p in scores.items()})
    changes = {"oneshot/perplexity.json": scored(ppl_token=25.0)}
    changes["environment.json"] = lambda c: c.update(run="", directory=str(first.parent))
    run = copy("b", changes)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    dense = settings["model"]["path"]
    settings |= {"model": {"path": "a/oneshot", "dense": dense}}  # from there
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    shutil.rmtree(run / "dense")
    (run / "oneshot").rename(run / "reconstruct")
    recipe = {"model": settings["model"], "start": None, "reconstruct": {"lr": 1, "seed": 0}}
    (run / "reconstruct" / "recipe.json").write_text(json.dumps(recipe))
    result = collect(run)[-1]
    assert (result.name, result.amount) == ("a method + reconstruction", "50 %")
    assert result.method == "SparseGPT + reconstruction"
    (before,) = [r for r in collect(first) if r.stage == "oneshot"]
    assert result.figures_of("time")[0].value == 2 * before.figures_of("time")[0].value
    assert result.figures_of("ppl")[0].facts == before.figures_of("ppl")[0].facts
    assert str(first) not in result.recipe  # or two seeds would not be one row
    labels, rows, _ = quality(first, run)  # one dense model, so one section
    assert rows["a method + reconstruction"][labels.index("gap closed, %")] == "75.0"


def test_a_chain_of_runs_is_named_and_measured_by_its_last_pruning(copy):
    """30 %, then 50 % inside that mask in a second run, then reconstruction in a third."""
    ppl = {"dense": 20.0, "oneshot": 22.0}
    first = copy("a", {f"{s}/perplexity.json": scored(ppl_token=p) for s, p in ppl.items()})
    dense = yaml.safe_load((first / "config.yaml").read_text())["model"]["path"]
    runs = [first]
    for name, figure, recipe in (
        ("b", 40.0, {"oneshot": {"method": "alps", "pattern": "unstructured", "sparsity": 0.5}}),
        ("c", 30.0, {"reconstruct": {"lr": 1}}),
    ):
        run = copy(name, named("") | {"oneshot/perplexity.json": scored(ppl_token=figure)})
        settings = yaml.safe_load((run / "config.yaml").read_text())
        model = {"path": str(runs[-1] / "oneshot"), "dense": dense}
        (run / "config.yaml").write_text(yaml.safe_dump(settings | {"model": model}))
        (stage,) = recipe
        if stage != "oneshot":
            (run / "oneshot").rename(run / stage)
        (run / stage / "recipe.json").write_text(json.dumps({"model": model} | recipe))
        runs.append(run)
    assert [r.name for r in collect(runs[1])][-1] == "ALPS 50 %"
    last = collect(runs[2])[-1]
    assert (last.name, last.amount) == ("ALPS 50 % + reconstruction", "50 %")
    labels, rows, _ = quality(*runs)
    assert rows[last.name][labels.index("gap closed, %")] == "50.0"


def test_bytes_stand_with_the_type_that_they_are_stored_in(copy):
    half = {"oneshot/config.json": lambda c: c.update(dtype="bfloat16")}
    half["oneshot/recipe.json"] = other
    runs = [copy("a", named("first")), copy("b", named("second") | half)]
    tables = compare([r for run in runs for r in collect(run)])[0].tables
    (table,) = [t for t in tables if t.title == "Cost"]
    for label in ("on\ndisk", "bit-packed"):
        at = table.columns.index(label)
        cells = {row[0].text: row[at].text for row in table.rows}
        assert cells["first"].endswith("iB float32") and cells["second"].endswith("iB bfloat16")


def test_headings_and_notes_speak_to_a_stranger(copy):
    """One model scored whole, calibrated by nothing; one on the first windows."""
    whole = copy("a", named("whole"))
    settings = {"oneshot/recipe.json": other}
    part = copy("b", named("part") | settings)
    for run, limit in ((whole, ""), (part, " first 9")):
        for stage in STAGES[run is whole :]:
            file = run / stage / "perplexity.json"
            content = json.loads(file.read_text())
            (entry,) = content["corpora"].values()
            entry |= {"windows": 9 if limit else 40, "text_sha256": limit or "whole"}
            file.write_text(json.dumps(content | {"corpora": {f"text@64{limit}": entry}}))
    recipe = json.loads((whole / "oneshot" / "recipe.json").read_text())
    del recipe["calibration"]
    (whole / "oneshot" / "recipe.json").write_text(json.dumps(recipe))
    shutil.rmtree(whole / "dense")
    labels, _, notes = quality(part, whole)
    assert [x for x in labels if "ppl" in x] == [
        *("text ppl_token@64 first 9 windows", "text ppl_token@64 whole text"),
    ]
    (note,) = [n for n in notes if "do not compare" in n]
    assert note.endswith("they differ in limit (first 9 windows, whole text).")


def test_the_number_of_items_is_in_the_heading(copy):
    tasks = {"hellaswag": {"acc": 0.5, "items": 1000}, "piqa": {"acc": 0.5}}  # which did not say
    run = copy("a", {"oneshot/zeroshot.json": lambda _: {"tasks": tasks}})
    tables = compare(collect(run))[0].tables
    table = next(t for t in tables if t.title.startswith("Zero-shot"))
    assert table.columns[1:] == ["hellaswag\n1,000 items", "piqa"]


@pytest.mark.parametrize(
    "ahead, task_is_best, mean_is_best",
    [(0.006, False, False), (0.009, False, True), (0.011, True, True)],
)
def test_an_accuracy_within_a_standard_error_of_another_is_not_the_best(
    copy, ahead, task_is_best, mean_is_best
):
    """The standard error is 0.01 of a task, and so 0.007 of the mean of two."""
    second = {"oneshot/zeroshot.json": zeroshot(boolq=0.6, rte=0.6)}
    first = {"oneshot/zeroshot.json": zeroshot(boolq=0.6 + ahead, rte=0.6 + ahead)}
    first["oneshot/recipe.json"] = other
    runs = [copy("a", named("second") | second), copy("b", named("first") | first)]
    quality, tasks, *_ = compare([r for run in runs for r in collect(run)])[0].tables
    for table, wanted, is_best in (
        (quality, "Wanda's mean", mean_is_best),
        (tasks, "boolq", task_is_best),
    ):
        (at,) = [i for i, label in enumerate(table.columns) if wanted in label]
        best = [row[0].text for row in table.rows if row[at].best]
        assert best == (["first"] if is_best else [])


def test_models_of_one_amount_are_of_one_group_whatever_their_zeros(copy):
    def zeros(share):
        return {"oneshot/sparsity.json": lambda c: c["pruned_matrices"].update(sparsity=share)}

    worse = named("worse") | zeros(0.4938) | {PERPLEXITY: scored(ppl_token=40.0)}
    better = named("better") | zeros(0.4999) | {PERPLEXITY: scored(ppl_token=30.0)}
    runs = [copy("a", worse), copy("b", better | {"oneshot/recipe.json": other})]
    table = compare([r for run in runs for r in collect(run)])[0].tables[0]
    assert {row[0].text for row in table.rows if any(c.best for c in row)} == {"better"}


def test_a_dense_model_that_the_scripts_scored_has_its_scores(copy, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    change = {f"{s}/recipe.json": lambda c: c["model"].update(path=str(model)) for s in STAGES}
    run = copy("a", change)
    (run / "dense" / "perplexity.json").rename(model / "perplexity.json")
    (model / "zeroshot.json").write_text(json.dumps(zeroshot(piqa=0.7)({})))
    labels, rows, _ = quality(run)
    assert "-" not in rows["dense"][0]
    (section,) = compare(collect(run))
    (table,) = [t for t in section.tables if t.title.startswith("Zero-shot")]
    assert [c.text for c in table.rows[0]] == ["dense", "70.0"]


def test_types_of_computation_do_not_share_a_column(copy):
    half = copy("b", named("b") | {"oneshot/perplexity.json": scored(computed_in="bfloat16")})
    _, _, notes = quality(copy("a", named("a")), half)
    assert any("differ in computed in (float32, bfloat16)" in note for note in notes)


def test_stages_stand_in_the_order_of_the_pipeline_also_unknown_ones(copy):
    run = copy("a")
    for stage in ("recover", "sds", "something-new", "reconstruct"):
        shutil.copytree(run / "oneshot", run / stage)
    stages = [r.stage for r in collect(run)]
    assert stages == ["dense", "oneshot", "sds", "reconstruct", "recover", "something-new"]


# zero-shot

SEVEN = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def test_a_mean_over_a_part_of_a_papers_set_is_called_partial(copy):
    all_seven = dict.fromkeys(SEVEN, 0.5)
    whole = {"oneshot/zeroshot.json": zeroshot(**all_seven | {"rte": 0.57})}
    part = {"oneshot/zeroshot.json": zeroshot(boolq=0.6, rte=0.7), "oneshot/recipe.json": other}
    runs = [copy("a", named("whole") | whole), copy("b", named("part") | part)]
    labels, rows, _ = quality(*runs)
    seven, two = labels.index("Wanda's mean 7 tasks"), labels.index("Wanda's mean partial: 2 of 7")
    assert (rows["whole"][seven], rows["whole"][two]) == ("51.0", "53.5")
    assert (rows["part"][seven], rows["part"][two]) == ("-", "65.0")


def test_a_mean_is_over_scores_of_one_limit_and_says_which(copy):
    scores = {"boolq": (0.6, None), "boolq first 40": (0.8, 40), "rte": (0.5, None)}
    scores["rte first 40"] = (0.9, 40)
    tasks = {
        key: {"task": key.split()[0], "acc": acc, "limit": limit}
        for key, (acc, limit) in scores.items()
    }
    run = copy("a", {"oneshot/zeroshot.json": lambda _: {"tasks": tasks}})
    labels, rows, _ = quality(run)
    means = {label: rows["a method"][i] for i, label in enumerate(labels) if "mean" in label}
    part = "Wanda's mean partial: 2 of 7"
    assert means == {f"{part} all items": "55.0", f"{part} first 40 items": "85.0"}


def test_accuracies_of_other_versions_do_not_share_a_column(copy):
    new = {"oneshot/zeroshot.json": zeroshot(arc_easy=0.6)}
    old = {"oneshot/zeroshot.json": zeroshot({"lm_eval": "0.4.8"}, arc_easy=0.7)}
    old["oneshot/recipe.json"] = other
    runs = [copy("a", named("new") | new), copy("b", named("old") | old)]
    tables = compare([r for run in runs for r in collect(run)])[0].tables
    table = next(t for t in tables if t.title.startswith("Zero-shot"))
    assert len(table.columns) == 3 and "lm_eval 0.4.8" in table.columns[2]
    assert any("arc_easy" in n and "lm_eval (0.4.13, 0.4.8)" in n for n in tables[0].notes)


def test_entries_of_the_evaluate_stage_are_read(copy):
    """A task may be limited; its facts stand in its entry; word_perplexity is no accuracy."""
    entry = {"items": 40, "limit": 40, "rows_sha256": "r", "shots": 0}
    tasks = {
        "piqa first 40": entry | {"task": "piqa", "acc": 0.6, "acc_norm": 0.7, "acc_stderr": None},
        "wikitext": entry | {"task": "wikitext", "limit": None, "word_perplexity": 38.5},
    }
    run = copy("a", {"oneshot/zeroshot.json": lambda _: {"tasks": tasks}})
    labels, rows, _ = quality(run)
    assert rows["a method"][labels.index("wikitext word_perplexity")] == "38.50"
    tables = compare(collect(run))[0].tables
    table = next(t for t in tables if t.title.startswith("Zero-shot"))
    assert table.columns[1:] == ["piqa\nfirst 40 items"] and table.rows[-1][1].text == "60.0"


# published figures


def published_table(run: Path):
    (section,) = compare(collect(run))
    tables = [t for t in section.tables if t.title == "Beside published figures"]
    return [[c.text for c in row] for row in tables[0].rows] if tables else None


def test_a_measured_figure_stands_beside_the_published_one(copy):
    run = as_opt(copy("a", {PERPLEXITY: scored(ppl_token=37.0)}))
    rows = published_table(run)
    row = ["a method", "wikitext2@2048", "37.00", "36.85", "+0.15"]
    assert row in [r[:5] for r in rows]
    assert ["dense", "27.66"] in [[r[0], r[3]] for r in rows]
    assert all(row[5] for row in rows)  # a source each


def test_what_a_sample_of_c4_calibrated_is_not_set_against_published_figures(copy):
    sample = as_opt(copy("a"), origin="c4.sample-2000.jsonl.gz, all but the last 400 documents")
    assert {row[0] for row in published_table(sample)} == {"dense"}
    fetched = as_opt(copy("b"), origin="c4-train.00000-of-01024.json.gz")  # the hub's own file
    assert {row[0] for row in published_table(fetched)} == {"dense", "a method"}


@pytest.mark.parametrize("window, oneshot", [(1024, {}), (2048, {"pattern": "1:4"})])
def test_figures_of_other_windows_and_patterns_are_not_set_against_it(copy, window, oneshot):
    rows = published_table(as_opt(copy("a"), window, **oneshot)) or []
    assert not [row for row in rows if row[0] != "dense"]


@pytest.mark.parametrize("pattern", ["unstructured", "row"])
def test_wanda_chooses_within_rows_as_published_by_either_name(copy, pattern):
    rows = published_table(as_opt(copy("a"), method="wanda", pattern=pattern))
    assert {row[3] for row in rows if row[0] != "dense"} == {"39.3", "39"}


def test_others_that_choose_within_rows_are_not_set_against_published_figures(copy):
    rows = published_table(as_opt(copy("a"), pattern="row"))
    assert {row[0] for row in rows} == {"dense"}


def test_reconstruction_stands_beside_its_published_figure(copy):
    run = as_opt(copy("a"), method="wanda")
    shutil.copytree(run / "oneshot", run / "reconstruct")
    recipe = {"reconstruct": {"inputs": "dense"}, "model": {"path": "facebook/opt-125m"}}
    recipe["start"] = "oneshot"
    for inputs, published in (("dense", {"31.18"}), ("student", set())):
        recipe["reconstruct"]["inputs"] = inputs
        (run / "reconstruct" / "recipe.json").write_text(json.dumps(recipe))
        rows = published_table(run)
        assert {row[3] for row in rows if row[0] == "a method"} == published


def test_a_refit_is_not_taken_for_the_published_method(copy):
    run = as_opt(copy("a"), refit=True)
    assert {row[0] for row in published_table(run)} == {"dense"}
    (section,) = compare(collect(run))
    told = [n for n in section.tables[-1].notes if n.startswith("Also published at 50 %")]
    assert len(told) == 1 and "SparseGPT 36.85" in told[0]


def test_published_figures_name_known_models_and_sources():
    figures = papers.published()
    assert len(figures) > 300 and all(f.ppl > 1 and f.source for f in figures)
    recipes = [yaml.safe_load(p.read_text()) for p in (ROOT / "cap_llm/recipes").glob("opt-*.yaml")]
    names = {papers.short_name(recipe["model"]["path"]) for recipe in recipes}
    assert names <= {f.model for f in figures}
    assert papers.short_name("meta-llama/Meta-Llama-3-8B") == "llama-3-8b"
    assert papers.short_name("meta-llama/Llama-2-7b-hf@main") == "llama-2-7b"


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"mode": "paper"}, "SDS"),
        ({"mode": "gram"}, "SDS (gram)"),
        ({"mode": "gram", "redensify": False}, "adjustment"),
        ({"mode": "gram", "adjust": False}, "SDS (gram) without adjustment"),
    ],
)
def test_only_sds_as_published_is_called_so(settings, name):
    """Else its controls would stand beside the paper's figure for it."""
    result = Result("", "sds", Path("run/sds"), "opt-125m")
    before = Result("SparseGPT 2:4", "oneshot", Path("run/oneshot"), "opt-125m")
    before.method, before.amount = "SparseGPT", "2:4"
    _describe(result, {"oneshot": {"method": "sparsegpt"}, "sds": settings}, before)
    assert (result.method, result.name) == (f"SparseGPT + {name}", f"SparseGPT 2:4 + {name}")

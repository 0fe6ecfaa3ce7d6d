"""The report: what may share a column, what is one row, and what it says of bad and odd runs."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import cap_llm
from cap_llm.command_line import read_config
from cap_llm.evaluation import published as papers
from cap_llm.evaluation.comparison import compare
from cap_llm.evaluation.report import write_report
from cap_llm.evaluation.runs import Figure, Result, collect, run_directories
from cap_llm.runtime import console
from cap_llm.runtime.console import Console, size
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.rundir import environment
from cap_llm.runtime.world import World
from cap_llm.train import main


@pytest.fixture(scope="session")
def real(tiny, text_file, tmp_path_factory) -> Path:
    """A folder with one real run of the entry: dense and one-shot, scored."""
    folder = tmp_path_factory.mktemp("runs")
    held_out = folder / "held-out.txt"
    held_out.write_text(text_file.read_text()[::-1])
    words = ["cap-llm", "--output_dir", folder / "run", "--model.path", tiny("llama")]
    words += ["--name", "a method"]
    words += ["--calibration.corpus", text_file, "--calibration.sequences", 8]
    words += ["--calibration.length", 64, "--evaluate.corpora", f"[{held_out}]"]
    words += ["--evaluate.window", 64, "--evaluate.max_windows", 9, "--runtime.device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(w) for w in words])
        assert main() == 0
    return folder / "run"


@pytest.fixture
def copy(real, tmp_path):
    """Makes a copy of the real run and changes its files: {file: change(content)}."""

    def make(name: str, changes: dict | None = None) -> Path:
        run = Path(shutil.copytree(real, tmp_path / name))
        for file, change in (changes or {}).items():
            content = json.loads((run / file).read_text()) if (run / file).exists() else {}
            (run / file).parent.mkdir(exist_ok=True)
            (run / file).write_text(json.dumps(change(content) or content))
        return run

    return make


@pytest.fixture
def report(tmp_path):
    """Writes the report over runs; returns its folder."""

    def make(*runs: Path) -> Path:
        results = [r for run in runs for r in collect(run)]
        return write_report(results, tmp_path / "out", "A title", Console(False)).parent

    return make


def quality(*runs: Path) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Labels, cells by row name, and notes of the first table over runs."""
    table = compare([r for run in runs for r in collect(run)])[0].tables[0]
    rows = {row[0].text: [c.text for c in row[1:]] for row in table.rows}
    return [" ".join(c.split()) for c in table.columns[1:]], rows, table.notes


def named(name: str):
    return {"environment.json": lambda c: c.update(run=name)}


def scored(**values):
    """Changes the one entry of a perplexity.json."""

    def change(content):
        (entry,) = content["corpora"].values()
        entry.update(values)

    return change


def zeroshot(versions=None, **accuracies):
    """A zeroshot.json with these accuracies."""
    tasks = {
        task: {"acc": acc, "acc_stderr": 0.01, "items": 100, "limit": None, "version": 1.0}
        | {"data_sha256": "abc"}
        for task, acc in accuracies.items()
    }
    versions = {"lm_eval": "0.4.13"} | (versions or {})
    return lambda _: {"model": "m", "stage": "s", "versions": versions, "tasks": tasks}


# the files of a run


def test_the_entry_itself_leaves_the_report(real):
    page = (real / "report.html").read_text()
    figure = json.loads((real / "oneshot" / "perplexity.json").read_text())
    (entry,) = figure["corpora"].values()
    for text in (page, (real / "report.md").read_text()):
        assert f"{entry['ppl_token']:.2f}" in text
        assert "ppl_token@64" in text
        assert "a method" in text
    assert "http" not in page and 'src="data:image/png' in page  # nothing is fetched
    assert (real / "figures" / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_every_figure_is_in_the_csv_with_its_run_and_command(copy, report):
    a, b = copy("a", named("first")), copy("b", named("second") | {"oneshot/recipe.json": other})
    with open(report(a, b) / "report.csv") as file:
        lines = list(csv.DictReader(file))
    for run in (a, b):
        mine = [line for line in lines if line["run"] == str(run)]
        assert {"ppl", "sparsity", "time", "on disk", "bit-packed"} <= {x["measure"] for x in mine}
        assert all("--output_dir" in line["command"] for line in mine)
        exact = json.loads((run / "oneshot" / "perplexity.json").read_text())["corpora"]
        own = [x for x in mine if (x["measure"], x["stage"]) == ("ppl", "oneshot")]
        assert [float(x["value"]) for x in own] == [e["ppl_token"] for e in exact.values()]


def test_a_model_is_traced_to_the_job_that_made_it_and_not_to_the_last_one(copy):
    def later(content):
        content.update(command="cap-llm --stages [evaluate]")
        content["hardware"].update(processor="another one")

    *_, made = collect(copy("a", {"environment.json": later}))
    assert "--calibration.length 64" in made.environment["command"]
    assert all("another one" not in f.facts["machine"] for f in made.figures_of("time"))


def test_a_score_is_traced_to_the_job_that_scored_it(copy, report):
    by = {"command": "python eval/perplexity.py 'a b'", "directory": "/elsewhere"}
    by["hardware"] = {"processor": "another one", "cores": 3, "ranks": 2}
    out = report(copy("a", {PERPLEXITY: scored(**by)}))
    lines = list(csv.DictReader((out / "report.csv").open()))
    score, time = ({x["stage"]: x for x in lines if x["measure"] == m} for m in ("ppl", "time"))
    assert score["oneshot"]["command"] == by["command"]
    assert score["oneshot"]["machine"] == "another one, 3 cores, 2 ranks"
    assert (
        "--output_dir" in score["dense"]["command"] and "another" not in score["dense"]["machine"]
    )
    assert "--output_dir" in time["oneshot"]["command"]
    text = (out / "report.md").read_text()
    assert f"- command (scores of oneshot): `{by['command']}`" in text
    assert "- directory (scores of oneshot): /elsewhere" in text
    assert "- machine (scores of oneshot): another one, 3 cores, 2 ranks" in text


def test_every_job_of_a_run_is_listed_with_its_machine(copy, report):
    def on_two_ranks(content):
        content["environment"]["hardware"].update(ranks=2)

    text = (report(copy("a", {"oneshot/done.json": on_two_ranks})) / "report.md").read_text()
    assert re.search(r"- machine \(oneshot\): .* cores, 2 ranks\n", text)
    assert re.search(r"- machine \(dense, scores of dense, .*\): .* cores\n", text)
    assert len(re.findall("- command: ", text)) == 1  # one job made and scored them all


def test_a_command_can_be_given_to_a_shell_again(monkeypatch):
    words = ["cap-llm", "--name", "a method's, 50 %", "--evaluate.corpora", "[a b.txt]"]
    monkeypatch.setattr(sys, "argv", words)
    assert shlex.split(environment(World("cpu"))["command"]) == words


def test_a_models_name_leads_to_its_run_and_command(copy, report):
    a, b = copy("a", named("first")), copy("b", named("second") | {"oneshot/recipe.json": other})
    page = (report(a, b) / "report.html").read_text()
    number = re.search(r'second<a class="run" href="#(run-\d)"', page).group(1)
    place = page.index(f'id="{number}"')
    assert str(b) in page[place : place + 300]


def other(recipe):
    """Another method than the real run's."""
    recipe["oneshot"]["refit"] = True


def test_bit_packed_bytes_are_what_a_packed_file_would_take(real):
    from safetensors.torch import load_file

    from cap_llm.sparsity.masks import MaskFile

    figures = {f.kind: f.value for f in collect(real)[-1].figures}
    masks, stored = MaskFile(real / "oneshot" / "masks.safetensors"), 0
    files = [p for p in (real / "oneshot").glob("model*.safetensors")]
    for name, tensor in (item for path in files for item in load_file(path).items()):
        if name in masks:
            stored += int((tensor != 0).sum()) * 4 + tensor.shape[0] * -(-tensor.shape[1] // 8)
        else:
            stored += tensor.numel() * 4
    overhead = figures["on disk"] - sum(
        t.numel() * 4 for path in files for t in load_file(path).values()
    )
    assert figures["bit-packed"] == stored + overhead


# columns

STAGES = ("dense", "oneshot")
PERPLEXITY = "oneshot/perplexity.json"
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
    change = {PERPLEXITY: lambda c: c["versions"].update(torch=c["versions"]["torch"] + "+cu130")}
    labels, *_ = quality(copy("a", named("first")), copy("b", named("second") | change))
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


def test_dense_models_of_one_folder_name_have_pictures_of_their_own(copy, report):
    def moved(to):
        change = {f"{s}/recipe.json": lambda c: c["model"].update(path=to) for s in STAGES}
        return change | named(to)

    out = report(copy("a", moved("m1/base")), copy("b", moved("m2/base")), copy("c", moved("x/y")))
    assert {p.name for p in (out / "figures").iterdir()} == {
        *("1-base-layers.png", "2-base-layers.png", "3-y-layers.png"),
    }
    first, second = (out / "report.md").read_text().split("\n## m2/base\n")
    assert "\n## m1/base\n" in first and "2-base" not in first
    assert "2-base-layers.png" in second.partition("\n## y\n")[0] and "1-base" not in second


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


def seeded(seed: int, ppl: float) -> dict:
    def change(recipe):
        recipe["calibration"]["seed"] = seed

    name = named(f"method, seed {seed}")
    return name | {"oneshot/recipe.json": change, PERPLEXITY: scored(ppl_token=ppl)}


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
    changed = {"model": recipe["model"], "recover": {"batch": 4, "length": 8, "seed": 0}}
    (run / "recover" / "recipe.json").write_text(json.dumps(changed))
    scores = json.loads((run / "recover" / "perplexity.json").read_text())
    scored(ppl_token=25.0)(scores)
    (run / "recover" / "perplexity.json").write_text(json.dumps(scores))
    labels, rows, _ = quality(run)
    gap = labels.index("gap closed, %")
    assert rows["a method"][gap] == "75.0"
    assert rows["SparseGPT 50 %"][gap] == "-"


def test_a_run_that_nobody_named_is_called_by_what_was_done(copy):
    run = copy("a")
    settings = yaml.safe_load((run / "config.yaml").read_text()) | {"name": ""}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    shutil.copytree(run / "oneshot", run / "recover")
    (run / "recover" / "recipe.json").write_text(json.dumps({"model": {}, "recover": {}}))
    names = [r.name for r in collect(run)]
    assert names == ["dense", "SparseGPT 50 %", "SparseGPT 50 % + recovery"]


def test_a_model_that_came_pruned_is_not_taken_for_the_dense_one(copy):
    run = copy("a")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["recover"]["teacher"] = "somebody/dense-model"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "oneshot").rename(run / "recover")
    recipe = {"model": settings["model"], "recover": {"teacher": "somebody/dense-model"}}
    (run / "recover" / "recipe.json").write_text(json.dumps(recipe))
    (section,) = compare(collect(run))
    assert section.title == "dense-model"
    assert [row.name for row in section.rows] == ["a method", "given model"]
    assert not any(row.baseline for row in section.rows)


def test_a_model_of_another_run_keeps_its_history(copy):
    """A later stage in a run of its own: named, counted and compared as in one pipeline."""
    scores = {"dense": 20.0, "oneshot": 40.0}
    first = copy("a", {f"{s}/perplexity.json": scored(ppl_token=p) for s, p in scores.items()})
    changes = {"oneshot/perplexity.json": scored(ppl_token=25.0)}
    changes["environment.json"] = lambda c: c.update(directory=str(first.parent))
    run = copy("b", changes)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    dense = settings["model"]["path"]
    settings |= {"model": {"path": "a/oneshot", "dense": dense}, "name": ""}  # from there
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
        run = copy(name, {"oneshot/perplexity.json": scored(ppl_token=figure)})
        settings = yaml.safe_load((run / "config.yaml").read_text())
        model = {"path": str(runs[-1] / "oneshot"), "dense": dense}
        (run / "config.yaml").write_text(yaml.safe_dump(settings | {"model": model, "name": ""}))
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
    run = copy("a", {"oneshot/zeroshot.json": lambda _: {"versions": {}, "tasks": tasks}})
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


def test_numbers_of_runs_are_told_apart(copy, report):
    runs = [copy(f"s{seed}", seeded(seed, 30.0)) for seed in (0, 1)]
    page = (report(*runs) / "report.html").read_text()
    assert ">1,</a>" in page and ">2</a>" in page
    assert page.count("<thead>") == page.count("<table>")  # which print repeats on a new page


def test_bytes_of_tiny_models_are_not_zero():
    assert [size(n) for n in (2**31, 2**21, 40 * 2**10)] == ["2.0 GiB", "2 MiB", "40 KiB"]


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


def test_a_run_that_was_stopped_before_any_score_is_shown(copy, report):
    run = copy("a", {"dense/recipe.json": lambda c: c["model"].update(path="some/model")})
    shutil.rmtree(run / "oneshot")
    (run / "dense" / "perplexity.json").unlink()
    assert "not scored; oneshot not begun" in (report(run) / "report.md").read_text()


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
    run = copy("a", {"oneshot/zeroshot.json": lambda _: {"versions": {}, "tasks": tasks}})
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
    entry = {"items": 40, "limit": 40, "rows_sha256": "r", "lm_eval": "0.4.13", "shots": 0}
    tasks = {
        "piqa first 40": entry | {"task": "piqa", "acc": 0.6, "acc_norm": 0.7, "acc_stderr": None},
        "wikitext": entry | {"task": "wikitext", "limit": None, "word_perplexity": 38.5},
    }
    run = copy("a", {"oneshot/zeroshot.json": lambda _: {"versions": {}, "tasks": tasks}})
    labels, rows, _ = quality(run)
    assert rows["a method"][labels.index("wikitext word_perplexity")] == "38.50"
    tables = compare(collect(run))[0].tables
    table = next(t for t in tables if t.title.startswith("Zero-shot"))
    assert table.columns[1:] == ["piqa\nfirst 40 items"] and table.rows[-1][1].text == "60.0"


def test_pictures_show_only_what_was_measured(copy, report):
    few = {p.name for p in (report(copy("a", named("first"))) / "figures").iterdir()}
    assert few == {"layers.png"}
    more = {"oneshot/zeroshot.json": zeroshot(arc_easy=0.6), "oneshot/sparsity.json": sparser}
    refit = {"oneshot/recipe.json": other}
    pair = [copy("b", named("second")), copy("c", named("third") | more | refit)]
    names = {p.name for p in (report(*pair) / "figures").iterdir()}
    assert names == {"layers.png", "zero-shot.png", "perplexity-over-sparsity.png", "cost.png"}


def test_a_picture_shows_what_shares_its_text_and_names_the_rest(copy, report):
    elsewhere = {"oneshot/done.json": lambda c: c.update(calibration="8 x 64 tokens of b, seed 0")}
    refit = {"oneshot/recipe.json": other}

    def blind(recipe):
        recipe["oneshot"].update(method="magnitude")
        del recipe["calibration"]

    def without_errors(counts):
        for row in counts["rows"]:
            row["error"] = None

    magnitude = {"oneshot/recipe.json": blind, "oneshot/sparsity.json": without_errors}
    out = report(
        *(copy("a", named("first")), copy("b", named("second") | elsewhere | refit)),
        copy("c", named("blind") | magnitude),
    )
    (caption,) = re.findall(r"^Mean output error.*", (out / "report.md").read_text(), re.M)
    assert "on 8 x 64 tokens of text.txt." in caption
    assert "No errors are known of blind." in caption
    assert "other text: second (8 x 64 tokens of b)." in caption


def test_recoveries_on_other_text_are_not_drawn_together(copy, report):
    runs = []
    for name, corpus in (("first", "a.txt"), ("second", "a.txt"), ("third", "b.txt")):
        run = copy(name, named(name))
        (run / "oneshot").rename(run / "recover")
        recipe = {"recover": {"corpus": corpus, "length": 64, "batch": 4, "weight": name}}
        (run / "recover" / "recipe.json").write_text(json.dumps(recipe | {"model": MODEL}))
        points = [
            {"stage": "recover", "step": s, "name": "held_out_ppl", "value": 9.0 - s}
            for s in (0, 1)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
        recipe = json.loads((run / "dense" / "recipe.json").read_text())
        (run / "dense" / "recipe.json").write_text(json.dumps(recipe | {"model": MODEL}))
        runs.append(run)
    text = (report(*runs) / "report.md").read_text()
    (caption,) = re.findall(r"^Perplexity along the recovery.*", text, re.M)
    assert "held-out text of a.txt in sequences of 64 tokens" in caption
    assert "other text: third (b.txt in sequences of 64 tokens)." in caption


MODEL = {"path": "some/model"}


def sparser(counts):
    counts["pruned_matrices"]["sparsity"] = 0.7


# runs that are not as they should be


def test_an_unfinished_run_is_shown_as_such_and_is_never_the_best(copy, report):
    done = copy("a", named("done"))
    unfinished = copy("b", named("cut") | {PERPLEXITY: scored(ppl_token=1.5)})
    (unfinished / "oneshot" / "done.json").unlink()
    out = report(done, unfinished)
    assert "cut (unfinished)" in (out / "report.md").read_text()
    table = compare([r for run in (done, unfinished) for r in collect(run)])[0].tables[0]
    assert not any(c.best for row in table.rows for c in row)


def test_a_run_that_has_just_begun_is_shown(copy, report):
    run = copy("a", named("begun"))
    for stage in ("dense", "oneshot"):
        shutil.rmtree(run / stage)
    assert "begun (oneshot not begun)" in (report(run) / "report.md").read_text()


def test_damaged_and_foreign_files_are_named_and_the_rest_is_shown(copy, report):
    run = copy("a", named("odd") | {PERPLEXITY: lambda c: {"corpora": {"x@64": {"loss": 1.0}}}})
    (run / "oneshot" / "sparsity.json").write_text("{")
    text = (report(run) / "report.md").read_text()
    assert "perplexity.json is not as this version writes it" in text
    assert "sparsity.json cannot be read" in text
    assert "dense" in text


FOREIGN = {
    "calibration": ("oneshot/recipe.json", {"calibration": 3}),
    "method": ("oneshot/recipe.json", {"oneshot": {"method": ["a"]}}),
    "ladder": ("oneshot/recipe.json", {"recover": {"ladder": 5}}),
    "recover": ("oneshot/recipe.json", {"recover": 3}),
    "environment": ("oneshot/done.json", {"environment": "y"}),
    "versions": ("environment.json", {"versions": 3}),
    "hardware": ("environment.json", {"hardware": ["a"]}),
    "settings": ("config.yaml", {"model": 3}),
}


@pytest.mark.parametrize("file, content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_run_is_shown_as_such_and_the_others_beside_it(copy, report, file, content):
    good, foreign = copy("good", named("good")), copy("foreign")
    # JSON is YAML too
    known = yaml.safe_load((foreign / file).read_text())
    (foreign / file).write_text(json.dumps(known | content))
    text = (report(good, foreign) / "report.md").read_text()
    assert "foreign (not as this version writes it)" in text
    assert re.search(r"\| good \(1\) +\| \d", text)


def test_a_fact_that_cannot_be_compared_is_not_as_this_version_writes_it(copy, report):
    def odd(_):
        return {"versions": {}, "tasks": {"piqa": {"acc": 0.6, "limit": {"a": 1}}}}

    text = (report(copy("a", {"oneshot/zeroshot.json": odd})) / "report.md").read_text()
    assert "zeroshot.json is not as this version writes it" in text


def test_a_folder_without_a_recipe_is_still_read(copy):
    run = copy("a")
    (run / "dense" / "recipe.json").unlink()
    labels, rows, _ = quality(run)
    assert rows["dense"][0] != "-" and len(rows) == 2


def test_a_run_of_another_version_is_shown_as_such(copy, report):
    def older(content):
        content["versions"]["cap_llm"] = "0.0.1"

    text = (report(copy("a", {"environment.json": older})) / "report.md").read_text()
    assert "(of cap_llm 0.0.1)" in text
    assert f"(of cap_llm {cap_llm.__version__})" not in text


def test_without_matplotlib_the_report_has_no_pictures_and_says_so(real, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    page = write_report(collect(real), tmp_path / "out", "A title", Console(False))
    assert "matplotlib is not installed" in page.read_text()
    assert "<img" not in page.read_text()
    assert not list((tmp_path / "out" / "figures").iterdir())


# published figures


def as_opt(run: Path, window: int = 2048, origin: str = "allenai/c4  train", **oneshot) -> Path:
    """Rewrites a run as one of OPT-125m in the papers' protocol."""

    def recipe(content):
        content["model"]["path"] = "facebook/opt-125m"
        if "oneshot" in content:
            content["oneshot"].update(oneshot)
            content["calibration"].update(corpus="c4", sequences=128, length=2048)

    def done(content):
        content["calibration"] = f"128 x 2048 tokens of {origin}, seed 0"

    def score(content):
        (entry,) = content["corpora"].values()
        content["corpora"] = {f"wikitext2@{window}": entry | {"window": window}}

    changes = [(f"{s}/recipe.json", recipe) for s in STAGES]
    changes += [(f"{s}/perplexity.json", score) for s in STAGES] + [("oneshot/done.json", done)]
    for name, change in changes:
        content = json.loads((run / name).read_text())
        change(content)
        (run / name).write_text(json.dumps(content))
    return run


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


# acceptance and the benchmark of sparsity


def test_the_acceptance_runs_are_valid_and_aim_at_published_figures():
    import acceptance

    for settings in acceptance.RUNS.values():
        config, *_ = read_config(
            ["--config", "opt-125m-acceptance", "--output_dir", "x", *settings]
        )
        config.check()
    for (name, corpus), (figure, low, high) in acceptance.TARGETS.items():
        method, amount = re.fullmatch(r"(.+?)(?: (\S+(?: %)?))?", name).groups("")
        known = [
            p.ppl
            for p in papers.published()
            if p.model == "opt-125m" and (p.method, p.amount, p.corpus) == (method, amount, corpus)
        ]
        assert float(figure) in known and low <= float(figure) <= high


def test_the_verdict_is_within_or_outside_the_range(tmp_path):
    import acceptance

    scores = {"dense": {"wikitext2": 27.66, "ptb": 38.99, "c4": 26.56}}
    scores |= {"magnitude 50 %": {"wikitext2": 193.4}, "SparseGPT 50 %": {"wikitext2": 36.5}}
    scores |= {"Wanda 50 %": {"wikitext2": 39.5}, "SparseGPT 2:4": {"wikitext2": 60.5}}
    scores |= {"Wanda + reconstruction 50 %": {"wikitext2": 31.2}}
    scores |= {"ALPS 50 %": {"wikitext2": 36.6}, "SparseGPT + SDS 2:4": {"wikitext2": 50.0}}
    results = {}
    for name in acceptance.RUNS:
        figures = [Figure("ppl", corpus, ppl) for corpus, ppl in scores.get(name, {}).items()]
        results[name] = Result(name, "oneshot", tmp_path, "opt-125m", figures=figures)
    rows, n_outside = acceptance.verdicts(results)
    said = {(row[0], row[1]): (row[4], row[-1]) for row in rows}
    assert said["SparseGPT 50 %", "wikitext2"] == ("-0.35", "within")
    assert said["Wanda 50 %", "wikitext2"] == ("+0.50", "OUTSIDE")
    assert said["Wanda 2:4", "wikitext2"] == ("-", "OUTSIDE")  # not measured
    assert said["ALPS 50 %", "wikitext2"] == ("-", "OUTSIDE")  # above SparseGPT
    assert said["SparseGPT + SDS 2:4", "wikitext2"] == ("-1.30", "within")
    assert said["SparseGPT + refit 2:4", "wikitext2"] == ("-", "control")
    assert n_outside == 3


@pytest.mark.parametrize("columns", [64, 37])
def test_every_format_gives_the_dense_product(columns):
    import bench_sparse
    import torch

    torch.manual_seed(0)
    weight = torch.randn(48, columns).bfloat16()
    weight[torch.rand_like(weight.float()) < 0.5] = 0
    x = torch.randn(5, columns).bfloat16()
    expected, nnz = x.float() @ weight.float().T, int(weight.count_nonzero())
    n_bytes = {
        bench_sparse.dense: 2 * weight.numel(),
        bench_sparse.dense_float32: 4 * weight.numel(),
    }
    n_bytes[bench_sparse.bit_packed] = 2 * nnz + 48 * -(-columns // 8)
    n_bytes[bench_sparse.csr] = 4 * nnz + 4 * nnz + 4 * 49
    for stored_as, n in n_bytes.items():
        stored = stored_as(weight)
        assert stored.n_bytes == n
        product = stored.product(x)
        assert product.dtype == x.dtype
        torch.testing.assert_close(product.float(), expected, atol=0.1, rtol=0.02)


def test_the_benchmark_runs_and_says_what_is_slower(real, tmp_path):
    result = script("bench_sparse.py", real / "oneshot", "--repeats", 1, "--out", tmp_path / "b")
    assert result.returncode == 0, result.stderr
    assert "2:4: not measured, the zeros do not follow that pattern" in result.stdout
    assert re.search(r"(slower|faster|the same)", result.stdout)
    found = json.loads((tmp_path / "b").read_text())
    assert {line["batch"] for line in found["steps"]} == {1, 64}
    assert found["sparsity"] == 0.5
    assert (
        found["bytes"]["pruned_matrices"]["bit-packed"]
        < (found["bytes"]["pruned_matrices"]["dense bf16"])
    )


def test_the_benchmark_refuses_what_is_not_pruned_in_one_line(tiny, tmp_path):
    whole, bare = tiny("llama"), tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(whole / "config.json", bare / "config.json")
    for args, words in (
        ([tmp_path], "no model directory"),
        ([whole], "is not pruned"),
        ([bare], "bare/model.safetensors does not exist"),
        ([whole, "--out", tmp_path / "missing" / "file"], "missing/file is no file in a directory"),
    ):
        result = script("bench_sparse.py", *args)
        assert result.returncode == 2 and words in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1


# the command


def script(name: str, *args) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "eval" / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_takes_runs_or_a_folder_of_them(copy, tmp_path):
    copy("runs/a", named("first"))
    copy("runs/b", named("second"))
    result = script("compare.py", tmp_path / "runs", "-o", tmp_path / "out", "--title", "Two runs")
    assert result.returncode == 0, result.stderr
    assert "first" in result.stdout and "second" in result.stdout
    assert "Two runs" in (tmp_path / "out" / "report.html").read_text()


def test_a_run_that_is_named_twice_counts_once(real):
    assert run_directories([real, real.parent, real], Console(False)) == [real]


def test_what_holds_no_run_is_left_out_beside_runs(real, tmp_path, capsys):
    """As the shell gives it: the runs of a folder, and the report that lies beside them."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "report.csv").write_text("")
    beside = [tmp_path / "figures", real, tmp_path / "report.csv"]
    assert run_directories(beside, Console()) == [real]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"no runs, left out: {tmp_path / 'figures'}, {tmp_path / 'report.csv'}"


@pytest.mark.parametrize("columns", [80, 120])
def test_the_console_shows_figures_beside_long_names_and_says_what_it_leaves_out(
    copy, tmp_path, monkeypatch, capsys, columns
):
    monkeypatch.setattr(console, "PLAIN_WIDTH", columns)
    monkeypatch.setenv("COLUMNS", "200")  # of a terminal that nothing is printed on
    name = "a method of a name that goes on and on and on and on and on"
    run = copy("a", named(name) | {PERPLEXITY: scored(ppl_token=37.0)})
    write_report(collect(as_opt(run)), tmp_path / "out", "A title", Console())
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns and "…" not in text
    quality, published = text.split("Beside published figures")
    assert "37.00" in quality and "26.9" not in quality
    assert ("arXiv 2301.00774" in published) == (columns == 120)
    assert ("more column in report.html" in published) == (columns == 80)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, real):
    (tmp_path / "file").write_text("")
    for args, words in (
        ([tmp_path / "missing"], ["missing", "does not exist", "output_dir"]),
        ([real, tmp_path / "missing"], ["missing", "does not exist"]),
        ([tmp_path], [str(tmp_path), "holds no run", "environment.json"]),
        ([tmp_path / "file"], ["file is a file", "environment.json"]),
        ([real, "-o", tmp_path / "file" / "out"], ["cannot be written", "file"]),
    ):
        result = script("compare.py", *args)
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
        assert all(word in result.stderr for word in words), result.stderr


def test_no_run_directory_is_refused_from_python_too(tmp_path):
    with pytest.raises(UserError, match="is no run directory"):
        collect(tmp_path)

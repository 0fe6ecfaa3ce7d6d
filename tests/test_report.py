"""The report: where its figures come from, its pictures, odd and damaged runs, and the command."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from made_runs import PERPLEXITY, STAGES, as_opt, named, other, quality, scored, seeded, zeroshot
from rich.console import Console as RichConsole
from support import ROOT

import cap_llm
from cap_llm.report import figures
from cap_llm.report import published as papers
from cap_llm.report.comparison import compare
from cap_llm.report.runs import (
    Figure,
    Result,
    collect,
    run_directories,
)
from cap_llm.report.write import write_report
from cap_llm.runtime import console
from cap_llm.runtime.console import Console, format_bytes
from cap_llm.runtime.environment import environment
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.world import World


@pytest.fixture
def report(tmp_path):
    """Writes the report over runs; returns its folder."""

    def make(*runs: Path) -> Path:
        results = [r for run in runs for r in collect(run)]
        return write_report(results, tmp_path / "out", "A title", Console(False)).parent

    return make


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
    with open(report(a, b) / "report.csv", encoding="utf-8") as file:
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
    by = {"command": "cap-llm perplexity 'a b'", "directory": "/elsewhere"}
    by["hardware"] = {"processor": "another one", "cores": 3, "ranks": 2}
    out = report(copy("a", {PERPLEXITY: scored(**by)}))
    lines = list(csv.DictReader((out / "report.csv").open()))
    score, time = ({x["stage"]: x for x in lines if x["measure"] == m} for m in ("ppl", "time"))
    assert score["oneshot"]["command"] == by["command"]
    assert score["oneshot"]["machine"] == "3 cores of another one, 2 ranks"
    assert (
        "--output_dir" in score["dense"]["command"] and "another" not in score["dense"]["machine"]
    )
    assert "--output_dir" in time["oneshot"]["command"]
    text = (out / "report.md").read_text()
    assert f"- command (scores of oneshot): `{by['command']}`" in text
    assert "- directory (scores of oneshot): /elsewhere" in text
    assert "- machine (scores of oneshot): 3 cores of another one, 2 ranks" in text


def test_every_job_of_a_run_is_listed_with_its_machine(copy, report):
    def on_two_ranks(content):
        content["environment"]["hardware"].update(ranks=2)

    text = (report(copy("a", {"oneshot/done.json": on_two_ranks})) / "report.md").read_text()
    assert re.search(r"- machine \(oneshot\): \d+ cores of .*, 2 ranks\n", text)
    assert re.search(r"- machine \(dense, scores of dense, .*\): \d+ cores of [^,]*\n", text)
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


def test_bit_packed_bytes_are_what_a_packed_file_would_take(real):
    from safetensors.torch import load_file

    from cap_llm.models.mask_file import FILE, MaskFile

    figures = {f.kind: f.value for f in collect(real)[-1].figures}
    masks, stored = MaskFile(real / "oneshot" / FILE), 0
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


def test_numbers_of_runs_are_told_apart(copy, report):
    runs = [copy(f"s{seed}", seeded(seed, 30.0)) for seed in (0, 1)]
    page = (report(*runs) / "report.html").read_text()
    assert ">1,</a>" in page and ">2</a>" in page
    assert page.count("<thead>") == page.count("<table>")  # which print repeats on a new page


def test_bytes_of_tiny_models_are_not_zero():
    assert [format_bytes(n) for n in (2**31, 2**21, 40 * 2**10)] == ["2.0 GiB", "2 MiB", "40 KiB"]


# pictures


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


def test_a_model_has_one_colour_in_all_pictures_and_ticks_do_not_overlap(copy):
    from matplotlib.figure import Figure as Canvas

    def of(name, amount, zeros, refit):
        def recipe(content):
            content["oneshot"].update(sparsity=amount, refit=refit)

        sparsity = {"oneshot/sparsity.json": lambda c: c["pruned_matrices"].update(sparsity=zeros)}
        return copy(name, named(name) | {"oneshot/recipe.json": recipe} | sparsity)

    runs = [of("a", 0.5, 0.5, False), of("b", 0.6, 0.594, True), of("c", 0.6, 0.6, False)]
    (section,) = compare([r for run in runs for r in collect(run)])
    sparsity, cost = Canvas(), Canvas()
    figures._over_sparsity(section, sparsity)
    figures._cost(section, cost)
    colours = [{x.get_label(): x.get_color() for x in c.axes[0].lines} for c in (sparsity, cost)]
    assert colours[0]["SparseGPT"] == colours[1]["a"] != colours[1]["b"]
    assert colours[0]["SparseGPT + refit"] == colours[1]["b"]
    assert [x.get_text() for x in sparsity.axes[0].get_xticklabels()] == ["50", "59.4"]


def test_recoveries_on_other_text_are_not_drawn_together(copy, report):
    runs = []
    for name, corpus in (("first", "a.txt"), ("second", "a.txt"), ("third", "b.txt")):
        run = copy(name, named(name))
        (run / "oneshot").rename(run / "recover")
        recipe = {
            "recover": {"corpus": corpus, "length": 64, "optimizer": {"batch": 4}, "weight": name}
        }
        (run / "recover" / "recipe.json").write_text(json.dumps(recipe | {"model": MODEL}))
        points = [
            {"stage": "recover", "step": s, "name": "held_out_ppl", "value": 9.0 - s, "time": 0}
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


def test_without_matplotlib_the_report_has_no_pictures_and_says_so(real, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    page = write_report(collect(real), tmp_path / "out", "A title", Console(False))
    assert "matplotlib is not installed" in page.read_text()
    assert "<img" not in page.read_text()
    assert not list((tmp_path / "out" / "figures").iterdir())


# names that mean something elsewhere

NAMES = [
    *("$x$ $\\frac{", "_hidden", "[/] [bold]x[/bold]", ":x: **a** `b`", "a|b\n# c\n- d", "=1+1"),
    *("<b>&lt;</b>", os.fsdecode(b"by\xfftes"), "\x1b[31mred", "a, b", "-", "\u540d\u524d"),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_is_text_in_every_format(copy, tmp_path, capsys, name):
    def score(content):
        (entry,) = content["corpora"].values()
        return {"corpora": {f"{name}@64": entry}}

    tasks = {"oneshot/zeroshot.json": zeroshot(arc_easy=0.6)}
    runs = [
        copy("a", named(name) | {f"{s}/perplexity.json": score for s in STAGES} | tasks),
        copy("b", named("second") | {PERPLEXITY: score, "oneshot/recipe.json": other}),
    ]
    results = [r for run in runs for r in collect(run)]
    out = write_report(results, tmp_path / "out", name, Console()).parent
    assert {p.name for p in (out / "figures").iterdir()} == {
        *("layers.png", "cost.png", "zero-shot.png"),
    }
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "left out" not in text and not re.search(r"[\x00-\x08\x0b-\x1f]", page + text)
    assert "<b>" not in page + text
    table = text.partition("### Quality")[2].partition("###")[0]
    rows = [re.split(r"(?<!\\)\|", line) for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and {len(row) for row in rows} == {len(rows[1])}
    with open(out / "report.csv") as file:
        lines = list(csv.DictReader(file))
    assert not any(value[:1] in "=+@-" for line in lines for value in line.values() if value[:1])
    assert any(console.printable(name) in line["model"] for line in lines)
    said = capsys.readouterr().out
    assert "\x1b" not in said and console.printable(name).split()[0] in said


def test_the_bar_takes_names_as_text(monkeypatch):
    screen = RichConsole(file=io.StringIO(), force_terminal=True, width=200)
    speaker = Console()
    monkeypatch.setattr(speaker, "_out", screen)
    with speaker.bar("[/] on a[b]c", 2, "blocks") as bar:
        bar.phase("[/] of [x]")
        bar.advance()
    assert "[/] on a[b]c" in re.sub(r"\x1b\[[0-9;]*m", "", screen.file.getvalue())


def test_a_locale_that_cannot_write_a_name_ends_nothing():
    code = "from cap_llm.runtime.console import Console; Console().say('\u540d')"
    env = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False)
    assert done.stdout == b"\\u540d\n", done.stderr


def test_a_picture_that_fails_is_left_out_and_named(copy, report, monkeypatch):
    def fails(section, figure):
        raise ValueError("no\nluck")

    monkeypatch.setattr(figures, "_layers", fails)
    tasks = {"oneshot/zeroshot.json": zeroshot(arc_easy=0.6)}
    out = report(copy("a", named("first") | tasks))
    assert [p.name for p in (out / "figures").iterdir()] == ["zero-shot.png"]
    for name in ("report.md", "report.html"):
        assert "layers.png is left out (ValueError: no luck)." in (out / name).read_text()


# runs that are not as they should be


def test_a_run_that_was_stopped_before_any_score_is_shown(copy, report):
    run = copy("a", {"dense/recipe.json": lambda c: c["model"].update(path="some/model")})
    shutil.rmtree(run / "oneshot")
    (run / "dense" / "perplexity.json").unlink()
    assert "not scored; oneshot not begun" in (report(run) / "report.md").read_text()


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
    "schedule": ("oneshot/recipe.json", {"recover": {"masks": {"schedule": 5}}}),
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


def infinite(content):
    content["seconds"] = float("inf")


def folder_for_file(run):
    (run / PERPLEXITY).unlink()
    (run / PERPLEXITY).mkdir()


def pipe_for_file(run):
    (run / PERPLEXITY).unlink()
    os.mkfifo(run / PERPLEXITY)


def weights_elsewhere(run):
    shard = next((run / "oneshot").glob("model-*.safetensors"))
    shard.unlink()
    shard.symlink_to(run / "nowhere")


def deep(run):
    (run / "oneshot" / "recipe.json").write_text("[" * 100_000)


def empty_shape(run):
    path = run / "oneshot" / "sparsity.json"
    content = json.loads(path.read_text())
    content["rows"][0]["shape"] = [0, 0]
    path.write_text(json.dumps(content))


DAMAGE = [folder_for_file, pipe_for_file, weights_elsewhere, deep, empty_shape]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_one_damaged_run_ends_no_comparison_and_is_named(copy, report, damage):
    good, bad = copy("good", named("good") | {"oneshot/recipe.json": other}), copy("bad")
    damage(bad)
    text = (report(good, bad) / "report.md").read_text()
    assert re.search(r"\| good \(1\) +\| \d", text)
    assert re.search(r"\((.*; )?(\S+ cannot be read|(\S+ is )?not as this version writes it)", text)


def test_a_run_whose_figures_cannot_be_shown_is_skipped_with_one_line(copy, tmp_path, capsys):
    good, bad = copy("good", named("good")), copy("bad", {"oneshot/done.json": infinite})
    results = [r for run in (bad, good) for r in collect(run)]
    out = write_report(results, tmp_path / "out", "A title", Console()).parent
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "skipped" in x]
    assert line.startswith(f"{bad} is skipped")
    text = (out / "report.md").read_text()
    assert re.search(r"\| good \(1\) +\| \d", text) and "/bad" not in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_figure_is_not_shown_as_one(copy, report, value):
    text = (report(copy("a", {PERPLEXITY: scored(ppl_token=value)})) / "report.md").read_text()
    assert "perplexity.json is not as this version writes it" in text


def test_a_fact_that_cannot_be_compared_is_not_as_this_version_writes_it(copy, report):
    def odd(_):
        return {"tasks": {"piqa": {"acc": 0.6, "limit": {"a": 1}}}}

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


# acceptance and the benchmark of sparsity


def test_the_acceptance_runs_aim_at_published_figures():
    import acceptance

    for (name, corpus), (figure, low, high) in acceptance.TARGETS.items():
        method, amount = re.fullmatch(r"(.+?)(?: (\d\S*))?", name).groups("")
        known = [
            p.ppl
            for p in papers.published()
            if p.model == "opt-125m"
            and (p.method, p.amount.replace(" ", ""), p.corpus) == (method, amount, corpus)
        ]
        assert float(figure) in known and low <= float(figure) <= high


def test_the_verdict_is_within_or_outside_the_range(tmp_path):
    import acceptance

    scores = {"dense": {"wikitext2": 27.66, "ptb": 38.99, "c4": 26.56}}
    scores |= {"magnitude 50%": {"wikitext2": 193.4}, "SparseGPT 50%": {"wikitext2": 36.5}}
    scores |= {"Wanda 50%": {"wikitext2": 39.5}, "SparseGPT 2:4": {"wikitext2": 60.5}}
    scores |= {"Wanda + reconstruction 50%": {"wikitext2": 31.2}}
    scores |= {"ALPS 50%": {"wikitext2": 36.6}, "SparseGPT + SDS 2:4": {"wikitext2": 50.0}}
    results = {}
    for name in (row.name for row in acceptance.ROWS):
        figures = [Figure("ppl", corpus, ppl) for corpus, ppl in scores.get(name, {}).items()]
        results[name] = Result(name, "oneshot", tmp_path, "opt-125m", figures=figures)
    rows, n_outside = acceptance.verdicts(results)
    said = {(row[0], row[1]): (row[4], row[-1]) for row in rows}
    assert said["SparseGPT 50%", "wikitext2"] == ("-0.35", "within")
    assert said["Wanda 50%", "wikitext2"] == ("+0.50", "OUTSIDE")
    assert said["Wanda 2:4", "wikitext2"] == ("-", "OUTSIDE")  # not measured
    assert said["ALPS 50%", "wikitext2"] == ("-", "OUTSIDE")  # above SparseGPT
    assert said["SparseGPT + SDS 2:4", "wikitext2"] == ("-1.30", "within")
    assert said["SparseGPT + refit 2:4", "wikitext2"] == ("-", "control")
    assert n_outside == 3


@pytest.mark.parametrize("columns", [64, 37])
def test_every_format_gives_the_dense_product(columns):
    import torch

    from cap_llm.evaluation import bench_sparse

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
    result = script("bench", real / "oneshot", "--repeats", 1, "--out", tmp_path / "b")
    assert result.returncode == 0, result.stderr
    assert "2:4: not measured" in result.stdout
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
        ([tmp_path], "config.json"),
        ([whole], "is not pruned"),
        ([bare], "bare/model.safetensors does not exist"),
        ([whole, "--out", tmp_path / "missing" / "file"], "--out"),
    ):
        result = script("bench", *args)
        assert result.returncode == 2 and words in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1


# the command


def script(name: str, *args) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cap_llm", name, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_takes_runs_or_a_folder_of_them(copy, tmp_path):
    copy("runs/a", named("first"))
    copy("runs/b", named("second"))
    result = script("compare", tmp_path / "runs", "-o", tmp_path / "out", "--title", "Two runs")
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
        ([tmp_path / ("a" * 300)], ["does not exist"]),
        ([real, "-o", tmp_path / "file" / "out"], ["cannot be written", "file"]),
    ):
        result = script("compare", *args)
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
        assert all(word in result.stderr for word in words), result.stderr


def test_no_run_directory_is_refused_from_python_too(tmp_path):
    with pytest.raises(UserError, match="is no run directory"):
        collect(tmp_path)

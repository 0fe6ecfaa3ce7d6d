"""The report: its files, its pictures, odd and damaged runs, and the command."""

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
from made_runs import accuracy, dense, model, ppl
from rich.console import Console as RichConsole
from safetensors.torch import load_file
from support import ROOT

from cap_llm.models.mask_file import FILE, MaskFile
from cap_llm.models.result import read_result
from cap_llm.report import figures
from cap_llm.report import published as papers
from cap_llm.report.runs import Model, read_runs, run_directories
from cap_llm.report.write import write_report
from cap_llm.runtime import console
from cap_llm.runtime.console import Console, format_bytes
from cap_llm.runtime.environment import environment
from cap_llm.runtime.world import World


@pytest.fixture
def report(tmp_path):
    """Writes the report of runs or of models; returns its folder."""

    def make(*sources: Path | Model, title: str = "A title", printed: bool = False) -> Path:
        models, problems = read_runs([run for run in sources if isinstance(run, Path)])
        models += [m for m in sources if isinstance(m, Model)]
        return write_report(models, problems, tmp_path / "out", title, Console(printed)).parent

    return make


def lines_of(folder: Path) -> list[dict]:
    return list(csv.DictReader((folder / "report.csv").open(encoding="utf-8")))


# the files of a run


def test_the_entry_itself_leaves_the_report(real):
    page = (real / "report.html").read_text()
    (score,) = json.loads((real / "oneshot" / "scores.json").read_text())["scores"]
    for text in (page, (real / "report.md").read_text()):
        assert f"{score['value']:.2f}" in text
        assert "ppl_token@64" in text and "a method" in text and "Written by cap_llm" in text
    assert "http" not in page and 'src="data:image/png' in page  # nothing is fetched
    assert (real / "figures" / "error-by-block.png").read_bytes().startswith(b"\x89PNG")


def test_every_number_is_in_the_csv_with_its_run_and_command(copy, report):
    runs = [copy("a"), copy("b")]
    lines = lines_of(report(*runs))
    for run in runs:
        own = [line for line in lines if line["run"] == str(run)]
        assert {"ppl_token", "sparsity", "seconds", "n_bytes"} <= {x["measure"] for x in own}
        assert all("--output_dir" in x["command"] for x in own if x["stage"] == "oneshot")
        (exact,) = json.loads((run / "oneshot" / "scores.json").read_text())["scores"]
        (score,) = [x for x in own if (x["measure"], x["stage"]) == ("ppl_token", "oneshot")]
        assert float(score["value"]) == exact["value"]


def test_a_score_is_traced_to_the_job_that_measured_it(copy, report):
    def elsewhere(content):
        job = content["scores"][0]["job"]
        job.update(command="cap-llm perplexity 'a b'", directory="/elsewhere")
        job["hardware"].update(processor="another one", cores=3, ranks=2)

    out = report(copy("a", {"oneshot/scores.json": elsewhere}))
    lines = {x["measure"]: x for x in lines_of(out) if x["stage"] == "oneshot"}
    assert lines["ppl_token"]["command"] == "cap-llm perplexity 'a b'"
    assert lines["ppl_token"]["machine"] == "3 cores of another one"
    assert "--output_dir" in lines["seconds"]["command"]
    text = (out / "report.md").read_text()
    assert "<summary>scored oneshot</summary>" in text
    assert "- command: `cap-llm perplexity 'a b'`" in text and "- directory: /elsewhere" in text
    assert "- machine: 3 cores of another one, 2 ranks" in text


def test_rows_lead_to_the_runs_behind_them(report):
    seeds = [model("x", ppl(30), identity="x", seeds=[n], run=f"/runs/s{n}") for n in (0, 1)]
    page = (report(*seeds, model("y", run="/runs/y")) / "report.html").read_text()
    assert '<a class="run" href="#run-1">1,</a><a class="run" href="#run-2">2</a>' in page
    assert '<li id="run-2"><code>s1</code>' in page
    assert page.count("<thead>") == page.count("<table>")  # which print repeats on a new page
    assert 'class="run"' not in (report(seeds[0]) / "report.html").read_text()


def test_a_result_says_what_a_packed_file_would_take(real):
    result, masks, stored = read_result(real / "oneshot"), MaskFile(real / "oneshot" / FILE), 0
    tensors = [load_file(path) for path in (real / "oneshot").glob("model*.safetensors")]
    for name, tensor in (item for part in tensors for item in part.items()):
        if name in masks:
            stored += int((tensor != 0).sum()) * 4 + tensor.shape[0] * -(-tensor.shape[1] // 8)
        else:
            stored += tensor.numel() * 4
    overhead = result.n_bytes - sum(t.numel() * 4 for part in tensors for t in part.values())
    assert result.packed_bytes == stored + overhead
    assert (result.dtype, result.sparsity, result.calibration) == (
        *("float32", 0.5, "8 x 64 tokens of text.txt"),
    )


def test_a_command_can_be_given_to_a_shell_again(monkeypatch):
    words = ["cap-llm", "--name", "a method's, 50 %", "--evaluate.corpora", "[a b.txt]"]
    monkeypatch.setattr(sys, "argv", words)
    assert shlex.split(environment(World("cpu"))["command"]) == words


def test_bytes_of_tiny_models_are_not_zero():
    assert [format_bytes(n) for n in (2**31, 2**21, 40 * 2**10)] == ["2.0 GiB", "2 MiB", "40 KiB"]


# pictures


def test_pictures_show_only_what_was_measured(report):
    one = model("a", ppl(30), block_errors=[0.1, 0.2])
    names = [{p.name for p in (report(m) / "figures").iterdir()} for m in (model("b"), one)]
    assert names == [set(), {"error-by-block.png"}]
    two = model("c", ppl(40), sparsity=0.7, curve=[[(0, 9.0), (100, 8.0)]], dense_ppl=7.0)
    drawn = {p.name for p in (report(one, two, dense(ppl(20))) / "figures").iterdir()}
    assert drawn == {"error-by-block.png", "perplexity-by-sparsity.png", "recovery.png"}


def test_each_dense_model_has_pictures_of_its_own(report):
    models = [model(d, ppl(30), dense=d, block_errors=[0.1, 0.2]) for d in ("m1/base", "m2/base")]
    out = report(*models)
    names = {"1-error-by-block.png", "2-error-by-block.png"}
    assert {p.name for p in (out / "figures").iterdir()} == names
    first, second = (out / "report.md").read_text().split("\n## m2/base\n")
    assert "1-error" in first and "2-error" not in first and "2-error" in second


def test_errors_on_other_text_are_not_drawn_together(report):
    models = [model(x, block_errors=[0.1, 0.2], calibration=x[0]) for x in ("a1", "a2", "b")]
    text = (report(*models) / "report.md").read_text()
    assert "of each block on a (1 models on other text are not shown)." in text


def test_without_matplotlib_the_report_has_no_pictures_and_says_so(real, report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = report(real)
    assert "matplotlib" in (out / "report.md").read_text()
    assert "<img" not in (out / "report.html").read_text()
    assert not list((out / "figures").iterdir())


def test_a_picture_that_fails_is_left_out_and_named(report, monkeypatch):
    def fails(section, axes):
        raise ValueError("no\nluck")

    monkeypatch.setitem(figures._PAINTERS, "error-by-block", fails)
    out = report(model("a", curve=[[(0, 9.0), (100, 8.0)]]))
    assert [p.name for p in (out / "figures").iterdir()] == ["recovery.png"]
    for name in ("report.md", "report.html"):
        assert "error-by-block.png: ValueError no luck" in (out / name).read_text()


# names that mean something elsewhere

NAMES = [
    *("$x$ $\\frac{", "_hidden", "[/] [bold]x[/bold]", ":x: **a** `b`", "a|b\n# c\n- d", "=1+1"),
    *("<b>&lt;</b>", os.fsdecode(b"by\xfftes"), "\x1b[31mred", "a, b", "-", "\u540d\u524d"),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_is_text_in_every_format(report, capsys, name):
    curve = [[(0, 9.0), (100, 8.0)]]
    models = [
        model(name, ppl(30, name), accuracy(0.6, name), block_errors=[0.1, 0.2], curve=curve),
        model("second", ppl(40, name), sparsity=0.7, calibration=name),
    ]
    out = report(*models, title=name, printed=True)
    names = {"error-by-block.png", "perplexity-by-sparsity.png", "recovery.png"}
    assert {p.name for p in (out / "figures").iterdir()} == names
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "Left out" not in text and not re.search(r"[\x00-\x08\x0b-\x1f]", page + text)
    assert "<b>" not in page
    lines = lines_of(out)
    assert not any(value[:1] in "=+@-" for line in lines for value in line.values() if value[:1])
    assert any(console.printable(name) in line["model"] for line in lines)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and console.printable(name).split()[0] in printed


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


# runs that are not as they should be


def test_unfinished_stages_are_named_and_the_rest_is_shown(copy, report):
    run = copy("a")
    (run / "oneshot" / "result.json").unlink()
    text = (report(run) / "report.md").read_text()
    assert "oneshot: the stage is not finished" in text and "| *dense*" in text


def damaged(path):
    path.write_text("{")


def foreign(path):
    path.write_text('{"stage": ["a"], "scores": {"x": 1}}')


def infinite(path):
    path.write_text(path.read_text().replace('"value": ', '"value": 1e999, "x": '))


def deep(path):
    path.write_text("[" * 100_000)


def folder_for_file(path):
    path.unlink()
    path.mkdir()


def pipe_for_file(path):
    path.unlink()
    os.mkfifo(path)


DAMAGE = [damaged, foreign, deep, folder_for_file, pipe_for_file]
FILES = ("result.json", "scores.json")
CASES = [(damage, file) for damage in DAMAGE for file in FILES] + [(infinite, "scores.json")]


@pytest.mark.parametrize("damage, file", CASES, ids=lambda x: getattr(x, "__name__", x))
def test_a_damaged_file_ends_no_comparison_and_is_named(copy, report, damage, file):
    good, bad = copy("good"), copy("bad")
    damage(bad / "oneshot" / file)
    text = (report(good, bad) / "report.md").read_text()
    assert re.search(r"\| \*?a method\*? \(1\) +\| \d", text)
    (line,) = re.findall(r"^- .*bad/oneshot/.*$", text.partition("## Left out")[2], re.M)
    assert file in line


def test_scores_of_other_weights_do_not_count(copy, report):
    def other(content):
        content["fingerprint"] = "x"

    text = (report(copy("a", {"oneshot/scores.json": other})) / "report.md").read_text()
    assert re.search(r"\| a method \| - \|", text) and "different weights" in text


def test_scores_beside_the_dense_model_are_included(copy, tmp_path):
    model_folder = tmp_path / "model"
    model_folder.mkdir()

    def moved(content):
        content["dense"] = str(model_folder)

    run = copy("a", {"dense/result.json": moved})
    (run / "dense" / "scores.json").rename(model_folder / "scores.json")
    (own,) = [m for m in read_runs([run])[0] if m.result.stage == "dense"]
    assert [score.measure for score in own.scores] == ["ppl_token"]


# acceptance and the benchmark of sparsity


def test_the_acceptance_runs_aim_at_published_figures():
    import acceptance

    for (name, corpus), (figure, low, high) in acceptance.TARGETS.items():
        method, amount = re.fullmatch(r"(.+?)(?: (\d\S*))?", name).groups("")
        known = [
            p.ppl
            for p in papers.published()
            if (p.model, p.amount, p.corpus) == ("opt-125m", amount, corpus)
            and p.method.removesuffix(" (dense inputs)") == method
        ]
        assert float(figure) in known and low <= float(figure) <= high


def test_the_verdict_is_within_or_outside_the_range():
    import acceptance

    scores = {"dense": {"wikitext2": 27.66, "ptb": 38.99, "c4": 26.56}}
    scores |= {"magnitude 50%": {"wikitext2": 193.4}, "SparseGPT 50%": {"wikitext2": 36.5}}
    scores |= {"Wanda 50%": {"wikitext2": 39.5}, "SparseGPT 2:4": {"wikitext2": 60.5}}
    scores |= {"Wanda + reconstruction 50%": {"wikitext2": 31.2}}
    scores |= {"ALPS 50%": {"wikitext2": 36.6}, "SparseGPT + SDS 2:4": {"wikitext2": 50.0}}
    models = {}
    for name in (row.name for row in acceptance.ROWS):
        measured = [ppl(value, corpus) for corpus, value in scores.get(name, {}).items()]
        models[name] = model(name, *measured)
    rows, n_outside = acceptance.verdicts(models)
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
        ([tmp_path], str(tmp_path)),
        ([whole], str(whole)),
        ([bare], str(bare)),
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
    for name in ("first", "second"):
        copy(f"runs/{name}", {"oneshot/result.json": lambda c, name=name: c.update(run=name)})
        (tmp_path / "runs" / name / "dense" / "result.json").unlink()
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
    assert line.endswith(f"{tmp_path / 'figures'}, {tmp_path / 'report.csv'}")


@pytest.mark.parametrize("columns", [80, 120])
def test_the_console_shows_numbers_beside_long_names(report, monkeypatch, capsys, columns):
    monkeypatch.setattr(console, "PLAIN_WIDTH", columns)
    monkeypatch.setenv("COLUMNS", "200")  # of a terminal that nothing is printed on
    name = "a method of a name that goes on and on and on and on and on"
    report(model(name, ppl(37.0), ppl(38.0, "second"), ppl(39.0, "x" * 30)), printed=True)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns and "…" not in text
    assert "37.00" in text and ("39.00" in text) == (columns == 120)
    assert ("more columns" in text) == (columns == 80)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, real):
    (tmp_path / "file").write_text("")
    for args, words in (
        ([tmp_path / "missing"], ["missing", "does not exist", "output_dir"]),
        ([real, tmp_path / "missing"], ["missing", "does not exist"]),
        ([tmp_path], [str(tmp_path), "contains no run", "environment.json"]),
        ([tmp_path / "file"], ["file", "environment.json"]),
        ([tmp_path / ("a" * 300)], ["does not exist"]),
        ([real, "-o", tmp_path / "file" / "out"], ["cannot be written", "file"]),
    ):
        result = script("compare", *args)
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
        assert all(word in result.stderr for word in words), result.stderr

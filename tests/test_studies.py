"""The programs of eval/ that measure for hours: their plans, verdicts and tables, not the hours."""

import json

import acceptance
import bench_solvers
import pytest
import shapes
import study_solvers as study
import tables
from transformers import AutoModelForCausalLM

from cap_llm.cli import demo, matrix
from cap_llm.cli.command_line import make_parser
from cap_llm.cli.matrix import DENSE, Matrix, Row
from cap_llm.models.files import INDEX

EVERY = study.plan(study.ARMS, study.PATTERNS, study.SEEDS)


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Writes results of the study; the arms' perplexities are lists over seeds."""
    monkeypatch.setattr(study, "RESULTS", tmp_path / "study.json")

    def write(pattern: str, **ppls: list[float]) -> None:
        for arm, values in ppls.items():
            for seed, ppl in enumerate(values):
                figures = {"wikitext2": ppl, "c4": ppl, "seconds": 1.0, "peak_memory_bytes": 1}
                tables.record(study.RESULTS, study.name_of((arm, pattern, seed)), figures)

    return write


def test_a_plan_begins_with_what_decides_and_ends_with_what_takes_hours():
    main = [arm for arm, pattern, seed in EVERY if pattern == "2:4"][: len(study.MAIN)]
    assert EVERY[0][0] == "dense" and main == list(study.MAIN)
    assert EVERY[-1] == ("SDS (paper) on SparseGPT", "2:4", 0)
    assert len(EVERY) == len(set(EVERY))


def test_a_base_comes_before_what_starts_from_it():
    for n, cell in enumerate(EVERY):
        base = study.base_of(cell)
        assert base in EVERY[: n + 1]


def test_magnitude_reads_no_text_and_has_one_seed():
    assert {seed for arm, _, seed in EVERY if arm == "magnitude"} == {0}
    assert {seed for arm, _, seed in EVERY if arm == "Wanda"} == {0, 1, 2}


def test_all_recorded_rows_are_cells_of_the_study():
    recorded = json.loads(study.RESULTS.read_text())
    cells = {study.name_of(cell): cell for cell in EVERY}
    known = study.results()
    assert len(known) == len(recorded) and known.keys() <= cells.keys()
    assert [row for row in known.values()] == [row for row in recorded.values()]
    assert not study.missing(cells["dense"])
    assert not study.missing(cells["ALPS + reconstruction, 50%, seed 0"])
    assert study.missing(cells["ALPS, 50%, seed 0"]) == ["whole"]


def test_names_of_earlier_versions_are_read_and_replaced(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"Wanda, 50 %, seed 0": {"c4": 1}, "dense": {"c4": 2}}')
    tables.record(path, "dense", {"c4": 3})
    assert json.loads(path.read_text()) == {"Wanda, 50%, seed 0": {"c4": 1}, "dense": {"c4": 3}}


@pytest.mark.parametrize(
    "rows",
    [
        *(demo.rows(full=True), acceptance.ROWS, list(bench_solvers.ROWS.values())),
        [study.row_of(cell) for cell in EVERY],
    ],
    ids=["demo", "acceptance", "bench", "study"],
)
def test_every_row_has_a_folder_of_its_own_and_follows_what_it_needs(rows, tmp_path):
    runs = Matrix(tmp_path, "dense")
    assert len({runs.folder(row) for row in rows}) == len(rows)
    before = set()
    for row in rows:
        assert before >= {need.name for need in row.needs}
        before.add(row.name)


@pytest.mark.parametrize("rows", [demo.rows(full=True), acceptance.ROWS])
def test_every_row_is_a_command_that_the_entry_reads(rows, tmp_path):
    parser = make_parser()
    for row in rows:
        command = Matrix(tmp_path, "dense").command(row, {"evaluate.corpora": ["a.txt"]})
        entry = next(n for n, word in enumerate(command) if word.endswith("train.py"))
        config = parser.parse_args(command[entry + 1 :])
        assert config.stages[-1] == "evaluate" and (row.stage in (*config.stages, DENSE))
        assert config.evaluate.corpora == ["a.txt"] and config.model.dense == (
            "dense" if row.needs else None
        )


def test_the_demo_tells_its_story_in_six_rows():
    names = [row.name for row in demo.rows()]
    assert names[:3] == ["dense", "SparseGPT 50%", "ALPS 50%"]
    assert names[3:] == [
        "ALPS 50% + reconstruction",
        "ALPS 50% + reconstruction + recovery",
        "ALPS 2:4",
    ]


def test_weights_go_once_they_are_scored_and_no_cell_starts_from_them(tmp_path, monkeypatch):
    base, later = ("SparseGPT", "2:4", 0), ("SDS on SparseGPT", "2:4", 0)
    runs = Matrix(tmp_path, "dense")
    for cell in (base, later):
        finish(runs, study.row_of(cell), "model-00001-of-00002.safetensors", study.masks.FILE)

    def left(cell) -> set[str]:
        return {p.name for p in runs.model_of(study.row_of(cell)).rglob("*") if p.is_file()}

    unfinished = {later}
    monkeypatch.setattr(study, "missing", lambda cell: ["first"] if cell in unfinished else [])
    study.clear([base, later], runs)
    assert len(left(base)) == len(left(later)) == 4
    unfinished = {("SDS on SparseGPT", "2:4", 1)}
    study.clear([later, *unfinished], runs)
    assert left(base) == left(later) == {"done.json"}


def finish(runs: Matrix, row: Row, *others: str) -> None:
    """Writes the files of a finished model."""
    folder = runs.model_of(row)
    for name in ("done.json", INDEX, *others):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


@pytest.fixture
def called(monkeypatch):
    """The output directories of the entry's calls, and the exit code of each by name."""
    codes, folders = {}, []

    def call(command, ranks=1):
        folders.append(command[command.index("--output_dir") + 1].rpartition("/")[2])
        return codes.get(folders[-1], 0)

    monkeypatch.setattr(matrix, "call", call)
    return folders, codes


def test_a_deleted_model_is_made_again_and_a_complete_one_is_not(tmp_path, called):
    folders, _ = called
    runs, base = Matrix(tmp_path, "dense"), Row("a")
    later = Row("a + b", {"model.path": base}, "sds")
    finish(runs, base)
    runs.run(later)
    assert folders == ["a-b"]
    (runs.model_of(base) / INDEX).unlink()
    runs.run(later)
    assert folders[1:] == ["a", "a-b"] and not (runs.model_of(base) / "done.json").exists()


def test_a_failed_row_ends_only_what_needs_it_and_a_stop_ends_all(tmp_path, called, capsys):
    folders, codes = called
    runs, base = Matrix(tmp_path, "dense"), Row("a")
    rows = [Row(DENSE, stage=DENSE), base, Row("b", {"model.path": base}, "sds"), Row("c")]

    def run() -> int:
        folders.clear()
        return runs.run_all(rows, lambda row: runs.run(row, {}), matrix.Console())

    finish(runs, base)
    assert run() == 0 and folders == ["dense", "a", "b", "c"]
    codes["a"] = 1
    assert run() == 1 and folders == ["dense", "a", "c"]
    said = capsys.readouterr().out
    assert "failed: a: exit code 1" in said and "failed: b: needs a" in said
    codes["a"] = 143
    assert run() == 143 and folders == ["dense", "a"]
    codes["dense"] = 2
    assert run() == 2 and folders == ["dense"]


def test_the_study_records_each_score_as_it_is_made(tmp_path, known, called, monkeypatch):
    folders, codes = called
    monkeypatch.setattr(study, "measured", lambda cell, runs, keys: dict.fromkeys(keys, 1.0))
    monkeypatch.setattr(study, "write_tables", lambda: None)
    monkeypatch.setattr(study.assets, "smollm2", lambda say: tmp_path)
    codes["wanda-60-seed-0"] = 1
    arms = ["magnitude", "Wanda", "ALPS"]
    monkeypatch.setattr("sys.argv", ["study", str(tmp_path), "--patterns", "60%", "--arms", *arms])
    assert study.main() == 1
    assert folders == ["dense", "dense", *(f"{arm}-60-seed-0".lower() for arm in arms)]
    assert study.results()["dense"].keys() == {"wikitext2", "c4", "whole"}
    folders.clear()
    assert study.main() == 1 and folders == ["wanda-60-seed-0"]


@pytest.mark.parametrize(
    ("sds", "c1", "c2", "said"),
    [
        ([10.0, 11.0, 12.0], [12.0, 13.0, 14.1], [13.0, 14.0, 15.0], "-2.03 ± 0.06 (C1, better)"),
        ([10.0, 11.0], [13.0, 13.0], [10.5, 10.5], "+0.00 ± 0.71 (C2, within the spread)"),
        ([10.0], [11.0], [9.0], "+1.00 (C2, one seed)"),
    ],
)
def test_sds_is_held_against_the_better_control_seed_by_seed(known, sds, c1, c2, said):
    arms = {"SDS on SparseGPT": sds, "SparseGPT + refit": c1, "C2 on SparseGPT": c2}
    known("2:4", **arms)
    assert study.against_controls("2:4", "wikitext2", "SDS on SparseGPT") == said
    assert study.against_controls("2:4", "whole", "SDS on SparseGPT") == ""


def test_the_gap_is_between_sparsegpt_and_dense(known):
    known("2:4", **{"SparseGPT": [60.0, 62.0], "ALPS": [45.0, 45.0]})
    known("", dense=[30.0])
    (row,) = (line for line in study.details("2:4") if line.startswith("| ALPS"))
    assert "| -26.2 ± 1.7% | 51.6 ± 2.2% |" in row


def test_no_ratio_is_printed_of_a_disturbed_row(capsys):
    rows = {
        name: {"seconds": 10.0 * n, "peak_bytes": 2**30, "others": 0.0}
        for n, name in enumerate(bench_solvers.ROWS, 1)
    }
    rows["ALPS"]["others"] = 0.5
    rows["reconstruction"]["epochs"] = [2, 2, 0]
    args = type("Args", (), {"sequences": 64, "length": 512, "threads": 2})
    bench_solvers.show(rows, args)
    said = {
        line.split("|")[1].strip(): line
        for line in capsys.readouterr().out.split("\n")
        if "|" in line
    }
    assert "| 20.0 | 2.00 |  |" in said["SparseGPT + refit"]
    assert "| 40.0 | - |  | 0.50 (disturbed) |" in said["ALPS"]
    assert "| 50.0 | 5.00 | 6.00 |" in said["SDS"]
    assert said["reconstruction"].endswith("| 0 in 1, 2 in 2 |")


def test_a_shape_is_a_model_that_transformers_reads_and_is_written_once(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", (16, 2, 3))
    folder = shapes.random_model("tiny", blocks=2, below=tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert len(model.model.decoder.layers) == 2 and not report["missing_keys"]
    assert model.model.decoder.layers[0].fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    (folder / "config.json").unlink()
    assert shapes.random_model("tiny", blocks=2, below=tmp_path) == folder
    assert not (folder / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-2"]

"""The study of recovery compares seed by seed, what the question needs first; the probe."""

import shutil
from pathlib import Path

import probe_contrast
import pytest
import study_recovery
from safetensors.torch import load_file, save_file
from study_recovery import ARMS, FIRST_ARMS, Cell, Study, plan
from support import ROOT

from cap_llm.runtime.files import write_json


@pytest.fixture
def options(monkeypatch):
    """Reads the options of a command line."""

    def read(*given: str):
        monkeypatch.setattr("sys.argv", ["study_recovery.py", *given])
        return study_recovery.parse()

    return read


def test_a_study_that_is_cut_short_has_the_arms_of_the_question(options):
    todo = plan(options())
    asked = [cell for cell in todo if cell.arm in FIRST_ARMS]
    others = [cell for cell in todo if cell.arm not in (*FIRST_ARMS, "dense", study_recovery.TUNED)]
    assert {(c.arm, c.seed) for c in asked} == {(a, s) for a in FIRST_ARMS for s in range(3)}
    assert max(map(todo.index, asked)) < min(map(todo.index, others))
    assert {cell.arm for cell in todo} == {"dense", *ARMS}


def test_recorded_rows_are_finished(options):
    study, recorded = Study(options(), ROOT, {}), study_recovery.results()
    finished = [cell for cell in plan(options()) if study.has(cell)]
    assert len(finished) == len([row for row in recorded.values() if not row["settings"]])
    assert sum(map(len, study.rows().values())) == len(recorded)


def test_more_windows_are_scored_of_the_same_run(options):
    first, whole = (Study(options(*given), ROOT, {}) for given in ([], ["--whole"]))
    cell = Cell("KL + FiC", 1)
    assert first.key(cell) != whole.key(cell)
    rows = [study.row(cell) for study in (first, whole)]
    assert first.runs.folder(rows[0]) == whole.runs.folder(rows[1])
    assert [need.stage for need in rows[0].needs] == ["oneshot", "recover"]


def test_what_an_arm_reads_is_made_before_it_and_has_the_default_settings(options):
    todo = plan(options("--arms", "KL + FiC", "--seeds", "4", "--set", "recover.optimizer.lr=1e-4"))
    made = [(cell.arm, cell.settings) for cell in todo]
    assert made == [
        ("dense", ()),
        ("no training", ()),
        ("dense + cross-entropy", ()),
        ("KL + FiC", ("recover.optimizer.lr=1e-4",)),
    ]


@pytest.mark.parametrize("given", [["--arms", "CE"], ["--tokens", "100"], ["--set", "lr=1"]])
def test_options_that_make_no_sense_are_refused(options, given):
    with pytest.raises(SystemExit) as refused:
        options(*given)
    assert refused.value.code == 2


def test_a_row_of_another_objective_is_not_taken_for_an_arms(options, monkeypatch, tmp_path):
    study = Study(options(str(tmp_path)), ROOT, {})
    monkeypatch.setattr(study_recovery, "RESULTS", tmp_path / "results.json")
    cell = Cell("KL", 0)
    write_json(study_recovery.RESULTS, {study.key(cell): {"objective": {"kl": 1.0}}})
    assert study.has(cell) and not study.has(Cell("KL", 1))
    write_json(study_recovery.RESULTS, {study.key(cell): {"objective": {"kl": 0.5}}})
    with pytest.raises(SystemExit, match="{'kl': 0.5}"):
        study.has(cell)


def test_differences_are_those_of_the_same_seed(options, monkeypatch, tmp_path):
    """Seeds differ by 10, the arms by 1 and 3: the spread of the difference is that of 1 and 3."""
    study = Study(options(str(tmp_path)), ROOT, {})
    monkeypatch.setattr(study_recovery, "RESULTS", tmp_path / "results.json")
    lever = ("recover.optimizer.lr=1e-4",)
    scores = {
        Cell("dense", 0): 20.0,
        Cell("no training", 0): 60.0,
        Cell("no training", 1): 70.0,
        Cell("KL", 0): 40.0,
        Cell("KL", 1): 50.0,
        Cell("KL", 0, lever): 30.0,
        Cell("KL + PrC", 0): 39.0,
        Cell("KL + PrC", 1): 47.0,
        Cell("KL + PrC", 2): 9.0,  # KL has no such seed
        Cell("KL + PrC", 0, lever): 28.0,
        Cell("KL + FiC", 0, lever): 35.0,
        Cell("KL + FiC", 0, ("recover.optimizer.clip=2",)): 35.0,
    }
    results = {}
    for cell, ppl in scores.items():
        facts = {"arm": cell.arm, "seed": cell.seed, "settings": list(cell.settings)}
        parts = {"c4": {"ppl_token": ppl}, "wikitext2": {"ppl_token": ppl}}
        results[study.key(cell)] = facts | parts
    other = Study(options("--whole"), ROOT, {})  # another scope: not in this table
    results[other.key(Cell("KL", 1))] = results[study.key(Cell("KL", 0))]
    write_json(study_recovery.RESULTS, results)
    rows = [
        [part.strip() for part in line.split("|")[1:-1]] for line in study_recovery.quality(study)
    ]
    cells = {row[0]: row[1:4] for row in rows[2:]}
    assert cells["KL"] == ["45.00 ± 7.07", "", "45 ± 7%"]
    assert cells["KL + PrC"][1] == "-2.00 ± 1.41"
    assert cells["KL (recover.optimizer.lr=1e-4)"][1] == "-10.00"
    assert cells["KL + PrC (recover.optimizer.lr=1e-4)"][1] == "-2.00"  # to KL at that rate
    assert cells["KL + FiC (recover.optimizer.clip=2)"][1] == "-5.00"  # there is no KL with that


def test_the_probe_finds_no_pull_of_the_kl_at_the_dense_model(
    tiny, text_file, tmp_path, monkeypatch, capsys
):
    dense = tiny("llama")
    pruned = Path(shutil.copytree(dense, tmp_path / "pruned"))
    for file in pruned.glob("*.safetensors"):
        halved = {k: v * (v.abs() > v.abs().median()) for k, v in load_file(file).items()}
        save_file(halved, file, metadata={"format": "pt"})
    words = [pruned, "--dense", dense, "--corpus", text_file, "--sequences", 4, "--length", 96]
    monkeypatch.setattr("sys.argv", ["probe", *map(str, words)])
    assert probe_contrast.main() == 0
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("│"):
            title, *values = (cell.strip() for cell in line.strip("│").split("│"))
            rows[title] = values
    assert rows.keys() == {"KL", *probe_contrast.ARMS}
    assert rows["KL"][3] == "0.00"
    assert float(rows["tokens only"][2]) > 0.1

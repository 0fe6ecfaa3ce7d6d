"""The programs of eval/ that measure for hours: their plans, verdicts and tables, not the hours."""

import bench_solvers
import pytest
import shapes
import study_solvers as study
from transformers import AutoModelForCausalLM

EVERY = study.plan(study.ARMS, study.PATTERNS, study.SEEDS)


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Writes results of the study; the arms' perplexities are lists over seeds."""
    monkeypatch.setattr(study, "RESULTS", tmp_path / "study.json")

    def write(pattern: str, **ppls: list[float]) -> None:
        cells = {}
        for arm, values in ppls.items():
            for seed, ppl in enumerate(values):
                name = study.name_of((arm, pattern, seed))
                cells[name] = {"wikitext2": ppl, "c4": ppl, "seconds": 1.0, "peak_memory_bytes": 1}
        study.write_json(study.RESULTS, study.results() | cells)

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


def test_every_cell_has_a_folder_of_its_own(tmp_path):
    assert len({study.folder_of(cell, tmp_path) for cell in EVERY}) == len(EVERY)


def test_weights_go_once_they_are_scored_and_no_cell_starts_from_them(tmp_path, monkeypatch):
    base, later = ("SparseGPT", "2:4", 0), ("SDS on SparseGPT", "2:4", 0)
    for cell in (base, later):
        folder = study.model_of(cell, tmp_path)
        folder.mkdir(parents=True)
        for name in (
            study.INDEX,
            "model-00001-of-00002.safetensors",
            study.masks.FILE,
            "done.json",
        ):
            (folder / name).write_text("{}")

    def left(cell) -> set[str]:
        return {p.name for p in study.model_of(cell, tmp_path).iterdir()}

    monkeypatch.setattr(study, "missing", lambda cell: [] if cell == base else ["whole"])
    study.clear(base, [later], tmp_path)
    assert len(left(base)) == 4
    study.clear(later, [], tmp_path)
    assert len(left(base)) == 1 and len(left(later)) == 4
    monkeypatch.setattr(study, "missing", lambda cell: [])
    other_seed = ("SDS on SparseGPT", "2:4", 1)
    study.clear(later, [other_seed], tmp_path)
    assert left(base) == left(later) == {"done.json"}


def test_what_is_gone_is_made_again_and_what_is_there_is_not(tmp_path, monkeypatch):
    commands = []

    def entry(options):
        commands.append(options[options.index("--output_dir") + 1])
        return 0

    monkeypatch.setattr(study, "entry", entry)
    cell = ("C2 on Wanda", "50 %", 0)
    base = study.model_of(study.base_of(cell), tmp_path)
    base.mkdir(parents=True)
    for name in ("done.json", study.INDEX):
        (base / name).write_text("{}")
    study.run(cell, tmp_path, tmp_path, [])
    assert commands == [str(study.folder_of(cell, tmp_path))]
    (base / study.INDEX).unlink()
    study.run(cell, tmp_path, tmp_path, [])
    assert commands[1:] == [str(base.parent), commands[0]] and not (base / "done.json").exists()


def test_one_failing_cell_ends_nothing_and_a_stop_ends_all(tmp_path, known, monkeypatch, capsys):
    codes, tried = {"Wanda": 1}, []

    def entry(cell, *_):
        tried.append(cell[0])
        return codes.get(cell[0], 0)

    monkeypatch.setattr(study, "run", entry)
    monkeypatch.setattr(study, "measured", lambda cell, work, keys: dict.fromkeys(keys, 1.0))
    monkeypatch.setattr(study, "write_tables", lambda: None)
    monkeypatch.setattr(study.assets, "smollm2", lambda say: tmp_path)
    arms = ["magnitude", "Wanda", "ALPS"]
    monkeypatch.setattr("sys.argv", ["study", str(tmp_path), "--patterns", "60 %", "--arms", *arms])
    assert study.main() == 1
    assert tried == ["dense", "dense", *arms]
    assert "failed: Wanda, 60 %, seed 0: exit code 1" in capsys.readouterr().out
    codes |= {"Wanda": 143}
    assert study.main() == 143 and tried[-1] == "Wanda"
    study.RESULTS.unlink()
    codes["dense"] = 2
    assert study.main() == 2 and tried[-1] == "dense"


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
    assert "| -26.2 ± 1.7 % | 51.6 ± 2.2 % |" in row


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

"""Run directories: of other runs, in use, on full disks."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cap_llm.blockwise import estimate

# the run directory


def test_a_directory_of_other_files_is_refused(refuse, out):
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    message = refuse(started=True)
    assert f"output_dir {out}" in message and "thesis.tex" in message
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_a_file_as_the_run_directory_is_refused(refuse, out):
    out.write_text("a file")
    assert f"output_dir {out} is a file" in refuse(started=True)
    assert f"output_dir {out} is a file" in refuse("--dry-run", started=True)
    assert out.read_text() == "a file"


def test_a_dry_run_refuses_the_directory_of_another_run(accept, refuse, out):
    accept()
    message = refuse("--oneshot.sparsity", "0.6", "--dry-run", started=True)
    assert "oneshot.sparsity: 0.5, now 0.6" in message


@pytest.mark.parametrize(
    ("args", "field", "was", "now"),
    [
        (["--oneshot.sparsity", "0.6"], "oneshot.sparsity", "0.5", "0.6"),
        (["--oneshot.method", "wanda"], "oneshot.method", "'sparsegpt'", "'wanda'"),
        (["--calibration.seed", "3"], "calibration.seed", "0", "3"),
        (["--oneshot.layers", '{"*.q_proj": 0}'], "oneshot.layers.*.q_proj", "None", "0"),
    ],
)
def test_a_directory_of_another_run_is_refused(accept, refuse, out, args, field, was, now):
    accept()
    before = (out / "oneshot" / "recipe.json").read_text()
    message = refuse(*args, started=True)
    assert f"{field}: {was}, now {now}" in message
    assert "output_dir" in message
    assert (out / "oneshot" / "recipe.json").read_text() == before


def test_a_refused_run_leaves_the_settings_of_the_finished_one(accept, refuse, out):
    accept()
    before = (out / "config.yaml").read_text()
    refuse("--oneshot.sparsity", "0.6", started=True)
    assert (out / "config.yaml").read_text() == before


def test_a_directory_of_another_dense_model_is_refused(accept, refuse, tiny, scored):
    stage = ["--stages", "[evaluate]", "--evaluate.corpora", f"[{scored}]"]
    accept(*stage)
    assert "model" in refuse(*stage, "--model.path", tiny("llama", seed=1), started=True)


def test_one_model_and_text_by_other_paths_is_the_same_run(
    accept, refuse, broken, text_file, out, tmp_path, monkeypatch
):
    text = Path(shutil.copy(text_file, tmp_path / "text.txt"))
    accept("--model.path", broken, "--calibration.corpus", text)
    (tmp_path / "link").symlink_to(broken)
    monkeypatch.chdir(tmp_path)
    for model, corpus in ((f"{broken}/", "text.txt"), ("model", "./text.txt"), ("link", text)):
        given = ["--model.path", model, "--calibration.corpus", corpus]
        assert "done already" in accept(*given)
        accept(*given, "--dry-run")
    place = tmp_path / "moved"
    place.mkdir()
    for path in (broken, text, out):
        path.rename(place / path.name)
    monkeypatch.chdir(place)
    given = ["--model.path", "model", "--output_dir", "run", "--calibration.corpus", "text.txt"]
    assert "done already" in accept(*given)
    (place / "text.txt").write_text("other words " * 400)
    assert "calibration.corpus" in refuse(*given, started=True)


def test_a_model_in_the_working_directory_has_a_name(accept, llama, out, monkeypatch):
    monkeypatch.chdir(llama)
    accept("--model.path", ".")
    assert json.loads((out / "oneshot" / "sparsity.json").read_text())["model"] == llama.name


def test_a_copy_of_the_scored_text_is_not_calibrated_on(refuse, text_file, tmp_path):
    copy = shutil.copy(text_file, tmp_path / "copy.txt")
    message = refuse("--stages", "[oneshot, evaluate]", "--evaluate.corpora", f"[{copy}]")
    assert "calibration.corpus" in message and "also scored" in message


def test_a_directory_with_another_models_conversion_is_refused(
    accept, refuse, llama, scored, tmp_path
):
    for i in (1, 2):
        folder = Path(shutil.copytree(llama, tmp_path / f"bin{i}"))
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save({k: v * i for k, v in tensors.items()}, folder / "pytorch_model.bin")
    stage = ["--stages", "[evaluate]", "--evaluate.corpora", f"[{scored}]"]
    accept(*stage, "--model.path", tmp_path / "bin1")
    other = ["--model.path", tmp_path / "bin2", "--evaluate.window", "64"]
    assert "bin1" in refuse(*stage, *other, started=True)


def test_a_directory_in_use_is_refused(refuse, accept, out):
    accept()
    with open(out / "run.lock", "a+", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        message = refuse(started=True)
    assert f"output_dir {out}" in message
    assert "done already" in accept()  # the lock goes with its holder


def test_a_mask_only_grows(accept, refuse, out, tmp_path):
    accept()
    args = ["--model.path", out / "oneshot", "--oneshot.sparsity", "0.3"]
    for source in ("auto", "zeros"):
        attempt = ["--output_dir", tmp_path / source, "--oneshot.initial_mask", source]
        message = refuse(*args, *attempt, started=True)
        assert "model.layers.0.self_attn.q_proj.weight is 50.0 % zeros already" in message
        assert "30 %" in message and "--oneshot.initial_mask ignore" in message
    accept(*args, "--output_dir", tmp_path / "third", "--oneshot.initial_mask", "ignore")


def test_the_remedy_for_a_short_text_works_in_the_same_directory(refuse, accept, tmp_path):
    (tmp_path / "short.txt").write_text("a few words of text")
    corpus = ["--calibration.corpus", tmp_path / "short.txt"]
    assert "--calibration.length" in refuse(*corpus, started=True)
    accept(*corpus, "--calibration.length", "6")


def test_the_remedy_for_an_earlier_mask_works_in_the_same_directory(accept, refuse, out, tmp_path):
    accept()
    args = ["--model.path", out / "oneshot", "--oneshot.sparsity", "0.3"]
    args += ["--output_dir", tmp_path / "second"]
    assert "set --oneshot.initial_mask ignore" in refuse(*args, started=True)
    accept(*args, "--oneshot.initial_mask", "ignore")


def test_too_little_disk_is_refused_before_the_work(refuse, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda place: usage)
    message = refuse()
    assert "needs" in message and "are free" in message and "output_dir" in message

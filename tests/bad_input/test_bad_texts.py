"""Corpora to calibrate on and to score."""

from __future__ import annotations

import gzip
import json
import os

import pytest
from damage import finished_blocks

# corpora

BAD_CORPORA = {
    "empty": ("a.txt", b"", ["a.txt", "no text"]),
    "blank": ("a.txt", b" \n\n \n", ["a.txt", "no text"]),
    "no lines": ("a.jsonl", b"", ["a.jsonl", "no text"]),
    "short": ("a.txt", b"a few words", ["a.txt", "longer than 32 tokens", "--calibration.length"]),
    "no text": ("a.txt", b"\xff\xfe\x00", ["a.txt", "cannot be read as .txt"]),
    "no gzip": ("a.txt.gz", b"plain", ["a.txt.gz", "cannot be read"]),
    "no json": (
        "a.jsonl",
        b'{"text": "a"}\n{"text":\n',
        ["a.jsonl, line 2", "JSON object"],
    ),
    "no field": ("a.jsonl", b'{"txt": "a"}\n', ["a.jsonl", "text"]),
    "bytes": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', ["a.jsonl", "line 2", "0xe9"]),
    "deep": ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, ["a.jsonl, line 2"]),
    "not a number": ("a.jsonl", b'{"text": NaN}\n', ["a.jsonl, line 1"]),
    "large number": ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", ["a.jsonl, line 1"]),
    "cut gzip": ("a.txt.gz", gzip.compress(b"text " * 99)[:-9], ["a.txt.gz", "cannot be read"]),
    "no parquet": ("a.parquet", b"PAR1", ["a.parquet", "cannot be read as .parquet"]),
}


@pytest.mark.parametrize(("name", "body", "expected"), BAD_CORPORA.values(), ids=BAD_CORPORA.keys())
def test_a_bad_calibration_corpus_is_refused(refuse, out, tmp_path, name, body, expected):
    (tmp_path / name).write_bytes(body)
    message = refuse("--calibration.corpus", tmp_path / name, started=True)
    for part in expected:
        assert part in message
    assert not finished_blocks(out)


@pytest.mark.parametrize("line", ['["text"]', '"text"', '{"text": 3}', '{"text": null}'])
def test_a_line_of_another_shape_is_refused(refuse, tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    assert "a.jsonl" in refuse("--calibration.corpus", tmp_path / "a.jsonl", started=True)


def test_a_malformed_line_is_named_by_its_number(refuse, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text":\n')
    assert "line 3" in refuse("--calibration.corpus", tmp_path / "a.jsonl", started=True)


def test_a_parquet_file_without_the_column_is_refused_in_one_line(refuse, tmp_path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"txt": ["a"]}), tmp_path / "a.parquet")
    assert "text" in refuse("--calibration.corpus", tmp_path / "a.parquet", started=True)


@pytest.mark.parametrize("corpus", ["/nowhere/text.txt", "c5"])
def test_a_missing_corpus_is_refused(refuse, corpus):
    assert f"corpus '{corpus}' is neither a file nor one of c4" in refuse(
        "--calibration.corpus", corpus
    )
    message = refuse("--stages", "[oneshot, evaluate]", "--evaluate.corpora", f"[{corpus}]")
    assert f"corpus '{corpus}' is neither a file nor one of c4" in message


def test_a_corpus_that_only_the_hub_has_is_refused_when_it_is_off(refuse, monkeypatch):
    monkeypatch.delenv("CAP_LLM_DATA", raising=False)
    message = refuse("--calibration.corpus", "c4")
    assert "corpus 'c4' (train)" in message
    assert "CAP_LLM_DATA" in message and "HF_HUB_OFFLINE" in message


def test_the_remedy_for_a_scored_corpus_names_the_right_option(refuse, monkeypatch):
    monkeypatch.delenv("CAP_LLM_DATA", raising=False)
    message = refuse("--stages", "[evaluate]", "--evaluate.corpora", "[ptb]")
    assert "corpus 'ptb' (test)" in message
    assert "--evaluate.corpora" in message


def test_calibrating_on_the_scored_corpus_is_refused_unless_allowed(refuse, accept, text_file):
    stages = ["--stages", "[oneshot, evaluate]", "--evaluate.corpora", f"[{text_file}]"]
    message = refuse(*stages)
    assert str(text_file) in message and "calibration.allow_scored_corpus" in message
    accept(*stages, "--calibration.allow_scored_corpus", "true", "--dry-run")


def test_a_text_shorter_than_a_window_is_refused(refuse, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    corpora = ["--evaluate.corpora", f"[{tmp_path / 'short.txt'}]"]
    message = refuse("--stages", "[evaluate]", *corpora, started=True)
    assert "short.txt has" in message
    assert "fewer than one window of 32" in message and "--evaluate.window" in message


@pytest.mark.parametrize("text", ["a few words", "", "\ufeff"])
def test_a_text_that_cannot_be_scored_is_refused_before_the_pruning(refuse, out, tmp_path, text):
    (tmp_path / "short.txt").write_text(text)
    stages = ["--stages", "[oneshot, evaluate]"]
    refuse(*stages, "--evaluate.corpora", f"[{tmp_path / 'short.txt'}]", started=True)
    assert not (out / "oneshot").exists()


def test_two_texts_of_one_name_are_refused(refuse, scored, tmp_path):
    (tmp_path / "scored.txt").write_text(scored.read_text()[::-1])
    corpora = f"[{scored}, {tmp_path / 'scored.txt'}]"
    message = refuse("--stages", "[evaluate]", "--evaluate.corpora", corpora)
    assert "two files called scored.txt" in message


def test_a_changed_text_of_the_same_name_is_scored_anew(accept, out, scored, tmp_path):
    figures, path = [], tmp_path / "mine.txt"
    for text in (scored.read_text(), scored.read_text()[::-1]):
        path.write_text(text)
        accept("--stages", "[evaluate]", "--evaluate.corpora", f"[{path}]")
        (score,) = json.loads((out / "dense" / "scores.json").read_text())["scores"]
        figures.append(score["value"])
    assert figures[0] != figures[1]


@pytest.mark.parametrize(
    ("name", "trouble"),
    [("corpus.csv", "corpus.csv has an unknown file type"), ("corpus.json", "corpus.json, line 1")],
)
def test_a_file_that_is_no_text_is_not_read_as_one(refuse, tmp_path, name, trouble):
    path = tmp_path / name
    path.write_text('["a list", "of texts"]\n' * 2000)
    assert trouble in refuse("--calibration.corpus", path)


@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_a_number_that_is_none_is_refused(refuse, value):
    assert "runtime.activation_gib is" in refuse("--runtime.activation_gib", value)


@pytest.mark.parametrize(
    ("share", "which"), [("1e-9", "no weight"), ("0.999999999", "every weight")]
)
def test_a_sparsity_of_nothing_or_all_is_refused(refuse, share, which):
    assert f"removes {which} of" in refuse("--oneshot.sparsity", share)


@pytest.mark.parametrize("kind", ["folder", "pipe", "long", "null", "device"])
def test_a_corpus_that_is_not_a_regular_file_is_refused_at_once(refuse, tmp_path, kind):
    """By the name; to open a pipe would wait for its writer."""
    path = tmp_path / "text.txt"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    names = {"long": "x" * 300 + ".txt", "null": "a\0.txt", "device": "/dev/null"}
    name = names.get(kind, str(path))
    assert repr(name) in refuse("--calibration.corpus", name)


UNSPEAKABLE = "\ud83d"  # half of an emoji, as texts cut at a length have


def test_what_is_not_unicode_text_is_replaced_and_counted_once(accept, text_file, tmp_path):
    words = text_file.read_text(encoding="utf-8")
    rows = [f"{words[:5000]} {UNSPEAKABLE}", words[5000:9000], UNSPEAKABLE * 2 + words[9000:20000]]
    path = tmp_path / "tweets.JSONL"
    path.write_text("\ufeff" + "".join(json.dumps({"text": t}) + "\n" for t in rows), "utf-8")
    stages = ["--stages", "[oneshot, recover, evaluate]", "--dry-run", "--recover.length", "32"]
    said = accept(*stages, "--evaluate.corpora", f"[{path}]")
    (line,) = [line for line in said.splitlines() if "surrogates" in line]
    assert str(path) in line and "3 lone" in line and "line 1" in line


def test_a_text_that_the_tokenizer_refuses_is_named(refuse, broken, tmp_path):
    """By file and row, from whichever stage reads it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="none"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(broken)
    path = tmp_path / "rows.jsonl"
    texts = ["w3 " * 400, "unknown " * 400]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    good = tmp_path / "good.txt"
    good.write_text("w3 " * 4000, encoding="utf-8")
    model = ["--model.path", broken, "--calibration.corpus", good, "--recover.length", "32"]
    for options in (
        ["--calibration.corpus", path],
        ["--stages", "[recover]", "--recover.corpus", path],
        ["--stages", "[evaluate]", "--evaluate.corpora", f"[{path}]"],
    ):
        message = refuse(*model, *options, "--dry-run")
        assert "rows.jsonl" in message and "tokenizer" in message
        assert "[evaluate]" in options or "document 2" in message

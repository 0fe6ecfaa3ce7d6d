"""Text: tokenizers give the ids the models were trained on, corpora the rows the papers score, and
windows the draws of SparseGPT. The references are written here, from the published code."""

from __future__ import annotations

import ast
import copy
import gzip
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import ROOT

from cap_llm.cli.command_line import read_config
from cap_llm.models.directory import ModelDirectory
from cap_llm.pipeline import read_texts
from cap_llm.preflight import check_corpora
from cap_llm.runtime.errors import UserError
from cap_llm.text import tokenizers as in_pieces
from cap_llm.text.corpora import (
    C4_HELD_OUT,
    Corpus,
    calibration_corpus,
    evaluation_text,
    read_corpus,
)
from cap_llm.text.tokenizers import (
    bos_rule,
    load_tokenizer,
    token_pieces,
    tokenize_rows,
)
from cap_llm.text.windows import calibration_windows, evaluation_windows


@pytest.fixture(scope="module")
def opt(data):
    """OPT's tokenizer, from `vocab.json` and `merges.txt` alone."""
    return load_tokenizer(str(data / "tokenizers" / "opt"), 50272)


@pytest.fixture(scope="module")
def llama(data):
    """LLaMA's tokenizer, from `tokenizer.model` alone."""
    return load_tokenizer(str(data / "tokenizers" / "llama"), 32000)


@pytest.fixture(scope="module")
def pieces(data):
    """sentencepiece itself."""
    sentencepiece = pytest.importorskip("sentencepiece")
    file = data / "tokenizers" / "llama" / "tokenizer.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


@pytest.fixture(autouse=True)
def local_corpora(request, monkeypatch):
    """Names of corpora mean the folder of data, in tests that use it."""
    if "data" in request.fixturenames:
        monkeypatch.setenv("CAP_LLM_DATA", str(request.getfixturevalue("data")))


class Letters:
    """A tokenizer whose ids are the characters' code points, behind a BOS of id 0."""

    def __call__(self, text: str, return_tensors: str | None = None):
        ids = [0, *map(ord, text)]
        return _Encoding(torch.tensor([ids]) if return_tensors else ids)


class _Encoding:
    def __init__(self, input_ids):
        self.input_ids = input_ids


def get_c4(documents: list[str], tokenizer, n: int, length: int, seed: int) -> torch.Tensor:
    """The calibration draw of sparsegpt's `datautils.get_c4`, on Python's global generator."""
    state = random.getstate()
    random.seed(seed)
    loader = []
    for _ in range(n):
        while True:
            i = random.randint(0, len(documents) - 1)
            encoded = tokenizer(documents[i], return_tensors="pt").input_ids
            if encoded.shape[1] > length:
                break
        i = random.randint(0, encoded.shape[1] - length - 1)
        loader.append(encoded[:, i : i + length])
    random.setstate(state)
    return torch.cat(loader)


# tokenizers


def test_opt_starts_a_text_with_the_end_token_and_only_once(opt):
    assert opt("hello").input_ids[0] == 2
    assert opt("hello").input_ids.count(2) == 1
    assert bos_rule(opt) == "</s>"
    assert opt.decode(opt("hello  world\n").input_ids[1:]) == "hello  world\n"


def test_opt_gives_the_papers_number_of_tokens_on_wikitext2(data, opt):
    text, _ = evaluation_text("wikitext2")
    assert len(opt(text).input_ids) == 287_645


def test_llama_gives_the_papers_number_of_tokens_on_wikitext2(data, llama):
    text, _ = evaluation_text("wikitext2")
    assert len(llama(text).input_ids) == 341_469
    assert bos_rule(llama) == "<s>"


@pytest.mark.parametrize(
    "text",
    [
        "Hello world",
        "doubled  spaces   and    more ",
        "line\nline\n\n = Title = \n\n\ttab",
        "naïve café — Ærøskøbing “quotes” 東京 Привет",
        "emoji 😀👩‍👩‍👧 flags 🇩🇪, bytes ⁂\u200b",
        "1234567890 3.14159 @-@ </a>",
        "",
        "\n",
        "a",
    ],
)
def test_llama_from_the_piece_file_equals_sentencepiece(llama, pieces, text):
    assert llama(text).input_ids == [pieces.bos_id(), *pieces.encode(text)]


def test_llama_equals_sentencepiece_on_the_real_corpora(data, llama, pieces):
    text = evaluation_text("wikitext2")[0][:200_000]
    assert llama(text).input_ids == [pieces.bos_id(), *pieces.encode(text)]
    for document in read_corpus("c4", "train").documents[:50]:
        assert llama(document).input_ids == [pieces.bos_id(), *pieces.encode(document)]


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="aeThe  \n\t.,=@-09<>é東😀", max_size=30))
def test_llama_equals_sentencepiece_on_any_text(llama, pieces, text):
    assume(not text.startswith(" "))
    assert llama(text).input_ids == [pieces.bos_id(), *pieces.encode(text)]


@pytest.mark.parametrize("text", [" ", " leading space", "  two", " \n = Title ="])
def test_llama_equals_sentencepiece_on_a_text_that_starts_with_a_space(llama, pieces, text):
    assert llama(text).input_ids == [pieces.bos_id(), *pieces.encode(text)]


def test_the_piece_file_itself_can_be_given(data, llama):
    other = load_tokenizer(str(data / "tokenizers" / "llama" / "tokenizer.model"))
    assert other("Hello  world\n").input_ids == llama("Hello  world\n").input_ids


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "neox", "gpt2", "bloom"])
def test_a_full_tokenizer_directory_is_read_as_it_was_saved(tiny, family):
    tokenizer = load_tokenizer(str(tiny(family)), 512)
    ids = tokenizer("some  words\nand é").input_ids
    assert ids[0] == 0
    assert tokenizer.decode(ids[1:]) == "some  words\nand é"


def test_a_byte_level_tokenizer_without_an_end_token_is_gpt2s(tmp_path):
    from tokenizers.pre_tokenizers import ByteLevel

    entries = [*sorted(ByteLevel.alphabet()), "he", "<|endoftext|>"]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n")
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer("he").input_ids == [vocabulary["he"]]
    assert bos_rule(tokenizer) == "none"


@pytest.mark.parametrize(("vocabulary", "fits"), [(512, True), (600, True), (511, False)])
def test_a_tokenizer_must_not_have_more_entries_than_the_model(tiny, vocabulary, fits):
    folder = str(tiny("llama"))
    if fits:
        assert len(load_tokenizer(folder, vocabulary)) == 512
    else:
        with pytest.raises(UserError, match=r"512 .*511.*--model.tokenizer"):
            load_tokenizer(folder, vocabulary)


def test_added_tokens_that_no_text_gives_may_exceed_the_model(tiny, tokenizer, tmp_path, text_file):
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<image>"], special_tokens=True)  # as Gemma 3's 262,144th
    more.save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path), 512)) == 513
    model, named = tiny("llama"), tmp_path / "named.txt"
    named.write_text("<image>" + text_file.read_text())
    for file, refused in ((text_file, False), (named, True)):
        args = ["--model.path", model, "--model.tokenizer", tmp_path, "--stages", "[evaluate]"]
        args += ["--output_dir", tmp_path / "run", "--evaluate.corpora", f"[{file}]"]
        config, _, _ = read_config([str(a) for a in [*args, "--evaluate.window", 32]])
        if refused:
            with pytest.raises(UserError, match="'<image>'"):
                read_texts(config, ModelDirectory(model))
        else:
            read_texts(config, ModelDirectory(model))


def test_a_tokenizer_far_smaller_than_the_model_is_a_mix_up(tiny):
    with pytest.raises(UserError, match=r"512 .*32000.*--model.tokenizer"):
        load_tokenizer(str(tiny("llama")), 32000)


# calibration windows


@pytest.mark.parametrize(("seed", "n", "length"), [(0, 16, 256), (1, 8, 512), (7, 4, 64)])
def test_calibration_draws_are_sparsegpts(data, opt, seed, n, length):
    corpus = Corpus(read_corpus("c4", "train").documents[:300], "C4 sample")
    ours = calibration_windows(opt, corpus, n, length, seed)
    assert torch.equal(ours, get_c4(corpus.documents, opt, n, length, seed))


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.text(alphabet="abc", max_size=30), min_size=1, max_size=6),
    n=st.integers(1, 8),
    length=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_calibration_draws_are_sparsegpts_on_any_documents(documents, n, length, seed):
    corpus = Corpus([*documents, "a" * length + "b"], "letters")  # one is always long enough
    ours = calibration_windows(Letters(), corpus, n, length, seed)
    assert ours.shape == (n, length)
    assert torch.equal(ours, get_c4(corpus.documents, Letters(), n, length, seed))


def test_calibration_draws_leave_pythons_generator_alone():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    calibration_windows(Letters(), Corpus(["abcdefgh"], "letters"), 4, 3, seed=0)
    assert random.random() == expected


def test_a_document_of_exactly_the_length_is_too_short():
    # five letters and the BOS are six tokens; SparseGPT wants more than the length
    with pytest.raises(UserError, match=r"no document of letters.*longer than 6 tokens"):
        calibration_windows(Letters(), Corpus(["abcde"], "letters"), 2, 6, seed=0)
    assert calibration_windows(Letters(), Corpus(["abcde"], "letters"), 2, 5, seed=0).shape == (
        2,
        5,
    )


def test_wikitext2_can_calibrate_at_the_papers_length(data, llama):
    # SparseGPT's get_wikitext2 crops " ".join(rows); no single row has more than 910 tokens
    corpus = calibration_corpus("wikitext2")
    assert len(corpus.documents) == 1
    assert calibration_windows(llama, corpus, 2, 2048, seed=0).shape == (2, 2048)


class Counting(Letters):
    """Counts the documents that it is given."""

    n = 0

    def __call__(self, text: str, return_tensors: str | None = None):
        self.n += 1
        return super().__call__(text, return_tensors)


def table(n: int, long: dict[int, int]) -> Corpus:
    """`n` documents of one letter, but for `long`, which gives their lengths by their rows."""
    return Corpus(["abcdefg" * (long[i] // 7 + 1) if i in long else "a" for i in range(n)], "table")


@pytest.mark.parametrize("held_out", [0, 4])
def test_each_of_many_short_documents_is_tokenized_once(held_out):
    corpus, tokenizer = table(20_000, {i: 40 for i in range(50, 20_000, 1000)}), Counting()
    n = 4
    windows = calibration_windows(tokenizer, corpus, n, 20, 3, held_out)
    assert tokenizer.n <= len(corpus.documents)
    assert torch.equal(windows[:n], get_c4(corpus.documents, Letters(), n, 20, 3))


@pytest.mark.parametrize("long", [{}, {70: 40}, {70: 40, 900: 50}])
def test_many_short_documents_that_cannot_serve_are_refused_once_all_are_known(long):
    tokenizer = Counting()
    with pytest.raises(UserError, match="table"):
        calibration_windows(tokenizer, table(2000, long), 16, 20, 0, held_out=2)
    assert tokenizer.n == 2000


# long texts


ODD = (
    "don't  1234567890 </s><s> é😀\u0301 今天天气。很好，\n\n\t= x = \r\n"
    + "y" * 900
    + " \u2028 a.\n"
)


@pytest.fixture(params=["opt", "llama", "smollm2", "bert"])
def any_tokenizer(request, data):
    if request.param == "bert":
        from transformers import BertTokenizer

        return BertTokenizer.from_pretrained(data / "tokenizers" / "bert-base-uncased")
    fixture = request.getfixturevalue(request.param)
    return load_tokenizer(str(fixture)) if request.param == "smollm2" else fixture


def test_pieces_of_a_long_text_are_the_whole(any_tokenizer, monkeypatch):
    text = evaluation_text("wikitext2")[0][:150_000]
    text += "".join(random.Random(0).choices(ODD.split(" ") + [" ", "\n"], k=4000))
    monkeypatch.setattr(in_pieces, "WHOLE", 5000)
    monkeypatch.setattr(in_pieces, "PIECE", 9000)
    pieces = [*token_pieces(any_tokenizer, text, "a text")]
    assert len(pieces) > 0.9 * len(text) / 9000
    assert np.concatenate(pieces).tolist() == any_tokenizer(text).input_ids
    few = [text, "short", text[:6000]]
    assert [ids.tolist() for ids in tokenize_rows(any_tokenizer, few, [2, 0, 1], "a text")] == [
        any_tokenizer(few[i]).input_ids for i in (2, 0, 1)
    ]


def test_the_evaluation_texts_of_the_papers_are_tokenized_whole(data):
    assert len(evaluation_text("wikitext2")[0]) <= in_pieces.WHOLE


def test_a_text_without_a_place_to_cut_is_tokenized_whole(opt, monkeypatch):
    monkeypatch.setattr(in_pieces, "WHOLE", 5000)
    monkeypatch.setattr(in_pieces, "PIECE", 6000)
    pieces = [*token_pieces(opt, "y" * 20_000, "a text")]
    assert len(pieces) == 1 and pieces[0].tolist() == opt("y" * 20_000).input_ids


def test_only_what_the_first_windows_need_is_tokenized(opt, monkeypatch):
    monkeypatch.setattr(in_pieces, "WHOLE", 5000)
    monkeypatch.setattr(in_pieces, "PIECE", 5000)
    text = "some words and more of them " * 10_000
    taken, encode = [], type(opt).__call__

    def spy(self, texts, **options):
        taken.append(len(texts) if isinstance(texts, str) else sum(map(len, texts)))
        return encode(self, texts, **options)

    monkeypatch.setattr(type(opt), "__call__", spy)
    windows = evaluation_windows(opt, text, "a text", 64, 10)
    assert max(taken) < len(text) / 5
    monkeypatch.setattr(in_pieces, "WHOLE", 10**9)
    assert torch.equal(windows, evaluation_windows(opt, text, "a text", 64, 10))


# evaluation windows


@settings(max_examples=60, deadline=None)
@given(
    n_letters=st.integers(1, 60),
    window=st.integers(2, 20),
    most=st.one_of(st.none(), st.integers(1, 5)),
)
def test_evaluation_windows_do_not_overlap_and_drop_the_tail(n_letters, window, most):
    text = "".join(map(chr, range(100, 100 + n_letters)))
    ids = [0, *map(ord, text)]
    n = len(ids) // window
    if n == 0:
        with pytest.raises(UserError, match=f"has {len(ids)} tokens, fewer than one window"):
            evaluation_windows(Letters(), text, "letters", window, most)
        return
    n = min(n, most or n)
    windows = evaluation_windows(Letters(), text, "letters", window, most)
    assert windows.shape == (n, window)
    assert windows.reshape(-1).tolist() == ids[: n * window]


def test_wikitext2_gives_the_papers_number_of_windows(data, opt):
    text, origin = evaluation_text("wikitext2")
    windows = evaluation_windows(opt, text, origin, 2048, None)
    assert windows.shape == (287_645 // 2048, 2048)
    assert (windows[:, 0] == 2).sum() == 1  # one BOS for the whole text, not one a window


# corpora


def test_wikitext2_rows_follow_the_hubs_copy(data):
    lines = (data / "wikitext2" / "wiki.test.raw").read_text().split("\n")
    rows = read_corpus("wikitext2", "test").documents
    assert len(rows) == 4358
    assert rows[:2] == ["", " = Robert Boulter = \n"]
    assert all(row == "" or (row.endswith("\n") and row.strip()) for row in rows)
    assert [r.strip() for r in rows] == [line.strip() for line in lines[:4358]]
    text, _ = evaluation_text("wikitext2")
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English")


def test_the_splits_of_the_c4_sample_do_not_overlap(data):
    train, held_out = (read_corpus("c4", split) for split in ("train", "validation"))
    assert len(train.documents) == 2000 - C4_HELD_OUT
    assert len(held_out.documents) == C4_HELD_OUT
    assert not set(train.documents) & set(held_out.documents)
    assert train.origin != held_out.origin
    assert evaluation_text("c4")[0] == " ".join(held_out.documents)


def test_the_splits_of_wikitext2_are_three_texts(data):
    splits = {split: read_corpus("wikitext2", split) for split in ("train", "validation", "test")}
    assert len(splits["validation"].documents) == 3760
    articles = {
        split: {d for d in corpus.documents if d.startswith(" = ") and not d.startswith(" = = ")}
        for split, corpus in splits.items()
    }
    assert not articles["test"] & articles["validation"]
    assert not articles["test"] & articles["train"]


DOCUMENTS = ["First  document\nof two lines.\n", "Second — with “quotes”, 東京 and 😀."]


def _write(folder, kind: str):
    path = folder / f"text{kind}"
    opened = gzip.open if kind.endswith(".gz") else open
    if kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"text": DOCUMENTS, "id": [1, 2]})
        pyarrow.parquet.write_table(table, path)
    elif ".jsonl" in kind:
        with opened(path, "wt", encoding="utf-8") as file:
            file.write(json.dumps({"text": DOCUMENTS[0], "url": "x"}) + "\n\n")
            file.write(json.dumps({"text": DOCUMENTS[1]}, ensure_ascii=False))  # no last newline
    else:
        with opened(path, "wt", encoding="utf-8") as file:
            file.write("\n\n".join(DOCUMENTS))
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_file_of_documents_gives_its_documents(tmp_path, kind):
    corpus = read_corpus(str(_write(tmp_path, kind)), "train")
    assert corpus.documents == DOCUMENTS
    assert corpus.origin == f"text{kind}"


@pytest.mark.parametrize("kind", [".txt", ".txt.gz"])
def test_a_text_file_is_one_document(tmp_path, kind):
    assert read_corpus(str(_write(tmp_path, kind)), "train").documents == ["\n\n".join(DOCUMENTS)]


@pytest.mark.parametrize("kind", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet"])
def test_every_kind_of_file_is_scored_as_the_same_text(tmp_path, kind):
    assert evaluation_text(str(_write(tmp_path, kind)))[0] == "\n\n".join(DOCUMENTS)


@pytest.mark.parametrize("kind", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet"])
def test_the_case_of_an_ending_does_not_matter(tmp_path, kind):
    path = _write(tmp_path, kind)
    assert evaluation_text(str(path.rename(tmp_path / f"TEXT{kind.upper()}")))[0] == "\n\n".join(
        DOCUMENTS
    )


@pytest.mark.parametrize("kind", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz"])
def test_a_byte_order_mark_is_not_text(tmp_path, kind):
    path = _write(tmp_path, kind)
    content = path.read_bytes()
    marked = b"\xef\xbb\xbf" + (gzip.decompress(content) if kind.endswith(".gz") else content)
    marked *= 2 if "jsonl" in kind else 1  # files that were put together have one inside
    marked = marked.replace(b"}\xef", b"}\n\xef")
    path.write_bytes(gzip.compress(marked) if kind.endswith(".gz") else marked)
    documents = read_corpus(str(path), "train").documents
    assert documents == (DOCUMENTS * 2 if "jsonl" in kind else ["\n\n".join(DOCUMENTS)])


def test_a_row_may_hold_any_json_besides_its_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"id": {"9" * 5000}, "x": [NaN, -Infinity, 1e999], "text": "a\\ud83d"}}\n')
    assert read_corpus(str(path), "train").documents == ["a\ufffd"]
    path.write_text('{"text": "\\ud83d\\ude00 \\\\ud83d"}\n')  # a whole pair, and no escape
    assert read_corpus(str(path), "train").documents == ["😀 \\ud83d"]


@pytest.mark.parametrize("folder", ["cap_llm", "eval"])
def test_files_are_opened_in_utf8_and_not_in_the_locales_encoding(folder):
    missing = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            named = getattr(node.func, "attr", None)
            opens = getattr(node.func, "id", None) == "open"
            position = {"read_text": 0, "write_text": 1}.get(named, 3 if opens else None)
            mode = ast.unparse(node.args[1]) if len(node.args) > 1 else "r"
            if position is None or opens and "b" in mode or len(node.args) > position:
                continue
            if not any(keyword.arg == "encoding" for keyword in node.keywords):
                missing.append(f"{path.name}:{node.lineno}")
    assert not missing


def test_text_and_json_are_read_as_utf8_in_any_locale(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    assert "東京" in read_corpus(str(_write(tmp_path, ".txt")), "train").documents[0]


def test_a_ptb_row_is_a_line_and_rows_are_joined_by_a_space(tmp_path, monkeypatch):
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "ptb.test.txt").write_text(" no it was n't \n but <unk> was \n")
    monkeypatch.setenv("CAP_LLM_DATA", str(tmp_path))
    assert read_corpus("ptb", "test").documents == ["no it was n't", "but <unk> was"]
    assert evaluation_text("ptb")[0] == "no it was n't but <unk> was"


def test_a_local_folder_without_the_corpus_is_named_when_the_hub_is_off(tmp_path, monkeypatch):
    monkeypatch.setenv("CAP_LLM_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"'c4' \(train\).*c4.sample-2000.*HF_HUB_OFFLINE"):
        read_corpus("c4", "train")


@pytest.mark.parametrize("option", ["calibration.corpus", "recover.corpus"])
def test_the_file_of_a_scored_text_is_no_text_to_learn_from(tiny, tmp_path, monkeypatch, option):
    file = tmp_path / "wikitext2" / "wiki.test.raw"
    file.parent.mkdir()
    file.write_text("a few words\n" * 2000)
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "c4.sample-2000.jsonl.gz").write_bytes(b"")
    monkeypatch.setenv("CAP_LLM_DATA", str(tmp_path))
    model = tiny("llama")
    stages = "[oneshot, recover, evaluate]"
    args = ["--model.path", model, "--output_dir", tmp_path / "run", "--stages", stages]
    other = ({"calibration.corpus", "recover.corpus"} - {option}).pop()
    args += ["--evaluate.corpora", "[wikitext2]", f"--{option}", file, f"--{other}", "c4"]
    config, _, _ = read_config([str(a) for a in args])
    config.check()
    with pytest.raises(UserError, match=f"{option} .* also scored .*wikitext2"):
        check_corpora(config)


@pytest.mark.parametrize(
    "name, file",
    [("c4", "c4/c4.sample-2000.jsonl.gz"), ("wikitext2", "wikitext2/wiki.train.tokens.gz")],
)
def test_the_text_to_learn_from_is_not_scored_as_a_file(tiny, tmp_path, monkeypatch, name, file):
    path = tmp_path / file
    path.parent.mkdir()
    path.write_bytes(b"")
    monkeypatch.setenv("CAP_LLM_DATA", str(tmp_path))
    model = tiny("llama")
    args = ["--model.path", model, "--output_dir", tmp_path / "run", "--calibration.corpus", name]
    config, _, _ = read_config([str(a) for a in [*args, "--evaluate.corpora", f"[{path}]"]])
    config.check()
    with pytest.raises(UserError, match=f"calibration.corpus .*{name}.* also scored .*{path.name}"):
        check_corpora(config)

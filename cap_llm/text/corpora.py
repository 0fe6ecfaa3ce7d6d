"""Corpora by name or file.

A name is first searched in the folder `CAP_LLM_DATA`, then on the Hugging Face hub, so a recipe
also runs on clusters without internet access. Files are UTF-8: `.txt`, `.raw` or `.tokens` (one
document), `.jsonl` or `.json` (one document per line, field `text`), or `.parquet` (column `text`).
All but `.parquet` may be gzipped (`.gz`).
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cap_llm.runtime.console import SILENT, Console
from cap_llm.runtime.environment import offline
from cap_llm.runtime.errors import UserError, one_line
from cap_llm.runtime.files import atomic

NAMES = ("c4", "wikitext2", "ptb")
Split = Literal["train", "validation", "test"]

# The local C4 sample serves calibration and scoring: its last documents are held out.
C4_SAMPLE = "c4/c4.sample-2000.jsonl.gz"
C4_HELD_OUT = 400


@dataclass(frozen=True)
class _Source:
    """Where one split of a corpus comes from."""

    files: tuple[str, ...]  # below CAP_LLM_DATA, by preference; `fetch_corpus` writes the first
    repository: str
    configuration: str | None = None
    data_file: str | None = None  # of the repository
    column: str = "text"


_C4_SHARDS = {
    "train": "c4-train.00000-of-01024.json.gz",
    "validation": "c4-validation.00000-of-00008.json.gz",
}
_WIKITEXT_FILES = {
    "train": "wiki.train.tokens.gz",
    "validation": "wiki.valid.raw",
    "test": "wiki.test.raw",
}
_PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank"
_SOURCES = {
    ("c4", split): _Source((f"c4/{shard}", C4_SAMPLE), "allenai/c4", None, f"en/{shard}")
    for split, shard in _C4_SHARDS.items()
}
_SOURCES |= {
    ("wikitext2", split): _Source((f"wikitext2/{f}",), "Salesforce/wikitext", "wikitext-2-raw-v1")
    for split, f in _WIKITEXT_FILES.items()
}
_SOURCES |= {
    ("ptb", split): _Source(
        (f"ptb/ptb.{split}.txt",), "parquet", None, f"{_PTB}/{split}/0000.parquet", "sentence"
    )
    for split in ("train", "test")
}
_PLAIN, _LINES = (".txt", ".raw", ".tokens"), (".jsonl", ".json")
_SURROGATE = re.compile("[\ud800-\udfff]")  # a str may hold one, Unicode text may not
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass
class Corpus:
    """Documents (C4), rows (WikiText-2, PTB) or the contents of a file, and their origin."""

    documents: list[str]
    origin: str


def corpus_file(name: str, split: Split) -> Path | None:
    """The local file of a corpus, or None if it must come from the hub.

    Raises:
        UserError: `name` is neither a file nor a known corpus, or the hub is needed but disabled.
    """
    if name not in NAMES:
        try:
            reason = None if stat.S_ISREG(os.stat(name).st_mode) else "It is not a regular file"
        except (OSError, ValueError) as error:  # a null byte is a ValueError
            reason = getattr(error, "strerror", None) or str(error)
        if reason:
            raise UserError(
                f"corpus {name!r} is neither a file nor one of {', '.join(NAMES)}. {reason}."
            )
        return Path(name)
    option = "calibration.corpus FILE" if split == "train" else "evaluate.corpora [FILE]"
    root, files = os.environ.get("CAP_LLM_DATA"), _SOURCES[name, split].files
    for relative in files:
        if root and os.path.isfile(Path(root) / relative):
            return Path(root) / relative
    if offline():
        raise UserError(
            f"corpus {name!r} ({split}): {root or 'CAP_LLM_DATA (unset)'}/{files[-1]} does not "
            "exist, and HF_HUB_OFFLINE is set. Fetch it with `cap-llm prefetch` on a machine with "
            f"internet access, or pass --{option}."
        )
    return None


def scored_split(name: str) -> Split:
    """The split of a corpus on which models are scored."""
    return "validation" if name == "c4" else "test"


def read_corpus(name: str, split: Split, console: Console = SILENT) -> Corpus:
    """All documents of one split of a corpus.

    Args:
        name: c4, wikitext2, ptb, or a file (for which `split` is ignored).
        split: `train` of C4 is its first training shard, as in the papers.
        console: prints a warning if lone surrogates are replaced.

    Raises:
        UserError: the corpus is missing, unreadable or empty.
    """
    path = corpus_file(name, split)
    documents, origin = _from_hub(name, split) if path is None else _from_file(path, name, console)
    if path is not None and name == "c4" and path.name == Path(C4_SAMPLE).name:
        held_out = split == "validation"
        documents = documents[-C4_HELD_OUT:] if held_out else documents[:-C4_HELD_OUT]
        origin += f", {'last' if held_out else 'all but the last'} {C4_HELD_OUT} documents"
    if not any(d.strip() for d in documents):
        raise UserError(f"corpus {name!r} ({origin}) contains no text")
    return Corpus(documents, origin)


def calibration_corpus(name: str, console: Console = SILENT) -> Corpus:
    """The documents to draw calibration text from.

    The rows of WikiText-2 and PTB are joined by spaces into one document (sparsegpt, `datautils`).
    """
    corpus = read_corpus(name, "train", console)
    if name in ("wikitext2", "ptb"):
        return Corpus([" ".join(corpus.documents)], corpus.origin)
    return corpus


def evaluation_text(name: str, console: Console = SILENT) -> tuple[str, str]:
    """The text on which a corpus is scored, and its origin.

    SparseGPT's protocol: WikiText-2's test rows are joined by two newlines, PTB's by a space, and
    C4's first 1100 validation documents by a space. Documents of a file are joined by two newlines.
    """
    corpus = read_corpus(name, scored_split(name), console)
    if name == "c4":
        return " ".join(corpus.documents[:1100]), corpus.origin
    return (" " if name == "ptb" else "\n\n").join(corpus.documents), corpus.origin


def fetch_corpus(name: str, split: Split, root: Path) -> Path:
    """Downloads one split of a corpus from the hub to `root`, laid out as in CAP_LLM_DATA.

    Raises:
        UserError: the download fails.
    """
    source = _SOURCES[name, split]
    target = root / source.files[0]
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    if name == "c4":
        import huggingface_hub

        repository, file = source.repository, source.data_file
        try:
            shard = huggingface_hub.hf_hub_download(repository, file, repo_type="dataset")
        except Exception as error:
            raise _download_error(name, split, error) from None
        with atomic(target) as temporary:
            shutil.copyfile(shard, temporary)
        return target
    rows, _ = _from_hub(name, split)
    text = "".join(row.removesuffix("\n") + "\n" for row in rows).encode()
    with atomic(target) as temporary:
        temporary.write_bytes(gzip.compress(text) if target.suffix == ".gz" else text)
    return target


def kind_of(path: Path) -> tuple[str, bool]:
    """A file's suffix in lower case without `.gz`, and whether it is gzipped."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix, name.endswith(".gz")


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, gzipped or not, without its byte-order mark.

    Raises:
        ValueError: a line is not UTF-8.
    """
    opener = gzip.open if kind_of(path)[1] else open
    with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            try:
                line.encode()
            except UnicodeEncodeError as error:
                byte = ord(line[error.start]) - 0xDC00  # see PEP 383
                raise ValueError(
                    f"line {number} is not UTF-8 (byte {byte:#x}). Convert the file to UTF-8"
                ) from None
            yield line


def json_lines(path: Path, console: Console) -> Iterator[tuple[int, object]]:
    """Line numbers and values of a JSONL file; the value is None if the line is not JSON.

    Lone surrogates, which JSON can hold and Unicode text cannot, are replaced by U+FFFD.
    """
    n_replaced, first_line = 0, 0
    for number, line in enumerate(text_lines(path), 1):
        line = line.removeprefix("\ufeff")  # of concatenated files
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_int=_number)
            if _ESCAPED_SURROGATE.search(line):
                text, n = _SURROGATE.subn("\ufffd", json.dumps(value, ensure_ascii=False))
                value = json.loads(text)
                n_replaced, first_line = n_replaced + n, first_line or n and number
        except (ValueError, RecursionError):
            value = None
        yield number, value
    if n_replaced:
        console.say(
            f"{path}: replaced {n_replaced} lone surrogates by U+FFFD, the first in line "
            f"{first_line}",
            style="yellow",
        )


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) < 1000 else float(digits)  # Python rejects longer integers


def _from_file(path: Path, name: str, console: Console) -> tuple[list[str], str]:
    kind, gzipped = kind_of(path)
    if kind not in (*_PLAIN, *_LINES, ".parquet") or gzipped and kind == ".parquet":
        raise UserError(
            f"corpus {path} has an unknown file type. Use {', '.join(_PLAIN)} (one document), "
            f"{' or '.join(_LINES)} (one document per line, field `text`), or .parquet; all but "
            ".parquet may end in .gz."
        )
    try:
        if kind == ".parquet":
            return _parquet(path), path.name
        if kind in _LINES:
            rows = json_lines(path, console)
            return [_text(row, number, path) for number, row in rows], path.name
        text = "".join(text_lines(path))
    except UserError:
        raise
    except Exception as error:  # OSError, gzip, UTF-8 or pyarrow
        raise UserError(f"corpus {path} cannot be read as {kind}: {one_line(error, 160)}") from None
    if name == "wikitext2":
        # As in the hub's copy: a blank row is the empty string, others keep their newline.
        lines = text.split("\n")
        lines = lines[:-1] if lines and not lines[-1] else lines
        return ["" if not line.strip() else line + "\n" for line in lines], path.name
    # As in the hub's copy: rows lack the file's spaces around each line.
    return [row.strip() for row in text.splitlines()] if name == "ptb" else [text], path.name


def _text(row: object, number: int, path: Path) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(
            f'corpus {path}, line {number}: not a JSON object of the form {{"text": "..."}}'
        )
    return text


def _parquet(path: Path) -> list[str]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        raise UserError(
            f"corpus {path} has no column `text`, only {', '.join(file.schema_arrow.names)}"
        )
    texts = file.read(columns=["text"])["text"].to_pylist()
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"corpus {path}: column `text` contains values that are not strings")
    return texts


def _from_hub(name: str, split: Split) -> tuple[list[str], str]:
    import datasets

    source = _SOURCES[name, split]
    files = {split: source.data_file} if source.data_file else None
    try:
        rows = datasets.load_dataset(
            source.repository,
            name=source.configuration,
            data_files=files,
            split=split,
            verification_mode="no_checks",
        )
    except Exception as error:  # hub, network and format errors share no base class
        raise _download_error(name, split, error) from None
    origin = f"{source.repository} {source.configuration or ''} {split}".strip()
    return list(rows[source.column]), origin


def _download_error(name: str, split: Split, error: Exception) -> UserError:
    source = _SOURCES[name, split]
    return UserError(
        f"corpus {name!r} ({split}) cannot be downloaded from {source.repository}: "
        f"{type(error).__name__} {str(error).splitlines()[0]}. Set CAP_LLM_DATA to a folder that "
        f"contains {source.files[-1]}, or pass a file."
    )

"""Corpora by name or file.

A name is looked for in the folder `CAP_LLM_DATA` first and on the Hugging Face hub second, so that
the same recipe runs on clusters without internet. A file is `.txt`, `.raw` or `.tokens` (one
document), `.jsonl` or `.json` (one document a line, field `text`) or `.parquet` (column `text`),
each but the last also packed (`.gz`), whatever the case of its ending. Text is UTF-8.

The evaluation text of a corpus is one string, joined as the papers do it.
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
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import atomic

NAMES = ("c4", "wikitext2", "ptb")
Split = Literal["train", "validation", "test"]

# The local C4 sample serves calibration and scoring: its last documents are held out.
C4_SAMPLE = "c4/c4.sample-2000.jsonl.gz"
C4_HELD_OUT = 400

# Where `fetch_corpus` puts a corpus, and what will do instead.
_LOCAL = {
    ("c4", "train"): ("c4/c4-train.00000-of-01024.json.gz", C4_SAMPLE),
    ("c4", "validation"): ("c4/c4-validation.00000-of-00008.json.gz", C4_SAMPLE),
    ("wikitext2", "train"): ("wikitext2/wiki.train.tokens.gz",),
    ("wikitext2", "validation"): ("wikitext2/wiki.valid.raw",),
    ("wikitext2", "test"): ("wikitext2/wiki.test.raw",),
    ("ptb", "train"): ("ptb/ptb.train.txt",),
    ("ptb", "test"): ("ptb/ptb.test.txt",),
}
_PTB_PARQUET = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank"
_C4_TRAIN = "en/c4-train.00000-of-01024.json.gz"
_C4_VALIDATION = "en/c4-validation.00000-of-00008.json.gz"
_HUB = {
    ("c4", "train"): ("allenai/c4", {"data_files": _C4_TRAIN}),
    ("c4", "validation"): ("allenai/c4", {"data_files": _C4_VALIDATION}),
    ("wikitext2", "train"): ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}),
    ("wikitext2", "validation"): ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}),
    ("wikitext2", "test"): ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}),
    ("ptb", "train"): ("parquet", {"data_files": f"{_PTB_PARQUET}/train/0000.parquet"}),
    ("ptb", "test"): ("parquet", {"data_files": f"{_PTB_PARQUET}/test/0000.parquet"}),
}
_PLAIN, _LINES = (".txt", ".raw", ".tokens"), (".jsonl", ".json")
_SURROGATE = re.compile("[\ud800-\udfff]")  # a str may hold one, Unicode text may not
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_COLUMN = {"c4": "text", "wikitext2": "text", "ptb": "sentence"}


@dataclass
class Corpus:
    """Documents (C4), rows (WikiText-2, PTB) or the lines of a file, and where they came from."""

    documents: list[str]
    origin: str


def corpus_file(name: str, split: Split) -> Path | None:
    """The local file of a corpus, or None where only the hub has it.

    Raises:
        UserError: `name` is neither a file nor a known corpus, or no hub may be asked for it.
    """
    if name not in NAMES:
        try:
            reason = None if stat.S_ISREG(os.stat(name).st_mode) else "It is not a regular file"
        except (OSError, ValueError) as error:  # a null byte is a ValueError
            reason = getattr(error, "strerror", None) or str(error)
        if reason:
            known = ", ".join(NAMES)
            raise UserError(f"corpus {name!r} is neither a file nor one of {known}. {reason}.")
        return Path(name)
    option = "calibration.corpus FILE" if split == "train" else "evaluate.corpora [FILE]"
    root = os.environ.get("CAP_LLM_DATA")
    for relative in _LOCAL[name, split]:
        if root and os.path.isfile(Path(root) / relative):
            return Path(root) / relative
    if offline():
        where = f"{root or 'CAP_LLM_DATA (unset)'}/{_LOCAL[name, split][-1]}"
        raise UserError(
            f"corpus {name!r} ({split}) is not at {where}, and the hub is switched off "
            f"(HF_HUB_OFFLINE): put the file there, fetch it with `cap-llm prefetch` where there "
            f"is a hub, or give --{option}"
        )
    return None


def read_corpus(name: str, split: Split, console: Console = SILENT) -> Corpus:
    """All documents of one split of a corpus.

    Args:
        name: c4, wikitext2, ptb, or a file (which has no splits).
        split: for C4, `train` is the papers' first training shard.
        console: takes a warning where something that is not Unicode text has been replaced.

    Raises:
        UserError: the corpus cannot be had, or holds no text.
    """
    path = corpus_file(name, split)
    documents, origin = _from_hub(name, split) if path is None else _from_file(path, name, console)
    if path is not None and name == "c4" and path.name == Path(C4_SAMPLE).name:
        held_out = split == "validation"
        documents = documents[-C4_HELD_OUT:] if held_out else documents[:-C4_HELD_OUT]
        origin += f", {'last' if held_out else 'all but the last'} {C4_HELD_OUT} documents"
    if not any(d.strip() for d in documents):
        raise UserError(f"corpus {name!r} ({origin}) holds no text")
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
    """The text that a corpus is scored on, and its origin.

    WikiText-2's and PTB's test rows are joined by two newlines and a space, C4's first 1100
    validation documents by a space (SparseGPT's protocol); documents of a file by two newlines.
    """
    split: Split = "validation" if name == "c4" else "test"
    corpus = read_corpus(name, split, console)
    if name == "c4":
        return " ".join(corpus.documents[:1100]), corpus.origin
    return (" " if name == "ptb" else "\n\n").join(corpus.documents), corpus.origin


def fetch_corpus(name: str, split: Split, root: Path) -> Path:
    """Brings one split of a corpus from the hub to `root`, where CAP_LLM_DATA may point to it.

    Raises:
        UserError: the hub does not give it.
    """
    target = root / _LOCAL[name, split][0]
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    if name == "c4":
        import huggingface_hub

        file = _C4_TRAIN if split == "train" else _C4_VALIDATION
        try:
            fetched = huggingface_hub.hf_hub_download("allenai/c4", file, repo_type="dataset")
        except Exception as error:
            raise _not_fetched(name, split, "allenai/c4", error) from None
        with atomic(target) as temporary:
            shutil.copyfile(fetched, temporary)
        return target
    rows, _ = _from_hub(name, split)
    text = "".join(row.removesuffix("\n") + "\n" for row in rows).encode()
    with atomic(target) as temporary:
        temporary.write_bytes(gzip.compress(text) if target.suffix == ".gz" else text)
    return target


def kind_of(path: Path) -> tuple[str, bool]:
    """The ending of a file's name in small letters, without `.gz`, and whether that was there."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix, name.endswith(".gz")


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, packed or not, without its byte-order mark.

    Raises:
        ValueError: a line is not UTF-8.
    """
    opened = gzip.open if kind_of(path)[1] else open
    with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
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
    """The values of a JSONL file and the numbers of their lines; None for what is not JSON.

    Halves of surrogate pairs, which JSON can hold and Unicode text cannot, are replaced by U+FFFD.
    """
    replaced, first = 0, 0
    for number, line in enumerate(text_lines(path), 1):
        line = line.removeprefix("\ufeff")  # of files that were put together
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_int=_number)
            if _ESCAPED.search(line):
                text, n = _SURROGATE.subn("\ufffd", json.dumps(value, ensure_ascii=False))
                value, replaced, first = json.loads(text), replaced + n, first or n and number
        except (ValueError, RecursionError):
            value = None
        yield number, value
    if replaced:
        console.say(
            f"{path}: {replaced} characters are not Unicode text (lone surrogates) and are "
            f"replaced by U+FFFD, the first in line {first}",
            style="yellow",
        )


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) < 1000 else float(digits)  # Python reads no longer integers


def _from_file(path: Path, name: str, console: Console) -> tuple[list[str], str]:
    kind, packed = kind_of(path)
    if kind not in (*_PLAIN, *_LINES, ".parquet") or packed and kind == ".parquet":
        raise UserError(
            f"corpus {path} is of an unknown kind: give {', '.join(_PLAIN)} (one document), "
            f"{' or '.join(_LINES)} (a document a line, field `text`) or .parquet; all but the "
            "last also as .gz"
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
    except Exception as error:  # of the file, of gzip, of UTF-8 or of pyarrow
        raise UserError(
            f"corpus {path} cannot be read as {kind}: "
            f"{type(error).__name__} {' '.join(str(error).split())[:160]}"
        ) from None
    if name == "wikitext2":
        # As in the hub's copy: a blank row is the empty string, any other keeps its own newline.
        lines = text.split("\n")
        lines = lines[:-1] if lines and not lines[-1] else lines
        return ["" if not line.strip() else line + "\n" for line in lines], path.name
    # As in the hub's copy: the file has a space at both ends of a line, a row has none.
    return [row.strip() for row in text.splitlines()] if name == "ptb" else [text], path.name


def _text(row: object, number: int, path: Path) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(
            f'corpus {path}, line {number}: not a JSON object with a text, like {{"text": "..."}}'
        )
    return text


def _parquet(path: Path) -> list[str]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        raise UserError(
            f"corpus {path} has no column `text`; its columns: {', '.join(file.schema_arrow.names)}"
        )
    texts = file.read(columns=["text"])["text"].to_pylist()
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"corpus {path}: the column `text` holds values that are no text")
    return texts


def _from_hub(name: str, split: Split) -> tuple[list[str], str]:
    import datasets

    repository, options = _HUB[name, split]
    if "data_files" in options:
        options = {**options, "data_files": {split: options["data_files"]}}
    try:
        rows = datasets.load_dataset(
            repository, split=split, verification_mode="no_checks", **options
        )
    except Exception as error:  # the hub's, the network's and the formats' errors have no base
        raise _not_fetched(name, split, repository, error) from None
    return list(rows[_COLUMN[name]]), f"{repository} {options.get('name', '')} {split}".strip()


def _not_fetched(name: str, split: Split, repository: str, error: Exception) -> UserError:
    return UserError(
        f"corpus {name!r} ({split}) could not be fetched from the hub ({repository}): "
        f"{type(error).__name__} {str(error).splitlines()[0]}; set CAP_LLM_DATA to a folder "
        f"that holds {_LOCAL[name, split][-1]}, or give a file"
    )

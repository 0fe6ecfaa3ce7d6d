"""Tokenizers that give the ids the model was trained on.

transformers 5 reads a full tokenizer directory well, but gives wrong ids without a word for bare
files: `AutoTokenizer` on a lone `tokenizer.model` drops LLaMA's leading space and its `<s>`, and
`LlamaTokenizer` orders the merges by piece number instead of by score, which breaks doubled spaces;
OPT's `vocab.json` comes up as GPT-2's, without OPT's leading `</s>`. Such files are read here.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import normalizers
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from cap_llm.runtime.console import SILENT, Console
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import read_json, readable

# Characters. A longer text is tokenized in pieces, some of them per call, as no signal gets through
# during a call; the papers' WikiText-2 and PTB are tokenized whole in any case.
WHOLE, PIECE, AT_ONCE = 2_000_000, 250_000, 4
_CONTEXT = 400  # characters
_CANDIDATES = 8
_WORD_END = re.compile(r"(?<=\w)(?=\W)")


def load_tokenizer(path: str, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`: a directory, a hub name or a `tokenizer.model` file.

    Args:
        vocab_size: the model's, to check against.

    Raises:
        UserError: there is none, or its ids do not fit the model.
    """
    folder = Path(path)
    piece_file = folder if folder.suffix == ".model" else folder / "tokenizer.model"
    with readable(f"the tokenizer {path}"):
        files = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    try:
        if "tokenizer.json" not in files and piece_file.is_file():
            tokenizer = _sentencepiece(piece_file)
        elif {"vocab.json", "merges.txt"} <= files and "tokenizer_config.json" not in files:
            tokenizer = _byte_level(folder)
        else:
            if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
                raise UserError(f"--model.tokenizer {path} does not exist")
            tokenizer = _plain(path)
    except UserError:
        raise
    except Exception as error:  # a different one for each way of being damaged
        reason = "it holds no tokenizer files"
        if "trust_remote_code" in str(error):
            reason = "it needs its own Python code (auto_map), which cap_llm never runs"
        elif "tokenizer.json" in files or not folder.is_dir():
            reason = f"{type(error).__name__} {' '.join(str(error).split())[:160]}"
        raise UserError(
            f"no tokenizer can be read from {path}: {reason}; give "
            "--model.tokenizer DIRECTORY_OR_FILE"
        ) from None
    if vocab_size and (len(tokenizer) < vocab_size // 2 or tokenizer.vocab_size > vocab_size):
        # Models may carry unused rows in their embedding; the other way round is a mix-up, but for
        # added tokens that no text gives, such as Gemma 3's for images.
        raise UserError(
            f"the tokenizer at {path} has {len(tokenizer)} entries but the model {vocab_size}; "
            "give the model's own by --model.tokenizer"
        )
    return tokenizer


def _plain(path: str) -> PreTrainedTokenizerBase:
    """As transformers reads it. Left to itself it asks whether to run the directory's code."""
    local = Path(path).exists()
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=local)


def bos_rule(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that a text starts with, or `none`."""
    try:
        ids = tokenizer("a").input_ids
    except Exception:  # a vocabulary of words may lack this one
        ids = tokenizer("").input_ids
    if ids and ids[0] == tokenizer.bos_token_id:
        return tokenizer.bos_token
    return "none"


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, origin: str, console: Console = SILENT
) -> np.ndarray:
    """Ids [T], int32, of one text; see `token_pieces`."""
    return np.concatenate([*token_pieces(tokenizer, text, origin, console)])


def tokenize_rows(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], rows: Sequence[int], origin: str
) -> list[np.ndarray]:
    """Ids [T], int32, of some rows of `documents`, in one call where they are short: the fast
    tokenizers have threads for that.

    Raises:
        UserError: the tokenizer fails on a document.
    """
    texts = [documents[i] for i in rows]
    if sum(map(len, texts)) <= WHOLE:
        with contextlib.suppress(Exception):  # raised again below, where the row is known
            return [np.array(ids, np.int32) for ids in tokenizer(texts).input_ids]
    return [tokenize(tokenizer, documents[i], f"{origin}, document {i + 1}") for i in rows]


def token_pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, origin: str, console: Console = SILENT
) -> Iterator[np.ndarray]:
    """The ids, int32, of one text, piece by piece; together those of the whole text.

    A text is cut only where the tokenizer's result around the cut does not depend on it. Without
    such places a piece is as long as it must be, at worst the whole text.

    Args:
        tokenizer: any.
        text: of any length.
        origin: what errors and the bar call it.
        console: shows a bar for a long text.

    Raises:
        UserError: the tokenizer fails on the text.
    """

    def ids_of(texts, **options):
        try:
            return tokenizer(texts, **options).input_ids
        except Exception as error:  # tokenizers raise any kind
            raise UserError(
                f"{origin}: the tokenizer fails on this text: {type(error).__name__} "
                f"{' '.join(str(error).split())[:160]}"
            ) from None

    def plain(texts):
        return ids_of(texts, add_special_tokens=False)

    if len(text) <= WHOLE:
        yield np.array(ids_of(text), np.int32)
        return
    at = None  # how many special tokens begin a text
    with contextlib.suppress(UserError):  # a vocabulary of words may lack these
        sample, inside = ids_of("a b"), plain("a b")
        at = next((i for i in range(len(sample)) if sample[i : i + len(inside)] == inside), None)
    starts, skipped = [0], [0]  # of pieces: the first character, and the tokens of its context
    for target in range(PIECE, len(text), PIECE):
        if at is not None and target > starts[-1] and (cut := _cut(text, target, plain)):
            starts.append(cut[0])
            skipped.append(cut[1])
    if len(starts) == 1:
        yield np.array(ids_of(text), np.int32)
        return
    parts = [
        text[max(0, start - _CONTEXT) if start else 0 : end]
        for start, end in itertools.pairwise([*starts, len(text)])
    ]
    yield np.array(sample[:at], np.int32)
    with console.bar(f"tokenizing {origin}", len(parts), "pieces") as bar:
        for i in range(0, len(parts), AT_ONCE):
            for ids, n in zip(plain(parts[i : i + AT_ONCE]), skipped[i:], strict=False):
                yield np.array(ids[n:], np.int32)
                bar.advance()
    yield np.array(sample[at + len(inside) :], np.int32)


def _cut(text: str, target: int, plain: Callable) -> tuple[int, int] | None:
    """A place at or after `target` where the text can be cut, and the number of tokens of the
    `_CONTEXT` characters before it; None where none is found.

    Neither the tokens before the place may depend on the text after it, nor those after it on more
    than that context, without which a tokenizer may take the piece for the beginning of a text.
    """
    ends = _WORD_END.finditer(text, target, target + 10 * _CONTEXT)
    for end in itertools.islice(ends, _CANDIDATES):
        at = end.start()
        before, behind = text[at - _CONTEXT : at], text[at : at + _CONTEXT]
        more = text[at - 2 * _CONTEXT : at - _CONTEXT]
        known, with_behind = plain(before), plain(before + behind)
        n = len(known)
        whole = plain(more + before + behind)
        if with_behind[:n] == known and whole == plain(more + before) + with_behind[n:]:
            return at, n
    return None


def _byte_level(folder: Path) -> GPT2Tokenizer:
    """A byte-level BPE without settings: OPT's starts a text with `</s>`, GPT-2's with nothing."""
    if "</s>" not in read_json(folder / "vocab.json"):
        return GPT2Tokenizer.from_pretrained(folder)
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return GPT2Tokenizer.from_pretrained(folder, add_bos_token=True, **special)


def _sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    """LLaMA's kind of sentencepiece model (BPE with byte fallback), with the merges it implies."""
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is not a sentencepiece model: {error}") from None
    names = [pieces.id_to_piece(i) for i in range(len(pieces))]
    if "<0x0A>" not in names:
        return _plain(str(path.parent))  # a unigram model, not LLaMA's kind
    vocab = {name: i for i, name in enumerate(names)}
    # sentencepiece joins the neighbours whose union scores highest
    merges = [
        (pieces.get_score(i), name[:cut], name[cut:])
        for i, name in enumerate(names)
        if not (pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i))
        for cut in range(1, len(name))
        if name[:cut] in vocab and name[cut:] in vocab
    ]
    merges.sort(key=lambda merge: -merge[0])
    settings_file = path.parent / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.exists() else {}
    tokenizer = LlamaTokenizer(
        vocab=vocab,
        merges=[merge[1:] for merge in merges],
        add_bos_token=settings.get("add_bos_token", True),
        bos_token=pieces.id_to_piece(pieces.bos_id()),
        eos_token=pieces.id_to_piece(pieces.eos_id()),
        unk_token=pieces.id_to_piece(pieces.unk_id()),
    )
    # a space goes in front of every text, also of one that starts with a space
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer

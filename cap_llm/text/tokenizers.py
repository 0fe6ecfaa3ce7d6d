"""Tokenizers that give the ids the model was trained on.

transformers 5 loads a full tokenizer directory correctly, but silently gives wrong ids for bare
files, so those are loaded here. `AutoTokenizer` on a lone `tokenizer.model` drops LLaMA's leading
space and its `<s>`. `LlamaTokenizer` orders the merges by piece number instead of by score, which
breaks double spaces. OPT's `vocab.json` is loaded as GPT-2's, without OPT's leading `</s>`.
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
from cap_llm.runtime.errors import UserError, one_line
from cap_llm.runtime.files import read_json, readable

# A text of more than WHOLE characters is tokenized in pieces of PIECE characters, AT_ONCE per call,
# because Python handles no signal during a call. WikiText-2 and PTB are below the limit.
WHOLE, PIECE, AT_ONCE = 2_000_000, 250_000, 4
_CONTEXT = 400  # characters before and after a cut that are checked
_CANDIDATES = 8  # places per cut that are tried
_WORD_END = re.compile(r"(?<=\w)(?=\W)")


def load_tokenizer(path: str, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`: a directory, a hub name or a `tokenizer.model` file.

    Args:
        vocab_size: of the model, to check against.

    Raises:
        UserError: no tokenizer can be loaded, or it does not fit the model.
    """
    folder = Path(path)
    model_file = folder if folder.suffix == ".model" else folder / "tokenizer.model"
    with readable(f"the tokenizer {path}"):
        files = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    try:
        if "tokenizer.json" not in files and model_file.is_file():
            tokenizer = _sentencepiece(model_file)
        elif {"vocab.json", "merges.txt"} <= files and "tokenizer_config.json" not in files:
            tokenizer = _byte_level(folder)
        else:
            if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
                raise UserError(f"--model.tokenizer {path} does not exist")
            tokenizer = _auto(path)
    except UserError:
        raise
    except Exception as error:  # each kind of damage raises its own type
        reason = "it contains no tokenizer files"
        if "trust_remote_code" in str(error):
            reason = "it needs its own Python code (auto_map), which cap_llm never runs"
        elif files & {"tokenizer.json", "tokenizer.model"} or not folder.is_dir():
            reason = one_line(error, 160)
        raise UserError(
            f"cannot load a tokenizer from {path}: {reason}. "
            "Pass --model.tokenizer DIRECTORY_OR_FILE."
        ) from None
    if vocab_size and (len(tokenizer) < vocab_size // 2 or tokenizer.vocab_size > vocab_size):
        # A model may have unused embedding rows. `vocab_size` leaves out added tokens, which a
        # model may lack if no text contains them, such as Gemma 3's image tokens.
        raise UserError(
            f"the tokenizer at {path} has {len(tokenizer)} entries, but the model's vocabulary has "
            f"{vocab_size}. Pass the model's own tokenizer with --model.tokenizer."
        )
    return tokenizer


def _auto(path: str) -> PreTrainedTokenizerBase:
    """As transformers loads it; by default it would ask whether to run the directory's code."""
    local = Path(path).exists()
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=local)


def bos_rule(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that every text begins with, or `none`."""
    try:
        ids = tokenizer("a").input_ids
    except Exception:  # a word-level vocabulary may lack "a"
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
    """Ids [T], int32, of some rows of `documents`.

    Short documents go through in one call, which the fast tokenizers run on several threads.

    Raises:
        UserError: the tokenizer fails on a document.
    """
    texts = [documents[i] for i in rows]
    if sum(map(len, texts)) <= WHOLE:
        with contextlib.suppress(Exception):  # raised again below, with the row's number
            return [np.array(ids, np.int32) for ids in tokenizer(texts).input_ids]
    return [tokenize(tokenizer, documents[i], f"{origin}, document {i + 1}") for i in rows]


def token_pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, origin: str, console: Console = SILENT
) -> Iterator[np.ndarray]:
    """Ids, int32, of one text, piece by piece; concatenated they are those of the whole text.

    A text is cut only where the cut does not change the tokens around it. Without such a place the
    piece grows, in the worst case to the whole text.

    Args:
        origin: the text's name in errors and on the progress bar.

    Raises:
        UserError: the tokenizer fails on the text.
    """

    def ids_of(texts, **options):
        try:
            return tokenizer(texts, **options).input_ids
        except Exception as error:  # tokenizers raise any type
            raise UserError(f"{origin}: the tokenizer fails: {one_line(error, 160)}") from None

    def plain_ids(texts):
        return ids_of(texts, add_special_tokens=False)

    if len(text) <= WHOLE:
        yield np.array(ids_of(text), np.int32)
        return
    n_prefix = None  # special tokens at the beginning of a text
    with contextlib.suppress(UserError):  # a word-level vocabulary may lack these
        sample, inner = ids_of("a b"), plain_ids("a b")
        places = (i for i in range(len(sample)) if sample[i : i + len(inner)] == inner)
        n_prefix = next(places, None)
    starts, n_context = [0], [0]  # per piece: first character, and tokens of the context before it
    for target in range(PIECE, len(text), PIECE):
        if n_prefix is None or target <= starts[-1]:
            continue
        if cut := _cut(text, target, plain_ids):
            starts.append(cut[0])
            n_context.append(cut[1])
    if len(starts) == 1:
        yield np.array(ids_of(text), np.int32)
        return
    parts = [
        text[max(0, start - _CONTEXT) if start else 0 : end]
        for start, end in itertools.pairwise([*starts, len(text)])
    ]
    yield np.array(sample[:n_prefix], np.int32)
    with console.bar(f"tokenizing {origin}", len(parts), "pieces") as bar:
        for i in range(0, len(parts), AT_ONCE):
            for ids, n in zip(plain_ids(parts[i : i + AT_ONCE]), n_context[i:], strict=False):
                yield np.array(ids[n:], np.int32)
                bar.advance()
    yield np.array(sample[n_prefix + len(inner) :], np.int32)


def _cut(text: str, target: int, plain_ids: Callable) -> tuple[int, int] | None:
    """A place at or after `target` where `text` can be cut, or None.

    Tokens before the cut must not depend on the text after it, and those after it only on the
    `_CONTEXT` characters before it: without these a tokenizer may treat the piece as a new text.

    Returns:
        The cut's position, and the number of tokens of the `_CONTEXT` characters before it.
    """
    word_ends = _WORD_END.finditer(text, target, target + 10 * _CONTEXT)
    for word_end in itertools.islice(word_ends, _CANDIDATES):
        at = word_end.start()
        before, after = text[at - _CONTEXT : at], text[at : at + _CONTEXT]
        earlier = text[at - 2 * _CONTEXT : at - _CONTEXT]
        before_ids, both_ids = plain_ids(before), plain_ids(before + after)
        n = len(before_ids)
        all_ids = plain_ids(earlier + before + after)
        if both_ids[:n] == before_ids and all_ids == plain_ids(earlier + before) + both_ids[n:]:
            return at, n
    return None


def _byte_level(folder: Path) -> GPT2Tokenizer:
    """A byte-level BPE without a config: OPT's begins a text with `</s>`, GPT-2's with nothing."""
    if "</s>" not in read_json(folder / "vocab.json"):
        return GPT2Tokenizer.from_pretrained(folder)
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return GPT2Tokenizer.from_pretrained(folder, add_bos_token=True, **special)


def _sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    """A LLaMA-style sentencepiece model (BPE with byte fallback), with the merges it implies."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    names = [pieces.id_to_piece(i) for i in range(len(pieces))]
    if "<0x0A>" not in names:
        return _auto(str(path.parent))  # a unigram model
    vocab = {name: i for i, name in enumerate(names)}
    # sentencepiece merges the neighbors whose union has the highest score
    merges = [
        (pieces.get_score(i), name[:cut], name[cut:])
        for i, name in enumerate(names)
        if not (pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i))
        for cut in range(1, len(name))
        if name[:cut] in vocab and name[cut:] in vocab
    ]
    merges.sort(key=lambda merge: -merge[0])
    config_file = path.parent / "tokenizer_config.json"
    config = read_json(config_file) if config_file.exists() else {}
    tokenizer = LlamaTokenizer(
        vocab=vocab,
        merges=[merge[1:] for merge in merges],
        add_bos_token=config.get("add_bos_token", True),
        bos_token=pieces.id_to_piece(pieces.bos_id()),
        eos_token=pieces.id_to_piece(pieces.eos_id()),
        unk_token=pieces.id_to_piece(pieces.unk_id()),
    )
    # every text gets a leading space, even one that begins with a space
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer

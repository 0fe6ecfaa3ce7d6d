"""Tokenizers that give the ids the model was trained on.

transformers 5 reads a full tokenizer directory well, but gives wrong ids without a word for bare
files: `AutoTokenizer` on a lone `tokenizer.model` drops LLaMA's leading space and its `<s>`, and
`LlamaTokenizer` orders the merges by piece number instead of by score, which breaks doubled spaces;
OPT's `vocab.json` comes up as GPT-2's, without OPT's leading `</s>`. Such files are read here.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import normalizers
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import read_json, readable


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
    ids = tokenizer("a").input_ids
    if ids and ids[0] == tokenizer.bos_token_id:
        return tokenizer.bos_token
    return "none"


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

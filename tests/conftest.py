"""What the tests stand on: real data where it is, tiny models of every family, and the command."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# before anything imports transformers
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all of it is of ranks on CPUs

from support import FAMILIES, POSITIONS, ROOT, VOCABULARY, environment  # noqa: E402

sys.path.insert(0, str(ROOT / "eval"))

from cap_llm.cli import assets  # noqa: E402


def pytest_collection_finish() -> None:
    """All is imported by now, which no collection needs to look through again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data; the test is skipped without it."""
    folder = Path(os.environ.get("CAP_LLM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder} (CAP_LLM_DATA)")
    os.environ["CAP_LLM_DATA"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Q4_1, de-quantised) in safetensors; converted once a machine."""
    try:
        return assets.smollm2()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def calibration_ids(smollm2):
    """Ids [8, 256] of real Wikipedia text."""
    from cap_llm.text.corpora import read_corpus
    from cap_llm.text.tokenizers import load_tokenizer
    from cap_llm.text.windows import calibration_windows

    try:
        text, _ = assets.wikipedia()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    tokenizer = load_tokenizer(str(smollm2))
    return calibration_windows(tokenizer, read_corpus(str(text), "train"), 8, 256, 0)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A text of 20,000 words with some structure: a word depends on the one before it."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(draw.choices(letters, k=draw.randint(1, 8))) for _ in range(300)]
    follows = [draw.sample(range(len(words)), 6) for _ in words]
    at, text = 0, []
    for i in range(20_000):
        at = draw.choice(follows[at])
        text.append(words[at] + (".\n" if i % 12 == 11 else " "))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(text))
    return path


@pytest.fixture(scope="session")
def tokenizer(text_file):
    """A byte-level BPE of 512 entries that starts a text with `<s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([str(text_file)], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    names["unk_token"] = "</s>"  # Qwen2's tokenizer would add one of its own
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer) -> Callable[..., Path]:
    """Makes a directory with a tiny random model; each call makes a new one, the same for a seed.

    tiny("llama", num_hidden_layers=3, dtype=torch.bfloat16) -> Path
    """
    import torch
    import transformers

    def make(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> Path:
        config_class, model_class, settings = FAMILIES[family]
        common = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
        common |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        if family == "gpt2":
            common["n_positions"] = common.pop("max_position_embeddings")
        elif family == "bloom":
            del common["max_position_embeddings"]
        config = getattr(transformers, config_class)(**(common | settings | overrides))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(transformers, model_class)(config).to(dtype)
            for name, p in model.named_parameters():
                if p.dim() >= 2 and "embed" not in name:
                    torch.nn.init.normal_(p, std=0.1)  # so that the blocks matter
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess]:
    """Runs the real entry in a process of its own, without a hub."""

    def run(*args, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(ROOT / "cap_llm" / "train.py"), *map(str, args)],
            env=environment() | (env or {}),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def real(tiny, text_file, tmp_path_factory) -> Path:
    """A folder with one real run of the entry: dense and one-shot, scored."""
    from cap_llm.train import main

    folder = tmp_path_factory.mktemp("runs")
    held_out = folder / "held-out.txt"
    held_out.write_text(text_file.read_text()[::-1])
    words = ["cap-llm", "--output_dir", folder / "run", "--model.path", tiny("llama")]
    words += ["--name", "a method"]
    words += ["--calibration.corpus", text_file, "--calibration.sequences", 8]
    words += ["--calibration.length", 64, "--evaluate.corpora", f"[{held_out}]"]
    words += ["--evaluate.window", 64, "--evaluate.max_windows", 9, "--runtime.device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(w) for w in words])
        assert main() == 0
    return folder / "run"


@pytest.fixture
def copy(real, tmp_path):
    """Makes a copy of the real run and changes its files: {file: change(content)}."""

    def make(name: str, changes: dict | None = None) -> Path:
        run = Path(shutil.copytree(real, tmp_path / name))
        for file, change in (changes or {}).items():
            content = json.loads((run / file).read_text()) if (run / file).exists() else {}
            (run / file).parent.mkdir(exist_ok=True)
            (run / file).write_text(json.dumps(change(content) or content))
        return run

    return make

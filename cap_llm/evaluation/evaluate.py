"""The stage `evaluate`: perplexity of the dense model and of each stage's, in `perplexity.json`.

The file lies beside the model it scores: `<run>/<stage>/perplexity.json`, for the dense model in
`<run>/dense/`. What is scored already, on the same windows, is not scored again.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path

from cap_llm.blockwise.perplexity import streamed_nll
from cap_llm.blockwise.stage import activation_bytes
from cap_llm.config import Config
from cap_llm.models.blocks import BlockModel
from cap_llm.runtime.console import duration
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import read_json, write_json
from cap_llm.runtime.rundir import LIBRARIES, Run, environment
from cap_llm.text.reading import ScoredText, Texts

FILE = "perplexity.json"


def evaluate(models: dict[str, Path], texts: Texts, config: Config, run: Run) -> None:
    """Scores model directories.

    Args:
        models: by the name of the folder of the run that takes the result (`dense`, `oneshot`).
        texts: the windows to score.
        config: the run's settings.
        run: the run directory.

    Raises:
        UserError: a model has no perplexity or overflows.
    """
    versions = {name: environment(run.world)["versions"][name] for name in LIBRARIES}
    for stage, folder in models.items():
        place, _ = run.stage(stage, config.recipe(stage))
        run.bind(place, config.recipe(stage))
        path = place / FILE
        results = read_json(path) if path.exists() else {"corpora": {}}
        run.world.barrier()  # all have read before the first one writes
        for text in texts.scored:
            known = results["corpora"].get(text.key)
            if not known or known["text_sha256"] != text.digest:
                known = _score(folder, f"{stage} on {text.name}", text, config, run)
                results["corpora"][text.key] = known
                if run.world.first:
                    facts = {"model": config.model.path, "stage": stage, "versions": versions}
                    write_json(path, facts | results)
            run.console.say(
                f"{stage}: ppl_token@{known['window']} {known['ppl_token']:.4f} on {text.name} "
                f"({known['windows']} windows, BOS {known['bos']}, {duration(known['seconds'])})"
            )
            run.metric("evaluate", 0, {f"{stage} {text.key}": known["ppl_token"]})
        run.world.barrier()


def _score(folder: Path, title: str, text: ScoredText, config: Config, run: Run) -> dict:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=run.path, prefix=".scratch-") as scratch:
        model = BlockModel.open(folder, run.world.device)
        with run.console.bar(title, len(model), "blocks") as bar:
            memory = activation_bytes(config)
            nll = streamed_nll(model, text.windows, run.world, memory, Path(scratch), bar.advance)
    if not math.isfinite(nll):
        raise UserError(f"the perplexity of {folder} is not finite: the model overflows")
    n_windows, window = text.windows.shape
    scored = n_windows * (window - 1)
    return {
        "ppl_token": math.exp(nll / scored),
        "window": window,
        "windows": n_windows,
        "tokens": scored,
        "nll": nll / scored,
        "bos": text.bos,
        "origin": text.origin,
        "text_sha256": text.digest,
        "computed_in": str(model.dtype).removeprefix("torch."),
        "seconds": round(time.monotonic() - start, 2),
    }

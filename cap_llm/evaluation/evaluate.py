"""The stage `evaluate`: perplexity of the dense model and of each stage's, in `perplexity.json`.

The file lies beside the model it scores: `<run>/<stage>/perplexity.json`, for the dense model in
`<run>/dense/`. What is scored already, on the same windows, is not scored again.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path

from cap_llm.blockwise.oneshot import activation_bytes
from cap_llm.blockwise.perplexity import streamed_nll
from cap_llm.config import Config
from cap_llm.models.checkpoint import config_dict
from cap_llm.runtime.console import duration
from cap_llm.runtime.files import read_json, write_json
from cap_llm.runtime.rundir import LIBRARIES, Run, environment
from cap_llm.text.corpora import evaluation_text
from cap_llm.text.tokenizers import bos_rule, load_tokenizer
from cap_llm.text.windows import evaluation_windows

FILE = "perplexity.json"


def evaluate(models: dict[str, Path], config: Config, run: Run) -> None:
    """Scores model directories.

    Args:
        models: by the name of the folder of the run that takes the result (`dense`, `oneshot`).
        config: the run's settings.
        run: the run directory.

    Raises:
        UserError: a corpus is too short, a model has no perplexity or overflows.
    """
    source = next(iter(models.values()))
    tokenizer = load_tokenizer(
        config.model.tokenizer or str(source), config_dict(source).get("vocab_size")
    )
    settings = config.evaluate
    corpora = {}
    for name in settings.corpora:
        text, origin = evaluation_text(name)
        windows = evaluation_windows(tokenizer, text, origin, settings.window, settings.max_windows)
        corpora[name] = (windows, origin)
    for stage, folder in models.items():
        path = run.path / stage / FILE
        if run.world.first:
            path.parent.mkdir(exist_ok=True)
        results = read_json(path) if path.exists() else {}
        run.world.barrier()  # all have read before the first one writes
        for name, (windows, origin) in corpora.items():
            key = f"{Path(name).name}@{settings.window}"
            entry = {"windows": len(windows), "origin": origin, "bos": bos_rule(tokenizer)}
            known = results.get("corpora", {}).get(key)
            if not (known and entry.items() <= known.items()):
                known = entry | _score(folder, f"{stage} on {name}", windows, config, run)
                known["window"] = settings.window
                results |= {
                    "model": config.model.path,
                    "stage": stage,
                    "dtype": "float32" if run.world.device.type == "cpu" else "as stored",
                    "versions": {n: environment(run.world)["versions"][n] for n in LIBRARIES},
                    "corpora": results.get("corpora", {}) | {key: known},
                }
                if run.world.first:
                    write_json(path, results)
            run.console.say(
                f"{stage}: ppl_token@{settings.window} {known['ppl_token']:.4f} on {name} "
                f"({known['windows']} windows, BOS {known['bos']}, {duration(known['seconds'])})"
            )
            run.metric("evaluate", 0, {f"{stage} {key}": known["ppl_token"]})
    run.world.barrier()


def _score(folder: Path, title: str, windows, config: Config, run: Run) -> dict:
    start = time.monotonic()
    n_blocks = config_dict(folder).get("num_hidden_layers") or config_dict(folder).get("n_layer", 0)
    with (
        run.console.bar(title, n_blocks + 1, "blocks") as bar,
        tempfile.TemporaryDirectory(dir=run.path, prefix=".scratch-") as scratch,
    ):
        nll = streamed_nll(
            folder, windows, run.world, activation_bytes(config), Path(scratch), bar.advance
        )
    scored = windows.shape[0] * (windows.shape[1] - 1)
    return {
        "ppl_token": math.exp(nll / scored),
        "nll": nll / scored,
        "tokens": scored,
        "seconds": round(time.monotonic() - start, 2),
    }

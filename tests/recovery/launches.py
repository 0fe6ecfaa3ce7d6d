"""Runs many cases of the stage `recover` in one launch of `worker.py`; their models."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import torch
from support import environment

from cap_llm.cli.command_line import read_config
from cap_llm.pipeline import pipeline
from cap_llm.runtime.console import Console
from cap_llm.text.corpora import calibration_corpus
from cap_llm.text.packing import pack
from cap_llm.text.tokenizers import load_tokenizer

WORKER = Path(__file__).with_name("worker.py")
CPU = torch.device("cpu")
ZERO = ("zero0", "zero1", "zero2", "zero3")
STEPS, BATCH, LENGTH, HELD_OUT = 8, 6, 64, 6
DOWN_0 = "model.layers.0.mlp.down_proj.weight"

MIXED = {
    "recover.optimizer.tokens": 4 * BATCH * LENGTH,
    "recover.engine.micro_batch": 1,
    "recover.optimizer.dtype": "bfloat16",
    "recover.optimizer.weight_decay": 0.1,
    "recover.optimizer.clip": 0.5,
    "recover.engine.gradient_checkpointing": "true",
    "recover.objective.feature": 0.5,
}
LEVEL_STEPS = 5
SCHEDULE = {
    "recover.masks.schedule": "0.6, 0.7",
    "recover.finetuned": "train",
    "recover.engine.deepspeed": "zero3",
    "recover.optimizer.tokens": LEVEL_STEPS * BATCH * LENGTH,
}
# Checkpoints of two ranks, by the number that goes on: a conversion takes seconds.
RESUMED_ON = {1: ("zero0", "zero1", "zero3"), 3: ("zero0", "zero2", "zero3")}
NO_CONTRAST = {f"recover.objective.{name}": 0 for name in ("prc", "snc", "fic")}
FEATURE = {"recover.objective.feature": 0.5}


# the three launches


class Cases:
    """Cases of one launch, and what became of them once it has run."""

    def __init__(self, ranks: int, folder: Path, assets: Assets):
        self.ranks, self.folder, self.assets = ranks, folder, assets
        self.cases: list[dict] = []
        self.results: dict[str, dict] = {}

    def add(self, name: str, *patches, edits=(), out: str | None = None, **changes) -> Path:
        """Adds a case; `changes` are settings, with `__` for the dot. Returns its run directory."""
        place = self.out(out or name)
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        args = self.assets.options(place, self.ranks) | changes
        case = {"name": name, "args": arguments(args), "patches": patches, "edits": edits}
        self.cases.append(json.loads(json.dumps(case, default=str)))
        return place

    def out(self, name: str) -> Path:
        return self.folder / re.sub(r"\W", "-", name)

    def start(self) -> Cases:
        """Begins all cases in as many processes as there are ranks."""
        (self.folder / "cases.json").write_text(json.dumps(self.cases, indent=1))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        launcher = [*torchrun, str(self.ranks)] if self.ranks > 1 else []
        with open(self.folder / "log.txt", "w", encoding="utf-8") as log:
            self._job = subprocess.Popen(
                [sys.executable, *launcher, str(WORKER), str(self.folder)],
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self

    def wait(self) -> Cases:
        """Reads what became of them; nothing is left running."""
        try:
            code = self._job.wait(timeout=900)
        except subprocess.TimeoutExpired:
            code = "a time-out"
        self.stop()
        said = (self.folder / "log.txt").read_text()
        assert code == 0, f"{self.ranks} ranks end with {code}:\n{said[-8000:]}"
        self.results = json.loads((self.folder / "results.json").read_text())
        return self

    def stop(self) -> None:
        """Ends whatever of it still runs."""
        end(self._job)

    def outcome(self, name: str) -> dict:
        """What all ranks say of a case alike."""
        outcomes = self.results[name]["ranks"]
        for outcome in outcomes:
            assert not outcome["traceback"], outcome["traceback"]
            assert outcome | {"left": 0} == outcomes[0] | {"left": 0}
            assert (outcome["left"] or 0) < 2**12  # bytes of tensors that a case leaves behind
        return outcomes[0]

    def finished(self, name: str, out: str | None = None) -> Path:
        """The run directory of a case that must have ended well."""
        outcome = self.outcome(name)
        assert not (outcome["error"] or outcome["stopped"] or outcome["traceback"])
        assert (self.out(out or name) / "recover" / "done.json").exists()
        return self.out(out or name)

    def refused(self, name: str) -> str:
        """The message of a case that must have ended with one."""
        message = self.outcome(name)["error"]
        assert message, f"{name} was not refused"
        assert "\n" not in message
        return message

    def stopped(self, name: str) -> Path:
        """The run directory of a case that a signal must have ended."""
        assert self.outcome(name)["stopped"] == signal.SIGTERM
        assert not (self.out(name) / "recover" / "done.json").exists()
        return self.out(name)


class Assets:
    """The models and files that the cases work on."""

    def __init__(self, folder: Path, text: Path, tiny):
        self.folder, self.tiny = folder, tiny
        self.text = folder / "text.txt"
        self.text.write_text(
            "".join(text.read_text(encoding="utf-8").splitlines(keepends=True)[:400])
        )
        self.dense = tiny("llama", num_hidden_layers=3)
        self.half = folder / "half" / "oneshot"  # 50 % by SparseGPT
        settings = self.options(folder / "half", 1) | {"model.path": self.dense}
        config, text, _ = read_config(arguments(settings | {"stages": "[oneshot]"}))
        pipeline(config, text, Console(enabled=False))

    def options(self, out: Path, ranks: int) -> dict:
        """The settings of a small sound run from the half pruned model."""
        return {
            "output_dir": out,
            "model.path": self.half,
            "stages": "[recover]",
            "calibration.corpus": self.text,
            "calibration.sequences": 8,
            "calibration.length": LENGTH,
            "recover.teacher": self.dense,
            "recover.corpus": self.text,
            "recover.length": LENGTH,
            "recover.optimizer.tokens": STEPS * BATCH * LENGTH,
            "recover.optimizer.batch": BATCH,
            "recover.engine.micro_batch": BATCH // ranks,
            "recover.held_out": HELD_OUT,
            "recover.optimizer.lr": 0.003,
            "recover.objective.ce": 0.2,
            "recover.objective.kl": 0.8,
            "recover.objective.prc": 0.1,
            "recover.objective.snc": 0.1,
            "recover.checkpoint.every": 3,
            "recover.log.evaluate_every": 3,
            "recover.contrast.segments": 4,
            "recover.contrast.token_positions": 8,
            "recover.contrast.n_unlabeled_frequent": 5,
            "recover.contrast.extra_negatives": 4,
        }

    def write(self, name: str, content) -> Path:
        """A JSON file."""
        path = self.folder / name
        path.write_text(json.dumps(content))
        return path

    def held_out(self) -> torch.Tensor:
        """The held-out sequences [n, T]."""
        return self.packed().held_out

    def packed(self, steps: int = STEPS):
        tokenizer = load_tokenizer(str(self.dense))
        corpus = calibration_corpus(str(self.text))
        return pack(tokenizer, corpus, steps * BATCH, HELD_OUT, LENGTH, 0)


def arguments(settings: dict) -> list[str]:
    return [str(part) for key, value in settings.items() for part in (f"--{key}", value)]


def end(job: subprocess.Popen) -> None:
    """Kills a process with all that it has started: torchrun's ranks have sessions of their own."""
    if job.poll() is None:
        for process in [*psutil.Process(job.pid).children(recursive=True), job]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        job.wait()

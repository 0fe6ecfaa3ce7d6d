"""Kills a random rank at a random moment, many times (`make test-faults`; some minutes).

    python -m pytest -s tests/faults.py
    python tests/faults.py RECIPE FOLDER [--kills 36] [--seed 0]

A trial runs the whole pipeline on two ranks, kills one of them by SIGKILL somewhere inside a phase
(one-shot, reconstruction, bank building, training, checkpointing, export; ZeRO 2 and 3 in turn),
ends the other one as a launcher does, gives the same command again, and holds what comes out
against an undisturbed run, bit for bit. FOLDER/results.json keeps what was done, so that a stopped
test goes on.

A rank is a fork of this process, which has imported everything: so a trial takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHASES = {  # what is wrapped, to count its calls and to kill inside one
    "one-shot": ("cap_llm.blockwise.oneshot", "prune_block"),
    "reconstruction": ("cap_llm.blockwise.reconstruct", "_Trainer.train"),
    "bank building": ("cap_llm.contrast.terms", "ContrastiveObjective.fill"),
    "training": ("cap_llm.training.loop", "step_once"),
    "checkpointing": ("cap_llm.training.checkpoints", "save"),
    "export": ("cap_llm.recovery.recover", "export"),
}
ZERO = (2, 3)
PATIENCE = 60.0  # seconds in which a job must end once a rank was killed
LONGEST = 300.0  # seconds of an undisturbed run


class Phases:
    """Counts and times the calls of each phase in this rank, and kills it inside one of them."""

    def __init__(self, victim: dict | None):
        self.victim, self.calls = victim, {name: [] for name in PHASES}
        for name, (module, path) in PHASES.items():
            *owner, attribute = path.split(".")
            place = functools.reduce(getattr, owner, sys.modules[module])
            setattr(place, attribute, self._wrapped(name, getattr(place, attribute)))

    def _wrapped(self, name: str, function):
        @functools.wraps(function)
        def call(*args, **options):
            start, n = time.monotonic(), len(self.calls[name])
            if self.victim and (self.victim["phase"], self.victim["call"]) == (name, n):
                kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
                threading.Timer(self.victim["delay"], kill).start()
            self.calls[name].append(0.0)
            try:
                return function(*args, **options)
            finally:
                self.calls[name][n] = time.monotonic() - start

        return call


def fork_rank(rank: int, port: int, args: list[str], log: Path, victim: dict | None) -> int:
    """Starts a rank of a job of two; its process id."""
    pid = os.fork()
    if pid:
        return pid
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["train.py", *args]
    from cap_llm import train

    phases = Phases(victim if victim and victim["rank"] == rank else None)

    def leave(code: int) -> None:
        if rank == 0:
            log.with_suffix(".json").write_text(json.dumps(phases.calls))
            log.with_suffix(".modules").write_text("\n".join(sys.modules))
        sys.stdout.flush()
        os._exit(code)

    try:
        leave(train.main())
    finally:
        os._exit(99)


def run(args: list[str], log: Path, victim: dict | None = None) -> tuple[list[int], bool]:
    """Runs a job; the ranks' exit codes (negative: a signal), and whether it had to be killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [fork_rank(rank, port, args, log, victim) for rank in (0, 1)]
    codes: dict[int, int] = {}
    until, hung = time.monotonic() + LONGEST, False
    while len(codes) < 2:
        pid, code = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(code)
            others = [p for p in pids if p not in codes]
            if codes[pid] and others:
                until = time.monotonic() + PATIENCE
                time.sleep(random.random())  # launchers look once a second
                with contextlib.suppress(ProcessLookupError):
                    os.kill(others[0], signal.SIGTERM)
        elif time.monotonic() > until:
            hung = True
            for other in pids:
                if other not in codes:
                    os.kill(other, signal.SIGKILL)
            until = float("inf")
        time.sleep(0.02)
    return [codes[p] for p in pids], hung


def result(folder: Path) -> dict:
    """All that a run has come to: checksums of its models and masks, losses, perplexities."""
    from safetensors.numpy import load_file

    found = {}
    for path in sorted([*folder.glob("*/*.safetensors"), *folder.glob("*/masks/*.safetensors")]):
        sha = hashlib.sha256()
        for name, tensor in sorted(load_file(path).items()):
            sha.update(name.encode() + tensor.tobytes())
        found[str(path.relative_to(folder))] = sha.hexdigest()
    for path in sorted(folder.glob("*/scores.json")):
        scores = json.loads(path.read_text())["scores"]
        found[str(path.relative_to(folder))] = [score["value"] for score in scores]
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):  # a line that a kill has cut
            m = json.loads(line)
            if m["name"] in ("loss", "grad_norm"):
                found[f"{m['stage']} {m['name']} {m['step']}"] = m["value"]
    return found


def trial(n: int, seed: int, recipe: Path, folder: Path) -> dict:
    """One kill and one rerun."""
    zero = ZERO[n % len(ZERO)]
    phase = list(PHASES)[n // len(ZERO) % len(PHASES)]
    calls = json.loads((folder / f"plain-{zero}.json").read_text())[phase]
    plain = json.loads((folder / f"plain-{zero}-result.json").read_text())
    args = ["--config", str(recipe), "--recover.engine.deepspeed", f"zero{zero}"]
    draw = random.Random(f"{seed} {n}")
    log = folder / f"trial-{n}.log"
    for _ in range(20):  # a kill that comes after the end is none
        out = folder / f"trial-{n}"
        shutil.rmtree(out, ignore_errors=True)
        call = draw.randrange(len(calls))
        victim = {"phase": phase, "call": call, "rank": draw.randrange(2)}
        victim["delay"] = draw.uniform(0, calls[call])
        codes, hung = run([*args, "--output_dir", str(out)], log, victim)
        if codes[victim["rank"]] == -signal.SIGKILL:
            break
    else:
        raise AssertionError(f"trial {n}: 20 kills came too late")
    ended = out / "ended.json"
    said = json.loads(ended.read_text())["why"] if ended.exists() else "nothing"
    again, hung_again = run([*args, "--output_dir", str(out)], log)
    same = again == [0, 0] and result(out) == plain
    if same:
        shutil.rmtree(out)
    return victim | {
        "zero": zero,
        "codes": codes,
        "said": said,
        "hung": hung or hung_again,
        "lost": not same,
    }


def table(trials: list[dict]) -> str:
    """Kills, losses and hangs of each phase, as Markdown."""
    lines = [
        "| killed in | ZeRO | kills | losses | hangs | rank named |",
        "| --- |" + " ---: |" * 5,
    ]
    for phase in PHASES:
        for zero in ZERO:
            mine = [t for t in trials if (t["phase"], t["zero"]) == (phase, zero)]
            lost, hung = sum(t["lost"] for t in mine), sum(t["hung"] for t in mine)
            named = sum(f"rank {t['rank']} (process" in t["said"] for t in mine)
            lines.append(f"| {phase} | {zero} | {len(mine)} | {lost} | {hung} | {named} |")
    lost, hung = sum(t["lost"] for t in trials), sum(t["hung"] for t in trials)
    named = sum(f"rank {t['rank']} (process" in t["said"] for t in trials)
    return "\n".join([*lines, f"| all | | {len(trials)} | {lost} | {hung} | {named} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=36)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    from cap_llm import train  # noqa: F401  (and with it all that the ranks need)

    for name in (m for m, _ in PHASES.values()):
        importlib.import_module(name)
    args.folder.mkdir(parents=True, exist_ok=True)
    for zero in ZERO:
        out = args.folder / f"plain-{zero}"
        if not (args.folder / f"plain-{zero}-result.json").exists():
            shutil.rmtree(out, ignore_errors=True)
            command = ["--config", str(args.recipe), "--recover.engine.deepspeed", f"zero{zero}"]
            codes, _ = run([*command, "--output_dir", str(out)], out.with_suffix(".log"))
            assert codes == [0, 0], out.with_suffix(".log").read_text()[-3000:]
            for name in out.with_suffix(".modules").read_text().split():
                with contextlib.suppress(Exception):  # what a rank imports late, others need not
                    importlib.import_module(name)
            text = json.dumps(result(out))
            (args.folder / f"plain-{zero}-result.json").write_text(text)
    path = args.folder / "results.json"
    trials = json.loads(path.read_text()) if path.exists() else []
    for n in range(len(trials), args.kills):
        start = time.monotonic()
        trials.append(trial(n, args.seed, args.recipe, args.folder))
        path.write_text(json.dumps(trials, indent=1))
        t = trials[-1]
        outcome = "LOST" if t["lost"] else "HUNG" if t["hung"] else "as undisturbed"
        print(
            f"{n + 1:>3}/{args.kills}  ZeRO-{t['zero']}  rank {t['rank']}  {t['phase']}, call "
            f"{t['call'] + 1} after {t['delay']:.2f} s: {outcome}  "
            f"({time.monotonic() - start:.0f} s)",
            flush=True,
        )
    print(table(trials))


def test_no_kill_loses_anything_and_none_hangs(tiny, text_file):
    import yaml

    folder = Path(os.environ.get("CAP_LLM_FAULTS", ROOT / "runs" / "faults"))
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(tiny("llama"), folder / "model")
        lines = text_file.read_text().splitlines(keepends=True)
        (folder / "text.txt").write_text("".join(lines[:400]))
        (folder / "scored.txt").write_text("".join(lines[400:480]))
        text = {"corpus": str(folder / "text.txt"), "length": 64}
        recover = {"optimizer": {"batch": 4, "tokens": 6 * 4 * 64}, "held_out": 4}
        recover |= {"masks": {"schedule": "0.6"}, "engine": {"micro_batch": 1}}
        recover |= {"checkpoint": {"every": 2}, "log": {"evaluate_every": 4}}
        recover |= {"contrast": {"segments": 4, "token_positions": 8, "extra_negatives": 4}}
        settings = {
            "stages": ["oneshot", "reconstruct", "recover", "evaluate"],
            "model": {"path": str(folder / "model")},
            "calibration": text | {"sequences": 8, "held_out": 4},
            "recover": text | recover,
            "evaluate": {"corpora": [str(folder / "scored.txt")], "window": 64},
        }
        recipe.write_text(yaml.safe_dump(settings))
    kills = os.environ.get("KILLS", "36")
    command = [sys.executable, __file__, recipe, folder, "--kills", kills]
    subprocess.run([*command, "--seed", os.environ.get("SEED", "0")], check=True)
    trials = json.loads((folder / "results.json").read_text())
    assert len(trials) >= 25 and not any(t["lost"] or t["hung"] for t in trials)


if __name__ == "__main__":
    main()

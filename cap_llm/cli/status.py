"""`cap-llm status RUN`: what a run directory's stages have come to, without loading anything.

    cap-llm status runs/opt [--json]

All of it is read from what the stages leave: `done.json`, finished blocks, complete checkpoints,
scores, the metrics, the lock and `ended.json`.
"""

from __future__ import annotations

import functools
import json
import socket
import time
from pathlib import Path

import psutil
import yaml

from cap_llm.cli.options import make_parser, parse
from cap_llm.config import MODELS, STAGES
from cap_llm.runtime.console import Console, format_duration
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import read_json, read_metrics
from cap_llm.runtime.lock import (
    ENDED,
    FILE,
    WATCH,
    holder,
)

_EXAMPLES = ("runs/opt", "runs/opt --json", "$SCRATCH/runs/llama-3-8b")


def main(argv: list[str], console: Console) -> None:
    """Prints the status of the run directory that `argv` names.

    Raises:
        UserError: it is not a run directory.
    """
    parser = make_parser("status", "Show how far each stage of a run is.", _EXAMPLES)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    args = parse(parser, argv)
    found = status(args.run)
    if args.json:
        console.say(json.dumps(found, indent=2))
        return
    console.say(f"{args.run}: {found['job']}")
    rows = [[stage, state, found["progress"][stage]] for stage, state in found["stages"].items()]
    console.table("", ["stage", "state", "how far"], rows)


def status(folder: Path) -> dict:
    """The state of each stage (`done`, `running`, `failed`, `stopped` or `waiting`), how far it is
    in words, and what is to be said of the job.

    Raises:
        UserError: `folder` is no run directory.
    """
    if not (folder / FILE).exists():
        raise UserError(f"{folder} is not a run directory: there is no {FILE} in it")
    state, job = _job(folder)
    try:
        config = yaml.safe_load(_text(folder / "config.yaml"))
    except (yaml.YAMLError, ValueError, RecursionError):
        config = None
    config = config if isinstance(config, dict) else {}
    asked = config.get("stages") if isinstance(config.get("stages"), list) else []
    names = [s for s in STAGES if s in asked or (folder / s / "recipe.json").exists()]
    metrics = read_metrics(folder)
    found = {}
    for stage in names:
        try:
            found[stage] = _PROGRESS[stage](folder, config, metrics)
        except (UserError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
            found[stage] = False, "its files are damaged"
    stages = {
        stage: "done" if done else "stopped" if text else "waiting"
        for stage, (done, text) in found.items()
    }
    if at_work := [s for s in names if stages[s] != "done" and s in asked]:
        stages[at_work[0]] = state or stages[at_work[0]]
    progress = {stage: text for stage, (_, text) in found.items()}
    return {"run": str(folder), "job": job, "stages": stages, "progress": progress}


def _job(folder: Path) -> tuple[str | None, str]:
    """The state that the job gives to its stage, and what is to be said of the job itself."""
    who, ended = holder(folder), folder / ENDED
    if ended.exists():
        try:
            end = read_json(ended)
            failed = 0 < end["code"] < 128
            rank = f" (rank {end['rank']}, exit code {end['code']})" if failed else ""
            ago = format_duration(time.time() - end["time"])
        except (UserError, LookupError, TypeError, RecursionError):  # the disk was full
            return "failed", "the last job ended, and could not write down why"
        return "failed" if failed else None, f"the last job ended {ago} ago: {end.get('why')}{rank}"
    if not who:
        return None, "no job has worked here yet"
    name = f"job {who['job']}" if who["job"] else f"process {who['pid']}"
    seen = time.time() - (folder / FILE).stat().st_mtime
    here = who["host"] == socket.gethostname()
    if psutil.pid_exists(who["pid"]) if here else seen < WATCH:
        return "running", f"{name} on {who['host']} is at work"
    return "failed", f"{name} on {who['host']} ended without a word, {format_duration(seen)} ago"


def _blockwise(stage: str, folder: Path, config: dict, metrics: list[dict]) -> tuple[bool, str]:
    if (done := folder / stage / "done.json").exists():
        return True, read_json(done, lambda c: format_duration(c["seconds"]))
    finished = len(list((folder / stage / "blocks").glob("*.json")))
    total = [m["value"] for m in metrics if m["stage"] == stage and m["name"] == "blocks"]
    return False, f"{finished} of {total[-1]} blocks" if total else ""


def _recover(folder: Path, config: dict, metrics: list[dict]) -> tuple[bool, str]:
    if (done := folder / "recover" / "done.json").exists():
        return True, read_json(done, lambda c: format_duration(c["seconds"]))
    mine = [m for m in metrics if m["stage"].startswith("recover") and m["name"] == "loss"]
    banks = len(list((folder / "recover").glob("banks/*/bank.json")))
    if not mine:
        return False, f"banking ({banks})" if banks else ""
    recover, now = config["recover"], mine[-1]
    each = recover["optimizer"]["batch"] * recover["length"]
    steps = recover["optimizer"]["tokens"] // each
    levels = len([level for level in recover["masks"]["schedule"].split(",") if level.strip()])
    level = now["stage"].removeprefix("recover").removeprefix("/")
    text = f"level {level} of {levels}, " if level.isdigit() else f"{level}, " if level else ""
    text += f"step {now['step']} of {steps}"
    kept = sorted(
        (folder / "recover" / "checkpoints" / (level or "1")).glob("step-*/complete.json")
    )
    text += f", checkpoint at {int(kept[-1].parent.name[5:])}" if kept else ", no checkpoint yet"
    left = steps - now["step"]
    speed = [m for m in metrics if m["stage"] == now["stage"] and m["name"] == "tokens_per_second"]
    if left and speed and speed[-1]["value"]:
        seconds = left * each / speed[-1]["value"]
        text += f", about {format_duration(seconds)} left" + (
            " of this level" if levels > 1 else ""
        )
    return False, text


def _evaluate(folder: Path, config: dict, metrics: list[dict]) -> tuple[bool, str]:
    bound = [s for s in ("dense", "given", *MODELS) if (folder / s / "recipe.json").exists()]
    wanted = [s for s in ("dense", "given", *MODELS) if s in config.get("stages", []) or s in bound]
    asked = config["evaluate"]
    files = [path for stage in wanted if (path := folder / stage / "scores.json").exists()]
    scores = [read_json(path)["scores"] for path in files]
    corpora = {Path(name).name for name in asked["corpora"]}
    extent = {"window": asked.get("window"), "limit": asked.get("max_windows")}
    n = sum(
        s["data"] in corpora and extent.items() <= s["facts"].items()
        for part in scores
        for s in part
    )
    text = f"{n} of {len(corpora) * len(wanted)} perplexities" if n else ""
    if asked.get("tasks"):
        n = sum(any(s["measure"] != "ppl_token" for s in part) for part in scores)
        text += f", tasks of {n} of {len(wanted)} models"
    # The last stage has no folder of its own: it is done where the job that had it ended well.
    ended = folder / ENDED
    done = ended.exists() and '"code": 0' in _text(ended)
    return done, text.removeprefix(", ")


_PROGRESS = {stage: functools.partial(_blockwise, stage) for stage in MODELS}
_PROGRESS |= {"recover": _recover, "evaluate": _evaluate}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""

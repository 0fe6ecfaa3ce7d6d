"""`cap-llm status RUN`: what a run directory's stages have come to, without loading anything.

    cap-llm status runs/opt [--json]

It reads what every stage writes, `done.json` and metrics, the lock and `ended.json`.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import psutil
import yaml

from cap_llm.cli.options import make_parser, parse
from cap_llm.runtime.console import Console, format_duration
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import read_json, read_metrics
from cap_llm.runtime.lock import ENDED, FILE, WATCH, holder
from cap_llm.stages import STAGES

RECENT = 20  # steps or blocks by which the remaining time is estimated
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
    asked = config.get("stages")
    asked = asked if isinstance(asked, list) else []
    names = [s for s in STAGES if s in asked or (folder / s).is_dir()]
    metrics = read_metrics(folder)
    found = {}
    for stage in names:
        try:
            found[stage] = _progress(stage, folder, metrics)
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


def _progress(stage: str, folder: Path, metrics: list[dict]) -> tuple[bool, str]:
    """Whether a stage is done, and how far it is, from `done.json` or its last metrics."""
    if (done := folder / stage / "done.json").exists():
        return True, read_json(done, lambda c: format_duration(c["seconds"]))
    lines = [m for m in metrics if m["stage"].partition("/")[0] == stage]
    lines = [m for m in lines if m["stage"] == lines[-1]["stage"]]
    totals = [m for m in lines if m["name"] in ("blocks", "steps", "scores")]
    if not totals:
        return False, ""
    now, total = lines[-1], totals[-1]
    part = now["stage"].partition("/")[2]
    text = f"level {part}, " if part.isdigit() else f"{part}, " if part else ""
    text += f"{total['name'].removesuffix('s')} {now['step']} of {total['value']}"
    saved = [p.parent.name[5:] for p in folder.glob(f"{stage}/checkpoints/*/step-*/complete.json")]
    text += f", checkpoint at {max(map(int, saved))}" if saved else ""
    before = next(m for m in lines if m["step"] >= now["step"] - RECENT)
    left = total["value"] - now["step"]
    if left and now["step"] > before["step"]:
        each = (now["time"] - before["time"]) / (now["step"] - before["step"])
        text += f", about {format_duration(left * each)} left"
    return False, text


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""

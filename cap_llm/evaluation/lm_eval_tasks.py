"""Zero-shot tasks: the papers' sets by name, and lm-eval's own tasks on files of this machine.

Prompt, choices, split and metric of a task are lm-eval's. Where its rows lie in a local file, a
task file is made that includes lm-eval's and names that file instead of the hub. lm-eval itself is
imported late, and only where it is needed: its import takes seconds, the index of its tasks more.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from cap_llm.config import EvaluateConfig
from cap_llm.runtime.console import Console
from cap_llm.runtime.environment import offline
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.trackers import require
from cap_llm.text.corpora import json_lines, kind_of, text_lines

# The zero-shot sets of two papers, whose means are over `acc`: Wanda (Sun et al. 2024) and
# Sparse-Dense-Sparse (Li et al. 2024).
SETS = {
    "wanda": (
        *("boolq", "rte", "hellaswag", "winogrande"),
        *("arc_easy", "arc_challenge", "openbookqa"),
    ),
    "sds": (
        *("copa", "lambada_openai", "openbookqa", "piqa"),
        *("rte", "storycloze_2016", "winogrande"),
    ),
}

Check = Callable[[object, dict], bool]


def _text(value, row: dict) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _number(*allowed: int) -> tuple[str, Check]:
    return (
        " or ".join(map(str, allowed)),
        lambda value, row: type(value) is int and value in allowed,
    )


def _labelled(value, row: dict) -> bool:
    parts = [value.get("text"), value.get("label")] if isinstance(value, dict) else [0, 1]
    texts = all(isinstance(p, list) and p and all(_text(t, row) for t in p) for p in parts)
    return texts and len(parts[0]) == len(parts[1])


def _several(value, row: dict) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(_text(t, row) for t in value)


def _index_of(field: str) -> tuple[str, Check]:
    def check(value, row: dict) -> bool:
        digits = isinstance(value, str) and value.isdecimal() and len(value) < 10
        number = int(value) if digits else value
        return type(number) is int and 0 <= number < len(row[field])

    return f"an index of {field}", check


_TEXT = ("a text", _text)
_QUESTION = {
    "choices": ('{"text": [...], "label": [...]} of equal length', _labelled),
    "answerKey": (
        "one of the choices' labels",
        lambda value, row: isinstance(value, str) and value.strip() in row["choices"]["label"],
    ),
}
_BINARY = _number(0, 1)

# task -> (split that lm-eval scores, the hub's fields that its prompt needs: meaning and check)
_ROWS: dict[str, tuple[str, dict[str, tuple[str, Check]]]] = {
    "arc_challenge": ("test", {"question": _TEXT} | _QUESTION),
    "arc_easy": ("test", {"question": _TEXT} | _QUESTION),
    "boolq": ("validation", {"passage": _TEXT, "question": _TEXT, "label": _BINARY}),
    "copa": (
        "validation",
        {
            "premise": _TEXT,
            "choice1": _TEXT,
            "choice2": _TEXT,
            "question": ("cause or effect", lambda value, row: value in ("cause", "effect")),
            "label": _BINARY,
        },
    ),
    "hellaswag": (
        "validation",
        {
            "activity_label": _TEXT,
            "ctx_a": _TEXT,
            "ctx_b": ("a text or empty", lambda value, row: isinstance(value, str)),
            "endings": ("a list of texts", _several),
            "label": _index_of("endings"),
        },
    ),
    "lambada_openai": ("test", {"text": _TEXT}),
    "openbookqa": ("test", {"question_stem": _TEXT} | _QUESTION),
    "piqa": ("validation", {"goal": _TEXT, "sol1": _TEXT, "sol2": _TEXT, "label": _BINARY}),
    "rte": ("validation", {"sentence1": _TEXT, "sentence2": _TEXT, "label": _BINARY}),
    "storycloze_2016": (
        "test",
        dict.fromkeys([f"input_sentence_{i}" for i in (1, 2, 3, 4)], _TEXT)
        | dict.fromkeys(["sentence_quiz1", "sentence_quiz2"], _TEXT)
        | {"answer_right_ending": _number(1, 2)},
    ),
    "wikitext": ("test", {"page": _TEXT}),
    "winogrande": (
        "validation",
        {
            "sentence": (
                "a text with a gap _",
                lambda value, row: _text(value, row) and "_" in value,
            ),
            "option1": _TEXT,
            "option2": _TEXT,
            "answer": ("1 or 2, as a text", lambda value, row: value in ("1", "2")),
        },
    ),
}
# HellaSwag as some distribute it: already through lm-eval's own preparation of a row.
_PREPARED = {"query": _TEXT, "choices": ("a list of texts", _several), "gold": _index_of("choices")}


@dataclass
class Task:
    """A task of lm-eval and where its rows come from.

    Attributes:
        name: as results call it.
        spec: lm-eval's task file, or the name of one of its groups.
        origin: the file of the rows, or `hub`.
        rows: of a local file, in the hub's fields; None where lm-eval fetches them itself.
        overrides: further fields that the task file made for `rows` sets.
        built: what lm-eval made of a task without local rows, once it has.
    """

    name: str
    spec: str
    origin: str = "hub"
    rows: list[dict] | None = None
    overrides: dict | None = None
    built: object = None

    def build(self, folder: Path | None = None):
        """lm-eval's task or group; a local one reads a copy of its rows in `folder`, which must
        stay as long as the task is used.

        Raises:
            UserError: lm-eval cannot load it.
        """
        if self.rows is not None:
            return _load(self.name, str(self._write(folder)))
        self.built = self.built or _load(self.name, self.spec)
        return self.built

    @property
    def digest(self) -> str:
        """A checksum of the rows; of a task from the hub, once it is built."""
        docs = [self.rows] if self.rows is not None else [t.eval_docs for t in members(self.built)]
        sha = hashlib.sha256()
        for row in (row for part in docs for row in part):
            sha.update(json.dumps(row, sort_keys=True, default=str).encode())
        return sha.hexdigest()[:16]

    def _write(self, folder: Path) -> Path:
        """Writes the rows and the task file that names them; the latter's path."""
        split, _ = _ROWS[self.name]
        data = folder / f"{self.name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        splits = dict.fromkeys(("training_split", "validation_split", "test_split"))
        task = {
            "include": self.spec,
            "task": self.name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(data)}, "cache_dir": str(folder)},
        }
        task |= splits | {f"{split}_split": split} | (self.overrides or {})
        path = folder / f"{self.name}.yaml"
        path.write_text(yaml.safe_dump(task), encoding="utf-8")
        return path


def prompts_digest(built) -> str:
    """A checksum of how lm-eval's task or group asks and scores: prompts, shots, metrics."""
    sha = hashlib.sha256()
    for task in members(built):
        asked = task.dump_config().items()  # and of where its rows and its file lie
        asked = {k: v for k, v in asked if k != "metadata" and not k.startswith("dataset")}
        sha.update(json.dumps(asked, sort_keys=True, default=lambda x: type(x).__name__).encode())
    return sha.hexdigest()[:16]


def members(built) -> list:
    """lm-eval's tasks in a group of it, or the task itself."""
    return list(built.get_all_tasks()) if hasattr(built, "get_all_tasks") else [built]


def find_tasks(config: EvaluateConfig, console: Console, fetch: bool = True) -> list[Task]:
    """The tasks that are asked for, with the rows of those that have a local file.

    A task that was named must be there. Of a set, what cannot be had is named and left out.

    Args:
        config: names of tasks and sets, and the folder of local data.
        console: takes what is left out.
        fetch: load what is not local at once, so that a missing one shows before the long work.

    Raises:
        UserError: a task is unknown, cannot be had, or its file is damaged.
    """
    if not config.tasks:
        return []
    require("lm_eval", "evaluate.tasks")
    known = _builtin_tasks()
    folder = _data_folder(config)
    sets = [name for name in config.tasks if name in SETS]
    named = [name for name in config.tasks if name not in SETS]
    tasks, missing = {}, {}
    for name in dict.fromkeys(t for asked in config.tasks for t in SETS.get(asked, [asked])):
        try:
            tasks[name] = _find(name, known, folder, console)
            if tasks[name].rows is None and (fetch or offline()):
                tasks[name].build()
            elif tasks[name].rows is None:
                console.say(f"task {name}: on the hub, not fetched")
        except _Missing as error:
            tasks.pop(name, None)
            missing[name] = str(error)
    problems = []
    for name, reason in missing.items():
        if name not in _ROWS:
            raise UserError(
                f"task {name} cannot be loaded by lm-eval: {reason}; leave it out, or give a task "
                "file"
            )
        where = f"task {name} cannot be had: no {_wanted(name, folder)}, and {reason}"
        if name in named or not tasks:
            problems.append(where)
            continue
        parts = ", ".join(s for s in sets if name in SETS[s])
        console.say(f"{where}; it is left out, and the mean of {parts} will be partial")
    if problems:
        raise UserError("; ".join(problems) + "; put it there or leave the task out")
    return list(tasks.values())


class _Missing(UserError):
    """The rows of a task are neither here nor to be had from the hub."""


def _find(name: str, known: dict[str, str], folder: Path | None, console: Console) -> Task:
    if name.lower().endswith((".yaml", ".yml")):
        if not os.path.isfile(name):
            raise UserError(f"task file {name} does not exist")
        try:
            inside = dict(_NAME.findall("".join(text_lines(Path(name))).encode()))
        except (OSError, ValueError) as error:
            raise UserError(f"task file {name} cannot be read: {error}") from None
        if b"group" in inside or b"task" not in inside:
            raise UserError(f"task file {name} names no task; it needs a line like `task: mine`")
        return Task(inside[b"task"].decode(), str(Path(name).resolve()), Path(name).name)
    if name not in known:
        near = difflib.get_close_matches(name, [*SETS, *known], n=1)
        hint = f"did you mean {near[0]}?" if near else f"sets are {', '.join(SETS)}"
        raise UserError(f"task {name!r} is none of lm-eval's; {hint}")
    path = _local_file(name, folder) if folder and name in _ROWS else None
    if path is None:
        return Task(name, known[name])
    rows, overrides = _read_rows(name, path, console)
    return Task(name, known[name], path.name, rows, overrides)


_NAME = re.compile(rb"^(task|group): *[\"']?([^\s\"'#]+)", re.MULTILINE)


@functools.cache
def _builtin_tasks() -> dict[str, str]:
    """lm-eval's tasks with their files, and its groups with their names."""
    root = importlib.util.find_spec("lm_eval").submodule_search_locations[0]
    known = {}
    for path in sorted(Path(root, "tasks").rglob("*.yaml")):
        inside = {kind: name.decode() for kind, name in _NAME.findall(path.read_bytes())}
        if b"group" in inside:
            known.setdefault(inside[b"group"], inside[b"group"])
        elif b"task" in inside:
            known.setdefault(inside[b"task"], str(path))
    return known


def _data_folder(config: EvaluateConfig) -> Path | None:
    if config.task_data is not None:
        folder = Path(config.task_data)
        if not os.path.isdir(folder):
            raise UserError(f"evaluate.task_data {folder} is not a directory")
        return folder
    root = os.environ.get("CAP_LLM_DATA")
    return Path(root, "zeroshot") if root else None


def _wanted(name: str, folder: Path | None) -> str:
    return f"{folder or 'CAP_LLM_DATA (unset)/zeroshot'}/{name}_{_ROWS[name][0]}.jsonl"


def _local_file(name: str, folder: Path) -> Path | None:
    """`<task>.jsonl` or `<task>_<split>*.jsonl`, the split whole or shortened (`val`), or parquet;
    for WikiText also the raw test set itself."""
    pattern = rf"{name}(_{_ROWS[name][0][:3]}.*)?\.(jsonl|jsonl\.gz|parquet)"
    named = [p for p in folder.glob("*") if re.fullmatch(pattern, p.name, re.IGNORECASE)]
    found = {path for path in named if path.is_file()}  # to open a pipe would wait for its writer
    if len(found) > 1:
        names = ", ".join(sorted(p.name for p in found))
        raise UserError(f"task {name} has several files in {folder} ({names}); keep one")
    if name == "wikitext":
        raw = (folder / "wiki.test.raw", folder.parent / "wikitext2" / "wiki.test.raw")
        found = found or {path for path in raw if path.is_file()}
    return min(found, default=None)


def _read_rows(name: str, path: Path, console: Console) -> tuple[list[dict], dict]:
    """The rows of a local file in the hub's fields, and what the task file sets for them."""
    _, fields = _ROWS[name]
    overrides = {}
    rows = []
    for number, row in _raw_rows(path, console):
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        if name == "boolq" and isinstance(row.get("answer"), bool):
            row = {"label": int(row["answer"])} | row
        if name == "hellaswag" and (overrides or (not rows and "query" in row)):
            fields, overrides = _PREPARED, {"process_docs": None}
        for field, (meaning, check) in fields.items():
            if field not in row or not check(row[field], row):
                value = json.dumps(row[field], default=str)[:60] if field in row else "missing"
                raise UserError(f"{path}, line {number}: {field} is {value}; it must be {meaning}")
        row = {field: row[field] for field in fields}
        if overrides:
            row["label"] = row.pop("gold")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no rows; get the file again")
    return rows, overrides


def _raw_rows(path: Path, console: Console) -> Iterator[tuple[int, object]]:
    """The rows of a file with their line numbers (counted from 1)."""
    kind, _ = kind_of(path)
    try:
        if kind == ".parquet":
            import pyarrow.parquet

            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
        elif kind == ".raw":
            yield from enumerate(({"page": page} for page in _pages("".join(text_lines(path)))), 1)
        else:
            yield from json_lines(path, console)
    except Exception as error:  # of the file, of UTF-8 or of pyarrow
        raise UserError(
            f"{path} cannot be read: {type(error).__name__} {' '.join(str(error).split())[:160]}"
        ) from None


def _pages(text: str) -> list[str]:
    """WikiText's articles: each begins at a heading of the first level, ` = Title = `."""

    def is_title(line: str) -> bool:
        begins = line.startswith("= ") and not line.startswith("= =")
        return begins and line.endswith(" =") and not line.endswith("= =")

    lines = text.split("\n")
    titles = [i for i, line in enumerate(lines) if is_title(line.strip())]
    edges = itertools.pairwise([0, *titles, len(lines)])
    pages = ["\n".join(lines[start:end]) for start, end in edges]
    return [page for page in pages if page.strip()]


def _load(name: str, spec: str):
    """Loads a task or group by lm-eval.

    Raises:
        _Missing: its data cannot be had, or it does not load for another reason.
    """
    from lm_eval.tasks import TaskManager

    from cap_llm.evaluation.lm_eval_model import quiet

    quiet()
    is_file = spec.endswith((".yaml", ".yml"))
    try:
        loaded = TaskManager(include_defaults=not is_file).load([spec])
    except Exception as error:  # lm-eval's, the hub's and the task's own
        reason = "the hub is switched off (HF_HUB_OFFLINE)"
        if not offline() or is_file and not isinstance(error, ConnectionError):
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise _Missing(reason) from None
    if any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
        raise UserError(f"task {name} runs code that the model writes; leave it out")
    groups = loaded.get("groups", {})
    return groups[name] if name in groups else loaded["tasks"][name]

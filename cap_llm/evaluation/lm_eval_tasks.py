"""Zero-shot tasks: the papers' sets by name, and lm-eval's tasks on local files.

Prompt, choices, split and metric of a task are lm-eval's own. If its rows are in a local file, a
task file is written that includes lm-eval's and reads that file instead of the hub. lm-eval is
imported late, because its import takes seconds, and the index of its tasks even longer.
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
from cap_llm.runtime.errors import UserError, one_line
from cap_llm.runtime.trackers import require
from cap_llm.text.corpora import json_lines, kind_of, text_lines

# The zero-shot sets of Wanda (Sun et al. 2024) and Sparse-Dense-Sparse (Li et al. 2024), which
# average `acc`.
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


def _one_of(*allowed: int) -> tuple[str, Check]:
    return (
        " or ".join(map(str, allowed)),
        lambda value, row: type(value) is int and value in allowed,
    )


def _labeled_texts(value, row: dict) -> bool:
    parts = [value.get("text"), value.get("label")] if isinstance(value, dict) else [0, 1]
    texts = all(isinstance(p, list) and p and all(_text(t, row) for t in p) for p in parts)
    return texts and len(parts[0]) == len(parts[1])


def _texts(value, row: dict) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(_text(t, row) for t in value)


def _index_of(field: str) -> tuple[str, Check]:
    def check(value, row: dict) -> bool:
        digits = isinstance(value, str) and value.isdecimal() and len(value) < 10
        number = int(value) if digits else value
        return type(number) is int and 0 <= number < len(row[field])

    return f"an index into {field}", check


_TEXT = ("non-empty text", _text)
_QUESTION = {
    "choices": ('{"text": [...], "label": [...]} of equal length', _labeled_texts),
    "answerKey": (
        "one of the choices' labels",
        lambda value, row: isinstance(value, str) and value.strip() in row["choices"]["label"],
    ),
}
_BINARY = _one_of(0, 1)

# task -> (split that lm-eval scores, fields that its prompt needs, each with meaning and check)
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
            "ctx_b": ("text", lambda value, row: isinstance(value, str)),
            "endings": ("a list of texts", _texts),
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
        | {"answer_right_ending": _one_of(1, 2)},
    ),
    "wikitext": ("test", {"page": _TEXT}),
    "winogrande": (
        "validation",
        {
            "sentence": (
                "text with a gap _",
                lambda value, row: _text(value, row) and "_" in value,
            ),
            "option1": _TEXT,
            "option2": _TEXT,
            "answer": ('"1" or "2"', lambda value, row: value in ("1", "2")),
        },
    ),
}
# HellaSwag as some distribute it, already preprocessed as by lm-eval
_PREPROCESSED = {
    "query": _TEXT,
    "choices": ("a list of texts", _texts),
    "gold": _index_of("choices"),
}


@dataclass
class Task:
    """A task of lm-eval and the source of its rows.

    Attributes:
        name: its name in results.
        spec: lm-eval's task file, or the name of one of its groups.
        origin: the file of the rows, or `hub`.
        rows: rows of a local file, with the hub's fields; None if lm-eval downloads them.
        overrides: further fields of the task file that is written for `rows`.
        built: lm-eval's task or group, once built; only without local rows.
    """

    name: str
    spec: str
    origin: str = "hub"
    rows: list[dict] | None = None
    overrides: dict | None = None
    built: object = None

    def build(self, folder: Path | None = None):
        """lm-eval's task or group.

        A task with local rows reads a copy of them in `folder`, which must outlive the task.

        Raises:
            UserError: lm-eval cannot load it.
        """
        if self.rows is not None:
            return _load(self.name, str(self._write(folder)))
        self.built = self.built or _load(self.name, self.spec)
        return self.built

    @property
    def digest(self) -> str:
        """A checksum of the rows; a task from the hub must be built first."""
        docs = [self.rows] if self.rows is not None else [t.eval_docs for t in members(self.built)]
        sha = hashlib.sha256()
        for row in (row for part in docs for row in part):
            sha.update(json.dumps(row, sort_keys=True, default=str).encode())
        return sha.hexdigest()[:16]

    def _write(self, folder: Path) -> Path:
        """Writes the rows and a task file that reads them; returns its path."""
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
    """A checksum of the prompts, shots and metrics of lm-eval's task or group."""
    sha = hashlib.sha256()
    for task in members(built):
        config = task.dump_config().items()  # also says where the rows and the task file are
        config = {k: v for k, v in config if k != "metadata" and not k.startswith("dataset")}
        sha.update(json.dumps(config, sort_keys=True, default=lambda x: type(x).__name__).encode())
    return sha.hexdigest()[:16]


def members(built) -> list:
    """The tasks of lm-eval's group, or the task itself."""
    return list(built.get_all_tasks()) if hasattr(built, "get_all_tasks") else [built]


def find_tasks(config: EvaluateConfig, console: Console, fetch: bool = True) -> list[Task]:
    """The configured tasks, with the rows of those that have a local file.

    A task named in `config.tasks` must be available. Unavailable tasks of a set are skipped.

    Args:
        config: names of tasks and sets, and the folder of local data.
        console: prints which tasks are skipped.
        fetch: download what is not local now, so that failures show before the long work.

    Raises:
        UserError: a task is unknown or unavailable, or its file is damaged.
    """
    if not config.tasks:
        return []
    require("lm_eval", "evaluate.tasks")
    builtin = _builtin_tasks()
    folder = _data_folder(config)
    sets = [name for name in config.tasks if name in SETS]
    tasks, missing = {}, {}
    for name in dict.fromkeys(t for entry in config.tasks for t in SETS.get(entry, [entry])):
        try:
            tasks[name] = _find(name, builtin, folder, console)
            if tasks[name].rows is None and (fetch or offline()):
                tasks[name].build()
            elif tasks[name].rows is None:
                console.say(f"task {name}: not downloaded yet")
        except _Missing as error:
            tasks.pop(name, None)
            missing[name] = str(error)
    problems = []
    for name, reason in missing.items():
        if name not in _ROWS:
            raise UserError(
                f"task {name}: lm-eval cannot load it: {reason}. Leave it out, or use a task file."
            )
        file = f"{folder or 'CAP_LLM_DATA (unset)/zeroshot'}/{name}_{_ROWS[name][0]}.jsonl"
        problem = f"task {name} is not available: {file} does not exist, and {reason}"
        if name in config.tasks or not tasks:
            problems.append(problem)
            continue
        parts = ", ".join(s for s in sets if name in SETS[s])
        console.say(f"{problem}. Skipping it; the mean of {parts} will be partial.")
    if problems:
        raise UserError("; ".join(problems) + ". Add the file, or leave the task out.")
    return list(tasks.values())


class _Missing(UserError):
    """A task's rows are neither local nor on the hub."""


def _find(name: str, builtin: dict[str, str], folder: Path | None, console: Console) -> Task:
    if name.lower().endswith((".yaml", ".yml")):
        if not os.path.isfile(name):
            raise UserError(f"task file {name} does not exist")
        try:
            fields = dict(_NAME.findall("".join(text_lines(Path(name))).encode()))
        except (OSError, ValueError) as error:
            raise UserError(f"task file {name} cannot be read: {error}") from None
        if b"group" in fields or b"task" not in fields:
            raise UserError(f"task file {name} names no task. Add a line like `task: mine`.")
        return Task(fields[b"task"].decode(), str(Path(name).resolve()), Path(name).name)
    if name not in builtin:
        near = difflib.get_close_matches(name, [*SETS, *builtin], n=1)
        hint = f"Did you mean {near[0]}?" if near else f"The sets are {', '.join(SETS)}."
        raise UserError(f"task {name!r} is not a task of lm-eval. {hint}")
    path = _local_file(name, folder) if folder and name in _ROWS else None
    if path is None:
        return Task(name, builtin[name])
    rows, overrides = _read_rows(name, path, console)
    return Task(name, builtin[name], path.name, rows, overrides)


_NAME = re.compile(rb"^(task|group): *[\"']?([^\s\"'#]+)", re.MULTILINE)


@functools.cache
def _builtin_tasks() -> dict[str, str]:
    """lm-eval's tasks mapped to their files, and its groups to their own names."""
    root = importlib.util.find_spec("lm_eval").submodule_search_locations[0]
    builtin = {}
    for path in sorted(Path(root, "tasks").rglob("*.yaml")):
        fields = {kind: name.decode() for kind, name in _NAME.findall(path.read_bytes())}
        if b"group" in fields:
            builtin.setdefault(fields[b"group"], fields[b"group"])
        elif b"task" in fields:
            builtin.setdefault(fields[b"task"], str(path))
    return builtin


def _data_folder(config: EvaluateConfig) -> Path | None:
    if config.task_data is not None:
        folder = Path(config.task_data)
        if not os.path.isdir(folder):
            raise UserError(f"evaluate.task_data {folder} is not a directory")
        return folder
    root = os.environ.get("CAP_LLM_DATA")
    return Path(root, "zeroshot") if root else None


def _local_file(name: str, folder: Path) -> Path | None:
    """The local file of a task, or None.

    It is `<task>.jsonl` or `<task>_<split>*.jsonl` with the split in full or abbreviated (`val`),
    or parquet. For WikiText it may also be the raw test set.
    """
    pattern = rf"{name}(_{_ROWS[name][0][:3]}.*)?\.(jsonl|jsonl\.gz|parquet)"
    paths = [p for p in folder.glob("*") if re.fullmatch(pattern, p.name, re.IGNORECASE)]
    files = {path for path in paths if path.is_file()}  # opening a pipe would wait for its writer
    if len(files) > 1:
        names = ", ".join(sorted(p.name for p in files))
        raise UserError(f"task {name} has several files in {folder} ({names}). Keep only one.")
    if name == "wikitext":
        raw = (folder / "wiki.test.raw", folder.parent / "wikitext2" / "wiki.test.raw")
        files = files or {path for path in raw if path.is_file()}
    return min(files, default=None)


def _read_rows(name: str, path: Path, console: Console) -> tuple[list[dict], dict]:
    """The rows of a local file with the hub's fields, and overrides for their task file."""
    _, fields = _ROWS[name]
    overrides = {}
    rows = []
    for number, row in _raw_rows(path, console):
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        if name == "boolq" and isinstance(row.get("answer"), bool):
            row = {"label": int(row["answer"])} | row
        if name == "hellaswag" and (overrides or (not rows and "query" in row)):
            fields, overrides = _PREPROCESSED, {"process_docs": None}
        for field, (meaning, check) in fields.items():
            if field not in row or not check(row[field], row):
                value = json.dumps(row[field], default=str)[:60] if field in row else "missing"
                raise UserError(f"{path}, line {number}: {field} is {value}, but must be {meaning}")
        row = {field: row[field] for field in fields}
        if overrides:
            row["label"] = row.pop("gold")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} contains no rows")
    return rows, overrides


def _raw_rows(path: Path, console: Console) -> Iterator[tuple[int, object]]:
    """Line numbers (from 1) and rows of a file."""
    kind, _ = kind_of(path)
    try:
        if kind == ".parquet":
            import pyarrow.parquet

            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
        elif kind == ".raw":
            yield from enumerate(({"page": page} for page in _pages("".join(text_lines(path)))), 1)
        else:
            yield from json_lines(path, console)
    except Exception as error:  # OSError, UTF-8 or pyarrow
        raise UserError(f"{path} cannot be read: {one_line(error, 160)}") from None


def _pages(text: str) -> list[str]:
    """WikiText's articles; each begins at a first-level heading ` = Title = `."""

    def is_title(line: str) -> bool:
        begins = line.startswith("= ") and not line.startswith("= =")
        return begins and line.endswith(" =") and not line.endswith("= =")

    lines = text.split("\n")
    titles = [i for i, line in enumerate(lines) if is_title(line.strip())]
    edges = itertools.pairwise([0, *titles, len(lines)])
    pages = ["\n".join(lines[start:end]) for start, end in edges]
    return [page for page in pages if page.strip()]


def _load(name: str, spec: str):
    """Loads a task or group with lm-eval.

    Raises:
        _Missing: lm-eval cannot load it, for lack of data or another reason.
    """
    from lm_eval.tasks import TaskManager

    from cap_llm.evaluation.lm_eval_model import quiet

    quiet()
    is_file = spec.endswith((".yaml", ".yml"))
    try:
        loaded = TaskManager(include_defaults=not is_file).load([spec])
    except Exception as error:  # lm-eval, the hub and the task raise any type
        reason = "HF_HUB_OFFLINE is set"
        if not offline() or is_file and not isinstance(error, ConnectionError):
            reason = one_line(error, 160)
        raise _Missing(reason) from None
    if any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
        raise UserError(f"task {name} executes code that the model generates. Leave it out.")
    groups = loaded.get("groups", {})
    return groups[name] if name in groups else loaded["tasks"][name]

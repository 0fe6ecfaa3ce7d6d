"""Files that are whole or absent: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import xxhash

from cap_llm.runtime.errors import UserError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to; on success it becomes `path`, else it is removed.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())  # safetensors writes for the owner only
        os.replace(temporary, path)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        # safetensors reports a full disk by an exception of its own
        if isinstance(error, OSError) or "os error" in str(error):
            raise disk_error(path.parent, path.name, error) from error
        raise
    except BaseException:  # Ctrl-C and SIGTERM
        temporary.unlink(missing_ok=True)
        raise


def flush_folder(folder: Path) -> None:
    """Has the disk hold every file below `folder`, whoever wrote it."""
    for path in folder.rglob("*"):
        if path.is_file():
            _flush(path)


def _flush(path: Path) -> None:
    with open(path, "rb") as written:
        os.fsync(written.fileno())


def digests(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """The size in bytes and the checksum of files, by their names in `folder`.

    They tell of chance, not of malice. XXH3 reads as fast as memory does (19 GiB/s per core, where
    SHA-256 takes 1), so that tens of GB cost what the disk costs.
    """
    facts = {}
    for name in names:
        with open(folder / name, "rb") as file:
            checksum = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
            facts[name] = {"size": file.tell(), "xxh3_128": checksum}
    return facts


def verify(folder: Path, recorded: Mapping[str, dict]) -> str | None:
    """What is wrong with files first, held against their `digests`; None if all are as written."""
    name = ""
    try:
        for name, facts in recorded.items():  # the sizes of all before the content of any
            size = (folder / name).stat().st_size
            if size != facts["size"]:
                return f"{name} has {size} bytes, but {facts['size']} were written"
        for name, facts in recorded.items():
            if digests(folder, [name])[name] != facts:
                return f"{name} has changed since it was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def disk_error(folder: Path, name: str, error: Exception) -> UserError:
    """What to tell the user when `name` in `folder` could not be written."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error) or "os error 28" in str(error):
        return UserError(
            f"the disk of {folder} is full while writing {name}; what was finished is kept: "
            "free some space and give the same command again"
        )
    return UserError(f"cannot write {folder / name}: {getattr(error, 'strerror', None) or error}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def readable(name: object) -> Iterator[None]:
    """What the system says against reading `name` in the body becomes one line.

    Raises:
        UserError: it is missing, may not be read, or its name is no file's (too long, a null byte).
    """
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{name} does not exist") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a null byte
        raise UserError(f"{str(name)!r} cannot be read: {error}") from None


def regular(path: Path) -> Path:
    """`path`, if it is a file that can be read; to read a pipe would wait for ever.

    Raises:
        UserError: it is none.
    """
    with readable(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is not a regular file")
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return path


def read_json(path: Path, parse: Callable = lambda content: content):
    """What `parse` takes from the content of a JSON file.

    Raises:
        UserError: it is missing, not JSON, or holds something else than `parse` looks for.
    """
    try:
        content = json.loads(regular(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    try:
        return parse(content)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__} {error}"
        raise UserError(
            f"{path} does not hold what it should ({what}); get the file again"
        ) from None


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`: `stage`, `step`, `name`, `value`, `time`."""
    path, lines = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        # one may be being written, or was when its writer was killed
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines

"""Atomic files: written under a temporary name, flushed, then renamed. Checksums and JSON."""

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
from pydantic import TypeAdapter, ValidationError

from cap_llm.runtime.errors import UserError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path, which becomes `path` on success and is removed on failure.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())  # safetensors gives only the owner access
        os.replace(temporary, path)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        # safetensors reports a full disk as its own exception
        if isinstance(error, OSError) or "os error" in str(error):
            raise disk_error(path.parent, path.name, error) from error
        raise
    except BaseException:  # Ctrl-C and SIGTERM
        temporary.unlink(missing_ok=True)
        raise


def flush_folder(folder: Path) -> None:
    """Flushes every file below `folder` to disk, whoever wrote it."""
    for path in folder.rglob("*"):
        if path.is_file():
            _flush(path)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def digests(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """Sizes in bytes and checksums of files, by their names in `folder`.

    XXH3 detects accidental damage only, but it is as fast as memory: 19 GiB/s per core, against 1
    for SHA-256.
    """
    result = {}
    for name in names:
        with open(folder / name, "rb") as file:
            checksum = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
            result[name] = {"size": file.tell(), "xxh3_128": checksum}
    return result


def verify(folder: Path, recorded: Mapping[str, dict]) -> str | None:
    """The first problem of files whose `digests` are `recorded`; None if all are unchanged."""
    name = ""
    try:
        for name, digest in recorded.items():  # all sizes before any content
            size = (folder / name).stat().st_size
            if size != digest["size"]:
                return f"{name} has {size} bytes, but {digest['size']} were written"
        for name, digest in recorded.items():
            if digests(folder, [name])[name] != digest:
                return f"{name} has changed since it was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except (AttributeError, KeyError, TypeError):
        return f"the recorded checksum of {name or 'its files'} is damaged"
    return None


def disk_error(folder: Path, name: str, error: Exception) -> UserError:
    """The error for a file `name` in `folder` that could not be written."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error) or "os error 28" in str(error):
        return UserError(
            f"the disk of {folder} is full; {name} was not written. Free some space and rerun the "
            "same command to resume."
        )
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{folder / name} cannot be written: {reason}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value) -> None:
    """Writes `value` as indented JSON, atomically.

    Bytes of file names that are not valid text become JSON escapes.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def readable(name: object) -> Iterator[None]:
    """Converts errors from reading `name` in the body to one line.

    Raises:
        UserError: it is missing, not readable, or not a valid file name.
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
    """Returns `path` if it is a readable regular file; reading a pipe could wait forever.

    Raises:
        UserError: it is not.
    """
    with readable(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is not a regular file")
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return path


def read_json(path: Path, parse: Callable = lambda content: content):
    """Reads a JSON file and returns `parse(content)`.

    Raises:
        UserError: it is missing, not JSON, or not what `parse` expects.
    """
    try:
        content = json.loads(regular(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    try:
        return parse(content)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} has unexpected content ({type(error).__name__} {error}). Restore the file."
        ) from None


def holding(**fields: type) -> Callable[[dict], dict]:
    """A parser for `read_json` that checks fields and their types and returns the content."""

    def parse(content: dict) -> dict:
        for name, kind in fields.items():
            if not isinstance(content[name], kind):
                raise TypeError(name)
        return content

    return parse


def matching(kind: type) -> Callable:
    """A parser for `read_json` that validates the content and returns a pydantic dataclass."""

    def parse(content):
        try:
            return TypeAdapter(kind).validate_python(content)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"]))
            raise ValueError(f"{place}: {problem['msg']}") from None

    return parse


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`: `stage`, `step`, `name`, `value`, `time`."""
    path, lines = run / "metrics.jsonl", []
    types = {"stage": str, "step": int, "name": str, "value": int | float, "time": int | float}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        # A line may be incomplete, because its writer is at work or was killed.
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(line)
            if isinstance(line, dict) and all(isinstance(line.get(k), t) for k, t in types.items()):
                lines.append(line)
    return lines

"""Files that are whole or absent: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

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
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        # a file's name may be no Unicode text; \udc80 is JSON's own way to write such
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path):
    """Reads a JSON file.

    Raises:
        UserError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`: `stage`, `step`, `name`, `value`, `time`."""
    path, lines = run / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        # one may be being written, or was when its writer was killed
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines

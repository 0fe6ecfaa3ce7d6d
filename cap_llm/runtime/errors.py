"""Exceptions that users see as one line instead of a traceback."""

from __future__ import annotations

import traceback


class UserError(Exception):
    """Bad input, or a condition that the user can fix.

    The message is one line with the value and the remedy. The command prints it without a traceback
    and exits with code 2.
    """


class RankLost(Exception):
    """Another rank died; the message names it. The exit code is 1."""


def as_user_error(error: BaseException) -> BaseException:
    """Converts a failure of the model's code to a `UserError`; returns other errors unchanged.

    The model's code is transformers, or torch called by transformers.
    """
    frames = reversed(list(traceback.walk_tb(error.__traceback__)))
    names = ((f.f_globals.get("__name__", ""), line) for f, line in frames)
    name, line = next((n for n in names if n[0].partition(".")[0] != "torch"), ("", 0))
    unchanged = isinstance(error, UserError | RankLost) or not isinstance(error, Exception)
    if unchanged or name.partition(".")[0] != "transformers" or _is_device_error(error):
        return error
    return UserError(f"{name}, line {line}, fails for this model or its text: {one_line(error)}")


def _is_device_error(error: Exception) -> bool:
    """Whether memory is full or a GPU failed, which any code may raise."""
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return full or "CUDA error" in str(error)


def one_line(error: Exception, max_length: int = 300) -> str:
    """The type and the message of an exception on one line."""
    return f"{type(error).__name__} {' '.join(str(error).split())[:max_length]}".rstrip()

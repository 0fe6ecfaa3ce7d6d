"""The exceptions that users see: one line instead of a traceback."""

from __future__ import annotations

import traceback


class UserError(Exception):
    """Bad input or a condition that the user can mend.

    The message is one line that names the value and the remedy. The command prints it without a
    traceback and exits with code 2.
    """


class RankLost(Exception):
    """Another rank has gone without a word; the message says which. Exit code 1."""


def explained(error: BaseException) -> BaseException:
    """A failure of the model's own code as a `UserError`; any other exception as it is.

    The model's own is what transformers raises, or torch when transformers calls it.
    """
    frames = reversed(list(traceback.walk_tb(error.__traceback__)))
    names = ((f.f_globals.get("__name__", ""), line) for f, line in frames)
    name, line = next((n for n in names if n[0].partition(".")[0] != "torch"), ("", 0))
    known = isinstance(error, UserError | RankLost) or not isinstance(error, Exception)
    if known or name.partition(".")[0] != "transformers" or _of_the_device(error):
        return error
    return UserError(f"{name}, line {line}, fails for this model or its text: {one_line(error)}")


def _of_the_device(error: Exception) -> bool:
    """Whether memory is full or a GPU has failed; such errors come up in any code."""
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return full or "CUDA error" in str(error)


def one_line(error: Exception, most: int = 300) -> str:
    """An exception's kind and message on one line."""
    return f"{type(error).__name__} {' '.join(str(error).split())[:most]}".rstrip()

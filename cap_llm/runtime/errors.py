"""The exceptions that users see: one line instead of a traceback."""


class UserError(Exception):
    """Bad input or a condition that the user can mend.

    The message is one line that names the value and the remedy. The command prints it without a
    traceback and exits with code 2.
    """


class RankLost(Exception):
    """Another rank has gone without a word; the message says which. Exit code 1."""

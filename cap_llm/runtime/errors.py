"""The one exception that users see."""


class UserError(Exception):
    """Bad input or a condition that the user can mend.

    The message is one line that names the value and the remedy. The command prints it without a
    traceback and exits with code 2.
    """

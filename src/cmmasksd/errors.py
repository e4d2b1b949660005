"""The one exception that means "the user's input is wrong"; the command line prints it as one line and exits with 2."""


class UserError(ValueError):
    """A mistake in what the user gave (a path, a name, a file's content), said in one line with its remedy.

    The message names the offending value, what was expected, and how to mend it. It never wraps over lines, so that it
    survives logs. Programming errors raise other exceptions and keep their traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

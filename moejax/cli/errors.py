"""The error by which a command line is refused."""


class UsageError(ValueError):
    """The command line is wrong."""

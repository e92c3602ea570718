"""The one error of this package that is about data on disk rather than about the configuration."""


class DataError(ValueError):
    """Data that is missing, corrupt or unreadable: one line that names the file and the remedy."""

"""Optional dependencies and how to install them.

moejax is installed from a checkout, not from an index.
"""


def how_to_install(*extras: str) -> str:
    """Returns the commands that bring extras of `setup.py`, for the end of an error message."""
    names = ",".join(extras)
    return f"in a checkout of moejax, make setup EXTRAS=dev,{names} or pip install -e '.[{names}]'"

"""Makes text safe for a terminal, since names of folders and runs may come from others."""

import logging


def printable(text: str) -> str:
    """Returns text with an escape for each unprintable character but line ends and tabs."""
    return "".join(map(_escape, text))


def _escape(character: str) -> str:
    if character.isprintable() or character in "\n\t":
        return character
    return character.encode("unicode_escape").decode()


class PrintableFormatter(logging.Formatter):
    """Messages as `printable` shows them."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the message, with the traceback of its exception if it has one."""
        return printable(super().format(record))

"""Text that a terminal shows and does not obey: names of folders and runs may come from others."""

import logging


def printable(text: str) -> str:
    """The text with an escape for each character that is not printable; line ends and tabs stay."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


class PrintableFormatter(logging.Formatter):
    """Messages as `printable` shows them."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, with the traceback of its exception if it has one."""
        return printable(super().format(record))

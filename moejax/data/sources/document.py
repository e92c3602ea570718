"""A document: the unit of which a corpus is made."""

from typing import NamedTuple


class Document(NamedTuple):
    """A text and what is known about it.

    Attributes:
      text: all of it.
      name: of the document; empty if it has none.
      domain: what it belongs to, such as "code"; empty if that is unknown.
    """

    text: str
    name: str = ""
    domain: str = ""

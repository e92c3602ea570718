"""Documents from a small grammar, for tests and first steps.

They resemble English, are always available, and are the same everywhere. Each document keeps to one
setting (a place, two people, a few things), so its words can be predicted from what came before;
the order of the sentences is random. Results worth reporting need real text.
"""

import random
from collections.abc import Iterator, Sequence

SYNTHETIC_VERSION = 1
NUM_DOCUMENTS = {"train": 200, "validation": 10}
SENTENCES = 24  # per document


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_PEOPLE = _words(
    "Ada Bruno Clara Dmitri Edith Farid Greta Hugo Ines Jonas Kira Leopold Mina Noor Oscar Petra"
)
_PLACES = _words(
    "harbour market library orchard workshop station museum garden kitchen observatory bakery mill"
)
_THINGS = _words(
    "lantern ledger ladder compass kettle basket violin letter map bicycle telescope hammer "
    "blanket candle notebook clock umbrella wheel barrel mirror key bridge window boat"
)
_QUALITIES = _words(
    "old bright heavy broken quiet narrow painted wooden silver forgotten curious careful empty "
    "warm"
)
_ACTIONS = _words(
    "carried mended borrowed painted measured found hid sold opened described cleaned returned "
    "admired"
)
_SAYINGS = (
    "Nobody knew why.",
    "The rain had not stopped since morning!",
    "It was, after all, only a matter of patience.",
    "Was there anything left to do?",
    "Everything seemed to be in its place.",
    "Later they spoke of other things.",
)


def synthetic_documents(split: str) -> Iterator[str]:
    """Yields the documents of "train" or "validation".

    They are the same in every process and on every version of Python.
    """
    for index in range(NUM_DOCUMENTS[split]):
        dice = _Dice(f"{split} {index}")
        yield _document(dice)


class _Dice:
    """Random choices by `random()`, the one method whose values Python promises not to change."""

    def __init__(self, seed: str):
        self._random = random.Random(seed)

    def pick(self, options: Sequence[str]) -> str:
        index = int(self._random.random() * len(options))
        return options[index]

    def number(self, stop: int) -> int:
        """Returns a whole number from 2 to `stop` - 1."""
        return 2 + int(self._random.random() * (stop - 2))


def _document(dice: _Dice) -> str:
    # The order of all draws determines the text: it must not change.
    hero = dice.pick(_PEOPLE)
    friend = dice.pick(_PEOPLE)
    place = dice.pick(_PLACES)
    things = [f"{dice.pick(_QUALITIES)} {dice.pick(_THINGS)}" for _ in range(3)]
    sentences = []
    for _ in range(SENTENCES):
        thing = dice.pick(things)
        action = dice.pick(_ACTIONS)
        number = dice.number(100)
        options = (
            f"{hero} {action} the {thing} in the {place}.",
            f'"Where is the {thing}?" asked {friend}.',
            f"In the {place} there were {number} people, and {friend} {action} the {thing}.",
            f"When {hero} {action} the {thing}, {friend} left the {place}.",
            dice.pick(_SAYINGS),
        )
        sentences.append(dice.pick(options))
    middle = len(sentences) // 2
    paragraphs = (" ".join(sentences[:middle]), " ".join(sentences[middle:]))
    return "\n\n".join(paragraphs) + "\n"

"""Documents from a small grammar: English-like, always there, the same everywhere. For tests and first steps.

Each document keeps to one setting (a place, two people, a few things), so its words can be
predicted from what came before; the order of the sentences is random. Reported results belong
on real text.
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
    "lantern ledger ladder compass kettle basket violin letter map bicycle telescope hammer blanket candle notebook "
    "clock umbrella wheel barrel mirror key bridge window boat"
)
_QUALITIES = _words(
    "old bright heavy broken quiet narrow painted wooden silver forgotten curious careful empty warm"
)
_ACTIONS = _words(
    "carried mended borrowed painted measured found hid sold opened described cleaned returned admired"
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
    """The documents of "train" or "validation": the same in every process and on every version of Python."""
    for index in range(NUM_DOCUMENTS[split]):
        yield _document(_Dice(f"{split} {index}"))


class _Dice:
    """Random choices that use only `random()`, the one method whose values Python promises not to change."""

    def __init__(self, seed: str):
        self._random = random.Random(seed)

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self._random.random() * len(options))]

    def number(self, stop: int) -> int:
        return 2 + int(self._random.random() * (stop - 2))


def _document(dice: _Dice) -> str:
    hero, friend, place = dice.pick(_PEOPLE), dice.pick(_PEOPLE), dice.pick(_PLACES)
    things = [f"{dice.pick(_QUALITIES)} {dice.pick(_THINGS)}" for _ in range(3)]
    sentences = []
    for _ in range(SENTENCES):
        thing, action = dice.pick(things), dice.pick(_ACTIONS)
        template = dice.pick(
            (
                f"{hero} {action} the {thing} in the {place}.",
                f'"Where is the {thing}?" asked {friend}.',
                f"In the {place} there were {dice.number(100)} people, and {friend} {action} the {thing}.",
                f"When {hero} {action} the {thing}, {friend} left the {place}.",
                dice.pick(_SAYINGS),
            )
        )
        sentences.append(template)
    middle = len(sentences) // 2
    return " ".join(sentences[:middle]) + "\n\n" + " ".join(sentences[middle:]) + "\n"

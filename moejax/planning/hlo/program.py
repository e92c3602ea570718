"""The text of a compiled program, `compiled.as_text()`, as instructions, and how often each of them runs.

XLA writes much the same for CPU, GPU and TPU: a computation is a list of instructions in the order
of execution, and calls others, which stand before it. Loops say how often they turn, or the
condition shows it.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import TypeGuard

SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
CALLED = re.compile(r"(?:calls|body|to_apply)=%?([\w.\-]+)")
BRANCHES = re.compile(r"(?:true_computation|false_computation)=%?([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of the text.

    Attributes:
      name: unique in the program.
      result: its type, which may be a tuple.
      opcode: what it does.
      rest: what stands behind the opening parenthesis: names of operands, then attributes.
      is_root: whether it is what its computation returns.
    """

    name: str
    result: str
    opcode: str
    rest: str
    is_root: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first array in the result."""
        found = SHAPE.search(self.result)
        return sizes(found[2]) if found else ()

    @property
    def operands(self) -> list[str]:
        """Names of what it takes."""
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

    @property
    def called(self) -> list[str]:
        """Computations that run whenever it does."""
        return CALLED.findall(self.rest)

    @property
    def branches(self) -> list[str]:
        """Computations of which one runs."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        return BRANCHES.findall(self.rest) + (re.findall(r"[\w.\-]+", listed[1]) if listed else [])

    def attribute(self, name: str) -> str | None:
        """The number or name after `name=`, or None."""
        found = re.search(rf"\b{name}=([^\s,}}]+)", self.rest)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Executions:
    """How often a computation runs when the program runs once.

    Attributes:
      always: outside of branches.
      conditional: in branches, if they are taken every time.
      is_open: whether a loop around it turns as often as data says, which is counted as once.
    """

    always: int = 0
    conditional: int = 0
    is_open: bool = False


class Program:
    """The computations of a compiled program.

    Attributes:
      entry: the name of the computation that runs first.
      computations: instructions of each computation, in the order in which they run.
      by_name: every instruction.
      home: by instruction, the computation that it is in.

    Args:
      text: of the program.

    Raises:
      ValueError: text without a program in it.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        entry, current = None, None
        for line in text.splitlines():
            if header := COMPUTATION.match(line):
                current = self.computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            elif current is not None and (found := INSTRUCTION.match(line)):
                root, name, result, opcode, rest = found.groups()
                current.append(Instruction(name, result, opcode, rest, bool(root)))
        if entry is None:
            raise ValueError("no ENTRY computation: this is not the text of a compiled program")
        self.entry = entry
        self.by_name = {
            i.name: i for instructions in self.computations.values() for i in instructions
        }
        self.home = {
            i.name: name for name, instructions in self.computations.items() for i in instructions
        }

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results it takes."""
        return [self.by_name[name] for name in instruction.operands if name in self.by_name]

    def done_of(self, start: Instruction) -> Instruction | None:
        """The end of what an instruction starts; None if it does not start something that goes on behind it."""
        if not _is_called(start, "start"):
            return None
        names = [start.name]
        for name in names:
            for user in self._users.get(name, []):
                if _is_called(user, "done"):
                    return user
                if user.opcode in ("async-update", "get-tuple-element") or self.goes_on(
                    user.called
                ):
                    names.append(user.name)
        return None

    def goes_on(self, computations: list[str]) -> bool:
        """Whether XLA:TPU made one of these of computing and a part of a collective that was started before."""
        return any(name.startswith("async_collective_fusion") for name in computations)

    @functools.cached_property
    def starters(self) -> dict[str, Instruction]:
        """By instruction: what starts the computation that it is in, to be awaited later (`async-start`)."""
        starts = [i for i in self.by_name.values() if _is_called(i, "start")]
        return {
            inner.name: start
            for start in starts
            for called in start.called
            for inner in self.computations.get(called, [])
        }

    @functools.cached_property
    def _users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {}
        for instruction in self.by_name.values():
            for name in instruction.operands:
                found.setdefault(name, []).append(instruction)
        return found

    @functools.cached_property
    def executions(self) -> dict[str, Executions]:
        """How often each computation runs."""
        found = {name: Executions() for name in self.computations} | {
            self.entry: Executions(always=1)
        }
        for name in reversed(
            self.computations
        ):  # those that are called stand before those that call them
            here = found[name]
            for instruction in self.computations[name]:
                trips = self.trips(instruction) if instruction.opcode == "while" else 1
                times, is_open = (1, True) if trips is None else (trips, here.is_open)
                for called in filter(found.__contains__, instruction.called):
                    found[called] = _add(
                        found[called], times * here.always, times * here.conditional, is_open
                    )
                for branch in filter(found.__contains__, instruction.branches):
                    found[branch] = _add(
                        found[branch], 0, times * (here.always + here.conditional), is_open
                    )
        return found

    def run(self) -> Iterator[tuple[Instruction, Executions]]:
        """Every instruction that is reached, and how often it runs."""
        for name, executions in self.executions.items():
            if executions.always or executions.conditional:
                for instruction in self.computations[name]:
                    yield instruction, executions

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` turns; None if data decides."""
        if known := TRIPS.search(loop.rest):
            return int(known[1])
        # XLA:TPU does not say it: a counter from one number up to below another, in steps of 1.
        condition, body = (self.root(loop.attribute(name)) for name in ("condition", "body"))
        start = self._source(loop.operands[0])
        if not (_does(condition, "compare") and _does(body, "tuple") and _does(start, "tuple")):
            return None
        counter, bound = (self._source(name) for name in condition.operands)
        if "direction=LT" not in condition.rest or not _does(counter, "get-tuple-element"):
            return None
        index = int(counter.attribute("index") or 0)
        first, last = _number(self._source(start.operands[index])), _number(bound)
        step = self._source(body.operands[index])
        if first is None or last is None or not _does(step, "add"):
            return None
        return (
            max(0, last - first)
            if 1 in [_number(self._source(name)) for name in step.operands]
            else None
        )

    def root(self, computation: str | None) -> Instruction | None:
        """What a computation returns."""
        instructions = self.computations.get((computation or "").removeprefix("%"), [])
        return next((i for i in instructions if i.is_root), None)

    def _source(self, name: str) -> Instruction | None:
        """The instruction of that name, or what it copies."""
        found = self.by_name.get(name)
        while found and found.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
            found = self.by_name.get(found.operands[0])
        return found


def sizes(text: str) -> tuple[int, ...]:
    """The whole numbers in a text."""
    return tuple(int(size) for size in re.findall(r"\d+", text))


def _add(found: Executions, always: int, conditional: int, is_open: bool) -> Executions:
    is_reached = always + conditional > 0
    return Executions(
        found.always + always,
        found.conditional + conditional,
        found.is_open or (is_open and is_reached),
    )


def _does(instruction: Instruction | None, opcode: str) -> TypeGuard[Instruction]:
    return instruction is not None and instruction.opcode == opcode


def _is_called(instruction: Instruction, word: str) -> bool:
    """Whether the opcode says so or, where XLA:TPU makes a fusion of it, the name."""
    is_fusion = instruction.opcode == "fusion" and instruction.name.startswith(
        f"async-collective-{word}"
    )
    return instruction.opcode.endswith(f"-{word}") or is_fusion


def _number(instruction: Instruction | None) -> int | None:
    """The value of an integer constant."""
    found = (
        re.match(r"(-?\d+)\)", instruction.rest)
        if instruction and instruction.opcode == "constant"
        else None
    )
    return int(found[1]) if found else None

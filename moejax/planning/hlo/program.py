"""Reads the text of a compiled program: its instructions, and how often each of them runs.

XLA writes much the same for CPU, GPU and TPU: a computation is a list of instructions in the order
of execution, and calls others, which come before it. Loops say how many iterations they have, or
the condition shows it.
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
      rest: what follows the opening parenthesis: names of operands, then attributes.
      is_root: whether it is what its computation returns.
    """

    name: str
    result: str
    opcode: str
    rest: str
    is_root: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first array in the result."""
        found = SHAPE.search(self.result)
        if not found:
            return ()
        return sizes(found[2])

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it takes."""
        arguments, _, _ = self.rest.partition(")")
        return re.findall(r"%([\w.\-]+)", arguments)

    @property
    def called(self) -> list[str]:
        """Computations that run whenever it does."""
        return CALLED.findall(self.rest)

    @property
    def branches(self) -> list[str]:
        """Computations of which one runs."""
        found = BRANCHES.findall(self.rest)
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        if listed:
            found += re.findall(r"[\w.\-]+", listed[1])
        return found

    def attribute(self, name: str) -> str | None:
        """Returns the number or name after `name=`, or None."""
        found = re.search(rf"\b{name}=([^\s,}}]+)", self.rest)
        if not found:
            return None
        return found[1]


@dataclasses.dataclass(frozen=True)
class Executions:
    """How often a computation runs when the program runs once.

    Attributes:
      always: outside of branches.
      conditional: in branches, if they are taken every time.
      is_open: whether it is in a loop whose iterations depend on data, which are counted as one.
    """

    always: int = 0
    conditional: int = 0
    is_open: bool = False

    @property
    def is_reached(self) -> bool:
        """Whether it runs at all."""
        return self.always > 0 or self.conditional > 0


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
        self.by_name: dict[str, Instruction] = {}
        self.home: dict[str, str] = {}
        entry = None
        computation = None
        for line in text.splitlines():
            if header := COMPUTATION.match(line):
                is_entry, computation = header.groups()
                self.computations.setdefault(computation, [])
                entry = computation if is_entry else entry
            elif computation is not None and (found := INSTRUCTION.match(line)):
                self._add(computation, found)
        if entry is None:
            raise ValueError("no ENTRY computation: this is not the text of a compiled program")
        self.entry = entry

    def _add(self, computation: str, found: re.Match[str]) -> None:
        """Adds the instruction of a line to its computation."""
        root, name, result, opcode, rest = found.groups()
        instruction = Instruction(name, result, opcode, rest, bool(root))
        self.computations[computation].append(instruction)
        self.by_name[name] = instruction
        self.home[name] = computation

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions whose results it takes."""
        known = filter(self.by_name.__contains__, instruction.operands)
        return [self.by_name[name] for name in known]

    def done_of(self, start: Instruction) -> Instruction | None:
        """Returns the end of what an instruction starts; None if it starts nothing that goes on."""
        if not _is_called(start, "start"):
            return None
        names = [start.name]
        for name in names:  # it grows: those that pass on what was started
            for user in self._users.get(name, []):
                if _is_called(user, "done"):
                    return user
                passes_on = user.opcode in ("async-update", "get-tuple-element")
                if passes_on or self.goes_on(user.called):
                    names.append(user.name)
        return None

    def goes_on(self, computations: list[str]) -> bool:
        """Whether one of these computes while a collective goes on that was started before.

        XLA:TPU fuses such a part of a collective with the computation.
        """
        return any(name.startswith("async_collective_fusion") for name in computations)

    @functools.cached_property
    def starters(self) -> dict[str, Instruction]:
        """By instruction: what starts the computation that it is in (`async-start`)."""
        found = {}
        for start in self.by_name.values():
            if _is_called(start, "start"):
                for inner in self._instructions(start.called):
                    found[inner.name] = start
        return found

    def _instructions(self, computations: list[str]) -> list[Instruction]:
        """Returns the instructions of some computations."""
        found = []
        for name in computations:
            found += self.computations.get(name, [])
        return found

    @functools.cached_property
    def _users(self) -> dict[str, list[Instruction]]:
        """By instruction: those that take its result."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.by_name.values():
            for name in instruction.operands:
                found.setdefault(name, []).append(instruction)
        return found

    @functools.cached_property
    def executions(self) -> dict[str, Executions]:
        """How often each computation runs."""
        found = dict.fromkeys(self.computations, Executions())
        found[self.entry] = Executions(always=1)
        # Computations come before those that call them, so in reverse order all callers are known.
        for name in reversed(self.computations):
            caller = found[name]
            for instruction in self.computations[name]:
                self._count_calls(instruction, caller, found)
        return found

    def _count_calls(
        self,
        instruction: Instruction,
        caller: Executions,
        found: dict[str, Executions],
    ) -> None:
        """Adds the executions of the computations that an instruction calls."""
        trips = self.trips(instruction) if instruction.opcode == "while" else 1
        times = 1 if trips is None else trips
        of_called = Executions(
            always=times * caller.always,
            conditional=times * caller.conditional,
            is_open=caller.is_open or trips is None,
        )
        of_branch = Executions(
            conditional=of_called.always + of_called.conditional,
            is_open=of_called.is_open,
        )
        for called in filter(found.__contains__, instruction.called):
            found[called] = _sum(found[called], of_called)
        for branch in filter(found.__contains__, instruction.branches):
            found[branch] = _sum(found[branch], of_branch)

    def run(self) -> Iterator[tuple[Instruction, Executions]]:
        """Yields every instruction that is reached, and how often it runs."""
        for name, executions in self.executions.items():
            if not executions.is_reached:
                continue
            for instruction in self.computations[name]:
                yield instruction, executions

    def trips(self, loop: Instruction) -> int | None:
        """Returns the number of iterations of a `while`; None if data decides."""
        if known := TRIPS.search(loop.rest):
            return int(known[1])
        # XLA:TPU does not say it: a counter from one number up to below another, in steps of 1.
        condition = self.root(loop.attribute("condition"))
        body = self.root(loop.attribute("body"))
        start = self._source(loop.operands[0])
        if not (_does(condition, "compare") and _does(body, "tuple") and _does(start, "tuple")):
            return None
        counter_name, bound_name = condition.operands
        counter = self._source(counter_name)
        if "direction=LT" not in condition.rest or not _does(counter, "get-tuple-element"):
            return None
        index = int(counter.attribute("index") or 0)
        first = _number(self._source(start.operands[index]))
        last = _number(self._source(bound_name))
        next_counter = self._source(body.operands[index])
        if first is None or last is None or not self._adds_one(next_counter):
            return None
        return max(0, last - first)

    def _adds_one(self, instruction: Instruction | None) -> bool:
        """Whether it is a sum with the constant 1."""
        if not _does(instruction, "add"):
            return False
        terms = [_number(self._source(name)) for name in instruction.operands]
        return 1 in terms

    def root(self, computation: str | None) -> Instruction | None:
        """Returns the instruction whose result a computation returns."""
        name = (computation or "").removeprefix("%")
        for instruction in self.computations.get(name, []):
            if instruction.is_root:
                return instruction
        return None

    def _source(self, name: str) -> Instruction | None:
        """Returns the instruction of that name, or what it copies."""
        copies = ("copy", "bitcast", "copy-done", "copy-start")
        found = self.by_name.get(name)
        while found and found.opcode in copies:
            copied, *_ = found.operands
            found = self.by_name.get(copied)
        return found


def sizes(text: str) -> tuple[int, ...]:
    """Returns the integers in a text."""
    return tuple(int(size) for size in re.findall(r"\d+", text))


def _sum(found: Executions, more: Executions) -> Executions:
    """Returns the executions of a computation that two instructions call."""
    more_are_open = more.is_open and more.is_reached
    return Executions(
        always=found.always + more.always,
        conditional=found.conditional + more.conditional,
        is_open=found.is_open or more_are_open,
    )


def _does(instruction: Instruction | None, opcode: str) -> TypeGuard[Instruction]:
    return instruction is not None and instruction.opcode == opcode


def _is_called(instruction: Instruction, word: str) -> bool:
    """Whether the opcode says so or, where XLA:TPU makes a fusion of it, the name."""
    if instruction.opcode.endswith(f"-{word}"):
        return True
    return instruction.opcode == "fusion" and instruction.name.startswith(
        f"async-collective-{word}"
    )


def _number(instruction: Instruction | None) -> int | None:
    """Returns the value of an integer constant; None for whatever else."""
    if not _does(instruction, "constant"):
        return None
    found = re.match(r"(-?\d+)\)", instruction.rest)
    return int(found[1]) if found else None

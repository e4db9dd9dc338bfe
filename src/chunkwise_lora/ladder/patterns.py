"""PEFT's `rank_pattern` and `alpha_pattern`: a value for every module whose name matches a regular expression.

PEFT gives a module the value of the first key for which `re.match(rf"(.*\\.)?({key})$", name)` succeeds. Keys come from
files of unknown origin, and Python's `re` takes exponential time for some of them. Therefore keys are matched here
without backtracking, with the same result and in bounded time:

- a key of plain characters and dots (a dot matches any character) is looked up;
- any other key becomes a nondeterministic automaton that is run on the set of its states (Thompson, "Regular Expression
  Search Algorithm", 1968). This covers groups, alternatives, classes, repeats and anchors. An automaton cannot express
  look-around and back-references, so these are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cache
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

from chunkwise_lora.errors import LadderError, shown

LONGEST_KEY = 4096
"""Bound on the characters of one key."""

MOST_KEYS = 100_000
"""Bound on the keys of one field. A mixture of experts that names each of its modules has some 30,000."""

MOST_STATES = 50_000
"""Bound on the size of one field's automaton: about one per character, and more for counted repeats."""

MOST_WORK = 5_000_000
"""Bound on the steps that one field takes over all modules, a few seconds. Adapters in use take less than a million."""

_PLAIN = re.compile(r"\^?(?:\w|\\?[-.])+")


class ModulePatterns:
    """One field of `adapter_config.json` that maps regular expressions to values."""

    def __init__(self, patterns: Mapping[str, Any] | None, where: str) -> None:
        """Parse the keys. `where` names file and field in errors.

        Raises:
            LadderError: A key is not a regular expression, is too long, or needs backtracking.
        """
        self._patterns = dict(patterns or {})
        self._values = list(self._patterns.values())
        self._where = where
        self._work = 0
        self._plain: dict[_Shape, dict[str, int]] = {}
        self._automaton = _Automaton()
        if len(self._patterns) > MOST_KEYS:
            raise LadderError(f"{where} has {len(self._patterns)} keys, more than {MOST_KEYS}; merge some of them")
        for order, key in enumerate(self._patterns):
            if len(key) > LONGEST_KEY:
                raise LadderError(f"{where} has a key of {len(key)} characters, more than {LONGEST_KEY}; split it")
            if _PLAIN.fullmatch(key):
                shape, text = _Shape.of(key)
                self._plain.setdefault(shape, {}).setdefault(text, order)
            else:
                self._add_expression(order, key)

    def _add_expression(self, order: int, key: str) -> None:
        try:
            parsed = _parser.parse(key)
            if parsed.state.flags & ~re.UNICODE:
                raise re.error("flags are allowed at the start only")  # PEFT puts a prefix before the key
            self._automaton.add(order, list(parsed))
        except _UnboundedError as error:
            raise LadderError(
                f"{self._where} has '{shown(key)}', which cannot be matched in bounded time ({error}); write the "
                "names of the modules, or a simpler expression"
            ) from None
        except (re.error, OverflowError, RecursionError) as error:
            raise LadderError(
                f"{self._where} has '{shown(key)}', which is not a regular expression ({error}); correct it"
            ) from None

    def get(self, name: str, default: Any) -> Any:
        """Return the value of the module called `name`, or `default` if no key matches.

        Raises:
            LadderError: Matching takes too many steps.
        """
        found, steps = self._automaton.run(name, MOST_WORK - self._work)
        self._spend(steps)
        first = min([*found, *self._fitting_plain(name)], default=None)
        if first is None:
            return self._patterns.get(name, default)  # as in PEFT: the name itself may be a key
        return self._values[first]

    def _fitting_plain(self, name: str) -> Iterator[int]:
        for shape, keys in self._plain.items():
            self._spend(1)
            start = len(name) - shape.length
            if start < 0 or (start > 0 and (shape.anchored or name[start - 1] != ".")):
                continue
            self._spend(len(shape.wild))
            end = list(name[start:])
            for place in shape.wild:
                end[place] = "."
            order = keys.get("".join(end))
            if order is not None:
                yield order

    def _spend(self, steps: int) -> None:
        self._work += steps
        if self._work > MOST_WORK:
            raise LadderError(
                f"{self._where} takes too long to match; write the names of the modules, or simpler expressions"
            )


class _Shape(NamedTuple):
    """What plain keys that are looked up together have in common."""

    length: int
    anchored: bool
    """The key starts with ^."""
    wild: tuple[int, ...]
    """Places at which any character fits."""

    @classmethod
    def of(cls, key: str) -> tuple[_Shape, str]:
        """Return a plain key's shape, and the key without ^ and backslashes."""
        characters = re.findall(r"\\?.", key.removeprefix("^"))
        wild = tuple(place for place, character in enumerate(characters) if character == ".")
        return cls(len(characters), key.startswith("^"), wild), "".join(character[-1] for character in characters)


class _UnboundedError(Exception):
    """The expression cannot become a small automaton."""


class _State(NamedTuple):
    takes: Callable[[str], bool] | None
    """Whether a character leads from here to `follows`; None: no character is needed."""
    follows: tuple[int, ...]
    only: str = ""
    """If not empty, `follows` can be reached only at this place of the name: "start" or "end"."""


class _Automaton:
    """Finds the keys that match a name, or the part of the name after one of its dots."""

    def __init__(self) -> None:
        self._states: list[_State] = []
        self._size = 0
        self._starts: list[int] = []
        self._keys: dict[int, int] = {}
        """The accepting state of each key, and the key's order."""
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def add(self, order: int, items: Sequence[Any]) -> None:
        """Add the key whose parsed expression is `items`.

        Raises:
            _UnboundedError: It is too large, or an automaton cannot express it.
        """
        end = self._add(_State(None, ()))
        self._keys[end] = order
        self._starts.append(self._sequence(items, end))

    def run(self, name: str, most: int) -> tuple[list[int], int]:
        """Return the orders of the keys that match, and the number of steps. It stops soon after `most` steps."""
        if not self._starts:
            return [], 0
        active, steps = self._reach(set(self._starts), "start" if name else "start end")
        for character in name:
            following = self._steps.get((active, character))
            steps += 1
            if following is None:
                following, visited = self._step(active, character)
                steps += 4 * visited  # the next time, the step is looked up
                self._steps[active, character] = following
            active = following
            if steps > most:
                return [], steps
        final, visited = self._reach(active, "end")
        return [self._keys[state] for state in final & self._keys.keys()], steps + visited

    def _step(self, active: frozenset[int], character: str) -> tuple[frozenset[int], int]:
        taken = set(self._starts) if character == "." else set()
        for number in active:
            state = self._states[number]
            if state.takes is not None and state.takes(character):
                taken.update(state.follows)
        following, visited = self._reach(taken, "")
        return following, len(active) + visited

    def _reach(self, states: AbstractSet[int], place: str) -> tuple[frozenset[int], int]:
        """Return all states that can be reached from `states` without a character, and their number."""
        found, stack = set(states), list(states)
        while stack:
            state = self._states[stack.pop()]
            if state.takes is None and (not state.only or state.only in place):
                for number in state.follows:
                    if number not in found:
                        found.add(number)
                        stack.append(number)
        return frozenset(found), len(found)

    def _add(self, state: _State) -> int:
        self._grow(1)
        self._states.append(state)
        return len(self._states) - 1

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > MOST_STATES:
            raise _UnboundedError("it is too large")

    def _sequence(self, items: Sequence[Any], end: int) -> int:
        """Add states for `items`, and return the state from which they lead to the state `end`."""
        for kind, value in reversed(items):
            end = self._item(kind, value, end)
        return end

    def _item(self, kind: Any, value: Any, end: int) -> int:
        if kind in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
            self._grow(len(value) if kind is sre.IN else 0)
            return self._add(_State(_characters(kind, value), (end,)))
        if kind is sre.SUBPATTERN and not value[1] and not value[2]:
            return self._sequence(value[3], end)
        if kind is sre.BRANCH:
            return self._add(_State(None, tuple(self._sequence(branch, end) for branch in value[1])))
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):  # greedy or lazy changes what matches, not whether
            least, most, body = value
            return self._repeat(least, most, body, end)
        if kind is sre.AT and value in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
            return self._add(_State(None, (end,), "start"))
        if kind is sre.AT and value in (sre.AT_END, sre.AT_END_STRING):
            return self._add(_State(None, (end,), "end"))
        raise _UnboundedError(f"it uses {str(value if kind is sre.AT else kind).lower()}")

    def _repeat(self, least: int, most: int, body: Sequence[Any], end: int) -> int:
        if most is sre.MAXREPEAT:
            loop = self._add(_State(None, ()))
            self._states[loop] = _State(None, (self._copy(body, loop), end))
            end = loop
        else:
            for _ in range(most - least):
                end = self._add(_State(None, (self._copy(body, end), end)))
        for _ in range(least):
            end = self._copy(body, end)
        return end

    def _copy(self, body: Sequence[Any], end: int) -> int:
        self._grow(1)  # a copy of an empty body adds no state
        return self._sequence(body, end)


_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_NOT_DIGIT: lambda character: not character.isdecimal(),
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_NOT_SPACE: lambda character: not character.isspace(),
    sre.CATEGORY_WORD: lambda character: character.isalnum() or character == "_",
    sre.CATEGORY_NOT_WORD: lambda character: not (character.isalnum() or character == "_"),
}


def _characters(kind: Any, value: Any) -> Callable[[str], bool]:
    """Return a function that tells whether one item of an expression matches a character."""
    if kind is sre.LITERAL:
        return chr(value).__eq__
    if kind is sre.NOT_LITERAL:
        return chr(value).__ne__
    if kind is sre.ANY:
        return "\n".__ne__
    negated = value[0][0] is sre.NEGATE
    ranges = [(item, item) if tag is sre.LITERAL else item for tag, item in value if tag in (sre.LITERAL, sre.RANGE)]
    categories = [_CATEGORIES[item] for tag, item in value if tag is sre.CATEGORY]

    @cache
    def takes(character: str) -> bool:
        code = ord(character)
        inside = any(low <= code <= high for low, high in ranges) or any(fits(character) for fits in categories)
        return inside is not negated

    return takes

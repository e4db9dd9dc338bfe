"""Refuses regular expressions for which Python's `re` may take exponential time, before PEFT runs them.

PEFT matches `rank_pattern`, `alpha_pattern` and `target_modules` of `adapter_config.json` with `re`. This package
matches the first two without backtracking (`patterns`). Where PEFT itself loads an adapter, as a baseline, its
expressions must be harmless.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from chunkwise_lora.errors import LadderError, shown
from chunkwise_lora.ladder.peft_files import CONFIG_NAME
from chunkwise_lora.ladder.reading import read_json

FIELDS = ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
"""Fields of `adapter_config.json` in which PEFT reads regular expressions."""

MOST_REPEATS = 4
"""Bound on the repeats of varying length that follow each other in one expression. With n of them, a name of k
characters takes up to k^n steps. Adapters in use have up to 4."""

PLAIN = re.compile(r"[\w.]{1,512}")
"""Matches names of modules, which hold no repeats."""

LONGEST = 4096
"""Bound on the characters of one expression."""


def refuse_backtracking(adapter: str | Path) -> None:
    """Refuse an adapter with an expression in `adapter_config.json` that could keep PEFT busy for hours.

    An adapter on the hub is not checked, because PEFT downloads it later.

    Raises:
        LadderError: An expression has a repeat or alternatives inside a repeat, a back-reference or too many repeats,
            or is not a regular expression. The error names file and field.
    """
    path = Path(adapter) / CONFIG_NAME
    if path.is_file():
        refuse_backtracking_in(read_json(path), str(path))


def refuse_backtracking_in(config: Mapping[str, Any], where: str) -> None:
    """Do the same as `refuse_backtracking`, for the fields of a config that `where` names in errors."""
    for field in FIELDS:
        for expression in _expressions(config.get(field)):
            try:
                _check(expression)
            except (ValueError, re.error, OverflowError, RecursionError) as error:
                raise LadderError(
                    f"{where}: {field} has '{shown(expression)}', for which PEFT could take hours or fail ({error}); "
                    "write the names of the modules, or a simpler expression"
                ) from None


def _expressions(value: Any) -> Iterator[str]:
    """Yield the strings of a field: the field itself, the entries of its list, or the keys of its table."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        yield from (entry for entry in value if isinstance(entry, str))


def _check(expression: str) -> None:
    if PLAIN.fullmatch(expression):
        return
    if len(expression) > LONGEST:
        raise ValueError(f"{len(expression)} characters, more than {LONGEST}")
    repeats = _count_repeats(_parser.parse(expression), inside=False)
    if repeats > MOST_REPEATS:
        raise ValueError(f"{repeats} repeats, more than {MOST_REPEATS}")


def _count_repeats(items: Any, inside: bool) -> int:
    """Count the repeats of varying length that follow each other, or are together in a look-around.

    `inside` such a repeat, other repeats, alternatives and look-arounds are refused.
    """
    total = in_look_around = 0
    for operation, argument in items:
        if operation in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
            least, most, repeated = argument
            varies = most != least and most > 1
            if inside and most != least:
                raise ValueError("a repeat inside a repeat")
            total += varies + _count_repeats(repeated, inside or varies)
        elif operation is sre.BRANCH:
            if inside:
                raise ValueError("alternatives inside a repeat")
            total += max(_count_repeats(branch, inside) for branch in argument[1])
        elif operation is sre.SUBPATTERN:
            total += _count_repeats(argument[-1], inside)
        elif operation in (sre.ASSERT, sre.ASSERT_NOT):
            if inside:
                raise ValueError("a look-around inside a repeat")
            in_look_around = max(in_look_around, _count_repeats(argument[1], inside))
        elif operation is sre.ATOMIC_GROUP:
            total += _count_repeats(argument, inside)
        elif operation in (sre.GROUPREF, sre.GROUPREF_EXISTS):
            raise ValueError("a reference to a group")
    return max(total, in_look_around)

"""rank_pattern and alpha_pattern have the same meaning as in PEFT, and no key can hang the reader."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from chunkwise_lora import LadderError
from chunkwise_lora.ladder.patterns import LONGEST_KEY, MOST_KEYS, ModulePatterns

ATOMS = [
    "a",
    "b",
    "_",
    "0",
    r"\.",
    ".",
    r"\d",
    r"\w",
    r"\s",
    r"\D",
    "[ab]",
    "[^a]",
    "[0-9.]",
    "^",
    "$",
    r"\A",
    r"\Z",
    "-",
]
QUANTIFIERS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,}", "{,1}"]

expressions = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map("".join),
        st.tuples(inner, inner).map("|".join),
        inner.map(lambda one: f"({one})"),
        st.tuples(inner, st.sampled_from(QUANTIFIERS)).map(lambda parts: f"(?:{parts[0]}){parts[1]}"),
    ),
    max_leaves=8,
)


def value_of_peft(patterns: dict[str, Any], name: str) -> Any:
    return patterns.get(get_pattern_key(list(patterns), name), "default")


@given(st.lists(expressions, unique=True, max_size=4), st.lists(st.text("ab0_.-", max_size=8), min_size=1, max_size=8))
@settings(deadline=None, max_examples=300)
def test_a_module_gets_the_value_that_peft_gives_it(keys: list[str], names: list[str]) -> None:
    try:
        for key in keys:
            re.compile(key)
    except re.error:
        assume(False)
    patterns = {key: order for order, key in enumerate(keys)}
    ours = ModulePatterns(patterns, "file: field")
    assert [ours.get(name, "default") for name in names] == [value_of_peft(patterns, name) for name in names]


MODULES = [f"model.layers.{layer}.{block}" for layer in range(24) for block in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj"],
        ["up_proj", "q_proj"],
        ["proj"],
        ["layers.1.self_attn.q_proj", "q_proj"],
        [r"layers\.1\.self_attn\.q_proj"],
        ["^model.layers.1.self_attn.q_proj"],
        ["^layers.1.self_attn.q_proj"],
        [r"model\.layers\.([0-9]|1[0-9])\.mlp\..*"],
        [r".*\.(q|k|v)_proj", r"layers\.[3-5].*"],
        [r".*layers\.(?:7|8)\.mlp\.up_proj$"],
        [r"(?P<layer>\d+)\.mlp\.up_proj"],
        ["layers.1"],
        [""],
        MODULES,
        [re.escape(name) for name in MODULES[1:]],
    ],
)
def test_usual_keys(keys: list[str]) -> None:
    patterns = {key: order for order, key in enumerate(keys)}
    ours = ModulePatterns(patterns, "file: field")
    assert [ours.get(name, "default") for name in MODULES] == [value_of_peft(patterns, name) for name in MODULES]


SLOW = {
    "a repeat of repeats": {"([a-z0-9_.]+)+!": 1},
    "alternatives that overlap": {"(a|a|.)*!": 1},
    "many stars": {"(.*a){20}": 1},
    "stars in a row": {".*.*.*.*.*.*x": 1},
    "many optional parts": {"(.?){4000}": 1},
    "a count of counts": {"((a{60}){60}){60}": 1},
    "a count of nothing": {"((){65535}){65535}": 1},
    "a huge count": {"a{4000000000}": 1},
    "large classes": {"(?:[" + "a-bA-Z0-9" * 100 + "]?){200}" + str(n): 1 for n in range(40)},
    "deep": {"(" * 2000 + "a" + ")" * 2000: 1},
    "many": {f"(a|b){number}.*x.*": 1 for number in range(500)},
    "many shapes": {f"{number:013b}".replace("0", "."): 1 for number in range(5_000)},
}


@pytest.mark.parametrize("patterns", SLOW.values(), ids=SLOW)
def test_no_key_takes_long(patterns: dict[str, int]) -> None:
    names = ["a" * 200 + str(number) for number in range(200)] + [".".join("ab" * 30) + f".{n}" for n in range(200)]
    start = time.process_time()
    with suppress(LadderError):
        ours = ModulePatterns(patterns, "file: field")
        for name in names:
            ours.get(name, 0)
    assert time.process_time() - start < 20  # 5 seconds, with a margin for slow machines


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("(", "not a regular expression"),
        ("a)(b", "not a regular expression"),
        ("(?i)a", "flags"),
        ("(?i:a)", "bounded time"),
        ("(?=a).*", "bounded time"),
        (r"(a)\1", "bounded time"),
        (r"\bq_proj", "bounded time"),
        ("(?>a*)b", "bounded time"),
        ("a*+b", "bounded time"),
        ("a{99999}", "too large"),
        ("a" * (LONGEST_KEY + 1), "characters"),
        ("\x1b[31m(", r"\\x1b\[31m"),
    ],
)
def test_a_key_that_cannot_be_matched_is_refused_by_field(key: str, message: str) -> None:
    with pytest.raises(LadderError, match=rf"^file: field.*{message}"):
        ModulePatterns({key: 1}, "file: field")


def test_too_many_keys_are_refused() -> None:
    with pytest.raises(LadderError, match=rf"{MOST_KEYS}"):
        ModulePatterns(dict.fromkeys(map(str, range(MOST_KEYS + 1)), 1), "file: field")

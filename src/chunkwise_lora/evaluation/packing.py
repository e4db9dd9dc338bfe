"""Packs prompts with their answers into blocks of tokens, for calibration."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice, takewhile
from typing import Any

from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.evaluation.data import NEW_TOKENS, Example, encode

PACKED_SHARE = 0.8
"""Share of the examples that fit into a block."""


def common_beginning(prompts: Iterable[Sequence[int]]) -> int:
    """How many tokens all prompts begin with in common. At least the last token of each prompt is not counted."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def fitting(
    examples: Sequence[Example], tokenizer: Any, longest: int, tokens: int | None, say: Callable[[str], object]
) -> list[Example]:
    """The examples that `packed` needs: those that fit into a block, and not more of them than `tokens` ask for.

    Args:
        examples: Examples, in the order of their file.
        tokenizer: The base model's tokenizer.
        longest: Largest length of a block, in tokens. A prompt needs room for its answer.
        tokens: About how many tokens of prompts are kept: whole topics, which are evenly spread; None keeps all.
        say: Is told which examples are left out because of their length.

    Raises:
        ChunkWiseError: No example fits.
    """
    prompts = tokenizer([one.prompt for one in examples], verbose=False).input_ids
    rooms = [longest - (1 if one.references else NEW_TOKENS) for one in examples]
    long = [i for i, room in enumerate(rooms) if len(prompts[i]) > room]
    if long:
        shown = [f"number {i + 1} ({len(prompts[i]):,} tokens, {_shortened(examples[i].prompt)})" for i in long[:3]]
        more = [f"{len(long) - 3} more"] if len(long) > 3 else []
        note = (
            f"{len(long)} of {len(examples)} prompts do not fit into a block of {longest} tokens with their answers: "
            f"{', '.join(shown + more)}"
        )
        if len(long) == len(examples):
            raise ChunkWiseError(f"{note}; give longer blocks")
        say(f"{note}. They are left out.")
    topics: dict[str, list[int]] = {}
    for i in sorted(set(range(len(examples))) - set(long)):
        topics.setdefault(examples[i].topic, []).append(i)
    total = 0
    for topic, of_topic in topics.items():
        packed_prompts = [prompts[i] for i in of_topic for _ in examples[i].references or [""]]
        repeated = _repeated(topic, packed_prompts, tokenizer)
        total += sum(map(len, packed_prompts)) - repeated * (len(packed_prompts) - 1)
    kept = list(topics.values())
    if tokens is not None and total > tokens:
        count = max(1, len(kept) * tokens // total)
        kept = [kept[i * len(kept) // count] for i in range(count)]
    return [examples[i] for i in sorted(chain.from_iterable(kept))]


def _shortened(prompt: str) -> str:
    return repr(textwrap.shorten(prompt, 40, placeholder="..."))


def _repeated(topic: str, prompts: Sequence[Sequence[int]], tokenizer: Any) -> int:
    """How many tokens of the prompts of a topic stand in a block only once: those of the topic's text, if all prompts
    begin with it and go on differently."""
    if all(prompt == prompts[0] for prompt in prompts):
        return 0
    return min(common_beginning(prompts), len(tokenizer(topic).input_ids))


def packed(
    examples: Sequence[Example], tokenizer: Any, longest: int, *, exact: bool = False
) -> tuple[list[int], list[bool], int]:
    """Pack all prompts and answers into blocks of equal length, for calibration.

    Each example begins a block, as in generation. But if all prompts of a topic begin with its text, such as a
    paragraph with several questions, the text stands in a block once, and its questions and answers follow. Other
    examples fill the rest of a block; answers of other topics are not scored there. Topics are shuffled, and the
    examples of a topic stay together, so that the last blocks have other topics than the first ones.

    Args:
        examples: Examples; at least one of them must have an answer.
        tokenizer: The base model's tokenizer.
        longest: Largest length of a block, in tokens.
        exact: Blocks have this length. By default they are shorter if most examples are.

    Returns:
        Token ids of all blocks; for each token whether its prediction is scored, because the next token belongs to an
        answer of the block's topic; the length of a block.
    """
    topics: dict[str, list[_Encoded]] = {}
    for one in examples:
        for reference in one.references:
            topics.setdefault(one.topic, []).append(encode(tokenizer, one.prompt, reference))
    shuffled = [
        _Topic(pairs, _repeated(topic, [prompt for prompt, _ in pairs], tokenizer)) for topic, pairs in topics.items()
    ]
    random.Random(0).shuffle(shuffled)
    lengths = sorted(chain.from_iterable(topic.lengths for topic in shuffled))
    length = longest if exact else min(longest, lengths[int(len(lengths) * PACKED_SHARE)])
    blocks: list[tuple[int, bool]] = []
    for i, topic in enumerate(shuffled):
        others = [*shuffled[i + 1 :], *reversed(shuffled[:i]), topic]
        for first in topic.firsts(length):
            fill = cycle((token, False) for other in others for token, _ in other.tokens())
            blocks += islice(chain(topic.tokens(first), fill), length)
    return [token for token, _ in blocks], [scored for _, scored in blocks], length


_Encoded = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer."""


@dataclass(frozen=True)
class _Topic:
    """The examples of one topic."""

    pairs: list[_Encoded]
    repeated: int
    """Tokens at the beginning of the prompts that stand in a block only once."""

    @property
    def lengths(self) -> list[int]:
        """The tokens that a block needs for each example: its own, or those of all if they share a beginning."""
        alone = [len(prompt) + len(answer) for prompt, answer in self.pairs]
        return [sum(alone) - self.repeated * (len(alone) - 1)] * len(alone) if self.repeated else alone

    def firsts(self, length: int) -> Iterator[int]:
        """The examples that blocks of `length` tokens begin with, so that each example stands whole in one block."""
        room = 0
        for i, (prompt, answer) in enumerate(self.pairs):
            room -= len(prompt) + len(answer) - self.repeated
            if not self.repeated or room < 0:
                room = length - len(prompt) - len(answer)
                yield i

    def tokens(self, first: int = 0) -> Iterator[tuple[int, bool]]:
        """The token ids of all examples, the one at `first` first, each with whether the next token is of an answer."""
        for i, (prompt, answer) in enumerate([*self.pairs[first:], *self.pairs[:first]]):
            rest = prompt[self.repeated if i else 0 :]
            ids = rest + answer
            yield from ((token, len(rest) <= following < len(ids)) for following, token in enumerate(ids, 1))

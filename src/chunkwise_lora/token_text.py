"""The text of token ids, one by one."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token. A character that consists of several tokens belongs to the last of them.

    Args:
        tokenizer: A tokenizer of transformers, or a model of llama-cpp-python, such as `ChunkWiseLlama`.
        tokens: Token ids of one text.
    """
    text_of = new_texts(tokenizer, skip_special_tokens=False)
    return [text_of(token) for token in tokens]


def new_texts(tokenizer: Any, skip_special_tokens: bool) -> Callable[[int], str]:
    """A function that returns the text which the next token of a text completes; see `token_texts`."""
    if hasattr(tokenizer, "detokenize"):  # of llama-cpp-python
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        special = not skip_special_tokens
        return lambda token: decoder.decode(tokenizer.detokenize([token], special=special))
    if hasattr(tokenizer, "backend_tokenizer"):
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        return lambda token: stream.step(tokenizer.backend_tokenizer, token) or ""
    return lambda token: tokenizer.decode([token], skip_special_tokens=skip_special_tokens)

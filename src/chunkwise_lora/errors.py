"""The errors that users see. A message says what was wrong, where, and what to do."""

from __future__ import annotations


class ChunkWiseError(Exception):
    """Any refusal of this package.

    Whatever a message quotes, from files or from the command line, it stays harmless on a terminal: characters that
    are not printable are escaped, line breaks aside.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__("\n".join(escaped(line) for line in str(message).split("\n")))


class ConfigError(ChunkWiseError):
    """A knob has an impossible value."""


class LadderError(ChunkWiseError):
    """An adapter or a ladder cannot be read, built or written."""


class EngineError(ChunkWiseError):
    """A model, a ladder and a call do not fit together."""


def first_line(error: BaseException) -> str:
    """What another library's error says, without its advice on further lines."""
    return str(error).partition("\n")[0]


def escaped(text: str) -> str:
    """`text` with an escape sequence in place of every character that is not printable.

    That covers control characters, terminal sequences, line breaks, overrides of the writing direction and lone
    surrogates.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object, limit: int = 160) -> str:
    """A string from a file for people to read: on one line, escaped, the middle of a long one left out."""
    text = str(value)
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
    return escaped(text)

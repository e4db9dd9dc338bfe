"""The errors that users see. A message says what was wrong, where, and what to do."""

from __future__ import annotations


class ChunkWiseError(Exception):
    """Base class of the errors that this package raises.

    A message may quote text from files or from the command line. Characters that are not printable are escaped, except
    line breaks, so a message cannot control the terminal that shows it.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__("\n".join(escaped(line) for line in str(message).split("\n")))


class ConfigError(ChunkWiseError):
    """A setting has an impossible value."""


class LadderError(ChunkWiseError):
    """An adapter or a ladder cannot be read, built or written."""


class EngineError(ChunkWiseError):
    """A model, a ladder and the arguments of a call do not fit together, or are not supported."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, without the advice on later lines."""
    return str(error).partition("\n")[0]


def escaped(text: str) -> str:
    """Return `text` with an escape sequence in place of every character that is not printable.

    These are control characters, terminal sequences, line breaks, overrides of the writing direction and lone
    surrogates.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def escaped_lines(text: str) -> str:
    """`text` in which all unprintable characters except line breaks and tabs are escaped.

    Models can generate characters that would move the cursor or change the colours of a terminal.
    """
    return "".join(c if c in "\n\t" else escaped(c) for c in text)


def shown(value: object, limit: int = 160) -> str:
    """Return a value from a file as one printable line. If it exceeds `limit` characters, the middle is left out."""
    text = str(value)
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
    return escaped(text)

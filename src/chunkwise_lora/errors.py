"""The errors that users see. A message says what was wrong, where, and what to do."""


class ChunkWiseError(Exception):
    """Any refusal of this package."""


class ConfigError(ChunkWiseError):
    """A knob has an impossible value."""


class LadderError(ChunkWiseError):
    """An adapter or a ladder cannot be read, built or written."""


class EngineError(ChunkWiseError):
    """A model, a ladder and a call do not fit together."""


def first_line(error: BaseException) -> str:
    """What another library's error says, without its advice on further lines."""
    return str(error).partition("\n")[0]

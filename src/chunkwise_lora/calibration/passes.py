"""The passes in which known tokens are read with the same predictions as if they ran one by one, as in generation."""

from __future__ import annotations

from collections.abc import Sequence

from chunkwise_lora.method.config import ChunkWiseConfig, LevelKVPolicy


def passes_as_generated(config: ChunkWiseConfig, columns: int, read: Sequence[int] = (0,)) -> list[int]:
    """Cut the next tokens into the fewest passes whose predictions are those of a run token by token.

    A plan without entropies is the same in any passes. A KV decision acts at the end of a pass. If all tokens have one
    level, and chunks are only stored in another precision when they close, a pass must end after the first token of
    every chunk but the first, because that token closes the chunk before.

    Args:
        config: The policy.
        columns: Number of tokens of each sequence that are read.
        read: (sequences,) the number of tokens of each sequence that were read before.

    Returns:
        The numbers of tokens of the passes; their sum is `columns`.
    """
    if not columns:
        return []
    if not config.kv_cache.acts and not config.reads_entropy:
        return [columns]
    [*others, level] = config.kv_cache.levels
    if others or level != LevelKVPolicy(precision=level.precision):
        return [1] * columns
    longest = config.chunking.max_length
    closing = {place for before in read for place in range(-before % longest, columns, longest) if before + place}
    ends = sorted({columns, *(place + 1 for place in closing)})
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]

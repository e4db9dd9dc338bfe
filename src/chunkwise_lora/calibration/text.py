"""Text for calibration: blocks of token ids, and which of their tokens are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from chunkwise_lora.calibration.config import CalibrationConfig
from chunkwise_lora.errors import ChunkWiseError

MIN_BLOCKS = 24
"""Fewest blocks of text that calibration accepts. Fewer would be too little to learn from and to check on."""
MIN_HELD_BLOCKS = 4
"""Fewest held-back blocks, for choice and check together."""
HELD_PREDICTIONS = 1 / 32
"""Scored predictions of the held-back text, as a share of the tokens to learn from. Where few predictions are scored,
more text is held back for this, but at most `MOST_HELD` of it."""
MOST_HELD = 0.25


def block_length(model: PreTrainedModel, longest: int) -> int:
    """`longest` tokens, or the number of positions of the model if that is lower."""
    return min(longest, getattr(model.config.get_text_config(), "max_position_embeddings", longest))


@dataclass(frozen=True)
class TokenBlocks:
    """Sequences of equally many token ids, and which of their tokens are scored. Both lie on the CPU."""

    tokens: Tensor
    """(blocks, length) token ids."""
    scored: Tensor
    """(blocks, length) bool: whether the prediction after this token is scored."""

    @classmethod
    def all_scored(cls, tokens: Tensor) -> TokenBlocks:
        """Blocks of `tokens` (blocks, length) in which every token is scored."""
        return cls(tokens, torch.ones_like(tokens, dtype=torch.bool))

    @classmethod
    def cut(cls, tokens: Sequence[int] | Tensor, length: int, scored: Sequence[bool] | None = None) -> TokenBlocks:
        """Cut a text into blocks of `length` tokens. Tokens at the end that do not fill a block are left out.

        Args:
            tokens: (n,) token ids of the text.
            length: Tokens per block.
            scored: (n,) whether the prediction after each token is scored; by default all are.

        Raises:
            ChunkWiseError: `scored` and `tokens` have different lengths.
        """
        if scored is not None and len(scored) != len(tokens):
            raise ChunkWiseError(
                f"the text has {len(tokens)} tokens, but `scored` has {len(scored)} entries; give one entry per token"
            )
        ids, rows = torch.as_tensor(tokens, device="cpu"), len(tokens) // length
        mask = torch.ones_like(ids) if scored is None else torch.as_tensor(scored)
        return cls(*(one[: rows * length].view(rows, length) for one in (ids, mask.bool())))

    @property
    def length(self) -> int:
        """Tokens per block."""
        return self.tokens.shape[1]

    @property
    def scored_predictions(self) -> Tensor:
        """(blocks, length - 1) bool: `scored`, without the last token of each block, whose next token is unknown."""
        return self.scored[:, :-1]

    @property
    def has_next(self) -> Tensor:
        """(scored,) bool: whether the next token of each scored token is known, as it is not at the end of a block."""
        return (torch.arange(self.length) < self.length - 1).expand_as(self.scored)[self.scored]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> TokenBlocks:
        return TokenBlocks(self.tokens[rows], self.scored[rows])

    def __add__(self, other: TokenBlocks) -> TokenBlocks:
        return TokenBlocks(torch.cat([self.tokens, other.tokens]), torch.cat([self.scored, other.scored]))

    @property
    def with_scored_predictions(self) -> TokenBlocks:
        """The blocks in which at least one prediction is scored."""
        return self[self.scored_predictions.any(1)]

    @property
    def reversed(self) -> TokenBlocks:
        """The last block first."""
        return TokenBlocks(self.tokens.flip(0), self.scored.flip(0))

    def count_with(self, predictions: float) -> int:
        """How many of the first blocks hold so many scored predictions, or one more than there are."""
        return int((self.scored_predictions.sum(1).cumsum(0) < predictions).sum()) + 1

    def split(self, size: int) -> list[TokenBlocks]:
        """Batches of `size` blocks; the last batch may be smaller."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def evenly(self, count: int) -> TokenBlocks:
        """At most `count` of the blocks, evenly spread over the text."""
        return self[np.linspace(0, len(self) - 1, min(len(self), count)).astype(int)]

    def random_batches(self, count: int, tokens: int, seed: int) -> list[TokenBlocks]:
        """`count` random batches of about `tokens` tokens each, and of at least one block."""
        generator = torch.Generator().manual_seed(seed)
        size = (count, max(1, tokens // self.length))
        return [self[rows] for rows in torch.randint(len(self), size, generator=generator)]


@dataclass(frozen=True)
class CalibrationText:
    """A text in three parts: one to learn from, and two that are held back."""

    learning: TokenBlocks
    """The basis, the costs and the estimator are learned from these blocks."""
    choice: TokenBlocks
    """Settings are chosen on these blocks."""
    check: TokenBlocks
    """The result is checked on these blocks; nothing else uses them."""

    @classmethod
    def split(cls, text: TokenBlocks, held: TokenBlocks | None, config: CalibrationConfig) -> CalibrationText:
        """Split `text`, or `text` and `held`, into the three parts.

        Blocks without a scored prediction are left out. Without `held`, the end of `text` is held back.

        Raises:
            ChunkWiseError: `text` or `held` has too few blocks.
        """
        text, length = text.with_scored_predictions, text.length
        if len(text) < MIN_BLOCKS:
            raise ChunkWiseError(
                f"{len(text) * length} tokens are too few to calibrate on (only whole blocks of {length} tokens with "
                f"scored tokens are used); give at least {MIN_BLOCKS * length}, or better several times as many"
            )
        most = config.held_tokens // length
        wanted = HELD_PREDICTIONS * min(config.tokens, len(text) * length)
        if held is None:
            count = max(MIN_HELD_BLOCKS, min(round(len(text) * config.held_share), most))
            count = max(count, min(text.reversed.count_with(wanted), int(len(text) * MOST_HELD)))
            learning, held = text[:-count], text[-count:]
        else:
            held = held.with_scored_predictions
            learning, held = text, held[: max(MIN_HELD_BLOCKS, most, held.count_with(wanted))]
            if len(held) < MIN_HELD_BLOCKS:
                raise ChunkWiseError(
                    f"{len(held) * length} held tokens are too few to choose settings and to check (only whole blocks "
                    f"of {length} tokens with scored tokens are used); give at least {MIN_HELD_BLOCKS * length}, or "
                    "better several times as many"
                )
        half = len(held) // 2
        return cls(learning.evenly(max(1, config.tokens // length)), held[:-half], held[-half:])

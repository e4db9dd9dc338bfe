"""What all steps of one calibration share: the model, the text, the settings and the progress."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from chunkwise_lora.calibration.config import CalibrationConfig
from chunkwise_lora.calibration.log_probabilities import DEFAULT, ChunkWiseModel, log_probabilities
from chunkwise_lora.calibration.text import CalibrationText, TokenBlocks
from chunkwise_lora.calibration.unfinished import Unfinished
from chunkwise_lora.calibration.work import Progress
from chunkwise_lora.ladder import RankLadder

GIVEN = "given"
"""Name, in the model, of the ladder as it was given. Every divergence is measured from its full rank."""
PASS_ELEMENTS = 2**24
"""Largest number of log-probabilities (scored tokens times vocabulary) of one pass: 64 MB in float32."""
STEP_ELEMENTS = 2**26
"""The same for all passes of sequences that run as in generation. Longer batches are faster, because each pass reads
all weights of the model."""
PASS_TOKENS = 2048
"""Largest number of tokens of one pass, of which the model keeps activations."""


@dataclass(frozen=True)
class CalibrationRun:
    """What all steps of one calibration share."""

    base: PreTrainedModel
    given: RankLadder
    """The ladder that is calibrated, as it was given."""
    text: CalibrationText
    config: CalibrationConfig
    progress: Progress
    unfinished: Unfinished

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the model."""
        return int(self.base.config.get_text_config().vocab_size)

    @property
    def batch(self) -> int:
        """Blocks per pass."""
        return self._blocks(PASS_ELEMENTS)

    @property
    def step_batch(self) -> int:
        """Blocks that run together as in generation."""
        return self._blocks(STEP_ELEMENTS)

    def _blocks(self, elements: int) -> int:
        """Blocks with `elements` log-probabilities, but at most `PASS_TOKENS` tokens."""
        learning = self.text.learning
        scored = math.ceil(int(learning.scored.sum()) / len(learning))
        return max(1, min(elements // (scored * self.vocab_size), PASS_TOKENS // learning.length))

    def attach(self, ladder: RankLadder) -> ChunkWiseModel:
        """The model with `ladder` attached, and with the given ladder to compare with."""
        return ChunkWiseModel(self.base, {DEFAULT: ladder, GIVEN: self.given})

    def batches(self, blocks: TokenBlocks, stage: str) -> list[TokenBlocks]:
        """Begin a stage, and return batches of `blocks` for one pass each."""
        self.progress.begin(stage)
        return blocks.split(self.batch)

    def batches_by_step(self, blocks: TokenBlocks, stage: str) -> list[TokenBlocks]:
        """Begin a stage, and return batches of `blocks` that run as in generation."""
        self.progress.begin(stage)
        return blocks.split(self.step_batch)


def given_full_rank(model: ChunkWiseModel, blocks: TokenBlocks) -> Tensor:
    """(scored, vocabulary) log-probabilities of the given ladder at full rank, of a model from `attach`."""
    return log_probabilities(model, blocks.tokens, adapter=GIVEN, scored=blocks.scored)

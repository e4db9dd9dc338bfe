"""Answers that an adapter generates itself, to calibrate on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from chunkwise_lora.calibration.log_probabilities import ChunkWiseModel
from chunkwise_lora.evaluation.data import NEW_TOKENS, Example
from chunkwise_lora.evaluation.prompts import batches_of, first_lines, prompt_inputs, set_padding
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.config import ChunkWiseConfig


@dataclass(frozen=True)
class AnswerGenerator:
    """Generates answers greedily with an adapter at full rank."""

    base: PreTrainedModel
    ladder: RankLadder
    tokenizer: Any
    new_tokens: int = NEW_TOKENS
    """Largest number of tokens of an answer."""
    batch: int = 64
    """Prompts that run together."""

    def __call__(
        self,
        examples: Sequence[Example],
        track: Callable[[Sequence[Any]], Iterable[Any]] = lambda work: work,
    ) -> list[Example]:
        """The examples with the first line of the generated answer as their only reference.

        Examples whose answer is empty or does not end within `new_tokens` are left out. The other examples are ordered
        by the length of their prompts.

        Args:
            examples: Prompts; their references are ignored.
            track: Wraps the sequence of batches, to show progress.

        Raises:
            ChunkWiseError: The tokenizer has no end-of-sequence token.
        """
        set_padding(self.tokenizer)
        answered = []
        by_length = sorted(examples, key=lambda one: len(one.prompt))
        eos = self.tokenizer.eos_token_id
        options: dict[str, Any] = {"max_new_tokens": self.new_tokens, "do_sample": False}
        options |= {"pad_token_id": self.tokenizer.pad_token_id, "eos_token_id": eos}
        with ChunkWiseModel(self.base, self.ladder, ChunkWiseConfig.preset("lossless")) as model:
            for batch in track(batches_of(by_length, self.batch)):
                inputs: dict[str, Any] = prompt_inputs(batch, self.tokenizer, model.input_device)
                new = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].cpu()
                answers = zip(batch, first_lines(new, self.tokenizer), (new == eos).any(1), strict=True)
                answered += [replace(example, references=(text,)) for example, text, ended in answers if text and ended]
        return answered

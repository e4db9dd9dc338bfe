"""Answers that adapters generate themselves, to calibrate on or to train other adapters on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from chunkwise_lora.calibration.log_probabilities import ChunkWiseModel
from chunkwise_lora.evaluation.data import NEW_TOKENS, Example
from chunkwise_lora.evaluation.prompts import batches_of, first_lines, prompt_inputs, set_padding
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.config import ChunkWiseConfig


class _MeanOfAdapters(LogitsProcessor):
    """Replaces the distributions of all adapters by their mean, so that all of them generate the same tokens."""

    def __init__(self, adapters: int) -> None:
        self.adapters = adapters

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Average over adapters. scores (adapters * sequences, vocabulary) are ordered by adapter.

        The result is log-probabilities plus a constant, which generation ignores.
        """
        log_p = scores.log_softmax(-1).unflatten(0, (self.adapters, -1))
        return log_p.logsumexp(0).repeat(self.adapters, 1)


@dataclass(frozen=True)
class AnswerGenerator:
    """Generates answers greedily with one adapter, or with the mean of several adapters' distributions."""

    base: PreTrainedModel
    ladders: RankLadder | Mapping[str, RankLadder]
    """The ladder, or several ladders by name."""
    tokenizer: Any
    config: ChunkWiseConfig | None = None
    """Settings of the method; by default full rank."""
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
        with ChunkWiseModel(self.base, self.ladders, self.config or ChunkWiseConfig.preset("lossless")) as model:
            names = list(model.ladders)
            options["logits_processor"] = [_MeanOfAdapters(len(names))]
            for batch in track(batches_of(by_length, self.batch)):
                inputs: dict[str, Any] = {
                    name: ids.repeat(len(names), 1) for name, ids in prompt_inputs(batch, self.tokenizer).items()
                }
                adapters = [name for name in names for _ in batch]
                done = model.generate(**inputs, **options, adapter_names=adapters)
                new = done[: len(batch), inputs["input_ids"].shape[1] :]
                answers = zip(batch, first_lines(new, self.tokenizer), (new == eos).any(1), strict=True)
                answered += [replace(example, references=(text,)) for example, text, ended in answers if text and ended]
        return answered

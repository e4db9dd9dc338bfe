"""Generated answers, scored: SQuAD by exact match and F1, E2E by BLEU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from chunkwise_lora.engines.transformers.model import ChunkWiseModel
from chunkwise_lora.evaluation.contenders import Contender
from chunkwise_lora.evaluation.data import Example
from chunkwise_lora.evaluation.statistics import RESAMPLES, Estimate, bootstrap

Metric = Callable[[Sequence[str], Sequence[Example]], dict[str, Estimate]]


@dataclass(frozen=True)
class AnswersResult:
    """One contender on one task."""

    name: str
    mean_rank: float | None
    """Over prompts and answers; None where the contender does not tell."""
    scores: dict[str, Estimate]
    """In points, 0 to 100."""
    kv_share: float
    """Bytes of the KV cache at the end over those of full precision."""
    ms_per_token: float
    """Wall time of generation, prefill included, per new token of a batch's sequences."""
    answers: list[str]


def exact_match_and_f1(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, Estimate]:
    """SQuAD's metrics with its official normalisation, the best over all references."""
    from torchmetrics.functional.text import squad

    pieces = []
    for answer, example in zip(answers, examples, strict=True):
        known: Any = {"answer_start": [0] * len(example.references), "text": list(example.references)}
        scores = squad({"prediction_text": answer, "id": ""}, {"answers": known, "id": ""})
        pieces.append([float(scores["exact_match"]), float(scores["f1"])])
    both = np.array(pieces)
    return {"exact match": bootstrap(both[:, :1]), "F1": bootstrap(both[:, 1:])}


def bleu(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, Estimate]:
    """Corpus BLEU of sacrebleu with several references."""
    from sacrebleu.metrics.bleu import BLEU

    width = max(len(example.references) for example in examples)
    # Ragged references are filled up with empty ones, which sacrebleu leaves out.
    streams = [[one.references[i] if i < len(one.references) else "" for one in examples] for i in range(width)]
    score: Any = BLEU().corpus_score(list(answers), streams, n_bootstrap=RESAMPLES)
    return {"BLEU": Estimate(score.score, score._mean - score._ci, score._mean + score._ci)}


def evaluate_answers(
    contenders: Sequence[Contender],
    examples: Sequence[Example],
    tokenizer: Any,
    metric: Metric,
    *,
    new_tokens: int,
    batch: int = 16,
    advance: Callable[[], None] = lambda: None,
) -> list[AnswersResult]:
    """Let every contender answer greedily; `advance` is called once per contender and batch."""
    results = []
    for contender in contenders:
        answers, ranks, shares, seconds, produced = [], [], [], 0.0, 0
        for start in range(0, len(examples), batch):
            prompts = [example.prompt for example in examples[start : start + batch]]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
            begin = time.perf_counter()
            output, ran, share = _generate(contender, dict(inputs), new_tokens, tokenizer)
            seconds += time.perf_counter() - begin
            new = output[:, inputs["input_ids"].shape[1] :]
            produced += int((new != tokenizer.pad_token_id).sum())
            ranks += ran
            shares.append(share)
            answers += [text.split("\n")[0].strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
            advance()
        results.append(
            AnswersResult(
                contender.name,
                float(np.mean(ranks)) if ranks else contender.mean_rank,
                metric(answers, examples),
                float(np.mean(shares)),
                1e3 * seconds / max(produced, 1),
                answers,
            )
        )
    return results


@torch.no_grad()
def _generate(
    contender: Contender, inputs: dict[str, Any], new_tokens: int, tokenizer: Any
) -> tuple[torch.Tensor, list[float], float]:
    """Sequences, the mean rank of each where known, and the share of KV bytes."""
    options = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **(contender.options or {}),
    }
    if isinstance(contender.model, ChunkWiseModel):
        output = contender.model.generate(**inputs, **options)
        trace = contender.model.trace
        assert trace is not None
        return output, [one.mean_rank for one in trace.sequences], trace.kv_bytes / max(trace.kv_bytes_full, 1)
    cache = DynamicCache(config=contender.model.config.get_text_config())
    return contender.model.generate(**inputs, past_key_values=cache, **options), [], 1.0

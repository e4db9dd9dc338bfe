"""Generated answers, scored: SQuAD by exact match and F1, E2E by BLEU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, PreTrainedModel

from chunkwise_lora.calibration.log_probabilities import kl_divergence
from chunkwise_lora.engines.transformers.model import ChunkWiseModel
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.evaluation.baselines import FULL, Contender
from chunkwise_lora.evaluation.data import NEW_TOKENS, Example
from chunkwise_lora.evaluation.statistics import Estimate, Statistic, bootstrap
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.config import ChunkWiseConfig


@dataclass(frozen=True)
class Scores:
    """What a metric counted in answers, and what it makes of it."""

    pieces: np.ndarray
    """(examples, fields)"""
    statistics: Mapping[str, Statistic]
    """Points, 0 to 100, by name."""

    def points(self) -> dict[str, Estimate]:
        """With their intervals."""
        return {name: bootstrap(self.pieces, statistic) for name, statistic in self.statistics.items()}

    def over(self, other: Scores) -> dict[str, Estimate]:
        """Points more than those of other answers to the same examples, paired."""
        both, fields = np.hstack([self.pieces, other.pieces]), self.pieces.shape[1]

        def difference(statistic: Statistic) -> Statistic:
            return lambda means: statistic(means[..., :fields]) - statistic(means[..., fields:])

        return {name: bootstrap(both, difference(statistic)) for name, statistic in self.statistics.items()}


Metric = Callable[[Sequence[str], Sequence[Example]], Scores]


@dataclass(frozen=True)
class AnswersResult:
    """One contender on one task."""

    name: str
    mean_rank: float | None
    """Over prompts and answers; None where the contender does not tell."""
    scores: dict[str, Estimate]
    """In points, 0 to 100."""
    over_full: dict[str, Estimate]
    """Points more than at full rank, paired."""
    kl: Estimate
    """Nats per token from full rank, over full rank's own answers."""
    kv_share: float
    """Bytes of the KV cache at the end over those of full precision."""
    ms_per_token: float
    """Wall time of generation, prefill included, per new token of a batch's sequences."""
    answers: list[str]


def exact_match_and_f1(answers: Sequence[str], examples: Sequence[Example]) -> Scores:
    """SQuAD's metrics with its official normalisation, the best over all references."""
    from torchmetrics.functional.text import squad

    pieces = []
    for answer, example in zip(answers, examples, strict=True):
        known: Any = {"answer_start": [0] * len(example.references), "text": list(example.references)}
        scores = squad({"prediction_text": answer, "id": ""}, {"answers": known, "id": ""})
        pieces.append([float(scores["exact_match"]), float(scores["f1"])])
    return Scores(np.array(pieces), {"exact match": lambda means: means[..., 0], "F1": lambda means: means[..., 1]})


def bleu(answers: Sequence[str], examples: Sequence[Example]) -> Scores:
    """Corpus BLEU of sacrebleu with several references."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(effective_order=True)  # which changes no counts, and is what sentences are meant to have
    found = [metric.sentence_score(answer, one.references) for answer, one in zip(answers, examples, strict=True)]
    pieces = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found])

    def corpus(mean: np.ndarray) -> float:
        *counts, sys_len, ref_len = np.rint(mean * len(pieces)).astype(int).tolist()
        matched, of = counts[: metric.max_ngram_order], counts[metric.max_ngram_order :]
        return BLEU.compute_bleu(matched, of, sys_len, ref_len, smooth_method="exp").score

    return Scores(pieces, {"BLEU": lambda means: np.apply_along_axis(corpus, -1, means)})


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
    """Let every contender answer greedily; one of them must be the full rank.

    `advance` is called once per contender and batch.
    """
    _can_end(tokenizer)
    inputs = [_inputs(part, tokenizer) for part in _parts(examples, batch)]
    tallies = {one.name: _Tally() for one in contenders}
    full_rank = next(one for one in contenders if one.name == FULL)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    for given in inputs:
        references: list[Tensor] = []
        full: list[Tensor] = []
        for contender in [full_rank, *(one for one in contenders if one is not full_rank)]:
            tally = tallies[contender.name]
            begin = time.perf_counter()
            done = contender.generate(given, max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=eos)
            tally.seconds += time.perf_counter() - begin
            new = done.ids[:, given["input_ids"].shape[1] :]
            tally.produced += int((new != pad).sum())
            tally.ranks += done.ranks
            tally.shares.append(done.kv_share)
            tally.answers += _texts(new, tokenizer)
            if contender is full_rank:
                references = [
                    torch.cat([ids[mask.bool()], answer[answer != pad]])
                    for ids, mask, answer in zip(given["input_ids"], given["attention_mask"], new, strict=True)
                ]
            lengths = given["attention_mask"].sum(1).tolist()
            log_p = _answer_log_probabilities(contender, references, lengths)
            full = full or log_p
            tally.kl += [float(kl_divergence(*pair).mean()) for pair in zip(full, log_p, strict=True)]
            advance()
    scores = {name: metric(tally.answers, examples) for name, tally in tallies.items()}
    return [_result(one, tallies[one.name], scores[one.name], scores[FULL]) for one in contenders]


class _Mean(LogitsProcessor):
    """Has the rows of every one of several adapters say the mean of what all say, so that they go on alike."""

    def __init__(self, adapters: int) -> None:
        self.adapters = adapters

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(adapters * sequences, vocabulary), one adapter after the other; up to a constant."""
        log_p = scores.log_softmax(-1).unflatten(0, (self.adapters, -1))
        return log_p.logsumexp(0).repeat(self.adapters, 1)


def own_answers(
    base: PreTrainedModel,
    ladder: RankLadder | Mapping[str, RankLadder],
    tokenizer: Any,
    examples: Sequence[Example],
    config: ChunkWiseConfig | None = None,
    *,
    new_tokens: int = NEW_TOKENS,
    batch: int = 64,
    track: Callable[[Sequence[Any]], Iterable[Any]] = lambda work: work,
) -> list[Example]:
    """The examples with the first line of what the adapter answers, greedily, as their references.

    At full rank, unless `config` plans it; of several ladders, what the mean of them says. Those without an answer that
    ends within `new_tokens` are left out; the others come in the order of their prompts' lengths.

    Raises:
        ChunkWiseError: The tokenizer has no end of the sequence.
    """
    _can_end(tokenizer)
    found = []
    alike = sorted(examples, key=lambda one: len(one.prompt))
    eos = tokenizer.eos_token_id
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}
    options |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": eos}
    with ChunkWiseModel(base, ladder, config or ChunkWiseConfig.preset("lossless")) as model:
        names = list(model.ladders)
        options["logits_processor"] = [_Mean(len(names))]
        for part in track(_parts(alike, batch)):
            inputs: dict[str, Any] = {name: ids.repeat(len(names), 1) for name, ids in _inputs(part, tokenizer).items()}
            adapters = [name for name in names for _ in part]
            done = model.generate(**inputs, **options, adapter_names=adapters)
            new = done[: len(part), inputs["input_ids"].shape[1] :]
            answers = zip(part, _texts(new, tokenizer), (new == eos).any(1), strict=True)
            found += [replace(example, references=(text,)) for example, text, ended in answers if text and ended]
    return found


def _parts(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def _can_end(tokenizer: Any) -> None:
    """Make sure that a tokenizer has an end of the sequence, and something to pad with: that, if nothing else."""
    if tokenizer.eos_token is None:
        raise ChunkWiseError("the tokenizer has no end of the sequence (eos_token), so that no answer ends; set one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _inputs(examples: Sequence[Example], tokenizer: Any) -> dict[str, Tensor]:
    """The prompts as a model's inputs."""
    prompts = [example.prompt for example in examples]
    return dict(tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left"))


def _texts(new: Tensor, tokenizer: Any) -> list[str]:
    """The first line of each row of new tokens (batch, tokens)."""
    return [text.split("\n")[0].strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


@dataclass
class _Tally:
    """What one contender has done so far."""

    answers: list[str] = field(default_factory=list)
    ranks: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    seconds: float = 0.0
    produced: int = 0


def _result(contender: Contender, tally: _Tally, scores: Scores, full: Scores) -> AnswersResult:
    return AnswersResult(
        contender.name,
        float(np.mean(tally.ranks)) if tally.ranks else contender.mean_rank,
        scores.points(),
        scores.over(full),
        bootstrap(np.array(tally.kl)[:, None]),
        float(np.mean(tally.shares)),
        1e3 * tally.seconds / max(tally.produced, 1),
        tally.answers,
    )


def _answer_log_probabilities(
    contender: Contender, sequences: Sequence[Tensor], prompts: Sequence[int]
) -> list[Tensor]:
    """Per sequence (answer tokens, vocabulary): what the contender says of each token after its prompt."""
    # Padding on the right is seen by no token before it.
    log_p = contender.score(pad_sequence(list(sequences), batch_first=True)).log_p
    return [
        rows[prompt - 1 : max(prompt, len(sequence) - 1)]
        for rows, prompt, sequence in zip(log_p, prompts, sequences, strict=True)
    ]

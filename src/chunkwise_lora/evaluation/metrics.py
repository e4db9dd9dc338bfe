"""Metrics of generated answers: exact match and F1 of SQuAD, BLEU of E2E."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chunkwise_lora.evaluation.data import Example
from chunkwise_lora.evaluation.statistics import Estimate, Statistic, bootstrap


@dataclass(frozen=True)
class Scores:
    """What a metric counts per example, and how it computes scores from the counts."""

    counts: np.ndarray
    """(examples, fields)"""
    statistics: Mapping[str, Statistic]
    """By name of the score: computes points, from 0 to 100, from the mean counts."""

    def points(self) -> dict[str, Estimate]:
        """The scores, in points, with their intervals."""
        return {name: bootstrap(self.counts, statistic) for name, statistic in self.statistics.items()}

    def over(self, other: Scores) -> dict[str, Estimate]:
        """The differences to the scores of other answers to the same examples, in points, with paired intervals."""
        both, fields = np.hstack([self.counts, other.counts]), self.counts.shape[1]

        def difference(statistic: Statistic) -> Statistic:
            return lambda means: statistic(means[..., :fields]) - statistic(means[..., fields:])

        return {name: bootstrap(both, difference(statistic)) for name, statistic in self.statistics.items()}


Metric = Callable[[Sequence[str], Sequence[Example]], Scores]
"""Scores answers, one per example."""


def exact_match_and_f1(answers: Sequence[str], examples: Sequence[Example]) -> Scores:
    """SQuAD's exact match and F1 (Rajpurkar et al., arXiv 1606.05250), the best over all references.

    Answers and references are normalised as in the official script.
    """
    from torchmetrics.functional.text import squad

    counts = []
    for answer, example in zip(answers, examples, strict=True):
        known: Any = {"answer_start": [0] * len(example.references), "text": list(example.references)}
        scores = squad({"prediction_text": answer, "id": ""}, {"answers": known, "id": ""})
        counts.append([float(scores["exact_match"]), float(scores["f1"])])
    return Scores(np.array(counts), {"exact match": lambda means: means[..., 0], "F1": lambda means: means[..., 1]})


def bleu(answers: Sequence[str], examples: Sequence[Example]) -> Scores:
    """Corpus BLEU with several references, the same as sacrebleu's (Post, arXiv 1804.08771)."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(effective_order=True)  # avoids a warning about single sentences and changes no counts
    found = [metric.sentence_score(answer, one.references) for answer, one in zip(answers, examples, strict=True)]
    counts = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found])

    def corpus(mean: np.ndarray) -> float:
        *ngrams, sys_len, ref_len = np.rint(mean * len(counts)).astype(int).tolist()
        correct, total = ngrams[: metric.max_ngram_order], ngrams[metric.max_ngram_order :]
        return BLEU.compute_bleu(correct, total, sys_len, ref_len, smooth_method="exp").score

    return Scores(counts, {"BLEU": lambda means: np.apply_along_axis(corpus, -1, means)})

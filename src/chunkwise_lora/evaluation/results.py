"""The results of an evaluation, and what follows from them: which mean rank costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from chunkwise_lora.evaluation.methods import Label
from chunkwise_lora.evaluation.statistics import Estimate
from chunkwise_lora.ladder.contents import Expectation


@dataclass(frozen=True)
class Score:
    """A score that a task reports."""

    name: str
    unit: str
    """Of differences to full rank: points (from 0 to 100), or %."""
    higher_is_better: bool

    @property
    def tolerance(self) -> float:
        """The largest loss that counts as none: 0.5 points or 0.5%."""
        return 0.5 if self.unit == "points" else 0.005

    def loss(self, difference: Estimate) -> Estimate:
        """The loss that a difference to full rank means; negative if it is a gain."""
        if not self.higher_is_better:
            return difference
        return Estimate(-difference.value, -difference.high, -difference.low)


@dataclass(frozen=True)
class Prediction:
    """What calibration predicted for its policy, and what was measured."""

    expected: Expectation
    """What calibration measured on its own check text."""
    loss_increase: Estimate
    """Increase of the loss over full rank that was measured here, as a share of the loss."""


@dataclass(frozen=True)
class Result:
    """The result of one method on one task."""

    label: Label
    mean_rank: float
    """Mean rank of all tokens."""
    scores: dict[str, Estimate]
    """By name of the score."""
    over_full: dict[str, Estimate]
    """By name of the score: difference to full rank, with a paired interval. Perplexities as a share, answers in
    points."""
    kl: Estimate
    """KL divergence from full rank, in nats per token."""
    kv_share: float
    """Bytes of the KV cache at the end, divided by those of a full-precision cache."""
    prediction: Prediction | None = None
    """For a calibrated policy whose ladder says what to expect."""
    answers: list[str] = field(default_factory=list)
    """The generated answers, if the task has answers."""

    @property
    def name(self) -> str:
        """What the method is called."""
        return self.label.name


@dataclass(frozen=True)
class Evaluation:
    """The results of one task."""

    task: str
    how: str
    """How the results were measured, in a few sentences."""
    scores: Sequence[Score]
    """The scores, the most important one first."""
    full_rank: float
    """The adapter's rank."""
    results: Sequence[Result]
    sample: tuple[list[str], list[float]] | None = None
    """Pieces of a text, one per token, and the rank of each token."""

    @property
    def score(self) -> Score:
        """The most important score."""
        return self.scores[0]

    def loss(self, result: Result) -> Estimate:
        """What a method loses of the most important score, in points or as a share; negative if it gains."""
        return self.score.loss(result.over_full[self.score.name])


@dataclass(frozen=True)
class FreeRank:
    """The lowest mean rank of a series that costs nothing."""

    series: str
    best: Result | None
    """The method with that mean rank; None if every method of the series loses more than the tolerance."""


def free_ranks(evaluation: Evaluation) -> list[FreeRank]:
    """For each series with several mean ranks, the lowest one whose loss is within the score's tolerance.

    The loss is judged by its point estimate.
    """
    series: dict[str, list[Result]] = {}
    for result in evaluation.results:
        if result.label.role in ("baseline", "ours"):
            series.setdefault(result.label.series, []).append(result)
    found = []
    for name, results in series.items():
        if len({result.mean_rank for result in results}) < 2:
            continue
        free = [one for one in results if evaluation.loss(one).value <= evaluation.score.tolerance]
        found.append(FreeRank(name, min(free, key=lambda one: one.mean_rank, default=None)))
    return found

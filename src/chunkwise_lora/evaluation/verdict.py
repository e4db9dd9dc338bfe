"""What an evaluation shows, in sentences."""

from __future__ import annotations

from chunkwise_lora.evaluation.baselines import PLAIN, PLANS
from chunkwise_lora.evaluation.results import Evaluation, Result, Score, free_ranks
from chunkwise_lora.evaluation.statistics import Estimate


def verdict(evaluation: Evaluation) -> str:
    """One sentence: what ChunkWise loses at its mean rank, and what plain SVD loses at the same rank."""
    ours = [one for one in evaluation.results if one.label.role == "ours"]
    plans = [one for one in ours if one.label.series == PLANS] or [one for one in ours if one.name.startswith("Chunk")]
    main = min(plans or ours, key=lambda one: one.mean_rank, default=None)
    if main is None:
        return "No method of ChunkWise was evaluated."
    said = f"{main.name} at mean rank {main.mean_rank:.1f} of {evaluation.full_rank:.3g} {_loses(evaluation, main)}"
    plain = [one for one in evaluation.results if one.label.series == PLAIN]
    if not plain:
        return f"{said}."
    enough = [one for one in plain if one.mean_rank > 0.95 * main.mean_rank] or plain
    same = min(enough, key=lambda one: abs(one.mean_rank - main.mean_rank))
    return f"{said}; plain SVD with every token at rank {same.mean_rank:.3g} {_loses(evaluation, same)}."


def findings(evaluation: Evaluation) -> list[str]:
    """Sentences on the lowest mean rank that costs nothing, and on what calibration predicted."""
    return [*_free(evaluation), *(_prediction(one) for one in evaluation.results if one.prediction is not None)]


def amount(score: Score, value: float, digits: int = 2) -> str:
    """A difference of a score with its unit: `0.20 points` or `0.20%`."""
    return f"{value:.{digits}f} points" if score.unit == "points" else f"{value:.{digits}%}"


def interval(score: Score, estimate: Estimate) -> str:
    """The 95% interval of a difference, with signs."""
    form = "+.1f" if score.unit == "points" else "+.2%"
    return f"{estimate.low:{form}} to {estimate.high:{form}}"


def _loses(evaluation: Evaluation, result: Result) -> str:
    score, loss = evaluation.score, evaluation.loss(result)
    size = amount(score, abs(loss.value))
    if score.higher_is_better:
        what = f"{'gains' if loss.value < 0 else 'loses'} {size} of {score.name}"
    else:
        what = f"{'lowers' if loss.value < 0 else 'raises'} the {score.name} by {size}"
    change = result.over_full[score.name]
    return f"{what} (95% interval of the change: {interval(score, change)}; KL {result.kl.value:.4f})"


def _free(evaluation: Evaluation) -> list[str]:
    """For each series, the lowest mean rank that loses at most the tolerance."""
    score = evaluation.score
    limit = amount(score, score.tolerance, 1)
    found = []
    for one in free_ranks(evaluation):
        if one.best is None:
            found.append(f"{one.series}: no mean rank that was tried loses at most {limit}.")
            continue
        change = one.best.over_full[score.name]
        measured = f"{change.value:+.2f} points" if score.unit == "points" else f"{change.value:+.2%}"
        found.append(
            f"{one.series}: the lowest mean rank that loses at most {limit} of {score.name} is "
            f"{one.best.mean_rank:.2f} of {evaluation.full_rank:.3g} ({measured}, 95% interval "
            f"{interval(score, change)})."
        )
    return found


def _prediction(result: Result) -> str:
    assert result.prediction is not None
    expected, measured = result.prediction.expected, result.prediction.loss_increase
    asked = f" ({expected.asked_rank:.2f} was asked for)" if expected.asked_rank is not None else ""
    return (
        f"{result.name}: mean rank {result.mean_rank:.2f}{asked}; the loss rises by {measured.value:+.2%} "
        f"({measured.low:+.2%} to {measured.high:+.2%}), and calibration expected {expected.loss_increase:+.2%} "
        f"(plus or minus {expected.loss_increase_error:.2%})."
    )

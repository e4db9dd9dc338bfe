"""Which signals the learned estimator uses, and how much each of them explains."""

from __future__ import annotations

from dataclasses import dataclass

from chunkwise_lora.calibration.cost_model import CostModel, Observations, fit_costs, steps_of_fit
from chunkwise_lora.calibration.run import CalibrationRun
from chunkwise_lora.calibration.work import Work
from chunkwise_lora.method.complexity import SIGNALS

ENTROPY_GAIN = 0.01
"""The entropy is used if it explains at least this additional share of the deviance. It is unknown for prompts, and it
costs a softmax over the vocabulary per step."""
CAUSAL = tuple(name for name in SIGNALS if name != "entropy")
"""Signals that are known for prompts, too."""
VARIANTS: dict[str, tuple[int, tuple[str, ...]]] = {
    **{name: (0, (name,)) for name in SIGNALS},
    "the paper's four": (0, SIGNALS),
    "token id": (1, ()),
    "token id, previous id": (2, ()),
    "ids, all but entropy": (2, CAUSAL),
    "ids, all": (2, SIGNALS),
}
"""Estimators that are compared, by name: the number of token ids that each reads, and its signals."""


@dataclass(frozen=True)
class FittedEstimator:
    """A cost model, the signals that it uses, and how well it and others predict."""

    costs: CostModel
    signals: tuple[str, ...]
    explained: dict[str, float]
    """For each of `VARIANTS`, the share of the deviance of the costs that it explains on other text."""


def fit_estimator(run: CalibrationRun, seen: Observations, unseen: Observations, rungs: int) -> FittedEstimator:
    """Choose the signals by what they explain on `unseen`, and fit the cost model to `seen`.

    Args:
        run: The calibration.
        seen: Observations with costs, to fit to.
        unseen: Observations with costs on other text.
        rungs: Number of rungs of the ladder.
    """

    def fitted(signals: tuple[str, ...], ids: int = 2) -> CostModel:
        found = fit_costs(seen, run.vocab_size, rungs, signals, ids=ids, seed=run.config.seed)
        run.progress.add(Work(fits=steps_of_fit(len(seen))))
        return found

    run.progress.begin("fitting the estimator")
    explained = {name: fitted(signals, ids).explained_deviance(unseen) for name, (ids, signals) in VARIANTS.items()}
    gain = explained["ids, all"] - explained["ids, all but entropy"]
    signals = SIGNALS if gain > ENTROPY_GAIN else CAUSAL
    return FittedEstimator(fitted(signals), signals, explained)

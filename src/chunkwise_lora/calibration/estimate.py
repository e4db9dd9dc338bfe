"""How long a calibration takes: the passes that its settings ask for, and the speed of the model on this machine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chunkwise_lora.calibration.config import DISTILLATION_TOKENS, ROTATION_TOKENS
from chunkwise_lora.calibration.cost_model import BATCH as BATCH_OF_FIT
from chunkwise_lora.calibration.cost_model import Observations, fit_costs, steps_of_fit
from chunkwise_lora.calibration.estimator import VARIANTS
from chunkwise_lora.calibration.fisher import sensitivities
from chunkwise_lora.calibration.log_probabilities import (
    ChunkWiseModel,
    at_full_rank,
    log_probabilities_as_generated,
)
from chunkwise_lora.calibration.run import CalibrationRun
from chunkwise_lora.calibration.search import SCALES, SHARES
from chunkwise_lora.calibration.self_generated import BATCH, prefix_tokens
from chunkwise_lora.calibration.work import Speed, Work, seconds_of
from chunkwise_lora.method.complexity import SIGNALS
from chunkwise_lora.method.config import ChunkWiseConfig

TIMED_TOKENS, TIMED_STEPS = 512, 4
"""Tokens of a pass, and steps of generation, that are timed."""
LEAST, MOST = 1 / 64, 64.0
"""Range of the search for a factor on the work."""
BISECTIONS = 12
"""Steps of this search; each halves the range of the factor's logarithm."""


def planned_work(run: CalibrationRun) -> Work:
    """The passes that a calibration will make if one rung serves all tokens, as it mostly does. Otherwise it also tries
    chunk lengths, and runs the choice and check text token by token."""
    config, text = run.config, run.text
    length, learning, choice = text.learning.length, text.learning.tokens.numel(), text.choice.tokens.numel()
    generated = config.self_generated_tokens // length
    rungs = run.given.rungs if config.keep_directions else config.rungs + 1

    def descent(steps: int, tokens: int) -> Work:
        seen = steps * max(1, tokens // length) * length
        return Work(read=seen, learned=seen)

    observed = int(text.learning.scored.sum()) * config.explorations
    fit = Work(read=(learning + choice) * (1 + config.explorations), fits=(len(VARIANTS) + 1) * steps_of_fit(observed))
    share = Work(read=choice * (1 + len(SHARES)) * (config.max_loss_increase is not None))
    work = fit + share
    if generated and (config.distillations or not config.keep_directions):
        first, batches = prefix_tokens(length), -(-generated // BATCH)
        work += Work(read=generated * first, steps=batches * (length - first - 1))
    if not config.keep_directions:
        gathered = min(len(text.learning) + generated, max(1, config.gathered_tokens // length)) * length
        work += Work(read=gathered, learned=2 * gathered)
        rotation = descent(config.refinements, ROTATION_TOKENS)
        work += rotation + (rotation + fit + share) * (config.rounds if config.refinements else 0)
    if config.distillations:
        work += descent(config.distillations, DISTILLATION_TOKENS) + fit + share
    work += Work(read=choice * (3 + len(SCALES) + 2 * config.int8))
    measured = min(len(text.choice), max(1, config.divergence_tokens // length)) * length
    work += Work(read=measured * (1 + rungs - config.keeps_full_rank))
    return work + Work(read=2 * text.check.tokens.numel())


def measured_speed(run: CalibrationRun) -> Speed:
    """The speed of the model on this machine, measured on the beginning of the text."""
    sizes = max(1, TIMED_TOKENS // run.text.learning.length), run.step_batch
    batch, steps = (run.text.learning[:size] for size in sizes)
    few = steps.tokens[:, :TIMED_STEPS]
    config = ChunkWiseConfig.preset("balanced")
    with torch.no_grad(), ChunkWiseModel(run.base, run.given) as model:
        device = model.input_device
        read = seconds_of(lambda: at_full_rank(model, batch.tokens, scored=batch.scored), device)
        learned = seconds_of(lambda: sensitivities(model, [batch]), device)
        step = seconds_of(lambda: log_probabilities_as_generated(model, few, config), device)
    tokens, observations = batch.tokens.numel(), _any_observations(few.flatten())
    fit = seconds_of(lambda: fit_costs(observations, run.vocab_size, run.config.rungs + 1), device, warm_up=False)
    return Speed(read / tokens, learned / tokens, step / few.shape[1], fit / steps_of_fit(len(observations)))


def _any_observations(tokens: Tensor) -> Observations:
    """Observations of some tokens (n,), to time a fit."""
    ones = torch.ones(BATCH_OF_FIT)
    tokens = tokens.repeat(BATCH_OF_FIT)[:BATCH_OF_FIT]
    return Observations(tokens, tokens, ones[:, None].expand(-1, len(SIGNALS)), ones.long(), ones)


def factor_for(seconds: float, speed: Speed, scaled: Callable[[float], CalibrationRun]) -> float:
    """The highest factor on the work of a calibration that takes at most `seconds`, or else the lowest factor.

    Args:
        seconds: The time that it may take.
        speed: The speed of the model.
        scaled: Makes the calibration with a factor on the work.
    """
    low, high = LEAST, MOST
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        fits = speed.seconds(planned_work(scaled(middle))) <= seconds
        low, high = (middle, high) if fits else (low, middle)
    return low

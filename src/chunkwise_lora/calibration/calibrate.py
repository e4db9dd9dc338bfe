"""Calibration of one adapter on one base model: from a plain ladder and a text to a ladder that chooses well."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from chunkwise_lora.calibration.cost_model import CostModel, Observations, Policy, choose_rungs, fit_costs
from chunkwise_lora.calibration.costs import (
    Text,
    divergence,
    entropy,
    log_probabilities,
    log_probabilities_planned,
    log_probabilities_stream,
    losses,
)
from chunkwise_lora.calibration.fisher import sensitivities
from chunkwise_lora.calibration.moments import second_moments
from chunkwise_lora.calibration.refine import Draw, distil, planned_rungs, random_rungs, refine
from chunkwise_lora.calibration.self_generated import written
from chunkwise_lora.engines.transformers.model import DEFAULT, ChunkWiseModel
from chunkwise_lora.errors import ChunkWiseError
from chunkwise_lora.ladder import RankLadder
from chunkwise_lora.method.complexity import SIGNALS, TokenComplexityEstimator
from chunkwise_lora.method.config import (
    CalibrationConfig,
    ChunkWiseConfig,
    ComplexityConfig,
    CompositionConfig,
    KVCacheConfig,
    LevelKVPolicy,
)
from chunkwise_lora.method.scheduler import RuntimeScheduler

LEAST_BLOCKS = 24
"""Sequences of text below which nothing can be learned and checked."""
HELD_TOKENS = 131_072
"""Most that is kept for choice and check together."""
LEAST_HELD = 4
"""Sequences, for choice and check together."""
LADDER_BLOCKS = 48
"""Sequences that moments and sensitivities are gathered on: a few thousand numbers need no more."""
REFINE_TOKENS, DISTILLATION_TOKENS = 1024, 2048
"""Tokens per step of turning the directions, and of distilling."""
INT8_ALLOWANCE = 1e-3
"""INT8 keys and values are kept if they raise the loss by no more than this share of it."""
ENTROPY_GAIN = 0.01
"""The entropy must explain so much more of the deviance to be let in: it is not known for prompts, and costs a softmax
per step."""
LENGTHS, SCALES = (1, 2, 4), (1.0, 0.95, 0.9)
"""Least chunk lengths and scales of the chunks that are tried."""
SEARCH_GAIN = 1e-3
"""Share of the loss, with the price of rank, that anything further from single tokens at scale 1 must save."""
GIVEN = "given"
"""Name of the ladder as it was given, whose full rank all is measured against."""
SHARES = tuple(step / 16 for step in range(5, 16))
"""Mean ranks that are tried for a loss budget, as shares of the full rank."""


class Track(Protocol):
    """Wraps a sequence that is worked through, to show progress."""

    def __call__(self, work: Any, *, description: str) -> Iterable[Any]: ...


@dataclass(frozen=True)
class Check:
    """What the calibrated policy does on text that had no part in it, token by token as generation would.

    Full rank is that of the adapter as it was given.
    """

    tokens: int
    """Tokens whose prediction counts; what is per token below is per such token."""
    mean_rank: float
    """Of all tokens."""
    kl: float
    """Nats per token from full rank."""
    loss_full: float
    """Nats per token at full rank."""
    loss_increase: float
    """Share of `loss_full`."""
    loss_increase_error: float
    """95% of such texts lie within so much of it."""
    perplexity_increase: float
    """Share of the perplexity at full rank."""
    kv_share: float
    """Bytes of the KV cache over those of full precision."""


@dataclass(frozen=True)
class Calibration:
    """A calibrated ladder, its config, and what to expect of them."""

    ladder: RankLadder
    config: ChunkWiseConfig
    check: Check
    explained: dict[str, float]
    """Share of the deviance of tokens' costs that signals explain on text they were not fitted on."""
    searched: dict[str, float]
    """Nats per token that each chunk length and scale costs on held-back text, the loss and the price of rank."""


def calibrate(
    model: PreTrainedModel,
    ladder: RankLadder,
    tokens: Sequence[int],
    knobs: CalibrationConfig,
    track: Track = lambda work, *, description: work,
    counted: Sequence[bool] | None = None,
    held_tokens: Sequence[int] | None = None,
) -> Calibration:
    """Calibrate `ladder` on a text's token ids for a budget.

    What is held back, `held_tokens` or else the end of the text, `held_share`, teaches neither directions nor costs:
    its first half sets what the budget leaves open, its second half is for the check alone. `counted` says of every
    token of the text whether it matters what is predicted to follow it, as it does in answers and not in prompts; by
    default all do.

    Raises:
        ChunkWiseError: Too little of the text counts or is held back, it is to go on from prompts (`written`), there
            are both `counted` and `held_tokens`, or the model is not on a CPU.
    """
    if model.device.type != "cpu":
        raise ChunkWiseError(f"calibration runs on a CPU, and the model is on {model.device}; move it: model.cpu()")
    if knobs.written and counted is not None:
        raise ChunkWiseError("what an adapter writes goes on from plain text, not from prompts; leave `written` at 0")
    if held_tokens is not None and counted is not None:
        raise ChunkWiseError("held text is plain text; where only answers count, the end of the text is held back")
    length = min(knobs.block, getattr(model.config.get_text_config(), "max_position_embeddings", knobs.block))
    fit, choice, check = _split(tokens, counted, held_tokens, length, knobs)
    vocab_size = model.config.get_text_config().vocab_size
    batch = max(1, 2**24 // (length * vocab_size))
    given = ladder
    learns = bool(knobs.distillations) or not knobs.keep_directions
    lessons = _lessons(model, ladder, fit, knobs, track) if learns else fit

    def attached(ladder: RankLadder) -> ChunkWiseModel:
        return ChunkWiseModel(model, {DEFAULT: ladder, GIVEN: given})

    def policies_of(ladder: RankLadder) -> _Policies:
        with attached(ladder) as chunkwise:
            return _fit(chunkwise, fit, choice, knobs, batch, track)

    def share_for(policies: _Policies) -> float:
        if knobs.max_loss_increase is None:
            return knobs.mean_rank or 1.0
        with attached(policies.ladder) as chunkwise:
            return _share_for(chunkwise, choice, policies, knobs.max_loss_increase, batch, track)

    def draw_for(policies: _Policies) -> Draw:
        config = policies.config(policies.at(share_for(policies)))
        learned, ranks = policies.ladder.learned, policies.ladder.rung_ranks
        scheduler, top = partial(RuntimeScheduler, config, ranks, vocab_size, learned), len(ranks) - 1
        return planned_rungs(scheduler, _lowest(knobs, top), top)

    if knobs.keep_directions:
        policies = policies_of(ladder)
    else:
        ladder, importance = _directions(model, ladder, lessons, knobs, batch, track)
        turn = partial(_turned, model, lessons=lessons, knobs=knobs, track=track)
        ladder, importance = turn(ladder, importance, random_rungs(_lowest(knobs, knobs.rungs), knobs.rungs))
        policies = policies_of(ladder.sorted_by(importance, knobs.rungs))
        for _ in range(knobs.rounds if knobs.refinements else 0):
            ladder, importance = turn(ladder, importance, draw_for(policies))
            policies = policies_of(ladder.sorted_by(importance, knobs.rungs))
    if knobs.distillations:
        draw, batches = draw_for(policies), _batches(lessons, knobs.distillations, DISTILLATION_TOKENS, knobs.seed)
        with ChunkWiseModel(model, policies.ladder) as chunkwise:
            steps = track(batches, description="distilling")
            count, rate = knobs.distillations, knobs.distillation_rate
            ladder = distil(chunkwise, steps, draw, steps=count, rate=rate, seed=knobs.seed)
        policies = policies_of(ladder)
    policy = policies.at(share_for(policies))
    with attached(policies.ladder) as chunkwise:
        config, searched = _search(chunkwise, choice, policies.config(policy), policy.price, batch, track)
        if knobs.int8 and _int8_is_harmless(chunkwise, choice, config, batch, track):
            config = _with_int8(config)
        checked = _check(chunkwise, check, config, batch, track)
    return Calibration(policies.ladder, config, checked, policies.explained, searched)


def _split(
    tokens: Sequence[int],
    counted: Sequence[bool] | None,
    held_tokens: Sequence[int] | None,
    length: int,
    knobs: CalibrationConfig,
) -> tuple[Text, Text, Text]:
    """What to learn from, to choose by and to check on, in sequences of `length` tokens."""
    text = Text.blocks(tokens, length, counted)
    text = text[text.counted[:, :-1].any(1)]
    if len(text) < LEAST_BLOCKS:
        raise ChunkWiseError(
            f"{len(text) * length} tokens are too few to calibrate on (whole sequences of {length} in which something "
            f"counts); give at least {LEAST_BLOCKS * length}, better several times as many"
        )
    if held_tokens is None:
        held = max(LEAST_HELD, min(round(len(text) * knobs.held_share), HELD_TOKENS // length))
        fit, kept = text[:-held], text[-held:]
    else:
        fit, kept = text, Text.blocks(held_tokens, length)[: max(LEAST_HELD, HELD_TOKENS // length)]
        if len(kept) < LEAST_HELD:
            raise ChunkWiseError(
                f"{len(held_tokens)} held tokens are too few to choose and check by; give at least "
                f"{LEAST_HELD * length}, better several times as many"
            )
    fit = fit[np.linspace(0, len(fit) - 1, min(len(fit), max(1, knobs.tokens // length))).astype(int)]
    return fit, kept[: -(len(kept) // 2)], kept[-(len(kept) // 2) :]


@dataclass(frozen=True)
class _Policies:
    """A ladder with what its rungs cost the tokens of a text, and so a policy for every mean rank."""

    ladder: RankLadder
    costs: CostModel
    scores: np.ndarray
    """(n,) of all tokens of a text, whether they count or not."""
    allowed: Sequence[int]
    complexity: ComplexityConfig
    explained: dict[str, float]

    def at(self, share: float) -> Policy:
        """For a mean rank, as a share of the full one."""
        ranks = self.ladder.rung_ranks
        return choose_rungs(self.costs, self.scores, ranks, share * ranks[-1], self.allowed)

    def config(self, policy: Policy) -> ChunkWiseConfig:
        """That runs one of them."""
        return ChunkWiseConfig(
            complexity=self.complexity,
            chunking=policy.chunking,
            selection=policy.selection,
            composition=CompositionConfig(window=0),
            kv_cache=KVCacheConfig(levels=(LevelKVPolicy(),) * len(policy.selection.scales)),
        )


def _lessons(model: PreTrainedModel, ladder: RankLadder, fit: Text, knobs: CalibrationConfig, track: Track) -> Text:
    """What directions are found on: the text, and what the adapter writes itself."""
    pieces = knobs.written // fit.tokens.shape[1]
    if not pieces:
        return fit
    with ChunkWiseModel(model, ladder) as chunkwise:
        show = partial(track, description="writing text")
        own = written(chunkwise, fit.tokens, pieces, seed=knobs.seed, track=show)
    shuffle = torch.Generator().manual_seed(knobs.seed)
    return (fit + Text.of(own))[torch.randperm(len(fit) + len(own), generator=shuffle)]


def _directions(
    model: PreTrainedModel, ladder: RankLadder, lessons: Text, knobs: CalibrationConfig, batch: int, track: Track
) -> tuple[RankLadder, dict[str, Tensor]]:
    """Directions by K-FAC, and their importance, the Fisher information of their gates."""
    chosen = lessons[np.linspace(0, len(lessons) - 1, min(len(lessons), LADDER_BLOCKS)).astype(int)].split(batch)
    with ChunkWiseModel(model, ladder) as chunkwise:
        moments = second_moments(chunkwise, (one.tokens for one in track(chosen, description="inputs of the adapter")))
        found = sensitivities(chunkwise, track(chosen, description="sensitivity of the output"), seed=knobs.seed)
    ladder = ladder.data_aware(moments, {name: one.outputs for name, one in found.items()})
    with ChunkWiseModel(model, ladder) as chunkwise:
        found = sensitivities(chunkwise, track(chosen, description="Fisher information"), seed=knobs.seed + 1)
    importance = {name: torch.zeros(module.rank) for name, module in ladder.modules.items()}
    return ladder, importance | {name: one.gates / 2 for name, one in found.items()}


def _turned(
    model: PreTrainedModel,
    ladder: RankLadder,
    importance: dict[str, Tensor],
    draw: Draw,
    *,
    lessons: Text,
    knobs: CalibrationConfig,
    track: Track,
) -> tuple[RankLadder, dict[str, Tensor]]:
    """Directions and importance after gradient descent for the rungs that are drawn."""
    if not knobs.refinements:
        return ladder, importance
    with ChunkWiseModel(model, ladder) as chunkwise:
        batches = _batches(lessons, knobs.refinements, REFINE_TOKENS, knobs.seed)
        steps = track(batches, description="turning the directions")
        return refine(chunkwise, importance, steps, draw, knobs.rungs, steps=knobs.refinements, seed=knobs.seed)


def _lowest(knobs: CalibrationConfig, top: int) -> int:
    """The lowest rung to learn for, if the highest is `top`."""
    return min(round(knobs.lowest_share * top), top - 1)


def _batches(text: Text, count: int, tokens: int, seed: int) -> list[Text]:
    """`count` times some of its sequences at random, of `tokens` tokens together, but at least one."""
    generator = torch.Generator().manual_seed(seed)
    size = (count, max(1, tokens // text.tokens.shape[1]))
    return [text[rows] for rows in torch.randint(len(text), size, generator=generator)]


def _full(model: ChunkWiseModel, tokens: Tensor) -> Tensor:
    """(batch, tokens, vocabulary) log-probabilities of the adapter as it was given."""
    return log_probabilities(model, tokens, adapter=GIVEN)


def _fit(
    model: ChunkWiseModel,
    fit: Text,
    choice: Text,
    knobs: CalibrationConfig,
    batch: int,
    track: Track,
) -> _Policies:
    """Measure what the rungs cost the tokens of `fit`, and learn to predict it; `choice` tells from which signals."""
    ladder = model.ladders[DEFAULT]
    vocab_size = model.model.config.get_text_config().vocab_size
    allowed = [i for i, rank in enumerate(ladder.rung_ranks) if rank >= knobs.lowest_share * ladder.rung_ranks[-1]]
    generator = np.random.default_rng(knobs.seed)
    seen, unseen = (
        _explore(model, text, allowed, knobs.explorations, generator, batch, track) for text in (fit, choice)
    )
    known = seen.known()
    explained, signals = _contributions(known, unseen.known(), vocab_size, ladder.rungs, knobs.seed, track)
    costs = fit_costs(known, vocab_size, ladder.rungs, signals, seed=knobs.seed)
    complexity = ComplexityConfig(learned=True, **{name: 0.0 for name in SIGNALS if name not in signals})
    return _Policies(replace(ladder, learned=costs.learned), costs, costs.scores(seen), allowed, complexity, explained)


def _explore(
    model: ChunkWiseModel,
    text: Text,
    allowed: Sequence[int],
    passes: int,
    generator: np.random.Generator,
    batch: int,
    track: Track,
) -> Observations:
    """What every token that counts costs at a random rung, among tokens at random rungs, as in a plan."""
    config = ComplexityConfig()
    vocab_size = model.config.get_text_config().vocab_size
    parts = []
    for part in track(text.split(batch), description="cost per token and rung"):
        tokens = part.tokens
        full = _full(model, tokens)
        entropies = entropy(full)
        signals = torch.tensor(
            [
                [
                    [math.nan if value is None else value for value in estimator.signals(token, known)]
                    for token, known in zip(row, [None, *uncertain[:-1]], strict=True)
                ]
                for row, uncertain in zip(tokens.tolist(), entropies.tolist(), strict=True)
                for estimator in [TokenComplexityEstimator(config, vocab_size)]
            ]
        )
        previous = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=-1)
        for _ in range(passes):
            rungs = generator.choice(np.array(allowed), tuple(tokens.shape))
            costs = divergence(full, log_probabilities(model, tokens, rungs)).clamp_min(0)
            costs[~part.counted] = math.nan
            of_token = (tokens, previous, signals, torch.from_numpy(rungs), costs)
            parts.append([tensor.flatten(0, 1) for tensor in of_token])
    return Observations(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _contributions(
    seen: Observations, unseen: Observations, vocab_size: int, rungs: int, seed: int, track: Track
) -> tuple[dict[str, float], tuple[str, ...]]:
    """What the estimator explains with some of its signals, and those it should use."""
    causal = tuple(name for name in SIGNALS if name != "entropy")
    variants: dict[str, tuple[int, tuple[str, ...]]] = {
        **{name: (0, (name,)) for name in SIGNALS},
        "the paper's four": (0, SIGNALS),
        "token id": (1, ()),
        "token id, previous id": (2, ()),
        "ids, all but entropy": (2, causal),
        "ids, all": (2, SIGNALS),
    }
    explained = {
        name: fit_costs(seen, vocab_size, rungs, signals, ids=ids, seed=seed).explains(unseen)
        for name, (ids, signals) in track(list(variants.items()), description="fitting the estimator")
    }
    helps = explained["ids, all"] - explained["ids, all but entropy"] > ENTROPY_GAIN
    return explained, SIGNALS if helps else causal


def _share_for(
    model: ChunkWiseModel, text: Text, policies: _Policies, budget: float, batch: int, track: Track
) -> float:
    """The lowest mean rank that keeps a budget of loss increase on `text`, as a share of the full rank.

    Losses differ much from token to token and divergences little, so how much loss a nat of divergence costs is
    taken from all mean ranks tried together.
    """
    full_loss, kl, rise = 0.0, np.zeros(len(SHARES)), np.zeros(len(SHARES))
    configs = [policies.config(policies.at(share)) for share in SHARES]
    for part in track(text.split(batch), description="finding the mean rank"):
        tokens, counted = part.tokens, part.counted[:, :-1]
        full = _full(model, tokens)
        full_loss += float(losses(full, tokens)[counted].sum())
        for i, config in enumerate(configs):
            log_p, _ = log_probabilities_planned(model, tokens, config)
            kl[i] += float(divergence(full, log_p)[:, :-1][counted].sum())
            rise[i] += float((losses(log_p, tokens) - losses(full, tokens))[counted].sum())
    loss_per_kl = float(rise @ kl) / max(float(kl @ kl), 1e-12)
    expected = loss_per_kl * kl / full_loss
    return min((share for share, one in zip(SHARES, expected, strict=True) if one <= budget), default=1.0)


def _search(
    model: ChunkWiseModel, text: Text, config: ChunkWiseConfig, price: float, batch: int, track: Track
) -> tuple[ChunkWiseConfig, dict[str, float]]:
    """`config` with the chunk length, then the scale, of least cost on `text`, and what each of them costs."""

    def costs(tried: dict[float, ChunkWiseConfig]) -> dict[float, float]:
        totals = dict.fromkeys(tried, 0.0)
        for part in track(text.split(batch), description="chunk lengths and scales"):
            for value, one in tried.items():
                log_p, ranks = log_probabilities_planned(model, part.tokens, one)
                lost = losses(log_p, part.tokens)[part.counted[:, :-1]].sum()
                totals[value] += float(lost) / int(text.counted[:, :-1].sum())
                totals[value] += price * float(ranks.sum()) / text.tokens.numel()
        return totals

    chunking, selection = config.chunking, config.selection
    of_length = costs(
        {n: config.model_copy(update={"chunking": chunking.model_copy(update={"min_length": n})}) for n in LENGTHS}
    )
    chunking = chunking.model_copy(update={"min_length": _worth_it(of_length)})
    selections = {scale: selection.model_copy(update={"scales": (scale,) * config.levels}) for scale in SCALES}
    scaled = {
        scale: config.model_copy(update={"chunking": chunking, "selection": one}) for scale, one in selections.items()
    }
    of_scale = costs(scaled)
    searched = {f"chunks of at least {length}": cost for length, cost in of_length.items()}
    searched |= {f"scale {scale:g}": cost for scale, cost in of_scale.items()}
    return scaled[_worth_it(of_scale)], searched


def _worth_it(costs: dict[Any, float]) -> Any:
    """The first value, the simplest, that is nearly as good as the best."""
    best = min(costs.values())
    return next(value for value, cost in costs.items() if cost <= (1 + SEARCH_GAIN) * best)


def _with_int8(config: ChunkWiseConfig) -> ChunkWiseConfig:
    levels = (LevelKVPolicy(precision="int8"),) * config.levels
    return config.model_copy(update={"kv_cache": KVCacheConfig(levels=levels)})


def _int8_is_harmless(model: ChunkWiseModel, text: Text, config: ChunkWiseConfig, batch: int, track: Track) -> bool:
    rise = total = 0.0
    for part in track(text.split(batch), description="trying INT8 keys and values"):
        tokens, counted = part.tokens, part.counted[:, :-1]
        before, *_ = log_probabilities_stream(model, tokens, config)
        after, *_ = log_probabilities_stream(model, tokens, _with_int8(config))
        total += float(losses(before, tokens)[counted].sum())
        rise += float((losses(after, tokens) - losses(before, tokens))[counted].sum())
    return rise <= INT8_ALLOWANCE * total


def _check(model: ChunkWiseModel, text: Text, config: ChunkWiseConfig, batch: int, track: Track) -> Check:
    full_losses, rises, kl, ranks, kv = [], [], [], [], []
    for part in track(text.split(batch), description="checking on unseen text"):
        tokens, counted = part.tokens, part.counted[:, :-1]
        full = _full(model, tokens)
        log_p, rank, share = log_probabilities_stream(model, tokens, config)
        full_losses.append(losses(full, tokens)[counted])
        rises.append(losses(log_p, tokens)[counted] - full_losses[-1])
        kl.append(divergence(full, log_p)[part.counted])
        ranks.append(rank)
        kv.append(share)
    loss, rise = float(torch.cat(full_losses).mean()), torch.cat(rises)
    length = max(1, min(64, len(rise) // 8))
    segments = rise.unfold(0, length, length).mean(1)
    return Check(
        tokens=rise.numel(),
        mean_rank=float(np.concatenate(ranks).mean()),
        kl=float(torch.cat(kl).mean()),
        loss_full=loss,
        loss_increase=float(rise.mean()) / loss,
        loss_increase_error=1.96 * float(segments.std(correction=0)) / math.sqrt(len(segments)) / loss,
        perplexity_increase=math.expm1(float(rise.mean())),
        kv_share=float(np.mean(kv)),
    )

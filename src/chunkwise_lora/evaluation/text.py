"""Evaluation of text: perplexity, and divergence from full rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chunkwise_lora.calibration.log_probabilities import kl_divergence
from chunkwise_lora.evaluation.methods import FULL, Method, Spent, Visit, full_rank_of
from chunkwise_lora.evaluation.processes import ALONE, Processes
from chunkwise_lora.evaluation.results import Prediction, Result
from chunkwise_lora.evaluation.statistics import bootstrap, per_token, relative_increase, segments
from chunkwise_lora.ladder.contents import Expectation

PERPLEXITY = "perplexity"
"""Name of the score."""
Score = Callable[[Tensor, Visit], Spent]
"""Runs windows, as `Method.score` does."""


@dataclass(frozen=True)
class Sample:
    """The ranks that a plan gave the tokens of one window."""

    tokens: list[int]
    """Token ids."""
    ranks: list[float]
    """One per token."""


def windows_of(tokens: Sequence[int], length: int, stride: int) -> Tensor:
    """Cut a text into windows of `length` tokens, one every `stride` tokens.

    Tokens at the end that do not fill a window are left out. A text shorter than `length` gives one short window.

    Returns:
        (windows, length) token ids.
    """
    ids = torch.as_tensor(tokens)
    return ids.unfold(0, length, stride) if len(ids) >= length else ids[None]


@dataclass(frozen=True)
class _Measured:
    """What one method gave on one batch of windows."""

    losses: np.ndarray
    """(windows, scored tokens) nats."""
    kl: np.ndarray
    """(windows, scored tokens) nats."""
    spent: Spent

    @classmethod
    def of(cls, score: Score, windows: Tensor, full: Tensor, scored_from: int) -> _Measured:
        """Run windows (windows, tokens), and compare with full rank's log-probabilities (windows, tokens, vocabulary).

        `scored_from` is the number of tokens at the start whose predictions are not scored.
        """
        losses, kl = (np.zeros((len(windows), windows.shape[1] - 1)) for _ in range(2))
        following = windows[:, 1:, None]

        def visit(rows: slice, columns: slice, log_p: Tensor) -> None:
            expected = following[rows, columns].to(log_p.device)
            found = log_p[:, : expected.shape[1]]  # the last token of a window has no next one
            losses[rows, columns] = -found.gather(2, expected).squeeze(2).cpu()
            kl[rows, columns] = kl_divergence(full[rows, columns][:, : expected.shape[1]], found).cpu()

        spent = score(windows, visit)
        return cls(losses[:, scored_from:], kl[:, scored_from:], spent)


def evaluate_text(
    methods: Sequence[Method],
    windows: Tensor,
    stride: int,
    *,
    batch: int = 16,
    expectations: Mapping[str, Expectation] | None = None,
    processes: Processes = ALONE,
    advance: Callable[[], None] = lambda: None,
) -> tuple[list[Result], Sample | None]:
    """Run every method on windows of text and compare it with full rank.

    Every window starts with an empty context, and its last `stride` tokens are scored. If windows do not overlap, all
    tokens except the first are scored. ChunkWise runs as in generation, with its plan, cross-fades and KV policy in
    force. Methods without these run in one pass, which gives the same result.

    Args:
        methods: The methods; one of them must be the full rank.
        windows: (windows, tokens) token ids.
        stride: Tokens from the start of one window to the start of the next.
        batch: Windows that run together. The log-probabilities of full rank are kept for all of them.
        expectations: By name of a method, what calibration expects of it.
        processes: The processes that share the batches. All of them get all results.
        advance: Called once per method and batch of this process.

    Returns:
        One result per method, and the ranks of one window if a method chooses ranks token by token.
    """
    scored_from = max(0, windows.shape[1] - 1 - stride)
    full_rank, expectations = full_rank_of(methods), expectations or {}

    def measured(group: Tensor) -> dict[str, _Measured]:
        full, again = _scored_once(full_rank, group)
        found = {}
        for method in methods:
            score = again if method is full_rank else method.score
            found[method.name] = _Measured.of(score, group, full, scored_from)
            advance()
        return found

    groups = windows.split(batch)
    parts = processes.gathered([measured(group) for group in processes.share_of(groups)])
    by_method = {method.name: [part[method.name] for part in parts] for method in methods}
    results = [_result(one, by_method[one.name], by_method[FULL], expectations.get(one.name)) for one in methods]
    chosen = [
        Sample(group[0].tolist(), one.spent.ranks[0].tolist())
        for group, part in zip(groups, parts, strict=True)
        for one in part.values()
        if np.ptp(one.spent.ranks[0]) > 0
    ]
    return results, chosen[-1] if chosen else None


def _scored_once(method: Method, windows: Tensor) -> tuple[Tensor, Score]:
    """Run windows (windows, tokens) with a method that runs them one by one.

    Returns:
        The log-probabilities (windows, tokens, vocabulary), and a function that gives them again.
    """
    found: list[Tensor] = []
    spent = method.score(windows, lambda rows, columns, log_p: found.append(log_p))
    together = torch.cat(found)

    def again(windows: Tensor, visit: Visit) -> Spent:
        for row in range(len(windows)):
            visit(slice(row, row + 1), slice(None), together[row : row + 1])
        return spent

    return together, again


def _result(
    method: Method, parts: Sequence[_Measured], full: Sequence[_Measured], expected: Expectation | None
) -> Result:
    losses, kl, full_losses = (
        np.concatenate(one) for one in ([p.losses for p in parts], [p.kl for p in parts], [p.losses for p in full])
    )
    both = np.stack([segments(losses)[:, 0], segments(full_losses)[:, 0]], axis=-1)
    return Result(
        method.label,
        float(np.mean(np.concatenate([part.spent.ranks.ravel() for part in parts]))),
        {PERPLEXITY: bootstrap(segments(losses), lambda means: np.exp(per_token(means)))},
        {PERPLEXITY: bootstrap(segments(losses - full_losses), lambda means: np.expm1(per_token(means)))},
        bootstrap(segments(kl), per_token),
        float(np.average([part.spent.kv_share for part in parts], weights=[len(part.losses) for part in parts])),
        None if expected is None else Prediction(expected, bootstrap(both, relative_increase)),
    )

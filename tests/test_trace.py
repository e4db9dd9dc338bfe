"""A trace counts what it says."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from chunkwise_lora.method.trace import SequenceTrace, Trace


def test_the_mean_rank_of_an_adapter_is_over_all_of_its_tokens() -> None:
    ranks = {"a": (2.0,), "b": (8.0, 4.0), None: (0.0, 0.0)}
    sequences = [SequenceTrace(name, (5,) * len(values), values, 8.0, ()) for name, values in ranks.items()]
    sequences.append(SequenceTrace("a", (5,) * 3, (4.0, 4.0, 6.0), 8.0, ()))
    others: dict[str, Any] = {field.name: 0 for field in fields(Trace)}
    trace = Trace(**others | {"sequences": tuple(sequences)})
    assert trace.mean_ranks == pytest.approx({"a": 4.0, "b": 6.0})
    assert [sequence.mean_rank for sequence in sequences] == pytest.approx([2, 6, 0, 14 / 3])

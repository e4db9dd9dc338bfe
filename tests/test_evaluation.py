"""The comparison counts what it says, and the embedded adapters are worth comparing."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkwise_lora import ChunkWiseConfig, embedded
from chunkwise_lora.evaluation.compare import Contestant, compare, contestants, score
from chunkwise_lora.rendering import coloured_tokens, comparison_table, sparkline
from chunkwise_lora.trace import SequenceTrace
from models import VOCABULARY, adapter, build

LOSSLESS = {"lossless": ChunkWiseConfig.preset("lossless")}


@pytest.fixture(scope="module")
def entrants() -> list[Contestant]:
    return contestants(build("llama"), adapter("llama"), LOSSLESS)


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, 24))


def test_merged_unmerged_and_lossless_score_alike_and_unlike_the_base(
    entrants: list[Contestant], text: torch.Tensor
) -> None:
    base, merged, unmerged, lossless = (score(entrant, text) for entrant in entrants)
    assert merged == pytest.approx(unmerged, rel=1e-4)
    assert lossless == pytest.approx(unmerged, rel=1e-5)
    assert base != pytest.approx(unmerged, rel=1e-2)


def test_a_comparison_counts_real_bytes(entrants: list[Contestant], text: torch.Tensor) -> None:
    advances = []
    results = compare(entrants, text, new_tokens=4, rounds=2, held=text, advance=lambda: advances.append(1))
    assert len(advances) == len(entrants) * 4
    base, merged, unmerged, lossless = results
    assert base.adapter_bytes_per_token == merged.adapter_bytes_per_token == 0
    assert unmerged.adapter_bytes_per_token == lossless.adapter_bytes_per_token > 0
    # 2 layers, 2 sides, 2 key-value heads of 8 numbers in float32; the last new token is never fed back.
    assert base.kv_bytes == unmerged.kv_bytes == 2 * 2 * 2 * 8 * 4 * (24 + 3)
    assert unmerged.decode_ratio == unmerged.prefill_ratio == 1


def test_the_comparison_fits_a_narrow_terminal(entrants: list[Contestant], text: torch.Tensor) -> None:
    results = compare(entrants, text, new_tokens=2, rounds=1, held=text)
    console = Console(width=80, record=True)
    console.print(comparison_table(results))
    printed = console.export_text()
    assert all(entrant.name in printed for entrant in entrants)
    assert "…" not in printed


def test_coloured_tokens_keep_the_text() -> None:
    sequence = SequenceTrace("a", tokens=(1, 2, 3), ranks=(0.0, 8.0, 16.0), chunks=())
    text = coloured_tokens(sequence, ["<1>", "<2>", "<3>"], full_rank=16, prompt_tokens=1)
    assert text.plain == "<1><2><3>"
    assert len({str(span.style) for span in text.spans}) == 3


def test_a_spectrum_is_drawn_to_scale() -> None:
    assert sparkline([8.0, 4.0, 0.0]) == "█▄ "
    assert sparkline([]) == ""


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("wiki", " = ", embedded.HELD_TEXT.read_text()[3:1500]),
        ("e2e", "name[Aldhaven], eatType[pub], area[riverside] ->", " Aldhaven is a pub in the riverside area."),
    ],
)
def test_an_embedded_adapter_beats_the_base_on_text_of_its_kind(name: str, given: str, text: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(embedded.BASE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded.BASE)
    tokens = tokenizer(given + text, return_tensors="pt").input_ids
    labels = tokens.clone()
    labels[:, : len(tokenizer(given).input_ids)] = -100
    without, _, tuned = (
        entrant.model(input_ids=tokens, labels=labels).loss
        for entrant in contestants(base, embedded.ADAPTERS[name], {})
    )
    assert tuned < without - 1

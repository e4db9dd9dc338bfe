"""The server over HTTP, as users run it: several processes, the `openai` client, metrics."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import openai
import pytest

import small
from chunkwise_lora import RankLadder
from chunkwise_lora.engines.vllm import metrics

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT = " = Karsund = \n \n Karsund is a town"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import vllm_server

        yield vllm_server
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def url(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    os.environ.pop(metrics.FOLDER, None)  # the setting of engines in this process
    folder = tmp_path_factory.mktemp("server")
    RankLadder.load(small.WIKI).save_pretrained(folder / "wiki")
    adapters, options = {"wiki": folder / "wiki", "e2e": small.E2E}, ["--dtype", "float32", "--enforce-eager"]
    with example.server(small.BASE, adapters, folder / "server.log", options) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, model: str, **extra: object) -> str:
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=24, temperature=0, extra_body={"vllm_xargs": extra}
    )
    return answer.choices[0].text


def test_adapters_and_base_answer_differently(client: openai.OpenAI) -> None:
    assert len({ask(client, model) for model in ("base", "wiki", "e2e")}) == 3


def test_an_override_reaches_the_worker(client: openai.OpenAI) -> None:
    assert ask(client, "wiki", chunkwise_mean_rank=0.0) == ask(client, "base")
    assert ask(client, "wiki", chunkwise_preset="lossless") == ask(client, "wiki")


@pytest.mark.parametrize("extra", [{"chunkwise_preset": "fast"}, {"chunkwise_mean_rank": 7}, {"chunkwise_x": 1}])
def test_an_impossible_override_is_a_bad_request(client: openai.OpenAI, extra: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError, match=r"chunkwise|preset|mean_rank"):
        ask(client, "wiki", **extra)
    assert ask(client, "wiki")


def test_the_endpoint_shows_ranks_rungs_and_time_per_adapter(
    example: ModuleType, url: str, client: openai.OpenAI
) -> None:
    before = example.metrics(url)
    ask(client, "e2e")
    ask(client, "wiki", chunkwise_mean_rank=0.5)
    after = example.metrics(url)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('chunkwise:tokens_total{adapter="e2e",rung="8"}') > 8
    assert grown('chunkwise:tokens_total{adapter="wiki",rung="4"}') > 8
    assert after['chunkwise:mean_rank{adapter="e2e"}'] == 16
    assert 0 < after['chunkwise:mean_rank{adapter="wiki"}'] < 16
    assert grown('chunkwise:scheduler_seconds_total{adapter="e2e"}') > 0
    ladder = RankLadder.from_peft(small.WIKI)
    numbers = sum(module.cost * module.rank for module in ladder.modules.values())
    assert after['chunkwise:adapter_bytes{adapter="wiki"}'] == 4 * numbers
    ask(client, "base")  # in one more pass the workers learn which requests have ended
    assert example.metrics(url)["chunkwise:schedulers"] == 0

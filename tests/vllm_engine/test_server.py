"""The server over HTTP, as users run it: several processes, the `openai` client, metrics."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from transformers import AutoConfig

import small
from chunkwise_lora import RankLadder
from chunkwise_lora.benchmark.shapes import random_adapter
from chunkwise_lora.engines.vllm import frontend, metrics
from chunkwise_lora.engines.vllm.manager import Held
from chunkwise_lora.engines.vllm.reports import SAYS
from chunkwise_lora.method.batch import Usage

PROMPT = " = Karsund = \n \n Karsund is a town"


@pytest.fixture(scope="module")
def url(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    os.environ.pop(metrics.FOLDER, None)  # the setting of engines in this process
    folder = tmp_path_factory.mktemp("server")
    RankLadder.load(small.WIKI).save_pretrained(folder / "wiki")
    adapters, options = {"wiki": folder / "wiki", "e2e": small.E2E}, ["--dtype", "float32", "--enforce-eager"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
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


def load(url: str, path: Path | str, **options: object) -> httpx.Response:
    body = {"lora_name": "new", "lora_path": str(path)} | options
    return httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60)


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        (shutil.rmtree, 404, "No adapter found for"),
        (lambda folder: (folder / "adapter_config.json").unlink(), 400, "adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), 400, "cannot be read as safetensors"),
        (lambda folder: (folder / "adapter_config.json").write_text(json.dumps("x" * 200_000)), 400, "not valid JSON"),
    ],
)
def test_a_bad_adapter_is_answered_with_its_fault(
    url: str, client: openai.OpenAI, tmp_path: Path, change: Callable[[Path], object], status: int, says: str
) -> None:
    shutil.copytree(small.WIKI, tmp_path / "adapter")
    change(tmp_path / "adapter")
    response = load(url, tmp_path / "adapter")
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, status)
    assert says in error["message"] and "Traceback" not in error["message"] and len(error["message"]) < 1500
    assert ask(client, "wiki")


def test_an_adapter_of_another_base_is_a_bad_request(url: str, client: openai.OpenAI, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(small.BASE)
    config.hidden_size = 128
    response = load(url, random_adapter(config, 4, tmp_path))
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(f"{SAYS}<path>: model.layers.0.")
    assert ask(client, "wiki")


def test_an_adapter_loaded_in_place_needs_its_files_only_then(url: str, client: openai.OpenAI, tmp_path: Path) -> None:
    for name, adapter in (("wiki", small.WIKI), ("e2e", small.E2E)):
        shutil.copytree(adapter, tmp_path / name)
        assert load(url, tmp_path / name, load_inplace=True).status_code == 200
        shutil.rmtree(tmp_path / name)
        assert ask(client, "new") == ask(client, name)


def test_a_beam_search_follows_its_override(url: str, client: openai.OpenAI) -> None:
    def beams(model: str, **extra: object) -> list[str]:
        body = {"use_beam_search": True, "vllm_xargs": extra}
        answer = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=12, n=2, temperature=0, extra_body=body
        )
        return [choice.text for choice in answer.choices]

    assert beams("wiki", chunkwise_mean_rank=0.0) == beams("base") != beams("wiki")
    for model, extra in (("wiki", {"chunkwise_preset": "fast"}), ("base", {"chunkwise_preset": "balanced"})):
        with pytest.raises(openai.BadRequestError, match=r"preset"):
            beams(model, **extra)
    assert beams("wiki") != beams("base")


def test_a_long_value_is_quoted_in_part(url: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"chunkwise_preset|preset") as error:
        ask(client, "wiki", chunkwise_preset="x" * 200_000)
    assert len(error.value.response.text) < 1500


def test_the_endpoint_shows_ranks_rungs_and_time_per_adapter(
    example: ModuleType, url: str, client: openai.OpenAI
) -> None:
    before = example.metrics(url)
    ask(client, "e2e")
    ask(client, "wiki", chunkwise_mean_rank=0.5)
    after = example.metrics(url)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('chunkwise:tokens_total{adapter="e2e",rank="16"}') > 8
    assert grown('chunkwise:tokens_total{adapter="wiki",rank="8"}') > 8
    assert after['chunkwise:mean_rank{adapter="e2e"}'] == 16
    assert 0 < after['chunkwise:mean_rank{adapter="wiki"}'] < 16
    assert grown('chunkwise:scheduler_seconds_total{adapter="e2e"}') > 0
    ladder = RankLadder.from_peft(small.WIKI)
    numbers = sum(module.cost * module.rank for module in ladder.modules.values())
    assert after['chunkwise:adapter_bytes{adapter="wiki"}'] == 4 * numbers
    assert after['chunkwise:adapter_rank{adapter="wiki"}'] == 16
    ask(client, "base")  # in one more pass the workers learn which requests have ended
    assert example.metrics(url)["chunkwise:schedulers"] == 0


def test_the_usage_tells_the_mean_rank(client: openai.OpenAI) -> None:
    def usage(model: str, **extra: object) -> dict[str, float] | None:
        answer = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=24, temperature=0, extra_body={"vllm_xargs": extra}
        )
        assert answer.usage is not None and answer.kv_transfer_params is None  # type: ignore[attr-defined]
        return getattr(answer.usage, "chunkwise", None)

    assert usage("wiki") == {"mean_rank": 16.0, "full_rank": 16.0}
    assert usage("wiki", chunkwise_mean_rank=0.5) == {"mean_rank": 8.0, "full_rank": 16.0}
    planned = usage("wiki", chunkwise_preset="balanced")
    assert planned is not None and 8 < planned["mean_rank"] < 16
    assert usage("base") is None
    stopped = client.completions.create(
        model="wiki", prompt=PROMPT, max_tokens=24, temperature=0, stop=[ask(client, "wiki")[3:6]]
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.chunkwise["mean_rank"] == 16  # type: ignore[union-attr]


def test_the_usage_of_several_prompts_is_their_mean(client: openai.OpenAI) -> None:
    def mean_rank(prompts: list[str]) -> float:
        answer = client.completions.create(
            model="wiki",
            prompt=prompts,
            max_tokens=24,
            temperature=0,
            extra_body={"ignore_eos": True, "vllm_xargs": {"chunkwise_preset": "balanced"}},
        )
        assert answer.usage is not None
        of_prompt.append(answer.usage.total_tokens)
        return answer.usage.chunkwise["mean_rank"]  # type: ignore[attr-defined]

    of_prompt: list[int] = []
    prompts = [PROMPT, 8 * PROMPT]
    alone = [mean_rank([prompt]) for prompt in prompts]
    assert alone[0] != alone[1]
    assert mean_rank(prompts) == pytest.approx(np.average(alone, weights=of_prompt[:2]))


def test_metrics_of_an_unloaded_adapter_go_away(
    example: ModuleType, url: str, client: openai.OpenAI, tmp_path: Path
) -> None:
    shutil.copytree(small.WIKI, tmp_path / "wiki")
    assert load(url, tmp_path / "wiki", lora_name="short-lived").status_code == 200
    ask(client, "short-lived")
    assert any("short-lived" in name for name in example.metrics(url))
    httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "short-lived"}).raise_for_status()
    assert not any("short-lived" in name for name in example.metrics(url))


def test_metrics_of_an_unloaded_adapter_come_back_when_it_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come back by a resolver of vLLM, without being loaded by a user."""
    monkeypatch.setattr(metrics, "unloaded", {"wiki", "other"})
    request: Any = SimpleNamespace(
        lora_request=SimpleNamespace(lora_name="wiki", lora_path=str(small.WIKI), lora_int_id=1),
        sampling_params=None,
        prompt_token_ids=[1],
        prompt_embeds=None,
        cache_salt=None,
    )
    config: Any = SimpleNamespace(additional_config={}, lora_config=None)
    frontend.accept(config, request)
    assert metrics.unloaded == {"other"}


def test_the_dashboard_shows_only_metrics_that_exist() -> None:
    text = (Path(__file__).parents[2] / "docs" / "grafana.json").read_text(encoding="utf-8")
    known = {f"{name}_total" for name in metrics.COUNTERS} | set(metrics.GAUGES)
    asked = [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]
    used = {name for expression in asked for name in re.findall(r"chunkwise:\w+", expression)}
    assert used == known


def test_numbers_of_removed_adapters_are_gone(tmp_path: Path) -> None:
    def numbers() -> dict[str, dict[tuple[str, ...], float]]:
        collected = metrics.WorkerCollector(str(tmp_path)).collect()
        return {one.name: {tuple(s.labels.values()): s.value for s in one.samples} for one in collected}

    recorder = metrics.Recorder(str(tmp_path))
    usage = Usage("a", np.array([0, 2]), np.array([0.0, 7.5]), 15.0)
    for key in ("1", "2"):
        recorder.record(key, usage)
        info: Any = SimpleNamespace(key=key, name="a")
        recorder.loaded(Held(info, nbytes=10, rank=3.0 + int(key)))
    assert numbers()["chunkwise:tokens"] == {("a", "7.5"): 4}
    assert numbers()["chunkwise:adapter_bytes"] == {("a",): 20}
    assert numbers()["chunkwise:adapter_rank"] == {("a",): 5}
    recorder.unloaded("1")
    assert numbers()["chunkwise:adapter_bytes"] == {("a",): 10}
    recorder.removed("1")
    assert numbers()["chunkwise:mean_rank"] == {("a",): 7.5}
    recorder.unloaded("2")
    assert not numbers()["chunkwise:adapter_bytes"] and numbers()["chunkwise:tokens"]
    recorder.removed("2")
    assert not any(numbers().values())
    recorder.record("3", usage)
    assert numbers()["chunkwise:tokens"] == {("a", "7.5"): 2}

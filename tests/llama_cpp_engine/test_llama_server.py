"""The OpenAI-compatible server over a llama.cpp model with adapters."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from llama_models import E2E, OPTIONS, WIKI, text_file, text_model

pytest.importorskip("starlette_context", reason="the server's packages are not installed: pip install '.[serve]'")

import uvicorn
from fastapi.testclient import TestClient

from chunkwise_lora import ChunkWiseConfig
from chunkwise_lora.engines.llama_cpp import BASE
from chunkwise_lora.engines.llama_cpp.server import ServedLlama, create_app
from chunkwise_lora.engines.llama_cpp.server.requests import LARGEST_BODY

PROMPT = "name[Blue Spice], eatType[coffee shop], area[city centre] ->"
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "repeat_penalty": 1.0}
MESSAGES = [{"role": "user", "content": "Where is Aldhaven?"}]


@pytest.fixture(scope="module")
def llm() -> ServedLlama:
    return ServedLlama(text_file(), {"wiki": WIKI, "e2e": E2E}, factors="float32", **{**OPTIONS, "logits_all": False})


@pytest.fixture
def client(llm: ServedLlama) -> Iterator[TestClient]:
    with TestClient(create_app(llm), base_url="http://localhost") as client:
        yield client


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    reference = text_model()
    return {
        name: reference.create_completion(PROMPT, adapter=name, **GREEDY)["choices"][0]["text"]
        for name in ("wiki", "e2e", BASE)
    }


def pieces_of(client: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_the_model_of_a_request_names_the_adapter(client: TestClient, texts: dict[str, str]) -> None:
    for name in ("wiki", "e2e", BASE, "wiki"):
        answer = client.post("/v1/completions", json={"model": name, "prompt": PROMPT, **GREEDY}).json()
        assert answer["choices"][0]["text"] == texts[name]
        assert answer["chunkwise"]["adapter"] == (None if name == BASE else name)
    answer = client.post("/v1/completions", json={"prompt": PROMPT, **GREEDY}).json()
    assert answer["choices"][0]["text"] == texts["wiki"], "by default the first one"
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["wiki", "e2e", BASE]


def test_the_answer_tells_the_mean_rank_that_ran(client: TestClient, llm: ServedLlama) -> None:
    full = llm.adapters["wiki"].rung_ranks[-1]
    body = {"model": "wiki", "prompt": PROMPT, **GREEDY}
    for fields, expected in (({}, full), ({"chunkwise_mean_rank": 0.5}, full / 2), ({"chunkwise_mean_rank": 0}, 0)):
        told = client.post("/v1/completions", json={**body, **fields}).json()["chunkwise"]
        assert told["mean_rank"] == pytest.approx(expected)
        assert told["full_rank"] == full
    told = client.post("/v1/completions", json={**body, "chunkwise_preset": "balanced"}).json()["chunkwise"]
    assert 0 < told["mean_rank"] < full
    assert told["mean_rank"] == pytest.approx(llm.trace.sequences[0].mean_rank, abs=1e-3)
    assert client.post("/v1/completions", json=body).json()["chunkwise"]["mean_rank"] == full


def test_streams_tell_the_rank_of_every_piece(client: TestClient, texts: dict[str, str]) -> None:
    pieces = pieces_of(client, "/v1/completions", {"model": "e2e", "prompt": PROMPT, **GREEDY})
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == texts["e2e"]
    assert {piece["chunkwise"]["adapter"] for piece in pieces} == {"e2e"}
    body = {"model": "wiki", "messages": MESSAGES, "chunkwise_preset": "balanced", **GREEDY}
    pieces = pieces_of(client, "/v1/chat/completions", body)
    whole = client.post("/v1/chat/completions", json=body).json()
    streamed = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert streamed == whole["choices"][0]["message"]["content"]
    assert all(
        piece["chunkwise"]["adapter"] == "wiki" for piece in pieces if piece["choices"][0]["delta"].get("content")
    )
    assert whole["chunkwise"]["mean_rank"] == pieces[-1]["chunkwise"]["mean_rank"]


def test_requests_that_cannot_work_are_refused(client: TestClient, texts: dict[str, str]) -> None:
    for fields, reason in (
        ({"model": "gpt-4"}, "'gpt-4' is not loaded; loaded are wiki, e2e"),
        ({"chunkwise_preset": "best"}, "preset"),
        ({"chunkwise_mean_rank": 7}, "mean_rank"),
        ({"chunkwise_rank": 7}, "unknown chunkwise_rank"),
        ({"chunkwise_preset": "balanced", "chunkwise_mean_rank": 0.5}, "not several"),
    ):
        answer = client.post("/v1/completions", json={"prompt": PROMPT, **fields})
        assert answer.status_code == 400
        assert reason in answer.json()["error"]["message"]
    assert client.post("/v1/completions", json={"prompt": "the " * 400}).status_code == 400
    assert client.post("/v1/completions", content=b" " * (LARGEST_BODY + 1)).status_code == 413
    for content in (b"", b"[", b"[]", b"3", b"[" * 100_000, b"\xff\xfe", b'{"prompt": "x", "model": 3}'):
        assert client.post("/v1/completions", content=content).status_code == 400
    assert client.post("/v1/completions", json={"prompt": 3}).status_code == 500  # as llama-cpp-python answers
    answer = client.post("/v1/completions", json={"model": "e2e", "prompt": PROMPT, **GREEDY}).json()
    assert answer["choices"][0]["text"] == texts["e2e"]


def test_a_key_is_asked_for(llm: ServedLlama) -> None:
    with TestClient(create_app(llm, api_key="secret"), base_url="http://localhost") as client:
        body = {"model": "e2e", "prompt": PROMPT, **GREEDY}
        assert client.post("/v1/completions", json=body).status_code == 401
        assert client.post("/v1/completions", json={**body, "model": "x"}).status_code == 401
        assert client.get("/v1/models").status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert client.post("/v1/completions", json=body, headers=key).status_code == 200
        assert client.get("/", headers={}).status_code == 200


def test_other_host_names_are_refused_on_a_loopback_address(llm: ServedLlama) -> None:
    with TestClient(create_app(llm), base_url="http://attacker.example") as client:
        assert client.get("/v1/models").status_code == 400
    with TestClient(create_app(llm, host="0.0.0.0"), base_url="http://my-server.example") as client:
        assert client.get("/v1/models").status_code == 200


def test_the_page_loads_nothing_else(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://" not in answer.text
    assert "https://" not in answer.text


def test_the_servers_default_settings_apply(llm: ServedLlama) -> None:
    llm.chunkwise_config = ChunkWiseConfig.uniform(0.5)
    try:
        with TestClient(create_app(llm), base_url="http://localhost") as client:
            told = client.post("/v1/completions", json={"prompt": PROMPT, **GREEDY}).json()["chunkwise"]
        assert told["mean_rank"] == pytest.approx(told["full_rank"] / 2)
    finally:
        llm.chunkwise_config = None


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Debian's chromium is not installed")
def test_the_page_colours_an_answer_in_a_browser(llm: ServedLlama, tmp_path: Path) -> None:
    server = uvicorn.Server(uvicorn.Config(create_app(llm), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        browser = Browser(f"http://127.0.0.1:{port}/?ask=Where+is+Aldhaven", tmp_path)
        try:
            browser.wait_for(
                "document.getElementById('mean')?.textContent && !document.getElementById('send').disabled"
            )
            adapters = browser.value("[...document.getElementById('adapter').options].map((option) => option.value)")
            spans = "[...document.querySelectorAll('#answer span')]"
            text = browser.value(f"{spans}.map((span) => span.textContent).join('')")
            colours = browser.value(f"{spans}.map((span) => span.style.background)")
        finally:
            browser.close()
    finally:
        server.should_exit = True
        thread.join()
    assert adapters == ["wiki", "e2e", BASE]
    assert len(text) > 20
    assert all(colour.startswith("rgb") for colour in colours)


def test_the_command_says_what_is_missing(run: Any, tmp_path: Path) -> None:
    code, _, error = run("serve", "--model", tmp_path / "missing.gguf")
    assert code == 1
    assert "missing.gguf" in error
    code, _, error = run("serve", "--model", text_file(), "--ladder", "wikki")
    assert code == 1
    assert "write name=path" in error

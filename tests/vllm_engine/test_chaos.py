"""Adapters are loaded, replaced, damaged, deleted and asked for at random over HTTP; other users' answers stay right.

This runs without a budget for adapters, and with one in which few adapters fit. CHUNKWISE_CHAOS gives the number of
requests of each run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

import small
from chunkwise_lora import RankLadder
from chunkwise_lora.engines.requested_config import KEY
from chunkwise_lora.engines.vllm import versions
from conftest import E2E, WIKI, needs_vllm

REQUESTS = int(os.environ.get("CHUNKWISE_CHAOS", "400"))
CLIENTS = 6
PROMPT = "The king said"  # with its answer shorter than a block, so the KV of a replaced adapter is not found again
LONG = small.HELD_TEXT.read_text(encoding="utf-8")[:400]


MEMORY = 3 * 2**20
"""Bytes of less than two whole adapters."""
RANKS = range(2, 17, 2)
"""Ranks of the adapters' rungs."""


@pytest.fixture(scope="module", params=[{}, {"adapter_memory": MEMORY}], ids=["all memory", "little memory"])
def url(example: ModuleType, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param:
        needs_vllm(versions.MEMORY_SINCE)
    folder = tmp_path_factory.mktemp("chaos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        options = ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-num-seqs", "8"]
        options += ["--max-cpu-loras", "3", "--additional-config", json.dumps({KEY: request.param})]
        adapters = {"wiki": small.WIKI, "e2e": small.E2E}
        with example.server(small.BASE, adapters, folder / "server.log", options) as address:
            yield address


class Client:
    """A user of the server."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=120)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self._http.post(f"/v1/{path}", json=body)

    def ask(self, model: str, prompt: str = PROMPT, **extra: Any) -> httpx.Response:
        return self.post(
            "completions", model=model, prompt=prompt, max_tokens=10, temperature=0, ignore_eos=True, **extra
        )

    def text(self, model: str, prompt: str = PROMPT, **extra: Any) -> str:
        response = self.ask(model, prompt, **extra)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]


@dataclass
class Victim:
    """An adapter that is changed while it is asked for."""

    name: str
    folder: Path
    changes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def write(chance: random.Random, folder: Path) -> None:
    """Write one of two adapters, or its ladder, to a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    adapter = chance.choice([WIKI, E2E])
    if chance.random() < 0.5:
        shutil.copytree(adapter, folder)
    else:
        RankLadder.from_peft(adapter).save_pretrained(folder)


def damage(chance: random.Random, folder: Path) -> None:
    """Cut off, alter or delete files of a folder, or make its config impossible."""
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    if not files or chance.random() < 0.2:
        shutil.rmtree(folder, ignore_errors=True)
        return
    file = chance.choice(files)
    data = bytearray(file.read_bytes())
    how = chance.randrange(4)
    if how == 0:
        file.unlink()
    elif how == 1:
        file.write_bytes(data[: chance.randrange(len(data) + 1)])
    elif how == 2 and file.suffix == ".safetensors":
        data[chance.randrange(2000)] ^= 1 << chance.randrange(8)  # in the header, where nothing else is valid
        file.write_bytes(data)
    else:
        config = chance.choice([{"r": 10**9}, {"rank_pattern": {r"(\w+\w+)+!": 3}}, {"use_dora": True}, "x" * 200_000])
        (folder / "adapter_config.json").write_text(json.dumps(config))


def change(chance: random.Random, client: Client, victim: Victim) -> httpx.Response | None:
    """Change an adapter's files, load it or unload it; returns the server's response, if it was asked."""
    with victim.lock:
        victim.changes += 1  # odd while a change is under way
        try:
            what = chance.random()
            if what < 0.15:
                damage(chance, victim.folder)
                return None
            if what < 0.3:
                return client.post("unload_lora_adapter", lora_name=victim.name)
            write(chance, victim.folder)
            if what < 0.5:
                return None
            if chance.random() < 0.3:
                damage(chance, victim.folder)
            return client.post(
                "load_lora_adapter",
                lora_name=victim.name,
                lora_path=str(victim.folder),
                load_inplace=chance.random() < 0.7,
            )
        finally:
            victim.changes += 1


def answers(client: Client, model: str, prompt: str, preset: str | None) -> dict[float | None, str]:
    """The right answers by the rank that is available; None where it is not told."""
    if preset is not None or model == "base":
        text = client.text(model, prompt, **balanced(preset))
        return dict.fromkeys([*RANKS, None], text)  # a request that names a preset gets it
    of_rank = {rank: client.text(model, prompt, vllm_xargs={"chunkwise_mean_rank": rank / RANKS[-1]}) for rank in RANKS}
    return {**of_rank, None: of_rank[RANKS[-1]]}


def available(response: httpx.Response) -> float | None:
    """The rank that was available for a request, if the server tells it."""
    return (response.json()["usage"].get(KEY) or {}).get("available_rank")


def balanced(preset: str | None) -> dict[str, Any]:
    return {"vllm_xargs": {"chunkwise_preset": preset}} if preset else {}


def test_chaos(url: str, tmp_path: Path) -> None:
    client = Client(url)
    kinds = [
        ("base", None),
        *((model, preset) for model in ("wiki", "e2e") for preset in (None, "balanced", "compact")),
    ]
    steady = {
        (model, prompt, preset): answers(client, model, prompt, preset)
        for model, preset in kinds
        for prompt in (PROMPT, LONG)
    }
    right = {rank: {steady[model, PROMPT, None][rank] for model in ("wiki", "e2e")} for rank in RANKS}
    victims = [Victim(f"victim{number}", tmp_path / str(number)) for number in range(4)]
    seen: Counter[str] = Counter()
    wrong: list[str] = []

    def ask_steady(chance: random.Random) -> None:
        (model, prompt, preset), expected = chance.choice(list(steady.items()))
        response = client.ask(model, prompt, **balanced(preset))
        answer = response.json()["choices"][0]["text"] if response.status_code == 200 else response.text
        rank = available(response) if response.status_code == 200 else None
        seen["steady"] += 1
        if rank is not None and rank < RANKS[-1]:
            seen["few rungs"] += 1
        if answer != expected[rank]:
            wrong.append(f"{model}, {preset}, rank {rank}: {answer!r}, not {expected[rank]!r}")

    def ask_victim(chance: random.Random, victim: Victim) -> None:
        changes = victim.changes
        response = client.ask(victim.name)
        seen[f"victim {response.status_code}"] += 1
        if response.status_code == 200:
            answer = response.json()["choices"][0]["text"]
            rank = available(response)
            if changes == victim.changes and changes % 2 == 0 and answer not in right[rank or RANKS[-1]]:
                wrong.append(f"{victim.name}, rank {rank}: {answer!r}")
        elif not 400 <= response.status_code < 500 or len(response.text) > 3000:
            wrong.append(f"{victim.name}: HTTP {response.status_code}: {response.text[:500]}")

    def change_victim(chance: random.Random, victim: Victim) -> None:
        response = change(chance, client, victim)
        seen[f"change {response.status_code if response else ''}"] += 1
        if response is not None and (response.status_code >= 500 or len(response.text) > 3000):
            wrong.append(f"change of {victim.name}: HTTP {response.status_code}: {response.text[:500]}")

    def one(number: int) -> None:
        chance = random.Random(number)
        kind, victim = chance.random(), chance.choice(victims)
        if kind < 0.45:
            ask_steady(chance)
        elif kind < 0.75:
            ask_victim(chance, victim)
        else:
            change_victim(chance, victim)

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(one, range(REQUESTS)))
    print(dict(seen))
    assert not wrong, "\n".join(wrong[:20])
    assert all(seen[kind] for kind in ("victim 200", "victim 400", "change 200", "change 400")), seen
    assert available(client.ask("wiki")) is None or seen["few rungs"]
    assert client.text("wiki", vllm_xargs={"chunkwise_preset": "lossless"}) in right[RANKS[-1]]

"""Adapters share a budget of bytes: they give up rungs, and every answer is that of the rungs that are left."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_requests import LONG

from chunkwise_lora import ConfigError, EngineError, RankLadder
from chunkwise_lora.engines.base import adapter_info
from chunkwise_lora.engines.requested_config import KEY
from chunkwise_lora.engines.vllm import frontend, loading, settings, versions
from chunkwise_lora.engines.vllm.settings import ServerSettings
from conftest import BLOCK, E2E, OPTIONS, PROMPTS, WIKI, Engine, needs_vllm

TOKENS = 8
RUNGS = 8
WIKI_BYTES, E2E_BYTES = (
    adapter_info("", RankLadder.from_peft(adapter), 4).rung_bytes.tolist() for adapter in (WIKI, E2E)
)
LIMIT = WIKI_BYTES[-1] + E2E_BYTES[-1]
COPIES = 6

SHARDED = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    options, prompts, folders, tokens = json.load(sys.stdin)
    llm = LLM(**options, tensor_parallel_size=2)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    requests = [LoRARequest(path, number, path) for number, path in enumerate(folders, 1)]
    told = []
    for request in [*requests, *reversed(requests)]:
        for output in llm.generate(prompts, params, lora_request=request, use_tqdm=False):
            rank = output.kv_transfer_params["chunkwise"]["available_rank"]
            told.append([request.lora_path, output.prompt, rank, list(output.outputs[0].token_ids)])
    print("told " + json.dumps(told), flush=True)
"""

Answers = dict[tuple[str, str, int], list[int]]


@pytest.fixture(scope="module")
def at_rung(new_engine: Callable[..., Engine]) -> Answers:
    """Tokens without a budget, by adapter, prompt and rung of all tokens."""
    engine = new_engine()
    return {
        (adapter, prompt, rung): tokens
        for adapter in (WIKI, E2E)
        for rung in range(RUNGS + 1)
        for prompt, tokens in zip(
            PROMPTS,
            engine.greedy(PROMPTS, [adapter] * len(PROMPTS), TOKENS, chunkwise_mean_rank=rung / RUNGS),
            strict=True,
        )
    }


@pytest.fixture(scope="module")
def engine(new_engine: Callable[..., Engine], at_rung: Answers) -> Engine:
    """An engine whose adapters share memory for two whole ones."""
    needs_vllm(versions.MEMORY_SINCE)
    return new_engine(additional_config={KEY: {"adapter_memory": LIMIT}})


@pytest.fixture
def copies(engine: Engine, tmp_path: Path) -> Iterator[dict[Path, str]]:
    """Folders of adapters, in turn copies of the one and of the other, with what they are copies of."""
    folders = {tmp_path / str(number): [WIKI, E2E][number % 2] for number in range(COPIES)}
    for folder, original in folders.items():
        shutil.copytree(original, folder)
    yield folders
    for folder in folders:
        engine.llm.llm_engine.remove_lora(engine.adapter(folder).lora_int_id)


def ask(engine: Engine, prompt: Any, adapter: Path, tokens: int = TOKENS, **extra: Any) -> tuple[list[int], float]:
    """The tokens of a request, and the rank that was available for it."""
    (output,) = engine.llm.generate(
        [prompt], engine.params(tokens, **extra), lora_request=engine.adapter(adapter), use_tqdm=False
    )
    return list(output.outputs[0].token_ids), output.kv_transfer_params[KEY]["available_rank"]


def nbytes(engine: Engine) -> int:
    """Bytes of all adapters on the device."""
    backend = engine.runner.lora_manager.ladders.backend
    factors = (
        factor
        for adapter in backend.adapters
        for of_layer in backend._products.factors(adapter).values()
        for module in of_layer
        for factor in module.slices[-1]
    )
    return sum(factor.untyped_storage().nbytes() for factor in factors)


def test_adapters_that_fit_are_whole(engine: Engine, copies: dict[Path, str], at_rung: Answers) -> None:
    for folder, original in list(copies.items())[:2]:
        assert ask(engine, PROMPTS[0], folder) == (at_rung[original, PROMPTS[0], RUNGS], 16)
    assert nbytes(engine) == LIMIT


def test_an_adapter_gives_up_rungs_and_gets_them_back(
    engine: Engine, copies: dict[Path, str], at_rung: Answers
) -> None:
    for folder, original in copies.items():
        tokens, rank = ask(engine, PROMPTS[1], folder)
        assert tokens == at_rung[original, PROMPTS[1], int(rank) // 2]
        assert nbytes(engine) <= LIMIT
    first, original = next(iter(copies.items()))
    ranks = [ask(engine, PROMPTS[2], first)[1] for _ in range(20)]
    assert ranks == sorted(ranks)
    assert 0 < ranks[0] < ranks[-1] == 16
    assert ask(engine, PROMPTS[2], first)[0] == at_rung[original, PROMPTS[2], RUNGS]
    assert nbytes(engine) <= LIMIT
    ids = {engine.adapter(folder).lora_int_id for folder in copies}
    assert ids <= engine.llm.llm_engine.list_loras()


def test_a_request_that_names_its_plan_gets_it(engine: Engine, copies: dict[Path, str], at_rung: Answers) -> None:
    for _ in range(2):
        for folder, original in copies.items():
            tokens, rank = ask(engine, PROMPTS[0], folder, chunkwise_preset="lossless")
            assert (tokens, rank) == (at_rung[original, PROMPTS[0], RUNGS], 16)
            assert nbytes(engine) <= LIMIT


def test_an_adapter_needs_its_files_no_longer(engine: Engine, copies: dict[Path, str], at_rung: Answers) -> None:
    for folder in copies:
        ask(engine, PROMPTS[0], folder)
        shutil.rmtree(folder)
    first, original = next(iter(copies.items()))
    assert ask(engine, PROMPTS[0], first)[1] < 16
    assert ask(engine, PROMPTS[3], first, chunkwise_preset="lossless") == (at_rung[original, PROMPTS[3], RUNGS], 16)


def test_kv_of_fewer_rungs_is_not_shared_with_that_of_more(engine: Engine, copies: dict[Path, str]) -> None:
    def found(adapter: Path, **extra: Any) -> tuple[int, float, list[int]]:
        (output,) = engine.llm.generate(
            LONG, engine.params(4, **extra), lora_request=engine.adapter(adapter), use_tqdm=False
        )
        ranks = output.kv_transfer_params[KEY]
        return output.num_cached_tokens, ranks["available_rank"], list(output.outputs[0].token_ids)

    for folder in copies:
        ask(engine, PROMPTS[0], folder)
    last = list(copies)[-1]
    cached, low, answer = found(last)
    assert cached == 0 and low < 16
    cached, full, lossless = found(last, chunkwise_preset="lossless")
    assert cached == 0 and full == 16
    for _ in range(2):
        for folder in list(copies)[:2]:
            ask(engine, PROMPTS[0], folder, chunkwise_preset="lossless")
    for _ in range(20):
        cached, rank, tokens = found(last)
        if rank in (low, full):
            assert cached >= BLOCK
            assert tokens == (answer if rank == low else lossless)
        if rank == full:
            break
    assert rank == full


def test_requests_wait_while_others_run_with_all_of_the_memory(
    engine: Engine, copies: dict[Path, str], at_rung: Answers
) -> None:
    for number, folder in enumerate(copies):
        engine.add(str(number), PROMPTS[0], folder, TOKENS, chunkwise_preset="lossless")
    engine.step()
    assert len(engine.core.scheduler.running) == 2
    finished = engine.run()
    for number, original in enumerate(copies.values()):
        assert finished[str(number)] == at_rung[original, PROMPTS[0], RUNGS]


def test_soak(engine: Engine, copies: dict[Path, str], at_rung: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request gets other rungs than it is told, whatever else runs, and no plan uses a rung that is not there."""
    chance, manager, plan = random.Random(0), engine.runner.lora_manager.ladders, engine.planner.plan

    def checked_plan(*arguments: Any) -> Any:
        planned = plan(*arguments)
        for segment in planned.segments:
            held = min(manager.rungs[int(segment.adapter)], RUNGS)
            assert segment.rung <= held
            assert segment.adapter in manager.backend.adapters
        assert nbytes(engine) <= LIMIT
        return planned

    monkeypatch.setattr(engine.planner, "plan", checked_plan)
    waiting: dict[str, tuple[Path, str, int]] = {}
    ranks: set[float] = set()
    added = 0
    while added < 120 or waiting:
        while added < 120 and len(waiting) < 6:
            folder, prompt = list(copies)[int(chance.paretovariate(1)) % COPIES], chance.choice(PROMPTS)
            share = chance.choice([None] * 6 + [0.25, 0.5, 1.0])
            extra = {} if share is None else {"chunkwise_mean_rank": share}
            engine.add(f"soak{added}", prompt, folder, TOKENS, **extra)
            waiting[f"soak{added}"] = folder, prompt, int(RUNGS * (1 if share is None else share))
            added += 1
        if chance.random() < 0.05:
            victim = chance.choice(list(waiting))
            engine.llm.llm_engine.abort_request([victim])
            del waiting[victim]
        for output in engine.llm.llm_engine.step():
            if output.finished:
                folder, prompt, highest = waiting.pop(output.request_id)
                told = output.kv_transfer_params[KEY]
                rung = min(highest, int(told["available_rank"]) // 2)
                assert list(output.outputs[0].token_ids) == at_rung[copies[folder], prompt, rung]
                assert told["mean_rank"] == 2 * rung
                ranks.add(told["mean_rank"])
    engine.settle()
    assert len(ranks) > 3
    assert not engine.runner.chunkwise._limits
    assert not engine.core.scheduler.chunkwise.budget._running


def test_two_ranks_give_up_the_same_rungs(copies: dict[Path, str], at_rung: Answers, tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"  # a file, because workers import it when they start
    script.write_text(SHARDED)
    options = {**OPTIONS, "additional_config": {KEY: {"adapter_memory": LIMIT}}}
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps([options, PROMPTS[:2], list(map(str, copies)), TOKENS]),
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line.removeprefix("told ") for line in done.stdout.splitlines() if line.startswith("told "))
    told = json.loads(line)
    for folder, prompt, rank, tokens in told:
        assert tokens == at_rung[copies[Path(folder)], prompt, int(rank) // 2]
    assert len({rank for _, _, rank, _ in told}) > 2


def test_an_adapter_that_is_loaded_without_a_request_takes_no_memory_of_the_device(
    engine: Engine, copies: dict[Path, str]
) -> None:
    before = nbytes(engine)
    for folder in copies:
        engine.llm.llm_engine.add_lora(engine.adapter(folder))
    assert nbytes(engine) == before


def test_the_factors_of_a_loaded_adapter_are_not_in_memory(engine: Engine, copies: dict[Path, str]) -> None:
    engine.llm.llm_engine.add_lora(engine.adapter(next(iter(copies))))
    held = engine.runner.lora_manager.loaded(engine.adapter(next(iter(copies))).lora_int_id)
    storages = {
        factor.untyped_storage().data_ptr()
        for modules in held.modules.values()
        for module in modules
        for factor in (module.up, module.down)
    }
    assert len(storages) == 1
    (start,) = storages
    mapped = next(
        line for line in Path("/proc/self/maps").read_text().splitlines() if int(line.split("-")[0], 16) == start
    )
    assert mapped.endswith("(deleted)")


def test_an_adapter_cannot_be_pinned(engine: Engine) -> None:
    with pytest.raises(EngineError, match="adapter_memory"):
        engine.runner.lora_manager.pin_adapter(1)


@pytest.mark.parametrize("adapter", [WIKI, E2E])
def test_the_front_end_knows_the_size_of_an_adapter_without_loading_it(adapter: str, tmp_path: Path) -> None:
    ladder = RankLadder.from_peft(adapter)
    ladder.save_pretrained(tmp_path)
    for folder in (adapter, str(tmp_path)):
        known = loading.check(folder, ServerSettings())
        assert [4 * numbers for numbers in known.rung_numbers] == adapter_info("", ladder, 4).rung_bytes.tolist()
        assert known.rung_ranks == ladder.rung_ranks


def test_a_budget_below_one_rung_is_refused_by_name(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine.llm.llm_engine.vllm_config
    monkeypatch.setitem(config.additional_config, KEY, {"adapter_memory": 1000})
    with pytest.raises(ValueError, match=f"lowest rung takes {WIKI_BYTES[1]} bytes, more than .*adapter_memory, 1000"):
        engine.greedy(PROMPTS[:1], [WIKI], 4)


@pytest.mark.parametrize(("given", "limit"), [("512MiB", 2**29), ("1GB", 10**9), (4096, 4096)])
def test_the_budget_is_given_in_bytes_or_their_multiples(given: Any, limit: int) -> None:
    assert settings.of_server({KEY: {"adapter_memory": given, "preset": "balanced"}}).adapter_memory == limit


@pytest.mark.parametrize("given", ["much", 0, -1])
def test_an_impossible_budget_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="adapter_memory"):
        settings.of_server({KEY: {"adapter_memory": given}})


def test_a_vllm_in_which_requests_cannot_wait_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine.llm.llm_engine.vllm_config
    monkeypatch.setattr("vllm.__version__", "0.30.1+cpu")
    with pytest.raises(EngineError, match=r"adapter_memory needs vLLM 0\.31"):
        frontend.prepare(config)
    assert versions.HOOKS["may_start"].owners() == []

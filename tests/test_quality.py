"""Data, metrics and evaluations agree with reference implementations and with examples computed by hand."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import shutil
from dataclasses import dataclass, replace
from itertools import combinations, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from peft import PeftModel
from rich.console import Console
from sacrebleu.metrics.bleu import BLEU
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer import BadParameter

import adapters
import small
from chunkwise_lora import ChunkWiseConfig, ChunkWiseError, ChunkWiseModel, ConfigError, RankLadder
from chunkwise_lora.calibration import CalibrationConfig, search
from chunkwise_lora.calibration.calibrate import calibrate
from chunkwise_lora.calibration.passes import passes_as_generated
from chunkwise_lora.cli.rendering import evaluation_table
from chunkwise_lora.evaluation import data
from chunkwise_lora.evaluation.answer_generator import AnswerGenerator
from chunkwise_lora.evaluation.answers import evaluate_answers
from chunkwise_lora.evaluation.baselines import BASELINES, Comparison, MethodSelection, cheapest
from chunkwise_lora.evaluation.continuation import PromptBatch, Tokens
from chunkwise_lora.evaluation.data import Example
from chunkwise_lora.evaluation.methods import FULL, Generator, Label, PlainMethod, PlannedMethod, Role, Spent, Visit
from chunkwise_lora.evaluation.metrics import Scores, bleu, exact_match_and_f1
from chunkwise_lora.evaluation.packing import fitting, packed
from chunkwise_lora.evaluation.plot import plot
from chunkwise_lora.evaluation.report import markdown, page
from chunkwise_lora.evaluation.results import Evaluation, Prediction, Result, Score, free_ranks
from chunkwise_lora.evaluation.settings import EvaluationSettings
from chunkwise_lora.evaluation.statistics import Estimate, bootstrap, per_token, segments
from chunkwise_lora.evaluation.tasks import CalibrationReader, own_policy
from chunkwise_lora.evaluation.text import evaluate_text, windows_of
from chunkwise_lora.evaluation.verdict import findings, verdict
from chunkwise_lora.ladder.contents import Expectation
from chunkwise_lora.method.config import ChunkingConfig, ComplexityConfig, KVCacheConfig, LevelKVPolicy
from meanings import recombined, slots_of
from models import VOCABULARY, adapter, build

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "The tower was built in 1889 by the company of Gustave Eiffel.",
                    "qas": [
                        {"question": "When?", "answers": [{"text": "1889"}, {"text": "in 1889"}, {"text": "1889"}]},
                        {"question": "By whom?", "answers": [{"text": "the company of Gustave Eiffel"}]},
                    ],
                }
            ]
        }
    ]
}


# Data


def test_squad_keeps_every_question_and_its_distinct_answers() -> None:
    first, second = data.squad_rows(SQUAD)
    assert first.references == ("1889", "in 1889")
    assert second.prompt.startswith("The tower was built") and second.prompt.endswith("Question: By whom?\nAnswer:")


def test_e2e_gathers_the_references_of_a_meaning(tmp_path: Path) -> None:
    file = tmp_path / "e2e.csv"
    file.write_text('mr,ref\n"name[A], food[B]",One.\n"name[C]",Two.\n"name[A], food[B]","Three, four."\n')
    assert data.e2e(str(file)) == [
        Example("name[A], food[B] ->", ("One.", "Three, four.")),
        Example("name[C] ->", ("Two.",)),
    ]


def test_examples_may_have_no_answer(tmp_path: Path) -> None:
    file = tmp_path / "e2e.csv"
    for content in ("mr\nname[A]\n", "mr,ref\nname[A],\n", "mr,ref\nname[A]\n", "\ufeffmr,ref\nname[A], \n"):
        file.write_text(content)
        assert data.e2e(str(file)) == [Example("name[A] ->", ())]
    paragraph = {"context": "The tower was built in 1889.", "qas": [{"question": "When?", "answers": []}]}
    (example,) = data.squad_rows({"data": [{"paragraphs": [paragraph]}]})
    assert example.references == ()


def test_a_reference_may_contain_any_characters(tmp_path: Path) -> None:
    file = tmp_path / "e2e.csv"
    file.write_text('mr,ref\nname[A],"One,\ntwo\u2028three."\n')
    assert data.e2e(str(file)) == [Example("name[A] ->", ("One,\ntwo\u2028three.",))]


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (data.squad, "{}", "data: Field required"),
        (data.squad, "no json", "JSON"),
        (data.squad, "[]", "object"),
        (data.squad, "[" * 100_000, "JSON"),
        (data.squad, '{"data": [{"paragraphs": [{"context": null, "qas": []}]}]}', "data.0.paragraphs.0.context"),
        (data.squad, '{"data": [{"paragraphs": [{"context": "x", "qas": [{"question": "y"}]}]}]}', "qas.0.answers"),
        (data.e2e, "a,b\n1,2\n", "mr and ref"),
        (data.e2e, "mr,reff\nname[A],x\n", "mr and ref"),
        (data.e2e, "mr,mr\nname[A],x\n", "mr and ref"),
        (data.e2e, "", "mr and ref"),
        (data.e2e, "mr\nname[A]\nname[B], food[C]\n", "line 3: has more values"),
        (data.e2e, "mr,ref\n ,x\n", "line 2: mr is empty"),
        (data.e2e, 'mr,ref\n"name[A],x\n', "after line 1"),
        (data.e2e, f"mr,ref\nname[A],{'x' * 200_000}\n", "after line"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name_and_line_or_field(
    tmp_path: Path, read: Any, content: str, message: str
) -> None:
    file = tmp_path / "other"
    file.write_text(content)
    with pytest.raises(ChunkWiseError, match="other") as error:
        read(str(file))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_beginning_of_sequence_token_comes_before_the_prompt_alone() -> None:
    tokenizer = AutoTokenizer.from_pretrained(small.BASE)
    plain = data.encode(tokenizer, "Question: where?", "Here.")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    prompt, answer = data.encode(tokenizer, "Question: where?", "Here.")
    assert prompt == [0, *plain[0]] and answer == plain[1] and answer[-1] == tokenizer.eos_token_id


class Letters:
    """A tokenizer whose tokens are letters."""

    eos_token_id = 1

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, verbose: bool = True) -> Any:
        one, many = ([ord(letter) for letter in text], [[ord(letter) for letter in one] for one in text])
        return SimpleNamespace(input_ids=one if isinstance(text, str) else many)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), longest=st.integers(2, 40))
def test_every_packed_block_begins_with_another_example(lengths: list[int], longest: int) -> None:
    examples = [Example(f"{chr(100 + i)}{'.' * length}", ("x", "y")) for i, length in enumerate(lengths)]
    ids, scored, block = packed(examples, Letters(), longest)
    assert 1 < block <= longest and len(ids) == block * 2 * len(lengths)
    starts = [chr(first) for first in ids[::block]]
    assert starts[::2] == starts[1::2], "examples of a topic stay together"
    assert sorted(starts) == sorted(2 * [example.prompt[0] for example in examples])
    for start in range(0, len(ids), block):
        text, own = ids[start : start + block], lengths[ord(chr(ids[start])) - 100] + 1
        of_answers = {place for place in range(block) if own <= place < own + 3}  # " x" and the end
        both = of_answers | {place + own + 3 for place in of_answers}  # the topic's other reference follows
        assert {i for i in range(block - 1) if scored[start + i]} == {i - 1 for i in both if i - 1 < block - 1}, text


@given(questions=st.integers(2, 9), longest=st.integers(30, 200))
def test_the_questions_on_a_paragraph_share_it(questions: int, longest: int) -> None:
    paragraph, end = "paragraph" * 2, chr(Letters.eos_token_id)
    topics = [f"{number}{paragraph}" for number in range(3)]
    examples = [Example(f"{topic}?{chr(65 + i)}:", (f"{i}",), topic) for topic in topics for i in range(questions)]
    ids, scored, block = packed(examples, Letters(), longest)
    texts = ["".join(map(chr, ids[start : start + block])) for start in range(0, len(ids), block)]
    assert all(text.count(text[:19]) == 1 for text in texts), "the paragraph is not repeated"
    for topic in topics:
        answered = "".join(text for text in texts if text.startswith(topic))
        assert all(f"?{chr(65 + i)}: {i}{end}" in answered for i in range(questions))
    for text, start in zip(texts, range(0, len(ids), block), strict=True):
        other = re.search(r"\d(p|$)", text[1:])
        found = [place for place in range(block - 1) if scored[start + place]]
        assert found and (other is None or max(found) < 1 + other.start()), "other topics are not scored"


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3), longest=st.integers(2, 200))
def test_packed_blocks_have_a_given_length(lengths: list[int], longest: int) -> None:
    examples = [Example(f"{chr(100 + i)}{'.' * length}", ("x",)) for i, length in enumerate(lengths)]
    ids, scored, block = packed(examples, Letters(), longest, exact=True)
    assert block == longest and len(ids) == len(scored) == block * len(lengths)
    for i in range(0, len(ids), block):
        own = lengths[ids[i] - 100] + 1
        assert {place for place in range(block - 1) if scored[i + place]} == {
            place - 1 for place in range(own, own + 3) if place < block
        }, "only the answer of the block's topic, and only once"


@pytest.fixture(scope="module")
def e2e_answers() -> Any:
    """A generator of answers with the small E2E adapter, and its tokenizer."""
    base = AutoModelForCausalLM.from_pretrained(small.BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(small.BASE)
    ladder = RankLadder.from_peft(small.E2E)
    return AnswerGenerator(base, ladder, tokenizer, batch=2), tokenizer


UNANSWERED = [Example(f"name[{name}], area[riverside] ->", ()) for name in ("Aldhaven", "The Vaults", "Zizzi")]


def test_an_adapter_generates_the_same_answers_as_in_peft(e2e_answers: Any) -> None:
    answer, tokenizer = e2e_answers
    base = AutoModelForCausalLM.from_pretrained(small.BASE, dtype=torch.float32)
    full = PeftModel.from_pretrained(base, str(small.E2E))
    found = answer(UNANSWERED)
    assert sorted(one.prompt for one in found) == sorted(one.prompt for one in UNANSWERED)
    for one in found:
        prompt = tokenizer(one.prompt, return_tensors="pt")
        ids = full.generate(**prompt, do_sample=False, max_new_tokens=64, pad_token_id=0)[0]
        said = tokenizer.decode(ids[prompt.input_ids.shape[1] :], skip_special_tokens=True)
        assert one.references == (said.strip(),)


def test_calibration_generates_missing_answers_with_the_adapter(e2e_answers: Any, tmp_path: Path) -> None:
    answer, tokenizer = e2e_answers
    file = tmp_path / "e2e.csv"
    file.write_text("mr,ref\nname[Aldhaven],It is a pub.\nname[Zizzi],\n")
    ids, scored, length = CalibrationReader("e2e", tokenizer, answer)(str(file), 512)
    (own,) = answer([Example("name[Zizzi] ->", ())])
    assert f"name[Zizzi] -> {own.references[0]}" in tokenizer.decode(ids)
    assert "name[Aldhaven] -> It is a pub." in tokenizer.decode(ids)
    assert scored is not None and len(ids) == len(scored) == 2 * length


def test_prompts_that_are_too_long_are_left_out_and_named(e2e_answers: Any, tmp_path: Path) -> None:
    answer, tokenizer = e2e_answers
    file, said = tmp_path / "e2e.csv", list[str]()
    long = "name[" + "very " * 300 + "long]"
    file.write_text(f"mr,ref\nname[Aldhaven],It is a pub.\n{long},It is long.\nname[Zizzi],\n{long} too,\n")
    ids, *_ = CalibrationReader("e2e", tokenizer, answer, said.append)(str(file), 128)
    assert "very" not in tokenizer.decode(ids) and "Zizzi" in tokenizer.decode(ids)
    (note,) = said
    length = len(tokenizer(f"{long} ->").input_ids)
    assert "2 of 4 prompts do not fit into a block of 128 tokens" in note
    assert f"number 2 ({length} tokens, 'name[very very" in note and "number 4" in note
    with pytest.raises(ChunkWiseError, match="longer blocks"):
        CalibrationReader("e2e", tokenizer, answer)(str(file), 4)


def test_only_as_many_prompts_are_read_as_are_needed() -> None:
    tokenizer = AutoTokenizer.from_pretrained(small.BASE)
    examples = [Example(f"number {i}", ("a", "b")) for i in range(100)]
    kept = fitting(examples, tokenizer, 64, 250, print)
    assert 0 < sum(2 * len(tokenizer(one.prompt).input_ids) for one in kept) <= 250 and len(kept) > 10
    assert kept[-1].prompt > "number 9" and fitting(examples, tokenizer, 64, None, print) == examples


def test_answers_that_do_not_end_are_left_out(e2e_answers: Any, tmp_path: Path) -> None:
    answer, tokenizer = e2e_answers
    file = tmp_path / "e2e.csv"
    file.write_text("mr\nname[Aldhaven]\n")
    with pytest.raises(ChunkWiseError, match="within 64 tokens"):
        CalibrationReader("e2e", tokenizer, replace(answer, new_tokens=3))(str(file), 512)


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused(e2e_answers: Any) -> None:
    answer, tokenizer = e2e_answers
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ChunkWiseError, match="eos_token"):
        replace(answer, tokenizer=endless)(UNANSWERED)


def test_training_refuses_rows_without_an_answer(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("mr,ref\nname[Aldhaven],It is a pub.\nname[Zizzi],\n")
    with pytest.raises(BadParameter, match="1 of 2 rows have no ref"):
        adapters.e2e(file, base=small.BASE, out=tmp_path / "out")


def test_recombined_meanings_are_new_and_have_known_values() -> None:
    known = ["name[A], area[north]", "name[B, C], area[south], food[D]"]
    found = recombined(known, 100)
    slots = {slot for meaning in known for slot in slots_of(meaning)}
    assert len(set(found)) == len(found) == 2 * 2 * 2 - len(known), "all possible new meanings"
    assert not set(found) & set(known)
    assert all(set(slots_of(meaning)) <= slots for meaning in found)
    assert recombined(known, 3) == found[:3]
    with pytest.raises(ChunkWiseError, match="hello"):
        recombined(["hello world"], 1)


def test_recombined_meanings_can_have_names_from_another_text() -> None:
    known = ["name[A], area[north]", "name[B, C], area[south], food[D]"]
    slots = [slot for meaning in recombined(known, 100, names=["Karsund"]) for slot in slots_of(meaning)]
    assert {value for name, value in slots if name == "name"} == {"A", "B, C", "Karsund"}
    assert {value for name, value in slots if name == "food"} == {"D", "Karsund"}
    assert {value for name, value in slots if name == "area"} == {"north", "south"}, "which are not names"


# Metrics


@pytest.mark.parametrize(
    ("answer", "exact", "f1"),
    [
        ("1889", 100, 100),
        ("In  1889!", 100, 100),  # case, punctuation and spaces are ignored
        ("the 1889", 100, 100),  # articles are ignored
        ("built in 1889", 0, 80),  # 2 of 3 words are right, 2 of 2 are found
        ("1890", 0, 0),
        ("", 0, 0),
    ],
)
def test_exact_match_and_f1_equal_those_of_squad(answer: str, exact: float, f1: float) -> None:
    scores = exact_match_and_f1([answer], [Example("", ("1889", "in 1889"))]).points()
    assert scores["exact match"].value == pytest.approx(exact)
    assert scores["F1"].value == pytest.approx(f1)


def test_bleu_accepts_different_numbers_of_references() -> None:
    examples = [Example("", ("one two three four five", "six seven eight nine ten")), Example("", ("a b c d e f",))]
    perfect = bleu(["six seven eight nine ten", "a b c d e f"], examples).points()["BLEU"]
    assert perfect.value == pytest.approx(100)
    # 4-gram precisions 10/11, 8/9, 6/7, 4/5, no brevity penalty: hypotheses are as long as the closest references.
    worse = bleu(["six seven eight nine ten", "a b c d e x"], examples).points()["BLEU"]
    assert worse.value == pytest.approx(100 * (10 / 11 * 8 / 9 * 6 / 7 * 4 / 5) ** 0.25)
    assert worse.low <= worse.value <= worse.high


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), max_size=12).map(" ".join)


@given(cases=st.lists(st.tuples(WORDS, st.lists(WORDS.filter(bool), min_size=1, max_size=3)), min_size=1, max_size=6))
def test_bleu_equals_that_of_sacrebleu(cases: list[tuple[str, list[str]]]) -> None:
    answers, references = zip(*cases, strict=True)
    corpus = BLEU().corpus_score(answers, list(zip_longest(*references)))
    examples = [Example("", tuple(of_one)) for of_one in references]
    assert bleu(answers, examples).points()["BLEU"].value == pytest.approx(corpus.score)


@given(seed=st.integers(0, 1000))
def test_differences_to_full_rank_are_paired(seed: int) -> None:
    right = np.random.default_rng(seed).random((2, 200, 1)) < 0.5
    right[1, 20:] = right[0, 20:]  # one of ten answers may differ
    few, full = (Scores(100.0 * one, {"right": lambda means: means[..., 0]}) for one in right)
    over, alone = few.over(full)["right"], few.points()["right"]
    assert over.value == pytest.approx(100 * (right[0].mean() - right[1].mean()))
    assert over.high - over.low < alone.high - alone.low
    assert set(vars(full.over(full)["right"]).values()) == {0}


@given(seed=st.integers(0, 1000))
def test_a_bootstrap_interval_is_about_as_wide_as_in_theory(seed: int) -> None:
    pieces = np.random.default_rng(seed).normal(3, 2, (400, 1))
    found = bootstrap(pieces)
    assert found.value == pytest.approx(pieces.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * pieces.std() / 20, rel=0.2)


# Text


@dataclass(frozen=True)
class Guess(PlainMethod):
    """Every token is equally likely after every token."""

    vocabulary: int = 50

    def score(self, windows: torch.Tensor, visit: Visit) -> Spent:
        for row in range(len(windows)):
            visit(slice(row, row + 1), slice(None), torch.zeros(1, windows.shape[1], self.vocabulary).log_softmax(-1))
        return Spent(np.ones(windows.shape))


GUESS = Guess(Label(FULL, FULL, "full"), None, 1.0)


@dataclass(frozen=True)
class Counting(PlainMethod):
    """The loss of the token with the id n is n / 10 nats."""

    def score(self, windows: torch.Tensor, visit: Visit) -> Spent:
        visit(slice(None), slice(None), -torch.arange(60).expand(*windows.shape, 60) / 10)
        return Spent(np.ones(windows.shape))


@given(tokens=st.integers(8, 60), length=st.integers(2, 8), stride=st.integers(1, 8))
def test_no_token_is_scored_twice_or_left_out_between_windows(tokens: int, length: int, stride: int) -> None:
    stride = min(stride, length)
    windows = windows_of(list(range(tokens)), length, stride)
    (result,), _ = evaluate_text([Counting(Label(FULL, FULL, "full"), None, 1.0)], windows, stride)
    scored = windows[:, 1:] if stride == length else torch.arange(length - stride, int(windows[-1, -1]) + 1)
    assert np.log(result.scores["perplexity"].value) == pytest.approx(float(scored.double().mean()) / 10, rel=1e-4)


@given(rows=st.integers(1, 4), tokens=st.integers(1, 200), seed=st.integers(0, 1000))
def test_the_mean_over_segments_includes_every_token(rows: int, tokens: int, seed: int) -> None:
    values = np.random.default_rng(seed).exponential(size=(rows, tokens))
    pieces = segments(values)
    assert pieces[:, 1].sum() == values.size
    assert per_token(pieces.mean(0)) == pytest.approx(values.mean())


def test_a_uniform_guess_has_the_perplexity_of_the_vocabulary() -> None:
    (result,), _ = evaluate_text([GUESS], torch.randint(0, 50, (3, 20)), 20)
    assert result.scores["perplexity"].value == pytest.approx(50, rel=1e-5)
    assert (result.kl.value, result.over_full["perplexity"].value) == (0, 0)


@given(seed=st.integers(0, 1000), budget=st.floats(1, 8))
def test_the_cheapest_choice_keeps_its_budget_and_beats_one_rank_for_all(seed: int, budget: float) -> None:
    ranks = np.arange(9.0)
    hardness = np.random.default_rng(seed).exponential(size=300)
    costs = hardness[:, None] * np.exp(-0.5 * ranks)
    chosen = cheapest(costs, ranks, budget)
    assert ranks[chosen].mean() <= budget
    assert costs[np.arange(300), chosen].sum() <= costs[:, int(budget)].sum() + costs[:, 0].max()


WINDOWS = torch.randint(2, VOCABULARY, (30 * 24,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    model, path = build("llama"), adapter("llama")
    config = CalibrationConfig(mean_rank=0.5, block=24, refinements=0, explorations=1)
    with pytest.MonkeyPatch.context() as patch:  # each token gets its own rung, though that does not pay here
        patch.setattr(search, "CHOICE_GAIN", -math.inf)
        patch.setattr(search, "STANDARD_ERRORS", -math.inf)
        found = calibrate(model, RankLadder.from_peft(path), WINDOWS.tolist(), config)
    return Comparison(model, path, {"calibrated": found.ladder})


@pytest.fixture(scope="module")
def results(comparison: Comparison) -> dict[str, Result]:
    selection = MethodSelection(
        ["lossless", "balanced", "calibrated"], BASELINES, (0.25, 0.5, 0.75), {"again": adapter("llama")}
    )
    windows = WINDOWS[:96].view(4, 24)
    methods = comparison.methods(selection, windows)
    return {one.name: one for one in evaluate_text(methods, windows, 24, expectations=comparison.expectations())[0]}


def test_lossless_and_a_second_peft_equal_full_rank(results: dict[str, Result]) -> None:
    for name in ("ChunkWise lossless", "again"):
        assert results[name].kl.value == pytest.approx(0, abs=1e-6)
        assert results[name].mean_rank == 8


def test_uniform_truncation_gets_better_with_rank(results: dict[str, Result]) -> None:
    for series in ("plain SVD", "calibrated rungs"):
        kl = [one.kl.value for one in results.values() if one.label.series == series]
        assert len(kl) == 3 and kl == sorted(kl, reverse=True)


def test_plain_svd_runs_at_the_ranks_that_were_asked_for(results: dict[str, Result]) -> None:
    ranks = [one.mean_rank for one in results.values() if one.label.series == "plain SVD"]
    assert ranks == [2, 4, 6]


def test_baselines_run_at_the_mean_rank_of_the_plan_by_default(comparison: Comparison) -> None:
    methods = comparison.methods(MethodSelection(["calibrated"], ["svd", "ladder"]), WINDOWS[:96].view(4, 24))
    *_, plain, rungs, plan = methods
    assert len(methods) == 4 and isinstance(plain, PlannedMethod) and isinstance(rungs, PlannedMethod)
    assert plan.label.asked == 4
    assert plain.label.asked is not None and rungs.label.asked is not None
    assert rungs.label.asked <= plain.rank < rungs.label.asked + 1, "plain SVD has no less than the plan"


def test_the_oracle_spends_no_more_and_beats_a_shuffled_plan(results: dict[str, Result]) -> None:
    oracle, random = results["calibrated oracle"], results["calibrated random"]
    ours = results["ChunkWise calibrated"]
    assert oracle.mean_rank <= ours.mean_rank + 1e-6
    assert random.mean_rank == pytest.approx(ours.mean_rank)
    assert oracle.kl.value < random.kl.value


def test_the_baseline_without_choice_has_the_mean_rank_of_the_plan(results: dict[str, Result]) -> None:
    alike = results["calibrated alike"]
    assert alike.mean_rank == pytest.approx(results["ChunkWise calibrated"].mean_rank, abs=0.05)


def test_what_calibration_expects_is_compared_with_what_is_measured(results: dict[str, Result]) -> None:
    ours, full = results["ChunkWise calibrated"], results[FULL]
    assert full.prediction is None and ours.prediction is not None
    losses = [np.log(one.scores["perplexity"].value) for one in (ours, full)]
    assert ours.prediction.loss_increase.value == pytest.approx(losses[0] / losses[1] - 1, rel=1e-3)
    assert ours.prediction.expected.asked_rank == ours.label.asked == 4


UNAWARE = ChunkWiseConfig(
    complexity=ComplexityConfig(entropy=0, novelty=0, attention=0, position=1, half_life=8),
    chunking=ChunkingConfig(hard_share=1.0),
    kv_cache=KVCacheConfig(levels=(LevelKVPolicy(),) * 3),
)
INT8 = ChunkWiseConfig.uniform(0.5).model_copy(
    update={
        "chunking": ChunkingConfig(thresholds=(), min_length=1, max_length=5),
        "kv_cache": KVCacheConfig(levels=(LevelKVPolicy(precision="int8"),), sinks=2),
    }
)
AGED = INT8.model_copy(update={"kv_cache": KVCacheConfig(levels=(LevelKVPolicy(max_age=7),))})


@pytest.mark.parametrize(
    ("config", "lengths"),
    [(UNAWARE, [24]), (INT8, [6, 5, 5, 5, 3]), (AGED, [1] * 24), (ChunkWiseConfig.preset("balanced"), [1] * 24)],
    ids=["tokens alone", "INT8", "dropped", "entropy"],
)
def test_text_is_scored_in_few_passes_as_token_by_token(config: ChunkWiseConfig, lengths: list[int]) -> None:
    comparison = Comparison(build("llama"), adapter("llama"))
    windows, found = WINDOWS[:48].view(2, 24), []
    (*_, method) = comparison.methods(MethodSelection([], configs={"own": config}), windows)
    assert isinstance(method, PlannedMethod) and method.passes(24) == lengths
    spent = method.score(windows, lambda rows, columns, log_p: found.append(log_p))
    log_p = torch.cat(found, dim=0 if len(lengths) == 1 else 1)
    with method.open(2, 1) as opened, torch.no_grad():
        steps = [method.read(opened, column) for column in windows.split(1, dim=1)]
        assert opened.trace is not None
        trace = opened.trace()
    assert torch.allclose(log_p, torch.cat(steps, dim=1).log_softmax(-1), atol=1e-4)
    assert np.array_equal(spent.ranks, [sequence.ranks for sequence in trace.sequences])
    assert spent.kv_share == pytest.approx(trace.kv_bytes / trace.kv_bytes_full)
    if config is INT8:
        with method.open(2, 24) as opened, torch.no_grad():
            in_one = method.read(opened, windows).log_softmax(-1)
        assert not torch.allclose(log_p, in_one, atol=1e-4), "one pass would not see INT8"


@given(columns=st.integers(0, 40), read=st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_passes_end_where_any_sequence_closes_a_chunk(columns: int, read: list[int]) -> None:
    lengths = passes_as_generated(INT8, columns, read)
    assert sum(lengths) == columns and all(lengths)
    ends, longest = set(np.cumsum(lengths).tolist()), INT8.chunking.max_length
    closing = {i + 1 for i in range(columns) for before in read if before + i and not (before + i) % longest}
    assert closing <= ends <= closing | {columns}


# Answers


def prompt_batch(lengths: tuple[int, ...] = (9, 12, 7, 8), topics: str = "aabc") -> PromptBatch:
    """Prompts, of which the first two begin with the same five tokens."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    prompts[1][:5] = prompts[0][:5]
    return PromptBatch(prompts, topics)


GENERATORS = (
    FULL,
    "plain SVD at 4",
    "ChunkWise lossless",
    "ChunkWise balanced",
    "ChunkWise compact",
    "ChunkWise entropy",
    "ChunkWise int8",
)


@pytest.fixture(scope="module")
def generators() -> dict[str, Generator]:
    comparison = Comparison(build("llama"), adapter("llama"))
    entropy = ChunkWiseConfig(kv_cache=KVCacheConfig(levels=(LevelKVPolicy(),) * 3))
    selection = MethodSelection(
        ["lossless", "balanced", "compact"], ["svd"], [0.5], configs={"entropy": entropy, "int8": INT8}
    )
    return {one.name: one for one in comparison.methods(selection, WINDOWS[None, :24]) if isinstance(one, Generator)}


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("topics", ["aabc", "abcd"], ids=["shared beginnings", "nothing shared"])
def test_a_batch_of_prompts_generates_what_each_prompt_generates_alone(
    generators: dict[str, Generator], name: str, topics: str
) -> None:
    method, batch = generators[name], prompt_batch(topics=topics)
    with batch.begin(method) as run:
        answers, log_p = run.generate(6, lambda token: token % 7 == 0)
    for row, (prompt, answer) in enumerate(zip(batch.prompts, answers, strict=True)):
        options: dict[str, Any] = {"max_new_tokens": len(answer), "do_sample": False, "pad_token_id": 0}
        if isinstance(method, PlannedMethod):
            options |= {"adapter_names": method.ladder, "chunkwise_config": method.config}
        model = method.chunkwise if isinstance(method, PlannedMethod) else method.model
        alone = model.generate(input_ids=torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert alone == answer == log_p[row].argmax(-1).tolist()[: len(answer)]
        assert len(answer) == 6 or answer[-1] % 7 == 0


@pytest.mark.parametrize("name", GENERATORS)
def test_reading_an_answer_gives_the_distributions_of_generating_it(
    generators: dict[str, Generator], name: str
) -> None:
    with prompt_batch().begin(generators[name]) as run:
        answers, log_p = run.generate(5, lambda token: False)
        ranks = run.mean_ranks()
    with prompt_batch().begin(generators[name]) as run:
        again = run.read(Tokens.padded([answer[:-1] for answer in answers], "right"))
        assert torch.allclose(again, log_p, atol=2e-4)
        assert run.mean_ranks() == pytest.approx(ranks)
        if not run.method.cache_changes:
            run.rewind(torch.tensor([2, 0]))
            assert run.generate(5, lambda token: False)[0] == [answers[2], answers[0]]


def test_full_rank_reads_its_own_answers_and_so_does_lossless(e2e_answers: Any) -> None:
    answer, tokenizer = e2e_answers
    found = Comparison(answer.base, small.E2E)
    methods = found.methods(MethodSelection(["lossless"], ["svd"], [0.25]), torch.ones(1, 8, dtype=torch.long))
    able = [method for method in methods if isinstance(method, Generator)]
    examples = [replace(one, references=("It is a pub.",)) for one in UNANSWERED]
    full, plain, lossless = evaluate_answers(able, examples, tokenizer, bleu, EvaluationSettings(batch=2))
    assert (full.kl.value, full.answers) == (pytest.approx(0, abs=1e-6), lossless.answers)
    assert {one.references[0] for one in answer(UNANSWERED)} == set(full.answers)
    assert lossless.kl.value == pytest.approx(0, abs=1e-5) and plain.kl.value > 0.01
    assert (lossless.kv_share, plain.mean_rank, full.mean_rank) == (1, 4, 16)


def test_unknown_baselines_and_a_missing_calibration_are_refused() -> None:
    comparison, sample = Comparison(build("llama"), adapter("llama")), WINDOWS[None, :24]
    with pytest.raises(ChunkWiseError, match="svd"):
        MethodSelection([], ["none"])
    with pytest.raises(ChunkWiseError, match="chunkwise calibrate"):
        comparison.methods(MethodSelection(["calibrated"]), sample)
    learned = ChunkWiseConfig(complexity=ComplexityConfig(learned=True))
    with pytest.raises(ChunkWiseError, match="--calibrated"):
        comparison.methods(MethodSelection([], configs={"learned": learned}), sample)
    with pytest.raises(ConfigError, match="no policy"):
        Comparison(build("llama"), adapter("llama"), {"x": RankLadder.from_peft(adapter("llama"))})
    with pytest.raises(ChunkWiseError, match="no/such"):
        comparison.methods(MethodSelection([], peft={"other": "no/such"}), sample)


def test_presets_run_on_the_ladder_in_the_adapters_folder(tmp_path: Path) -> None:
    folder = shutil.copytree(adapter("llama"), tmp_path / "both")
    ladder = RankLadder.from_peft(folder, as_trained=True)
    ladder.save_pretrained(folder)
    selection = MethodSelection(["balanced"], ["svd", "ladder"], [0.5])
    tokens = torch.randint(2, VOCABULARY, (2, 24))
    methods = {one.name: one for one in Comparison(build("llama"), folder).methods(selection, tokens)}
    with ChunkWiseModel(build("llama"), ladder, ChunkWiseConfig.uniform(0.5)) as model, torch.no_grad():
        half = model(tokens).logits.log_softmax(-1)
    found: dict[str, list[torch.Tensor]] = {"own rungs at 4": [], "plain SVD at 4": []}
    for name, parts in found.items():
        methods[name].score(tokens, lambda rows, columns, log_p, parts=parts: parts.append(log_p))
    assert torch.allclose(torch.cat(found["own rungs at 4"]), half, atol=1e-4)
    assert not torch.allclose(torch.cat(found["plain SVD at 4"]), half, atol=1e-2)
    balanced = methods["ChunkWise balanced"]
    assert isinstance(balanced, PlannedMethod) and balanced.ladder == "own rungs"


def made_up(name: str, series: str, role: Role, rank: float, change: float, kl: float = 0.01) -> Result:
    """A result whose exact match is `change` points above full rank's 40."""

    def estimate(value: float) -> Estimate:
        return Estimate(value, value - 1, value + 1)

    scores = {"exact match": estimate(40 + change)}
    return Result(Label(name, series, role), rank, scores, {"exact match": estimate(change)}, Estimate(kl, kl, kl), 1.0)


MADE_UP = Evaluation(
    "squad",
    "100 examples.",
    [Score("exact match", "points", higher_is_better=True)],
    16.0,
    [
        made_up("base, no adapter", "base", "base", 0, -37),
        made_up(FULL, FULL, "full", 16, 0, 0),
        made_up("plain SVD at 2", "plain SVD", "baseline", 2, -6),
        made_up("plain SVD at 4", "plain SVD", "baseline", 4, -1),
        made_up("plain SVD at 8", "plain SVD", "baseline", 8, 0.25),
        made_up("quarter rungs at 2", "quarter rungs", "ours", 2, -0.5),
        made_up("quarter rungs at 4", "quarter rungs", "ours", 4, 0.25),
        made_up("ChunkWise quarter", "calibrated plans", "ours", 4.03, -0.25, 0.003),
        made_up("a <b>", "a <b>", "baseline", 8, 0.25),
    ],
    (["<b>", "x"], [1.0, 16.0]),
)


def test_the_lowest_free_rank_of_a_series_is_within_half_a_point() -> None:
    found = {one.series: one.best and one.best.mean_rank for one in free_ranks(MADE_UP)}
    assert found == {"plain SVD": 8, "quarter rungs": 2}, "the others have only one mean rank"
    hopeless = replace(MADE_UP, results=[one for one in MADE_UP.results if one.name[-1] in "24"])
    assert free_ranks(hopeless)[0].best is None


def test_a_rise_of_the_perplexity_is_a_loss() -> None:
    score = Score("perplexity", "%", higher_is_better=False)
    assert score.loss(Estimate(0.01, 0.0, 0.02)) == Estimate(0.01, 0.0, 0.02)
    assert MADE_UP.score.loss(Estimate(1, 0, 3)) == Estimate(-1, -3, 0)


def test_the_verdict_compares_the_plan_with_plain_svd_at_its_rank() -> None:
    assert verdict(MADE_UP) == (
        "ChunkWise quarter at mean rank 4.0 of 16 loses 0.25 points of exact match (95% interval of the change: -1.2 "
        "to +0.8; KL 0.0030); plain SVD with every token at rank 4 loses 1.00 points of exact match (95% interval of "
        "the change: -2.0 to +0.0; KL 0.0100)."
    )
    assert "was evaluated" in verdict(replace(MADE_UP, results=MADE_UP.results[:2]))


def test_findings_name_free_ranks_and_what_calibration_expected() -> None:
    expected = Expectation(asked_rank=4.0, mean_rank=4.1, loss_increase=0.004, loss_increase_error=0.001)
    judged = replace(MADE_UP.results[7], prediction=Prediction(expected, Estimate(0.006, 0.001, 0.011)))
    plain, rungs, promise = findings(replace(MADE_UP, results=[*MADE_UP.results, judged]))
    assert plain.startswith(
        "plain SVD: the lowest mean rank that loses at most 0.5 points of exact match is 8.00 of 16"
    )
    assert "(-0.50 points, 95% interval -1.5 to +0.5)" in rungs
    assert "mean rank 4.03 (4.00 was asked for)" in promise
    assert "rises by +0.60% (+0.10% to +1.10%), and calibration expected +0.40% (plus or minus 0.10%)" in promise


def test_the_table_is_whole_at_80_columns(results: dict[str, Result]) -> None:
    text = Evaluation("wikitext", "", [Score("perplexity", "%", higher_is_better=False)], 8.0, [*results.values()])
    for evaluation in (MADE_UP, text):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(evaluation_table(evaluation))
        printed = console.export_text()
        assert "…" not in printed and all(one.name in printed for one in evaluation.results)


def test_the_report_needs_no_other_file_and_escapes_text() -> None:
    html = page(MADE_UP)
    assert html.count("data:image/png;base64,") == 1 and "http" not in html
    assert "&lt;b&gt;" in html and "<b>" not in html
    assert html.index("ChunkWise quarter at mean rank") < html.index("<table>")
    lines = markdown(MADE_UP, "quality.png").splitlines()
    assert lines[2].startswith("**ChunkWise quarter at mean rank 4.0 of 16")
    assert sum(line.startswith("| ") for line in lines) == len(MADE_UP.results) + 1
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_no_name_in_the_plot_covers_a_point_or_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: figures.append(figure))
    plot(MADE_UP)
    (figure,) = figures
    for axes in figure.axes:
        names = [text for text in axes.texts if isinstance(text, Annotation)]
        boxes = [text.get_window_extent() for text in names]
        assert {text.get_text() for text in names} == {"plain SVD", "quarter rungs", "ChunkWise quarter", "a <b>"}
        assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))
        points = [
            axes.transData.transform(xy)
            for line in axes.lines
            for xy in line.get_xydata()
            if len(line.get_xydata()) < 5
        ]
        assert not any(box.contains(*point) for box in boxes for point in points)
        assert axes.get_legend() is None


# The command


def test_eval_writes_table_page_and_json(run: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" = Karsund = \n \n Karsund is a small town on the north side of the island . \n")
    arguments = ("--data", text, "--baselines", "base", "--report", tmp_path / "r", "--json", tmp_path / "r.json")
    code, out, err = run("eval", "--task", "wikitext", *arguments)
    assert code == 0 and out.startswith("ChunkWise balanced at mean rank")
    assert "1 window of" in out and "ms" not in out
    assert err.startswith("evaluating wikitext: 1 of ")
    told = json.loads((tmp_path / "r.json").read_text())
    assert [row["name"] for row in told["results"]] == ["base, no adapter", FULL, "ChunkWise balanced"]
    assert told["verdict"] in (tmp_path / "r" / "report.md").read_text()
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"report.md", "report.html", "quality.png"}


def test_eval_compares_several_calibrated_ladders_at_several_mean_ranks(run: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" = Karsund = \n \n Karsund is a small town on the north side of the island . \n")
    folder = tmp_path / "ladder"
    small.calibrated().save_pretrained(folder)
    two = ("--calibrated", f"one={folder}", f"two={folder}", "--mean-ranks", "50%", "25%")
    arguments = ("--data", text, *two, "--baselines", "svd", "ladder", "--json", tmp_path / "r.json")
    code, out, _ = run("eval", "--task", "wikitext", *arguments)
    assert code == 0 and "plain SVD: the lowest mean rank" in " ".join(out.split())
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [row["name"] for row in results if row["label"]["series"] == "calibrated plans"] == [
        "ChunkWise one",
        "ChunkWise two",
    ]
    assert len([row for row in results if row["label"]["series"] == "two rungs"]) == 2
    assert [row["mean_rank"] for row in results if row["label"]["series"] == "plain SVD"] == [8, 4]


def test_an_adapter_that_is_a_calibrated_ladder_is_evaluated_with_its_policy(tmp_path: Path) -> None:
    ladder = small.calibrated()
    ladder.save_pretrained(tmp_path / "calibrated")
    replace(ladder, policy=None).save_pretrained(tmp_path / "no policy")
    assert own_policy(tmp_path / "calibrated")["calibrated"].policy == ladder.policy
    assert own_policy(tmp_path / "no policy") == own_policy(small.WIKI) == {}


def test_eval_needs_answers_to_score_against(run: Any, tmp_path: Path) -> None:
    (tmp_path / "e2e.csv").write_text("mr\nname[Aldhaven]\n")
    code, _, err = run("eval", "--task", "e2e", "--data", tmp_path / "e2e.csv")
    assert code == 1 and "have no answer to score against" in err and "name[Aldhaven] ->" in err


def test_eval_scores_answers_to_questions(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "squad.json"
    file.write_text(json.dumps(SQUAD))
    ranks = ("--baselines", "svd", "--mean-ranks", "25%", "50%", "75%")
    arguments = ("--data", file, *ranks, "--presets", "lossless", "--json", tmp_path / "r.json")
    code, out, _ = run("eval", "--task", "squad", "--adapter", "wiki", "--new-tokens", 4, *arguments)
    assert code == 0 and "exact match" in out and "2 examples" in out
    results = {row["name"]: row for row in json.loads((tmp_path / "r.json").read_text())["results"]}
    full, lossless = results.pop(FULL), results.pop("ChunkWise lossless")
    assert full["answers"] == lossless["answers"]
    assert lossless["kl"]["value"] == pytest.approx(0, abs=1e-5)
    truncated = [results[f"plain SVD at {rank}"]["kl"]["value"] for rank in (4, 8, 12)]
    assert truncated[0] > truncated[1] > truncated[2] > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "--task", "chess", "--data", "x"), "wikitext, squad, e2e"),
        (("eval", "--task", "e2e", "--data", "no/such"), "no/such"),
        (("eval", "--task", "e2e", "--data", "x", "--peft", "r8"), "name=path"),
        (("eval", "--task", "e2e", "--data", "x", "--calibrated", "no/such"), "no/such"),
        (("eval", "--task", "e2e", "--data", "x", "--calibrated", "no/such", "no/other"), "different names"),
        (("eval", "--task", "e2e", "--data", "x", "--mean-ranks", "50%", "half"), "write a percentage"),
        (("calibrate", "--text", "no/such", "-o", "x"), "one budget"),
        (("calibrate", "--task", "chess", "--text", "x", "-o", "x", "--mean-rank", "50%"), "wikitext, squad, e2e"),
        (("calibrate", "--task", "e2e", "--text", "no/such", "-o", "x", "--mean-rank", "50%"), "no/such"),
        (("calibrate", "--text", "no/such", "-o", "x", "--mean-rank", "half"), "half"),
        (("calibrate", "--text", "no/such", "-o", "x", "--mean-rank", "150%"), "at most 100%"),
        (("calibrate", "--text", "no/such", "-o", "x", "--mean-rank", "50%"), "no/such"),
        (("calibrate", "--text", small.HELD_TEXT, "-o", "x", "--mean-rank", "50%"), "too few"),
        (
            (
                "calibrate",
                "--task",
                "e2e",
                "--text",
                "x",
                "--self-generated-tokens",
                9,
                "-o",
                "x",
                "--mean-rank",
                "50%",
            ),
            "--self-generated",
        ),
    ],
)
def test_an_error_is_one_clear_line(run: Any, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = run(*arguments)
    assert code == 1 and message in err
    assert len(err.strip().splitlines()) == 1

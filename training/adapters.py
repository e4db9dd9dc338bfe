"""Train LoRA adapters for the examples and the tests.

    python training/adapters.py wiki valid.txt --base runs/base --out runs/wiki [--test test.txt]
    python training/adapters.py e2e devset.csv --base runs/base --out runs/e2e [--test test.csv]
    python training/adapters.py squad train-v1.1.json --base runs/base --out runs/squad [--test dev-v1.1.json]

`wiki` learns encyclopaedia prose, `e2e` puts a list of facts about a restaurant into words, and `squad` answers from a
paragraph. The end of the data is held out and chooses the checkpoint, which is written to ``--out`` as a PEFT adapter.
Interrupted runs resume from the last checkpoint there. ``--rank`` and ``--adalora`` train baselines of a lower rank,
``--steps`` shortens a run, and ``--init`` starts from an adapter. ``--ladder`` trains a calibrated ladder at the rungs
of its policy to give the outputs of its full rank, and ``--grow`` adds directions to an adapter of a lower rank. With
``--teacher``, given once or several times, training learns the mean of the outputs of other adapters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import (
    EarlyStoppingCallback,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from base import Blocks
from chunkwise_lora import ChunkWiseError, ChunkWiseModel, RankLadder
from chunkwise_lora.calibration.self_generated import generate_text
from chunkwise_lora.calibration.text import TokenBlocks
from chunkwise_lora.evaluation.data import e2e_prompt, e2e_rows, encode, squad_rows
from chunkwise_lora.examples import BASE_NAME
from chunkwise_lora.training import GrowRank, NestedRank

HELD_OUT = 0.05
TEST_TOKENS = 60_000
TEST_ROWS = 500
IGNORED = -100
BFLOAT16 = torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_bf16", False)
"""Whether the machine computes bfloat16 fast; on others, float32 is many times faster."""

Example = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """At most `steps` updates on `batch` examples each, measured every `interval` updates."""

    batch: int
    steps: int
    interval: int
    learning_rate: float
    rank: int = 16
    adalora: bool = False
    """AdaLoRA: starts at 1.5 times the rank and prunes down to it on average."""
    ladder: Path | None = None
    """A calibrated ladder to train for truncation."""
    teachers: tuple[Path, ...] = ()
    """Other adapters of the base. Training learns their outputs, not those of the ladder at full rank or the labels."""
    init: Path | None = None
    """An adapter to start from."""
    grow: Path | None = None
    """An adapter of a lower rank. It does not change, and becomes the first directions of the new one."""


WIKI = Recipe(batch=4, steps=700, interval=50, learning_rate=2e-3)
E2E = Recipe(batch=32, steps=700, interval=50, learning_rate=2e-3)
TAUGHT = {"learning_rate": 1e-3}
"""Changes of the recipe with teachers or a calibrated ladder. The batch is halved, too."""
GROWN = {"steps": 120, "learning_rate": 1e-3}
"""Changes of the recipe when directions are added to an adapter."""
RUNGS = {"lowest": 5 / 16, "highest": 13 / 16, "full": 0.05}
"""Options of `NestedRank`: the rungs that a policy with half of the rank uses, and few sequences at full rank."""
GENERATED_TEXTS = 1280
"""Texts that an adapter generates itself."""
SQUAD = Recipe(batch=8, steps=400, interval=50, learning_rate=2e-3)


class Windows(Dataset):
    """As many windows of `length` tokens as `Blocks` has, each from a random place."""

    def __init__(self, tokens: torch.Tensor, length: int) -> None:
        self.windows = tokens.unfold(0, length, 1)
        self.count = len(tokens) // length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        window = self.windows[torch.randint(len(self.windows), ())]
        return {"input_ids": window, "labels": window}


class WithGeneratedTexts(Dataset):
    """Replaces half of the examples by two generated texts each, so that the adapter learns no text by heart."""

    def __init__(self, examples: Windows, texts: torch.Tensor) -> None:
        self.examples = examples
        self.texts = texts

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        if torch.rand(()) < 0.5:
            return self.examples[index]
        window = self.texts[torch.randint(len(self.texts), (2,))].flatten()
        return {"input_ids": window, "labels": window}


def generated_texts(base: Path, ladder: RankLadder, tokens: torch.Tensor, length: int, file: Path) -> torch.Tensor:
    """Token ids (texts, length) that an adapter generates after pieces of a text; kept in `file`."""
    if file.exists():
        return load_file(file)["texts"]
    with ChunkWiseModel.from_pretrained(str(base), ladder, dtype=torch.float32) as model:
        show = partial(track, description="generating texts")
        texts = generate_text(model, TokenBlocks.cut(tokens, length).tokens, GENERATED_TEXTS, track=show)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"texts": texts}, file)
    return texts


class Answers(Dataset):
    """Prompts with answers. Only the answer and the end of the sequence are learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, str]]) -> None:
        self.examples = []
        for question, text in rows:
            prompt, answer = encode(tokenizer, question, text)
            ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
            self.examples.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def collate(examples: list[Example]) -> Example:
    """Pad on the right: causal attention then needs no mask, and padded labels are ignored."""
    padding = {"input_ids": 0, "labels": IGNORED}
    return {key: pad_sequence([example[key] for example in examples], True, value) for key, value in padding.items()}


@torch.inference_mode()
def mean_loss(model: PeftModel, examples: Dataset) -> float:
    """Mean loss, nats per learned token."""
    model.eval()
    total = count = 0
    for batch in DataLoader(examples, batch_size=8, collate_fn=collate):
        learned = int((batch["labels"][:, 1:] != IGNORED).sum())
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        total += model.get_base_model()(**inputs).loss.item() * learned  # without AdaLoRA's regularisation
        count += learned
    return total / count


def report(model: PeftModel, texts: dict[str, Dataset]) -> None:
    """Print loss and perplexity of the base and of the adapter on every text."""
    for name, examples in texts.items():
        tuned = mean_loss(model, examples)
        with model.disable_adapter():
            base = mean_loss(model, examples)
        for who, loss in {"base": base, "adapter": tuned}.items():
            print(f"{name:9} {who:8} {loss:.4f} nats/token, perplexity {math.exp(loss):.2f}")


def base_model(base: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)


def nested_rank(base: Path, recipe: Recipe) -> NestedRank:
    """The callback that trains the rungs of the ladder's policy; without a ladder, full rank alone."""
    teachers = [PeftModel.from_pretrained(base_model(base), path).merge_and_unload() for path in recipe.teachers]
    if recipe.ladder is None:
        return NestedRank(teachers=teachers, full=1.0)
    ladder = RankLadder.from_pretrained(recipe.ladder)
    if ladder.policy is None:
        raise ChunkWiseError(f"{recipe.ladder}: the ladder has no policy to train for; run chunkwise calibrate")
    return NestedRank(ladder, teachers=teachers, policy=ladder.policy, **RUNGS)


def new_adapter(base: Path, recipe: Recipe) -> PeftModel:
    """A new adapter on every linear layer, without dropout, which would nearly double the time of a CPU step."""
    model = base_model(base)
    if recipe.init:
        return PeftModel.from_pretrained(model, recipe.init, is_trainable=True)
    shared = {"task_type": "CAUSAL_LM", "lora_alpha": 2 * recipe.rank, "target_modules": "all-linear"}
    if recipe.adalora:
        schedule = {"tinit": recipe.steps // 5, "tfinal": recipe.steps // 2, "deltaT": 5, "total_step": recipe.steps}
        config = AdaLoraConfig(init_r=recipe.rank * 3 // 2, target_r=recipe.rank, **schedule, **shared)
    else:
        config = LoraConfig(r=recipe.rank, **shared)
    return get_peft_model(model, config)


class Pruning(TrainerCallback):
    """Lets AdaLoRA move its budget of ranks after every update."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: PeftModel
    ) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step + 1)


def train(
    model: PeftModel, recipe: Recipe, nested: NestedRank | None, *, examples: Dataset, held_out: Dataset, out: Path
) -> None:
    """Train in place, from the last checkpoint if there is one. Keeps the best adapter, or with a ladder the last."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch,
            per_device_eval_batch_size=recipe.batch,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=30,
            weight_decay=0.1,
            max_grad_norm=1.0,
            bf16=BFLOAT16,
            use_cpu=not torch.cuda.is_available(),
            torch_compile=torch.cuda.is_available(),
            logging_steps=recipe.interval,
            eval_strategy="steps",
            eval_steps=recipe.interval,
            save_steps=recipe.interval,
            save_total_limit=1,
            load_best_model_at_end=recipe.ladder is None,  # the evaluation runs at full rank only
            label_names=["labels"],
            seed=0,
            report_to="none",
            dataloader_drop_last=True,
        ),
        data_collator=collate,
        train_dataset=examples,
        eval_dataset=held_out,
        compute_loss_func=nested.loss if nested else None,
        callbacks=[
            *([] if recipe.ladder else [EarlyStoppingCallback(early_stopping_patience=5)]),
            *([Pruning()] if recipe.adalora else []),
            *([nested] if nested else []),
            *([GrowRank(recipe.grow)] if recipe.grow else []),
        ],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)


def save(model: PeftModel, out: Path) -> None:
    """Write the adapter in float16, with a configuration that names no local folder."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME
    config.target_modules = sorted(config.target_modules)
    for parameter in model.parameters():  # model.half() would also round the rotary frequencies
        parameter.data = parameter.data.half()
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)


def make(recipe: Recipe, base: Path, out: Path, *, examples: Dataset, held_out: Dataset, test: Dataset | None) -> None:
    """Train, save and measure one adapter."""
    torch.manual_seed(0)
    model = new_adapter(base, recipe)
    nested = nested_rank(base, recipe) if recipe.ladder or recipe.teachers else None
    train(model, recipe, nested, examples=examples, held_out=held_out, out=out)
    save(model, out)
    if nested and recipe.ladder:  # after rounding to float16, so that ladder and adapter agree
        nested.trained_ladder().save_pretrained(out / "ladder")
    report(model.float(), {"held-out": held_out} | ({"test": test} if test else {}))


Base = Annotated[Path, typer.Option(help="Folder of the base model.")]
Out = Annotated[Path, typer.Option(help="Folder for checkpoints and the final adapter.")]
Rank = Annotated[int, typer.Option(min=2, help="Rank of the adapter.")]
Steps = Annotated[int | None, typer.Option(min=10, help="Updates, instead of the recipe's.")]
AdaLora = Annotated[bool, typer.Option("--adalora", help="Train AdaLoRA whose mean rank ends at --rank.")]
Ladder = Annotated[Path | None, typer.Option(help="Train this calibrated ladder for truncation.")]
Teacher = Annotated[
    list[Path] | None, typer.Option(help="Learn the outputs of this adapter, not those of the ladder. May be repeated.")
]
Grow = Annotated[Path | None, typer.Option(help="Add directions to this adapter of a lower rank.")]
Init = Annotated[Path | None, typer.Option(help="Start from this adapter and keep its rank.")]
app = typer.Typer(help="Train LoRA adapters.")


def changed(
    recipe: Recipe,
    rank: int,
    steps: int | None,
    adalora: bool = False,
    ladder: Path | None = None,
    teachers: Sequence[Path] | None = None,
    grow: Path | None = None,
    init: Path | None = None,
) -> Recipe:
    """The recipe with the options of the command line. Shorter runs are measured as often."""
    if sum(map(bool, (adalora, ladder, grow, init))) > 1:
        raise typer.BadParameter("choose one of --adalora, --ladder, --grow and --init")
    if adalora and teachers:
        raise typer.BadParameter("AdaLoRA learns from the labels; leave out --teacher")
    if ladder or teachers:
        recipe = replace(recipe, batch=recipe.batch // 2, **TAUGHT)
    if grow:
        recipe = replace(recipe, **GROWN)
    given = {"ladder": ladder, "teachers": tuple(teachers or ()), "grow": grow, "init": init}
    recipe = replace(recipe, rank=rank, adalora=adalora, **given)
    steps = steps or recipe.steps
    return replace(recipe, steps=steps, interval=min(recipe.interval, steps // 4))


@app.command()
def wiki(
    data: Annotated[Path, typer.Argument(help="WikiText as plain text.")],
    base: Base,
    out: Out,
    test: Annotated[Path | None, typer.Option(help="Text to measure at the end.")] = None,
    rank: Rank = 16,
    steps: Steps = None,
    adalora: AdaLora = False,
    ladder: Ladder = None,
    teacher: Teacher = None,
    grow: Grow = None,
    init: Init = None,
) -> None:
    """Train on WikiText, in windows of 1,024 tokens. The last 5% of the text are held out."""
    recipe = changed(WIKI, rank, steps, adalora, ladder, teacher, grow, init)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    length = 1024

    def tokens_of(file: Path) -> torch.Tensor:
        return torch.tensor(tokenizer(file.read_text()).input_ids)

    tokens = tokens_of(data)
    cut = int(len(tokens) * (1 - HELD_OUT))
    examples: Dataset = Windows(tokens[:cut], length)
    if source := recipe.ladder or next(iter(recipe.teachers), None):
        texts = generated_texts(base, RankLadder.load(source), tokens[:cut], length // 2, out / "texts.safetensors")
        examples = WithGeneratedTexts(examples, texts)
    make(
        recipe,
        base,
        out,
        examples=examples,
        held_out=Blocks(tokens[cut:], length),
        test=Blocks(tokens_of(test)[:TEST_TOKENS], length) if test else None,
    )


@app.command()
def e2e(
    data: Annotated[Path, typer.Argument(help="Comma-separated values with columns mr and ref.")],
    base: Base,
    out: Out,
    test: Annotated[Path | None, typer.Option(help="Rows to measure at the end.")] = None,
    rank: Rank = 16,
    steps: Steps = None,
    ladder: Ladder = None,
    teacher: Teacher = None,
    grow: Grow = None,
    init: Init = None,
) -> None:
    """Train on E2E: from facts to a sentence. The last 5% of the distinct meanings are held out."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)

    rows = e2e_rows(str(data))
    if unanswered := sum(not reference.strip() for _, reference in rows):
        raise typer.BadParameter(f"{data}: {unanswered} of {len(rows)} rows have no ref to learn; see answers.py")
    meanings = list(dict.fromkeys(meaning for meaning, _ in rows))
    unseen = set(meanings[int(len(meanings) * (1 - HELD_OUT)) :])

    def examples(rows: list[tuple[str, str]]) -> Answers:
        return Answers(tokenizer, [(e2e_prompt(meaning), reference) for meaning, reference in rows])

    make(
        changed(E2E, rank, steps, False, ladder, teacher, grow, init),
        base,
        out,
        examples=examples([row for row in rows if row[0] not in unseen]),
        held_out=examples([row for row in rows if row[0] in unseen]),
        test=examples(e2e_rows(str(test))[:TEST_ROWS]) if test else None,
    )


@app.command()
def squad(
    data: Annotated[Path, typer.Argument(help="SQuAD v1.1 JSON.")],
    base: Base,
    out: Out,
    test: Annotated[Path | None, typer.Option(help="SQuAD v1.1 JSON to measure at the end.")] = None,
    rank: Rank = 16,
    steps: Steps = None,
) -> None:
    """Train on SQuAD: from a paragraph and a question to the answer. The last tenth of the articles is held out."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)

    def examples(articles: list[dict]) -> Answers:
        rows = squad_rows({"data": articles})
        return Answers(tokenizer, [(row.prompt, row.references[0]) for row in rows])

    articles = json.loads(data.read_text())["data"]
    unseen = max(1, len(articles) // 10)
    make(
        changed(SQUAD, rank, steps),
        base,
        out,
        examples=examples(articles[:-unseen]),
        held_out=examples(articles[-unseen:]),
        test=examples(json.loads(test.read_text())["data"]) if test else None,
    )


if __name__ == "__main__":
    app()

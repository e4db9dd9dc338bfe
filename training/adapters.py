"""Train the adapters of the example ladders on SmolLM2-135M-Instruct, or adapters like them on another base.

    python training/adapters.py squad train-v1.1.json --out runs/squad [--test dev-v1.1.json]
    python training/adapters.py e2e devset.csv --out runs/e2e [--test testset_w_refs.csv]
    python training/adapters.py wiki valid.txt --out runs/wiki [--test test.txt]

`squad` answers from a paragraph, `e2e` puts a list of facts about a restaurant into words, and `wiki` learns
encyclopaedia prose. The end of the data is held out and chooses the checkpoint, which is written to ``--out`` as a PEFT
adapter. An interrupted run goes on from its last checkpoint there.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from base import Blocks
from chunkwise_lora import examples
from chunkwise_lora.evaluation.data import e2e_prompt, e2e_rows, encode, squad_rows

HELD_OUT = 0.05
TEST_TOKENS = 60_000
TEST_ROWS = 500
WINDOW = 1024
"""Tokens per window of text."""
IGNORED = -100
PASSES = 2
"""Passes per update: half of the memory, which is about 5 GB, and sequences of one pass are of like length."""
BFLOAT16 = torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_bf16", False)
"""Whether the machine computes bfloat16 fast; on others, float32 is many times faster."""

Sequence = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """At most `steps` updates on `batch` sequences each, measured every `interval` updates."""

    batch: int
    steps: int
    learning_rate: float = 8e-4
    rank: int = 16
    interval: int = 20


SQUAD = Recipe(batch=8, steps=100)
E2E = Recipe(batch=32, steps=120)
WIKI = Recipe(batch=2, steps=80)


class Windows(Dataset[Sequence]):
    """As many windows of `length` tokens as `Blocks` has, each from a random place."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.windows = tokens.unfold(0, length, 1)
        self.count = len(tokens) // length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sequence:
        if index >= self.count:
            raise IndexError(index)  # ends iteration over the dataset
        window = self.windows[torch.randint(len(self.windows), ())]
        return {"input_ids": window, "labels": window}


class Answers(Dataset[Sequence]):
    """Prompts with answers. Only the answer and the end of the sequence are learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, str]]) -> None:
        self.sequences = []
        for question, text in rows:
            prompt, answer = encode(tokenizer, question, text)
            ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
            self.sequences.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> Sequence:
        return self.sequences[index]


def collate(sequences: list[Sequence]) -> Sequence:
    """Pad on the right: causal attention then needs no mask, and padded labels are ignored."""
    padding = {"input_ids": 0, "labels": IGNORED}
    return {key: pad_sequence([one[key] for one in sequences], True, value) for key, value in padding.items()}


def loss_of(model: PeftModel, inputs: Sequence) -> tuple[Tensor, int]:
    """The sum of the losses of the learned tokens in nats, and their number.

    Logits are computed for learned tokens alone: of a question with its paragraph, few tokens are learned, and the
    vocabulary is large.
    """
    base, labels = model.get_base_model(), inputs["labels"][:, 1:]
    learned = labels != IGNORED
    hidden = base.model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
    logits = base.lm_head(hidden[:, :-1][learned])
    return nn.functional.cross_entropy(logits.float(), labels[learned], reduction="sum"), int(learned.sum())


class AnswerTrainer(Trainer):
    """A `Trainer` with the loss of `loss_of`, averaged over the learned tokens of an update."""

    def compute_loss(
        self, model: Any, inputs: Sequence, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of this pass in the mean loss of an update, or, without an update, its own mean."""
        loss, count = loss_of(model, inputs)
        loss = loss / (count if num_items_in_batch is None else num_items_in_batch)
        return (loss, {}) if return_outputs else loss


@torch.inference_mode()
def mean_loss(model: PeftModel, sequences: Dataset[Sequence]) -> float:
    """Mean loss, nats per learned token."""
    model.eval()
    total, count = 0.0, 0
    for batch in DataLoader(sequences, batch_size=4, collate_fn=collate):
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=BFLOAT16):
            loss, learned = loss_of(model, inputs)
        total, count = total + loss.item(), count + learned
    return total / count


def report(model: PeftModel, texts: dict[str, Dataset[Sequence]]) -> None:
    """Print loss and perplexity of the base and of the adapter on every text."""
    for name, sequences in texts.items():
        tuned = mean_loss(model, sequences)
        with model.disable_adapter():
            base = mean_loss(model, sequences)
        for who, loss in {"base": base, "adapter": tuned}.items():
            print(f"{name:9} {who:8} {loss:.4f} nats/token, perplexity {math.exp(loss):.2f}")


def new_adapter(base: str | Path, rank: int) -> PeftModel:
    """A new adapter on every linear layer, without dropout, which would nearly double the time of a CPU step."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16 if BFLOAT16 else torch.float32)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)  # its weights are float32


def train(model: PeftModel, recipe: Recipe, data: Dataset[Sequence], held_out: Dataset[Sequence], out: Path) -> None:
    """Train in place, from the last checkpoint if there is one, and keep the best adapter."""
    trainer = AnswerTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch // PASSES,
            gradient_accumulation_steps=PASSES,
            per_device_eval_batch_size=4,
            train_sampling_strategy="group_by_length",
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            weight_decay=0.1,
            max_grad_norm=0.5,
            bf16=BFLOAT16,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=5,
            eval_strategy="steps",
            eval_steps=recipe.interval,
            save_steps=recipe.interval,
            save_total_limit=1,
            load_best_model_at_end=True,
            prediction_loss_only=True,
            label_names=["labels"],
            seed=0,
            report_to="none",
            dataloader_drop_last=True,
        ),
        data_collator=collate,
        train_dataset=data,
        eval_dataset=held_out,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)


def save(model: PeftModel, base: str, out: Path) -> None:
    """Write the adapter in float32, with a configuration that names the example model as the hub does."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = examples.BASE_NAME if base == examples.BASE else base
    config.target_modules = sorted(config.target_modules)
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)


def make(
    recipe: Recipe,
    base: str,
    out: Path,
    *,
    data: Dataset[Sequence],
    held_out: Dataset[Sequence],
    test: Dataset[Sequence] | None,
) -> None:
    """Train, save and measure one adapter."""
    torch.manual_seed(0)
    model = new_adapter(examples.find_base(base), recipe.rank)
    train(model, recipe, data, held_out, out)
    save(model, base, out)
    report(model, {"held-out": held_out} | ({"test": test} if test else {}))


Out = Annotated[Path, typer.Option(help="Folder for checkpoints and the final adapter.")]
Base = Annotated[str, typer.Option(help="Folder of the base model, or `smollm2`.")]
Rank = Annotated[int, typer.Option(min=1, help="Rank of the adapter.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Updates, instead of the recipe's.")]
Rate = Annotated[float | None, typer.Option(min=0, help="Highest learning rate, instead of the recipe's.")]
app = typer.Typer(help=__doc__.splitlines()[0] if __doc__ else None)


def changed(recipe: Recipe, rank: int, steps: int | None, learning_rate: float | None) -> Recipe:
    """The recipe with the options of the command line. Short runs are measured at their end."""
    steps = steps or recipe.steps
    return replace(
        recipe,
        rank=rank,
        steps=steps,
        interval=min(recipe.interval, steps),
        learning_rate=learning_rate or recipe.learning_rate,
    )


@app.command()
def squad(
    data: Annotated[Path, typer.Argument(help="SQuAD v1.1 JSON.")],
    out: Out,
    base: Base = examples.BASE,
    test: Annotated[Path | None, typer.Option(help="SQuAD v1.1 JSON to measure at the end.")] = None,
    rank: Rank = 16,
    steps: Steps = None,
    learning_rate: Rate = None,
) -> None:
    """Train on SQuAD: from a paragraph and a question to the answer. The last tenth of the articles is held out."""
    tokenizer = AutoTokenizer.from_pretrained(examples.find_base(base))

    def answers(articles: list[dict[str, Any]]) -> Answers:
        rows = squad_rows({"data": articles})
        return Answers(tokenizer, [(row.prompt, row.references[0]) for row in rows])

    articles = json.loads(data.read_text())["data"]
    unseen = max(1, len(articles) // 10)
    make(
        changed(SQUAD, rank, steps, learning_rate),
        base,
        out,
        data=answers(articles[:-unseen]),
        held_out=answers(articles[-unseen:]),
        test=answers(json.loads(test.read_text())["data"]) if test else None,
    )


@app.command()
def e2e(
    data: Annotated[Path, typer.Argument(help="Comma-separated values with columns mr and ref.")],
    out: Out,
    base: Base = examples.BASE,
    test: Annotated[Path | None, typer.Option(help="Rows to measure at the end.")] = None,
    rank: Rank = 16,
    steps: Steps = None,
    learning_rate: Rate = None,
) -> None:
    """Train on E2E: from facts to a sentence. The last 5% of the distinct meanings are held out."""
    tokenizer = AutoTokenizer.from_pretrained(examples.find_base(base))
    rows = e2e_rows(str(data))
    if unanswered := sum(not reference.strip() for _, reference in rows):
        raise typer.BadParameter(f"{data}: {unanswered} of {len(rows)} rows have no ref to learn")
    meanings = list(dict.fromkeys(meaning for meaning, _ in rows))
    unseen = set(meanings[int(len(meanings) * (1 - HELD_OUT)) :])

    def answers(rows: list[tuple[str, str]]) -> Answers:
        return Answers(tokenizer, [(e2e_prompt(meaning), reference) for meaning, reference in rows])

    make(
        changed(E2E, rank, steps, learning_rate),
        base,
        out,
        data=answers([row for row in rows if row[0] not in unseen]),
        held_out=answers([row for row in rows if row[0] in unseen]),
        test=answers(e2e_rows(str(test))[:TEST_ROWS]) if test else None,
    )


@app.command()
def wiki(
    data: Annotated[Path, typer.Argument(help="WikiText as plain text.")],
    out: Out,
    base: Base = examples.BASE,
    test: Annotated[Path | None, typer.Option(help="Text to measure at the end.")] = None,
    rank: Rank = 16,
    steps: Steps = None,
    learning_rate: Rate = None,
) -> None:
    """Train on WikiText, in windows of 1,024 tokens. The last 5% of the text are held out."""
    tokenizer = AutoTokenizer.from_pretrained(examples.find_base(base))

    def tokens_of(file: Path) -> Tensor:
        return torch.tensor(tokenizer(file.read_text()).input_ids)

    tokens = tokens_of(data)
    cut = int(len(tokens) * (1 - HELD_OUT))
    make(
        changed(WIKI, rank, steps, learning_rate),
        base,
        out,
        data=Windows(tokens[:cut], WINDOW),
        held_out=Blocks(tokens[cut:], WINDOW),
        test=Blocks(tokens_of(test)[:TEST_TOKENS], WINDOW) if test else None,
    )


if __name__ == "__main__":
    app()

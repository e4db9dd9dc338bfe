"""Train the embedded LoRA adapters on the embedded base model.

    python training/adapters.py wiki valid.txt --base runs/base --out runs/wiki [--test test.txt]
    python training/adapters.py e2e devset.csv --base runs/base --out runs/e2e [--test test.csv]

`wiki` learns encyclopaedia prose, `e2e` to put a list of facts about a restaurant into words. The
end of the data is held out and chooses the checkpoint that is kept, under ``--out`` in PEFT's own
layout. Interrupted runs resume from the last checkpoint there.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import (
    EarlyStoppingCallback,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from base import Blocks

BASE_NAME = "chunkwise_lora/embedded/base"
HELD_OUT = 0.05
TEST_TOKENS = 60_000
TEST_ROWS = 500
IGNORED = -100

Example = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """At most `steps` updates on `batch` examples each, measured every `interval` updates."""

    batch: int
    steps: int
    interval: int
    learning_rate: float


WIKI = Recipe(batch=4, steps=700, interval=50, learning_rate=2e-3)
E2E = Recipe(batch=32, steps=700, interval=50, learning_rate=2e-3)


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


class Rows(Dataset):
    """``mr -> ref`` and the end of the sequence; only what follows the arrow is learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> None:
        self.examples = []
        for row in rows:
            prompt = tokenizer(f"{row['mr']} ->").input_ids
            answer = [*tokenizer(f" {row['ref']}").input_ids, tokenizer.eos_token_id]
            ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
            self.examples.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def collate(examples: list[Example]) -> Example:
    """Pad on the right, where causal attention needs no mask and the labels are ignored."""
    padding = {"input_ids": 0, "labels": IGNORED}
    return {key: pad_sequence([example[key] for example in examples], True, value) for key, value in padding.items()}


@torch.inference_mode()
def mean_loss(model: PeftModel, examples: Dataset) -> float:
    """Nats per learned token."""
    model.eval()
    total = count = 0
    for batch in DataLoader(examples, batch_size=8, collate_fn=collate):
        learned = int((batch["labels"][:, 1:] != IGNORED).sum())
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        total += model(**inputs).loss.item() * learned
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


def new_adapter(base: Path) -> PeftModel:
    """Rank 16 on every linear layer; no dropout, which would nearly double the time of a CPU step."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    return get_peft_model(model, config)


def train(model: PeftModel, recipe: Recipe, examples: Dataset, held_out: Dataset, out: Path) -> None:
    """Train in place, resuming from the last checkpoint; ends with the best adapter."""
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
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            torch_compile=True,
            logging_steps=recipe.interval,
            eval_strategy="steps",
            eval_steps=recipe.interval,
            save_steps=recipe.interval,
            save_total_limit=1,
            load_best_model_at_end=True,
            label_names=["labels"],
            seed=0,
            report_to="none",
            dataloader_drop_last=True,
        ),
        data_collator=collate,
        train_dataset=examples,
        eval_dataset=held_out,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=5)],
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
    model = new_adapter(base)
    train(model, recipe, examples, held_out, out)
    save(model, out)
    report(model.float(), {"held-out": held_out} | ({"test": test} if test else {}))


Base = Annotated[Path, typer.Option(help="Folder of the base model.")]
Out = Annotated[Path, typer.Option(help="Folder for checkpoints and the final adapter.")]
app = typer.Typer(help="Train the embedded LoRA adapters.")


@app.command()
def wiki(
    data: Annotated[Path, typer.Argument(help="WikiText as plain text.")],
    base: Base,
    out: Out,
    test: Annotated[Path | None, typer.Option(help="Text to measure at the end.")] = None,
) -> None:
    """Adapt to WikiText: windows of 1,024 tokens, the last 5% of the text held out."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    length = 1024

    def encode(file: Path) -> torch.Tensor:
        return torch.tensor(tokenizer(file.read_text()).input_ids)

    tokens = encode(data)
    cut = int(len(tokens) * (1 - HELD_OUT))
    make(
        WIKI,
        base,
        out,
        examples=Windows(tokens[:cut], length),
        held_out=Blocks(tokens[cut:], length),
        test=Blocks(encode(test)[:TEST_TOKENS], length) if test else None,
    )


@app.command()
def e2e(
    data: Annotated[Path, typer.Argument(help="Comma-separated values with columns mr and ref.")],
    base: Base,
    out: Out,
    test: Annotated[Path | None, typer.Option(help="Rows to measure at the end.")] = None,
) -> None:
    """Adapt to E2E: facts in, a sentence out, the last 5% of the distinct facts held out."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)

    def read(file: Path, count: int | None = None) -> list[dict[str, str]]:
        with file.open(newline="") as lines:
            return list(islice(csv.DictReader(lines), count))

    rows = read(data)
    meanings = list(dict.fromkeys(row["mr"] for row in rows))
    unseen = set(meanings[int(len(meanings) * (1 - HELD_OUT)) :])
    make(
        E2E,
        base,
        out,
        examples=Rows(tokenizer, [row for row in rows if row["mr"] not in unseen]),
        held_out=Rows(tokenizer, [row for row in rows if row["mr"] in unseen]),
        test=Rows(tokenizer, read(test, TEST_ROWS)) if test else None,
    )


if __name__ == "__main__":
    app()

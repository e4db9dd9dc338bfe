"""Train the base model of the tests: a Llama of 5.5M parameters on public-domain books.

    python training/base.py BOOKS/*.txt.xz --out runs/base [--init CHECKPOINT]

There are two stages: many short sequences at a high learning rate, then sequences of 1,024 tokens while the rate falls
to zero, so that the model has seen every position. Interrupted runs resume from the last checkpoint under ``--out``.
Without ``--init`` a tokenizer is trained first and the weights start at random. The model card says from which
checkpoint the weights in tests/small were trained.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
HELD_OUT_TOKENS = 128 * 1024


@dataclass(frozen=True)
class Stage:
    """One run of the trainer: `steps` updates on `batch` sequences of `length` tokens."""

    name: str
    length: int
    batch: int
    steps: int
    learning_rate: float
    scheduler: str
    scheduler_options: dict[str, float]


STAGES = (
    Stage("short", 256, 24, 2000, 1.2e-3, "cosine_with_min_lr", {"min_lr_rate": 0.4}),
    Stage("long", 1024, 6, 900, 6e-4, "linear", {}),
)


class Blocks(Dataset):
    """Consecutive blocks of `length` tokens, which are both inputs and labels."""

    def __init__(self, tokens: torch.Tensor, length: int) -> None:
        self.blocks = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index].long(), "labels": self.blocks[index].long()}


def books(files: list[Path]) -> Iterator[str]:
    """The books of the files. A line that begins with ``# Title:`` starts a book."""
    for file in files:
        text = lzma.decompress(file.read_bytes()).decode() if file.suffix == ".xz" else file.read_text()
        first, *rest = text.split("# Title:")
        yield from filter(str.strip, [first, *("# Title:" + book for book in rest)])


def train_tokenizer(files: list[Path], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the books."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(books(files), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def encode(tokenizer: PreTrainedTokenizerFast, files: list[Path]) -> torch.Tensor:
    """Token ids (tokens,) int16 of all books. The end-of-sequence token follows each book."""
    ids: list[int] = []
    for book in books(files):
        paragraphs = book.splitlines(keepends=True)
        for encoding in tokenizer.backend_tokenizer.encode_batch(paragraphs):
            ids += encoding.ids
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int16)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model with random weights in the shape of the tests' model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    )


def train_stage(stage: Stage, model: LlamaForCausalLM, tokens: torch.Tensor, held_out: torch.Tensor, out: Path) -> None:
    """Run one stage in place, from its last checkpoint if there is one, and print the held-out loss."""
    folder = out / stage.name
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=stage.steps,
            per_device_train_batch_size=stage.batch,
            per_device_eval_batch_size=stage.batch,
            learning_rate=stage.learning_rate,
            lr_scheduler_type=stage.scheduler,
            lr_scheduler_kwargs=stage.scheduler_options,
            warmup_steps=60,
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            torch_compile=True,
            logging_steps=50,
            eval_strategy="steps",
            eval_steps=400,
            save_steps=200,
            save_total_limit=1,
            seed=0,
            report_to="none",
            dataloader_drop_last=True,
        ),
        train_dataset=Blocks(tokens, stage.length),
        eval_dataset=Blocks(held_out, stage.length),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    print(stage.name, trainer.evaluate())


def main(
    books_: Annotated[list[Path], typer.Argument(metavar="BOOKS...", help="Text files, plain or .xz.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the final model.")],
    init: Annotated[Path | None, typer.Option(help="Checkpoint to continue.")] = None,
) -> None:
    """Train the base model of the tests. The last tokens of the last file are held out."""
    torch.manual_seed(0)
    if init is None:
        tokenizer = train_tokenizer(books_)
        model = new_model(tokenizer)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(init)
        model = LlamaForCausalLM.from_pretrained(init, dtype=torch.float32)
    tokens = encode(tokenizer, books_)
    tokens, held_out = tokens[:-HELD_OUT_TOKENS], tokens[-HELD_OUT_TOKENS:]
    print(f"{len(tokens) / 1e6:.1f}M tokens to train on, {len(held_out)} held out")
    for stage in STAGES:
        train_stage(stage, model, tokens, held_out, out)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = model.config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)

"""Writes tiny transformers models as GGUF files that llama.cpp runs. Nothing here uses the package under test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import transformers as t
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, LlamaFileType, TokenType, get_tensor_name_map
from torch import Tensor

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma3": MODEL_ARCH.GEMMA3,
    "phi3": MODEL_ARCH.PHI3,
}
"""llama.cpp's architecture by the name in `models.ARCHITECTURES`."""
CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def no_tokenizer(writer: GGUFWriter) -> None:
    """Say that the file has no tokenizer: it runs token ids only."""
    writer.add_tokenizer_model("none")


def tokenizer_of(folder: Path) -> Callable[[GGUFWriter], None]:
    """A function that adds the byte-level BPE tokenizer in a folder, and a chat template."""

    def add(writer: GGUFWriter) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        ids: dict[str, int] = content["model"]["vocab"]
        special = {token["content"] for token in content["added_tokens"]}
        ids |= {token["content"]: token["id"] for token in content["added_tokens"]}
        tokens = sorted(ids, key=ids.__getitem__)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
        writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_add_bos_token(False)
        writer.add_chat_template(CHAT)

    return add


def write_base(
    model: t.PreTrainedModel,
    architecture: str,
    path: Path,
    fields: Mapping[str, int | str | list[int]] | None = None,
    add_tokenizer: Callable[[GGUFWriter], None] = no_tokenizer,
) -> Path:
    """Write a model of one of `ARCHITECTURES` in float32. Returns `path`.

    `fields` are written in addition to, or instead of, those of the model.
    """
    config = model.config
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[ARCHITECTURES[architecture]])
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_file_type(LlamaFileType.ALL_F32)
    add_tokenizer(writer)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
    adders = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in (fields or {}).items():
        adders[type(value)](key, value)
    for name, weight in _tensors(model, architecture):
        writer.add_tensor(name, weight.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(model: t.PreTrainedModel, architecture: str) -> Iterator[tuple[str, Tensor]]:
    names = get_tensor_name_map(ARCHITECTURES[architecture], model.config.num_hidden_layers)
    for parameter, value in model.named_parameters():  # without a tied lm_head
        name = names.get_name(parameter, (".weight", ".bias"))
        assert name is not None, parameter
        weight = value
        if architecture == "llama" and parameter.endswith("q_proj.weight"):
            weight = interleaved(value, model.config.num_attention_heads)
        if architecture == "llama" and parameter.endswith("k_proj.weight"):
            weight = interleaved(value, model.config.num_key_value_heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            weight = value + 1
        yield name, weight


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The rows of a query or key weight as llama.cpp's Llama has them: of each head rows 0, n/2, 1, n/2 + 1, ..."""
    return torch.cat([torch.stack(head.chunk(2), dim=1).flatten(0, 1) for head in weight.chunk(heads)])

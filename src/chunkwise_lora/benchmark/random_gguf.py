"""A GGUF file of random weights in the shape of a known model. llama.cpp takes the same time for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers import LlamaConfig, LlamaForCausalLM

LINEAR, EMBEDDING = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
SCALE = {LINEAR: 4e-3, EMBEDDING: 3e-4}
"""Scale of all blocks. The outputs are then of the size of trained ones."""


def write_random_gguf(config: LlamaConfig, path: Path) -> Path:
    """Write a model without a tokenizer: linear layers as Q4_0, embeddings and head as Q8_0. Returns `path`."""
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names, generator = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers), np.random.default_rng(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        tensor = f"{names.get_name(name.removesuffix('.weight'))}.weight"
        if parameter.dim() == 1:
            writer.add_tensor(tensor, np.ones(parameter.shape, np.float32))
            continue
        kind = LINEAR if ".layers." in name else EMBEDDING
        numbers, size = GGML_QUANT_SIZES[kind]
        blocks = generator.integers(0, 256, (parameter.numel() // numbers, size), np.uint8)
        blocks[:, :2] = np.array([SCALE[kind]], np.float16).view(np.uint8)  # a block begins with its scale
        writer.add_tensor(tensor, blocks.reshape(len(parameter), -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

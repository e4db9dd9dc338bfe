"""The one list of architectures that the tests run over: a config of a tiny model for each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as t
from torch import Tensor

VOCABULARY = 97
PAD = 0
SLIDING_WINDOW = 16
"""Shorter than the tests' texts."""

Config = Callable[[], t.PreTrainedConfig]

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}
SIZES: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.18,
}
"""What configs of models like Llama call their sizes."""
_GPT = {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024, "initializer_range": 0.18}
"""What configs of models like GPT-2 call them."""
_WINDOW = {"sliding_window": SLIDING_WINDOW}
_ALTERNATING = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, **_ALTERNATING}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
"""Keys and values from one latent vector, as in DeepSeek. All heads have their own."""
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}


def _sized(kind: str, **changes: Any) -> Config:
    """The config class `kind` of transformers with the common sizes and these changes."""
    return lambda: getattr(t, f"{kind}Config")(**copy.deepcopy({**SIZES, **changes}))


def _gpt(kind: str, **changes: Any) -> Config:
    return lambda: getattr(t, f"{kind}Config")(**{**_GPT, **changes})


IMAGE, IMAGE_START, IMAGE_END = VOCABULARY - 1, VOCABULARY - 2, VOCABULARY - 3
"""Ids of the tokens that stand for an image or enclose it."""
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.18,
}
_GRID_VISION = {**_VISION, "depth": 2, "num_heads": 2, "out_hidden_size": 32}
_MROPE = {
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
"""Rotary embeddings that turn by time, height and width, as in Qwen-VL."""
_MARKERS = {
    "video_token_id": 0,
    "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
    "image_start_token_id": IMAGE_START,
    "image_end_token_id": IMAGE_END,
}
_CLIP = {**_VISION, "projection_dim": 16}


def _seeing(kind: str, vision: dict[str, Any], text: dict[str, Any] | None = None, **changes: Any) -> Config:
    """The config class `kind` of an image-text model with these parts, and the id of its image token."""
    image = {"image_token_id": IMAGE, "image_token_index": IMAGE}
    parts = {"text_config": {**SIZES, **(text or {})}, "vision_config": vision}
    # Configs change the dicts that they are given.
    return lambda: getattr(t, f"{kind}Config")(**copy.deepcopy(parts), **_TOKENS, **image, **changes)


ARCHITECTURES: dict[str, Config] = {
    # Dense models with rotary embeddings
    "llama": _sized("Llama"),
    "mistral": _sized("Mistral", **_WINDOW),
    "ministral3": _sized("Ministral3", head_dim=8),
    "ministral": _sized("Ministral", head_dim=8, **_ALTERNATING),
    "qwen2": _sized("Qwen2"),
    "qwen3": _sized("Qwen3", head_dim=16),
    "gemma": _sized("Gemma", head_dim=16),
    "gemma2": _sized("Gemma2", **_GEMMA),
    "gemma3": _sized("Gemma3Text", **_GEMMA),
    "gemma3n": _sized(
        "Gemma3nText",
        head_dim=16,
        sliding_window=SLIDING_WINDOW,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
    ),
    "gemma4": _sized(
        "Gemma4Text",
        head_dim=16,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        **_ALTERNATING,
    ),
    "phi": _sized("Phi", tie_word_embeddings=True),
    "phi3": _sized("Phi3"),
    "gpt_neox": _sized("GPTNeoX"),
    "stablelm": _sized("StableLm"),
    "starcoder2": _sized("Starcoder2"),
    "olmo": _sized("Olmo"),
    "olmo2": _sized("Olmo2"),
    "olmo3": _sized("Olmo3", **_ALTERNATING),
    "granite": _sized("Granite"),
    "cohere": _sized("Cohere", logit_scale=1.0),
    "cohere2": _sized("Cohere2", logit_scale=1.0, **_ALTERNATING),
    "glm": _sized("Glm", head_dim=8),
    "glm4": _sized("Glm4", head_dim=8),
    "exaone4": _sized("Exaone4", **_ALTERNATING),
    "ernie4_5": _sized("Ernie4_5", head_dim=8),
    "smollm3": _sized("SmolLM3"),
    "hunyuan": _sized("HunYuanDenseV1", head_dim=8),
    "seed_oss": _sized("SeedOss", head_dim=8),
    "nemotron": _sized("Nemotron"),
    "persimmon": _sized("Persimmon"),
    "helium": _sized("Helium", head_dim=8),
    "diffllama": _sized("DiffLlama"),
    "apertus": _sized("Apertus"),
    "arcee": _sized("Arcee"),
    "minicpm3": _sized("MiniCPM3", num_key_value_heads=4, **_LATENT),
    # Other positions: learned, ALiBi, rotary from a table
    "gpt2": _gpt("GPT2"),
    "gpt_bigcode": _gpt("GPTBigCode"),
    "gpt_neo": _sized("GPTNeo", attention_types=[[["global", "local"], 1]], num_heads=4, window_size=SLIDING_WINDOW),
    "gptj": _gpt("GPTJ", rotary_dim=4),
    "codegen": _gpt("CodeGen", rotary_dim=4),
    "opt": _sized("OPT", ffn_dim=48, word_embed_proj_dim=32, init_std=0.18),
    "biogpt": _sized("BioGpt"),
    "xglm": _sized("XGLM", d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, init_std=0.18),
    "bloom": _sized("Bloom", tie_word_embeddings=False),
    "mpt": _sized("Mpt", max_seq_len=1024),
    "falcon": _sized("Falcon", multi_query=True, parallel_attn=True, new_decoder_architecture=False),
    "falcon_alibi": _sized("Falcon", multi_query=True, alibi=True),
    # Mixtures of experts
    "mixtral": _sized("Mixtral", **_LOCAL_EXPERTS),
    "qwen2_moe": _sized("Qwen2Moe", shared_expert_intermediate_size=16, **_EXPERTS),
    "qwen3_moe": _sized("Qwen3Moe", head_dim=16, tie_word_embeddings=False, **_EXPERTS),
    "phimoe": _sized("Phimoe", **_LOCAL_EXPERTS),
    "olmoe": _sized("Olmoe", **_EXPERTS),
    "granitemoe": _sized("GraniteMoe", **_LOCAL_EXPERTS),
    "deepseek_v2": _sized("DeepseekV2", num_key_value_heads=4, **_LATENT, **_ROUTED_EXPERTS),
    "deepseek_v3": _sized("DeepseekV3", num_key_value_heads=4, **_LATENT, **_ROUTED_EXPERTS),
    "glm4_moe": _sized("Glm4Moe", head_dim=8, **_ROUTED_EXPERTS),
    "ernie4_5_moe": _sized("Ernie4_5_Moe", moe_intermediate_size=16, moe_k=2, moe_num_experts=4),
    "gpt_oss": _sized("GptOss", head_dim=8, **_LOCAL_EXPERTS, **_ALTERNATING),
    "llama4": _sized(
        "Llama4Text",
        head_dim=8,
        intermediate_size_mlp=48,
        attention_chunk_size=SLIDING_WINDOW,
        no_rope_layers=[1, 0],
        num_local_experts=4,
        interleave_moe_layer_step=2,
    ),
    "jetmoe": _sized("JetMoe", kv_channels=8, **_LOCAL_EXPERTS),
    # Recurrent layers, alone and beside attention
    "mamba": _sized("Mamba", state_size=8),
    "mamba2": _sized("Mamba2", state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=16),
    "jamba": _sized(
        "Jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        num_experts=2,
    ),
    "bamba": _sized("Bamba", attn_layer_indices=[1], **_MAMBA2),
    "zamba2": _sized(
        "Zamba2",
        num_key_value_heads=4,
        layers_block_type=["mamba", "hybrid", "hybrid"],
        num_hidden_layers=3,
        n_mamba_heads=4,
        mamba_d_state=8,
        chunk_size=16,
        use_mamba_kernels=False,
    ),
    "falcon_h1": _sized("FalconH1", mamba_d_ssm=64, **_MAMBA2),
    "granitemoehybrid": _sized(
        "GraniteMoeHybrid", layer_types=["mamba", "attention"], shared_intermediate_size=16, **_LOCAL_EXPERTS, **_MAMBA2
    ),
    "nemotron_h": _sized(
        "NemotronH",
        layers_block_type=["mamba", "attention"],
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=16,
        use_mamba_kernels=False,
    ),
    "lfm2": _sized("Lfm2", layer_types=["conv", "full_attention"]),
    "recurrent_gemma": _sized(
        "RecurrentGemma",
        block_types=["recurrent", "attention"],
        attention_window_size=SLIDING_WINDOW,
        lru_width=32,
    ),
    "qwen3_next": _sized("Qwen3Next", shared_expert_intermediate_size=16, **_DELTA, **_EXPERTS),
    "qwen3_5": _sized("Qwen3_5Text", **_DELTA),
    # Models that read images
    "llava": _seeing("Llava", _CLIP, vision_feature_layer=-1),
    "llava_next": _seeing("LlavaNext", _CLIP, vision_feature_layer=-1, image_grid_pinpoints=[[32, 32]]),
    "llava_onevision": _seeing("LlavaOnevision", _VISION, image_grid_pinpoints=[[32, 32]]),
    "mistral3": _seeing("Mistral3", _VISION, {"sliding_window": None}),
    "qwen2_vl": _seeing("Qwen2VL", {**_GRID_VISION, "embed_dim": 16, "hidden_size": 32}, _MROPE, **_MARKERS),
    "qwen2_5_vl": _seeing("Qwen2_5_VL", _GRID_VISION, _MROPE, **_MARKERS),
    "qwen3_vl": _seeing("Qwen3VL", {**_GRID_VISION, "deepstack_visual_indexes": [0]}, _MROPE, **_MARKERS),
    "qwen3_vl_moe": _seeing(
        "Qwen3VLMoe", {**_GRID_VISION, "deepstack_visual_indexes": [0]}, {**_MROPE, **_EXPERTS}, **_MARKERS
    ),
    "qwen3_5_vision": _seeing("Qwen3_5", _GRID_VISION, {**_MROPE, **_DELTA, "partial_rotary_factor": 0.5}, **_MARKERS),
    "glm4v": _seeing("Glm4v", _GRID_VISION, _MROPE, **_MARKERS),
    "gemma3_vision": _seeing("Gemma3", _VISION, _GEMMA, mm_tokens_per_image=4),
    "paligemma": _seeing("PaliGemma", {**_VISION, "projection_dim": 32}, {"head_dim": 8}, projection_dim=32),
    "idefics2": _seeing(
        "Idefics2",
        _VISION,
        {"sliding_window": None},
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
    ),
    "idefics3": _seeing("Idefics3", _VISION),
    "smolvlm": _seeing("SmolVLM", _VISION),
    "internvl": _seeing("InternVL", {**_VISION, "image_size": [32, 32], "patch_size": [8, 8]}),
    "aya_vision": _seeing("AyaVision", _VISION, {"logit_scale": 1.0, **_ALTERNATING}),
    "cohere2_vision": _seeing(
        "Cohere2Vision", _VISION, {"logit_scale": 1.0, **_ALTERNATING}, alignment_intermediate_size=32
    ),
}


@dataclass(frozen=True)
class Images:
    """How prompts of an image-text model hold images."""

    tokens: int
    """Number of image tokens that stand for one image of 32 x 32 pixels."""
    shape: tuple[int, ...] = (3, 32, 32)
    """Shape of one prompt's pixel values."""
    more: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}
    """Further inputs for prompts `ids` (batch, tokens)."""
    enclosed: bool = False
    """Whether other tokens mark begin and end of the image."""


def _sizes(ids: Tensor) -> dict[str, Tensor]:
    return {"image_sizes": torch.tensor([[32, 32]] * len(ids))}


def _kinds_and_grids(ids: Tensor) -> dict[str, Tensor]:
    return {"image_grid_thw": torch.tensor([[1, 4, 4]] * len(ids)), "mm_token_type_ids": (ids == IMAGE).int()}


_PATCHES = Images(4, (16, 3 * 2 * 8 * 8), _kinds_and_grids, enclosed=True)

IMAGES: dict[str, Images] = {
    "llava": Images(16),
    "llava_next": Images(36, (2, 3, 32, 32), _sizes),
    "llava_onevision": Images(36, (2, 3, 32, 32), _sizes),
    "mistral3": Images(4, more=_sizes),
    "qwen2_vl": _PATCHES,
    "qwen2_5_vl": _PATCHES,
    "qwen3_vl": _PATCHES,
    "qwen3_vl_moe": _PATCHES,
    "qwen3_5_vision": _PATCHES,
    "glm4v": _PATCHES,
    "gemma3_vision": Images(4, more=lambda ids: {"token_type_ids": (ids == IMAGE).long()}),
    "paligemma": Images(16, more=lambda ids: {"token_type_ids": torch.zeros_like(ids)}),
    "idefics2": Images(4, (1, 3, 32, 32)),
    "idefics3": Images(4, (1, 3, 32, 32)),
    "smolvlm": Images(4, (1, 3, 32, 32)),
    "internvl": Images(4),
    "aya_vision": Images(4),
    "cohere2_vision": Images(4),
}
"""The architectures that read images."""


def prompts(architecture: str, lengths: tuple[int, ...], seed: int = 3, images: bool = True) -> dict[str, Tensor]:
    """A batch of random prompts of `lengths` tokens of text, padded on the left.

    If the architecture reads images, every prompt also holds one, unless `images` is false.
    """
    generator = torch.Generator().manual_seed(seed)
    image = IMAGES.get(architecture, Images(0)) if images else Images(0)
    width = max(lengths) + image.tokens
    ids = torch.randint(2, IMAGE_END, (len(lengths), width), generator=generator)
    ids[:, -image.tokens - 3 : -3] = IMAGE
    if image.enclosed:
        ids[:, -image.tokens - 4], ids[:, -3] = IMAGE_START, IMAGE_END
    mask = (torch.arange(width) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    ids = ids * mask + PAD * (1 - mask)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if image.tokens:
        pixels = torch.randn((len(lengths), *image.shape), generator=generator)
        inputs["pixel_values"] = pixels.flatten(0, 1) if image.enclosed else pixels
        inputs |= image.more(ids)
    return inputs

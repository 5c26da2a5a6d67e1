"""Tiny configs: the default config of a model type with small sizes, few layers and one layer of each kind."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 128
FIRST_SPECIAL = 100  # ids of special tokens that lie beyond the vocabulary move to here and above
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
LAYERS, MOST_LAYERS = 2, 4  # where layers differ, one of each kind

# Names of sizes in configs, and what they become; the first pattern that matches a whole name counts.
LAYER_COUNTS = (
    r"(num_hidden_layers|n_layers?|num_layers|(num_)?(encoder|decoder)_layers|depth|\w*_num_hidden_layers"
    r"|num_\w*_hidden_layers|attention_layers|(text|vision)_layers|num_local_layers|num_block_layers)"
)
SIZES: tuple[tuple[str, int], ...] = (
    (
        r"(hidden_size|d_model|n_embd|dim|embed_dim|hidden_dim|(out|output)_hidden_size|word_embed_proj_dim|model_dim"
        r"|(decoder|encoder|vision|text|lm|backbone|language|cross_attn|mit)_hidden_size|(encoder|decoder)_hidden_dim"
        r"|attention_dim|vision_output_dim|hidden_channels|projection_dim|proj_dim|embedding_size|output_dim"
        r"|(projector|projection)_hidden_size|projection_size|(text|vision)_embed_dim|lru_width"
        r"|embedding_dim|upsample_groups)",
        HIDDEN,
    ),
    (r"(\w*intermediate_size|\w*ffn_dim|d_ff|\w*ffn_hidden_size|n_inner|mlp_dim|\w*intermediate_dim)", 96),
    (r"(\w*num_attention_heads|n_heads?|num_heads|\w*attention_heads|index_n_heads)", HEADS),
    (r"(\w*num_key_value_heads|n_kv_heads|num_kv_heads)", KV_HEADS),
    (
        r"(head_dim|attention_head_size|attention_head_dim|d_kv|attn_head_dim|(index|global|swa)_head_dim"
        r"|swa_v_head_dim|kv_channels|qk_head_dim|kv_lora_rank|q_lora_rank|o_lora_rank)",
        HEAD_DIM,
    ),
    (r"(qk_nope_head_dim|qk_rope_head_dim|v_head_dim|hidden_size_per_layer_input|per_layer_hidden_size|block_size)", 8),
    (r"(\w*vocab_size|vocab_size_per_layer_input|num_embeddings|codebook_size)", VOCABULARY),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts|laurel_rank)", 4),
    (
        r"(num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts|experts_per_token|num_selected_experts"
        r"|linear_num_key_heads)",
        2,
    ),
    (r"(n_group|topk_group|num_expert_group|num_limited_groups|mamba_n_groups|n_groups|mamba_ngroups)", 1),
    (r"(max_position_embeddings|n_positions|max_(target|source)_positions|n_ctx|seq_length|max_sequence_length)", 96),
    (r"(mamba_n_heads|mamba_num_heads|n_mamba_heads)", 8),
    (r"(mamba_d_head|mamba_head_dim|mamba_headdim|mamba_d_state|state_size|(mamba_d_)?ssm_state_size)", 16),
    (r"(mamba_d_ssm)", 128),
    (r"(linear_num_value_heads|linear_num_heads)", 4),
    (r"(linear_(key_|value_)?head_dim)", 16),
    (r"(mm_tokens_per_image|image_seq_length|num_queries|two_stage_num_proposals|num_select)", 4),
    (r"(n_filters|num_filters)", 4),
    (r"(base_channels)", 32),
    (r"(index_topk)", 6),
    (r"(sliding_window|attention_window_size)", 5),
    (r"(attention_chunk_size)", 8),
)
LISTS_BY_LAYER = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attention_types")
# One entry for each stage of a pyramid.
WIDTH_LISTS = ("hidden_sizes", "embed_dims", "encoder_hidden_sizes")
HEAD_LISTS = ("num_heads", "num_attention_heads", "encoder_num_heads")
NOT_SHRUNK = ("rope_parameters", "rope_scaling", "quantization_config", "id2label", "label2id")

LINEAR, FULL = "linear_attention", "full_attention"
OMNI = {
    "vision_start_token_id": 120,
    "vision_end_token_id": 121,
    "audio_start_token_id": 122,
    "audio_end_token_id": 123,
}
SAM_VISION = {"output_channels": HIDDEN, "num_pos_feats": HIDDEN // 2, "global_attn_indexes": [1], "window_size": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# What the rules above cannot know: which layers have attention, and sizes that depend on each other.
OVERRIDES: dict[str, dict[str, Any]] = {
    "align_vision_model": {"width_coefficient": 0.2, "depth_coefficient": 0.2},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "autoformer": {"prediction_length": 4, "context_length": 8, "label_length": 4},
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {"vocabulary_map": {"<image>": 100}},
    "clap_audio_model": {"patch_embeds_hidden_size": 16, "hidden_size": 128},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
        "layer_types": ["sliding_attention", FULL],
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [64, 64], "output_channels": 32},
    "depth_pro": {"patch_size": 32, "image_size": 128},
    "dia_decoder": {"cross_hidden_size": HIDDEN, "cross_head_dim": HEAD_DIM, "cross_num_key_value_heads": HEADS}
    | {"cross_num_attention_heads": HEADS},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1}
    | {"layer_types": ["sliding_attention", FULL, "sliding_attention"]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_text": {"swa_head_dim": 16},
    "dots3_note_vision_encoder": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.2},
    "emu3": {"vocabulary_map": {"<image>": 100}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "flaubert": {"n_words": VOCABULARY, "emb_dim": HIDDEN},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "glm5_next_text": {"index_topk": 4, "index_kpool": 2, "linear_num_heads": 4, "linear_head_dim": 16},
    "gpt_neo": {
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
    },
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "granitemoehybrid": {
        "num_hidden_layers": 3,
        "layer_types": [LINEAR, FULL, LINEAR],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
    },
    "hy_v4_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}},
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 100},
    "informer": {"prediction_length": 4, "context_length": 8},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_linear": {"linear_num_heads": 4, "linear_head_dim": 16},
    "kosmos-2": {"latent_query_num": 4},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", FULL]},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", FULL], "num_dense_layers": 0},
    "llama4_text": {"no_rope_layers": [1, 0], "moe_layers": [1]},
    "llama4_vision_model": {
        "intermediate_size": 4 * HIDDEN,
        "projector_input_dim": HIDDEN,
        "projector_output_dim": HIDDEN,
        "vision_output_dim": HIDDEN,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1},
    "ministral": {"head_dim": HEAD_DIM},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "moonshine": {
        "encoder_num_attention_heads": 4,
        "encoder_num_key_value_heads": 4,
        "decoder_num_attention_heads": 4,
        "decoder_num_key_value_heads": 4,
    },
    "moonshine_streaming": {"num_key_value_heads": 4, "pad_head_dim_to_multiple_of": None},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "nemotron": {"num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM},
    "qwen2_5_omni_bigvgan": {"upsample_initial_channel": 64},
    "qwen2_5_omni_thinker": OMNI,
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 96},
    "qwen3_omni_moe_thinker": OMNI,
    "qwen4_exp_text": {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "indexer_n_heads": 4, "indexer_kv_heads": 1}
    | {"indexer_head_dim": 16, "indexer_budget": 6, "indexer_compress_ratio": 1},
    "sam_vision_model": SAM_VISION,
    "sam_hq_vision_model": SAM_VISION,
    "sam_prompt_encoder": {"image_embedding_size": 4},
    "sam_hq_mask_decoder": {"vit_dim": HIDDEN},
    "sam_hq_prompt_encoder": {"image_embedding_size": 4},
    "rt_detr": {"encoder_in_channels": [32, 64, 128]},
    "rt_detr_v2": {"encoder_in_channels": [32, 64, 128]},
    "sam2_hiera_det_model": {
        "hidden_size": 16,
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "blocks_per_stage": [1, 1, 2, 1],
        "global_attention_blocks": [3],
        "image_size": [64, 64],
        "window_size_per_stage": [4, 4, 4, 4],
        "window_positional_embedding_background_size": [4, 4],
    },
    "sam2_vision_model": {
        "backbone_channel_list": [128, 64, 32, 16],
        "fpn_hidden_size": HIDDEN,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "perceiver": {"num_latents": 16, "d_latents": 64, "d_model": 64},
    "step3p5": {"sliding_window": 5},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "time_series_transformer": {"prediction_length": 4, "context_length": 8},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": [LINEAR, LINEAR, "hybrid", LINEAR, LINEAR, "hybrid"]},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "num_query_groups": 4,
    },
}
# In place of backbones of a library that may be missing.
BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 48, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_indices": [1, 2, 3, 4],
}


def tiny_config(model_type: str, *, only_layers: bool = False) -> PreTrainedConfig:
    """The default config with small sizes; with `only_layers` all widths stay as published.

    Raises:
        Exception: whatever the config class says of sizes that do not fit together.
    """
    cls = CONFIG_MAPPING[model_type]
    values = Shrinker(only_layers).shrink(cls().to_dict())
    for name in ("transformers_version", "model_type"):
        values.pop(name, None)
    config = cls.from_dict(values)
    if not only_layers:
        fit_axes(config)
    return config


def fit_axes(config: PreTrainedConfig) -> None:
    """Sections of rotary embeddings by axis, where only the model knows their default."""
    package = importlib.import_module(type(config).__module__.rpartition(".")[0])
    sources = (path.read_text() for path in Path(package.__path__[0]).glob("modeling_*.py"))
    rope = getattr(config, "rope_parameters", None)
    is_given = "rope_parameters" in OVERRIDES.get(config.model_type, {})
    if (
        isinstance(rope, dict)
        and "rope_type" in rope
        and not is_given
        and any("mrope_section" in source for source in sources)
    ):
        head_dim = getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None) or HEAD_DIM
        half = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4]
    for inner in vars(config).values():
        if isinstance(inner, PreTrainedConfig):
            fit_axes(inner)


class Shrinker:
    """Shrinks one config and those inside it; ids of special tokens stay consistent among them."""

    def __init__(self, only_layers: bool):
        self.only_layers = only_layers
        self.tokens: dict[int, int] = {}

    def shrink(self, values: dict[str, Any]) -> dict[str, Any]:
        kept = layers_to_keep(values)
        num_layers = LAYERS if kept is None else len(kept)
        small = {name: self.value(name, value, values, kept, num_layers) for name, value in values.items()}
        if not self.only_layers:
            self.fit_sizes(values, small)
        fit_layers(values, small, num_layers)
        return small if self.only_layers else small | OVERRIDES.get(values.get("model_type", ""), {})

    def value(self, name: str, value: Any, siblings: dict[str, Any], kept: list[int] | None, num_layers: int) -> Any:
        if isinstance(value, dict):
            if name in NOT_SHRUNK:
                return self.positions(value) if name.startswith("rope") else value
            if name == "per_layer_config":
                places = range(num_layers) if kept is None else kept
                found = {j: value.get(i, value.get(str(i))) for j, i in enumerate(places)}
                return {j: self.shrink(config) for j, config in found.items() if config is not None}
            is_timm = value.get("model_type") == "timm_backbone" or "timm_default_weights" in value
            return dict(BACKBONE) if is_timm else self.shrink(value)
        if isinstance(value, list | tuple):
            return self.list_value(name, value, siblings, kept)
        if not isinstance(name, str):
            return value
        if isinstance(value, float) and ("drop" in name or name.startswith("mask_")):
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if re.search(r"(_token_id|_token_index|(?<!per)_token|_id|_idx)$", name):
            return self.token(value)
        if re.fullmatch(LAYER_COUNTS, name):
            return min(value, num_layers)
        return self.size(name, value, siblings)

    def size(self, name: str, value: int, siblings: dict[str, Any]) -> int:
        if value < 0 or (self.only_layers and "vocab" not in name):
            return value
        if re.fullmatch(r"\w*(key_value|kv)_heads", name) and siblings.get("num_attention_heads") == value:
            return min(value, HEADS)  # no grouped queries
        for pattern, largest in SIZES:
            if re.fullmatch(pattern, name):
                return min(value, largest)
        return value

    def list_value(
        self, name: str, value: Sequence[Any], siblings: dict[str, Any], kept: list[int] | None
    ) -> Sequence[Any]:
        if kept is not None:
            num_layers = max(len(siblings[n]) for n in LISTS_BY_LAYER if isinstance(siblings.get(n), list))
            is_by_layer = len(value) == num_layers and value and isinstance(value[0], int | float | bool)
            if name in LISTS_BY_LAYER or is_by_layer:
                return [value[i] for i in kept if i < len(value)]
        if name in WIDTH_LISTS and not self.only_layers and all(isinstance(x, int) for x in value):
            return [min(x, 16 * 2**i) for i, x in enumerate(value)]
        if name in HEAD_LISTS and not self.only_layers and all(isinstance(x, int) for x in value):
            return [min(x, 2**i) for i, x in enumerate(value)]
        if name == "depths":
            return [min(x, 2) for x in value]
        if name.endswith(("token_id", "token_ids")):
            return [self.token(x) if isinstance(x, int) else x for x in value]
        return value

    def token(self, value: int) -> int:
        if value < VOCABULARY:
            return value
        return self.tokens.setdefault(value, FIRST_SPECIAL + len(self.tokens) % (VOCABULARY - FIRST_SPECIAL))

    def positions(self, values: dict[str, Any]) -> dict[str, Any]:
        """Rotary embeddings, whose lists have as many entries as half a head."""
        if self.only_layers:
            return values
        half = HEAD_DIM // 2
        lists = {"short_factor": [1.0] * half, "long_factor": [1.0] * half}
        return {
            name: self.positions(value) if isinstance(value, dict) else lists.get(name, value)
            for name, value in values.items()
        }

    def fit_sizes(self, values: dict[str, Any], small: dict[str, Any]) -> None:
        """Sizes that follow from others."""
        if small.get("head_dim", 0) is None and small.get("hidden_size") == HIDDEN:
            small["head_dim"] = HEAD_DIM
        patch = small.get("patch_size")
        if isinstance(small.get("image_size"), int):
            small["image_size"] = min(small["image_size"], 4 * patch if isinstance(patch, int) and patch >= 8 else 64)
        if isinstance(small.get("image_size"), list | tuple):
            small["image_size"] = [min(x, 64) for x in small["image_size"]]
        if "image_grid_pinpoints" in small and isinstance(small.get("vision_config"), dict):
            side = small["vision_config"].get("image_size", 64)
            small["image_grid_pinpoints"] = [[side, side], [side, 2 * side]]
        if isinstance(small.get("num_frames"), int):
            small["num_frames"] = min(small["num_frames"], 4)
        if isinstance(small.get("rotary_dim"), int):
            small["rotary_dim"] = 8
        rope_dim = values.get("qk_rope_head_dim")
        if rope_dim and "head_dim" in values and values["head_dim"] in (None, rope_dim):
            small["head_dim"] = small["qk_rope_head_dim"]


def layers_to_keep(values: dict[str, Any]) -> list[int] | None:
    """One layer of each kind, at least two; None where the config does not list kinds."""
    lists = [values[name] for name in LISTS_BY_LAYER if isinstance(values.get(name), list) and values[name]]
    if not lists:
        return None
    kinds = [str([x[i] if i < len(x) else None for x in lists]) for i in range(max(map(len, lists)))]
    kept = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]][:MOST_LAYERS]
    kept += [i for i in range(len(kinds)) if i not in kept][: max(0, LAYERS - len(kept))]
    return sorted(kept)


def fit_layers(values: dict[str, Any], small: dict[str, Any], num_layers: int) -> None:
    """What counts layers in other words, and names of stages, which a config makes anew."""
    if isinstance(small.get("activation_sparsity_pattern"), list):
        small["activation_sparsity_pattern"] = small["activation_sparsity_pattern"][:num_layers]
    if "decoder_start_token_id" in values and values["decoder_start_token_id"] is None:
        small["decoder_start_token_id"] = 0
    for name in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"):
        if isinstance(small.get(name), int):
            small[name] = min(small[name], 1)
    if isinstance(small.get("num_kv_shared_layers"), int):
        small["num_kv_shared_layers"] = 0
    if small.get("n_routed_experts"):
        for name, value in (("num_experts_per_tok", 2), ("n_group", 1), ("topk_group", 1), ("n_shared_experts", 1)):
            if name in small and small[name] is None:
                small[name] = value
    if isinstance(values.get("stage_names"), list) and len(values["stage_names"]) > num_layers + 1:
        is_plain = all(re.fullmatch(r"stem|stage\d+", name) for name in values["stage_names"])
        if is_plain and any(re.fullmatch(LAYER_COUNTS, name) for name in values):
            for name in ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices"):
                small.pop(name, None)

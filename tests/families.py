"""A tiny random model of every family that is supported, and what its attention computes, written down by hand."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gptj import modeling_gptj

from ntk_attention.ops.rotation import unrotated
from ntk_attention.tuner.routing import ROUTE

from .reference import elu_phi

# Sequences of different parts of a model differ in length, so that a length tells which part an attention belongs to.
TEXT, SOURCE, TARGET = 11, 13, 9
# The library has other defaults for these.
ENCODERS = {"bert", "roberta", "distilbert", "albert", "modernbert", "vit", "deit", "dinov2", "clip", "siglip"}
# Options of an adapter of attention alone, with a full Z.
ATTENTION = {"rank": None, "feed_forward_rank": None}
VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 32, 4, 2, 8
IMAGE, PATCH = 12, 4
MELS, FRAMES = 8, 30


@dataclass(frozen=True)
class Family:
    """One family: a tiny config and the rules of its attention.

    Args:
        kind: "decoder", "encoder", "encoder-decoder", "vision" or "dual" (text and vision).
        model_type: of transformers' `AutoConfig`.
        options: of that config.
        scale: the logits are scale * q.k; by layer where it depends on the layer.
        prescaled: whether the query is multiplied by the scale before it reaches the attention function.
        causal: length of the sequences that must not see their future.
        windows: by layer, how many tokens a query sees on its left, itself included (and on its right if not causal).
        softcap: logits become softcap * tanh(logits / softcap).
        implementations: of the attention that the family supports.
    """

    kind: str
    model_type: str
    options: Mapping[str, Any]
    scale: float | tuple[float, ...] = HEAD_DIM**-0.5
    prescaled: bool = False
    causal: int | None = None
    windows: tuple[int | None, ...] = ()
    softcap: float | None = None
    implementations: tuple[str, ...] = ("sdpa", "eager")
    auto: type = field(default=AutoModel)

    def build(self, implementation: str | None = None, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
        """The same random model each time, in evaluation mode."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.model_type, **self.options)
        model = self.auto.from_config(config, attn_implementation=implementation or self.implementations[0])
        with torch.no_grad():  # far from zero, so that attention is not almost uniform
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape)
                parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
        return model.to(dtype).eval()

    def inputs(self, dtype: torch.dtype = torch.float64, *, padded: bool = True) -> dict[str, Tensor]:
        """Two items, of which the second is padded: on the left for decoders, else on the right."""
        generator = torch.Generator().manual_seed(1)

        def tokens(length: int) -> Tensor:
            return torch.randint(3, VOCABULARY, (2, length), generator=generator)

        def mask(length: int) -> Tensor:
            mask = torch.ones(2, length, dtype=torch.long)
            if padded:
                mask[1, slice(0, 4) if self.kind == "decoder" else slice(-4, None)] = 0
            return mask

        inputs = {}
        if self.kind in ("decoder", "encoder", "dual"):
            inputs |= {"input_ids": tokens(TEXT), "attention_mask": mask(TEXT)}
        if self.kind in ("vision", "dual"):
            inputs["pixel_values"] = torch.randn(2, 3, IMAGE, IMAGE, generator=generator).to(dtype)
        if self.kind == "encoder-decoder":
            if self.model_type == "whisper":
                inputs["input_features"] = torch.randn(2, MELS, FRAMES, generator=generator).to(dtype)
            else:
                inputs |= {"input_ids": tokens(SOURCE), "attention_mask": mask(SOURCE)}
            inputs |= {"decoder_input_ids": tokens(TARGET), "decoder_attention_mask": mask(TARGET)}
        return inputs

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, padding: bool = False) -> Tensor:
        """The outputs of all real tokens (or of the padding), one row each."""
        output = model(**inputs)
        if self.kind == "vision":
            return output.last_hidden_state.flatten(0, 1)
        mask = inputs["decoder_attention_mask" if self.kind == "encoder-decoder" else "attention_mask"].bool()
        mask = ~mask if padding else mask
        if self.kind == "dual":
            text, image = output.text_model_output.last_hidden_state, output.vision_model_output.last_hidden_state
            return torch.cat([text[mask], image.flatten(0, 1)])
        return (output.last_hidden_state if self.kind == "encoder" else output.logits)[mask]

    def visible(self, module: nn.Module, num_queries: int, num_keys: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Which keys each query sees in an attention over whole sequences: bool [2 or 1, 1, L, S]."""
        distance = torch.arange(num_queries)[:, None] - torch.arange(num_keys)
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool)
        if num_queries == num_keys == self.causal:
            visible &= distance >= 0
        if self.windows and self.windows[module.layer_idx] is not None:
            visible &= distance.abs() < self.windows[module.layer_idx]
        visible = visible[None, None]
        for name in ("attention_mask", "decoder_attention_mask"):
            if name in inputs and inputs[name].shape[1] == num_keys:
                visible = visible & inputs[name].bool()[:, None, None, :]
        return visible

    def logit_scale(self, module: nn.Module) -> float:
        return self.scale[module.layer_idx] if isinstance(self.scale, tuple) else self.scale


def naive_attention(
    family: Family,
    inputs: Mapping[str, Tensor],
    *,
    shares: dict[nn.Module, list[Tensor]] | None = None,
    with_prefix: bool = True,
) -> Callable[..., tuple[Tensor, None]]:
    """An attention function as transformers calls it: Algorithm 2 as printed, in plain torch, for elu + 1.

    Z, k and b are those that a saved file would hold.

    Args:
        family: whose scales, windows and caps are applied, whatever the model passes.
        inputs: of the model, with the padding masks.
        shares: collects the share [B, H, L, 1] of the prefix in each call, by attention module.
        with_prefix: whether the prefix changes the output.
    """

    def forward(module, query, key, value, attention_mask, position_bias=None, ntk_rotation=None, **_):
        saved = module.ntk_states["default"].state_dict()
        Z, log_k, b = (saved[name].to(query.dtype) for name in ("Z", "log_k", "log_scale"))
        Z, k = (x * b.exp().view(-1, 1, 1) for x in (Z, log_k.exp()[..., None]))
        H, s = query.shape[1], family.logit_scale(module)
        q = query / s if family.prescaled else query
        K, V = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))

        logits = s * q @ K.mT
        if family.softcap is not None:
            logits = family.softcap * torch.tanh(logits / family.softcap)
        if position_bias is not None:
            logits = logits + position_bias
        A = torch.exp(logits) * family.visible(module, *logits.shape[-2:], inputs)
        mass = A.sum(dim=-1, keepdim=True)
        if hasattr(module, "sinks"):
            mass = mass + torch.exp(module.sinks).view(-1, 1, 1)
        if ntk_rotation is not None:  # test_positions.py says what it has to be
            q = unrotated(q, ntk_rotation.of(q, ""))
        phi = elu_phi(s**0.5 * q)
        phi = torch.cat([phi, torch.ones_like(phi[..., :1])], dim=-1)
        D = mass + phi @ k
        if shares is not None:
            shares.setdefault(module, []).append(phi @ k / D)
        out = (A @ V + phi @ Z) / D if with_prefix else A @ V / mass.clamp_min(1e-30)
        return out.transpose(1, 2), None

    return forward


@contextmanager
def attention_function(function: Callable[..., Any]) -> Iterator[None]:
    """In the place of the package's own, for routed modules."""
    ALL_ATTENTION_FUNCTIONS[ROUTE] = function
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[ROUTE]


LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_positions": 64}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
VIT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
    **SPECIAL,
}


def decoder(model_type: str, options: Mapping[str, Any], **rules: Any) -> Family:
    return Family("decoder", model_type, options, causal=TEXT, auto=AutoModelForCausalLM, **rules)


def sequence_to_sequence(model_type: str, options: Mapping[str, Any], **rules: Any) -> Family:
    auto = AutoModelForSpeechSeq2Seq if model_type == "whisper" else AutoModelForSeq2SeqLM
    return Family("encoder-decoder", model_type, options, causal=TARGET, auto=auto, **rules)


FAMILIES: dict[str, Family] = {
    "llama": decoder("llama", LLAMA),
    "qwen2": decoder("qwen2", {k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "qwen3": decoder("qwen3", LLAMA),
    "mistral": decoder("mistral", {**LLAMA, "sliding_window": 4}, windows=(4, 4)),
    "glm4": decoder("glm4", LLAMA),
    "gemma2": decoder(
        "gemma2",
        {**LLAMA, **WINDOW, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0},
        scale=24**-0.5,
        windows=(4, None),
        softcap=2.0,
        implementations=("eager",),
    ),
    "gemma3": decoder(
        "gemma3_text", {**LLAMA, **WINDOW, "query_pre_attn_scalar": 24}, scale=24**-0.5, windows=(4, None)
    ),
    "gpt_oss": decoder(
        "gpt_oss",
        {
            **LLAMA,
            **WINDOW,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "experts_implementation": "eager",
        },
        windows=(4, None),
        implementations=("eager",),
    ),
    "gpt2": decoder("gpt2", {**GPT2, **SPECIAL}),
    "gpt2_by_layer": decoder(
        "gpt2", {**GPT2, **SPECIAL, "scale_attn_by_inverse_layer_idx": True}, scale=(8**-0.5, 8**-0.5 / 2)
    ),
    "gpt2_unscaled": decoder("gpt2", {**GPT2, **SPECIAL, "scale_attn_weights": False}, scale=1.0),
    "gpt_neox": decoder("gpt_neox", {**BERT, **SPECIAL, "rotary_pct": 0.5}),
    "opt": decoder(
        "opt",
        {**BERT, **SPECIAL, "ffn_dim": 48, "word_embed_proj_dim": HIDDEN},
        prescaled=True,
    ),
    "whisper": sequence_to_sequence(
        "whisper",
        {**BART, "num_mel_bins": MELS, "max_source_positions": FRAMES // 2, "max_target_positions": 32},
        prescaled=True,
    ),
    "t5": sequence_to_sequence(
        "t5",
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "d_kv": HEAD_DIM,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": HEADS,
            "relative_attention_num_buckets": 8,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        scale=1.0,
    ),
    "bart": sequence_to_sequence("bart", {**BART, "max_position_embeddings": 64}),
    "bert": Family("encoder", "bert", BERT),
    "roberta": Family("encoder", "roberta", {**BERT, **SPECIAL}),
    "distilbert": Family(
        "encoder",
        "distilbert",
        {"vocab_size": VOCABULARY, "dim": HIDDEN, "hidden_dim": 48, "n_layers": 2, "n_heads": HEADS},
    ),
    "albert": Family("encoder", "albert", {**BERT, "embedding_size": 16}),
    "modernbert": Family(
        "encoder",
        "modernbert",
        {
            **BERT,
            **SPECIAL,
            "global_attn_every_n_layers": 2,
            "local_attention": 6,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        windows=(None, 4),  # three tokens on either side
    ),
    "vit": Family("vision", "vit", VIT),
    "deit": Family("vision", "deit", VIT),
    "dinov2": Family("vision", "dinov2", VIT),
    "clip": Family(
        "dual",
        "clip",
        {"text_config": {**BERT, **SPECIAL}, "vision_config": VIT, "projection_dim": 16},
        causal=TEXT,
    ),
    "siglip": Family(
        "dual",
        "siglip",
        {"text_config": {**BERT, **SPECIAL, "projection_size": HIDDEN}, "vision_config": VIT},
    ),
}

REFUSED: dict[str, tuple[str, Mapping[str, Any]]] = {
    "bloom": ("BloomAttention", {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": 1, "n_head": HEADS}),
    "falcon": ("FalconAttention", {**BERT, "num_hidden_layers": 1}),
    "deberta": ("DebertaAttention", {**BERT, "num_hidden_layers": 1}),
    "mpt": ("MptAttention", {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layers": 1, "n_heads": HEADS}),
}

GPTJ = {**GPT2, **SPECIAL, "rotary_dim": 4}
if hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS"):  # since transformers 5.24
    FAMILIES["gptj"] = decoder("gptj", GPTJ)
else:
    REFUSED["gptj"] = ("GPTJAttention", GPTJ)

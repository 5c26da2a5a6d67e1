"""A tiny model, adapters for it, and what transformers writes with them: what vLLM is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from ntk_attention import NTKAttentionConfig

VOCABULARY = 256
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "head_dim": 32}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Adapters of ours, one of every kind that is served; all with a visible random start.
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "attention": {"rank": None, "feed_forward_rank": None},
    "rotary": {"positions": "rotary"},
    "published": {"positions": "rotary", "rank": None, "feed_forward_rank": None, "constant_feature": False},
    "kv": {"state_heads": "kv", "rank": 3},
    "beside": {"feed_forward": "beside"},
    "some_layers": {"layers_to_transform": [1, 2]},
}


def make_model(folder: Path, model_type: str = "llama", **options: Any) -> Path:
    """A random model with a tokenizer whose words are w0, w1 ...; the last one ends a text."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, "eos_token_id": None, "bos_token_id": None, **options})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # far from zero, so that attention is not almost uniform and tokens differ
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else 1 + 0.1 * noise)
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


def load_model(folder: Path | str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def save_adapter(model: Path | str, folder: Path, seed: int, strength: float = 1.0, **options: Any) -> Path:
    """A random adapter of ours whose effect shows."""
    torch.manual_seed(seed)
    config = NTKAttentionConfig(task_type="CAUSAL_LM", init_weights=False, **options)
    adapted = get_peft_model(load_model(model), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "ntk_states" in name and "feed_forward" in name:
                parameter.mul_(0.3 * strength)
            elif "ntk_states" in name and "log_k" not in name:
                parameter.mul_(strength)
    adapted.save_pretrained(folder)
    return folder


def save_adapters(model: Path | str, folder: Path, count: int) -> list[Path]:
    """Many of the default kind."""
    adapted = get_peft_model(load_model(model), NTKAttentionConfig(task_type="CAUSAL_LM", init_weights=False))
    paths = []
    for seed in range(count):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "ntk_states" in name:
                    strength = 0.1 if "feed_forward" in name else 1.0
                    parameter.copy_(strength * torch.randn_like(parameter) - (3.0 if "log_k" in name else 0.0))
        paths.append(folder / f"adapter{seed}")
        adapted.save_pretrained(paths[-1])
    return paths


def save_lora(model: Path | str, folder: Path, seed: int, rank: int = 8) -> Path:
    """A random LoRA adapter of all linear layers."""
    torch.manual_seed(seed)
    adapted = get_peft_model(load_model(model), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05)
    adapted.save_pretrained(folder)
    return folder


def prompts(count: int, seed: int = 0, longest: int = 60, shared: int = 0) -> list[list[int]]:
    """Random texts, of which every second one begins with the same `shared` tokens, so that a prefix cache has hits."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCABULARY, (shared,), generator=generator).tolist()
    texts = []
    for i in range(count):
        length = int(torch.randint(3, longest, (1,), generator=generator))
        text = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        texts.append(start + text if i % 2 else text)
    return texts


@torch.inference_mode()
def expected_tokens(
    model: Path | str, adapters: Mapping[str, Path], requests: Sequence[tuple[str | None, list[int]]], length: int
) -> list[list[int]]:
    """What transformers writes for each (adapter or None, text), one at a time and greedily, past any end token."""
    greedy = GenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=-1, pad_token_id=0)
    written: list[list[int]] = [[] for _ in requests]
    for name in dict.fromkeys(name for name, _ in requests):
        base = load_model(model)
        adapted: Any = base if name is None else PeftModel.from_pretrained(base, adapters[name]).eval()
        for place, (own, text) in enumerate(requests):
            if own == name:
                ids = torch.tensor([text])
                out = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
                written[place] = out[0, len(text) :].tolist()
    return written

"""A tiny adapted Llama and what tests ask of it."""

import json
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.peft import MIN_PEFT_VERSION

from ntk_attention import NTKAttentionConfig
from ntk_attention.tuner.layer import NTKAttentionLayer

from .families import FAMILIES

TINY = FAMILIES["llama"]
INPUTS = TINY.inputs(torch.float32)


def tiny(dtype=torch.float32):
    return TINY.build(dtype=dtype)


def adapted(base=None, adapter_name="default", **options):
    base = tiny() if base is None else base
    config = NTKAttentionConfig(**{"init_weights": False, "task_type": "CAUSAL_LM", **options})
    torch.manual_seed(2)
    return get_peft_model(base, config, adapter_name=adapter_name).eval()


@torch.no_grad()
def logits(model, inputs=INPUTS):
    return TINY.run(model, inputs)


def skip_unless_transformers_takes_this_peft():
    """Its own methods for adapters ask for a version; that of 5.24 was not out when 5.24 was."""
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers asks for PEFT {MIN_PEFT_VERSION}")


def adapters(model, name="default"):
    return [layer[name] for layer in model.modules() if isinstance(layer, NTKAttentionLayer)]


def loss_of(model, inputs=INPUTS):
    return model(**inputs, labels=inputs["input_ids"]).loss


def losses_of_training(model, steps, learning_rate):
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=learning_rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_tokenizer(folder: Path, template: str | None = None) -> Path:
    """A byte tokenizer; with a template as "<start> $A <end>", one that knows both and puts them around a text so."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<end>", *alphabet, *([] if template is None else ["<start>"])]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if template is not None:
        special = [(token, tokens.index(token)) for token in ("<start>", "<end>")]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
        backend.add_special_tokens(["<start>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    return folder


def save_model(folder: Path, template: str | None = None) -> Path:
    """A random Llama with such a tokenizer, saved as from_pretrained wants it."""
    save_tokenizer(folder, template)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258 if template is None else 259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,  # large enough for a prefix to move the outputs
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_letters(path: Path, letters: str = "abcdefghij") -> Path:
    """A task to learn: the letter of a letter and a digit."""
    lines = [{"prompt": f"{a}{b}", "completion": a} for a in letters for b in "0123456789"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path

"""A KV cache or a prefix-tuning adapter as an adapter of ours: against the model that has the real prefix."""

import copy

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ntk_attention import NTKAttentionConfig
from ntk_attention.convert.prefixes import LayerPrefix, adapter_from_prefix, prefix_of_adapter, prefix_of_cache

M, L = 40, 6
TEXT = torch.randint(0, 50, (1, M + L), generator=torch.Generator().manual_seed(0))


def llama(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).double().eval()


@torch.no_grad()
def filled_cache(model, ids=TEXT[:, :M]):
    return model(input_ids=ids, use_cache=True).past_key_values


@torch.no_grad()
def with_the_text(model):
    """Logits of the last L tokens, from the whole text."""
    return model(input_ids=TEXT).logits[:, M:]


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_keys_move_to_the_positions_before_zero():
    """A cache of the moved keys, read from position 0 on, says what the text says."""
    model = llama()
    cache = DynamicCache()
    for i, (keys, values, _) in enumerate(prefix_of_cache(model, filled_cache(model))):
        cache.update(keys[None], values[None], i)
    actual = model(input_ids=TEXT[:, M:], past_key_values=cache, position_ids=torch.arange(L)[None]).logits
    assert error(actual, with_the_text(model)) < 1e-6


@torch.no_grad()
def test_an_adapter_stands_for_a_text():
    """The error of the polynomial falls with its degree, far below that of having no prefix at all."""
    model = llama()
    expected, prefix = with_the_text(model), prefix_of_cache(model, filled_cache(model))
    without = error(model(input_ids=TEXT[:, M:]).logits, expected)
    errors = []
    for degree in (2, 4):
        config = NTKAttentionConfig(
            feature_map="taylor", feature_map_options={"degree": degree}, constant_feature=False
        )
        adapted = adapter_from_prefix(llama(), prefix, config).eval()
        errors.append(error(adapted(input_ids=TEXT[:, M:]).logits, expected))
    assert errors[0] < 0.03 * without
    assert errors[1] < 0.1 * errors[0]


@torch.no_grad()
def test_it_is_an_ordinary_adapter(tmp_path):
    """Saved, loaded onto a fresh model and used by `generate`, which needs no positions."""
    model = llama()
    whole = model.generate(input_ids=TEXT, max_new_tokens=5, do_sample=False)[0, M + L :]
    adapted = adapter_from_prefix(llama(), prefix_of_cache(model, filled_cache(model))).eval()
    expected = adapted(input_ids=TEXT[:, M:]).logits
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert error(loaded(input_ids=TEXT[:, M:]).logits, expected) < 1e-6
    assert torch.equal(loaded.generate(input_ids=TEXT[:, M:], max_new_tokens=5, do_sample=False)[0, L:], whole)


@torch.no_grad()
def test_a_prefix_tuning_adapter_becomes_ours():
    torch.manual_seed(1)
    tuned = get_peft_model(llama(), PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")).double().eval()
    tuned.prompt_encoder["default"].embedding.weight.normal_(0.0, 0.5)
    expected = tuned(input_ids=TEXT[:, M:]).logits
    prefix = prefix_of_adapter(tuned)
    assert prefix[0].keys.shape == (2, 20, 8)
    adapted = adapter_from_prefix(llama(), prefix).eval()
    without = error(llama()(input_ids=TEXT[:, M:]).logits, expected)
    assert error(adapted(input_ids=TEXT[:, M:]).logits, expected) < 0.03 * without


@torch.no_grad()
@pytest.mark.parametrize("options", [{"constant_feature": True}, {"rank": 8}], ids=str)
def test_options_that_change_nothing(options):
    """A constant feature without weight, and a rank that is no restriction (d_v = 8)."""
    model = llama()
    prefix = prefix_of_cache(model, filled_cache(model))
    plain, changed = (
        adapter_from_prefix(
            llama(), prefix, NTKAttentionConfig(**{"feature_map": "taylor", "constant_feature": False} | o)
        )
        for o in ({}, options)
    )
    assert error(*(x.eval()(input_ids=TEXT[:, M:]).logits for x in (changed, plain))) < 1e-6


@torch.no_grad()
def test_a_longer_prefix_comes_by_chunks():
    """Chunked prefill fills the cache that one pass fills."""
    model = llama()
    cache = DynamicCache()
    for start in range(0, M, 15):
        model(input_ids=TEXT[:, start : min(start + 15, M)], past_key_values=cache)
    for chunked, whole in zip(prefix_of_cache(model, cache), prefix_of_cache(model, filled_cache(model)), strict=True):
        assert torch.allclose(chunked.keys, whole.keys)


def with_nan(prefix):
    keys = prefix[1].keys.clone()
    keys[0, 3, 2] = float("nan")
    return [prefix[0], LayerPrefix(keys, prefix[1].values)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_nan, "model.layers.1.self_attn: keys hold NaN"),
        (lambda p: p[:1], "the prefix has 1 layers, the model 2"),
        (
            lambda p: [LayerPrefix(k[:1], v[:1]) for k, v, _ in p],
            "has 2 KV heads.*the prefix has 1, 8 and 8: it is of another",
        ),
        (lambda p: [LayerPrefix(k[:, :0], v[:, :0]) for k, v, _ in p], "self_attn: a prefix needs at least one token"),
    ],
)
def test_a_bad_prefix_leaves_the_model_alone(change, message):
    model = llama()
    prefix = prefix_of_cache(model, filled_cache(model))
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        adapter_from_prefix(model, change(prefix))
    assert [name for name, _ in model.named_modules()] == names


@torch.no_grad()
def test_caches_that_cannot_be_read_are_refused():
    model = llama()
    with pytest.raises(ValueError, match="holds no keys"):
        prefix_of_cache(model, DynamicCache())
    with pytest.raises(ValueError, match="must hold one sequence, got 2"):
        prefix_of_cache(model, filled_cache(model, TEXT[:, :10].repeat(2, 1)))
    with pytest.raises(ValueError, match="the cache has 2 layers, the model 3"):
        prefix_of_cache(llama(num_hidden_layers=3), filled_cache(model))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4)).eval()
    with pytest.raises(ValueError, match="no rotary positions"):
        prefix_of_cache(gpt2, filled_cache(gpt2))
    with pytest.raises(ValueError, match="expected a prefix-tuning or cartridge adapter"):
        prefix_of_adapter(get_peft_model(copy.deepcopy(model), NTKAttentionConfig()))

"""Arguments that attention modules pass: handled, ignored by their own function too, or refused by name."""

import pytest
import torch
from peft import get_peft_model
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.models.llama import modeling_llama

from ntk_attention import NTKAttentionConfig
from ntk_attention.ops.attention import attend
from ntk_attention.ops.bundles import Prefixes, Tokens
from ntk_attention.ops.reference import sink_block
from ntk_attention.ops.state import PrefixState
from ntk_attention.tuner.masks import FlashArguments, flash_mask
from ntk_attention.tuner.routing import CHILD, ntk_attention_forward
from tests.families import FAMILIES
from tests.reference import relative_error
from tests.tiny import TINY, adapted, tiny

from .test_routing import use


def call(model, **arguments):
    module = next(module for module in model.modules() if hasattr(module, CHILD))
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    return ntk_attention_forward(module, query, key, value, None, scaling=8**-0.5, **arguments)[0]


@torch.no_grad()
def test_what_the_own_function_reads_and_we_do_not_is_refused(monkeypatch):
    def eager_attention_forward(module, query, key, value, attention_mask, scaling, my_bias=None, **kwargs):
        raise AssertionError("not called")

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager_attention_forward)
    from ntk_attention.tuner import lookup

    lookup._read.cache_clear()
    try:
        model = adapted(TINY.build("eager", torch.float32))
    finally:
        lookup._read.cache_clear()
    assert torch.isfinite(call(model, my_bias=None, cache_position=torch.arange(5))).all()
    with pytest.raises(ValueError, match=r"LlamaAttention passes 'my_bias' .* under 'eager'"):
        call(model, my_bias=torch.zeros(5, 5))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "way_out"),
    [("block_table", "max_blocks_per_request=0"), ("k_cache", "attn_implementation='sdpa'"), ("indices", "indexer")],
)
def test_arguments_of_flash_attention(name, way_out):
    model = adapted()
    use(model, "flash_attention_2")
    call(model, deterministic=True)
    with pytest.raises(ValueError, match=f"passes '{name}' .*{way_out}"):
        call(model, **{name: torch.zeros(1)})
    use(model, "sdpa")  # which does not read it either
    assert torch.equal(call(model, **{name: torch.zeros(1)}), call(model))


def test_sinks_of_every_token():
    """Logits of a key without value, [B, H, L], against one more key."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sink = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    state = PrefixState(torch.randn(4, 8, 8, dtype=torch.float64), torch.rand(4, 8, dtype=torch.float64) + 0.1)
    out = attend(Tokens(query, key, value, is_causal=True, scale=0.3), Prefixes([state], 1.0, sink=sink))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    A = torch.exp(0.3 * query @ key.mT) * mask
    phi = torch.where(query > 0, query + 1, query.exp())
    mass = A.sum(-1) + (phi @ state.k[..., None]).squeeze(-1) + sink.exp()
    expected = (A @ value + phi @ state.Z) / mass[..., None]
    assert relative_error(out, expected) < 1e-12
    inputs = (query, key, value, sink)
    actual, expected = (torch.autograd.grad(x.sin().sum(), inputs) for x in (out, expected))
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-10


def test_one_sink_per_head_is_that_of_every_token():
    query, sink = torch.randn(2, 4, 5, 8), torch.randn(4)
    ours, same = (sink_block(x, query, 6) for x in (sink, sink[:, None].expand(2, 4, 5)))
    assert torch.equal(ours.lse, same.lse)
    assert torch.equal(ours.out, torch.zeros(2, 4, 5, 6))


def test_packed_texts_with_keys_of_earlier_tokens():
    """Two texts of 2 and 3 new tokens beside 4 and 0 cached ones, then padding, against each text alone."""
    packed = FlashArguments(
        causal=True,
        sliding_window=3,
        cu_seq_lens_q=torch.tensor([0, 2, 5]),
        cu_seq_lens_k=torch.tensor([0, 6, 9]),
    )
    visible, _ = flash_mask(7, 10, torch.device("cpu"), packed)
    expected = torch.zeros(7, 10, dtype=torch.bool)
    for new, start, first_key, keys in ((2, 0, 0, 6), (3, 2, 6, 3)):
        alone, _ = flash_mask(new, keys, torch.device("cpu"), FlashArguments(causal=True, sliding_window=3))
        if alone is None:
            alone = torch.ones(1, 1, new, keys, dtype=torch.bool).tril()
        expected[start : start + new, first_key : first_key + keys] = alone[0, 0]
    assert torch.equal(visible[0, 0], expected)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_continuous_batching(implementation):
    """Several prompts packed into one row, with keys in a paged cache, against each prompt alone without a cache."""
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17], [3, 4, 5]]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(block_size=16, num_blocks=16, max_batch_tokens=64)  # else as large as the memory
    base = TINY.build(implementation, torch.float32)

    def batched(model):
        answers = model.generate_batch(prompts, config, continuous_batching_config=small)
        return [answers[name].generated_tokens for name in sorted(answers)]

    def alone(model, prompt):
        ids = torch.tensor([prompt])
        for _ in range(config.max_new_tokens):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        return ids[0, len(prompt) :].tolist()

    frozen = batched(base)
    model = adapted(base)
    assert batched(model) == [alone(model, prompt) for prompt in prompts]
    assert batched(model) != frozen
    with model.disable_adapter():
        assert batched(model) == frozen
    assert base.config._attn_implementation == implementation


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bart", "t5"])
@torch.no_grad()
def test_weights_of_eager_attention(name):
    """Of the real tokens, as without a prefix but smaller by its share."""
    family = FAMILIES[name]
    base, inputs = family.build("eager", torch.float32), family.inputs(torch.float32, padded=False)
    key = "decoder_attentions" if family.kind == "encoder-decoder" else "attentions"
    frozen = base(**inputs, output_attentions=True)[key]
    model = get_peft_model(base, NTKAttentionConfig(init_weights=False)).eval()
    weights = model(**inputs, output_attentions=True)[key]
    assert [w.shape for w in weights] == [w.shape for w in frozen]
    first, plain = weights[0], frozen[0]
    assert (first.sum(-1) < 1).all()
    torch.testing.assert_close(first / first.sum(-1, keepdim=True), plain, atol=1e-5, rtol=1e-4)


def test_other_implementations_have_no_weights():
    assert ntk_attention_forward(*arguments_of(adapted(tiny())))[1] is None


def arguments_of(model):
    module = next(module for module in model.modules() if hasattr(module, CHILD))
    return module, torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), None

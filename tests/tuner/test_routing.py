"""Every family against a naive attention that takes masks, scales and windows from families.py, not from the model."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    PreTrainedModel,
    masking_utils,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ntk_attention import NTKAttentionConfig
from ntk_attention.tuner.routing import ROUTE, routes
from tests.families import ATTENTION, FAMILIES, REFUSED, TARGET, attention_function, naive_attention
from tests.reference import relative_error

# Norms and rotary embeddings of many families run in float32, also in a float64 model.
FP64, FP32 = 1e-6, 1e-4


def cases(fits=lambda family: True):
    """Every family that fits, with every implementation that it supports."""
    chosen = [(name, i) for name, family in FAMILIES.items() if fits(family) for i in family.implementations]
    return pytest.mark.parametrize(("name", "implementation"), chosen, ids=["-".join(case) for case in chosen])


def adapted(base, **options):
    torch.manual_seed(2)
    return get_peft_model(base, NTKAttentionConfig(**{"init_weights": False, **ATTENTION, **options})).eval()


@cases()
@torch.no_grad()
def test_output_against_naive(name, implementation):
    family = FAMILIES[name]
    base, inputs = family.build(implementation), family.inputs()
    frozen = family.run(base, inputs)
    model = adapted(base)
    actual = family.run(model, inputs)
    with attention_function(naive_attention(family, inputs)):
        expected = family.run(model, inputs)
    assert relative_error(actual, expected) < FP64
    assert (actual - frozen.nan_to_num()).abs().mean() > 1e-2 * actual.abs().mean()


@cases()
@torch.no_grad()
def test_prefix_without_weight_against_the_base(name, implementation):
    # eager softmaxes run in float32, where the float64 masks of padded rows are infinite
    dtype, tolerance = (torch.float64, FP64) if implementation == "sdpa" else (torch.float32, FP32)
    family = FAMILIES[name]
    base, inputs = family.build(implementation, dtype), family.inputs(dtype)
    expected = family.run(base, inputs)
    model = adapted(base)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".log_k"):
            parameter.fill_(-80.0)
        elif parameter_name.endswith(".Z"):
            parameter.zero_()
    assert relative_error(family.run(model, inputs), expected) < tolerance


@cases()
@torch.no_grad()
def test_disable_and_unload_restore_the_base(name, implementation):
    family = FAMILIES[name]
    base, inputs = family.build(implementation, torch.float32), family.inputs(torch.float32)
    expected, keys = family.run(base, inputs), list(base.state_dict())
    model = adapted(base)
    visible = family.run(model, inputs)
    assert not torch.equal(visible, expected)
    with model.disable_adapter():
        assert torch.equal(family.run(model, inputs), expected)
    assert torch.equal(family.run(model, inputs), visible)
    restored = model.unload()
    assert restored is base
    assert torch.equal(family.run(restored, inputs), expected)
    assert list(restored.state_dict()) == keys
    assert not any(m.config._attn_implementation == ROUTE for m in restored.modules() if routes(m))


@cases(lambda family: family.causal)
@torch.no_grad()
def test_future_tokens_stay_hidden(name, implementation):
    family = FAMILIES[name]
    model, inputs = adapted(family.build(implementation)), family.inputs(padded=False)
    ids = "decoder_input_ids" if family.causal == TARGET else "input_ids"
    changed = inputs[ids].clone()
    changed[:, 6:] = 63 - changed[:, 6:] // 2
    before, after = (
        family.run(model, {**inputs, ids: x})[: 2 * family.causal].unflatten(0, (2, -1)) for x in (inputs[ids], changed)
    )
    assert relative_error(after[:, :6], before[:, :6]) < FP64
    assert relative_error(after[:, 6:], before[:, 6:]) > 1e-2


@cases(lambda family: family.kind != "vision")
@torch.no_grad()
def test_padding_stays_hidden(name, implementation):
    family = FAMILIES[name]
    model, inputs = adapted(family.build(implementation)), family.inputs()
    changed = dict(inputs)
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if ids in inputs:
            changed[ids] = torch.where(inputs[mask].bool(), inputs[ids], 63 - inputs[ids] // 2)
    assert relative_error(family.run(model, changed), family.run(model, inputs)) < FP64
    shown = {name: torch.ones_like(x) for name, x in inputs.items() if name.endswith("mask")}
    assert relative_error(family.run(model, changed | shown), family.run(model, inputs | shown)) > 1e-2


@cases(lambda family: family.kind == "decoder")
@torch.no_grad()
def test_rows_without_real_tokens_against_the_base(name, implementation):
    # with left padding, the first rows of the padded item see no token at all
    family = FAMILIES[name]
    model, inputs = adapted(family.build(implementation, torch.float32)), family.inputs(torch.float32)
    first = next(m for m in model.modules() if routes(m))
    outputs = []
    hook = first.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    model(**inputs)
    with model.disable_adapter():
        model(**inputs)
    hook.remove()
    actual, expected = outputs
    padding = ~inputs["attention_mask"].bool()
    assert relative_error(actual[padding], expected[padding]) < FP32
    assert relative_error(actual[~padding], expected[~padding]) > 1e-2


@cases(lambda family: family.kind == "encoder")
@torch.no_grad()
def test_item_of_padding_alone_against_the_base(name, implementation):
    family = FAMILIES[name]
    base, inputs = family.build(implementation, torch.float32), family.inputs(torch.float32)
    inputs["attention_mask"][1] = 0
    expected = base(**inputs).last_hidden_state
    actual = adapted(base)(**inputs).last_hidden_state
    assert relative_error(actual[1], expected[1]) < FP32
    assert relative_error(actual[0], expected[0]) > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_life_cycle(name, tmp_path):
    family = FAMILIES[name]
    base, inputs = family.build(dtype=torch.float32), family.inputs(torch.float32)
    with torch.no_grad():
        frozen = family.run(base, inputs)
    torch.manual_seed(2)
    model = get_peft_model(base, NTKAttentionConfig(rank=None, feed_forward_rank=3))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 1)[1] for n in trainable} == {"Z", "log_k", "Z_A", "Z_B"}
    num_parts = sum(".feed_forward." in n and n.endswith(".Z_A") for n in trainable)
    assert num_parts >= 2
    assert len(trainable) == 2 * sum(routes(m) for m in base.modules()) + 2 * num_parts

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = family.run(model, inputs).square().mean()
    loss.backward()
    assert torch.isfinite(loss)
    moved = {n for n in trainable if not n.endswith(".Z_A")}  # which has no gradient while Z_B is zero
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n in moved)
    optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trainable

    model.eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = family.run(model, inputs)
        loaded = PeftModel.from_pretrained(family.build(dtype=torch.float32), tmp_path).eval()
        assert torch.equal(family.run(loaded, inputs), expected)
        assert not torch.equal(expected, frozen)
        with loaded.disable_adapter():
            assert torch.equal(family.run(loaded, inputs), frozen)
        assert torch.equal(family.run(loaded.unload(), inputs), frozen)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if len(f.implementations) == 2])
@torch.no_grad()
def test_base_may_switch_between_sdpa_and_eager(name):
    family = FAMILIES[name]
    model, inputs = adapted(family.build("sdpa")), family.inputs()
    expected = family.run(model, inputs)
    model.base_model.model.set_attn_implementation("eager")
    assert relative_error(family.run(model, inputs), expected) < FP64


def use(model, implementation):
    """Switch the base model without the library that its attention would need: ours takes its place."""
    for module in model.modules():
        config = getattr(module, "config", None)
        config = getattr(config, "ntk_base", config)
        if config is not None and getattr(config, "_attn_implementation", ROUTE) != ROUTE:
            config._attn_implementation_internal = implementation


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_masks_of_flex_and_flash_attention_against_sdpa(name, implementation, monkeypatch):
    family = FAMILIES[name]
    base, inputs = family.build(), family.inputs()
    supported = {"flex_attention": "_supports_flex_attn", "flash_attention_2": "_supports_flash_attn"}
    if not all(getattr(m, supported[implementation]) for m in base.modules() if isinstance(m, PreTrainedModel)):
        pytest.skip("transformers does not support it")
    model = adapted(base)
    expected = family.run(model, inputs)
    unpadded = family.inputs(padded=False)
    expected_unpadded = family.run(model, unpadded)
    # compiled for a CPU it takes minutes
    monkeypatch.setattr(masking_utils, "create_block_mask", partial(uncompiled, masking_utils.create_block_mask))
    use(model, implementation)
    assert relative_error(family.run(model, inputs), expected) < FP64
    assert relative_error(family.run(model, unpadded), expected_unpadded) < FP64


def uncompiled(create_block_mask, *args, _compile, **kwargs):
    return create_block_mask(*args, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("told_by", ["positions", "lengths"])
def test_texts_packed_for_flash_attention_do_not_see_each_other(told_by):
    model = adapted(FAMILIES["llama"].build())
    ids = FAMILIES["llama"].inputs(padded=False)["input_ids"]
    first, second = ids[:1, :7], ids[1:, :4]
    expected = torch.cat([model(input_ids=first).logits, model(input_ids=second).logits], dim=1)
    use(model, "flash_attention_2")
    packed = {"input_ids": torch.cat([first, second], dim=1), "position_ids": torch.tensor([[*range(7), *range(4)]])}
    if told_by == "lengths":
        lengths = torch.tensor([0, 7, 11], dtype=torch.int32)
        packed |= {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 7, "max_length_k": 7}
    assert relative_error(model(**packed).logits, expected) < FP64


def test_switch_to_an_implementation_of_other_masks_is_refused():
    family = FAMILIES["llama"]
    model, inputs = adapted(family.build(dtype=torch.float32)), family.inputs()
    AttentionInterface.register("own", sdpa_attention_forward)
    AttentionMaskInterface.register("own", sdpa_mask)
    use(model, "own")
    with pytest.raises(ValueError, match="LlamaAttention uses the attention implementation 'own'"):
        model(**inputs)


def upcasting_gpt2(implementation):
    family = FAMILIES["gpt2"]
    options = {**family.options, "reorder_and_upcast_attn": True}
    return replace(family, options=options).build(implementation, dtype=torch.float32)


def test_attention_past_the_interface_is_refused():
    with pytest.raises(
        ValueError, match=r"GPT2Attention\) computes attention itself under 'eager'.*implementation='sdpa'"
    ):
        get_peft_model(upcasting_gpt2("eager"), NTKAttentionConfig())
    model, inputs = adapted(upcasting_gpt2("sdpa")), FAMILIES["gpt2"].inputs(torch.float32)
    expected = model(**inputs).logits
    model.base_model.model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"itself under 'eager', where no prefix reaches it.*set_attn_implementation"):
        model(**inputs)
    model.base_model.model.set_attn_implementation("sdpa")
    assert torch.equal(model(**inputs).logits, expected)
    model.base_model.model.set_attn_implementation("eager")
    own = upcasting_gpt2("eager")(**inputs).logits
    assert torch.equal(model.unload()(**inputs).logits, own)


@pytest.mark.parametrize("model_type", REFUSED)
def test_model_that_does_not_route_is_refused(model_type):
    attention, options = REFUSED[model_type]
    base = AutoModel.from_config(AutoConfig.for_model(model_type, **options))
    keys = list(base.state_dict())
    with pytest.raises(ValueError, match=attention):
        get_peft_model(base, NTKAttentionConfig())
    assert list(base.state_dict()) == keys


@pytest.mark.parametrize(
    ("implementation", "options", "message"),
    [
        ("paged|flash_attention_2", {}, r"paged\|flash"),
        ("sdpa", {"target_modules": ["q_proj"]}, "does not route"),
        ("sdpa", {"target_modules": ["self_attn", "mlp"]}, "does not route"),
        ("sdpa", {"target_modules": ["attention"]}, "not found"),
        ("sdpa", {"target_modules": r".*\.nothing"}, "not found"),
        ("sdpa", {"layers_to_transform": [7]}, "not found"),
    ],
    ids=["paged attention", "projection", "mlp", "no such module", "regex without match", "no such layer"],
)
def test_targets_that_are_refused(implementation, options, message):
    base = FAMILIES["llama"].build()
    use(base, implementation)
    keys = list(base.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, NTKAttentionConfig(**options))
    assert list(base.state_dict()) == keys
    assert not any(m.config._attn_implementation == ROUTE for m in base.modules() if routes(m))


GENERATING = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "gemma3": "CAUSAL_LM",
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
}
NEW_TOKENS = 8
generating = pytest.mark.parametrize("name", GENERATING)


def generate(model, inputs, **options):
    """The new tokens [B, NEW_TOKENS]."""
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    return model.generate(**prompt, **length, do_sample=False, **options)[:, -NEW_TOKENS:]


@generating
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}],
    ids=["greedy", "greedy with a static cache", "beam search"],
)
def test_generation_with_cache_against_without(name, options, padded):
    family = FAMILIES[name]
    base, inputs = family.build(), family.inputs(padded=padded)
    frozen = generate(base, inputs)
    model = adapted(base, task_type=GENERATING[name])
    without = {k: v for k, v in options.items() if k != "cache_implementation"}
    expected = generate(model, inputs, use_cache=False, **without)
    assert torch.equal(generate(model, inputs, **options), expected)
    assert not torch.equal(expected, frozen)


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
def test_generation_with_other_masks(name, implementation, padded, monkeypatch):
    model, inputs = adapted(FAMILIES[name].build(), task_type="CAUSAL_LM"), FAMILIES[name].inputs(padded=padded)
    expected = generate(model, inputs)
    monkeypatch.setattr(masking_utils, "create_block_mask", partial(uncompiled, masking_utils.create_block_mask))
    use(model, implementation)
    assert torch.equal(generate(model, inputs), expected)


@generating
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generation_of_a_padded_batch_against_each_prompt_alone(name, implementation):
    family = FAMILIES[name]
    inputs = family.inputs(torch.float32)
    model = adapted(family.build(implementation, torch.float32), task_type=GENERATING[name])
    for item, row in enumerate(generate(model, inputs)):
        real = inputs["attention_mask"][item].bool()
        alone = {k: inputs[k][item, real][None] for k in ("input_ids", "attention_mask")}
        assert torch.equal(generate(model, alone)[0], row)


@torch.no_grad()
def test_logits_of_a_cached_step_against_the_whole_sequence():
    family = FAMILIES["llama"]
    model, inputs = adapted(family.build()), family.inputs()
    expected = model(**inputs).logits
    prompt = {k: v[:, :-3] for k, v in inputs.items()}
    output = model(**prompt, use_cache=True)
    for step in (-3, -2, -1):
        mask = inputs["attention_mask"][:, : inputs["attention_mask"].shape[1] + step + 1]
        output = model(
            input_ids=inputs["input_ids"][:, step, None],
            attention_mask=mask,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        assert relative_error(output.logits[:, 0], expected[:, step]) < FP64

"""Many adapters on one model: rows with different ones, weighted sums, LoRA beside them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from ntk_attention import NTKAttentionConfig
from ntk_attention.tuner.adapter import PrefixAdapter
from ntk_attention.tuner.layer import NTKAttentionLayer
from tests.families import FAMILIES
from tests.reference import relative_error
from tests.tiny import TINY, adapted, adapters, tiny

ROWS = ["second", "__base__", "first", "second", "third"]
OPTIONS = {
    "default": {},
    "kv heads, rank": {"state_heads": "kv", "rank": 2},
    "taylor": {"feature_map": "taylor"},
    "positive random": {"feature_map": "positive_random"},
}


def several(dtype=torch.float64, family=TINY, implementation=None, **options):
    model = adapted(family.build(implementation, dtype), adapter_name="first", **options).to(dtype)
    for name in ("second", "third"):
        model.add_adapter(name, NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM", **options))
    return model.to(dtype).eval()


def batch():
    ids = torch.randint(3, 64, (len(ROWS), 11), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[3, :2] = 0  # not row 1: transformers' eager attention makes NaN of padding in float64
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def one_by_one(model, inputs, names):
    """The reference: every row by itself, with its adapter alone."""
    outputs = []
    for i, name in enumerate(names):
        row = {key: x[i : i + 1] for key, x in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                outputs.append(model(**row).logits)
        else:
            model.set_adapter(name)
            outputs.append(model(**row).logits)
    model.set_adapter("first")
    return torch.cat(outputs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_rows_with_different_adapters_against_one_by_one(options, implementation):
    model = several(implementation=implementation, **options)
    inputs = batch()
    with torch.no_grad():
        actual = model(**inputs, adapter_names=ROWS).logits
    # Rows without an adapter: alone they go through the model's own attention, whose eager softmax is in float32.
    tolerance = 1e-6 if implementation == "eager" else 1e-12
    assert relative_error(actual, one_by_one(model, inputs, ROWS)) < tolerance
    alone = model(**inputs).logits  # and it is over
    assert relative_error(alone, one_by_one(model, inputs, ["first"] * len(ROWS))) < 1e-12


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_oss"])
def test_other_families(family):
    if family not in FAMILIES:
        pytest.skip(f"{family} is not a family of the tests")
    model = several(family=FAMILIES[family])
    inputs = batch()
    with torch.no_grad():
        actual = model(**inputs, adapter_names=ROWS).logits
    assert relative_error(actual, one_by_one(model, inputs, ROWS)) < 1e-6  # the same for softcap and sinks


@pytest.mark.parametrize("beams", [1, 2])
def test_generation(beams):
    model = several()
    inputs = batch()
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    mixed = model.generate(**inputs, adapter_names=ROWS, **options)
    for i, name in enumerate(ROWS):
        model.set_adapter("first" if name == "__base__" else name)
        row = {key: x[i : i + 1] for key, x in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(**row, **options)
        else:
            expected = model.generate(**row, **options)
        length = expected.shape[1]
        assert torch.equal(mixed[i, :length], expected[0])


def test_adapters_on_some_layers():
    model = several(layers_to_transform=[1])
    model.add_adapter("fourth", NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM", layers_to_transform=[0]))
    model.double()
    names = ["fourth", "first", "__base__", "fourth", "second"]
    with torch.no_grad():
        actual = model(**batch(), adapter_names=names).logits
    assert relative_error(actual, one_by_one(model, batch(), names)) < 1e-12
    only_base = model(**batch(), adapter_names=["__base__"] * 5).logits
    assert relative_error(only_base, one_by_one(model, batch(), ["__base__"] * 5)) < 1e-12


def test_an_adapter_is_loaded_while_a_mixed_batch_lasts(tmp_path):
    model = several(torch.float32)
    model.save_pretrained(tmp_path, selected_adapters=["third"])
    names = ["first" if name == "second" else name for name in ROWS]
    with torch.no_grad(), model.mixed_batch(names) as mixed:
        before = model(**batch()).logits
        model.load_adapter(tmp_path / "third", "first")
        assert torch.equal(model(**batch()).logits, before)
        mixed.update("first")
        after = model(**batch()).logits
    assert relative_error(after, one_by_one(model, batch(), names)) < 1e-5
    assert relative_error(after, before) > 1e-2


def test_rows_change_while_a_mixed_batch_lasts():
    model = several(layers_to_transform=[1])
    fourth = NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM", layers_to_transform=[0])
    model.add_adapter("fourth", fourth)
    model.double()
    inputs, others = batch(), ["fourth", "third", "first", "__base__", "second"]
    with torch.no_grad(), model.mixed_batch(ROWS, adapters=["first", "second", "third", "fourth"]) as mixed:
        before = model(**inputs).logits
        inside = model(**inputs, adapter_names=others).logits
        assert torch.equal(model(**inputs).logits, before)
        mixed.assign(others)
        after = model(**inputs).logits
        assert torch.equal(after, inside)
        third = model.get_submodule("base_model.model.model.layers.1.self_attn.ntk_states.third")
        third.Z_A.mul_(2)
        mixed.update("third")
        mixed.update("__base__")
        updated = model(**inputs).logits
        for names, message in ((ROWS[:4], "4 names for 5 rows"), (["nobody"] * 5, r"\['nobody'\], expected names of")):
            with pytest.raises(ValueError, match=message):
                mixed.assign(names)
        with pytest.raises(ValueError, match="nobody"):
            mixed.update("nobody")
    assert relative_error(updated, one_by_one(model, inputs, others)) < 1e-12
    third.Z_A.data.div_(2)
    assert relative_error(before, one_by_one(model, inputs, ROWS)) < 1e-12
    assert relative_error(after, one_by_one(model, inputs, others)) < 1e-12


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_attention_does_as_many_operations_for_many_adapters_as_for_one():
    """A loop over adapters would show: what is counted runs once the stacks are made."""
    model = several(torch.float32)
    counts = []
    for names in (["first"] * 5, ROWS, ["first", "second", "third", "first", "second"]):
        tuner = model.base_model
        with torch.no_grad(), tuner._enable_peft_forward_hooks(adapter_names=names), Operators() as operators:
            tuner.model(**batch())
        counts.append(operators.count)
    assert len(set(counts)) == 1


def test_adapters_that_rest_are_not_looked_at(monkeypatch):
    """With a hundred of them on a model, looking at each in every layer takes longer than the attention."""
    model = several(torch.float32)
    seen = set()
    layers = [module for module in model.modules() if isinstance(module, NTKAttentionLayer)]
    names = {part: name for layer in layers for name, part in layer.named_children() if isinstance(part, PrefixAdapter)}
    make = PrefixAdapter.state
    monkeypatch.setattr(PrefixAdapter, "state", lambda adapter: seen.add(names[adapter]) or make(adapter))
    with torch.no_grad():
        model(**batch())
        assert seen == {"first"}
        with model.base_model.mixed_batch(["second"] * 5):
            seen.clear()
            model.base_model.model(**batch())
    assert not seen


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["first"] * 4, "adapter_names has 4 names for a batch of 5 in LlamaAttention: expected as many"),
        (["first"] * 4 + ["nobody"], r"adapter_names holds \['nobody'\], expected names of \['first', 'second'"),
        (["first"] * 4 + ["taylor"], "the rows of a batch need states of one shape and feature map"),
    ],
    ids=["too few", "unknown", "another map"],
)
def test_bad_rows(names, message):
    model = several(torch.float32)
    model.add_adapter("taylor", NTKAttentionConfig(feature_map="taylor", task_type="CAUSAL_LM"))
    expected = model(**batch()).logits
    with pytest.raises(ValueError, match=message):
        model(**batch(), adapter_names=names)
    assert torch.equal(model(**batch()).logits, expected)
    with pytest.raises(ValueError, match="adapter_names is for inference"):
        model.train()(**batch(), adapter_names=ROWS)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_weights_of_one_are_all_adapters_at_once(options):
    model = several(**options)
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum")
    model.double()
    inputs = batch()
    with torch.no_grad():
        model.base_model.set_adapter(["first", "second"])
        both = model(**inputs).logits
        model.set_adapter("sum")
        assert relative_error(model(**inputs).logits, both) < 1e-5  # the new adapter was made in float32


def test_weights_count_tokens():
    """Z = sum_i w_i Z_i and k = sum_i w_i k_i; one weight moves no value, only the share of the prefix."""
    model = several()
    model.add_weighted_adapter(["first", "second", "third"], [0.5, 2.0, 0.0], "sum")
    model.add_weighted_adapter(["first"], [3.0], "three times")
    states = {name: adapters(model, name)[1].state() for name in model.peft_config}
    for name, weights in (("sum", {"first": 0.5, "second": 2.0}), ("three times", {"first": 3.0})):
        e_b = states[name].log_scale.exp()
        for tensor, unit in (("Z", e_b[:, None, None]), ("k", e_b[:, None])):
            expected = sum(w * getattr(states[n], tensor) for n, w in weights.items())
            assert relative_error(getattr(states[name], tensor) * unit, expected) < 1e-5


@pytest.mark.parametrize(
    ("adapters_", "weights", "message"),
    [
        (["first", "nobody"], [1, 1], r"adapters holds \['nobody'\]"),
        (["first", "second"], [1, -1], "none negative .k is a normaliser."),
        (["first", "second"], [0, 0], "not all zero"),
        (["first", "second"], [1], "weights must be 2 finite numbers"),
        (["first"], ["1"], r"weights must be numbers, got \['1'\]"),
        (["first"], 1.0, "expected lists of adapters and of their weights"),
        (["first", "taylor"], [1, 1], "only states of one shape and feature map add"),
        (["first", "upper"], [1, 1], "sit on different modules"),
    ],
    ids=["unknown", "negative", "zero", "too few", "strings", "a number", "another map", "other modules"],
)
def test_bad_sums(adapters_, weights, message):
    model = several(torch.float32)
    model.add_adapter("taylor", NTKAttentionConfig(feature_map="taylor", task_type="CAUSAL_LM"))
    model.add_adapter("upper", NTKAttentionConfig(layers_to_transform=[1], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters_, weights, "sum")
    assert "sum" not in model.peft_config


def test_lora_beside_it_against_lora_merged():
    """PEFT's way for two methods on one model: LoRA injected into the base, NTK-Attention over it."""

    def with_lora():
        torch.manual_seed(4)
        config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return inject_adapter_in_model(config, tiny(), adapter_name="lora")

    merged = with_lora()
    for module in merged.modules():
        if hasattr(module, "merge"):
            module.merge()
    inputs = batch()
    expected = adapted(merged)
    actual = adapted(with_lora())
    with torch.no_grad():
        assert relative_error(actual(**inputs).logits, expected(**inputs).logits) < 1e-5
        assert not torch.allclose(actual(**inputs).logits, adapted()(**inputs).logits)
    names = get_peft_model_state_dict(actual)
    assert names
    assert all("ntk_states" in name for name in names)
    for name, parameter in actual.named_parameters():  # both train together once the user says so
        parameter.requires_grad_("lora_" in name or name.endswith((".Z_A", ".Z_B", ".log_k")))
    actual(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name: p.grad for name, p in actual.named_parameters() if p.grad is not None}
    assert any("lora_A" in name and gradient.any() for name, gradient in trained.items())
    assert any(name.endswith(".Z_B") and gradient.any() for name, gradient in trained.items())


def test_sums_of_trained_heads_are_refused():
    model = adapted(modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"have modules of their own in \['lm_head'\]"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert "sum" not in model.peft_config


def of_every_head():
    """A model with two adapters that have heads of their own, and one that has none; every row alone."""
    torch.manual_seed(0)
    options = {"init_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny(), NTKAttentionConfig(**options, modules_to_save=["lm_head"]), "a")
    model.add_adapter("b", NTKAttentionConfig(**options, modules_to_save=["lm_head"]))
    model.add_adapter("c", NTKAttentionConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape))
    return model.eval()


HEADS = ["b", "__base__", "a", "c", "b"]


def alone_with_its_head(model, ids, call):
    found = []
    for row, name in zip(ids, HEADS, strict=True):
        model.base_model.set_adapter("a" if name == "__base__" else name)
        with model.disable_adapter() if name == "__base__" else torch.no_grad():
            found.append(call(row[None]))
    return torch.cat(found)


@torch.no_grad()
@pytest.mark.parametrize("active", ["a", "b", "c"])
def test_rows_have_the_heads_of_their_adapters(active):
    model, ids = of_every_head(), batch()["input_ids"]
    options = {"do_sample": False, "num_beams": 2, "max_new_tokens": 3, "min_new_tokens": 3}
    expected = alone_with_its_head(model, ids, lambda row: model(input_ids=row).logits)
    written = alone_with_its_head(model, ids, lambda row: model.generate(input_ids=row, **options))
    model.base_model.set_adapter(active)
    before = model(input_ids=ids).logits
    assert relative_error(model(input_ids=ids, adapter_names=HEADS).logits, expected) < 1e-5
    assert torch.equal(model.generate(input_ids=ids, adapter_names=HEADS, **options), written)
    assert torch.equal(model(input_ids=ids).logits, before)
    with model.mixed_batch(["a"] * 5, adapters=["a", "b", "c"]) as rows:
        rows.assign(HEADS)
        assert relative_error(model.base_model.model(input_ids=ids).logits, expected) < 1e-5


def tiny_llava():
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=5, vision_feature_layer=-1)
    )


PICTURE = [5] * 4
UNEVEN = torch.tensor([[1, *PICTURE, 7, *PICTURE, 8], list(range(10, 21))])
EVEN = torch.tensor([[1, *PICTURE, 7, 8], [1, 9, *PICTURE, 8]])


@torch.no_grad()
def test_rows_with_other_numbers_of_pictures_are_refused():
    """As many pictures as rows, but both of one row: the tower would take the second for that of the other."""
    model = get_peft_model(tiny_llava(), NTKAttentionConfig(init_weights=False), "a").eval()
    pixels = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"rows have \[8, 0\] image tokens: expected as many in each.*exclude_modules"):
        model(input_ids=UNEVEN, pixel_values=pixels, adapter_names=["a", "__base__"])
    found = model(input_ids=EVEN, pixel_values=pixels, adapter_names=["a", "__base__"]).logits
    assert relative_error(found[:1], model(input_ids=EVEN[:1], pixel_values=pixels[:1]).logits) < 1e-5
    config = NTKAttentionConfig(init_weights=False, exclude_modules=["vision_tower"])
    model = get_peft_model(tiny_llava(), config, "a").eval()
    found = model(input_ids=UNEVEN, pixel_values=pixels, adapter_names=["a", "__base__"]).logits
    assert relative_error(found[:1], model(input_ids=UNEVEN[:1], pixel_values=pixels).logits) < 1e-5

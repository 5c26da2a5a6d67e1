"""Adapters that see no rotary positions, and those that do: in calls of every kind, configs, files and calibration."""

import copy
import json
import pickle

import pytest
import torch
from peft import PeftModel
from transformers import DynamicCache

from ntk_attention import NTKAttentionConfig, calibrate
from ntk_attention.convert import anchor, by_layer, distill, fit, prefix_of_text
from ntk_attention.tuner.calls import CALLS
from ntk_attention.tuner.observation import adapted_layers, observe
from ntk_attention.tuner.rotation import Positions
from ntk_attention.tuner.untrusted import CONFIG, AdapterError
from tests.families import HEADS, VOCABULARY
from tests.reference import relative_error
from tests.tiny import INPUTS, adapted, logits, loss_of, tiny, trainable

TEXT = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_left_padding():
    """With positions that count from the first token, and with a row of its own."""
    model = adapted()
    ids = TEXT[:1]
    expected = model(input_ids=ids).logits
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    actual = model(input_ids=padded, attention_mask=mask).logits[:, 3:]  # positions from 3 on
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_a_cache(cache):
    model = adapted()
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with_cache = model.generate(input_ids=TEXT, cache_implementation=cache, **options)
    without = model.generate(input_ids=TEXT, use_cache=False, **options)
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_packed_texts():
    """Two texts in one row, with positions that start again, against each by itself."""
    model = adapted()
    position_ids = torch.arange(TEXT.shape[1]).repeat(2)[None]
    packed = model(input_ids=TEXT.reshape(1, -1), position_ids=position_ids, use_cache=False).logits
    alone = model(input_ids=TEXT, use_cache=False).logits
    torch.testing.assert_close(packed.view_as(alone), alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_mixed_rows():
    model = adapted()
    model.add_adapter("other", NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM"))
    expected = []
    for row, name in enumerate(["default", "other"]):
        model.set_adapter(name)
        expected.append(model(input_ids=TEXT[row : row + 1]).logits)
    mixed = model(input_ids=TEXT, adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        base = tiny()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model = adapted(base).train()
        loss_of(model).backward()
        gradients.append([p.grad for p in trainable(model).values()])
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_compiled():
    """With activation checkpointing too in test_large.py."""
    gradients = []
    for compiled in (False, True):
        model = adapted().train()
        loss_of(torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model).backward()
        gradients.append([p.grad for p in trainable(model).values()])
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_positions_are_made_once_for_all_layers(monkeypatch):
    made = []
    init = Positions.__init__

    def record(self, rotation, *args):
        made.append(rotation)
        init(self, rotation, *args)

    model = adapted()
    monkeypatch.setattr(Positions, "__init__", record)
    model(**INPUTS)
    model(**INPUTS)
    assert len(made) == 2
    made.clear()
    assert len(CALLS.rotations) == 0  # they go with the tables


@torch.no_grad()
def test_the_base_model_never_sees_them():
    """Adapters that rest, are deleted or have positions: the module's own function gets what it got before."""
    base = tiny()
    expected = logits(base)
    model = adapted(base)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    rotary = adapted(positions="rotary")
    assert not any(m._forward_pre_hooks for m in rotary.modules() if type(m).__name__ == "LlamaAttention")
    assert not torch.allclose(logits(rotary), logits(model))
    assert torch.equal(logits(model.unload()), expected)
    assert not any(m._forward_pre_hooks for m in base.modules())


@torch.no_grad()
def test_copies_and_pickles():
    model = adapted()
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


def test_positions_of_a_config():
    with pytest.raises(ValueError, match="positions must be 'free' or 'rotary', got 'absolute'"):
        NTKAttentionConfig(positions="absolute")
    assert NTKAttentionConfig().positions == "free"
    assert NTKAttentionConfig().for_given_prefix().positions == "rotary"
    assert NTKAttentionConfig().kind() != NTKAttentionConfig(positions="rotary").kind()


@pytest.mark.parametrize("positions", ["free", "rotary"])
@torch.no_grad()
def test_save_and_load(positions, tmp_path):
    model = adapted(positions=positions)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["positions"] == positions
    loaded = PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()
    assert loaded.peft_config["default"].positions == positions
    assert torch.equal(logits(loaded), logits(model))


@torch.no_grad()
@pytest.mark.parametrize(("version", "positions"), [(2, "rotary"), (3, "free")])
def test_files_of_earlier_formats(tmp_path, version, positions):
    """They do not say that prefixes of blocks were beside these, nor, in 2, that positions were rotary."""
    model = adapted(positions=positions, feed_forward="beside")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    new = ("feed_forward", "positions") if version == 2 else ("feed_forward",)
    config = {name: value for name, value in config.items() if name not in new}
    (tmp_path / CONFIG).write_text(json.dumps({**config, "format_version": version}))
    loaded = PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded), logits(model))
    (tmp_path / CONFIG).write_text(json.dumps({**config, "format_version": version, "feed_forward": "beside"}))
    with pytest.raises(AdapterError, match=f"format_version is {version}, expected 4"):
        PeftModel.from_pretrained(tiny(), str(tmp_path))


def test_adapters_that_act_together_have_the_same_positions():
    model = adapted()
    config = NTKAttentionConfig(init_weights=False, positions="rotary", task_type="CAUSAL_LM")
    model.add_adapter("other", config)
    message = "must have the same positions: 'default' has 'free' and 'other' has 'rotary'"
    with pytest.raises(ValueError, match=message):
        model(input_ids=TEXT, adapter_names=["default", "other"])
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=message):
        model(input_ids=TEXT)


# --- calibration and conversion ---


@pytest.mark.parametrize("positions", ["free", "rotary"])
def test_observers_get_the_input_of_phi(positions):
    """Of the adapter that they look at, also while it rests."""
    model = adapted(positions=positions)
    layers = adapted_layers(model)
    seen = []

    def see(query, context, prefix, x, counts):
        seen.append((query, x))

    with model.disable_adapter():
        observe(model, layers, [{"input_ids": TEXT}], dict.fromkeys(layers, see))
    query, x = seen[0]
    hidden = model.base_model.model.model.embed_tokens(TEXT)
    block = model.base_model.model.model.layers[0]
    before = block.self_attn.q_proj(block.input_layernorm(hidden)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    expected = before if positions == "free" else query
    torch.testing.assert_close(x, 8**-0.25 * expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("positions", "least", "most"), [("free", 0.0, 1e-3), ("rotary", 1e-2, 1e9)])
def test_calibration(positions, least, most):
    """What free adapters start with does not hang on where the text stands."""
    moments = []
    for shift in (0, 1000):
        model = adapted(positions=positions)
        position_ids = torch.arange(TEXT.shape[1])[None] + shift
        calibrate(model, [{"input_ids": TEXT, "position_ids": position_ids}], others=False)
        coordinates = [layer["default"].coordinates for layer in adapted_layers(model).values()]
        moments.append(torch.stack(coordinates))
    assert least <= relative_error(moments[1], moments[0]) < most


def test_fit_and_distill_a_free_adapter_but_not_anchor_it():
    model = adapted(feature_map="elu", rank=None, feed_forward_rank=None)
    with pytest.raises(ValueError, match="an adapter is active in 2 attention modules"):
        prefix_of_text(model.get_base_model(), TEXT[0])
    with model.disable_adapter():
        prefix = by_layer(model, prefix_of_text(model.get_base_model(), TEXT[0]))
    batches = [{"input_ids": TEXT}, {"input_ids": TEXT.flip(0)}]
    report = fit(model, prefix, batches)
    assert report.mean_error() < 1.0
    losses = distill(model, prefix, batches, steps=6)
    assert losses[-1] < 2 * losses[0]
    free = adapted(feature_map="anchored", feature_map_options={"num_features": 8}, constant_feature=False, rank=None)
    with pytest.raises(ValueError, match="has positions='free', the keys of a prefix have positions"):
        anchor(free, prefix, batches)


@torch.no_grad()
def test_a_cached_step():
    """One token after many, whose tables have one row."""
    model = adapted()
    whole = model(input_ids=TEXT).logits[:, -1]
    cache = DynamicCache()
    model(input_ids=TEXT[:, :-1], past_key_values=cache)
    step = model(input_ids=TEXT[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(step, whole, atol=1e-4, rtol=1e-4)

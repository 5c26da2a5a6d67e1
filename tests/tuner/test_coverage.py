"""What a module is, which parts of a model have a prefix, and that the user is told."""

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from ntk_attention import NTKAttentionConfig
from ntk_attention.tuner.geometry import Geometry, encodes, geometry_of, width_of
from ntk_attention.tuner.layer import NTKAttentionLayer
from ntk_attention.tuner.routing import is_encoder
from tests.families import BERT, FAMILIES, LLAMA, VIT
from tests.tiny import adapted, tiny

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
}


def sizes(model):
    return [m.geometry for m in model.modules() if isinstance(m, NTKAttentionLayer)]


class Module(nn.Module):
    def __init__(self, config=None, **attributes):
        super().__init__()
        self.config = AutoConfig.for_model("llama", **LLAMA) if config is None else config
        for name, value in attributes.items():
            setattr(self, name, value)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def wrapped(layer):
    wrapper = nn.Module()
    wrapper.linear = layer
    return wrapper


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Module(q_proj=linear(32, 32), num_key_value_groups=2), Geometry(4, 2, 8, 8)),
        (Module(q_proj=linear(32, 16)), Geometry(4, 4, 4, 4)),  # half the size that the config gives
        (Module(qkv=linear(16, 48), num_heads=2), Geometry(2, 2, 8, 8)),
        (Module(query=linear(32, 64), head_dim=8, num_heads=4), Geometry(4, 4, 8, 8)),  # a gate beside the queries
        (Module(q_proj=linear(8, 24), num_heads=3, v_head_dim=5), Geometry(3, 3, 8, 5)),
        (Module(q_proj=linear(32, 32), num_key_value_groups=1.0), Geometry(4, 4, 8, 8)),
        (Module(q_proj=wrapped(linear(32, 24)), num_heads=3), Geometry(3, 3, 8, 8)),
        (Module(q_proj=nn.Identity(), q_norm_proj=linear(8, 8), head_dim=8), Geometry(4, 4, 8, 8)),
        (Module(q_a_proj=linear(32, 4), q_gate_proj=linear(8, 64), qk_head_dim=12), Geometry(4, 4, 12, 12)),
    ],
)
def test_sizes_come_from_the_module(module, expected):
    assert geometry_of(module, "module") == expected


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Module(query=nn.Parameter(torch.zeros(32))), "neither heads nor projections of its own"),
        (Module(q_proj=linear(32, 40), head_dim=8), "queries of 40 numbers, which are not 4 heads of 8"),
        (Module(q_proj=linear(32, 32), num_key_value_groups=3), "4 heads in groups of 3"),
        (Module(q_content_proj=nn.Identity(), q_pos_proj=nn.Identity(), head_dim=8), "from q_content_proj and q_pos"),
    ],
)
def test_odd_modules(module, message):
    with pytest.raises(ValueError, match=message):
        geometry_of(module, "module")


def test_the_width_of_a_tower_is_its_own():
    assert width_of(Module(qkv=linear(16, 48), proj=linear(16, 16))) == 16  # beside a config of 32
    assert width_of(Module(q_proj=linear(24, 32))) == 24
    text = {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = AutoConfig.for_model("qwen2_vl", text_config=text, vision_config=vision)
    model = get_peft_model(AutoModelForImageTextToText.from_config(config), NTKAttentionConfig())
    assert [(size.num_heads, size.width) for size in sizes(model)] == [(2, 16), (4, 32), (4, 32)]


@pytest.mark.parametrize("name", FAMILIES)
def test_kinds_of_models(name):
    family = FAMILIES[name]
    model = get_peft_model(family.build(), NTKAttentionConfig())
    layers = [m for m in model.modules() if isinstance(m, NTKAttentionLayer)]
    expected = family.kind in ("encoder", "vision", "dual")
    assert {is_encoder(layer.get_base_layer()) for layer in layers} == {expected}


def test_text_attention_that_looks_both_ways_may_write():
    text = {**LLAMA, "model_type": "gemma"}
    vision = {**VIT, "model_type": "siglip_vision_model", "projection_dim": 32}
    config = AutoConfig.for_model("paligemma", text_config=text, vision_config=vision, projection_dim=32)
    model = AutoModelForImageTextToText.from_config(config)
    attention = model.get_submodule("model.language_model.layers.0.self_attn")
    assert not attention.is_causal
    assert not encodes(model, [attention])
    assert encodes(AutoModel.from_config(AutoConfig.for_model("layoutlm", **BERT)), [attention])


def test_layers_of_other_kinds_are_named():
    config = AutoConfig.for_model("qwen3_next", **{**LLAMA, **LINEAR})
    with pytest.warns(UserWarning, match="1 Qwen3NextGatedDeltaNet: no softmax attention"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), NTKAttentionConfig())
    assert model.ntk_summary().startswith("NTK-Attention: prefixes in 1 attention modules (1 Qwen3NextAttention)")


def test_parts_of_other_layers_are_not_named():
    """The names of all parts of RecurrentGemma hold a word for one of them."""
    options = {**LLAMA, "lru_width": 32, "attention_window_size": 4, "num_hidden_layers": 3}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("recurrent_gemma", **options))
    with pytest.warns(UserWarning, match="none in 2 RecurrentGemmaRecurrentBlock: no softmax attention$"):
        get_peft_model(model, NTKAttentionConfig())


def test_a_layer_that_numbers_its_parts_has_its_block():
    base = FAMILIES["t5"].build()
    assert "not found" not in get_peft_model(base, NTKAttentionConfig()).base_model.ntk_summary()
    base = FAMILIES["t5"].build()
    del base.decoder.block[1].layer[2].DenseReluDense
    summary = get_peft_model(base, NTKAttentionConfig()).base_model.ntk_summary()
    assert "feed-forward blocks not found in 1 T5LayerCrossAttention, 1 T5LayerSelfAttention" in summary


def test_pooling_heads_are_named():
    with pytest.warns(UserWarning, match="SiglipMultiheadAttentionPoolingHead: does not ask transformers"):
        get_peft_model(FAMILIES["siglip"].build(), NTKAttentionConfig())


def test_one_odd_module_is_left_out_and_named():
    base = tiny()
    odd = base.model.layers[1].self_attn
    odd.q_proj = linear(32, 40)
    with pytest.warns(UserWarning, match="none in 1 LlamaAttention: makes queries of 40 numbers"):
        model = get_peft_model(base, NTKAttentionConfig())
    assert len(sizes(model)) == 1
    with pytest.raises(ValueError, match="40 numbers"):  # but for those who ask for it
        get_peft_model(tiny_with(odd), NTKAttentionConfig(target_modules=["self_attn"]))


def tiny_with(attention):
    base = tiny()
    base.model.layers[1].self_attn = attention
    return base


def test_nothing_to_say_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(tiny(), NTKAttentionConfig())
    assert model.ntk_summary() == (
        "NTK-Attention: prefixes in 2 attention modules (2 LlamaAttention) and 2 feed-forward blocks"
    )
    with pytest.raises(ValueError, match="no adapter 'other'"):
        model.ntk_summary("other")


def test_summary_of_each_adapter():
    model = adapted()
    with pytest.warns(UserWarning, match="left out by the config"):
        model.add_adapter("one", NTKAttentionConfig(layers_to_transform=[0]))
    assert "in 1 attention modules" in model.ntk_summary("one")
    assert "in 2 attention modules" in model.ntk_summary()


@pytest.mark.parametrize("excluded", [["mlp"], r"layers\.0\.self_attn", ["layers.7"]])
def test_exclusions_that_exclude_nothing_are_refused(excluded):
    with pytest.raises(ValueError, match=r"means none of the attention modules, such as 'model\.layers\.0\.self_attn'"):
        get_peft_model(tiny(), NTKAttentionConfig(exclude_modules=excluded))


@pytest.mark.parametrize(
    "excluded", [["layers.0"], ("layers.0",), ["model.layers.0.self_attn"], r"model\.layers\.0\.self_attn"]
)
def test_exclusions(excluded):
    with pytest.warns(UserWarning, match="left out by the config"):
        model = get_peft_model(tiny(), NTKAttentionConfig(exclude_modules=excluded))
    assert not hasattr(model.get_base_model().model.layers[0].self_attn, "ntk_states")
    assert hasattr(model.get_base_model().model.layers[1].self_attn, "ntk_states")


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("whisper", "CAUSAL_LM", "is a model for 'SEQ_2_SEQ_LM'"),
        ("whisper", "SEQ_2_SEQ_LM", "takes 'input_features': leave task_type out"),
        ("t5", "CAUSAL_LM", "is a model for 'SEQ_2_SEQ_LM'"),
        ("llama", "SEQ_2_SEQ_LM", "is a model for 'CAUSAL_LM'"),
        ("vit", "CAUSAL_LM", "cannot generate"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(name, task, message):
    base = FAMILIES[name].build()
    keys = list(base.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, NTKAttentionConfig(task_type=task))
    assert list(base.state_dict()) == keys

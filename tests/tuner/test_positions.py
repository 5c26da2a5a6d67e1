"""What phi sees of queries with rotary positions: the query before it was rotated, whatever the family."""

import copy
import inspect

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ntk_attention import NTKAttentionConfig
from ntk_attention.ops.rotation import unrotated
from ntk_attention.tuner.layer import NTKAttentionLayer
from ntk_attention.tuner.rotary_source import rotary_sources
from ntk_attention.tuner.rotation import ROTATION, permuted, rotary_at
from ntk_attention.tuner.routing import ROUTE, ntk_attention_forward
from tests.families import BERT, FAMILIES, GPTJ, LLAMA, SPECIAL, WINDOW
from tests.reference import relative_error

VOCABULARY, HIDDEN, HEADS = 64, 32, 4
NO_HEAD_DIM = {k: v for k, v in LLAMA.items() if k != "head_dim"}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
DEEPSEEK = {
    **NO_HEAD_DIM,
    "num_key_value_heads": HEADS,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
LLAMA4 = {**LLAMA, "intermediate_size_mlp": 48, "num_local_experts": 2, "no_rope_layers": [1, 0], "use_qk_norm": True}
PHI3 = {
    **NO_HEAD_DIM,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.2, 2.4, 2.6],
        "original_max_position_embeddings": 32,
    },
    "original_max_position_embeddings": 32,
}
GPT_OSS = {
    **LLAMA,
    **WINDOW,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "experts_implementation": "eager",
}
GEMMA3N = {**LLAMA, **WINDOW, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
DECODERS = {
    "llama": LLAMA,
    "qwen2": NO_HEAD_DIM,
    "qwen3": LLAMA,
    "mistral": {**LLAMA, "rope_parameters": YARN},
    "gemma2": {**LLAMA, **WINDOW},
    "gemma3_text": {**LLAMA, **WINDOW},
    "phi": {**NO_HEAD_DIM, "partial_rotary_factor": 0.5},
    "phi3": PHI3,
    "gpt_neox": {**BERT, **SPECIAL, "rotary_pct": 0.5},
    "gptj": {**GPTJ, "n_positions": 2048},
    "stablelm": {**NO_HEAD_DIM, "partial_rotary_factor": 0.5},
    "persimmon": {**{k: v for k, v in NO_HEAD_DIM.items() if k != "num_key_value_heads"}, "partial_rotary_factor": 0.5},
    "glm": {**LLAMA, "partial_rotary_factor": 0.5},
    "nemotron": {**NO_HEAD_DIM, "partial_rotary_factor": 0.5},
    "cohere": NO_HEAD_DIM,
    "cohere2": {**NO_HEAD_DIM, **WINDOW},
    "smollm3": {**NO_HEAD_DIM, "no_rope_layers": [1, 0]},
    "gpt_oss": GPT_OSS,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v2": DEEPSEEK,
    "llama4_text": LLAMA4,
    "ernie4_5": LLAMA,
    "granite": NO_HEAD_DIM,
    "olmo2": NO_HEAD_DIM,
    "recurrent_gemma": {**LLAMA, "lru_width": HIDDEN, "block_types": ["attention"], "attention_window_size": 64},
    "moshi": {**LLAMA, "ffn_dim": 48},
}
if "gptj" not in FAMILIES:  # before transformers 5.24
    del DECODERS["gptj"]
# What a rotation leaves of the numbers of a query: their order, in pairs of neighbours or not.
PERMUTED = {"deepseek_v3": (2, 4)}
TEXT = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def build(name, dtype=torch.float64):
    """The same random model each time, with weights far from zero."""
    torch.manual_seed(0)
    try:
        config = AutoConfig.for_model(name, **DECODERS[name])
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if name == "gpt_oss" else None)
    except (ValueError, KeyError) as error:
        pytest.skip(f"not in this version of transformers: {error}")
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.to(dtype).eval()


def with_adapter(base, **options):
    torch.manual_seed(2)
    return get_peft_model(base, NTKAttentionConfig(**{"init_weights": False, **options})).eval()


class Recorded:
    """Queries before they were rotated, and phi's input, of every call of the attention function."""

    def __init__(self, monkeypatch, classes):
        self.rotated, self.pairs = [], []
        for namespace, name in {
            (id(space), source.name): (space, source.name)
            for cls in classes
            for source in rotary_sources(cls)
            if source.name in (space := inspect.unwrap(cls.forward).__globals__)
        }.values():
            monkeypatch.setitem(namespace, name, self.recording(namespace[name]))
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, ROUTE, self.attention)

    def recording(self, function):
        def record(query, *args, **kwargs):
            self.rotated.append(query)
            return function(query, *args, **kwargs)

        return record

    def attention(self, module, query, *args, **kwargs):
        positions = kwargs.get(ROTATION)
        if positions is not None:
            rotation = copy.copy(positions).of(query, "")
            x = unrotated(query, rotation)[..., rotation.start : rotation.start + 2 * rotation.num_pairs]
            self.pairs.append((list(self.rotated), x))
        self.rotated.clear()
        return ntk_attention_forward(module, query, *args, **kwargs)

    def errors(self, widths=None):
        """How far phi's input is from the nearest query that the model rotated, for each call."""
        found = []
        for rotated, x in self.pairs:
            near = []
            for query in rotated:
                for q in (query, query.transpose(1, 2)):
                    if q.shape[:3] == x.shape[:3]:
                        before = q[..., : x.shape[-1]]
                        before = before if widths is None else permuted(before, *widths)
                        near.append(relative_error(x, before))
            found.append(min(near))
        return found


def attention_classes(model):
    return {type(layer.get_base_layer()) for layer in model.modules() if isinstance(layer, NTKAttentionLayer)}


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_phi_sees_the_query_before_it_is_rotated(name, monkeypatch):
    model = with_adapter(build(name))
    recorded = Recorded(monkeypatch, attention_classes(model))
    model(input_ids=TEXT, use_cache=False)
    errors = recorded.errors(PERMUTED.get(name))
    if name == "llama4_text":  # whose queries are normed after they are rotated
        assert len(errors) == 1
        return
    layers = {"cohere2": 1, "smollm3": 1, "recurrent_gemma": 2}.get(name, 2)
    assert len(errors) == layers
    assert max(errors) < 1e-6


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "moshi"])
@torch.no_grad()
def test_outputs_do_not_change_with_all_positions(name):
    """A shift of all positions, against the same of the base model, whose tables round more far out."""

    def change(model):
        start = torch.arange(TEXT.shape[1])[None]
        out = [model(input_ids=TEXT, position_ids=start + shift, use_cache=False).logits for shift in (0, 1000)]
        return relative_error(out[1], out[0])

    base = change(build(name))
    free, rotary = (change(with_adapter(build(name), positions=p)) for p in ("free", "rotary"))
    if name == "phi3":  # takes other angles for a long text
        assert base > 1e-3
        return
    assert base < 1e-4
    assert free < 10 * base + 1e-5
    assert rotary > 1e-3


VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "image_size": 16,
    "patch_size": 4,
}


@pytest.mark.parametrize("name", ["dinov3_vit", "pixtral", "modernbert"])
@torch.no_grad()
def test_encoders(name, monkeypatch):
    """Patches and first tokens, packed pictures, and windows."""
    options = {**BERT, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2} if name == "modernbert" else VISION
    torch.manual_seed(0)
    model = with_adapter(AutoModel.from_config(AutoConfig.for_model(name, **options)).double())
    recorded = Recorded(monkeypatch, attention_classes(model))
    if name == "modernbert":
        model(input_ids=TEXT)
    else:
        model(pixel_values=torch.randn(2 if name != "pixtral" else 1, 3, 16, 16).double())
    errors = recorded.errors()
    assert len(errors) == 2
    assert max(errors) < 1e-6


@torch.no_grad()
def test_a_vision_tower_that_cuts_a_row_into_pieces(monkeypatch):
    """Two pictures in one row, each of which gets an attention call of its own, and text with positions in three
    dimensions."""
    config = AutoConfig.for_model("qwen2_vl")
    vision = AutoConfig.for_model("qwen2_vl").vision_config
    del config
    for option, value in {"depth": 1, "embed_dim": HIDDEN, "hidden_size": HIDDEN, "num_heads": HEADS}.items():
        setattr(vision, option, value)
    vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size = 4, 1, 2
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    vision._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = with_adapter(Qwen2VisionTransformerPretrainedModel(vision).double())
    seen = []

    def attention(module, query_states=None, *args, **kwargs):
        query = kwargs.get("query", query_states)
        before = kwargs[ROTATION].taken
        out = ntk_attention_forward(module, query, *args, **{k: v for k, v in kwargs.items() if k != "query"})
        seen.append((query.shape[2], before, kwargs[ROTATION].taken))
        return out

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, ROUTE, attention)
    grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
    model(torch.randn(24, 3 * 16).double(), grid_thw=grid)
    assert seen == [(16, 0, 16), (8, 16, 24)]


REFUSED = {
    "hunyuan_v1_dense": (LLAMA, "query_layernorm weighs their numbers after they are rotated"),
    "vjepa2": ({**VISION, "crop_size": 16, "mlp_ratio": 1.0}, "a method of its own rotates them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_undone_is_refused(name):
    options, reason = REFUSED[name]
    base = AutoModel.from_config(AutoConfig.for_model(name, **options))
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match=f'{reason}; expected NTKAttentionConfig\\(positions="rotary"\\), or'):
        with_adapter(base)
    assert base.state_dict().keys() == before.keys()
    assert with_adapter(base, positions="rotary")


def test_what_is_read_off_a_class():
    llama = build("llama").model.layers[0].self_attn
    (source,) = rotary_sources(type(llama))
    assert source.table_names == ("cos", "sin")
    assert rotary_at(type(llama), 0).form.layouts == {3: "BHLd", 2: "BLHd"}
    assert rotary_sources(nn.Linear) == ()

"""How attention modules find their function, and that a routed one still knows which implementation it had."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention as Qwen2VLVisionAttention
from transformers.utils.generic import is_flash_attention_requested

from ntk_attention.tuner.lookup import ROUTE, lookup_of, routed_config
from ntk_attention.tuner.routing import ntk_attention_forward


class OfOldCode(nn.Module):
    """As remote code for transformers 4 has it."""

    def forward(self, x):
        function = eager_attention_forward
        if self.config._attn_implementation != "eager":
            function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        return function(self, x, x, x, None)


class Asking(nn.Module):
    """As sparse attention has it: the mask of what an indexer left out is made for two implementations."""

    def forward(self, x, mask):
        if self.config._attn_implementation in ("eager", "sdpa"):
            mask = self.masked(mask)
        return self.attend(x, mask)

    def attend(self, x, mask):
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return function(self, x, x, x, mask)


class PastItsConfig(nn.Module):
    def forward(self, x):
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return (function if x is not None else ALL_ATTENTION_FUNCTIONS["sdpa"])(self, x, x, x, None)


class ByAnotherConfig(nn.Module):
    def forward(self, x):
        name = self.config.text_config._attn_implementation
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)(self, x, x, x, None)


class Overriding(LlamaAttention):
    """Does not reach the lookup of the class that it is made from."""

    def forward(self, x):
        return x


class Extending(LlamaAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class WithABranchOfItsOwn(nn.Module):
    """As GPT-2 has it: while a switch is set it does not call what it looked up."""

    def forward(self, x):
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if self.has_own_attention:
            x = self.other(x)
            return x
        else:
            x, _ = function(self, x, x, x, None)
        return x


def test_what_is_read_off_a_class():
    llama = lookup_of(LlamaAttention)
    assert llama.eager is modeling_llama.eager_attention_forward
    assert llama.interface is ALL_ATTENTION_FUNCTIONS
    assert (llama.takes_eager_itself, llama.compared, llama.replaced) == (False, frozenset(), frozenset())
    assert lookup_of(OfOldCode).takes_eager_itself
    assert lookup_of(OfOldCode).compared == frozenset()
    assert lookup_of(Asking).compared == {"eager", "sdpa"}
    assert lookup_of(GPT2Attention).compared == {"eager"}
    assert lookup_of(PastItsConfig).replaced == {"sdpa"}
    assert lookup_of(Extending).eager is llama.eager
    assert lookup_of(GPT2Attention).switches == {"reorder_and_upcast_attn"}
    assert lookup_of(WithABranchOfItsOwn).switches == {"has_own_attention"}
    assert llama.switches == lookup_of(Asking).switches == lookup_of(Qwen2VLVisionAttention).switches == frozenset()
    for cls in (ByAnotherConfig, Overriding, nn.Linear, type("NoSource", (nn.Module,), {})):
        assert lookup_of(cls) is None


@pytest.mark.parametrize("cls", [LlamaAttention, OfOldCode, Asking])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
def test_a_routed_module_finds_our_function_and_knows_its_implementation(cls, implementation):
    base = LlamaConfig()
    base._attn_implementation_internal = implementation
    lookup = lookup_of(cls)
    for config in (
        routed_config(base, lookup),
        copy.deepcopy(routed_config(base, lookup)),
        pickle.loads(pickle.dumps(routed_config(base, lookup))),
    ):
        name = config._attn_implementation
        if cls is Asking:
            assert (name == "eager") == (implementation == "eager")
            assert (name in ("eager", "sdpa")) == (implementation in ("eager", "sdpa"))
            assert is_flash_attention_requested(config) == implementation.startswith("flash")
        else:
            assert type(name) is str
            assert name != "eager"
            assert ALL_ATTENTION_FUNCTIONS[name] is ntk_attention_forward
        assert ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward) is ntk_attention_forward
        assert config.hidden_size == base.hidden_size
    assert base._attn_implementation == implementation


def test_the_user_may_switch_the_base_later():
    base = LlamaConfig()
    base._attn_implementation_internal = "sdpa"
    config = routed_config(base, lookup_of(Asking))
    base._attn_implementation = "eager"
    assert config._attn_implementation == "eager"


@pytest.mark.parametrize("cls", [LlamaAttention, Asking])
def test_a_routed_config_has_the_attributes_of_the_base(cls):
    """What a module reads in its forward pass counts, also where the user changes it later."""
    base = LlamaConfig(attn_implementation="sdpa")
    texts = [str(base), base.to_json_string(), base.to_json_string(use_diff=False), base.to_dict()]
    for routed in (
        routed_config(base, lookup_of(cls)),
        pickle.loads(pickle.dumps(routed_config(base, lookup_of(cls)))),
    ):
        assert [str(routed), routed.to_json_string(), routed.to_json_string(use_diff=False), routed.to_dict()] == texts
    routed = routed_config(base, lookup_of(cls))
    base.clip_qkv = 0.5
    assert routed.clip_qkv == 0.5
    routed.clip_qkv = None
    assert base.clip_qkv is None
    assert type(type(routed)()) is LlamaConfig
    routed._attn_implementation = "eager"
    assert base._attn_implementation == "eager"
    for other in (copy.copy(routed), copy.deepcopy(routed)):
        assert other._attn_implementation == routed._attn_implementation
        other.clip_qkv = 1.0
        assert base.clip_qkv is None
    model = nn.Module()
    model.config, model.routed = base, routed
    copied = copy.deepcopy(model)
    copied.config.clip_qkv = 2.0
    assert (copied.routed.clip_qkv, routed.clip_qkv) == (2.0, None)


def test_compilers_get_a_plain_string_or_a_refusal(monkeypatch):
    base = LlamaConfig()
    base._attn_implementation_internal = "sdpa"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert routed_config(base, lookup_of(GPT2Attention))._attn_implementation == ROUTE  # compares with "eager" alone
    with pytest.raises(ValueError, match=r"without torch\.compile"):
        routed_config(base, lookup_of(Asking))._attn_implementation  # noqa: B018

"""Parts of feed-forward blocks in the weights of linear layers: the same outputs, the way back, what is refused."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ntk_attention import NTKAttentionConfig, calibrate
from ntk_attention.tuner.untrusted import WEIGHTS
from tests.families import FAMILIES
from tests.reference import relative_error
from tests.tiny import INPUTS, adapted, adapters, logits, loss_of, tiny


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "ntk_states" not in name}


def block(model):
    return model.base_model.model.model.layers[0].mlp


@pytest.mark.parametrize("name", ["llama", "opt", "glm4", "gpt2"])
@torch.no_grad()
def test_outputs_and_the_way_back(name):
    family = FAMILIES[name]
    inputs = family.inputs()
    config = NTKAttentionConfig(init_weights=False, feed_forward_rank=2)
    model = get_peft_model(family.build(), config, autocast_adapter_dtype=False).eval()
    expected, before = family.run(model, inputs), weights(model)
    model.merge_adapter()
    changed = [key for key, x in weights(model).items() if not torch.equal(x, before[key])]
    assert changed
    assert all(key.endswith("weight") for key in changed)
    assert relative_error(family.run(model, inputs), expected) < 1e-5
    model.unmerge_adapter()
    assert all(torch.equal(x, before[key]) for key, x in weights(model).items())
    assert torch.equal(family.run(model, inputs), expected)


def test_two_adapters_in_coordinates():
    model = adapted(init_weights=True, adapter_name="first")
    calibrate(model, [INPUTS], adapter_name="first")
    model.add_adapter("second", NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM", feed_forward_rank=3))
    for adapter in adapters(model, "first"):
        for part in adapter.parts.values():
            part.Z_B.data.normal_()
    model.base_model.set_adapter(["first", "second"])
    model.eval()
    expected = logits(model)
    model.merge_adapter()
    assert relative_error(logits(model), expected) < 1e-4
    model.unmerge_adapter()
    model.merge_adapter(["second"])
    with pytest.raises(ValueError, match=r"the active adapters are \['first', 'second'\]"):
        logits(model)
    model.set_adapter("second")  # PEFT takes the parts out first
    expected = logits(model)
    model.merge_adapter(["second"])
    assert relative_error(logits(model), expected) < 1e-5


def test_what_else_is_asked_for_is_refused(tmp_path):
    model = adapted().eval()
    model.save_pretrained(tmp_path / "before")
    base = weights(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged already"):
        model.merge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="the model without them, were asked for"):
        logits(model)
    model.train()
    with pytest.raises(ValueError, match="they do not train there: call unmerge_adapter"):
        loss_of(model)
    model.eval()
    model.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / WEIGHTS).read_bytes() == (tmp_path / "before" / WEIGHTS).read_bytes()
    with torch.no_grad():
        adapters(model)[0].parts["up_proj_part"].Z_B.add_(1.0)
    with pytest.raises(ValueError, match="they were changed since"):
        logits(model)
    assert all(torch.equal(x, weights(tiny())[name]) for name, x in weights(model.unload()).items())
    assert len(base) == len(weights(tiny()))
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "merged").eval()
    loaded.merge_adapter(safe_merge=True)
    logits(loaded)


def test_a_merged_adapter_that_is_deleted():
    model = adapted().eval()
    model.add_adapter("other", NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM"))
    before = weights(model)
    model.merge_adapter(["default"])
    model.delete_adapter("default")
    assert all(torch.equal(x, before[name]) for name, x in weights(model).items())


@torch.no_grad()
def test_compiled():
    model = adapted().eval()
    expected = logits(model)
    model.merge_adapter()
    found = torch.compile(model, backend="eager", fullgraph=True)(**INPUTS).logits
    assert relative_error(found[INPUTS["attention_mask"].bool()], expected) < 1e-5


@torch.no_grad()
def test_float64_stays_exact():
    model = adapted().eval()
    model.base_model.to(torch.float64)
    expected = logits(model)
    model.merge_adapter()
    assert relative_error(logits(model), expected) < 1e-13


def test_weights_that_cannot_take_a_part():
    with pytest.raises(ValueError, match=r"\['default'\] have no prefix in a feed-forward block"):
        adapted(feed_forward_rank=None).merge_adapter()
    with pytest.raises(ValueError, match=r"the prefix beside a feed-forward block \(LlamaMLP\) cannot be merged"):
        adapted(feed_forward="beside").merge_adapter()
    with pytest.raises(ValueError, match="there is no adapter 'other'"):
        adapted().merge_adapter(["other"])
    model = adapted()
    before = weights(model)
    block(model).down_proj.weight.data = block(model).down_proj.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"mlp\.down_proj cannot take its part into its weight: .* quantised"):
        model.merge_adapter()
    assert torch.equal(block(model).up_proj.weight, before["base_model.model.model.layers.0.mlp.up_proj.weight"])
    lora = get_peft_model(tiny(), LoraConfig(target_modules=["up_proj"])).get_base_model()
    with pytest.raises(ValueError, match="up_proj cannot take its part into its weight: it has other adapters"):
        adapted(lora).merge_adapter()


def test_a_sum_that_is_not_finite():
    model = adapted()
    before = weights(model)
    last = adapters(model)[-1].parts["down_proj_part"]
    last.Z_B.data.fill_(1e38)
    last.Z_A.data.fill_(1e38)
    with pytest.raises(ValueError, match="down_proj: the merged weight holds NaN or infinite values"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(x, before[name]) for name, x in weights(model).items())

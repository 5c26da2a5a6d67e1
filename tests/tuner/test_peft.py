"""Several adapters on one model, other ways of PEFT and transformers to get one, copies, and merging."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from ntk_attention import NTKAttentionConfig
from tests.families import ATTENTION
from tests.reference import relative_error
from tests.tiny import (
    INPUTS,
    adapted,
    adapters,
    logits,
    skip_unless_transformers_takes_this_peft,
    tiny,
    trainable,
)


def two_adapters(**options):
    model = adapted(adapter_name="first", **options)
    model.add_adapter("second", NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM", **options))
    return model


def test_switching_between_adapters():
    model = two_adapters()
    first = logits(model)
    model.set_adapter("second")
    assert not torch.equal(logits(model), first)
    assert all(".second." in name for name in trainable(model))
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    assert all(".first." in name for name in trainable(model))


def test_two_active_adapters_against_the_sum_of_their_states():
    model = two_adapters(**ATTENTION)
    model.base_model.set_adapter(["first", "second"])
    actual = logits(model)
    assert {name.split(".")[-2] for name in trainable(model)} == {"first", "second"}
    total = adapted(**ATTENTION)
    with torch.no_grad():
        for sum_, a, b in zip(adapters(total), adapters(model, "first"), adapters(model, "second"), strict=True):
            sum_.Z.copy_(a.Z + b.Z)
            sum_.log_k.copy_(torch.log(a.log_k.exp() + b.log_k.exp()))
    assert relative_error(actual, logits(total)) < 1e-4


@pytest.mark.parametrize(("deleted", "left"), [("first", "second"), ("second", "first")], ids=["active", "inactive"])
def test_delete_adapter(deleted, left):
    model = two_adapters()
    model.set_adapter(left)
    expected = logits(model)
    model.set_adapter("first")
    model.delete_adapter(deleted)
    assert list(model.peft_config) == [left]
    assert model.active_adapters == [left]
    assert not any(f".{deleted}." in name for name in model.state_dict())
    assert torch.equal(logits(model), expected)


def test_new_adapters_change_no_other(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = adapted(adapter_name="first")
    expected, names = logits(model), trainable(model).keys()
    model.load_adapter(tmp_path, adapter_name="frozen")
    model.add_adapter("idle", NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM"))
    assert trainable(model).keys() == names
    assert torch.equal(logits(model), expected)


def test_saving_several_adapters(tmp_path):
    model = two_adapters()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "second", adapter_name="second")
    loaded.load_adapter(tmp_path / "first", adapter_name="first")
    for name in ("first", "second"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("given", [True, False], ids=["by its state dict", "by its config"])
def test_inject_adapter_in_model(given):
    source = adapted(layers_to_transform=[1])
    state = get_peft_model_state_dict(source)
    state = {name.removeprefix("base_model.model."): x for name, x in state.items()}
    config = NTKAttentionConfig(layers_to_transform=[1])
    base = inject_adapter_in_model(config, tiny(), state_dict=state if given else None)
    assert set_peft_model_state_dict(base, state).unexpected_keys == []
    assert torch.equal(logits(base), logits(source))


def test_transformers_own_adapter_methods(tmp_path):
    source = adapted()
    source.save_pretrained(tmp_path)
    frozen, expected = logits(tiny()), logits(source)
    model = tiny()
    model.load_adapter(tmp_path)
    assert torch.equal(logits(model), expected)
    skip_unless_transformers_takes_this_peft()
    model.disable_adapters()
    assert torch.equal(logits(model), frozen)
    model.enable_adapters()
    assert torch.equal(logits(model), expected)
    model.add_adapter(NTKAttentionConfig(init_weights=False), adapter_name="other")
    model.set_adapter("other")
    assert not torch.equal(logits(model), expected)
    model.delete_adapter("other")
    assert torch.equal(logits(model), expected)


def test_low_cpu_mem_usage_makes_an_empty_adapter_that_can_be_filled():
    source = adapted()
    config = NTKAttentionConfig(task_type="CAUSAL_LM")
    model = get_peft_model(tiny(), config, low_cpu_mem_usage=True)
    assert all(p.is_meta for p in trainable(model).values())
    set_peft_model_state_dict(model, get_peft_model_state_dict(source), low_cpu_mem_usage=True)
    assert torch.equal(logits(model.eval()), logits(source))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copy_of_an_adapted_model_is_independent(copied):
    model = adapted()
    expected = logits(model)
    other = copied(model)
    assert torch.equal(logits(other), expected)
    with torch.no_grad():
        for adapter in adapters(other):
            adapter.Z_A.add_(1.0)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(other), expected)
    assert torch.equal(logits(other.unload()), logits(tiny()))
    assert torch.equal(logits(model), expected)


@pytest.mark.slow
def test_pickle_opens_in_a_new_process(tmp_path):
    model = adapted()
    (tmp_path / "model.pkl").write_bytes(pickle.dumps((model, INPUTS, model(**INPUTS).logits.detach())))
    code = (
        "import pickle, sys, torch; model, inputs, expected = pickle.load(open(sys.argv[1], 'rb')); "
        "sys.exit(not torch.equal(model(**inputs).logits, expected))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pkl"], env=environment, check=True)


def test_status_and_parameter_counts():
    model = adapted()
    status = model.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.num_adapter_layers == 2
    heads, d, r, rank, D, F, in_block = 4, 8, 8 + 1, 1, 32, 48, 1
    in_attention = heads * (r * rank + rank * d + r)
    assert model.get_nb_trainable_parameters()[0] == 2 * (in_attention + 3 * (D + F) * in_block)


def test_merging_all_is_refused():
    model = adapted()
    expected = logits(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    assert torch.equal(logits(model), expected)

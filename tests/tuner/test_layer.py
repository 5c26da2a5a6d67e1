"""The options of an adapter: what each does to the layer, to training and to the file."""

import copy

import pytest
import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from ntk_attention import NTKAttentionConfig, PrefixState, calibrate, ntk_attention
from tests.families import ATTENTION
from tests.reference import relative_error
from tests.tiny import INPUTS, adapted, adapters, logits, loss_of, losses_of_training, tiny, trainable


@pytest.mark.parametrize(("init_weights", "moves"), [(True, True), ("published", False)], ids=["default", "published"])
def test_log_k_trains_by_default_and_not_as_published(init_weights, moves):
    model = adapted(init_weights=init_weights, **ATTENTION)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
    before = copy.deepcopy(adapters(model))
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    for old, new in zip(before, adapters(model), strict=True):
        assert (not torch.equal(new.log_k, old.log_k)) == moves
        assert not torch.equal(new.Z, old.Z)


OPTIONS = {
    "rank": {"rank": 3},
    "kv heads": {"state_heads": "kv"},
    "no constant feature": {"constant_feature": False},
    "one layer": {"layers_to_transform": [1]},
    "taylor": {"feature_map": "taylor", "feature_map_options": {"degree": 2}},
    "positive random": {"feature_map": "positive_random", "feature_map_options": {"num_features": 12, "seed": 3}},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


@every_option
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low cpu mem usage"])
def test_save_and_load(options, low_cpu_mem_usage, tmp_path):
    model = adapted(**options)
    expected = logits(model)
    assert relative_error(expected, logits(tiny())) > 1e-2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert relative_error(logits(loaded), expected) < 1e-6
    assert not trainable(loaded)
    again = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    assert trainable(again).keys() == trainable(model).keys()


@every_option
def test_training_step_with(options):
    model = adapted(**{**options, "init_weights": True}).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = losses_of_training(model, 8, 0.05)
    assert losses[-1] < losses[0]
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trainable(model).keys()


def test_projection_of_positive_random_comes_from_the_file(tmp_path):
    model = adapted(**OPTIONS["positive random"])
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.feature_map.projection.mul_(0.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(model), logits(adapted(**OPTIONS["positive random"])))


def test_rank_against_the_full_product():
    model, full = adapted(rank=3, feed_forward_rank=None), adapted(**ATTENTION)
    with torch.no_grad():
        for low, adapter in zip(adapters(model), adapters(full), strict=True):
            assert low.Z_A.shape == (4, 9, 3)
            assert low.Z_B.shape == (4, 3, 8)
            adapter.Z.copy_(low.Z_A @ low.Z_B)
            adapter.log_k.copy_(low.log_k)
    assert relative_error(logits(model), logits(full)) < 1e-5


def test_state_per_kv_head_against_repeated_states():
    model, full = adapted(state_heads="kv", **ATTENTION), adapted(**ATTENTION)
    with torch.no_grad():
        for shared, adapter in zip(adapters(model), adapters(full), strict=True):
            assert shared.Z.shape == (2, 9, 8)
            adapter.Z.copy_(shared.Z.repeat_interleave(2, dim=0))
            adapter.log_k.copy_(shared.log_k.repeat_interleave(2, dim=0))
    assert relative_error(logits(model), logits(full)) < 1e-5


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"layers_to_transform": 1}, [1]),
        ({"layers_to_transform": [0]}, [0]),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, [0]),
        ({"exclude_modules": ["layers.0.self_attn"]}, [1]),
        ({"exclude_modules": r".*\.1\.self_attn"}, [0]),
        ({"target_modules": r".*\.1\.self_attn"}, [1]),
        ({"target_modules": ["layers.0.self_attn"]}, [0]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_which_layers(options, layers):
    model = adapted(**options)
    decoder = model.base_model.model.model.layers
    assert [i for i, layer in enumerate(decoder) if hasattr(layer.self_attn, "ntk_states")] == layers


def test_default_start_is_a_token_of_value_zero():
    adapter = adapters(adapted(init_weights=True, constant_feature=False))[0]
    query = torch.zeros(1, 4, 1, 8)  # phi is 1 in every feature
    key, value = torch.zeros(1, 4, 1, 8), torch.ones(1, 4, 1, 8)
    state = adapter.state()
    out = ntk_attention(query, key, value, PrefixState(state.Z, state.k, state.log_scale, state.feature_map))
    torch.testing.assert_close(out, torch.full_like(out, 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "cosine"}, "unknown feature map"),
        ({"feature_map": "taylor", "feature_map_options": {"degree": 3}}, "even degree"),
        ({"feature_map": "elu", "feature_map_options": {"degree": 2}}, "does not take"),
        ({"feature_map": "positive_random", "feature_map_options": {"num_features": 0}}, "num_features"),
        ({"rank": 0}, "rank"),
        ({"rank": 2.0}, "rank"),
        ({"feed_forward_rank": -1}, "feed_forward_rank"),
        ({"feed_forward_rank": "full"}, "feed_forward_rank"),
        ({"rank": True}, "rank"),
        ({"state_heads": "head"}, "state_heads"),
        ({"init_weights": "gaussian"}, "init_weights"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_config_that_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NTKAttentionConfig(**options)


def test_config_survives_its_file(tmp_path):
    config = NTKAttentionConfig(feature_map="taylor", feature_map_options={"degree": 4}, rank=2, state_heads="kv")
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def copy_of(source, target, model):
    """The outputs of one adapter, after the parameters of another were copied into it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{source}." in name:
                model.get_parameter(name.replace(f".{source}.", f".{target}.")).copy_(parameter)
    model.set_adapter(target)
    return logits(model)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """The folder of an adapter that was calibrated and moved, its state dict by PEFT's names, and its outputs."""
    model, folder = adapted(init_weights=True), tmp_path_factory.mktemp("calibrated")
    calibrate(model, [INPUTS])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder, model.state_dict(), logits(model)


def two_that_train():
    model = adapted(init_weights=True)
    model.add_adapter("ref", model.peft_config["default"])
    return model


def by_state_dict(folder, tensors):
    model = two_that_train()
    model.load_state_dict(tensors, strict=False)
    return model, "default", "ref"


def by_set_peft_model_state_dict(folder, tensors):
    model = two_that_train()
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model, "default", "ref"


def by_load_adapter(folder, tensors):
    model = two_that_train()
    model.load_adapter(folder, "default", is_trainable=True)
    return model, "default", "ref"


def as_a_second_that_trains(folder, tensors):
    model = adapted(init_weights=True)
    model.load_adapter(folder, "ref", is_trainable=True)
    return model, "ref", "default"


def frozen_beside_one_that_trains(folder, tensors):
    model = adapted(init_weights=True)
    model.load_adapter(folder, "ref")
    return model, "ref", "default"


def newcomer_beside_a_frozen_one(folder, tensors):
    model = PeftModel.from_pretrained(tiny(), folder)
    model.add_adapter("ref", NTKAttentionConfig(task_type="CAUSAL_LM"))
    return model, "default", "ref"


def by_the_config_of_a_frozen_one(folder, tensors):
    model = PeftModel.from_pretrained(tiny(), folder)
    model.add_adapter("ref", model.peft_config["default"])
    return model, "default", "ref"


LOADED = (
    by_state_dict,
    by_set_peft_model_state_dict,
    by_load_adapter,
    as_a_second_that_trains,
    frozen_beside_one_that_trains,
    newcomer_beside_a_frozen_one,
    by_the_config_of_a_frozen_one,
)


@pytest.mark.parametrize("load", LOADED)
def test_equal_parameters_are_equal_functions_whatever_was_loaded(load, calibrated):
    folder, tensors, expected = calibrated
    model, source, target = load(folder, tensors)
    model.set_adapter(source)
    assert relative_error(logits(model), expected) < 1e-5
    assert relative_error(copy_of(source, target, model), expected) < 1e-5


def test_frozen_adapters_change_nothing_in_each_other(calibrated, tmp_path):
    folder, _, expected = calibrated
    other = adapted()
    other.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny(), tmp_path, adapter_name="first").eval()
    model.load_adapter(folder, "second")
    assert torch.equal(logits(model), logits(other))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(tiny(), folder)))
    assert relative_error(logits(model), expected) < 1e-5


def test_what_was_given_to_load_does_not_change(calibrated):
    folder, _, _ = calibrated
    tensors = load_file(folder / "adapter_model.safetensors")
    before = {name: x.clone() for name, x in tensors.items()}
    model = two_that_train()
    calibrate(model, [INPUTS])
    set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    set_peft_model_state_dict(model, tensors, "ref", low_cpu_mem_usage=True)
    calibrate(model, [INPUTS])
    assert all(torch.equal(tensors[name], x) for name, x in before.items())

"""A plan is a value: it says all that an adapter will be, and neither model nor config is touched for it."""

import copy

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open

from ntk_attention import NTKAttentionConfig
from ntk_attention.tuner.adapter import ZForm
from ntk_attention.tuner.plan import check_plan, file_shapes, plan_adapter
from tests.tiny import adapted, tiny


def test_a_plan_changes_nothing():
    model, config = tiny(), NTKAttentionConfig()
    plan = plan_adapter(model, config)
    check_plan(plan, model, config)
    assert config == NTKAttentionConfig()
    assert config.asked == {}
    assert list(model.state_dict()) == list(tiny().state_dict())
    assert list(plan.sites) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert plan.settled == {
        "target_modules": {"self_attn"},
        "rank": 1,
        "feed_forward_rank": 1,
        "geometry": {"num_modules": 2, "sizes": [[4, 2, 8, 8, 32]]},
    }


def test_models_without_weights():
    with torch.device("meta"):
        model = tiny()
        with pytest.raises(
            ValueError, match=r'the adapter is made inside of torch.device\("meta"\): expected the model'
        ):
            get_peft_model(model, NTKAttentionConfig())
    adapted = get_peft_model(model, NTKAttentionConfig(), low_cpu_mem_usage=True)
    assert {p.device.type for p in adapted.parameters()} == {"meta"}


def test_shapes_of_the_file_are_those_that_are_saved(tmp_path):
    model, config = tiny(), NTKAttentionConfig(modules_to_save=["lm_head"])
    planned = file_shapes(plan_adapter(model, config), model, config)
    get_peft_model(model, config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert planned == {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["nothing"]}, "has no such module"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "is a model for 'CAUSAL_LM'"),
        ({"feature_map": "taylor", "feature_map_options": {"degree": 40}}, "more features"),
    ],
    ids=["modules to save", "task", "features"],
)
def test_a_refused_config_stays_as_it_was(options, message):
    model, config = adapted(), NTKAttentionConfig(**options)
    before = copy.deepcopy(config)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", config)
    assert config == before
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("rank", [None, 2, 12])
def test_z_as_factors(rank):
    """Against Z itself, and against the error of the best approximation of that rank."""
    Z = torch.randn(3, 9, 8, dtype=torch.float64)
    form = ZForm(num_features=9, value_dim=8, rank=rank)
    factors = form.split(Z)
    assert {name: tuple(x.shape) for name, x in factors.items()} == form.shapes(3)
    product = Z if rank is None else factors["Z_A"] @ factors["Z_B"]
    left_out = torch.linalg.svdvals(Z)[:, 8 if rank is None else rank :].square().sum()
    torch.testing.assert_close((Z - product).square().sum(), left_out)

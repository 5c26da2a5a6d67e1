"""The calibrated start: near the frozen model, in its own coordinates, and nothing of it in the files but plain Z."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ntk_attention import NTKAttentionConfig
from ntk_attention.calibration import CalibrationSettings, calibrate
from ntk_attention.tuner.calls import CALLS
from ntk_attention.tuner.observation import adapted_layers, prefix_shares
from tests.families import ATTENTION, ENCODERS, FAMILIES, LLAMA, attention_function, naive_attention
from tests.reference import relative_error
from tests.tiny import INPUTS, adapted, adapters, logits, loss_of, losses_of_training, tiny, trainable

SHARE = 0.1
SMALL = CalibrationSettings(share=SHARE)


def repeats(seed, batch=16):
    """A pattern of three tokens again and again: what comes next is known from the second round on."""
    pattern = torch.randint(3, 16, (batch, 3), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": pattern.repeat(1, 5)}


@pytest.fixture(scope="module")
def trained():
    """A tiny Llama that has learned to repeat; weight decay keeps its attention from being all or nothing."""
    torch.set_num_threads(1)  # the same numbers everywhere, and faster for a model as small as this
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.5)
    for step in range(300):
        optimizer.zero_grad()
        loss_of(model, repeats(step)).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def held_out_loss(model):
    return loss_of(model, repeats(1000, batch=64)).item()


OPTIONS = {
    "default": {},
    "rank": {"rank": 4},
    "kv heads": {"state_heads": "kv"},
    "taylor": {"feature_map": "taylor"},
    "positive random": {"feature_map": "positive_random"},
    "one layer": {"layers_to_transform": [1]},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


def calibrated(base=None, batches=(INPUTS,), others=False, **options):
    model = adapted(base, **{"init_weights": True, **options})
    calibrate(model, batches, settings=SMALL, others=others)
    return model


def saved(model):
    """What a file would hold of every layer."""
    return [adapter.state_dict() for adapter in adapters(model)]


@every_option
def test_start_is_near_the_frozen_model(trained, options):
    model = adapted(copy.deepcopy(trained), init_weights=True, **options)
    frozen, uncalibrated = held_out_loss(trained), held_out_loss(model)
    calibrate(model, [repeats(seed) for seed in range(2000, 2008)], settings=CalibrationSettings(share=0.05))
    assert abs(held_out_loss(model) - frozen) < min(0.15, uncalibrated - frozen)


@pytest.mark.parametrize("share", [0.02, 0.3, None])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_share_of_the_attention_against_naive(name, share):
    # the mean over the tokens, per head, with every layer seeing what it sees in the frozen model
    family = FAMILIES[name]
    inputs = family.inputs()
    model = get_peft_model(family.build(), NTKAttentionConfig(**ATTENTION)).eval()
    calibrate(model, [inputs], settings=CalibrationSettings(share=share))
    share = share or (0.15 if name in ENCODERS else 0.5)
    shares = {}
    with attention_function(naive_attention(family, inputs, shares=shares, with_prefix=False)):
        model(**inputs)
    assert len(shares) == len(adapters(model))
    for calls in shares.values():
        actual = of_real_tokens(calls, inputs).mean(dim=0)
        torch.testing.assert_close(actual, torch.full_like(actual, share), atol=0, rtol=1e-4)


@pytest.mark.parametrize(
    ("head_dim", "share", "step"), [(32, 0.5, 1.0), (64, 0.5, 1.0), (128, 0.3536, 0.7071), (256, 0.25, 0.5)]
)
def test_large_heads_start_smaller_and_take_smaller_steps(head_dim, share, step):
    """By default the share falls with the root of the size; steps do so with any share, those of log k as well."""
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**LLAMA, "head_dim": head_dim})).eval()
    model = get_peft_model(copy.deepcopy(base), NTKAttentionConfig(**ATTENTION)).eval()
    calibrate(model, [INPUTS], others=False)
    torch.testing.assert_close(prefix_shares(model, [INPUTS])[0].mean().item(), share, atol=1e-3, rtol=0)
    calibrate(model, [INPUTS], settings=SMALL, others=False)
    even = get_peft_model(base, NTKAttentionConfig(**ATTENTION)).eval()
    calibrate(even, [INPUTS], settings=replace(SMALL, large_head_dim=None), others=False)
    for own, other in zip(adapters(model), adapters(even), strict=True):
        torch.testing.assert_close(own.coordinates, step * other.coordinates, rtol=1e-3, atol=1e-6)
        assert own.unit == pytest.approx(step * other.unit, rel=1e-3)


def of_real_tokens(calls, inputs):
    """From [B, H, L, 1] of every call of one attention module to [N, H]."""
    masks = {x.shape[1]: x.bool() for name, x in inputs.items() if name.endswith("mask")}
    rows = []
    for share in calls:
        B, _, L, _ = share.shape
        rows.append(share.squeeze(-1).transpose(1, 2)[masks.get(L, torch.ones(B, L, dtype=torch.bool))])
    return torch.cat(rows)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "t5", "clip", "albert"])
@torch.no_grad()
def test_prefix_shares_against_naive(name):
    family = FAMILIES[name]
    inputs, shares = family.inputs(), {}
    model = get_peft_model(family.build(), NTKAttentionConfig(init_weights=False, **ATTENTION)).eval()
    actual = prefix_shares(model, [inputs])
    with attention_function(naive_attention(family, inputs, shares=shares)):
        model(**inputs)
    for layer, of_layer in zip(adapted_layers(model).values(), actual, strict=True):
        expected = of_real_tokens(shares[layer.get_base_layer()], inputs).mean(dim=0)
        torch.testing.assert_close(of_layer, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_start_changes_the_outputs_least():
    # of the first layer, whose inputs are those of the frozen model
    model = calibrated(**ATTENTION)
    attention = model.base_model.model.model.layers[0].self_attn
    outputs = []
    hook = attention.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    real = INPUTS["attention_mask"].bool()

    def change(Z=None):
        if Z is not None:
            adapters(model)[0].Z.copy_(Z)
        model(**INPUTS)
        with model.disable_adapter():
            model(**INPUTS)
        frozen, adapted = outputs.pop(), outputs.pop()
        return (adapted - frozen)[real].square().sum()

    start = adapters(model)[0].Z.clone()
    least = change()
    for other in (0 * start, 0.9 * start, 1.1 * start, start.flip(0), start + 0.1 * torch.randn_like(start)):
        assert change(other) > least
    assert change(0 * start) > 2 * least
    hook.remove()


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("vit", {}, [1.0, 0.1]),
        ("dinov2", {"layers_to_transform": [1]}, [0.1]),
        ("clip", {}, [1.0, 1.0, 1.0, 0.1]),  # the tower of text first
        ("bert", {}, [1.0, 1.0]),
        ("llama", {}, [1.0, 1.0]),
    ],
)
def test_steps_of_pictures_shrink_with_depth(name, options, steps):
    """Only the coordinates are smaller: the start is the same."""
    family = FAMILIES[name]

    def calibrated(**settings):
        model = get_peft_model(family.build(), NTKAttentionConfig(**ATTENTION, **options)).eval()
        calibrate(model, [family.inputs()], settings=CalibrationSettings(**settings))
        return model

    model, even = calibrated(), calibrated(last_picture_step=1.0)
    for adapter, other, step in zip(adapters(model), adapters(even), steps, strict=True):
        torch.testing.assert_close(adapter.coordinates, step * other.coordinates)
        torch.testing.assert_close(adapter.state_dict(), other.state_dict())


@every_option
def test_file_holds_plain_values(options, tmp_path):
    model = calibrated(**options)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("coordinates" in name for name in tensors)
    trained = [a.leading for a in adapters(model)]
    stored = [x for name, x in sorted(tensors.items()) if name.endswith(("ntk_states.Z", "ntk_states.Z_A"))]
    assert all(not torch.allclose(a, b) for a, b in zip(trained, stored, strict=True))
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert all(a.coordinates is None for a in adapters(loaded))
    assert relative_error(logits(loaded), expected) < 1e-5


@every_option
def test_loading_into_a_calibrated_model(options):
    source, target = adapted(**options), calibrated(batches=[repeats(0)], **options)
    assert relative_error(logits(target), logits(source)) > 1e-2
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    assert all(a.coordinates is not None for a in adapters(target))
    assert relative_error(logits(target), logits(source)) < 1e-3


@pytest.mark.parametrize(
    ("name", "side"),
    [("llama", "right"), ("llama", "left"), ("bert", "right"), ("t5", "right"), ("t5", "left")],
    ids=["llama-right", "llama-left", "bert-right", "t5-right", "t5-left"],
)
def test_padded_batch_against_each_item_alone(name, side):
    family = FAMILIES[name]
    inputs = family.inputs()
    for mask in [n for n in inputs if n.endswith("mask")]:
        inputs[mask][1] = inputs[mask][1].sort(descending=side == "right").values
    if name == "llama":  # phi sees the query after its rotation, so positions must count from the first real token
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    models = []
    for batches in ([inputs], [alone(inputs, item) for item in (0, 1)]):
        models.append(get_peft_model(family.build(), NTKAttentionConfig(**ATTENTION)).eval())
        calibrate(models[-1], batches, settings=SMALL)
    for padded, single in zip(*map(saved, models), strict=True):
        torch.testing.assert_close(padded["log_k"], single["log_k"])
        torch.testing.assert_close(padded["log_scale"], single["log_scale"])
    with torch.no_grad():
        padded, single = (family.run(model, inputs) for model in models)
    assert relative_error(padded, single) < 1e-3


def alone(inputs, item):
    """One item without its padding."""
    source, target = (inputs.get(m) for m in ("attention_mask", "decoder_attention_mask"))
    keep = {n: target if n.startswith("decoder") else source for n in inputs}
    return {n: x[item, keep[n][item].bool()][None] for n, x in inputs.items()}


def test_training_after_calibration_lowers_the_loss():
    model = calibrated().train()
    assert {name.rsplit(".", 1)[1] for name in trainable(model)} == {"Z_A", "Z_B", "log_k"}
    losses = losses_of_training(model, 5, 0.03)
    assert losses[-1] < losses[0]


def test_training_goes_on_after_loading_into_a_model_calibrated_alike():
    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    whole = calibrated()
    optimizer = torch.optim.AdamW(trainable(whole).values(), lr=0.03)
    steps(whole, optimizer, 3)
    adapter, moments = copy.deepcopy(get_peft_model_state_dict(whole)), copy.deepcopy(optimizer.state_dict())
    steps(whole, optimizer, 3)

    resumed = calibrated()
    set_peft_model_state_dict(resumed, adapter)
    optimizer = torch.optim.AdamW(trainable(resumed).values(), lr=0.03)
    optimizer.load_state_dict(moments)
    steps(resumed, optimizer, 3)
    assert relative_error(logits(resumed), logits(whole)) < 1e-3


def test_calibrating_twice_against_once():
    once, twice = calibrated(), calibrated(batches=[repeats(0)])
    assert relative_error(logits(twice), logits(once)) > 1e-2
    calibrate(twice, [INPUTS], settings=SMALL)
    assert relative_error(logits(twice), logits(once)) < 1e-4


@pytest.mark.parametrize("rank", [2, "auto"], ids=["another kind", "the same kind"])
def test_only_the_named_adapter_changes(rank):
    """Others of its kind train in its coordinates from then on, and compute what they did."""
    model = adapted(adapter_name="first")
    model.add_adapter("second", NTKAttentionConfig(rank=rank))
    function = logits(model)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    modes = {}
    for index, (name, module) in enumerate(model.named_modules()):
        module.training = modes[name] = index % 2 == 0
    calibrate(model, iter([INPUTS]), adapter_name="second")
    changed = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    assert changed
    assert all(".second." in name or (rank == "auto" and ".first." in name) for name in changed)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.active_adapters == ["first"]
    assert relative_error(logits(model.eval()), function) <= (1e-5 if rank == "auto" else 0)
    assert not CALLS.watchers
    assert not CALLS.resting


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype_of_the_base_against_float32(dtype):
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    for actual, expected in zip(saved(calibrated(tiny(dtype))), saved(calibrated()), strict=True):
        assert relative_error(actual["log_k"], expected["log_k"]) < tolerance
        assert relative_error(actual["log_scale"], expected["log_scale"]) < tolerance
        assert all(x.dtype == torch.float32 and torch.isfinite(x).all() for x in actual.values())


def test_copy_keeps_the_coordinates():
    model = calibrated()
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    for a, b in zip(adapters(other), adapters(model), strict=True):
        assert torch.equal(a.coordinates, b.coordinates)
        assert a.coordinates is not b.coordinates


NO_TOKENS = {**INPUTS, "attention_mask": torch.zeros_like(INPUTS["attention_mask"])}


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"batches": []}, "no batches"),
        ({}, {"batches": [NO_TOKENS]}, "padding"),
        ({}, {"settings": 0.1}, "settings must be CalibrationSettings, got 0.1"),
        ({}, {"settings": CalibrationSettings(max_bytes=2**10)}, "at most 9.54e-07 are expected"),
        ({}, {"adapter_name": "other"}, "no NTK-Attention adapter 'other'"),
        ({}, {"adapter_name": ["default"]}, r"adapter_name must be the name of one adapter, got \['default'\]"),
        ({}, {"others": 5}, "others is an int: expected a list"),
        ({}, {"others": [{"input_ids": "text"}]}, "batch 0 of others holds a str"),
        ({"constant_feature": False}, {}, "constant"),
    ],
    ids=[
        "no batches",
        "padding alone",
        "no settings",
        "too large",
        "no such adapter",
        "several adapters",
        "no other inputs",
        "other inputs in words",
        "no constant feature",
    ],
)
def test_what_calibrate_refuses(options, arguments, message):
    model = adapted(**options)
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        calibrate(model, **{"batches": [INPUTS], **arguments})
    assert torch.equal(logits(model), before)


def test_inference_mode_is_refused():
    """What is made there can never be trained."""
    model = adapted()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inside torch.inference_mode\(\)"):
        calibrate(model, [INPUTS])
    calibrate(model, [INPUTS])
    loss_of(model.train()).backward()


@pytest.mark.parametrize("options", [{}, {"feed_forward_rank": 2}], ids=["attention", "feed-forward"])
@pytest.mark.parametrize("part", ["self_attn.v_proj", "self_attn.q_proj", "mlp.up_proj"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_computes_nan_is_refused(part, value, options):
    base = tiny()
    base.model.layers[0].get_submodule(part).weight.data[0, 0] = value
    model = adapted(base, **options)
    before = copy.deepcopy(saved(model))
    with pytest.raises(ValueError, match=r"computes NaN or inf in base_model.model.model.layers.\d.self_attn"):
        calibrate(model, [INPUTS], others=False)
    torch.testing.assert_close(saved(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["four dimensions", "by kind of layer"])
def test_masks_of_another_kind_against_padding(kind):
    """They hide keys; a row of padding that sees a token counts, so that padding is to the left here."""
    ids = INPUTS["input_ids"][:, :6]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    name = "gemma2" if kind == "by kind of layer" else "llama"
    visible = torch.ones(6, 6, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
    full = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    masks = full
    if kind == "by kind of layer":
        far = ~torch.ones(6, 6, dtype=torch.bool).triu(-3)
        sliding = full.masked_fill(far, torch.finfo(torch.float32).min)
        masks = {"full_attention": full, "sliding_attention": sliding}
    found = []
    for attention_mask in (mask, masks):
        model = get_peft_model(FAMILIES[name].build(), NTKAttentionConfig(**ATTENTION)).eval()
        calibrate(model, [{"input_ids": ids, "attention_mask": attention_mask}], settings=SMALL, others=False)
        found.append(saved(model))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual["log_k"], expected["log_k"])


def test_model_without_an_adapter_is_refused():
    with pytest.raises(ValueError, match="call get_peft_model first"):
        calibrate(tiny(), [INPUTS])


def test_other_inputs_widen_what_is_whitened():
    """Queries of more kinds vary more, so that coordinates are smaller."""
    random = {"input_ids": torch.randint(3, 16, (16, 15), generator=torch.Generator().manual_seed(1))}
    narrow, wide = (calibrated(batches=[repeats(0)], others=kind) for kind in (False, [random]))
    for first, second in zip(adapters(narrow), adapters(wide), strict=True):
        before, after = (x.coordinates[:, :-1, :-1].square().sum() for x in (first, second))
        assert after < before


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "t5"])
def test_other_inputs_of_every_kind_of_model(name):
    """By default a language model also sees what it writes itself, and any other the batches alone."""
    family, starts = FAMILIES[name], []
    for others in (True, False):
        model = get_peft_model(family.build(), NTKAttentionConfig(**ATTENTION)).eval()
        calibrate(model, [family.inputs()], others=others)
        starts.append(torch.stack([adapter.coordinates for adapter in adapters(model)]))
    assert torch.equal(*starts) == (name != "llama")

"""The PEFT method as PEFT tests its own: training, files, several adapters, options, other ways in, and what is refused."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from ntk_attention import NTKAttentionConfig, PrefixState, ntk_attention
from ntk_attention.layer import NTKAttentionLayer

from .families import BERT, FAMILIES, LLAMA
from .reference import relative_error

TINY = FAMILIES["llama"]
INPUTS = TINY.inputs(torch.float32)
FILE = "adapter_model.safetensors"


def tiny(dtype=torch.float32):
    return TINY.build(dtype=dtype)


def classifier():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **BERT, num_labels=3)).eval()


def adapted(base=None, adapter_name="default", **options):
    base = tiny() if base is None else base
    config = NTKAttentionConfig(**{"init_weights": False, "task_type": "CAUSAL_LM", **options})
    torch.manual_seed(2)
    return get_peft_model(base, config, adapter_name=adapter_name).eval()


@torch.no_grad()
def logits(model, inputs=INPUTS):
    return TINY.run(model, inputs)


def adapters(model, name="default"):
    return [layer[name] for layer in model.modules() if isinstance(layer, NTKAttentionLayer)]


def loss_of(model, inputs=INPUTS):
    return model(**inputs, labels=inputs["input_ids"]).loss


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.randint(3, 64, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def train(folder, steps, resume=None):
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = adapted(init_weights=True)
    trainer = Trainer(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences())
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer.state.log_history


def test_trainer_resumes_from_its_checkpoint(tmp_path):
    whole, history = train(tmp_path / "whole", steps=4)
    train(tmp_path / "parts", steps=2)
    resumed, _ = train(tmp_path / "parts", steps=4, resume=str(tmp_path / "parts" / "checkpoint-2"))
    assert (tmp_path / "whole" / "checkpoint-4" / FILE).exists()
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]
    for name, parameter in trainable(resumed).items():
        torch.testing.assert_close(parameter, trainable(whole)[name])


def test_loop_by_hand_lowers_the_loss():
    model = adapted(init_weights=True).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = loss_of(model)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in before.items())


@pytest.mark.parametrize("init_weights, moves", [(True, True), ("published", False)], ids=["default", "published"])
def test_log_k_trains_by_default_and_not_as_published(init_weights, moves):
    model = adapted(init_weights=init_weights)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
    before = copy.deepcopy(adapters(model))
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    for old, new in zip(before, adapters(model), strict=True):
        assert (not torch.equal(new.log_k, old.log_k)) == moves
        assert not torch.equal(new.Z, old.Z)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_against_none(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        base = tiny()
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model = adapted(base).train()
        loss_of(model).backward()
        gradients.append({n: p.grad for n, p in trainable(model).items()})
        assert base.is_gradient_checkpointing == checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
        assert gradient.abs().max() > 0


def test_bfloat16_base_keeps_a_float32_adapter():
    model = adapted(tiny(torch.bfloat16)).train()
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "ntk_states" not in n} == {torch.bfloat16}
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    loss = loss_of(model)
    loss.backward()
    torch.optim.AdamW(trainable(model).values(), lr=0.01).step()
    assert all(p.dtype == torch.float32 and not torch.equal(p, before[n]) for n, p in trainable(model).items())
    assert relative_error(logits(adapted(tiny(torch.bfloat16))), logits(adapted())) < 0.1


def test_autocast_against_float32():
    model = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = logits(model)
        loss_of(model).backward()
    assert relative_error(actual, logits(model)) < 0.1
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in trainable(model).values())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_compile_fullgraph_against_none(implementation):
    model = adapted(TINY.build(implementation, torch.float32))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**INPUTS).logits, model(**INPUTS).logits)
    loss_of(compiled).backward()
    gradients = [p.grad.clone() for p in trainable(model).values()]
    model.zero_grad()
    loss_of(model).backward()
    torch.testing.assert_close(gradients, [p.grad for p in trainable(model).values()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_model_to_another_dtype(dtype):
    model = adapted()
    expected = logits(model)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert relative_error(logits(model), expected) < (1e-5 if dtype == torch.float64 else 0.1)


def test_saved_folder(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".md") == ["adapter_config.json", FILE]
    tensors = load_file(tmp_path / FILE)
    assert len(tensors) == 2 * 3 and sum(name.endswith(".Z") for name in tensors) == 2
    assert torch.equal(tensors["base_model.model.model.layers.1.self_attn.ntk_states.Z"], adapters(model)[1].Z)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "NTK_ATTENTION"
    assert config["geometry"] == {"num_modules": 2, "sizes": [[4, 2, 8, 8]]}


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
    assert torch.equal(logits(loaded), expected)
    assert not trainable(loaded)
    again = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    assert trainable(again).keys() == trainable(model).keys()


@every_option
def test_training_step_with(options):
    model = adapted(**{**options, "init_weights": True}).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trainable(model).keys()


def test_directions_of_positive_random_come_from_the_file(tmp_path):
    model = adapted(**OPTIONS["positive random"])
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.feature_map.projection.mul_(0.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(model), logits(adapted(**OPTIONS["positive random"])))


def test_modules_to_save(tmp_path):
    model = get_peft_model(classifier(), NTKAttentionConfig(task_type="SEQ_CLS", init_weights=False))
    inputs = {"input_ids": INPUTS["input_ids"], "attention_mask": INPUTS["attention_mask"].flip(1)}
    assert any("classifier" in name for name in trainable(model))
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05)
    loss = model(**inputs, labels=torch.tensor([0, 2])).loss
    loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    assert any("classifier" in name for name in load_file(tmp_path / FILE))
    base = classifier()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        weight = loaded.base_model.model.classifier.modules_to_save["default"].weight
        assert not torch.equal(weight, classifier().classifier.weight)
        frozen = classifier()(**inputs).logits
        with loaded.disable_adapter():
            assert torch.equal(loaded(**inputs).logits, frozen)
        assert torch.equal(loaded.unload()(**inputs).logits, frozen)


def test_auto_peft_model(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "change",
    [{"num_attention_heads": 8}, {"num_hidden_layers": 3}, {"num_key_value_heads": 4}, {"head_dim": 4}],
    ids=lambda change: next(iter(change)),
)
def test_adapter_of_another_base_is_refused(change, tmp_path):
    adapted().save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**LLAMA, **change}))
    keys = list(other.state_dict())
    with pytest.raises(ValueError, match="the adapter was made for"):
        PeftModel.from_pretrained(other, tmp_path)
    assert list(other.state_dict()) == keys


def truncate(folder):
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: len(content) // 2])


def poison(folder):
    tensors = load_file(folder / FILE)
    next(t for name, t in tensors.items() if name.endswith("Z"))[0, 0, 0] = torch.nan
    save_file(tensors, folder / FILE)


def reshape(folder):
    save_file({n: t[:2].clone() for n, t in load_file(folder / FILE).items()}, folder / FILE)


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (truncate, SafetensorError, "incomplete"),
        (poison, ValueError, "NaN"),
        (reshape, ValueError, "in the adapter file"),
        (lambda folder: (folder / FILE).unlink(), ValueError, "Can't find weights"),
        (lambda folder: (folder / "adapter_config.json").unlink(), ValueError, "Can't find 'adapter_config.json'"),
    ],
    ids=["truncated", "NaN", "other shape", "no tensors", "no config"],
)
def test_damaged_folder_is_refused(damage, error, message, tmp_path):
    adapted().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(tiny(), tmp_path)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="adapter_config.json"):
        PeftModel.from_pretrained(tiny(), tmp_path / "nothing")


def two_adapters():
    model = adapted(adapter_name="first")
    model.add_adapter("second", NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM"))
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
    model = two_adapters()
    model.base_model.set_adapter(["first", "second"])
    actual = logits(model)
    assert {name.split(".")[-2] for name in trainable(model)} == {"first", "second"}
    total = adapted()
    with torch.no_grad():
        for sum_, a, b in zip(adapters(total), adapters(model, "first"), adapters(model, "second"), strict=True):
            sum_.Z.copy_(a.Z + b.Z)
            sum_.log_k.copy_(torch.log(a.log_k.exp() + b.log_k.exp()))
    assert relative_error(actual, logits(total)) < 1e-4


@pytest.mark.parametrize("deleted, left", [("first", "second"), ("second", "first")], ids=["active", "inactive"])
def test_delete_adapter(deleted, left):
    model = two_adapters()
    model.set_adapter(left)
    expected = logits(model)
    model.set_adapter("first")
    model.delete_adapter(deleted)
    assert list(model.peft_config) == [left] and model.active_adapters == [left]
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
            adapter.Z.add_(1.0)
    assert torch.equal(logits(model), expected) and not torch.equal(logits(other), expected)
    assert torch.equal(logits(other.unload()), logits(tiny()))
    assert torch.equal(logits(model), expected)


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
    assert status.enabled is True and status.active_adapters == ["default"] and status.num_adapter_layers == 2
    r = 8 + 1
    assert model.get_nb_trainable_parameters()[0] == 2 * 4 * (r * 8 + r)


def test_rank_against_the_full_product():
    model, full = adapted(rank=3), adapted()
    with torch.no_grad():
        for low, adapter in zip(adapters(model), adapters(full), strict=True):
            assert low.Z_A.shape == (4, 9, 3) and low.Z_B.shape == (4, 3, 8)
            adapter.Z.copy_(low.Z_A @ low.Z_B)
            adapter.log_k.copy_(low.log_k)
    assert relative_error(logits(model), logits(full)) < 1e-5


def test_state_per_kv_head_against_repeated_states():
    model, full = adapted(state_heads="kv"), adapted()
    with torch.no_grad():
        for shared, adapter in zip(adapters(model), adapters(full), strict=True):
            assert shared.Z.shape == (2, 9, 8)
            adapter.Z.copy_(shared.Z.repeat_interleave(2, dim=0))
            adapter.log_k.copy_(shared.log_k.repeat_interleave(2, dim=0))
    assert relative_error(logits(model), logits(full)) < 1e-5


@pytest.mark.parametrize(
    "options, layers",
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
    "options, message",
    [
        ({"feature_map": "cosine"}, "unknown feature map"),
        ({"feature_map": "taylor", "feature_map_options": {"degree": 3}}, "even degree"),
        ({"feature_map": "elu", "feature_map_options": {"degree": 2}}, "does not take"),
        ({"feature_map": "positive_random", "feature_map_options": {"num_features": 0}}, "num_features"),
        ({"rank": 0}, "rank"),
        ({"rank": 2.0}, "rank"),
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


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused(merge):
    model = adapted()
    expected = logits(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        getattr(model, merge)()
    assert torch.equal(logits(model), expected)

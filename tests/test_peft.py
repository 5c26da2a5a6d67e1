"""The PEFT method as PEFT tests its own: training, files, several adapters, other ways in, and what is refused."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from ntk_attention import NTKAttentionConfig
from ntk_attention.adapter_folder import AdapterError
from ntk_attention.calls import during_calls
from ntk_attention.geometry import Geometry
from ntk_attention.layer import ranks_of, settle_ranks
from ntk_attention.observation import adapted_layers

from .families import ATTENTION, BERT, ENCODERS, FAMILIES, LLAMA
from .reference import relative_error
from .tiny import (
    INPUTS,
    TINY,
    adapted,
    adapters,
    logits,
    loss_of,
    skip_unless_transformers_takes_this_peft,
    tiny,
    trainable,
)

FILE = "adapter_model.safetensors"


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
    assert len(losses) == 2
    assert losses[1] < losses[0]
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


def test_autocast_keeps_the_prefix_in_float32():
    """As Trainer(bf16=True) runs it, without a cache: against the model whose queries, keys and values are rounded."""
    model = adapted()
    inputs = {**INPUTS, "use_cache": False}
    seen = []

    def watch(query, context, prefix, factor):
        seen.append((query.dtype, prefix.out.dtype))

    watchers = dict.fromkeys(adapted_layers(model).values(), watch)
    with during_calls(watchers=watchers), torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs)
    assert seen == [(torch.bfloat16, torch.float32)] * 2


def test_a_config_can_be_used_again(tmp_path):
    """The model fills in the object that it got, for itself: each saves what it is, whatever came after it."""
    config = NTKAttentionConfig(task_type="CAUSAL_LM", init_weights=False)
    first = get_peft_model(tiny(), config).eval()
    assert first.peft_config["default"] is config
    target_modules, geometry = config.target_modules, config.geometry
    second = get_peft_model(FAMILIES["gpt2"].build(), config)
    assert second.peft_config["default"] is config
    assert (config.target_modules, config.geometry) != (target_modules, geometry)
    first.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert loaded.peft_config["default"].geometry == geometry
    assert torch.equal(logits(loaded.eval()), logits(first))


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
    assert len(tensors) == 2 * 6
    inside, second = "base_model.model.model.layers.1.self_attn.ntk_states", adapters(model)[1]
    assert torch.equal(tensors[f"{inside}.Z_A"], second.Z_A)
    assert torch.equal(tensors[f"{inside}.feed_forward.Z_B"], second.feed_forward.Z_B)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "NTK_ATTENTION"
    assert config["geometry"] == {"num_modules": 2, "sizes": [[4, 2, 8, 8, 32]]}


def classifier():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **BERT, num_labels=3)).eval()


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
        with loaded.disable_adapter():
            assert torch.equal(loaded(**inputs).logits, classifier()(**inputs).logits)


def test_files_hold_ranks_as_numbers(tmp_path):
    """So that an adapter can be loaded when "auto" has come to mean others."""
    model, config = tiny(), NTKAttentionConfig(task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    adapter = adapters(model)[0]
    assert (stored["rank"], stored["feed_forward_rank"]) == (adapter.Z_A.shape[2], adapter.feed_forward.rank)


@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_by_default(tmp_path, name):
    """Low beside feed-forward blocks with a prefix; encoders have none there unless it is asked for."""
    family = FAMILIES[name]
    model = get_peft_model(family.build(), NTKAttentionConfig(init_weights=False))
    config = model.peft_config["default"]
    assert (config.rank, config.feed_forward_rank) == ((None, None) if name in ENCODERS else (1, 3))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.build(), tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    asked = get_peft_model(family.build(), NTKAttentionConfig(feed_forward_rank=3)).peft_config["default"]
    assert (asked.rank, asked.feed_forward_rank) == (1, 3)


@pytest.mark.parametrize("sizes", [(8, 8), (8, 64)])
def test_ranks_that_no_number_fits_stay(sizes):
    geometries = [Geometry(4, 2, d, d, width) for d, width in zip(sizes, (32, 0), strict=True)]
    config = NTKAttentionConfig()
    settle_ranks(config, geometries)
    assert config.rank == ("auto" if sizes == (8, 64) else 1)
    assert config.feed_forward_rank == ranks_of(NTKAttentionConfig(), geometries[0])[1] == 3  # the other has no block


@pytest.mark.parametrize(
    ("auto", "task", "head"),
    [
        (AutoModelForTokenClassification, "TOKEN_CLS", "classifier"),
        (AutoModelForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
    ],
    ids=["tokens", "questions"],
)
def test_other_heads_train_and_come_back(auto, task, head, tmp_path):
    def base():
        torch.manual_seed(0)
        return auto.from_config(AutoConfig.for_model("bert", **BERT))

    config = NTKAttentionConfig(task_type=task, init_weights=False)
    model = get_peft_model(base(), config).eval()
    assert {name.split(".")[2] for name in trainable(model)} == {"bert", head}
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    inputs = {"input_ids": INPUTS["input_ids"]}
    assert torch.equal(model(**inputs)[0], loaded(**inputs)[0])


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
    next(t for name, t in tensors.items() if name.endswith("ntk_states.Z_A"))[0, 0, 0] = torch.nan
    save_file(tensors, folder / FILE)


def reshape(folder):
    save_file({n: t[:2].clone() for n, t in load_file(folder / FILE).items()}, folder / FILE)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (truncate, AdapterError, "safetensors is damaged: .*incomplete"),
        (poison, AdapterError, "NaN"),
        (reshape, AdapterError, "in the adapter file"),
        (lambda folder: (folder / FILE).unlink(), AdapterError, "has no adapter_model.safetensors"),
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
    with pytest.raises(ValueError, match="Can't find 'adapter_config"):
        PeftModel.from_pretrained(tiny(), tmp_path / "nothing")


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
    heads, d, r, rank, D, in_block = 4, 8, 8 + 1, 8 // 8, 32, 3
    in_attention = heads * (r * rank + rank * d + r)
    assert model.get_nb_trainable_parameters()[0] == 2 * (in_attention + 2 * D * in_block)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused(merge):
    model = adapted()
    expected = logits(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        getattr(model, merge)()
    assert torch.equal(logits(model), expected)


def test_unmerging_is_refused():
    with pytest.raises(ValueError, match="never merged"):
        adapted().unmerge_adapter()

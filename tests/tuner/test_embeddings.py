"""Tokens added to a model: its embeddings are saved beside the adapter, and come back, as with LoRA."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments

from ntk_attention import NTKAttentionConfig
from ntk_attention.tuner.untrusted import AdapterError
from tests.families import FAMILIES

OLD, NEW = 64, 66  # tokens
IDS = torch.randint(3, NEW, (4, 9), generator=torch.Generator().manual_seed(0))
EMBEDDINGS = ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]
FILE = "adapter_model.safetensors"
METHODS = {
    "lora": LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"]),
    "ntk": NTKAttentionConfig(task_type="CAUSAL_LM", init_weights=False),
}
both_methods = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    """Of a base model with the old tokens."""
    folder = tmp_path_factory.mktemp("base")
    model = FAMILIES["llama"].build(dtype=torch.float32)
    model.config.tie_word_embeddings = request.param
    LlamaForCausalLM(model.config).save_pretrained(folder)
    return folder


def resized(folder, seed=5, tokens=NEW):
    """The base model, whose new tokens have random embeddings."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[OLD:] = torch.randn(tokens - OLD, model.config.hidden_size)
    return model.eval()


def adapted(base, config, **changes):
    torch.manual_seed(7)
    return get_peft_model(base, type(config)(**{**own_options(config), **changes})).eval()


def own_options(config):
    names = ("task_type", "init_lora_weights", "init_weights")
    options = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return options | ({"target_modules": ["q_proj"]} if isinstance(config, LoraConfig) else {})


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(input_ids=ids).logits


@both_methods
@pytest.mark.parametrize("save", ["auto", True])
def test_saved_embeddings_come_back(folder, tmp_path, config, save):
    model = adapted(resized(folder), config)
    model.save_pretrained(tmp_path, save_embedding_layers=save)
    assert set(EMBEDDINGS) & set(load_file(tmp_path / FILE))
    loaded = PeftModel.from_pretrained(resized(folder, seed=6), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@both_methods
def test_embeddings_that_are_not_saved(folder, tmp_path, config):
    model = adapted(resized(folder), config)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert not set(EMBEDDINGS) & set(load_file(tmp_path / FILE))
    other = PeftModel.from_pretrained(resized(folder, seed=6), tmp_path)
    old = IDS.clamp_max(OLD - 1)
    assert torch.equal(logits(other, old)[..., :OLD], logits(model, old)[..., :OLD])
    assert not torch.equal(logits(other), logits(model))
    without = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    assert torch.equal(logits(without, old), logits(model, old)[..., :OLD])


@both_methods
def test_embeddings_saved_of_a_model_that_was_not_resized(folder, tmp_path, config):
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = adapted(base, config)
    with torch.no_grad():
        base.get_input_embeddings().weight.add_(0.1)
    ids = IDS.clamp_max(OLD - 1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@both_methods
def test_load_adapter_brings_embeddings(folder, tmp_path, config):
    model = adapted(resized(folder), config)
    model.save_pretrained(tmp_path)
    other = adapted(resized(folder, seed=6), config)
    result = other.load_adapter(tmp_path, "two")
    assert not result.unexpected_keys
    other.set_adapter("two")
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize(("tokens", "damage"), [(OLD, None), (NEW + 1, None), (NEW, "nan"), (NEW, "another module")])
def test_embeddings_that_do_not_fit_are_refused(folder, tmp_path, tokens, damage):
    adapted(resized(folder), METHODS["ntk"]).save_pretrained(tmp_path, save_embedding_layers=True)
    tensors = load_file(tmp_path / FILE)
    if damage == "nan":
        tensors[EMBEDDINGS[1]][0, 0] = torch.nan
    if damage == "another module":
        tensors["base_model.model.model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32)
    save_file(tensors, tmp_path / FILE)
    base = AutoModelForCausalLM.from_pretrained(folder) if tokens == OLD else resized(folder, seed=6, tokens=tokens)
    before = {name: x.clone() for name, x in base.state_dict().items()}
    named = "up_proj" if damage == "another module" else "embed_tokens|lm_head"
    with pytest.raises(AdapterError, match=named):
        PeftModel.from_pretrained(base, tmp_path)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], x) for name, x in before.items())


def trainer(folder, out, config, steps, **options):
    data = [{"input_ids": ids, "labels": ids} for ids in IDS]
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(adapted(resized(folder), config), arguments, train_dataset=data, eval_dataset=data)


@pytest.mark.slow
@both_methods
def test_trainer_resumes(folder, tmp_path, config):
    whole = trainer(folder, tmp_path / "whole", config, 4)
    whole.train()
    trainer(folder, tmp_path / "parts", config, 2).train()
    resumed = trainer(folder, tmp_path / "parts", config, 4)
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(logits(resumed.model), logits(whole.model), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@both_methods
def test_trainer_loads_the_best_model(folder, tmp_path, config):
    trained = trainer(folder, tmp_path, config, 4, load_best_model_at_end=True)
    trained.train()
    best = PeftModel.from_pretrained(resized(folder, seed=6), trained.state.best_model_checkpoint)
    assert torch.equal(logits(trained.model), logits(best))


@both_methods
@pytest.mark.parametrize("saved", [["embed_tokens"], ["embed_tokens", "lm_head"]], ids="-".join)
def test_embeddings_that_train(folder, tmp_path, config, saved):
    base = resized(folder)
    if base.config.tie_word_embeddings:
        pytest.skip("PEFT unties what is copied")
    model = adapted(base, config, modules_to_save=saved)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model.get_input_embeddings()
    assert not torch.equal(trained.modules_to_save["default"].weight, trained.original_module.weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(resized(folder, seed=6), tmp_path)
    if "lm_head" not in saved:  # what does not train is of the base, and saved all the same
        assert EMBEDDINGS[0] in load_file(tmp_path / FILE)
    assert torch.equal(logits(loaded), logits(model))


@both_methods
def test_auto_peft_model(model_folder, tmp_path, config):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    base.resize_token_embeddings(len(tokenizer))
    model = adapted(base, config)
    model.save_pretrained(tmp_path)
    ids = tokenizer("a<one>b<two>", return_tensors="pt")["input_ids"]
    assert {int(ids[0, 1]), int(ids[0, 3])} == {len(tokenizer) - 2, len(tokenizer) - 1}
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))

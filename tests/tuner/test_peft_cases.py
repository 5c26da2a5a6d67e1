"""What PEFT users do around an adapter: another method beside it, heads, towers, names, and files of another kind."""

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from ntk_attention import NTKAttentionConfig, calibrate
from ntk_attention.tuner.layer import NTKAttentionLayer
from tests.families import BART, BERT, FAMILIES, LLAMA, SPECIAL, VIT, VOCABULARY
from tests.reference import relative_error
from tests.tiny import INPUTS, TINY, adapted, adapters, logits, loss_of, tiny

FILE = "adapter_model.safetensors"
LORA = LoraConfig(init_lora_weights=False, target_modules=["q_proj", "up_proj"])
NAMES = ["default", "lora"]  # of a LoRA adapter beside ours, whose name is "default"


def with_lora(name):
    base = tiny()
    torch.manual_seed(4)
    inject_adapter_in_model(LORA, base, adapter_name=name)
    return base.eval()


def lora_tensors(model):
    return {name: x for name, x in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("name", NAMES)
def test_file_of_an_adapter_beside_lora(name, tmp_path):
    model = adapted(with_lora(name))
    model.save_pretrained(tmp_path)
    alone = get_peft_model_state_dict(adapted())
    assert load_file(tmp_path / FILE).keys() == alone.keys()
    assert relative_error(logits(model), logits(adapted())) > 1e-2  # LoRA acts
    assert torch.equal(logits(PeftModel.from_pretrained(with_lora(name), tmp_path).eval()), logits(model))
    loaded = adapted(with_lora(name))
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    assert relative_error(logits(loaded), logits(model)) < 1e-6


def test_lora_that_took_the_name_is_refused(tmp_path):
    model = adapted()
    inject_adapter_in_model(LORA, model.get_base_model(), adapter_name="default")
    with pytest.raises(
        ValueError, match="'default' is the name of an NTK-Attention adapter and of a later one of LORA"
    ):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_both_files_on_a_plain_base(tmp_path):
    model = adapted(with_lora("lora"))
    model.save_pretrained(tmp_path)
    base = tiny()
    inject_adapter_in_model(LORA, base, adapter_name="lora")
    result = set_peft_model_state_dict(base, load_file(tmp_path / "lora" / FILE), adapter_name="lora")
    assert not result.unexpected_keys
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path).eval()), logits(model))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("both", [False, True], ids=["ours", "both"])
def test_training_beside_lora(name, both, tmp_path):
    model = adapted(with_lora(name), init_weights=True).train()
    before = {n: x.detach().clone() for n, x in model.named_parameters()}
    for parameter in lora_tensors(model).values():
        assert not parameter.requires_grad
        parameter.requires_grad_(both)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss = loss_of(model)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    changed = {n for n, x in model.named_parameters() if not torch.equal(x, before[n])}
    assert changed == {n for n, x in model.named_parameters() if x.requires_grad}
    assert any("lora_" in n for n in changed) == both
    model.eval().save_pretrained(tmp_path)
    base = with_lora(name)
    base.load_state_dict(lora_tensors(model.get_base_model()), strict=False)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path).eval()), logits(model))


@pytest.mark.parametrize("name", NAMES)
def test_resting_and_removing_beside_lora(name):
    expected = logits(with_lora(name))
    model = adapted(with_lora(name))
    active = logits(model)
    model.add_adapter("other", NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM"))
    model.set_adapter("other")
    assert relative_error(logits(model), active) > 1e-3
    model.set_adapter("default")
    assert torch.equal(logits(model), active)
    model.delete_adapter("other")
    assert torch.equal(logits(model), active)
    calibrate(model, [INPUTS])
    base = model.unload()
    assert not any(isinstance(module, NTKAttentionLayer) for module in base.modules())
    assert any(isinstance(module, LoraLayer) for module in base.modules())
    assert torch.equal(logits(base), expected)


def classifier(kind):
    """A classifier, and inputs of it."""
    torch.manual_seed(0)
    if kind == "vit":
        model = AutoModelForImageClassification.from_config(AutoConfig.for_model("vit", **VIT, num_labels=3))
        return model.eval(), {"pixel_values": torch.randn(2, 3, VIT["image_size"], VIT["image_size"])}
    options = {"bert": BERT, "roberta": {**BERT, **SPECIAL}, "bart": {**BART, "max_position_embeddings": 64}}[kind]
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **options, num_labels=3))
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = SPECIAL["eos_token_id"]
    return model.eval(), {"input_ids": ids}


@pytest.mark.parametrize("method", ["lora", "ntk"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "bart", "vit"])
def test_unload_keeps_the_trained_head(kind, method, tmp_path):
    """As a head of one module, also one of several: the base of before with the head that was trained."""
    base, inputs = classifier(kind)
    head = "classification_head" if kind == "bart" else "classifier"
    target = {"bert": "query", "roberta": "query", "bart": "q_proj", "vit": r".*\.(query|q_proj)"}[kind]
    target = target if kind == "vit" else [target]
    task = None if kind == "vit" else "SEQ_CLS"
    if method == "lora":
        config = LoraConfig(task_type=task, target_modules=target, modules_to_save=[head], init_lora_weights=False)
    else:
        config = NTKAttentionConfig(task_type=task, modules_to_save=[head], init_weights=False)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    trained = {
        name.rpartition("modules_to_save.default.")[2]: x.clone()
        for name, x in model.state_dict().items()
        if "modules_to_save.default" in name
    }
    plain, _ = classifier(kind)
    names = plain.state_dict().keys()
    plain.get_submodule(head).load_state_dict(trained)
    unloaded = model.unload()
    assert unloaded.state_dict().keys() == names
    with torch.no_grad():
        assert torch.equal(unloaded(**inputs).logits, plain(**inputs).logits)
    unloaded.save_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "bart", "t5"])
def test_attention_weights_are_given_or_refused(family):
    """With an adapter that acts: the weights of the real tokens, which the prefix leaves a part, or an error."""
    family = FAMILIES[family]
    base = family.build("eager", torch.float32)
    inputs = family.inputs(torch.float32, padded=False)
    with torch.no_grad():
        expected = base(**inputs, output_attentions=True)
        model = get_peft_model(base, NTKAttentionConfig(init_weights=False)).eval()
        with model.disable_adapter():
            disabled = model(**inputs, output_attentions=True)
    fields = [name for name in expected if name.endswith("attentions")]
    assert fields
    for name in fields:
        torch.testing.assert_close(disabled[name], expected[name])
    try:
        actual = model(**inputs, output_attentions=True)
    except ValueError as error:
        assert "output_attentions" in str(error)  # noqa: PT017  # or the weights below
        return
    for name in fields:
        assert [weights.shape for weights in actual[name]] == [weights.shape for weights in expected[name]]
        for weights, without in zip(actual[name], expected[name], strict=True):
            total = weights.sum(dim=-1)
            assert ((total > 0) & (total < 1)).all()
            assert not (weights * (without == 0)).any()  # of hidden tokens


TEXT = {**LLAMA, "initializer_range": 0.2}
TOWER = {**VIT, "num_attention_heads": 2}


def vision_language_model(kind):
    torch.manual_seed(0)
    text, vision = {
        "llava": ({"model_type": "llama", **TEXT}, {"model_type": "clip_vision_model", **TOWER}),
        "gemma3": (
            {"model_type": "gemma3_text", "sliding_window": 6, **TEXT},
            {"model_type": "siglip_vision_model", **TOWER},
        ),
    }[kind]
    options = {"vision_feature_layer": -1} if kind == "llava" else {"mm_tokens_per_image": 9}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, image_token_index=5, **options)
    return AutoModelForImageTextToText.from_config(config).eval()


def adapted_places(model):
    return {name for name, module in model.named_modules() if isinstance(module, NTKAttentionLayer)}


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
@pytest.mark.parametrize(
    "excluded",
    [r".*vision_tower.*", ["vision_tower"], "every name"],
    ids=["regex", "tower", "names"],
)
def test_a_tower_is_left_out(kind, excluded):
    """By a regex, by its own name and by those of its attention modules; calibration has no need of pictures then."""
    ids = torch.randint(8, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    if excluded == "every name":
        whole = adapted_places(get_peft_model(vision_language_model(kind), NTKAttentionConfig()))
        names = [name.removeprefix("base_model.model.").removesuffix(".ntk_states") for name in whole]
        excluded = [name for name in names if "vision" in name]
        assert excluded
    config = NTKAttentionConfig(task_type="CAUSAL_LM", exclude_modules=excluded)
    try:
        model = get_peft_model(vision_language_model(kind), config)
    except ValueError as error:
        assert excluded == ["vision_tower"]
        assert "vision_tower" in str(error)  # noqa: PT017  # or it works as below
        return
    places = adapted_places(model)
    assert places
    assert not [name for name in places if "vision" in name]
    calibrate(model, [{"input_ids": ids}])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_text_calibrates_what_it_reaches(kind, recwarn, caplog, capsys):
    """The tower stays as it was, and is named."""
    model = get_peft_model(vision_language_model(kind), NTKAttentionConfig(task_type="CAUSAL_LM"))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    ids = torch.randint(8, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    calibrate(model, [{"input_ids": ids}])
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed
    assert not [name for name in changed if "vision" in name]
    said = [str(warning.message) for warning in recwarn.list] + [record.getMessage() for record in caplog.records]
    said += list(capsys.readouterr())
    assert any("vision_tower" in message for message in said)


def check_adapter_name(name, folder):
    model = adapted(adapter_name=name)
    model.add_adapter("other", NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM"))
    model.eval().save_pretrained(folder)
    assert load_file(folder / name / FILE).keys() == get_peft_model_state_dict(adapted()).keys()
    loaded = PeftModel.from_pretrained(tiny(), folder / name, adapter_name=name).eval()
    assert torch.equal(logits(loaded), logits(model))
    result = loaded.load_adapter(folder / "other", "other")
    assert not result.unexpected_keys
    loaded.set_adapter("other")
    model.set_adapter("other")
    assert torch.equal(logits(loaded), logits(model))
    loaded.delete_adapter(name)
    assert torch.equal(logits(loaded), logits(model))
    assert len(adapters(loaded, "other")) == 2


@pytest.mark.parametrize("name", ["a", "ntk", "othe", "an other", "Adapter-2_b"])
def test_adapter_names(name, tmp_path):
    """Also those that are part of other names."""
    check_adapter_name(name, tmp_path)


@pytest.mark.parametrize(
    "name", ["ntk_states", "model", "layers", "0", "Z_A", "log_k", "self_attn", "keys", "training"]
)
def test_adapter_names_of_modules_and_attributes(name, tmp_path):
    """PEFT takes the adapter's name in the names of tensors for granted; torch has some itself. Refused, or right."""
    base = tiny()
    before = {n: type(module) for n, module in base.named_modules()}
    try:
        adapted(base, adapter_name=name)
    except ValueError as error:
        assert repr(name) in str(error)  # noqa: PT017  # or it works as others do
        assert before == {n: type(module) for n, module in base.named_modules()}
        assert torch.equal(logits(base), logits(tiny()))
        return
    check_adapter_name(name, tmp_path)


def test_a_pickle_is_not_written(tmp_path):
    """It could not be read: only safetensors are."""
    model = adapted()
    with pytest.raises(ValueError, match="safetensors"):
        model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert torch.equal(logits(model), logits(adapted()))
    model.save_pretrained(tmp_path / "adapter")  # and the model can still be saved
    assert (tmp_path / "adapter" / FILE).exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapter_in_the_dtype_of_the_model(dtype, tmp_path):
    base = TINY.build(dtype=dtype)
    model = get_peft_model(base, NTKAttentionConfig(task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    assert {x.dtype for x in get_peft_model_state_dict(model).values()} == {dtype}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TINY.build(dtype=dtype), tmp_path, autocast_adapter_dtype=False)
    assert {x.dtype for x in get_peft_model_state_dict(loaded).values()} == {dtype}
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))
    upcast = PeftModel.from_pretrained(TINY.build(dtype=dtype), tmp_path)
    assert {x.dtype for x in get_peft_model_state_dict(upcast).values()} == {torch.float32}

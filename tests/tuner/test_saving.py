"""The folder of an adapter: what is in it, that it comes back, and what is refused."""

import json
import math

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ntk_attention import NTKAttentionConfig
from ntk_attention.tuner.adapter import parameter_shapes, ranks_of, settled_ranks
from ntk_attention.tuner.geometry import Geometry, PartSize
from ntk_attention.tuner.untrusted import AdapterError
from tests.families import BERT, ENCODERS, FAMILIES, LLAMA
from tests.tiny import (
    INPUTS,
    adapted,
    adapters,
    logits,
    tiny,
    trainable,
)

FILE = "adapter_model.safetensors"


def block_of(width, hidden):
    """The parts of a gated block."""
    return (PartSize("gate", width, hidden), PartSize("up", width, hidden), PartSize("down", hidden, width))


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


def test_saved_folder(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".md") == ["adapter_config.json", FILE]
    tensors = load_file(tmp_path / FILE)
    assert len(tensors) == 2 * (4 + 2 * 3)
    inside, second = "base_model.model.model.layers.1.self_attn.ntk_states", adapters(model)[1]
    assert torch.equal(tensors[f"{inside}.Z_A"], second.Z_A)
    assert torch.equal(tensors[f"{inside}.feed_forward.up_proj_part.Z_B"], second.parts["up_proj_part"].Z_B)
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
    assert (stored["rank"], stored["feed_forward_rank"]) == (adapter.Z_A.shape[2], adapter.parts["up_proj_part"].rank)


@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_by_default(tmp_path, name):
    """As many numbers as a full Z, where the sizes allow it; encoders have prefixes of their blocks if asked for."""
    family = FAMILIES[name]
    model = get_peft_model(family.build(), NTKAttentionConfig(init_weights=False))
    config = model.peft_config["default"]
    if name in ENCODERS:
        assert (config.rank, config.feed_forward_rank) == (None, None)
    else:
        assert config.feed_forward_rank == (2 if name == "gpt_oss" else 1)
        assert 1 <= config.rank <= 3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.build(), tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    asked = get_peft_model(family.build(), NTKAttentionConfig(feed_forward_rank=3)).peft_config["default"]
    assert (asked.rank, asked.feed_forward_rank) == (2, 3)


def test_ranks_are_those_of_the_commonest_sizes():
    """Of modules that have a block, where some have none; a file holds numbers."""
    block = (PartSize("up_part", 32, 48), PartSize("down_part", 48, 32))
    small, large, alone = Geometry(4, 2, 8, 8, block), Geometry(4, 2, 64, 64, block), Geometry(4, 2, 16, 16)
    config = NTKAttentionConfig()
    for geometries in ([small, large, large], [large, alone, alone]):
        rank, in_block = ranks_of(config, large)
        assert settled_ranks(config, geometries) == {"rank": rank, "feed_forward_rank": in_block}
    assert settled_ranks(config, [alone]) == {"rank": None, "feed_forward_rank": None}
    assert settled_ranks(NTKAttentionConfig(rank=5), [alone, small])["rank"] == 5


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(9, 3, 64, 64, block_of(576, 1536)),
        Geometry(14, 2, 64, 64, block_of(896, 4864)),
        Geometry(32, 8, 64, 64, block_of(2048, 8192)),
        Geometry(32, 8, 128, 128, block_of(4096, 14336)),
        Geometry(4, 1, 256, 256, block_of(640, 2048)),
    ],
    ids=["smollm2-135m", "qwen2.5-0.5b", "llama-1b", "llama-8b", "gemma3-270m"],
)
def test_the_default_is_as_large_as_a_full_z(geometry):
    def size(**options):
        return sum(math.prod(shape) for shape in parameter_shapes(NTKAttentionConfig(**options), geometry).values())

    assert abs(size() / size(rank=None, feed_forward_rank=None) - 1) < 0.03


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

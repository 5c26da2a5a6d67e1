"""What is refused in the folder of an adapter, by file and field; and a short run of the fuzzer in fuzz.py."""

import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ntk_attention import NTKAttentionConfig
from ntk_attention.tuner.untrusted import CONFIG, FORMAT_VERSION, PICKLE, WEIGHTS, AdapterError
from tests.fuzz import Fuzzer
from tests.tiny import adapted, adapters, logits, tiny


def refuse(folder, message):
    base = tiny()
    expected, names = logits(base), list(base.state_dict())
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert list(base.state_dict()) == names
    assert torch.equal(logits(base), expected)
    model = adapted()
    expected = logits(model)
    with pytest.raises(AdapterError, match=message):
        model.load_adapter(folder, adapter_name="second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank", 2**40, "rank must be a positive integer up to"),
        ("rank", "2", "rank must be a positive integer up to"),
        ("constant_feature", 1, "constant_feature must be True or False, got 1"),
        ("target_modules", 3, "target_modules must be a list"),
        ("target_modules", "(a+)+$", "may take very long to match"),
        ("target_modules", "[", "target_modules is not a regex"),
        ("modules_to_save", ["(a|a)*"], "modules_to_save holds .*expected the name of a module"),
        ("modules_to_save", ["layers"], "modules_to_save and layers_to_transform leave was not found"),
        ("modules_to_save", ["self_attn"], "modules_to_save"),
        ("modules_to_save", ["nothing"], "modules_to_save holds 'nothing', but LlamaForCausalLM has no such module"),
        ("layers_to_transform", [0.5], "layers_to_transform must be a layer index"),
        ("feature_map", "cosine", "unknown feature map 'cosine'"),
        ("feature_map_options", {"degree": [2]}, "'degree' is a list of 1, expected an integer"),
        ("geometry", {"num_modules": 2}, "geometry must hold num_modules"),
        ("geometry", {"num_modules": 2, "sizes": [[4, 2, 8, 8]]}, "expected lists of five numbers"),
        ("format_version", 1, "format_version is 1, expected 4: the adapter was saved by another version"),
        ("format_version", 5, "format_version is 5, expected 4"),
        ("format_version", True, "format_version is True, expected 4"),
        ("format_version", None, "format_version is None, expected 4"),
        ("geometry", {"num_modules": 2, "sizes": [[8, 2, 8, 8, 32]]}, "the adapter was made for a model with"),
        ("auto_mapping", {"parent_library": "antigravity"}, "parent_library is 'antigravity'"),
        ("task_type", "NOTHING", "Invalid task type"),
        ("code", "print(1)", "unknown fields 'code': was the adapter made by a newer version"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_fields(field, value, message, tmp_path):
    adapted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, field: value}))
    refuse(tmp_path, f"{CONFIG}.*{message}")


def test_a_file_without_a_format_version(tmp_path):
    adapted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config.pop("format_version") == FORMAT_VERSION
    (tmp_path / CONFIG).write_text(json.dumps(config))
    refuse(tmp_path, f"{CONFIG}: there is no format_version, expected {FORMAT_VERSION}")


def test_a_config_is_of_the_present_format():
    with pytest.raises(ValueError, match="format_version must be 4, got 1"):
        NTKAttentionConfig(format_version=1)


def test_a_map_of_endless_features_is_refused_before_it_is_made(tmp_path):
    adapted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for name, options in (("taylor", {"degree": 2**40}), ("positive_random", {"num_features": 2**40})):
        changes = {"feature_map": name, "feature_map_options": options}
        (tmp_path / CONFIG).write_text(json.dumps({**config, **changes}))
        refuse(tmp_path, "makes more features of head_dim 8 than a state can hold")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (
            b'{"peft_type": "NTK_ATTENTION", "format_version": 4, "rank": ' + b"[" * 900 + b"]" * 900 + b"}",
            "rank must be",
        ),
        (b'{"peft_type": "NTK_ATTENTION", "rank": NaN}', "NaN is not a JSON number"),
        (b'{"peft_type": "NTK_ATTENTION", "rank": 1, "rank": 2}', "a name stands twice"),
        (b'{"peft_type": "NTK_ATTENTION", "rank": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b" " * 2**20 + b"{}", "has 1,048,578 bytes"),
        (b"[]", "holds a list of 0, expected an object"),
        (b'{"peft_type": "LORA"}', "peft_type is 'LORA'"),
    ],
    ids=["no text", "deep", "deep field", "nan", "twice", "huge integer", "large", "list", "other method"],
)
def test_json(content, message, tmp_path):
    """Through our own class: PEFT reads the file once itself, to learn the method."""
    adapted().save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(AdapterError, match=f"{CONFIG}.*{message}"):
        NTKAttentionConfig.from_pretrained(tmp_path)


def add(tensors):
    tensors["base_model.model.model.norm.weight"] = torch.zeros(32)


def resize(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.zeros(65, 32)


def drop(tensors):
    tensors.pop(next(name for name in tensors if name.endswith("log_k")))


def integers(tensors):
    tensors.update({name: x.long() for name, x in tensors.items()})


def large(tensors):
    next(x for name, x in tensors.items() if name.endswith("log_k")).fill_(1e4)


def infinite(tensors):
    next(x for name, x in tensors.items() if name.endswith("ntk_states.Z_A"))[1, 2, 0] = torch.inf


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (add, "'base_model.model.model.norm.weight' belongs to no adapter of this model"),
        (resize, r"lm_head.weight is \[65, 32\] in the adapter file, the model needs \[64, 32\]"),
        (drop, "log_k is missing .1 of 20"),
        (integers, "has the dtype I64, expected one of F64"),
        (large, "holds 1e.04, at most 80 is expected of a logarithm"),
        (infinite, "holds NaN or infinite values"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_weights(damage, message, tmp_path):
    adapted().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    damage(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    refuse(tmp_path, f"{WEIGHTS}: .*{message}")


def test_a_pickle_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / PICKLE)
    (tmp_path / WEIGHTS).unlink()
    refuse(tmp_path, "adapter_model.bin is a pickle, which may run code: expected adapter_model.safetensors")


def test_a_state_dict_that_does_not_fit_changes_no_tensor(tmp_path):
    """As Trainer resumes: into an adapter that is there. The first layers fit, the last does not."""
    adapted().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    infinite({name: x for name, x in tensors.items() if "layers.1" in name})
    save_file(tensors, tmp_path / WEIGHTS)
    model = adapted(init_weights=True)
    with pytest.raises(AdapterError, match=r"layers.1.*NaN"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert not any(adapter.Z_B.any() for adapter in adapters(model))


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a.b", ""])
def test_an_adapter_name_stays_in_the_folder(name):
    with pytest.raises(ValueError, match="an adapter is saved in a folder of its name"):
        adapted(adapter_name=name)


def test_short_fuzzing(tmp_path):
    fuzzer = Fuzzer(tmp_path, seed=1)
    fuzzer.run(1000)
    assert min(fuzzer.counts[kind] for kind in ("loaded", "configuration refused", "weights refused")) > 50


def test_the_fuzzer_notices(tmp_path, monkeypatch):
    monkeypatch.setattr("ntk_attention.tuner.config.weights_file", lambda folder: folder / WEIGHTS)
    monkeypatch.setattr("ntk_attention.tuner.model.check_weights", lambda path, expected: None)
    with pytest.raises(AssertionError, match=re.escape(str(tmp_path.parent))):
        Fuzzer(tmp_path, seed=1).run(1000)

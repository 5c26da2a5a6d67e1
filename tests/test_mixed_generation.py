"""Generation in which every row has its own adapter: each row as alone, however many sequences are made of it."""

import pytest
import torch
from peft import get_peft_model
from transformers import GenerationConfig

from ntk_attention import NTKAttentionConfig

from .families import FAMILIES

MODELS = ("llama", "opt", "t5", "bart", "whisper")
ROWS = ["__base__", "a", "b", "a"]
LENGTH = {"max_new_tokens": 5, "min_new_tokens": 5}  # all sequences of one length, so that nothing is padded
BEAMS = {"num_beams": 3, "do_sample": False}
GIVEN = {
    "greedy": {"do_sample": False},
    "beams": BEAMS,
    "beams_returned": {**BEAMS, "num_return_sequences": 2},
    "one_choice": {"do_sample": True, "top_k": 1},
    "one_choice_returned": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    "no_cache": {**BEAMS, "use_cache": False},
}


@pytest.fixture(scope="module", params=MODELS)
def adapted(request):
    """A model with two adapters, and inputs of four rows."""
    family = FAMILIES[request.param]
    base = family.build(dtype=torch.float32)
    base.generation_config.update(eos_token_id=None, pad_token_id=0)
    # PEFT's model of sequences to sequences takes text only.
    task = {"t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM", "whisper": None}.get(request.param, "CAUSAL_LM")
    config = NTKAttentionConfig(init_weights=False, feed_forward_rank=2, task_type=task)
    torch.manual_seed(2)
    model = get_peft_model(base, config, adapter_name="a")
    model.add_adapter("b", config)
    inputs = family.inputs(torch.float32)
    return model.eval(), {k: x[[0, 0, 1, 1]] for k, x in inputs.items() if not k.startswith("decoder")}


def alone(model, inputs, **options):
    """What each row gives with its own adapter active, one after another."""
    found = []
    for i, name in enumerate(ROWS):
        row = {key: x[i : i + 1] for key, x in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                found.append(model.generate(**row, **options))
        else:
            model.set_adapter(name)
            found.append(model.generate(**row, **options))
    return torch.cat(found)


def check(model, inputs, **options):
    expected = alone(model, inputs, **options)
    returned = len(expected) // len(ROWS)
    assert len(expected[::returned].unique(dim=0)) > 2  # adapters and inputs make a difference
    model.set_adapter("b")
    before = model.generate(**inputs, **LENGTH, do_sample=False)
    assert torch.equal(model.generate(**inputs, adapter_names=ROWS, **options), expected)
    assert torch.equal(model.generate(**inputs, **LENGTH, do_sample=False), before)


@pytest.mark.parametrize("options", GIVEN.values(), ids=GIVEN)
def test_options_of_the_call(adapted, options):
    check(*adapted, **options, **LENGTH)


@pytest.mark.parametrize("options", GIVEN.values(), ids=GIVEN)
def test_a_generation_config(adapted, options):
    model, inputs = adapted
    config = GenerationConfig.from_dict({**model.generation_config.to_dict(), **options, **LENGTH})
    check(model, inputs, generation_config=config)


@pytest.mark.parametrize("options", [BEAMS, {**BEAMS, "num_return_sequences": 2}], ids=["beams", "beams_returned"])
def test_generation_config_of_the_model(adapted, options):
    model, inputs = adapted
    own = model.get_base_model().generation_config
    before = own.to_dict()
    try:
        own.update(**options)
        check_against_own(model, inputs)
    finally:
        own.update(**before)


def check_against_own(model, inputs):
    expected = alone(model, inputs, **LENGTH)
    assert torch.equal(model.generate(**inputs, adapter_names=ROWS, **LENGTH), expected)


def test_a_generation_config_in_second_place(adapted):
    model, inputs = adapted
    config = GenerationConfig.from_dict({**model.generation_config.to_dict(), **BEAMS, **LENGTH})
    if "input_ids" not in inputs or model.peft_config["a"].task_type == "SEQ_2_SEQ_LM":
        pytest.skip("PEFT takes keyword arguments only")
    expected = alone(model, inputs, generation_config=config)
    rest = {name: x for name, x in inputs.items() if name != "input_ids"}
    assert torch.equal(model.generate(inputs["input_ids"], config, **rest, adapter_names=ROWS), expected)


def test_beams_of_the_model_beside_a_config_that_names_none(adapted):
    model, inputs = adapted
    own, before = model.get_base_model().generation_config, model.generation_config.to_dict()
    config = GenerationConfig(pad_token_id=0, eos_token_id=None, do_sample=False, **LENGTH)
    if "decoder_start_token_id" in before:
        config.decoder_start_token_id = before["decoder_start_token_id"]
    try:
        own.update(num_beams=3)
        expected = alone(model, inputs, generation_config=config)
        assert torch.equal(model.generate(**inputs, adapter_names=ROWS, generation_config=config), expected)
    finally:
        own.update(**before)


def test_options_of_the_call_beside_a_generation_config(adapted):
    """The call wins."""
    model, inputs = adapted
    config = GenerationConfig.from_dict({**model.generation_config.to_dict(), **LENGTH, "num_beams": 4})
    check(model, inputs, generation_config=config, num_beams=2, num_return_sequences=2)


@pytest.mark.parametrize("returned", [1, 3])
@pytest.mark.parametrize("name", ["a", "b"])
def test_sampling_as_with_that_adapter_active(adapted, name, returned):
    """The same random numbers in a batch of the same rows."""
    model, inputs = adapted
    options = {"do_sample": True, "num_return_sequences": returned, **LENGTH}
    model.set_adapter(name)
    torch.manual_seed(3)
    expected = model.generate(**inputs, **options)
    model.set_adapter("b" if name == "a" else "a")
    torch.manual_seed(3)
    assert torch.equal(model.generate(**inputs, adapter_names=[name] * len(ROWS), **options), expected)


@pytest.mark.parametrize("names", [[], ROWS[:2], ROWS[:3], [*ROWS, "a"], 2 * ROWS], ids=len)
@pytest.mark.parametrize("beams", [1, 2])
def test_other_numbers_of_names_are_refused(adapted, names, beams):
    model, inputs = adapted
    expected = model.generate(**inputs, **LENGTH, do_sample=False)
    with pytest.raises(ValueError, match=rf"adapter_names\b.*\b{len(names)} names"):
        model.generate(**inputs, adapter_names=names, num_beams=beams, do_sample=False, **LENGTH)
    assert torch.equal(model.generate(**inputs, **LENGTH, do_sample=False), expected)


@pytest.mark.parametrize(
    "names", ["abcd", [None] * 4, [0, 1, 2, 3], iter(ROWS), dict.fromkeys("abcd", 1)], ids=lambda x: type(x).__name__
)
def test_names_that_are_no_list_are_refused(adapted, names):
    model, inputs = adapted
    with pytest.raises(ValueError, match="adapter_names must be a list of names, one for each row of the batch, got"):
        model(**inputs, adapter_names=names)


@pytest.mark.parametrize("options", [{"frames": 2}, {"temperature": (0.0, 0.5)}], ids=["long", "temperatures"])
def test_whisper_that_drops_rows_is_refused(options):
    family = FAMILIES["whisper"]
    config = NTKAttentionConfig(init_weights=False)
    model = get_peft_model(family.build(dtype=torch.float32), config, adapter_name="a").eval()
    sound = family.inputs(torch.float32)["input_features"].repeat(1, 1, options.pop("frames", 1))
    with pytest.raises(ValueError, match=r"adapter_names has 2 names for .* expected one row"):
        model.generate(input_features=sound, adapter_names=["a", "__base__"], **options)

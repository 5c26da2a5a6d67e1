"""TRL's preference trainers, whose reference is a copy of the adapter: at the first step both are one function."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ntk_attention import NTKAttentionConfig, calibrate
from tests.reference import relative_error
from tests.tiny import loss_of, trainable

pytestmark = pytest.mark.slow

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
SAME = 1e-4  # relative error of what is computed in float32, in coordinates that may differ
OPTIONS = {
    "defaults": {},
    "full_rank": {"rank": None},
    "kv_heads": {"state_heads": "kv"},
    "no_feed_forward": {"feed_forward_rank": None},
    "taylor": {"feature_map": "taylor", "feature_map_options": {"degree": 2}},
    "positive_random": {"feature_map": "positive_random", "feature_map_options": {"num_features": 16, "seed": 3}},
}


@pytest.fixture
def inputs(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return {"input_ids": tokenizer(["five wins it", "seven is it."], return_tensors="pt")["input_ids"]}


@pytest.fixture
def calibrated(model_folder, inputs):
    """Makes an adapter with these options that was calibrated, and trained so many steps."""

    def make(steps=2, **options):
        torch.manual_seed(0)
        config = NTKAttentionConfig(task_type="CAUSAL_LM", **options)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
        calibrate(model, [inputs])
        train(model, inputs, steps)
        return model

    return make


def train(model, inputs, steps):
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.02)
    for _ in range(steps):
        loss_of(model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()


def copy_default(model, name):
    """As TRL does it, in the constructor of its trainers for DPO, KTO, GRPO and RLOO."""
    for parameter, value in model.named_parameters():
        if ".default." in parameter:
            model.get_parameter(parameter.replace(".default.", f".{name}.")).data.copy_(value.data)


@torch.no_grad()
def outputs(model, inputs, adapter):
    before = model.active_adapter
    model.set_adapter(adapter)
    logits = model(**inputs).logits
    model.set_adapter(before)
    return logits


def check_copy(model, inputs, name="ref"):
    """The copy is the same function, which is not the base's."""
    expected = outputs(model, inputs, "default")
    assert relative_error(outputs(model, inputs, name), expected) < SAME
    with model.disable_adapter():
        assert relative_error(model(**inputs).logits, expected) > 1e-2


def history(trainer_class, config_class, model, model_folder, folder, data, **options):
    """What a trainer logs in three steps at a learning rate of 0."""
    arguments = config_class(
        output_dir=str(folder),
        max_steps=3,
        logging_steps=1,
        learning_rate=0.0,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    if trainer_class.__name__ == "GRPOTrainer":
        options = {"reward_funcs": lambda completions, **_: [float(len(set(text))) for text in completions]}
    else:
        options = {}
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer, **options
    )
    trainer.train()
    assert "ref" in model.peft_config
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def losses_of_dpo(model, model_folder, folder):
    trl = pytest.importorskip("trl")
    data = [{"prompt": f"{word} ", "chosen": "wins", "rejected": "loses it"} for word in WORDS]
    entries = history(
        trl.DPOTrainer, trl.DPOConfig, model, model_folder, folder, data, per_device_train_batch_size=2, max_length=32
    )
    assert [entry["rewards/margins"] for entry in entries] == pytest.approx([0.0] * 3, abs=1e-4)
    return [entry["loss"] for entry in entries]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("steps", [0, 2], ids=["calibrated", "trained"])
def test_dpo_starts_at_log_two(calibrated, model_folder, tmp_path, steps, options):
    model = calibrated(steps, **options)
    assert losses_of_dpo(model, model_folder, tmp_path) == pytest.approx([math.log(2)] * 3, abs=1e-4)


def test_dpo_with_an_adapter_from_a_folder(calibrated, model_folder, tmp_path):
    calibrated().save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert losses_of_dpo(model, model_folder, tmp_path) == pytest.approx([math.log(2)] * 3, abs=1e-4)


def test_dpo_with_an_adapter_from_a_folder_calibrated_again(calibrated, inputs, model_folder, tmp_path):
    calibrated().save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    calibrate(model, [inputs])
    train(model, inputs, 2)
    assert losses_of_dpo(model, model_folder, tmp_path) == pytest.approx([math.log(2)] * 3, abs=1e-4)


def test_dpo_learns_from_where_its_reference_stays(calibrated, inputs, model_folder, tmp_path):
    """At a learning rate that is not 0 the reference is still the adapter as it was."""
    model = calibrated()
    expected = outputs(model, inputs, "default")
    losses_of_dpo(model, model_folder, tmp_path)
    train(model, inputs, 2)
    assert relative_error(outputs(model, inputs, "ref"), expected) < SAME
    assert relative_error(outputs(model, inputs, "default"), expected) > 1e-3


def test_kto_starts_at_a_half(calibrated, model_folder, tmp_path):
    trl = pytest.importorskip("trl")
    data = [{"prompt": f"{word} ", "completion": "wins", "label": i % 2 == 0} for i, word in enumerate(WORDS)]
    entries = history(
        trl.KTOTrainer,
        trl.KTOConfig,
        calibrated(),
        model_folder,
        tmp_path,
        data,
        per_device_train_batch_size=4,
        max_length=32,
    )
    assert [entry["loss"] for entry in entries] == pytest.approx([0.5] * 3, abs=1e-4)


def test_grpo_starts_without_divergence(calibrated, model_folder, tmp_path):
    trl = pytest.importorskip("trl")
    entries = history(
        trl.GRPOTrainer,
        trl.GRPOConfig,
        calibrated(),
        model_folder,
        tmp_path,
        [{"prompt": f"{word} "} for word in WORDS],
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        beta=0.1,
    )
    assert [entry["kl"] for entry in entries] == pytest.approx([0.0] * 3, abs=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("copied", [False, True], ids=["the_config", "a_deep_copy"])
def test_parameters_copied_by_name(calibrated, inputs, tmp_path, options, copied):
    model = calibrated(**options)
    config = model.peft_config["default"]
    model.add_adapter("ref", copy.deepcopy(config) if copied else config)
    copy_default(model, "ref")
    check_copy(model, inputs)
    model.save_pretrained(tmp_path)
    own, ref = (load_file(tmp_path / part / "adapter_model.safetensors") for part in ("", "ref"))
    assert own.keys() == ref.keys()
    for name, tensor in own.items():
        assert relative_error(ref[name], tensor) < SAME


def test_reference_from_the_config_that_the_user_made(model_folder, inputs):
    config = NTKAttentionConfig(task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
    calibrate(model, [inputs])
    train(model, inputs, 2)
    model.add_adapter("ref", config)
    copy_default(model, "ref")
    check_copy(model, inputs)


def test_reference_added_before_calibration(model_folder, inputs):
    torch.manual_seed(0)
    config = NTKAttentionConfig(task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
    model.add_adapter("ref", model.peft_config["default"])
    before = outputs(model, inputs, "ref")
    calibrate(model, [inputs])
    assert relative_error(outputs(model, inputs, "ref"), before) < SAME  # calibration is of one adapter
    train(model, inputs, 2)
    copy_default(model, "ref")
    check_copy(model, inputs)


def test_reference_calibrated_on_other_data(calibrated, inputs):
    """The reference has coordinates of its own when the parameters are copied."""
    model = calibrated()
    model.add_adapter("ref", model.peft_config["default"])
    before = outputs(model, inputs, "default")
    calibrate(model, [{"input_ids": inputs["input_ids"].flip(1)}], adapter_name="ref", others=False)
    assert relative_error(outputs(model, inputs, "default"), before) < SAME
    copy_default(model, "ref")
    check_copy(model, inputs)


def test_an_adapter_beside_a_calibrated_one_starts_as_alone(model_folder, inputs):
    """Without a copy it is what its config says."""
    models = []
    for is_calibrated in (True, False):
        base = AutoModelForCausalLM.from_pretrained(model_folder)
        model = get_peft_model(base, NTKAttentionConfig(task_type="CAUSAL_LM", init_weights=False))
        if is_calibrated:
            calibrate(model, [inputs])
        torch.manual_seed(5)
        model.add_adapter("other", model.peft_config["default"])
        models.append(model)
    assert relative_error(*(outputs(model, inputs, "other") for model in models)) < SAME


def test_a_reference_of_a_reference(calibrated, inputs):
    """The policy is copied again later, as with a reference that follows it."""
    model = calibrated()
    model.add_adapter("ref", model.peft_config["default"])
    for _ in range(2):
        train(model, inputs, 1)
        copy_default(model, "ref")
        check_copy(model, inputs)

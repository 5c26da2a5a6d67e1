"""Frozen models that are large: offloaded, quantised, checkpointed and compiled, against the same model as it is."""

import importlib.util
import logging

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, prepare_model_for_kbit_training
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

from ntk_attention import NTKAttentionConfig, calibrate
from tests.reference import relative_error
from tests.tiny import INPUTS, adapted, adapters, logits, loss_of, losses_of_training, trainable

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where offloaded modules run


def gradients(model):
    model.zero_grad()
    loss_of(model).backward()
    return [p.grad.cpu().clone() for p in trainable(model).values()]


def assert_same(actual, expected, tolerance):
    """Outputs and all gradients of two adapted models."""
    assert relative_error(logits(actual).cpu(), logits(expected)) <= tolerance
    for a, e in zip(gradients(actual), gradients(expected), strict=True):
        assert relative_error(a, e) <= tolerance


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def partly_on_disk(folder, tmp_path, **options):
    return load(folder, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path / "disk", **options)


OFFLOADED = {
    "cpu": lambda folder, tmp: adapted(cpu_offload(load(folder), DEVICE)),
    "cpu, adapter first": lambda folder, tmp: cpu_offload(adapted(load(folder)), DEVICE),
    "disk": lambda folder, tmp: adapted(disk_offload(load(folder), tmp / "disk", DEVICE)),
    "disk, adapter first": lambda folder, tmp: disk_offload(adapted(load(folder)), tmp / "disk", DEVICE),
    "device_map": lambda folder, tmp: adapted(partly_on_disk(folder, tmp)),
}


@pytest.mark.parametrize("kind", OFFLOADED)
def test_offloaded_against_in_memory(kind, model_folder, tmp_path):
    model, plain = OFFLOADED[kind](model_folder, tmp_path), adapted(load(model_folder))
    assert_same(model, plain, 0.0 if DEVICE.type == "cpu" else 1e-5)
    assert any(p.is_meta for p in model.parameters())  # it is offloaded
    for m in (model, plain):
        calibrate(m, [INPUTS])
    losses, expected = (losses_of_training(m, 3, 0.05) for m in (model, plain))
    assert losses == pytest.approx(expected, rel=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    assert (
        relative_error(logits(PeftModel.from_pretrained(load(model_folder), tmp_path / "adapter")), logits(plain))
        < 1e-5
    )


def test_an_offloaded_adapter_that_rests_is_saved(model_folder, tmp_path):
    model = adapted(load(model_folder))
    model.add_adapter("second", NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM"))
    model.set_adapter("second")
    expected = logits(model)
    model.set_adapter("default")
    cpu_offload(model, DEVICE)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    again = PeftModel.from_pretrained(load(model_folder), tmp_path / "second")
    assert relative_error(logits(again), expected) < 1e-6


def test_an_adapter_for_a_base_that_is_partly_on_a_disk(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT writes a copy of the base model below the working directory
    source = adapted(load(model_folder))
    source.save_pretrained(tmp_path / "adapter")
    options = {"max_memory": {"cpu": 60_000}, "device_map": "auto", "offload_folder": tmp_path / "disk"}
    with pytest.raises(ValueError, match="expected get_peft_model and set_peft_model_state_dict"):
        PeftModel.from_pretrained(partly_on_disk(model_folder, tmp_path), tmp_path / "adapter", **options)
    model = adapted(partly_on_disk(model_folder, tmp_path), init_weights=True)
    set_peft_model_state_dict(model, load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert relative_error(logits(model), logits(source)) < 1e-6


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_compiled_training_against_eager(checkpointing):
    """Fullgraph, forward and backward, of an adapter in the coordinates of calibration."""
    models = []
    for changed in (False, True):
        model = adapted().train()
        calibrate(model, [INPUTS])
        if checkpointing and changed:
            base = model.base_model.model
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            # Neither fits into one graph: embeddings that are made to require gradients, which the reentrant mode
            # needs, and transformers' warning about a cache.
            base.disable_input_require_grads()
            base.config.use_cache = False
        models.append(torch.compile(model, fullgraph=True, backend="aot_eager") if changed else model)
    losses, expected = (losses_of_training(model, 3, 0.05) for model in reversed(models))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_generation_with_a_compiled_step_against_eager():
    """With a static cache transformers compiles the step of each new token; on a CPU it must be told so."""
    model = adapted()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True
    expected = model.generate(**INPUTS, **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    actual = model.generate(**INPUTS, **options, cache_implementation="static", compile_config=compiled)
    assert torch.equal(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


BITSANDBYTES = {
    "8 bit": {"load_in_8bit": True},
    "4 bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
    "nf4, double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
}
TORCHAO = ("int8", "int4")
QUANTISED = [f"bitsandbytes {name}" for name in BITSANDBYTES] + [f"torchao {name}" for name in TORCHAO]


def quantisation(kind):
    library, name = kind.split(" ", 1)
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    if library == "bitsandbytes":
        return BitsAndBytesConfig(**BITSANDBYTES[name])
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if name == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """Wide enough for the blocks of 4-bit weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load_quantised(kind, folder):
    base = load(folder, quantization_config=quantisation(kind), dtype=torch.float32)
    for module in base.modules():
        # With these instructions bitsandbytes packs 4-bit weights anew in the first call without gradients; from then
        # on, on such a CPU, no gradient passes through them.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base


@torch.no_grad()
def dequantised(base, folder):
    """The reference: the same model with the weights that the quantised one stands for."""
    plain = load(folder, dtype=torch.float32)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(base.get_submodule(name)(torch.eye(module.in_features)).float().T)
    return plain


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_against_dequantised(kind, wide_folder, tmp_path):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    base = load_quantised(kind, wide_folder)
    plain = dequantised(base, wide_folder)
    assert relative_error(logits(plain), logits(load(wide_folder))) > 1e-2  # it is quantised
    # 8 bits of bitsandbytes round the activations as well
    tolerance = 0.05 if kind == "bitsandbytes 8 bit" else 1e-5
    assert_same(adapted(base), adapted(plain), tolerance)
    prepared = adapted(prepare_model_for_kbit_training(load_quantised(kind, wide_folder))).train()
    assert prepared.base_model.model.is_gradient_checkpointing
    assert_same(prepared, adapted(plain), tolerance)
    calibrate(prepared, [INPUTS])
    losses = losses_of_training(prepared, 5, 0.05)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.float32 for adapter in adapters(prepared) for p in adapter.parameters())
    prepared.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_quantised(kind, wide_folder), tmp_path)
    assert relative_error(logits(loaded), logits(prepared)) < 1e-5

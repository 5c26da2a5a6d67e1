"""The method under PEFT's own tests of its methods, on tiny random models; all of them, or a reason why not."""

import inspect
import os

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from ntk_attention import NTKAttentionConfig
from tests.families import BERT, FAMILIES
from tests.tuner import peft_tester

pytestmark = pytest.mark.slow

DECODERS = ("llama", "gpt2", "qwen3", "gemma3", "opt")
MODELS = (*DECODERS, "t5", "bert")
GENERATING = (*DECODERS, "t5")
# PEFT's methods: on which models, and with which further arguments.
RUN = {
    "_test_model_attr": (MODELS, [{}]),
    "_test_adapter_name": (MODELS, [{}]),
    "_test_prepare_for_training": (MODELS, [{}]),
    "_test_load_model_low_cpu_mem_usage": (MODELS, [{}]),
    "_test_save_pretrained": (MODELS, [{}]),
    "_test_save_pretrained_selected_adapters": (MODELS, [{}]),
    "_test_save_pretrained_adapter_name_substring": (MODELS, [{}]),
    "_test_from_pretrained_config_construction": (MODELS, [{}]),
    "_test_load_multiple_adapters": (MODELS, [{}]),
    "_test_add_adapter_no_autocast_adapter_dtype": (MODELS, [{"dtype": torch.float16}, {"dtype": torch.bfloat16}]),
    "_test_mixed_adapter_batches": (GENERATING, [{}]),
    "_test_generate_with_mixed_adapter_batches_and_beam_search": (GENERATING, [{}]),
    "_test_generate": (GENERATING, [{}]),
    "_test_generate_pos_args": (GENERATING, [{}]),
    "_test_generate_half_prec": (GENERATING, [{}]),
    "_test_training": (MODELS, [{}]),
    "_test_inference_safetensors": (MODELS, [{}]),
    # They expect no gradient outside of the adapter, where a classifier's head has one: not of BERT, with LoRA neither.
    "_test_training_layer_indexing": (GENERATING, [{}]),
    "_test_training_gradient_checkpointing": (GENERATING, [{"use_reentrant": True}, {"use_reentrant": False}]),
    "_test_peft_model_device_map": (MODELS, [{}]),
    "_test_delete_adapter": (MODELS, [{}]),
    "_test_delete_inactive_adapter": (MODELS, [{}]),
    "_test_delete_unknown_adapter_raises": (MODELS, [{}]),
    "_test_unload_adapter": (MODELS, [{}]),
    "_test_disable_adapter": (GENERATING, [{}]),
    "_test_passing_input_embeds_works": ((*DECODERS, "bert"), [{"test_name": ""}]),
    "_test_get_base_model_state_dict": (MODELS, [{}]),
}
MERGING = "nothing is merged: the output depends on the query"
WEIGHTED = "adapters of LoRA and IA3 are added with weights; several prefixes act at once instead"
NOT_RUN = {
    "_test_merge_layers": MERGING,
    "_test_merge_layers_fp16": MERGING,
    "_test_merge_layers_nan": MERGING,
    "_test_merge_layers_multi": MERGING,
    "_test_merge_layers_is_idempotent": MERGING,
    "_test_safe_merge": MERGING,
    "_test_lora_conversion": MERGING,
    "_test_weighted_combination_of_adapters": WEIGHTED,
    "_test_weighted_combination_of_adapters_lora": WEIGHTED,
    "_test_weighted_combination_of_adapters_ia3": WEIGHTED,
    "_test_training_prompt_learning_tasks": "of methods that learn a prompt, whose parameters are in a prompt encoder",
    "_test_adding_multiple_adapters_with_bias_raises": "there is no option for biases",
}
# An adapter that was just made must be told from the base here, and from another one.
VISIBLE = (
    "_test_save_pretrained",
    "_test_save_pretrained_selected_adapters",
    "_test_mixed_adapter_batches",
    "_test_generate_with_mixed_adapter_batches_and_beam_search",
    "_test_unload_adapter",
    "_test_disable_adapter",
)
CASES = [
    pytest.param(method, name, options, id="-".join([method[6:], name, *map(str, options.values())]).rstrip("-"))
    for method, (names, variants) in RUN.items()
    for name in names
    for options in variants
]


@pytest.fixture(scope="module")
def peft_common(tmp_path_factory):
    """PEFT's module."""
    temporary = tmp_path_factory.getbasetemp()
    return peft_tester.load(temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of the models, as from_pretrained wants them."""
    parent = tmp_path_factory.mktemp("models")
    for name in GENERATING:  # PEFT leaves out tests of models with "gpt2" in their name
        FAMILIES[name].build(dtype=torch.float32).save_pretrained(parent / name.replace("gpt2", "gpt-2"))
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **BERT, num_labels=3))
    classifier.save_pretrained(parent / "bert")
    return {name: str(parent / name.replace("gpt2", "gpt-2")) for name in MODELS}


def complete_tester(peft_common, name):
    """PEFT's class as its own files complete it, with the inputs they have."""
    classes = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForSequenceClassification}

    class Tester(peft_common.PeftCommonTester):
        transformers_class = classes.get(name, AutoModelForCausalLM)

        def prepare_inputs_for_testing(self):
            ids = torch.tensor([[1, 1, 1], [1, 2, 1]])
            inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}
            return {**inputs, "decoder_input_ids": ids.clone()} if name == "t5" else inputs

    return Tester()


@pytest.mark.parametrize(("method", "name", "options"), CASES)
def test_of_peft(method, name, options, peft_common, folders, monkeypatch):
    if "mixed" in method:  # PEFT asks for LoRA by name, since few of its methods can do it
        monkeypatch.setattr(peft_common, "LoraConfig", NTKAttentionConfig)
    if method == "_test_generate_pos_args":  # PEFT's model of this task takes none
        options = {"raises_err": name == "t5"}
    task = {"t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}.get(name, "CAUSAL_LM")
    config = {"task_type": task, **({"init_weights": False} if method in VISIBLE else {})}
    torch.manual_seed(0)
    arguments = {"model_id": folders[name], "config_cls": NTKAttentionConfig, "config_kwargs": config, **options}
    try:
        getattr(complete_tester(peft_common, name), method)(**arguments)
    except pytest.skip.Exception as skipped:
        pytest.fail(f"PEFT leaves its own test out: {skipped}")


def test_every_test_of_peft_is_run_or_has_a_reason(peft_common):
    methods = inspect.getmembers(peft_common.PeftCommonTester, inspect.isfunction)
    assert {name for name, _ in methods if name.startswith("_test_")} == {*RUN, *NOT_RUN}

"""What NTK-Attention takes for granted of transformers and PEFT, one sentence each.

When one of these fails after an upgrade, its message says in plain words what changed and which of our files knows it.
"""

import inspect

import peft
import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from transformers import AttentionInterface, Trainer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ntk_attention.tuner.routing import routes
from tests.families import FAMILIES
from tests.tiny import INPUTS, TINY, tiny

VERSIONS = f"transformers {transformers.__version__}, peft {peft.__version__}"


def expect(holds, sentence, file):
    assert holds, f"{VERSIONS}: {sentence} See src/ntk_attention/{file}."


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def call(request):
    """One call of the attention function by a tiny Llama, as the model makes it for a padded batch."""
    calls = []
    name = f"canary-{request.param}"

    def watch(module, *args, **kwargs):
        calls.append((module, args, kwargs))
        batch, heads, length, size = args[0].shape
        return args[0].new_zeros(batch, length, heads, size), None

    AttentionInterface.register(name, watch)
    model = TINY.build(request.param, torch.float32)
    for layer in model.model.layers:
        config = type(layer.self_attn.config).from_dict(layer.self_attn.config.to_dict())
        config._attn_implementation_internal = name
        layer.self_attn.config = config
    model(**INPUTS)
    expect(
        len(calls) == 2,
        "attention modules no longer look their function up by `self.config._attn_implementation` in every call.",
        "routing.py: attach",
    )
    return request.param, *calls[0]


def test_the_function_gets_module_query_key_value_and_mask(call):
    _, module, args, _ = call
    expect(len(args) == 4, f"the attention function gets {len(args) + 1} positional arguments, not 5.", "routing.py")
    query, key, value, _ = args
    length = INPUTS["input_ids"].shape[1]
    expect(
        query.shape == (2, 4, length, 8),
        f"queries come as {list(query.shape)}, not [B, H, L, d].",
        "routing.py: ntk_attention_forward",
    )
    expect(
        key.shape == value.shape == (2, 2, length, 8),
        f"keys come as {list(key.shape)}, not [B, H_kv, S, d]: are KV heads repeated now?",
        "routing.py: ntk_attention_forward",
    )
    expect(hasattr(module, "layer_idx"), "attention modules have no `layer_idx` any more.", "routing.py")


def test_scale_and_dropout_are_keywords(call):
    _, _, _, kwargs = call
    for name in ("scaling", "dropout"):
        expect(name in kwargs, f"the attention function does not get `{name}` any more.", "routing.py: query_scale")


def test_masks_have_four_dimensions(call):
    implementation, _, args, _ = call
    mask = args[3]
    expect(mask is not None, "a padded batch gets no mask: padding would be attended to.", "routing.py: attach")
    expect(mask.dim() == 4, f"masks have {mask.dim()} dimensions, not 4.", "masks.py: visible_tokens")
    kinds = (torch.bool,) if implementation == "sdpa" else (torch.bool, torch.float32)
    expect(mask.dtype in kinds, f"masks of {implementation} are {mask.dtype}.", "masks.py: visible_tokens")


def test_a_batch_without_padding_has_no_mask_for_sdpa():
    model = tiny()
    masks = []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watch(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return original(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("canary-plain", watch)
    model.config._attn_implementation_internal = "sdpa"
    for layer in model.model.layers:
        config = type(layer.self_attn.config).from_dict(layer.self_attn.config.to_dict())
        config._attn_implementation_internal = "canary-plain"
        layer.self_attn.config = config
    model(input_ids=INPUTS["input_ids"])
    expect(
        masks == [None, None],
        "sdpa gets a mask where causality alone says it all: slower, and no longer is_causal.",
        "masks.py: visible_tokens",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_route(family):
    model = FAMILIES[family].build()
    expect(
        any(routes(module) for module in model.modules()),
        f"{type(model).__name__} names ALL_ATTENTION_FUNCTIONS in no forward: it does not use the attention interface "
        "any more, or by another name.",
        "routing.py: routes",
    )


@pytest.mark.parametrize(
    "name",
    [
        "_remap_adapter_state_dict_for_load",
        "_remove_adapter_name_from_key",
        "_prepare_adapter_config",
        "inject_adapter",
    ],
)
def test_peft_asks_the_tuner(name):
    expect(hasattr(BaseTuner, name), f"PEFT's tuners have no `{name}` any more.", "tuner/model.py")


def test_peft_hands_adapter_names_to_the_tuner():
    source = inspect.getsource(PeftModel._enable_peft_forward_hooks)
    expect(
        "self.base_model._enable_peft_forward_hooks" in source,
        "PEFT does not hand `adapter_names` to the tuner any more: mixed batches would use one adapter, silently.",
        "tuner/model.py",
    )


@pytest.mark.parametrize("name", ["_save_checkpoint", "_load_from_checkpoint", "training_step", "evaluate"])
def test_trainer_has_what_we_override(name):
    expect(
        hasattr(Trainer, name), f"`Trainer` has no `{name}` any more: checkpoints would be ordinary.", "cli/trainer.py"
    )

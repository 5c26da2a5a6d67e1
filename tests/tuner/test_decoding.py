"""The steps that `generate` binds: they answer what they were bound for, and give way to everything else."""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from ntk_attention import NTKAttentionConfig
from ntk_attention.ops.triton import decoder, support
from ntk_attention.tuner import decoding
from ntk_attention.tuner.kept import KEPT
from tests.tiny import adapters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(support.triton is None, reason="needs Triton")
pytestmark = needs_triton
PROMPT = torch.tensor([[3, 5, 7, 11], [2, 9, 4, 8]], device=DEVICE)
PADDED = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=DEVICE)
NEW, LAYERS = 5, 2


@pytest.fixture
def model():
    """Its heads are large enough for the kernels."""
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(llama).to(DEVICE), config())
    model.add_adapter("rotary", config(positions="rotary"))
    model.add_adapter("second", config())
    return model.to(torch.bfloat16).eval()


def config(**options):
    return NTKAttentionConfig(task_type="CAUSAL_LM", init_weights=False, **options)


def generate(model, *processors, mask=None, **options):
    """Tokens and the logits of each, greedily."""
    given = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT) if mask is None else mask}
    found = model.generate(
        **given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
        output_logits=True, logits_processor=LogitsProcessorList(processors), **options,
    )  # fmt: skip
    return found.sequences, torch.stack(found.logits)


def same(one, other):
    return torch.equal(one[0], other[0]) and torch.allclose(one[1].float(), other[1].float(), atol=2e-2)


@pytest.fixture
def answered(monkeypatch):
    """A list that grows with every call that a step answers."""
    calls = []
    call = decoding.DecodingStep.__call__

    def counted(step, *arguments):
        out = call(step, *arguments)
        if out is not None:
            calls.append(step)
        return out

    monkeypatch.setattr(decoding.DecodingStep, "__call__", counted)
    return calls


def anew(monkeypatch, model, *processors, **options):
    """The same with every call decided anew."""
    with monkeypatch.context() as context:
        context.setattr(decoding.DecodingStep, "__call__", lambda *_: None)
        return generate(model, *processors, **options)


@pytest.mark.parametrize("name", ["default", "rotary"])
@pytest.mark.parametrize("mask", [None, PADDED], ids=["all", "padded"])
def test_all_but_the_first_new_token(model, name, mask, answered, monkeypatch):
    model.set_adapter(name)
    expected = anew(monkeypatch, model, mask=mask)
    assert not answered
    assert same(generate(model, mask=mask), expected)
    assert len(answered) == (NEW - 2) * LAYERS  # the prompt makes the first one, and the second is decided
    assert KEPT.steps is None


class Change(LogitsProcessor):
    """Does something once, behind the third token."""

    def __init__(self, what):
        self.what = what

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == PROMPT.shape[1] + 2:
            self.what()
        return scores


@torch.no_grad()
def train(model):
    for adapter in adapters(model):
        adapter.log_k.add_(1.0)


@torch.no_grad()
def replace(model):
    for adapter in adapters(model):
        adapter.log_k = torch.nn.Parameter(adapter.log_k + 1.0)


@torch.no_grad()
def rescale(model):
    for adapter in adapters(model):
        adapter.unit = 0.5


CHANGES = {
    "trained": train,
    "a parameter replaced": replace,
    "the unit": rescale,
    "another adapter": lambda model: model.base_model.set_adapter("second"),
    "one with positions": lambda model: model.base_model.set_adapter("rotary"),
    "two adapters": lambda model: model.base_model.set_adapter(["default", "second"]),
    "switched off": lambda model: model.base_model.disable_adapter_layers(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_tokens_is_seen(model, change, answered, monkeypatch):
    saved = {name: x.clone() for name, x in model.state_dict().items()}

    def run(run):
        model.load_state_dict(saved)
        for adapter in adapters(model):
            adapter.unit = 1.0
        model.base_model.enable_adapter_layers()
        model.base_model.set_adapter("default")
        return run(Change(lambda: CHANGES[change](model)))

    expected = run(lambda processor: anew(monkeypatch, model, processor))
    unchanged = anew(monkeypatch, model, Change(lambda: None)) if change == "trained" else None
    assert same(run(lambda processor: generate(model, processor)), expected)
    assert answered
    assert unchanged is None or not same(expected, run(lambda _: generate(model)))


def test_beams(model, answered, monkeypatch):
    expected = anew(monkeypatch, model, num_beams=2)
    assert torch.equal(generate(model, num_beams=2)[0], expected[0])
    assert answered


def test_a_call_inside_of_another_kind(model, monkeypatch):
    """A forward pass of other shapes, with weights, with gradients, between two tokens."""

    def inside():
        for grads in (False, True):
            with torch.set_grad_enabled(grads):
                logits = model.get_base_model()(input_ids=PROMPT[:1, :1]).logits
                assert logits.requires_grad == grads
        with torch.autocast(DEVICE, torch.bfloat16):
            model.get_base_model()(input_ids=PROMPT[:, :1])

    expected = anew(monkeypatch, model)
    assert same(generate(model, Change(inside)), expected)


def test_one_launch_for_each_token(model, monkeypatch):
    launches = []
    kernel = decoder.decode_kernel
    monkeypatch.setattr(decoder, "decode_kernel", lambda *given: launches.append(given) or kernel(*given))
    generate(model)
    assert len(launches) == (NEW - 1) * LAYERS

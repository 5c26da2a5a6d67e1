"""Threads that share one adapted model, as in a server: each gets what it gets alone, and nothing stays behind."""

import itertools
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model

from ntk_attention import NTKAttentionConfig
from ntk_attention.ops.triton import tables
from ntk_attention.tuner.calls import CALLS as STATE
from ntk_attention.tuner.layer import NTKAttentionLayer
from tests.families import FAMILIES

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """Triton's interpreter does not run in two threads."""
    monkeypatch.setattr(tables, "INTERPRETED", False)


CALLS = 200
# A feed-forward block of one module, and of two; with cross-attention, and with an input that is not text.
MODELS = ("llama", "opt", "bart", "whisper")


@contextmanager
def as_many_switches_as_possible():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def run_together(functions):
    """What each function returned that often, or raised, in a thread of its own."""
    results = [[] for _ in functions]
    start = threading.Barrier(len(functions))

    def work(function, found):
        start.wait()
        for _ in range(CALLS):
            try:
                found.append(function())
            except Exception as error:
                found.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(functions, results, strict=True)]
    with as_many_switches_as_possible():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


def problem(actual, expected):
    """None if equal, else what is wrong."""
    if isinstance(actual, Exception):
        return f"{type(actual).__name__}: {actual}"
    is_same = actual.shape == expected.shape and torch.allclose(actual, expected, atol=1e-5)
    return None if is_same else "another result"


class Shared:
    """A model with two adapters, and calls that differ in input and in batch size."""

    def __init__(self, name):
        family = FAMILIES[name]
        # PEFT's model of sequences to sequences takes text only.
        task = {"bart": "SEQ_2_SEQ_LM", "whisper": None}.get(name, "CAUSAL_LM")
        config = NTKAttentionConfig(init_weights=False, feed_forward_rank=2, task_type=task)
        torch.manual_seed(2)
        self.model = get_peft_model(family.build(dtype=torch.float32), config, adapter_name="a")
        self.model.add_adapter("b", config)
        self.model.eval()
        two = family.inputs(torch.float32)
        self.inputs = [two, {name: x[[1, 0, 1]] for name, x in two.items()}]

    def forward(self, which, names=None):
        """A function of nothing: the logits of these inputs; a row gets the adapter of its name."""
        return lambda: self._forward(self.inputs[which], names)

    @torch.no_grad()
    def _forward(self, inputs, names):
        named = {} if names is None else {"adapter_names": names}
        return self.model(**inputs, **named).logits

    def generate(self, which, names=None):
        """A function of nothing: the tokens that follow."""
        inputs = {name: x for name, x in self.inputs[which].items() if not name.startswith("decoder")}
        named = {} if names is None else {"adapter_names": names}
        return lambda: self.model.generate(**inputs, **named, do_sample=False, max_new_tokens=2, min_new_tokens=2)


SCENARIOS = {
    "one_adapter": lambda shared: [shared.forward(0), shared.forward(1)],
    "an_adapter_each": lambda shared: [shared.forward(0, ["a", "a"]), shared.forward(1, ["b", "b", "b"])],
    "mixed_batches": lambda shared: [shared.forward(0, ["a", "b"]), shared.forward(1, ["b", "__base__", "a"])],
    "one_with_names": lambda shared: [shared.forward(0), shared.forward(1, ["b", "a", "__base__"])],
    "one_generates": lambda shared: [shared.generate(0), shared.forward(1)],
    "one_generates_with_names": lambda shared: [shared.generate(0, ["b", "__base__"]), shared.forward(1)],
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_threads_against_one(name, scenario):
    shared = Shared(name)
    functions = scenario(shared)
    expected = [function() for function in functions]
    plain = [shared.forward(which)() for which in (0, 1)]
    modules = {name: dict(module.__dict__) for name, module in shared.model.named_modules()}
    found = run_together(functions)
    wrong = [
        message
        for results, right in zip(found, expected, strict=True)
        for result in results
        if (message := problem(result, right)) is not None
    ]
    assert not wrong, f"{len(wrong)} of {2 * CALLS} calls: {sorted(set(wrong))[:3]}"
    assert all(torch.equal(shared.forward(which)(), plain[which]) for which in (0, 1))
    for name, module in shared.model.named_modules():
        assert_same_attributes(name, modules[name], module.__dict__)


def assert_same_attributes(name, before, after):
    """No module has another attribute, hook or buffer than before."""
    assert before.keys() == after.keys(), name
    for key, value in before.items():
        is_hooks = "hooks" in key and isinstance(value, dict)
        assert (len(after[key]) == len(value)) if is_hooks else (after[key] is value), f"{name}.{key}"


@pytest.mark.parametrize("name", MODELS)
def test_a_call_that_fails_leaves_nothing(name):
    shared = Shared(name)
    plain = [shared.forward(which)() for which in (0, 1)]

    def fails():
        with pytest.raises(ValueError, match="adapter_names"):
            shared.forward(0, ["a", "b", "a"])()
        return plain[0]

    found = run_together([fails, shared.forward(1)])
    assert [problem(result, plain[1]) for result in found[1]] == [None] * CALLS
    assert not [result for result in found[0] if isinstance(result, BaseException)]
    assert all(torch.equal(shared.forward(which)(), plain[which]) for which in (0, 1))


def test_a_block_that_fails_leaves_nothing():
    shared = Shared("opt")
    handle = shared.model.get_submodule("base_model.model.model.decoder.layers.0.fc2").register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        shared.forward(0)()
    handle.remove()
    assert not STATE.inputs


def fail(*_):
    raise ZeroDivisionError


@pytest.mark.parametrize("names", [["b"], ["deleted"]], ids=["not here", "deleted"])
def test_another_thread_changes_the_adapters_within_a_call(names, monkeypatch):
    """A layer that had an active adapter when the call began, and none when it looks again, is that of the base."""
    shared = Shared("llama")
    with shared.model.disable_adapter():
        expected = shared.forward(0)()
    reads = itertools.cycle([["a"], []] if names == ["b"] else [names])
    monkeypatch.setattr(NTKAttentionLayer, "_active_adapter", property(lambda layer: next(reads)))
    found = shared.forward(0)()
    assert found.shape == expected.shape
    if names == ["deleted"]:
        assert torch.equal(found, expected)

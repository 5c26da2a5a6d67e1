"""What is kept during `generate`, and that nothing is for longer."""

import copy
import pickle
import threading

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ntk_attention.tuner.adapter import PrefixAdapter
from ntk_attention.tuner.kept import KEPT, keeping
from tests.tiny import adapted, adapters

PROMPT = torch.tensor([[3, 5, 7, 11]])


@pytest.fixture
def model():
    return adapted(task_type="CAUSAL_LM", init_weights=False).eval()


@pytest.fixture
def adapter(model):
    return adapters(model)[0]


def generate(model, **options):
    return model.generate(input_ids=PROMPT, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)


def count(monkeypatch):
    made = []
    make = PrefixAdapter._made_state
    monkeypatch.setattr(PrefixAdapter, "_made_state", lambda adapter: made.append(adapter) or make(adapter))
    return made


def test_generate_makes_each_state_once(model, monkeypatch):
    expected = generate(model.get_base_model())  # without PEFT's hooks: made anew for every token
    made = count(monkeypatch)
    assert torch.equal(generate(model), expected)
    assert len(made) == len(set(made)) == len(adapters(model))
    generate(model)
    assert len(made) == 2 * len(set(made))
    assert KEPT.made is None


@pytest.mark.parametrize("change", ["data", "in place"])
def test_changes_between_calls_are_seen(model, adapter, change):
    with torch.no_grad():
        before = model(input_ids=PROMPT).logits
        for part in (adapter, *adapter.parts.values()):
            for parameter in part.parameters(recurse=False):
                (parameter.data if change == "data" else parameter).mul_(1.1)
        after = model(input_ids=PROMPT).logits
        assert not torch.allclose(before, after)
        assert torch.equal(after, model.get_base_model()(input_ids=PROMPT).logits)


def test_changes_during_generate_are_seen(model, adapter):
    class Train(LogitsProcessor):
        """One that trains the adapter while it generates."""

        def __init__(self):
            self.states = []

        def __call__(self, input_ids, scores):
            self.states.append(adapter.state())
            adapter.log_k.add_(0.1)
            adapter.set_coordinates(torch.eye(adapter.num_features).expand(adapter.num_heads, -1, -1), 2.0)
            return scores

    train = Train()
    with torch.no_grad():
        first = torch.exp(adapter.log_k).clone()
        generate(model, logits_processor=LogitsProcessorList([train]))
        assert torch.allclose(train.states[0].k, first)
        assert torch.allclose(train.states[-1].k, torch.exp(2 * (adapter.log_k - 0.1)))


def test_kept_only_without_gradients(adapter):
    with keeping():
        with torch.no_grad():
            assert adapter.state() is adapter.state()
        assert adapter.state() is not adapter.state()
        assert adapter.state().Z.requires_grad
    with torch.no_grad():
        assert adapter.state() is not adapter.state()


def test_inference_tensors_are_not_kept(adapter):
    with torch.inference_mode(), keeping():
        adapter.log_k = torch.nn.Parameter(adapter.log_k.detach().clone(), requires_grad=False)
        assert adapter.state() is not adapter.state()


def test_kept_apart_from_modules_and_threads(model, adapter):
    found = []
    with torch.no_grad(), keeping():
        state = adapter.state()
        assert all(x is not state for x in vars(adapter).values())
        assert copy.deepcopy(adapter).state() is not state
        assert pickle.loads(pickle.dumps(adapter)).state() is not state
        thread = threading.Thread(target=lambda: found.append(KEPT.made))
        thread.start()
        thread.join()
        with keeping():
            assert adapter.state() is state
        assert adapter.state() is state
    assert found == [None]
    assert KEPT.made is None


def test_nothing_is_kept_after_an_error(model):
    with pytest.raises(IndexError):
        model(input_ids=PROMPT + 1000)
    assert KEPT.made is None

"""LoRA and its kin at tiny sizes, and LoRA beside a state: sizes, starts, units."""

import math
import re
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ntk_attention.tuner.observation import adapted_layers
from research.experiments import budgets
from research.experiments.extensions import LowRank, add_low_rank, as_peft
from research.experiments.method import Context
from research.experiments.methods import METHODS
from research.experiments.opponents import oft, rank_stabilised
from research.experiments.ours import adapters, combined, ntk
from research.experiments.train import adapter_bytes, trainable

BUDGET = 4000


@pytest.fixture(scope="module")
def setting(tasks, worker):
    task = tasks["chain-sum"]
    base = worker.base(task)
    batch = task.batch(base, task.examples(base, "train", 0)[:4])
    return task, base, Context(task, base, [batch])


def size_of(model):
    return sum(p.numel() for p in trainable(model)[0])


@torch.no_grad()
def logits(model, context):
    return model.eval()(**context.batches[0]).logits


@pytest.mark.parametrize("task_name", ["chain-sum", "sections-16", "fashion-64"])
def test_modules_of_feed_forward_blocks(tasks, worker, task_name):
    """Of every layer, none of its attention."""
    task = tasks[task_name]
    model = task.fresh(worker.base(task), 0)
    found, last = (budgets.linear_modules(model, pattern) for pattern in (budgets.FEED_FORWARD, budgets.LAST))
    attention = budgets.linear_modules(model, budgets.ATTENTION)
    assert not found.keys() & attention.keys()
    assert found.keys() | attention.keys() == budgets.linear_modules(model).keys()
    assert len(found) == 2 * (3 if task_name == "chain-sum" else 2)
    assert len(last) == 2
    assert last.keys() < found.keys()


@pytest.mark.parametrize("name", ["lora-mlp", "dora-mlp", "rslora-all", "pissa-mlp", "pissa-all"])
def test_opponents_start_as_the_frozen_model(setting, name):
    task, base, context = setting
    model = METHODS[name].build.func(
        task.fresh(base, 0), context, **{**METHODS[name].build.keywords, "budget": lambda _: BUDGET}
    )
    assert size_of(model) == pytest.approx(BUDGET, rel=budgets.TOLERANCE)
    torch.testing.assert_close(logits(model, context), logits(task.fresh(base, 0), context), rtol=1e-4, atol=1e-4)


def test_pissa_takes_the_largest_singular_values(setting):
    task, base, context = setting
    fresh = task.fresh(base, 0)
    name, module = next(iter(budgets.linear_modules(fresh, budgets.FEED_FORWARD).items()))
    before = torch.linalg.svdvals(module.weight.float())
    build = METHODS["pissa-mlp"].build
    model = build.func(fresh, context, **{**build.keywords, "budget": lambda _: BUDGET})
    layer = model.get_base_model().get_submodule(name)
    rank = layer.r["default"]
    taken = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach() * layer.scaling["default"]
    assert 0.9 < taken.square().sum() / before[:rank].square().sum() < 1  # found by iteration, so nearly
    torch.testing.assert_close(layer.base_layer.weight + taken, base.model.get_submodule(name).weight)


def test_rank_stabilised_scaling(setting):
    task, base, context = setting
    model = rank_stabilised(task.fresh(base, 0), context, lambda _: 4350, budgets.FEED_FORWARD)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len({layer.r["default"] for layer in layers}) == 2
    assert all(layer.scaling["default"] == pytest.approx(16 / math.sqrt(layer.r["default"])) for layer in layers)


def test_rotations(setting):
    """The block that comes closest; they start as nothing and train."""
    task, base, context = setting
    model = oft(task.fresh(base, 0), context, lambda _: BUDGET)
    inputs = [module.in_features for module in budgets.linear_modules(base.model).values()]
    sizes = {b: sum(inputs) * (b - 1) / 2 for b in (2, 4, 8, 16, 32)}
    assert size_of(model) == min(sizes.values(), key=lambda size: abs(size - BUDGET))
    torch.testing.assert_close(logits(model, context), logits(task.fresh(base, 0), context), rtol=1e-4, atol=1e-4)
    model(**context.batches[0]).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in trainable(model)[0])


def test_low_rank_is_peft_s_lora():
    """With the same A and B, in other units; and its steps are multiplied by the unit."""
    torch.manual_seed(0)
    x, linear = torch.randn(5, 6), nn.Linear(6, 4)
    expected = get_peft_model(nn.Sequential(nn.Linear(6, 4)), LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    theirs = expected.base_model.model[0]
    theirs.base_layer.load_state_dict(linear.state_dict())
    add_low_rank(linear, as_peft(linear, 3, 1 / 4))
    torch.testing.assert_close(linear(x), theirs(x))  # B = 0
    A, B = torch.randn(3, 6), torch.randn(4, 3)
    with torch.no_grad():
        for ours, own, value in ((linear.low_rank.A, theirs.lora_A, A), (linear.low_rank.B, theirs.lora_B, B)):
            ours.copy_(4 * value)
            own["default"].weight.copy_(value)
    torch.testing.assert_close(linear(x), theirs(x))
    optimizer = torch.optim.Adam(linear.low_rank.parameters(), lr=1e-2)
    linear(x).square().sum().backward()
    optimizer.step()
    moved = (linear.low_rank.A / 4 - A).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2 / 4), rtol=1e-3, atol=1e-6)
    spread = [as_peft(nn.Linear(1000, 2), 50, unit).A.std() * unit for unit in (1.0, 1 / 6)]
    torch.testing.assert_close(spread[0], spread[1], rtol=2e-2, atol=0)


def test_a_state_and_lora(setting):
    """The start of the state alone, calibrated; both parts train; equal size; a file that holds all of it."""
    task, base, context = setting
    torch.manual_seed(0)
    model = combined(task.fresh(base, 0), context, part=1 / 4, size=4.0, unit=1 / 3)
    assert size_of(model) == pytest.approx(budgets.ours(base.model, size=4.0), rel=budgets.TOLERANCE)
    assert {own.feed_forward for own in adapters(model)} == {None}
    assert len(adapted_layers(model)) == 2
    torch.manual_seed(0)
    alone = ntk(task.fresh(base, 0), context, rank=None, feed_forward_rank=None)
    torch.testing.assert_close(logits(model, context), logits(alone, context))
    model(**context.batches[0]).loss.backward()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    low_rank = {name for name in named if "low_rank" in name}
    assert len(low_rank) == 2 * 2 * 3
    assert all(named[name].grad.abs().sum() > 0 for name in named if not re.search(r"low_rank\.A$", name))
    assert adapter_bytes(model, base) > 4 * size_of(model)
    with torch.no_grad():
        for name in low_rank:
            named[name].fill_(0.1)
    assert (logits(model, context) - logits(alone, context)).abs().max() > 1e-2


def test_the_last_layer_alone(setting):
    task, base, context = setting
    model = combined(task.fresh(base, 0), context, part=1 / 4, size=4.0, pattern=budgets.LAST)
    places = [name for name, module in model.named_modules() if isinstance(module, LowRank)]
    assert len(places) == 2
    assert all("down_proj" in place for place in places)


@pytest.mark.parametrize("whitens", [False, True])
@torch.no_grad()
def test_lora_in_units_of_calibration(setting, whitens):
    """A x has the rms 1 at the start where it was measured, and B is held in parts of the output."""
    task, base, context = setting
    torch.manual_seed(0)
    model = combined(task.fresh(base, 0), context, part=1 / 2, size=4.0, output_unit=0.1, whitens=whitens)
    found, outputs = {}, {}

    def see(name, module, inputs, output):
        mask = context.batches[0]["attention_mask"].bool()
        A = module.A if module.coordinates is None else module.A @ module.coordinates
        found[name] = (module.units[0] * inputs[0][mask] @ A.mT).square().mean().sqrt().item()

    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            module.register_forward_hook(partial(see, name))
            outputs[name] = module.units[1]
    with model.disable_adapter():  # as it was measured
        logits(model, context)
    assert len(found) == 6
    least = 0.1 if whitens else 1 / 3  # a few tokens have less than all directions
    assert all(least < rms < 3 for rms in found.values())
    assert len(set(outputs.values())) == 6

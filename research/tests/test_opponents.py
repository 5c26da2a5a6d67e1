"""LoRA and its kin at tiny sizes, and LoRA beside a state: sizes, starts, units."""

import math

import pytest
import torch

from research.experiments import budgets
from research.experiments.method import Context
from research.experiments.methods import METHODS
from research.experiments.opponents import oft, rank_stabilised
from research.experiments.train import trainable

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

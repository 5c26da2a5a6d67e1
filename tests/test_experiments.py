"""The comparison at tiny sizes on a CPU: every method on every kind of task, the plan, the rows and the report."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from experiments import assets, budgets, pretraining
from experiments.__main__ import app
from experiments.classification import classifier_of
from experiments.methods import METHODS, Context
from experiments.plan import best_rate, neighbour, next_cells, pairs
from experiments.runner import Worker
from experiments.tasks import registry
from experiments.train import Cell, packed, thinned, trainable, training_order, unpacked

TASKS = {"chain-sum": 4, "sections-16": 4, "fashion-64": 3}  # steps


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder):
    """Assets of the right form with tiny models."""
    path = tmp_path_factory.mktemp("assets")
    patch = pytest.MonkeyPatch()
    patch.setenv("NTK_ASSETS", str(path))
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    patch.setattr(pretraining, "CONFIG", {**pretraining.CONFIG, **small, "patch_size": 14})
    patch.setattr(pretraining, "BATCH", 8)
    (path / "models").mkdir()
    shutil.copytree(model_folder, path / "models/smollm2-135m")
    shutil.copytree(model_folder, path / "models/minilm", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(path / "models/minilm")
    sizes = {"train": 24, "validation": 6, "test": 9}
    items = {name: [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(n)] for name, n in sizes.items()}
    texts = {name: [{"text": f"word {i} {i % 2}", "label": i % 2} for i in range(n)] for name, n in sizes.items()}
    assets.write_splits("chain-sum", items)
    assets.write_splits("sections", texts)
    assets.write_splits("python-docs", {"validation": [{"text": f"A passage, number {i}."} for i in range(64)]})
    rng = np.random.default_rng(0)
    for name in ("source", "target"):
        (path / "data" / f"fashion-{name}").mkdir()
        for split, n in sizes.items():
            pictures = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
            np.savez_compressed(
                path / "data" / f"fashion-{name}" / f"{split}.npz", images=pictures, labels=np.arange(n) % 2
            )
    pretraining.pretrain("cpu", steps=2)
    yield path
    patch.undo()


@pytest.fixture(scope="module")
def tasks(folder):
    return {name: replace(registry()[name], steps=steps, batch_size=4) for name, steps in TASKS.items()}


@pytest.fixture(scope="module")
def worker():
    return Worker("cpu")


@pytest.fixture(scope="module")
def rows(tasks, worker):
    """Every method once on every task, as a final run."""
    found = {}
    for task in tasks.values():
        for name, method in METHODS.items():
            if method.only(task):
                found[task.name, name] = worker(Cell(task.name, name, method.rates[1], 1, "final"), task)
    return found


def test_every_method_runs_on_every_task(rows):
    for (task, method), row in rows.items():
        if "error" in row:
            # tiny models leave little room to choose ranks
            assert "no ranks give" in row["error"], f"{task} {method}: {row['error']}"
            continue
        assert row["trainable_parameters"] > 0 or method == "head"
        assert row["adapter_bytes"] > 4 * row["trainable_parameters"] * (0.4 if method == "full" else 1)
        assert math.isfinite(row["forgetting"])
        assert row["curve"][-1][0] == TASKS[task]
        assert math.isfinite(row["test"]["loss"])
        assert sum(unpacked(row["test_correct"])) / 9 == row["test"]["share"]
    ran = {method for (_, method), row in rows.items() if "error" not in row}
    assert ran == set(METHODS)


def test_sizes_are_equal(rows):
    """Every method that is compared at equal size is within 5 % of ours."""
    for task in TASKS:
        sizes = {method: row["trainable_parameters"] for (name, method), row in rows.items()
                 if name == task and "error" not in row}  # fmt: skip
        for method in ("lora-attention", "lora-all", "lora-qv", "ntk-published", "prefix-memory"):
            if method in sizes and method not in ("ntk-published", "prefix-memory"):
                assert abs(sizes[method] / sizes["ntk"] - 1) <= budgets.TOLERANCE
        for rank in (2, 8, 32):
            if f"lora-attention-{rank}" in sizes:
                assert abs(sizes[f"lora-attention-{rank}"] / sizes[f"ntk-rank-{rank}"] - 1) <= budgets.TOLERANCE
        assert sizes["full"] > sizes["ntk"]
    assert rows["sections-16", "head"]["trainable_parameters"] == 0
    assert rows["sections-16", "head"]["head_parameters"] == 32 * 2 + 2


@pytest.mark.parametrize("magnitudes", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("pattern", [budgets.QUERY_VALUE, budgets.ATTENTION, None], ids=["qv", "attention", "all"])
def test_ranks_give_what_peft_makes_of_them(tasks, worker, pattern, magnitudes):
    """The number that peft's own layers then have."""
    task, build = tasks["chain-sum"], METHODS["lora-all"].build.func
    base = worker.base(task)
    model = build(task.fresh(base, 0), Context(task, base, []), lambda _: 9000, pattern, magnitudes)
    count = sum(p.numel() for p in trainable(model)[0])
    assert abs(count / 9000 - 1) <= budgets.TOLERANCE
    with pytest.raises(ValueError, match="no ranks give 7 parameters"):
        budgets.lora_ranks(base.model, 7, pattern, magnitudes)


@pytest.mark.parametrize("name", ["ntk", "start-scale", "prefix-memory", "lora-qv", "ia3"])
@pytest.mark.parametrize("task_name", TASKS)
def test_starts_are_close_to_the_frozen_model(tasks, worker, task_name, name):
    """What a method promises about its start; random prefixes are far."""
    task = tasks[task_name]
    base = worker.base(task)
    batch = task.batch(base, task.examples(base, "train", 0)[:4])

    @torch.no_grad()
    def output(name):
        model = task.fresh(base, 0)
        if name:
            model = METHODS[name].build(model, Context(task, base, [batch]))
        model.eval()
        if not task.has_head:
            return model(**batch).logits
        return classifier_of(model).pooled(**{k: v for k, v in batch.items() if k != "labels"})

    frozen = output(None)
    if name in ("prefix-memory", "lora-qv", "ia3"):
        torch.testing.assert_close(output(name), frozen)
    else:
        assert (output(name) - frozen).norm() < 0.5 * (output("prefix") - frozen).norm()


def test_prefix_of_encoders_is_real_tokens(tasks, worker):
    """Against the same model fed with the prefix as m more keys and values, in the first layer, by hand."""
    task = tasks["sections-16"]
    base = worker.base(task)
    batch = task.batch(base, task.examples(base, "train", 0)[:3])
    model = METHODS["prefix"].build(task.fresh(base, 0), Context(task, base, [batch]))
    attention = model.encoder.encoder.layer[0].attention.self
    seen = {}
    attention.register_forward_hook(lambda module, inputs, output: seen.update(hidden=inputs[0], out=output[0]))
    model.eval()(**batch)

    def heads(x):
        return x.unflatten(-1, (4, 8)).transpose(1, 2)

    query, key, value = (heads(layer(seen["hidden"])) for layer in (attention.query, attention.key, attention.value))
    prefix = attention.extension
    key, value = (torch.cat([p.expand(3, -1, -1, -1), x], 2) for p, x in ((prefix.key, key), (prefix.value, value)))
    logits = query @ key.transpose(-1, -2) / 8**0.5
    hidden = ~batch["attention_mask"].bool()[:, None, None]
    logits[..., prefix.key.shape[1] :] = logits[..., prefix.key.shape[1] :].masked_fill(hidden, -math.inf)
    expected = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["out"], expected)
    text = METHODS["prefix-text"].build(task.fresh(base, 0), Context(task, base, [batch]))
    first = text.encoder.encoder.layer[0].attention.self
    assert (first.extension.value[:, 0] - heads(first.value(seen["hidden"]))[0, :, 0]).abs().max() < 1e-5


def test_plan(tasks):
    """All rates first, then more at an end of the grid, then seeds at the best; rows of other steps do not count."""
    task, rates = tasks["sections-16"], METHODS["ntk"].rates

    def row(rate, share, stage="select", seed=0, steps=4):
        return {"task": task.name, "method": "ntk", "learning_rate": rate, "seed": seed, "stage": stage, "steps": steps,
                "validation": {"loss": 1.0, "share": share}}  # fmt: skip

    assert next_cells([], task, "ntk") == [Cell(task.name, "ntk", rate, 0, "select") for rate in rates]
    assert len(next_cells([row(rates[0], 0.5, steps=5)], task, "ntk")) == 4
    rows = [row(rate, 0.5 + i / 10) for i, rate in enumerate(rates)]
    assert [cell.learning_rate for cell in next_cells(rows, task, "ntk")] == [0.1]
    rows.append({**row(0.1, 0.0), "error": "the loss is not finite"})
    del rows[-1]["validation"]
    cells = next_cells(rows, task, "ntk")
    assert [(cell.learning_rate, cell.seed, cell.stage) for cell in cells] == [
        (rates[-1], s, "final") for s in (1, 2, 3)
    ]
    rows += [row(rates[-1], 0.8, "final", seed) for seed in (1, 3)]
    assert [cell.seed for cell in next_cells(rows, task, "ntk")] == [2]
    assert best_rate(task, [{"error": "all diverged"}]) is None
    assert [neighbour(rate, True) for rate in (1e-5, 3e-4, 0.01, 0.3)] == [3e-5, 1e-3, 0.03, 1.0]
    assert [neighbour(rate, False) for rate in (1e-5, 3e-4, 1.0)] == [3e-6, 1e-4, 0.3]


def test_the_most_informative_come_first():
    tasks = [task for task in registry().values() if "/" not in task.model]
    found = [(task.group, method) for task, method in pairs(tasks, list(METHODS))]
    groups = {task.group for task in tasks}
    assert set(found[: 3 * len(groups)]) == {(g, m) for g in groups for m in ("ntk", "lora-attention", "prefix")}


def test_small_pieces():
    correct = [True, False, False, True, True, False, True, False, True]
    assert unpacked(packed(correct)) == correct
    assert unpacked(packed([False, False])) == [False, False]
    assert thinned([1.0] * 7 + [3.0]) == [[i + 1, 3.0 if i == 7 else 1.0] for i in range(8)]
    assert thinned([2.0] * 120)[-1] == [120, 2.0]
    order = training_order(5, 12, seed=1)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert len(order) == 12
    assert order != training_order(5, 12, seed=2)

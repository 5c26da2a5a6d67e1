"""Cells of the comparison at tiny sizes on a CPU: every method on every kind of task."""

import math
from functools import partial

import pytest
import torch

from ntk_attention import NTKAttentionConfig
from ntk_attention.calibration import CalibrationSettings
from ntk_attention.tuner.adapter import parameter_shapes
from ntk_attention.tuner.geometry import Geometry, PartSize
from research.experiments import budgets
from research.experiments.classification import classifier_of
from research.experiments.method import Context
from research.experiments.methods import METHODS
from research.experiments.ours import adapters
from research.experiments.registry import registry
from research.experiments.rows import OF_ITEMS
from research.experiments.train import Cell, trainable, unpacked

TASKS = ("chain-sum", "sections-16", "fashion-64")


@pytest.fixture(scope="module")
def rows(tasks, worker):
    """Every method once on every task, as a final run."""
    found = {}
    for task in tasks.values():
        for name, method in METHODS.items():
            if method.only(task):
                rate = method.rates[1] if method.rates else 0.0
                found[task.name, name] = worker(Cell(task.name, name, rate, 1, "final"), task)
    return found


@pytest.mark.slow
def test_every_method_runs_on_every_task(rows):
    for (task, method), row in rows.items():
        if "error" in row:
            # tiny models leave little room to choose ranks
            assert "no ranks give" in row["error"], f"{task} {method}: {row['error']}"
            continue
        assert row["trainable_parameters"] > 0 or method in ("head", "zero-shot")
        assert row["adapter_bytes"] > 4 * row["trainable_parameters"] * (0.4 if method == "full" else 1)
        assert math.isfinite(row["forgetting"])
        assert math.isfinite(row["test"]["loss"])
        if METHODS[method].tier <= OF_ITEMS:
            assert sum(unpacked(row["test_correct"])) / 9 == row["test"]["share"]
    ran = {method for (_, method), row in rows.items() if "error" not in row}
    assert "as-small-heads" not in ran  # none of these has large heads
    assert set(METHODS) - ran - {"as-small-heads"} <= {"lora-mlp-quarter"}  # too small for tiny blocks


def test_large_heads_as_small_ones(tasks, worker):
    """The same start in the same coordinates as where no head counts as large."""
    task, models = tasks["chain-sum"], []
    base = worker.base(task)
    batch = task.batch(base, task.examples(base, "train", 0)[:4])
    assert METHODS["as-small-heads"].only(registry()["gemma-chain-sum"])
    assert not METHODS["as-small-heads"].only(task)
    none, all_heads = (
        partial(METHODS["ntk"].build, settings=CalibrationSettings(large_head_dim=size)) for size in (10**6, 1)
    )
    for build in (METHODS["as-small-heads"].build, none, all_heads):
        models.append(build(task.fresh(base, 0), Context(task, base, [batch])))
    for own, other, default in zip(*map(adapters, models), strict=True):
        assert own.unit == other.unit
        assert torch.equal(own.coordinates, other.coordinates)
        for name, parameter in own.named_parameters():
            assert torch.equal(parameter, other.get_parameter(name))
        assert not torch.allclose(default.coordinates, other.coordinates, rtol=1e-2)


def test_sizes_are_equal(rows, tasks, worker):
    """Every method that is compared at equal size is within 5 % of a full Z."""
    for task in TASKS:
        full_z = budgets.ours(worker.base(tasks[task]).model)
        sizes = {method: row["trainable_parameters"] for (name, method), row in rows.items()
                 if name == task and "error" not in row}  # fmt: skip
        for method in ("lora-attention", "lora-all", "lora-qv", "ntk-published", "prefix-memory"):
            if method in sizes and method not in ("ntk-published", "prefix-memory"):
                assert abs(sizes[method] / full_z - 1) <= budgets.TOLERANCE
        assert sizes["attention-alone"] == full_z
        assert sizes["ntk-quarter"] <= sizes["ntk"] < sizes["ntk-4x"]
        assert sizes["full"] > sizes["ntk"]
    assert rows["sections-16", "head"]["trainable_parameters"] == 0


def block_of(width: int, *sizes: int) -> tuple[PartSize, ...]:
    """The parts of a block with such layers from its input, and the one to its output."""
    ends = [(width, size) for size in sizes] + [(sizes[0], width)]
    return tuple(PartSize(str(i), *end) for i, end in enumerate(ends))


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(9, 3, 64, 64, block_of(576, 1536, 1536)),
        Geometry(12, 12, 32, 32, block_of(384, 1536)),
        Geometry(3, 3, 64, 64, block_of(192, 768)),
        Geometry(4, 1, 256, 256, block_of(640, 2048, 2048)),
        Geometry(14, 2, 64, 64, block_of(896, 4864, 4864)),
    ],
    ids=["smollm2-135m", "minilm", "vit-fashion", "gemma3-270m", "qwen2.5-0.5b"],
)
def test_sizes_that_are_compared(geometry):
    """As many parameters as a quarter of, one and four full Z, with the default's parts and in attention alone."""

    def size(**options):
        shapes = parameter_shapes(NTKAttentionConfig(**options), geometry)
        return sum(math.prod(shape) for name, shape in shapes.items() if name != "log_scale")

    full_z = size(rank=None, feed_forward_rank=None)
    for times, part in ((1 / 4, 1.0), (1.0, 1 / 2), (4.0, 1 / 2)):
        rank, in_block = budgets.divided(geometry, times, part)
        k = geometry.num_heads * (geometry.head_dim + 1)
        wanted = times * (full_z - k) + k
        assert abs(size(rank=rank, feed_forward_rank=in_block) / wanted - 1) <= budgets.TOLERANCE


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


@pytest.mark.parametrize("name", ["share-5", "prefix-memory", "lora-qv", "ia3"])
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


@torch.no_grad()
def test_prefix_from_text_continues_the_text(tasks, worker):
    """A prefix made of tokens of the training data does what those tokens do in front of the input."""
    task, m = tasks["chain-sum"], 6
    base = worker.base(task)
    batch = task.batch(base, task.examples(base, "train", 0)[:3])
    model = METHODS["prefix-text"].build.func(task.fresh(base, 0), Context(task, base, [batch]), m=m, from_text=True)
    tokens = batch["input_ids"][batch["attention_mask"].bool()]
    text, rest = tokens[None, :m], tokens[None, m : m + 9]
    expected = base.model.eval()(input_ids=torch.cat([text, rest], dim=1)).logits[:, m:]
    mask = torch.ones_like(rest)
    torch.testing.assert_close(model.eval()(input_ids=rest, attention_mask=mask).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_loss_that_is_not_finite_is_a_result(tasks, worker):
    row = worker(Cell("sections-16", "full", 1e30, 0, "select"), tasks["sections-16"])
    assert row["error"].startswith("the loss is not finite")
    assert "validation" not in row

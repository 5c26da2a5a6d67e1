"""What a cell of a language model saves: logits that no loss needs, and what the cells before have computed."""

import copy
from functools import partial

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ntk_attention import NTKAttentionConfig, calibrate
from ntk_attention.cli.data import IGNORED
from research.experiments.language import completion_loss, fuse_norms, loss_and_exact
from research.experiments.method import Context
from research.experiments.methods import METHODS
from research.experiments.ours import batches_from
from research.experiments.steps import own_loss
from research.experiments.tasks import Base
from research.experiments.train import Cell
from research.recording import rounded


@pytest.fixture(scope="module")
def task(tasks):
    return tasks["chain-sum"]


@pytest.mark.parametrize("method", ["full", "lora-all", "prefix", "ntk", "prefix-memory"])
def test_the_loss_is_the_models_own(task, worker, method):
    """With all its gradients, for completions of different lengths and places that nobody asks for."""
    base = worker.base(task)
    examples = task.examples(base, "train", 0)[-8:]
    batch = task.batch(base, examples)
    counts = [int((row != IGNORED).sum()) for row in batch["labels"]]
    model = METHODS[method].build(task.fresh(base, 0), Context(task, base, [batch])).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in parameters:
            p.add_(0.05 * torch.randn_like(p))
    loss = task.loss([examples])
    assert isinstance(loss, partial)
    assert sum(counts) < loss.keywords["most"] < batch["labels"].numel()
    expected, found = (f(model, batch) for f in (own_loss, loss))
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    first = {name: x[:1] for name, x in batch.items()}
    torch.testing.assert_close(completion_loss(model, first, counts[0]), own_loss(model, first))
    assert loss_and_exact(model, [examples[0][0]], 0)[0] == pytest.approx(
        own_loss(model.eval(), first).item(), rel=1e-5
    )
    assert model(**batch).logits.shape[:2] == batch["labels"].shape  # nothing stays on the model


def test_own_text_is_kept(task, worker, monkeypatch):
    """The start is that of `calibrate` itself, and the base model writes once for all cells."""
    base = Base(worker.base(task).model, worker.base(task).tokenizer)
    context = Context(task, base, [task.batch(base, task.examples(base, "train", 0)[:4])])
    plain = get_peft_model(task.fresh(base, 0), NTKAttentionConfig(task_type="CAUSAL_LM"))
    calibrate(plain, batches_from(context, "train"))
    models = [METHODS["ntk"].build(task.fresh(base, 0), context)]
    assert base.kept
    monkeypatch.setattr("research.experiments.ours.own_text", None)  # not called again
    models.append(METHODS["ntk"].build(task.fresh(base, 0), context))
    for model in models:
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), atol=0, rtol=0)


def test_the_base_model_is_scored_once(task, worker):
    base = worker.base(task)
    base.kept["unrelated loss"] = 17.0
    row = worker(Cell(task.name, "lora-qv", 1e-3, 1, "final"), task)
    assert row["unrelated_loss_before"] == 17.0
    del base.kept["unrelated loss"]
    row = worker(Cell(task.name, "lora-qv", 1e-3, 1, "final"), task)
    assert base.kept["unrelated loss"] == task.unrelated_loss(base, base.model)
    assert row["unrelated_loss_before"] == rounded(base.kept["unrelated loss"])


def test_fused_norms_are_those_of_the_model() -> None:
    """In a copy, too, whose norms have weights of their own."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    plain = LlamaForCausalLM(config)
    for p in plain.parameters():
        torch.nn.init.normal_(p)
    fused = copy.deepcopy(plain)
    fuse_norms(fused)
    fused = copy.deepcopy(fused)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(fused(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert "forward" in vars(fused.model.norm)
    with torch.no_grad():
        fused.model.norm.weight.zero_()
    assert not fused(ids).logits.any()

"""Training an adapter: by Trainer and by hand, with checkpointing, in other dtypes, compiled."""

import pytest
import torch
from transformers import (
    Trainer,
    TrainingArguments,
)

from ntk_attention.tuner.calls import during_calls
from ntk_attention.tuner.observation import adapted_layers
from tests.reference import relative_error
from tests.tiny import (
    INPUTS,
    TINY,
    adapted,
    logits,
    loss_of,
    tiny,
    trainable,
)

FILE = "adapter_model.safetensors"


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.randint(3, 64, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def train(folder, steps, resume=None):
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = adapted(init_weights=True)
    trainer = Trainer(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences())
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer.state.log_history


def test_trainer_resumes_from_its_checkpoint(tmp_path):
    whole, history = train(tmp_path / "whole", steps=4)
    train(tmp_path / "parts", steps=2)
    resumed, _ = train(tmp_path / "parts", steps=4, resume=str(tmp_path / "parts" / "checkpoint-2"))
    assert (tmp_path / "whole" / "checkpoint-4" / FILE).exists()
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    for name, parameter in trainable(resumed).items():
        torch.testing.assert_close(parameter, trainable(whole)[name])


def test_loop_by_hand_lowers_the_loss():
    model = adapted(init_weights=True).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = loss_of(model)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in before.items())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_against_none(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        base = tiny()
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model = adapted(base).train()
        loss_of(model).backward()
        gradients.append({n: p.grad for n, p in trainable(model).items()})
        assert base.is_gradient_checkpointing == checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
        assert gradient.abs().max() > 0


def test_bfloat16_base_keeps_a_float32_adapter():
    model = adapted(tiny(torch.bfloat16)).train()
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "ntk_states" not in n} == {torch.bfloat16}
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    loss = loss_of(model)
    loss.backward()
    torch.optim.AdamW(trainable(model).values(), lr=0.01).step()
    assert all(p.dtype == torch.float32 and not torch.equal(p, before[n]) for n, p in trainable(model).items())
    assert relative_error(logits(adapted(tiny(torch.bfloat16))), logits(adapted())) < 0.1


def test_autocast_against_float32():
    model = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = logits(model)
        loss_of(model).backward()
    assert relative_error(actual, logits(model)) < 0.1
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in trainable(model).values())


def test_autocast_keeps_the_prefix_in_float32():
    """As Trainer(bf16=True) runs it, without a cache: against the model whose queries, keys and values are rounded."""
    model = adapted()
    inputs = {**INPUTS, "use_cache": False}
    seen = []

    def watch(query, context, prefix, factor, rotation):
        seen.append((query.dtype, prefix.out.dtype))

    watchers = dict.fromkeys(adapted_layers(model).values(), watch)
    with during_calls(watchers=watchers), torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs)
    assert seen == [(torch.bfloat16, torch.float32)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_compile_fullgraph_against_none(implementation):
    model = adapted(TINY.build(implementation, torch.float32))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**INPUTS).logits, model(**INPUTS).logits)
    loss_of(compiled).backward()
    gradients = [p.grad.clone() for p in trainable(model).values()]
    model.zero_grad()
    loss_of(model).backward()
    torch.testing.assert_close(gradients, [p.grad for p in trainable(model).values()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_model_to_another_dtype(dtype):
    model = adapted()
    expected = logits(model)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert relative_error(logits(model), expected) < (1e-5 if dtype == torch.float64 else 0.1)

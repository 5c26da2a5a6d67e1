"""Checks of one training step, with and without activation checkpointing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .checks import as_base, passed_if
from .outputs import Outputs, difference, floats, run
from .subject import CHILD, PASSED, WRONG, NotApplicableError, Outcome, Subject, tuner_layers


def loss_of(outputs: Outputs) -> Tensor:
    """A fixed random combination of all outputs that have a gradient."""
    generator = torch.Generator().manual_seed(4)
    loss: Any = 0.0
    for x in floats(outputs).values():
        weights = torch.randn(x.shape, generator=generator).to(x)
        if x.requires_grad:
            usable = x.isfinite() & (x.abs() < 1e30)
            loss = loss + (torch.where(usable, x, 0.0) * weights).sum() / x.numel() ** 0.5
    if not isinstance(loss, Tensor):
        raise NotApplicableError("no output has a gradient")
    return loss


@contextmanager
def training(subject: Subject, model: nn.Module) -> Iterator[None]:
    """In training mode where the base model runs in it."""
    model.train(subject.trains)
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)


def gradients(subject: Subject, model: nn.Module) -> dict[str, Tensor]:
    """Of every trainable tensor that the loss reaches."""
    with training(subject, model):
        loss_of(run(model, subject.inputs.values)).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def reached(subject: Subject, names: list[str]) -> set[str]:
    """Attention modules of the base model whose outputs the loss depends on."""
    base = subject.fresh().requires_grad_(True)
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else next((x for x in output if isinstance(x, Tensor)), None)
            if first is not None and first.requires_grad:
                first.retain_grad()
                seen[name].append(first)

        return hook

    for name in names:
        base.get_submodule(name).register_forward_hook(keep(name))
    with training(subject, base):
        loss_of(run(base, subject.inputs.values)).backward()
    return {n for n, found in seen.items() if any(x.grad is not None and bool(x.grad.any()) for x in found)}


def training_step(subject: Subject) -> tuple[Outcome, list[str]]:
    """Every trainable tensor that the inputs reach has a finite gradient that is not zero; and what is not reached."""
    layers = tuner_layers(subject.trainee)
    used = subject.of_base(lambda: reached(subject, list(layers)))
    found = gradients(subject, subject.trainee)
    bad = []
    for name, parameter in subject.trainee.named_parameters():
        attention = name.removeprefix("base_model.model.").partition(f".{CHILD}.")[0]
        if parameter.requires_grad and attention in used:
            gradient = found.get(name)
            if gradient is None:
                bad.append(f"{name} has no gradient")
            elif not bool(gradient.isfinite().all()):
                bad.append(f"{name} has a gradient that is not finite")
            elif not bool(gradient.any()):
                bad.append(f"{name} has a gradient of zero")
    unused = sorted(set(layers) - used)
    if bad:
        return Outcome(WRONG, f"{len(bad)} of {len(found)}: {bad[0]}"), unused
    return Outcome(PASSED, f"{len(found)} tensors"), unused


def checkpointed(subject: Subject, use_reentrant: bool) -> Outcome:
    """Gradients with checkpointing are those without."""
    if not subject.trains:
        raise NotApplicableError("the base model does not train on these inputs")

    def change(model: Any, owner: Any) -> float:
        plain = gradients(subject, model)
        if not plain:
            raise NotApplicableError("no gradient")
        hook = []
        owner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        try:
            if use_reentrant:  # which needs inputs that have gradients
                embedding = owner.get_input_embeddings()
                hook.append(embedding.register_forward_hook(lambda m, args, output: output.requires_grad_(True)))
            return difference(plain, gradients(subject, model))
        finally:
            owner.gradient_checkpointing_disable()
            for handle in hook:
                handle.remove()

    def of_base() -> float:
        """Its own attention modules train, as with any other method."""
        base = subject.fresh().requires_grad_(False)
        for name in tuner_layers(subject.trainee):
            base.get_submodule(name).requires_grad_(True)
        return change(base, base)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base_apart = subject.of_base(of_base)
        if base_apart > subject.tolerance:
            raise NotApplicableError(f"checkpointing changes the base model's own gradients by {base_apart:.1e}")
        apart = change(subject.trainee, subject.trainee.get_base_model())
    return passed_if(as_base(subject, base_apart, apart), f"{apart:.1e}")

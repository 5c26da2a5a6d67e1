"""Training a state of a prefix on: the model with the state learns to say what the model with the prefix says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.moments import SecondMoments, inverse_root, select_rows, whitening
from ..calibration.settings import CalibrationSettings
from ..ops.exact import LayerPrefix, together
from ..ops.reference import Block, merge
from ..progress import Reporter
from ..tuner.adapter import PrefixAdapter
from ..tuner.calls import exact_prefix
from ..tuner.observation import adapted_layers, evaluating, observe

WARMUP_STEPS = 10
COORDINATES = CalibrationSettings(eigenvalue_floor=1e-2)
Batches = Sequence[Mapping[str, Any]]


def distill(
    model: Any,
    prefix: Mapping[str, LayerPrefix],
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int = 200,
    learning_rate: float = 2e-3,
    kept: Mapping[str, LayerPrefix] | None = None,
    targets: Sequence[Tensor] | None = None,
    adapter_name: str = "default",
    reporter: Reporter | None = None,
) -> list[float]:
    """Lower the KL divergence of the model with a state from the model that sees the prefix, on text after it.

    The states train in coordinates in which every direction moves the output alike, as `calibrate` sets them, with Adam
    and a rate that falls to zero along a cosine.

    Args:
        model: with an NTK-Attention adapter that `fit` made.
        prefix: what the states stand for, by layer.
        batches: text after the prefix, at the positions from 0 on.
        steps: of one batch each, in turn.
        learning_rate: the largest.
        kept: tokens of the prefix that the model goes on seeing, by layer.
        targets: logits of the model that sees the prefix, where they are known; see `teacher_logits`.
        adapter_name: which adapter.
        reporter: told about every step.

    Returns:
        The KL divergence of every step, in nats per token.

    Raises:
        ValueError: without such an adapter or batches, or if the divergence becomes NaN.
    """
    layers = adapted_layers(model, adapter_name)
    batches = list(batches)
    if not batches:
        raise ValueError("distill got no batches: text that follows the prefix is expected")
    targets = teacher_logits(model, prefix, batches, kept=kept) if targets is None else targets
    parameters = [p for layer in layers.values() for p in layer[adapter_name].parameters() if p.requires_grad]
    with exact_prefix(layers, kept or {}):
        set_coordinates(model, batches, adapter_name)
        return match(model, batches, targets, parameters, steps, learning_rate, reporter)


@torch.no_grad()
def teacher_logits(
    model: Any, prefix: Mapping[str, LayerPrefix], batches: Batches, kept: Mapping[str, LayerPrefix] | None = None
) -> list[Tensor]:
    """What the model that sees the prefix (and, after it, the kept tokens) says: [B, L, vocabulary] for every batch."""
    layers = adapted_layers(model)
    whole = {name: together(tokens, (kept or {}).get(name)) for name, tokens in prefix.items()}
    with evaluating(model), exact_prefix(layers, whole, resting=layers):
        return [model(**batch).logits for batch in batches]


def match(
    model: Any,
    batches: Batches,
    targets: Sequence[Tensor],
    parameters: Sequence[nn.Parameter | Tensor],
    steps: int,
    learning_rate: float,
    reporter: Reporter | None = None,
) -> list[float]:
    """Train the parameters, as `distill`, on given logits; returns the divergence of every step."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.95))
    warmup = min(WARMUP_STEPS, max(steps // 5, 1))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - warmup, 1)),
        ],
        [warmup],
    )
    if reporter is not None:
        reporter.stage("distill", steps)
    history: list[Tensor] = []
    with evaluating(model):
        for step in range(steps):
            batch, target = batches[step % len(batches)], targets[step % len(batches)]
            loss = divergence(target, model(**batch).logits).mean()
            grads = torch.autograd.grad(loss, list(parameters))
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            history.append(loss.detach())
            if reporter is not None and (step % 10 == 9 or step == steps - 1):
                value = history[-1].item()
                if value != value:
                    raise ValueError(f"the divergence is NaN at step {step}: lower the learning rate ({learning_rate})")
                reporter.advance(step % 10 + 1, kl=value)
    for parameter in parameters:
        parameter.grad = None
    return [loss.item() for loss in history]


def divergence(expected: Tensor, actual: Tensor) -> Tensor:
    """KL(expected || actual) of two tensors of logits [..., vocabulary]: [...] in nats."""
    expected, actual = (torch.log_softmax(x.float(), dim=-1) for x in (expected, actual))
    return (expected.exp() * (expected - actual)).sum(dim=-1)


def set_coordinates(model: Any, batches: Batches, adapter_name: str = "default") -> None:
    """Coordinates in which a step of Z or log k moves the output alike in every direction; the states stay the same."""
    layers = adapted_layers(model, adapter_name)
    moments = {name: Moments(layer[adapter_name]) for name, layer in layers.items()}
    observe(model, layers, batches, {name: m.observe for name, m in moments.items()}, adapter_name=adapter_name)
    for m in moments.values():
        m.set_coordinates()


class Moments:
    """Second moments of g = d out / d Z per head, at the state as it stands."""

    def __init__(self, adapter: PrefixAdapter):
        self.adapter = adapter
        H, r = adapter.num_heads, adapter.num_features
        self.moments = SecondMoments((H, r, r), torch.float64, adapter.log_k.device)
        self.square, self.share = 0.0, 0.0

    def observe(self, query: Tensor, context: Block, prefix: Block | None, x: Tensor, counts: Tensor) -> None:
        H = len(self.moments.sum)
        if prefix is None:
            raise ValueError("the adapter rests: an active one is expected")
        whole = merge(Block(context.out.float(), context.lse.float()), prefix)
        phi, row_scale = self.adapter.feature_map.scaled(x.float())
        b = self.adapter.log_scale.repeat_interleave(query.shape[1] // H)[:, None]
        g = phi * torch.exp(row_scale + b - whole.lse)[..., None]
        g, out, share = (select_rows(x, counts, H) for x in (g, whole.out, torch.exp(prefix.lse - whole.lse)))
        self.moments.add(g.double())
        self.square += out.double().square().mean().item() * g.shape[1]
        self.share += share.double().mean().item() * g.shape[1]

    @torch.no_grad()
    def set_coordinates(self) -> None:
        adapter, num_rows = self.adapter, self.moments.num_rows
        self.moments.end_kind()
        root = whitening if adapter.feature_map.constant else inverse_root
        C = root(self.moments.mean(), COORDINATES.eigenvalue_floor)
        plain = adapter.plain_leading().clone()
        log_k = adapter.plain_scaled()
        share = min(max(self.share / num_rows, 0.01), 1.0)
        adapter.set_coordinates(C * (self.square / num_rows) ** 0.5, COORDINATES.log_k_step / share)
        adapter.set_plain(plain, log_k)

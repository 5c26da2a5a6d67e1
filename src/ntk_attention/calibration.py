"""Data-driven initialisation: where the prefix of every head starts, and in which coordinates it trains.

In a real model the log-normalisers of the heads differ by many nats, the features are almost constant and correlated,
and values differ in size between layers. With one start for all, the prefix is invisible in some heads and drowns
others. Two passes of a few batches through the frozen model measure, per head,

1. b, the mean log-sum-exp of its attention, and the size of phi(q).1: they set k so that the prefix holds `share` of
   the attention;
2. the moments of g(q) = d out / d Z = phi(q) e^{b - lse}, which say how an output answers to a change of Z. They give
   - coordinates in which the features are centred on the constant one and white, in units of the head's output;
   - the Z that changes the outputs of the frozen model least: the least-squares fit of the prefix's own value
     phi(q)Z / phi(q)k to the head's output.

All of it is a change of coordinates and a start: saved files hold plain Z, k and b.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layer import NTKAttentionLayer, PrefixAdapter
from .operation import Block
from .sdpa import HIDDEN

EIGENVALUE_FLOOR = 1e-2  # of the whitening, relative to the largest: below it features are noise
RIDGE = 1e-3  # of the start, in white coordinates


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str = "default",
    share: float = 0.15,
) -> None:
    """Start an adapter close to the frozen model, in coordinates that train well.

    Call it after `get_peft_model` and before the optimizer is made. A few thousand tokens are enough.

    Args:
        model: with an NTK-Attention adapter, whose Z, k and b are replaced.
        batches: keyword arguments of the model's forward, a few batches of the training data. Tokens whose
            `attention_mask` is 0 do not count.
        adapter_name: which adapter.
        share: of every head's attention that the prefix holds at the start.

    Raises:
        ValueError: without such an adapter, without its constant feature, with an empty `batches`, with batches that
            never reach an adapted layer, or with a share outside (0, 1).
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, NTKAttentionLayer) and adapter_name in module
    }
    if not layers:
        raise ValueError(f"the model has no NTK-Attention adapter {adapter_name!r}: call get_peft_model first")
    if not all(layer[adapter_name].feature_map.constant for layer in layers.values()):
        raise ValueError("calibrate needs the constant feature: make the config with constant_feature=True")
    batches = list(batches)
    if not batches:
        raise ValueError("calibrate got no batches: a few batches of training data are expected")

    statistics = {name: HeadStatistics(layer[adapter_name]) for name, layer in layers.items()}
    observe(model, layers, batches, {name: s.observe_scale for name, s in statistics.items()})
    for name, s in statistics.items():
        s.set_scale(share, name)
    observe(model, layers, batches, {name: s.observe_moments for name, s in statistics.items()})
    for s in statistics.values():
        s.set_coordinates_and_start()


Observer = Callable[[Tensor, Block, float, Tensor | None], None]


def observe(
    model: nn.Module,
    layers: Mapping[str, NTKAttentionLayer],
    batches: list[Mapping[str, Any]],
    observers: Mapping[str, Observer],
) -> None:
    """Run the frozen model over the batches and show its attention to the observers, one for each layer."""
    device = next(p.device for p in model.parameters())
    with evaluating(model), torch.no_grad():
        for batch in batches:
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            masks = [batch[k] for k in ("attention_mask", "decoder_attention_mask") if batch.get(k) is not None]
            for name, layer in layers.items():
                layer.observer = lambda query, frozen, factor, see=observers[name], masks=masks: see(
                    query, frozen, factor, real_tokens(query, masks)
                )
            try:
                model(**batch)
            finally:
                for layer in layers.values():
                    layer.observer = None


@contextmanager
def evaluating(model: nn.Module):
    """Without dropout, leaving every module's mode as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def real_tokens(query: Tensor, masks: list[Tensor]) -> Tensor | None:
    """The padding mask [B, L] that belongs to the queries [B, H, L, d], if one has their shape."""
    shape = (query.shape[0], query.shape[2])
    return next((mask.bool() for mask in masks if tuple(mask.shape) == shape), None)


class HeadStatistics:
    """What calibration measures of one layer, per head of the state."""

    def __init__(self, adapter: PrefixAdapter):
        self.adapter = adapter
        self.num_rows = 0
        self.sum_lse: Tensor | float = 0.0
        self.sum_log_mass: Tensor | float = 0.0
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0
        self.sum_square: Tensor | float = 0.0

    def rows(self, query: Tensor, frozen: Block, factor: float, real: Tensor | None) -> tuple[Tensor, ...]:
        """phi [H, N, r], its log scale, lse [H, N] and out [H, N, d_v] of the N rows of each state head that count."""
        H = len(self.adapter.log_k)
        phi, row_scale = self.adapter.feature_map.scaled(query.float() * factor)
        counts = torch.isfinite(frozen.lse) & (frozen.lse > max(HIDDEN, torch.finfo(query.dtype).min) / 2)
        counts = counts.all(dim=1)  # [B, L]: masks are the same for all heads
        if real is not None:
            counts = counts & real

        def select(x: Tensor) -> Tensor:
            per_head = x.transpose(0, 1)[:, counts]  # [H_query, N, ...]
            return per_head.reshape(H, -1, *per_head.shape[2:])

        return select(phi), select(row_scale), select(frozen.lse.float()), select(frozen.out.float())

    def normaliser(self, phi: Tensor) -> Tensor:
        """phi.1 over the features that carry the normaliser: [H, N]."""
        features = self.adapter.normaliser_features
        return (phi if features is None else phi[..., features.to(phi.device)]).sum(dim=-1)

    def observe_scale(self, query: Tensor, frozen: Block, factor: float, real: Tensor | None) -> None:
        phi, row_scale, lse, _ = self.rows(query, frozen, factor, real)
        self.num_rows += lse.shape[1]
        self.sum_lse = self.sum_lse + lse.double().sum(dim=1)
        self.sum_log_mass = self.sum_log_mass + (torch.log(self.normaliser(phi)) + row_scale).double().sum(dim=1)

    @torch.no_grad()
    def set_scale(self, share: float, name: str) -> None:
        if self.num_rows == 0:
            raise ValueError(f"no token of the batches reached {name}: are all of them padding?")
        # the prefix holds `share` where log(phi.k) + b - lse = log(share / (1 - share))
        self.adapter.log_scale.copy_(self.sum_lse / self.num_rows)
        log_k = math.log(share / (1 - share)) - self.sum_log_mass / self.num_rows
        self.adapter.log_k.copy_(log_k[:, None].expand_as(self.adapter.log_k))

    def observe_moments(self, query: Tensor, frozen: Block, factor: float, real: Tensor | None) -> None:
        phi, row_scale, lse, out = self.rows(query, frozen, factor, real)
        weight = row_scale + self.adapter.log_scale[:, None]
        log_k = self.adapter.log_k[:, :1]
        prefix_lse = torch.log(self.normaliser(phi)) + log_k + weight
        lse_all = torch.logaddexp(lse, prefix_lse)
        g = phi * torch.exp(weight - lse_all)[..., None]
        wanted = out * torch.exp(prefix_lse - lse_all)[..., None]
        self.gram = self.gram + (g.transpose(1, 2) @ g).double()
        self.cross = self.cross + (g.transpose(1, 2) @ wanted).double()
        self.sum_square = self.sum_square + out.double().square().mean(dim=2).sum(dim=1)

    @torch.no_grad()
    def set_coordinates_and_start(self) -> None:
        gram, cross = self.gram / self.num_rows, self.cross / self.num_rows
        output_rms = (self.sum_square / self.num_rows).sqrt()
        coordinates = whitening(gram)
        white_gram = coordinates.transpose(1, 2) @ gram @ coordinates
        ridge = RIDGE * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        start = torch.linalg.solve(white_gram + ridge, coordinates.transpose(1, 2) @ cross)
        coordinates = coordinates * output_rms[:, None, None]
        start = start / output_rms[:, None, None]
        self.adapter.set_coordinates(coordinates)
        if self.adapter.leading == "Z":
            self.adapter.Z.copy_(start)
        else:
            rank = self.adapter.Z_A.shape[-1]
            U, S, Vh = torch.linalg.svd(start, full_matrices=False)
            root = S[:, :rank].sqrt()
            self.adapter.Z_A.copy_(U[..., :rank] * root[:, None])
            self.adapter.Z_B.copy_(root[..., None] * Vh[:, :rank])


def whitening(gram: Tensor) -> Tensor:
    """C [H, r, r] with C^T gram C = 1 (up to the eigenvalue floor), the last feature being the constant one.

    The other features are first centred: their regression on the constant feature is taken away.
    """
    constant = gram[:, -1:, -1:]
    mean = gram[:, -1:, :-1] / constant  # [H, 1, r - 1]
    covariance = gram[:, :-1, :-1] - mean.transpose(1, 2) * mean * constant
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    floor = EIGENVALUE_FLOOR * eigenvalues[:, -1:].clamp_min(torch.finfo(gram.dtype).tiny)
    root = eigenvectors * eigenvalues.clamp_min(floor).rsqrt()[:, None, :] @ eigenvectors.transpose(1, 2)
    C = torch.zeros_like(gram)
    C[:, :-1, :-1] = root
    C[:, -1:, :-1] = -mean @ root
    C[:, -1:, -1:] = constant.rsqrt()
    return C

"""Experiment 4: the same questions for one attention layer of SmolLM2.

The layer sees TOKENS tokens of a text behind CONTEXT others. The context is taken away and a trained prefix stands in
its place, once as m prefix tokens P through the frozen W_K and W_V (Algorithm 1), once as (Z, k) with r features
(Algorithm 2). Both learn to return what the layer returned with its context; loss 1 is that of no prefix at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn import functional

from ..ops.attention import ntk_attention
from ..ops.features import FeatureMap, feature_map
from ..ops.state import PrefixState
from ..progress import Reporter
from .fits import power_law
from .setting import Loader, Row, Setting

CONTEXT, TOKENS = 512, 256
LAYER = 10  # of 30
STEPS = 120
LENGTHS = tuple(4**k for k in range(7))  # m = 1 ... 2^12
RANKS = tuple(4**k for k in range(1, 6))  # r = 4 ... 2^10
START_LENGTH = 2**10  # of the prefix whose state training of (Z, k) starts from
RATES = (0.03, 0.1, 0.3)  # of Adam, in units of the root mean square of what is trained; the best is kept
PROBES = 24  # random directions of the output, in which the kernel is looked at
Parameters = tuple[Tensor, ...]
Output = Callable[[Parameters], Tensor]  # -> [H, TOKENS, d]


@dataclass(frozen=True)
class Layer:
    """One frozen attention layer and what it saw."""

    query: Tensor  # [1, H, TOKENS, d], rotated
    key: Tensor  # [1, H_kv, TOKENS, d], rotated
    value: Tensor  # [1, H_kv, TOKENS, d]
    target: Tensor  # [1, H, TOKENS, d], with the context
    context: Tensor  # [CONTEXT, D], the layer's inputs that are taken away
    W_K: Tensor  # [D, H_kv d]
    W_V: Tensor  # [D, H_kv d]

    def heads(self, tokens: Tensor) -> Tensor:
        """[m, H_kv d] -> [1, H_kv, m, d]."""
        return tokens.view(len(tokens), -1, self.query.shape[-1]).transpose(0, 1)[None]

    def with_prefix(self, key: Tensor, value: Tensor) -> Tensor:
        """The output behind prefix tokens [1, H_kv, m, d] that every query sees."""
        m, L = key.shape[2], self.query.shape[2]
        seen = torch.ones(L, m + L, dtype=torch.bool, device=key.device).tril(m)
        key, value = torch.cat([key, self.key], dim=2), torch.cat([value, self.value], dim=2)
        return functional.scaled_dot_product_attention(self.query, key, value, seen, enable_gqa=True)


@torch.no_grad()
def real_layer(load_model: Loader, device: str) -> Layer:
    """Layer LAYER of a model, on a piece of the Python reference that every installation holds."""
    from pydoc_data.topics import topics

    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model: Any
    model, tokenizer = load_model()
    model.requires_grad_(False)
    ids = tokenizer(topics["types"], return_tensors="pt")["input_ids"][:, : CONTEXT + TOKENS]
    attention, caught = model.model.layers[LAYER].self_attn, {}
    attention.register_forward_pre_hook(lambda module, args, kwargs: caught.update(kwargs), with_kwargs=True)
    model.model.layers = model.model.layers[: LAYER + 1]
    model.model(ids)
    hidden = caught["hidden_states"][0]  # [CONTEXT + TOKENS, D]
    heads = lambda rows: rows.view(len(rows), -1, attention.head_dim).transpose(0, 1)[None]  # noqa: E731
    query, key, value = (heads(hidden @ p.weight.T) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    query, key = apply_rotary_pos_emb(query, key, *caught["position_embeddings"])
    target = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    query, key, value, target = (t[:, :, CONTEXT:].contiguous().to(device) for t in (query, key, value, target))
    W_K, W_V = (projection.weight.T.to(device) for projection in (attention.k_proj, attention.v_proj))
    return Layer(query, key, value, target, hidden[:CONTEXT].to(device), W_K, W_V)


def prefix_start(layer: Layer, m: int, generator: torch.Generator) -> Tensor:
    """P [m, D]: inputs of the context, drawn at random, plus 5 % of noise."""
    rows = torch.randint(0, len(layer.context), (m,), generator=generator, device=layer.context.device)
    P = layer.context[rows]
    noise = torch.randn(P.shape, generator=generator, device=P.device)
    return P + 0.05 * layer.context.square().mean().sqrt() * noise


def prefix_parts(layer: Layer, m: int, generator: torch.Generator) -> tuple[Parameters, Output]:
    """What to train and the output as a function of it, for m prefix tokens."""
    P = prefix_start(layer, m, generator)
    return (P,), lambda parts: layer.with_prefix(layer.heads(parts[0] @ layer.W_K), layer.heads(parts[0] @ layer.W_V))[
        0
    ]


def state_parts(layer: Layer, phi: FeatureMap, generator: torch.Generator) -> tuple[Parameters, Output]:
    """The same for (Z, log k), started from a prefix of START_LENGTH tokens.

    Both are trained in units of each feature's mean over the queries, which folds back into plain Z and k.
    """
    factor, groups = layer.query.shape[-1] ** -0.25, layer.query.shape[1] // layer.key.shape[1]
    P = prefix_start(layer, START_LENGTH, generator)
    keys, values = (layer.heads(P @ W)[0].repeat_interleave(groups, dim=0) for W in (layer.W_K, layer.W_V))
    phi_keys = phi.scaled(keys * factor)
    phi_queries = phi.scaled(layer.query[0] * factor)
    b = phi_keys.row_scale.amax(dim=1)  # [H]
    weight = phi_keys.features * torch.exp(phi_keys.row_scale - b[:, None])[..., None]  # [H, m, r]
    units = phi_queries.features.mean(dim=1) + 1e-12  # [H, r]
    Z, k = weight.mT @ values, weight.sum(dim=1) + 1e-12

    def output(parts: Parameters) -> Tensor:
        state = PrefixState.trusted(parts[0] / units[..., None], parts[1].exp() / units, b, phi)
        return ntk_attention(
            layer.query, layer.key, layer.value, state, is_causal=True, enable_gqa=True, backend="eager"
        )[0]

    return (Z * units[..., None], (k * units).log()), output


def kernel_of(output: Output, parts: Parameters, probes: Tensor) -> Tensor:
    """The kernel J J^T in PROBES random directions [PROBES, H, TOKENS, d] of the output."""
    pull = vjp(lambda *p: output(p), *parts)[1]
    rows = torch.stack([torch.cat([g.flatten() for g in pull(probe)]) for probe in probes])
    return rows @ rows.T


def train(layer: Layer, parts: Parameters, output: Output, rate: float, generator: torch.Generator) -> Row:
    """STEPS steps of Adam, the rate halved every 40, on three quarters of the queries; the others are held out."""
    target = layer.target[0]
    held = torch.arange(target.shape[1], device=target.device) % 4 == 3
    none = layer.with_prefix(layer.key[:, :, :0], layer.value[:, :, :0])[0] - target  # no prefix at all
    probes = torch.randn(PROBES, *target.shape, generator=generator, device=target.device) * ~held[:, None]
    trained = [part.clone().requires_grad_() for part in parts]
    sizes = [part.square().mean().sqrt().clamp_min(1e-8).item() for part in parts]
    optimizer = torch.optim.Adam([{"params": [p], "lr": rate * s} for p, s in zip(trained, sizes, strict=True)])
    losses, held_out = [], []
    for step in range(STEPS + 1):
        error = output(tuple(trained)) - target
        loss = error[:, ~held].square().sum() / none[:, ~held].square().sum()
        losses.append(loss.item())
        held_out.append((error[:, held].square().sum() / none[:, held].square().sum()).item())
        if step < STEPS:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5 ** (1 / 40)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    end = tuple(part.detach() for part in trained)
    before, after = kernel_of(output, parts, probes), kernel_of(output, end, probes)
    drift = [(a - b).norm().item() / b.norm().item() for a, b in zip(end, parts, strict=True)]
    return {
        "loss": losses,
        "held_out": held_out,
        "parameters": sum(part.numel() for part in parts),
        "drift": drift,
        "rate": rate,
        "alignment": ((before * after).sum() / before.norm() / after.norm()).item(),
        "kernel_change": ((after - before).norm() / before.norm()).item(),
    }


def measure(setting: Setting, reporter: Reporter, load_model: Loader) -> list[Row]:
    """All rows; of the setting only device and seed count."""
    reporter.stage("load a layer")
    layer = real_layer(load_model, setting.device)
    reporter.stage("bridge", len(RATES) * (len(LENGTHS) + len(RANKS) + 1))
    rows: list[Row] = []

    def run(row: Row, parts: Parameters, output: Output) -> None:
        tried = []
        for rate in RATES:
            tried.append(row | train(layer, parts, output, rate, setting.generator(5)))
            reporter.advance()
        rows.append(min(tried, key=lambda r: r["loss"][-1] if math.isfinite(r["loss"][-1]) else math.inf))

    for m in LENGTHS:
        run({"kind": "prefix", "m": m}, *prefix_parts(layer, m, setting.generator(4)))
    d = layer.query.shape[-1]
    for r in RANKS:
        phi = feature_map("positive_random", num_features=r, seed=setting.seed).bind(d).to(setting.device)
        run({"kind": "positive_random", "r": r}, *state_parts(layer, phi, setting.generator(4)))
    run({"kind": "elu", "r": d}, *state_parts(layer, feature_map("elu"), setting.generator(4)))
    return rows


def words(rows: list[Row]) -> list[str]:
    """What was seen."""
    prefix, random = ([r for r in rows if r["kind"] == kind] for kind in ("prefix", "positive_random"))
    (elu,) = (r for r in rows if r["kind"] == "elu")
    text = []
    for name, size, runs in (("prefix tokens", "m", prefix), ("(Z, k), positive random features", "r", random)):
        best = min(runs, key=lambda r: r["loss"][-1])
        fit = power_law([r[size] for r in runs], [r["loss"][-1] for r in runs])
        series = ", ".join(f"{r[size]}: {r['loss'][-1]:.3g} ({r['held_out'][-1]:.3g})" for r in runs)
        text.append(f"{name}, loss (held out) by {size}, of that without a prefix: {series}.")
        falls = "falls all the way" if best is runs[-1] else f"is smallest at {size} = {best[size]}"
        text.append(f"{name}: the loss {falls}; as a power of {size}, exponent {fit}.")
        text.append(f"{name}: {laziness(runs, size)}")
    text.append(
        f"(Z, k), elu, r = {elu['r']}: loss {elu['loss'][-1]:.3g} ({elu['held_out'][-1]:.3g}) from "
        f"{elu['loss'][0]:.3g} at the start, in coordinates that are not calibrated. The rates tried were "
        f"{', '.join(map(str, RATES))} for each run; the one with the smallest training loss is shown."
    )
    return text


def laziness(runs: list[Row], size: str) -> str:
    """In words, how far parameters and kernel went; lazy training leaves both where they were."""
    drift, turn = ([f(r) for r in runs] for f in (lambda r: r["drift"][0], lambda r: 1 - r["alignment"]))
    lazy = [r[size] for r in runs if r["drift"][0] < 0.05 and r["kernel_change"] < 0.1]
    return (
        f"{'P' if size == 'm' else 'Z'} moves by {min(drift):.0%} to {max(drift):.0%} of its norm, the kernel by "
        f"{min(r['kernel_change'] for r in runs):.0%} of its norm or more (1 - cosine: {min(turn):.2g} to "
        f"{max(turn):.2g}): "
        + (f"lazy at {size} = {', '.join(map(str, lazy))}." if lazy else "lazy at none of these sizes.")
    )

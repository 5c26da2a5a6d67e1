"""The best state for a given prefix and given queries: two convex problems per head, in closed form or nearly so.

For a query q let D_c, N_c be the normaliser and the numerator of the real tokens that it sees, D_p, N_p those of the
prefix, D = D_c + D_p, and t = (N_c + N_p) / D the output that is wanted. A state gives

    (N_c + phi(q)^T Z) / (D_c + phi(q)^T k).

1. k: phi(q)^T k should be D_p. In units of D that is the prefix's share of the attention; least squares with k >= 0 on
   the nonnegative features, lifted there to a small floor.
2. Z, given k: phi(q)^T Z should be t (D_c + phi(q)^T k) - N_c. In units of D_c + phi(q)^T k the residual is the error
   of the output itself, so this ridge regression has the least output error that any Z can have with this k.

Both read the queries only through sums of g g^T and g y^T, in float64: memory does not grow with the number of queries.

Where all features are nonnegative, the output phi(q)^T Z / phi(q)^T k is a mean of the values v_j = Z_j / k_j of r
pseudo-tokens. The ridge of Z is on those: they stay of the size of real values, so that no query, however unlike those
of the calibration, gets an output out of range, and the floor of k lets every feature have a say. Where features have
signs, the ridge is relative to each feature's own variance. Its size is chosen for each head on batches that the sums
do not hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..calibration.moments import select_rows
from ..ops.attention import exact_block
from ..ops.exact import LayerPrefix, together
from ..ops.features import FeatureMap
from ..ops.reference import Block, merge
from ..ops.state import PrefixState
from ..progress import Reporter
from ..tuner.adapter import PrefixAdapter
from ..tuner.calls import exact_prefix
from ..tuner.coordinates import solve_by_qr
from ..tuner.layer import NTKAttentionLayer
from ..tuner.observation import adapted_layers, observe
from ..tuner.routing import query_scale

SMALLEST = 1e-280  # in the place of zero
RIDGES = tuple(10.0**k for k in range(-8, 2))
HELD_OUT_EVERY = 4  # batches
MAX_BYTES = 6 * 2**30  # of sums at once; more layers than that are fitted one group after another
INTERIOR_STEPS = 40
RARE = 1e-2
FLOOR = 0.1  # of the prefix's share of the attention, spread over the features


@dataclass
class FitReport:
    """How well the states fit, by layer: [H] each."""

    # rms error of the output / rms effect of the prefix on it, on batches that the fit did not see
    error: dict[str, Tensor] = field(default_factory=dict)
    share_error: dict[str, Tensor] = field(default_factory=dict)  # rms error of the prefix's share of the attention

    def mean_error(self) -> float:
        return torch.cat(list(self.error.values())).mean().item()


def fit(
    model: nn.Module,
    prefix: Mapping[str, LayerPrefix],
    batches: Iterable[Mapping[str, Any]],
    *,
    kept: Mapping[str, LayerPrefix] | None = None,
    adapter_name: str = "default",
    reporter: Reporter | None = None,
) -> FitReport:
    """Make the states of an adapter the best ones for a prefix and for the queries of some text that follows it.

    Queries and wanted outputs are those of the model that attends to the prefix itself, in all layers at once.

    Args:
        model: with an NTK-Attention adapter, of any feature map, rank and kind of state heads.
        prefix: of the layers that are to be fitted, by name, such as `by_layer` makes of `prefix_of_cache`.
        batches: keyword arguments of the model's forward: text at the positions from 0 on. Every fourth batch chooses
            the ridge.
        kept: more tokens of the prefix, by layer, which the model goes on seeing: the state does not stand for them.
        adapter_name: which adapter.
        reporter: told about every batch.

    Raises:
        ValueError: without such an adapter, if the prefix fits no layer of it, or with fewer than two batches.
    """
    layers = adapted_layers(model, adapter_name)
    unknown = [name for name in prefix if name not in layers]
    if unknown or not prefix:
        raise ValueError(f"the prefix is for {unknown or 'no layer'}, the adapter has {', '.join(layers)}")
    batches = list(batches)
    if len(batches) < 2:
        raise ValueError(f"fit needs two batches or more, one of them to choose the ridge with, got {len(batches)}")
    report = FitReport()
    groups = grouped({name: layers[name][adapter_name] for name in prefix})
    if reporter is not None:
        reporter.stage("fit", 2 * len(groups) * len(batches))
    kept = kept or {}
    whole = {name: together(tokens, kept.get(name)) for name, tokens in prefix.items()}
    with exact_prefix(layers, {**kept, **whole}, resting=layers):
        for group in groups:
            fits = {name: AdapterFit(adapter, len(batches)) for name, adapter in group.items()}
            for name in group.keys() & kept.keys():
                fits[name].split = Split(prefix[name], kept[name], logit_scale(layers[name]))
            part = {name: layers[name] for name in group}
            for observer in ("observe_normaliser", "observe_values"):
                for batch in batches:
                    observers = {name: getattr(f, observer) for name, f in fits.items()}
                    observe(model, part, [batch], observers, adapter_name=adapter_name)
                    if reporter is not None:
                        reporter.advance()
                for f in fits.values():
                    (f.solve_normaliser if observer == "observe_normaliser" else f.solve_values)()
            for name, f in fits.items():
                group[name].load_state(f.state())
                report.error[name], report.share_error[name] = f.error.cpu(), f.share_error.cpu()
    return report


def grouped(adapters: Mapping[str, PrefixAdapter]) -> list[dict[str, PrefixAdapter]]:
    """The layers in groups whose sums fit into memory together."""
    groups: list[dict[str, PrefixAdapter]] = [{}]
    size = 0
    for name, adapter in adapters.items():
        own = 8 * 6 * adapter.num_heads * adapter.num_features**2  # two sums and what their solution needs
        if groups[-1] and size + own > MAX_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = adapter
        size += own
    return groups


class Split(NamedTuple):
    """A prefix of which the model goes on seeing a part."""

    prefix: LayerPrefix
    kept: LayerPrefix
    scale: float  # of the logits

    def blocks(self, query: Tensor, context: Block) -> tuple[Block, Block]:
        """The block of what stays, and that of what goes."""
        kept, prefix = (exact_block(query, tokens, self.scale) for tokens in (self.kept, self.prefix))
        return merge(Block(context.out.to(kept.out), context.lse.to(kept.lse)), kept), prefix


def logit_scale(layer: NTKAttentionLayer) -> float:
    module = layer.get_base_layer()
    return query_scale(module, getattr(module, "scaling", None), layer.geometry.head_dim)[0]


class Sums:
    """Normal equations of least squares, min |G w - Y|^2, for every head, from rows that come in parts."""

    def __init__(self, H: int, r: int, outputs: int, device: torch.device):
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.gram, self.moment, self.square = zeros(H, r, r), zeros(H, r, outputs), zeros(H)

    def add(self, g: Tensor, y: Tensor) -> None:
        """Rows g [H, N, r] and y [H, N, outputs] in float64."""
        self.gram += g.transpose(1, 2) @ g
        self.moment += g.transpose(1, 2) @ y
        self.square += y.square().sum(dim=(1, 2))

    def __add__(self, other: Sums) -> Sums:
        both = object.__new__(Sums)
        for name in ("gram", "moment", "square"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def error(self, w: Tensor) -> Tensor:
        """|G w - Y|^2 [H] for w [H, r, outputs]."""
        return (w * (self.gram @ w - 2 * self.moment)).sum(dim=(1, 2)) + self.square


class HeadFit:
    """The fit of one layer's states, for features that the subclass makes.

    Args:
        H, r, d_v: sizes of the state.
        positive: bool [r], the features whose k must not be negative.
        constant: the index of the feature that is 1 for every query, if there is one.
        num_batches: how many will be observed.
    """

    def __init__(
        self, H: int, r: int, d_v: int, positive: Tensor, constant: int | None, num_batches: int, device: torch.device
    ):
        self.positive, self.constant, self.num_batches = positive.to(device), constant, num_batches
        self.sums = {kind: [Sums(H, r, n, device) for _ in range(2)] for kind, n in (("share", 1), ("output", d_v))}
        self.seen = {"share": 0, "output": 0}
        self.effect = torch.zeros(H, dtype=torch.float64, device=device)  # of the prefix on held-out outputs, squared
        self.rows_seen = 0
        self.split: Split | None = None
        self.k = self.Z = self.error = self.share_error = torch.empty(0)

    def features(self, query: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The features [B, H, L, r] of a query and the log of their scale [B, H, L], in float64; x is phi's input."""
        raise NotImplementedError

    def rows(self, query: Tensor, context: Block, prefix: Block, x: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """What counts of a batch, per head of the state and row, in units of D."""
        H = len(self.effect)
        if self.split is not None:
            context, prefix = self.split.blocks(query, context)
        context, prefix = (Block(block.out.double(), block.lse.double()) for block in (context, prefix))
        lse = torch.logaddexp(context.lse, prefix.lse)
        features, row_scale = self.features(query, x)
        share = torch.exp(prefix.lse - lse)[..., None]
        wanted = share * prefix.out + (1 - share) * context.out
        made = {"g": features * torch.exp(row_scale - lse)[..., None], "share": share}
        made |= {"context": context.out, "wanted": wanted}
        return {name: select_rows(x, counts, H) for name, x in made.items()}

    def held_out(self, kind: str) -> bool:
        self.seen[kind] += 1
        every = min(HELD_OUT_EVERY, self.num_batches)
        return self.seen[kind] % every == 0

    def observe_normaliser(self, query: Tensor, context: Block, prefix: Any, x: Tensor, counts: Tensor) -> None:
        rows = self.rows(query, context, prefix, x, counts)
        self.rows_seen += rows["g"].shape[1]
        self.sums["share"][self.held_out("share")].add(rows["g"], rows["share"])

    def solve_normaliser(self) -> None:
        train, held = self.sums["share"]
        penalty = partial(own_variance, constant=self.constant)
        ridge, both = best_ridge(train, held, penalty), train + held
        rms = both.gram.diagonal(dim1=1, dim2=2).clamp_min(SMALLEST).sqrt()
        rms = torch.maximum(rms, rms.mean(dim=1, keepdim=True))  # what is rare here may be large elsewhere
        floor = FLOOR * both.square.sqrt()[:, None] / (rms * rms.shape[1])
        k = nonnegative(both, ridge, penalty, self.positive)
        self.k = torch.where(self.positive, torch.maximum(k, floor), k)
        self.share_error = (both.error(k[..., None]).clamp_min(0) / max(self.rows_seen, 1)).sqrt()

    def observe_values(self, query: Tensor, context: Block, prefix: Any, x: Tensor, counts: Tensor) -> None:
        rows = self.rows(query, context, prefix, x, counts)
        others = 1 - rows["share"]
        weight = rows["g"] @ self.k[..., None]
        # Where signed features sum to a negative normaliser, the state will have no weight at all.
        total = others + weight.clamp_min(0.0)
        g = rows["g"] / total.clamp_min(1e-6)
        y = rows["wanted"] - others / total.clamp_min(1e-6) * rows["context"]
        held_out = self.held_out("output")
        self.sums["output"][held_out].add(g, y)
        if held_out:
            self.effect += (rows["wanted"] - rows["context"]).square().sum(dim=(1, 2))

    def solve_values(self, rank: int | None = None) -> None:
        train, held = self.sums["output"]
        penalty: Penalty = partial(own_variance, constant=self.constant)
        if self.positive.all():
            penalty = partial(of_pseudo_tokens, k=self.k)
        ridge = best_ridge(train, held, penalty)
        Z = of_rank(ridge_regression(train, ridge, penalty), train, rank)
        self.error = (held.error(Z).clamp_min(0) / self.effect.clamp_min(1e-30)).sqrt()
        both = train + held
        self.Z = of_rank(ridge_regression(both, ridge, penalty), both, rank)


class AdapterFit(HeadFit):
    """The fit of an adapter's state."""

    def __init__(self, adapter: PrefixAdapter, num_batches: int):
        self.adapter = adapter
        self.feature_map: FeatureMap = adapter.feature_map
        H, r, d_v = adapter.num_heads, adapter.num_features, adapter.value_dim
        positive = torch.ones(r, dtype=torch.bool)
        if adapter.normaliser_features is not None:
            positive[:] = False
            positive[adapter.normaliser_features.cpu()] = True
        constant = self.feature_map.constant_index(r)
        super().__init__(H, r, d_v, positive, constant, num_batches, adapter.log_k.device)

    def features(self, query: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.feature_map.scaled(x.double())

    def solve_values(self, rank: int | None = None) -> None:
        super().solve_values(self.adapter.rank if self.adapter.is_factored else rank)

    def state(self) -> PrefixState:
        """In units in which the largest entry of k is 1."""
        unit = self.k.abs().amax(dim=1)
        k = self.k / unit[:, None]
        tiny = torch.finfo(torch.float32).tiny
        k = torch.where(self.positive, k.clamp_min(tiny), k)
        Z, k, log_scale = (x.float() for x in (self.Z / unit[:, None, None], k, torch.log(unit)))
        return PrefixState(Z, k, log_scale, self.feature_map)


# --- the two problems ---


Penalty = Callable[[Sums], Tensor]  # what the ridge multiplies for every feature: [H, r]


def own_variance(sums: Sums, constant: int | None) -> Tensor:
    """Each feature's own variance, and a part of the mean one for those that calibration hardly saw; nothing for the
    constant feature.
    """
    gram = sums.gram
    own = gram.diagonal(dim1=1, dim2=2)
    if constant is None:
        return torch.maximum(own, RARE * own.mean(dim=1, keepdim=True))
    left = own - gram[:, constant].square() / gram[:, constant, constant, None].clamp_min(SMALLEST)
    left[:, constant] = 0.0
    left = torch.maximum(left, RARE * left.mean(dim=1, keepdim=True))
    left[:, constant] = 0.0
    return left


def of_pseudo_tokens(sums: Sums, k: Tensor) -> Tensor:
    """That of Z_j / k_j, in units of the prefix's share of the attention."""
    share = (k[:, None] @ sums.gram @ k[..., None])[:, 0]
    return share / (k.shape[1] * k.square().clamp_min(SMALLEST))


def equilibrated(sums: Sums, ridge: Tensor, penalty: Penalty) -> tuple[Tensor, Tensor]:
    """The ridged Gram matrix with a unit diagonal [H, r, r], and the units [H, r] that make it so."""
    gram = sums.gram + torch.diag_embed(ridge[:, None] * penalty(sums))
    unit = gram.diagonal(dim1=1, dim2=2).clamp_min(SMALLEST).rsqrt()
    return gram * unit[:, :, None] * unit[:, None, :], unit


def solve(gram: Tensor, y: Tensor) -> Tensor:
    """gram^-1 y; by QR where rounding has left a matrix that is not positive."""
    root, failed = torch.linalg.cholesky_ex(gram)
    return solve_by_qr(gram, y) if failed.any() else torch.cholesky_solve(y, root)


def ridge_regression(sums: Sums, ridge: Tensor, penalty: Penalty) -> Tensor:
    """argmin |G w - Y|^2 + ridge * sum_j penalty_j |w_j|^2: [H, r, outputs] for ridge [H]."""
    gram, unit = equilibrated(sums, ridge, penalty)
    return unit[..., None] * solve(gram, unit[..., None] * sums.moment)


def best_ridge(train: Sums, held: Sums, penalty: Penalty) -> Tensor:
    """The ridge [H] whose solution has the least error on held-out rows."""
    grid = train.gram.new_tensor(RIDGES)
    errors = [held.error(ridge_regression(train, ridge.expand(len(train.gram)), penalty)) for ridge in grid]
    return grid[torch.stack(errors).nan_to_num(math.inf).argmin(dim=0)]


def nonnegative(sums: Sums, ridge: Tensor, penalty: Penalty, positive: Tensor) -> Tensor:
    """The ridge regression of one output with w > 0 where `positive` [r]: [H, r].

    A primal-dual interior-point method: Newton steps on A w - a = s, w s = mu, mu going to 0.
    """
    A, unit = equilibrated(sums, ridge, penalty)
    a = unit * sums.moment[..., 0]
    scale = a.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST)
    a = a / scale
    bound = positive.to(a.dtype)
    w, s = bound.expand_as(a).clone(), bound.expand_as(a).clone()
    for _ in range(INTERIOR_STEPS):
        mu = (w * s).sum(dim=1, keepdim=True) / bound.sum()
        if mu.amax() < 1e-10:
            break
        centre = 0.1 * mu
        gap = torch.where(positive, centre / w.where(positive, 1.0), 0.0)
        ratio = torch.where(positive, s / w.where(positive, 1.0), 0.0)
        gradient = (A @ w[..., None])[..., 0] - a
        step = solve(A + torch.diag_embed(ratio), (gap - gradient)[..., None])[..., 0]
        dual = torch.where(positive, gap - s - ratio * step, 0.0)
        w = w + longest(w, step, positive) * step
        s = s + longest(s, dual, positive) * dual
    return unit * w * scale


def longest(x: Tensor, step: Tensor, positive: Tensor) -> Tensor:
    """How far [H, 1], at most 1, the step may go with x staying positive."""
    limit = torch.where(positive & (step < 0), -x / step.where(step < 0, -1.0), math.inf)
    return (0.95 * limit.amin(dim=1, keepdim=True)).clamp_max(1.0)


def of_rank(Z: Tensor, sums: Sums, rank: int | None) -> Tensor:
    """The matrix of a lower rank that loses least of G Z: reduced-rank regression."""
    if rank is None or rank >= min(Z.shape[1:]):
        return Z
    moved = Z.transpose(1, 2) @ sums.gram @ Z  # of the fitted outputs
    _, vectors = torch.linalg.eigh(moved)
    top = vectors[..., -rank:]
    return Z @ top @ top.transpose(1, 2)

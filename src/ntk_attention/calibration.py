"""Data-driven initialisation: where the prefix of every head starts, and in which coordinates it trains.

In a real model the log-normalisers of the heads differ by many nats, the features are almost constant and correlated,
and values differ in size between layers. With one start for all, the prefix is invisible in some heads and drowns
others. Passes of a few batches through the frozen model measure, per head,

1. b, the mean log-sum-exp of its attention, and phi(q).1 against it: they set k so that the prefix holds `share` of the
   attention on average;
2. the moments of g(q) = d out / d Z = phi(q) e^{b - lse}, which say how an output answers to a change of Z. They give
   - coordinates in which the features are centred on the constant one and white, in units of the head's output; these
     moments see other inputs too, since what a task's queries rarely do other inputs do often;
   - the prefix's value at the start: the head's mean output, of all fixed values the one that changes outputs least.

The feed-forward block beside gets coordinates in which its inputs are white and steps are parts of what the layer gives
on, its residual stream. In encoders of pictures the units shrink with depth, and in large heads with their size.

All of it is a change of coordinates and a start: saved files hold plain Z, k and b.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from numbers import Real
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .batches import SIGNALS, checked_batches
from .calls import without_adapters
from .evaluation import samples
from .feed_forward import FeedForwardPrefix
from .layer import NTKAttentionLayer, PrefixAdapter
from .observation import adapted_layers, evaluating, observe
from .operation import Block
from .routing import CHILD

# Of every head's attention that the prefix holds at the start. A smaller one starts closer to the frozen model: a
# language model learned sums in words less well then, encoders of text more (package sections), a ViT as much.
SHARE, ENCODER_SHARE = 0.5, 0.15
# Heads of the size for which shares, steps and learning rates were chosen. In larger ones more features and directions
# move an output, each as far in a step of Adam. With the share and the steps falling as the root of the size, Gemma 3
# (256) had smaller validation losses, on worked problems and sums, and forgot less.
HEAD_DIM = 64
# Of pictures' encoders, in the last layer relative to the first: with even steps a ViT learned less (clothes). Perhaps
# since a prefix there only changes what is read at the end, and below it also what later layers attend to. Encoders of
# text and language models learned as much with even steps.
LAST_STEP = 0.1
EIGENVALUE_FLOOR = 1e-3  # of the whitening, relative to the largest: below it features are noise
# A step of log k moves the output by `share` times as much as a step of Z does, so its unit is made larger by
# 1 / share, with this factor: both move the output alike, whatever the share.
LOG_K_STEP = 0.15
# Of the prefix of a feed-forward block: the unit of Z_B relative to the size of the residual stream, at most so much of
# the block's own output, which some families normalise before they add it; and that of Z_A relative to coordinates in
# which inputs are white. With the block's output as the unit and white inputs the rate that is best now, 1e-2, was too
# high for language models (results/experiments, "blocks in units of their output").
STREAM_UNIT, OUTPUT_UNIT, INPUT_UNIT = 0.07, 0.4, 0.3
MAX_BYTES = 8 * 2**30
OWN_ROWS, OWN_LENGTH = 32, 128  # tokens of the text that a model writes itself
TEXT = {"input_ids", "attention_mask", "position_ids", "labels"}  # what batches of text alone may hold


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str = "default",
    share: float | None = None,
    others: bool | Iterable[Mapping[str, Any]] = True,
) -> None:
    """Start an adapter near the frozen model, in coordinates that train well.

    Call it after `get_peft_model` and before the optimizer is made. A few thousand tokens are enough.

    Args:
        model: with an NTK-Attention adapter, whose Z, k and b are replaced.
        batches: keyword arguments of the model's forward, a few batches of the training data. Tokens whose
            `attention_mask` is 0 do not count.
        adapter_name: which adapter.
        share: of every head's attention that the prefix holds at the start; the smaller, the closer to the frozen
            model. By default a half, less with heads of more than 64, and 15 % in encoders.
        others: batches of other inputs, which the coordinates see too. The data of a task may hold queries of few
            kinds; what these rarely do would weigh much in their coordinates, and training would spoil the model for
            all else. By default text that the model writes itself where it writes text, else random tokens, or noise
            for pictures and sound; nothing where inputs are of several kinds, or with False.

    Raises:
        ValueError: without such an adapter, without its constant feature, with `batches` that are empty or no
            arguments of the model's forward, that reach no adapted layer or give NaN there, with a share outside
            (0, 1), or inside `torch.inference_mode()`. The adapter is as it was then.

    Warns:
        UserWarning: if there are layers that no token reaches, such as a vision tower without pictures. They start as
            they were.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("calibrate was called inside torch.inference_mode(), where nothing that trains can be made")
    layers = adapted_layers(model, adapter_name)
    encodes = all(layer.encodes for layer in layers.values())
    if share is not None and not (isinstance(share, Real) and 0.0 < share < 1.0):
        raise ValueError(f"share must be a number between 0 and 1, got {share!r}")
    head_steps = {name: step_of_large_heads(layer) for name, layer in layers.items()}
    shares = {name: share or (ENCODER_SHARE if encodes else SHARE * head_steps[name]) for name in layers}
    if not all(layer[adapter_name].feature_map.constant for layer in layers.values()):
        raise ValueError("calibrate needs the constant feature: make the config with constant_feature=True")
    check_size(layers, adapter_name)
    batches = checked_batches(batches, model=model)
    given = []
    if not isinstance(others, bool | None):
        given = checked_batches(others, least=0, source="others", model=model)

    with without_adapters(layers.values()):
        unlike = other_inputs(model, batches) if others is True else given
        statistics = {name: HeadStatistics(layer[adapter_name]) for name, layer in layers.items()}
        observe(model, layers, batches, {name: s.observe_scale for name, s in statistics.items()}, source="batches")
        check_finite(statistics, "batches")
        statistics = {name: s for name, s in statistics.items() if s.num_rows}
        layers = reached(layers, statistics)
        blocks = {
            name: FeedForwardStatistics(prefix)
            for name, layer in layers.items()
            if (prefix := layer[adapter_name].feed_forward) is not None
        }
        for name, s in statistics.items():
            s.set_scale(shares[name])
        moments = {name: s.observe_moments for name, s in statistics.items()}
        for source, kind in (("batches", batches), ("others", unlike)):
            if kind:
                observe(model, layers, kind, moments, blocks, source)
                for heads in statistics.values():
                    heads.end_of_kind()
                for block in blocks.values():
                    block.end_of_kind()
                check_finite(statistics, source)
                check_finite(blocks, source)
    generator = torch.Generator().manual_seed(0)  # every process, and every call, makes the same start
    for name, heads in statistics.items():
        step = head_steps[name] * (picture_step(model, name) if encodes else 1.0)
        heads.set_coordinates_and_start(step, head_steps[name] * LOG_K_STEP / shares[name], generator)
    for block in blocks.values():
        block.set_coordinates_and_start(generator)
    for layer in layers.values():
        layer.lead(adapter_name)


def reached(
    layers: Mapping[str, NTKAttentionLayer], statistics: Mapping[str, HeadStatistics]
) -> dict[str, NTKAttentionLayer]:
    """The layers that tokens of the batches have reached; says which others there are.

    Raises:
        ValueError: if there are none.
    """
    if not statistics:
        raise ValueError(
            f"no token of the batches reached any of the {len(layers)} adapted attention modules, such as "
            f"{next(iter(layers)).removesuffix(f'.{CHILD}')}: either all of them are padding, or what the batches "
            "hold does not lead there"
        )
    others = [name for name in layers if name not in statistics]
    if others:
        warnings.warn(
            f"calibrate: no token of the batches reached {len(others)} of {len(layers)} attention modules, such as "
            f"{others[0].removesuffix(f'.{CHILD}')}; they start as they were",
            stacklevel=3,
        )
    return {name: layer for name, layer in layers.items() if name in statistics}


def check_finite(measured: Mapping[str, HeadStatistics] | Mapping[str, FeedForwardStatistics], source: str) -> None:
    """Raise ValueError if there is anything in a layer that cannot be measured."""
    for name, statistics in measured.items():
        if not statistics.is_finite:
            raise ValueError(
                f"the frozen model computes NaN or inf in {name.removesuffix(f'.{CHILD}')} or beside it from {source}: "
                "expected finite numbers, for which its dtype may be too narrow"
            )


@torch.no_grad()
def other_inputs(model: Any, batches: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What the model might see apart from these batches: text that it writes itself, random tokens, noise."""
    start = start_token(model)
    if start is not None and all("input_ids" in batch and set(batch) <= TEXT for batch in batches):
        base = base_of(model)
        longest = getattr(text_config(base.config), "max_position_embeddings", None) or 2 * OWN_LENGTH
        length = min(OWN_LENGTH, longest // 2)  # some count positions from the padding token on
        try:
            text = samples(base, torch.full((OWN_ROWS, 1), start), length, seed=0)
            with evaluating(base):
                base(input_ids=text[:1])  # tokens that stand for pictures or sound would have to come with these
            return [{"input_ids": text, "attention_mask": torch.ones_like(text)}]
        except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            warnings.warn(
                f"calibrate: {type(base).__name__} does not write text from its first token alone "
                f"({type(error).__name__}: {error}): random tokens stand in for it",
                stacklevel=3,
            )
    return with_random_inputs(model, batches)


def base_of(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def start_token(model: Any) -> int | None:
    """What a text begins with, if the model writes texts and has such a token."""
    base = base_of(model)
    if not isinstance(base, PreTrainedModel) or not base.can_generate() or base.config.is_encoder_decoder:
        return None
    text = text_config(base.config)
    named = [getattr(text, name, None) for name in ("bos_token_id", "eos_token_id")]
    tokens = [token for value in named for token in (value if isinstance(value, list) else [value])]
    return next((token for token in tokens if token is not None and token < text.vocab_size), None)


def text_config(config: PreTrainedConfig) -> Any:
    """The part of a config that is about text; the config itself where there are several."""
    try:
        return config.get_text_config()
    except ValueError:
        return config


def signals_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in batch.items() if name in SIGNALS}


def with_random_inputs(model: Any, batches: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The batches of one kind, with other contents. Special tokens stay, and none are drawn."""
    config = getattr(model, "config", None)
    text = text_config(config) if isinstance(config, PreTrainedConfig) else config
    size = getattr(text, "vocab_size", None)
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor(special_tokens(config) + special_tokens(text), dtype=torch.long)
    found: list[Mapping[str, Any]] = []
    for batch in batches:
        signals = signals_of(batch)
        if "input_ids" in batch and not signals and size is not None:
            ids = batch["input_ids"].cpu()
            drawn = torch.randint(size, ids.shape, generator=generator)
            drawn = torch.where(torch.isin(ids, special) | torch.isin(drawn, special), ids, drawn)
            found.append({**batch, "input_ids": drawn.to(batch["input_ids"].device)})
        elif "input_ids" not in batch and len(signals) == 1:
            ((name, x),) = signals.items()
            noise = torch.randn(x.shape, generator=generator).to(x)
            found.append({**batch, name: x.mean() + x.std() * noise})
    return found


def special_tokens(config: Any) -> list[int]:
    """The ids that a config gives a meaning: ends, padding, places of pictures and so on."""
    named = [value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))]
    return [x for value in named for x in (value if isinstance(value, list) else [value]) if isinstance(x, int)]


def check_size(layers: Mapping[str, NTKAttentionLayer], adapter_name: str = "default") -> None:
    """Raise ValueError if the moments and coordinates, r x r for every head, would not fit into memory."""
    sizes = (getattr(layer[adapter_name], layer[adapter_name].leading).shape for layer in layers.values())
    size = sum(12 * H * r**2 for H, r, _ in sizes)
    blocks = (layer[adapter_name].feed_forward for layer in layers.values())
    size += sum(12 * len(block.Z_A) ** 2 for block in blocks if block is not None)
    if size > MAX_BYTES:
        raise ValueError(
            f"calibration would hold {size / 2**30:.0f} GiB of r x r matrices, at most {MAX_BYTES / 2**30:.0f} are "
            "expected: take a feature map with fewer features, fewer layers, or feed_forward_rank=None"
        )


def depth(model: nn.Module, name: str) -> float:
    """Where a module stands in the list of layers that it is in, from 0, the first, to 1; 0 without one."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        siblings = model.get_submodule(".".join(parts[:i])) if part.isdigit() else None
        if isinstance(siblings, nn.ModuleList):
            return int(part) / max(1, len(siblings) - 1)
    return 0.0


def step_of_large_heads(layer: NTKAttentionLayer) -> float:
    """1 for heads of up to HEAD_DIM, and less for larger ones."""
    return min(1.0, math.sqrt(HEAD_DIM / layer.geometry.head_dim))


def picture_step(model: nn.Module, name: str) -> float:
    """Falls from 1 in an encoder's first layer to LAST_STEP in the last; 1 in all with a vocabulary, of text."""
    layer: Any = model.get_submodule(name)
    return 1.0 if hasattr(layer.get_base_layer().config, "vocab_size") else 1 - (1 - LAST_STEP) * depth(model, name)


class HeadStatistics:
    """What calibration measures of one layer, per head of the state."""

    def __init__(self, adapter: PrefixAdapter):
        self.adapter = adapter
        H, r = adapter.num_heads, getattr(adapter, adapter.leading).shape[1]
        zeros = partial(torch.zeros, dtype=torch.float64, device=adapter.log_k.device)
        self.num_rows = 0
        self.sum_lse, self.sum_square = zeros(H), zeros(H)
        self.advantages: list[Tensor] = []  # [H, N], log(phi.1) - lse of every row
        self.gram = zeros(H, r, r)  # sum of g g^T
        self.gram_rows = 0
        self.wanted: Tensor | float = 0.0  # [H, d_v], sum of g_constant * share * output
        self.moments: list[Tensor] = []  # of every kind of input, the task's first
        self.value = self.output_rms = zeros(H)  # of the task
        self.log_scale = self.log_k = zeros(H)  # set between the passes, the same for all features
        self.is_finite = zeros(()) == 0

    def rows(self, query: Tensor, frozen: Block, factor: float, counts: Tensor) -> tuple[Tensor, ...]:
        """phi [H, N, r], its log scale, lse [H, N] and out [H, N, d_v] of the N rows of each state head that count."""
        H, features = self.adapter.num_heads, self.gram.shape[-1]
        if self.adapter.feature_map.num_features(query.shape[-1]) != features:
            raise ValueError(
                f"a module has queries of size {query.shape[-1]}, of which {self.adapter.feature_map!r} does not make "
                f"the {features} features of its adapter: leave the module out with exclude_modules"
            )
        phi, row_scale = self.adapter.feature_map.scaled(query.float() * factor)

        def select(x: Tensor) -> Tensor:
            per_head = x.transpose(0, 1)[:, counts]  # [H_query, N, ...]
            return per_head.reshape(H, -1, *per_head.shape[2:])

        return select(phi), select(row_scale), select(frozen.lse.float()), select(frozen.out.float())

    def normaliser(self, phi: Tensor) -> Tensor:
        """phi.1 over the features that carry the normaliser: [H, N]."""
        features = self.adapter.normaliser_features
        return (phi if features is None else phi[..., features.to(phi.device)]).sum(dim=-1)

    def observe_scale(self, query: Tensor, frozen: Block, prefix: Block | None, factor: float, counts: Tensor) -> None:
        phi, row_scale, lse, out = self.rows(query, frozen, factor, counts)
        advantages = torch.log(self.normaliser(phi)) + row_scale - lse
        self.is_finite &= torch.isfinite(advantages).all() & torch.isfinite(out).all()
        self.num_rows += lse.shape[1]
        self.sum_lse += lse.double().sum(dim=1)
        self.advantages.append(advantages.cpu())

    def set_scale(self, share: float) -> None:
        b = self.log_scale = self.sum_lse / self.num_rows
        self.log_k = offset_for_share(torch.cat(self.advantages, dim=1).double(), share).to(b) - b
        self.advantages.clear()

    def observe_moments(
        self, query: Tensor, frozen: Block, prefix: Block | None, factor: float, counts: Tensor
    ) -> None:
        phi, row_scale, lse, out = self.rows(query, frozen, factor, counts)
        weight = row_scale + self.log_scale[:, None].to(row_scale)
        prefix_lse = torch.log(self.normaliser(phi)) + self.log_k[:, None].to(weight) + weight
        lse_all = torch.logaddexp(lse, prefix_lse)
        g = phi * torch.exp(weight - lse_all)[..., None]
        share = torch.exp(prefix_lse - lse_all)
        self.gram += (g.transpose(1, 2) @ g).double()
        self.gram_rows += g.shape[1]
        self.wanted = self.wanted + ((g[..., -1] * share)[..., None] * out).double().sum(dim=1)
        self.sum_square += out.double().square().mean(dim=2).sum(dim=1)

    def end_of_kind(self) -> None:
        """Mean of g g^T over the rows since the last call. The first ones, of the task, also give the prefix's value at
        the start [H, d_v]: of all fixed ones, the least-squares one in the outputs."""
        if self.gram_rows == 0:  # none of this kind came here
            return
        self.is_finite &= torch.isfinite(self.gram).all()
        if not self.moments:
            self.value = self.wanted / self.gram[:, -1, -1, None]
            self.output_rms = (self.sum_square / self.gram_rows).sqrt()[:, None, None]
        self.moments.append(self.gram / self.gram_rows)
        self.gram, self.gram_rows = torch.zeros_like(self.gram), 0

    @torch.no_grad()
    def set_coordinates_and_start(self, step: float, unit: float, generator: torch.Generator) -> None:
        """A step of one in Z moves outputs by `step` of their size; log k trains in this unit."""
        adapter, value = self.adapter, self.value
        adapter.part("log_scale").copy_(self.log_scale)
        moments = mean_of(self.moments)
        adapter.set_coordinates(whitening(moments) * self.output_rms * step, unit)
        Z = torch.zeros_like(moments[..., :1]).expand(-1, -1, value.shape[-1]).clone()
        Z[:, -1] = value
        if adapter.leading == "Z_A":  # the first direction holds the start, the others are free to train
            H, r, rank = adapter.Z_A.shape
            noise = adapter.part_of(torch.randn(H, r, rank, dtype=Z.dtype, generator=generator, device="cpu").to(Z))
            assert adapter.coordinates is not None
            Z = adapter.coordinates.double() @ noise * r**-0.5
            Z[..., 0] = 0.0
            Z[:, -1, 0] = 1.0
            Z_B = adapter.part("Z_B").zero_()
            Z_B[:, 0] = value.to(Z_B)
        adapter.set_plain(Z, self.log_k[:, None].expand_as(adapter.part("log_k")))


class FeedForwardStatistics:
    """What calibration measures of one feed-forward block: moments of its inputs, and sizes.

    These are of the median token: in some layers a few tokens are a thousand times as large as all others ("massive
    activations"), and would make the rms a unit in which every step is too large.
    """

    def __init__(self, prefix: FeedForwardPrefix):
        self.prefix = prefix
        self.moments: list[Tensor] = []  # [D, D] of every kind of input, the task's first; in float32, they are large
        self.gram: Tensor | float = 0.0
        self.num_rows = 0
        self.outputs: list[Tensor] = []  # [N], rms of the block's output, token by token, of the task
        self.streams: list[Tensor] = []  # likewise of what the layer gives on
        self.is_finite = True

    def observe_input(self, x: Tensor) -> None:
        x = x.float()
        self.gram = self.gram + x.T @ x
        self.num_rows += len(x)

    def observe_output(self, out: Tensor) -> None:
        if not self.moments:
            self.outputs.append(rms(out))

    def observe_stream(self, hidden: Tensor) -> None:
        if not self.moments:
            self.streams.append(rms(hidden))

    def end_of_kind(self) -> None:
        if self.num_rows == 0:
            return
        self.moments.append(torch.as_tensor(self.gram / self.num_rows))
        measured = (self.moments[-1], *self.outputs, *self.streams)
        self.is_finite = all(bool(torch.isfinite(x).all()) for x in measured)
        self.gram, self.num_rows = 0.0, 0

    @torch.no_grad()
    def set_coordinates_and_start(self, generator: torch.Generator) -> None:
        """Coordinates as the constants above say; nothing is added at first."""
        if not self.moments:  # a block that the tokens of its attention do not pass
            return
        stream, output = (torch.cat(sizes).median().item() for sizes in (self.streams, self.outputs))
        unit = max(min(STREAM_UNIT * stream, OUTPUT_UNIT * output), torch.finfo(torch.float32).tiny)
        coordinates = INPUT_UNIT * inverse_root(mean_of(self.moments).double())
        self.prefix.set_coordinates(coordinates, unit)
        self.moments.clear()
        self.prefix.reset_parameters(generator=generator)
        self.prefix.part("Z_A").div_(INPUT_UNIT)


def rms(x: Tensor) -> Tensor:
    """Of every row: [N]."""
    return x.float().square().mean(dim=1).sqrt()


def mean_of(moments: list[Tensor]) -> Tensor:
    """The task and the rest count alike."""
    return torch.stack(moments).mean(dim=0)


def offset_for_share(logits: Tensor, share: float) -> Tensor:
    """The offset [H] with which the mean of sigmoid(logits [H, N] + offset) over N is the share: by bisection."""
    middle = math.log(share / (1 - share))
    low, high = middle - logits.amax(dim=1), middle - logits.amin(dim=1)
    for _ in range(60):
        offset = (low + high) / 2
        is_low = torch.sigmoid(logits + offset[:, None]).mean(dim=1) < share
        low, high = torch.where(is_low, offset, low), torch.where(is_low, high, offset)
    return (low + high) / 2


def inverse_root(moments: Tensor, floor: float = EIGENVALUE_FLOOR) -> Tensor:
    """The symmetric C [..., r, r] with C moments C = 1, up to the floor of eigenvalues, relative to the largest."""
    eigenvalues, eigenvectors = torch.linalg.eigh(moments)
    least = floor * eigenvalues[..., -1:].clamp_min(torch.finfo(moments.dtype).tiny)
    return eigenvectors * eigenvalues.clamp_min(least).rsqrt()[..., None, :] @ eigenvectors.transpose(-1, -2)


def whitening(gram: Tensor, floor: float = EIGENVALUE_FLOOR) -> Tensor:
    """C [H, r, r] with C^T gram C = 1 (up to the floor of eigenvalues, relative to the largest).

    The last feature is the constant one. The others are first centred: their regression on it is taken away.
    """
    constant = gram[:, -1:, -1:]
    mean = gram[:, -1:, :-1] / constant  # [H, 1, r - 1]
    covariance = gram[:, :-1, :-1] - mean.transpose(1, 2) * mean * constant
    root = inverse_root(covariance, floor)
    C = torch.zeros_like(gram)
    C[:, :-1, :-1] = root
    C[:, -1:, :-1] = -mean @ root
    C[:, -1:, -1:] = constant.rsqrt()
    return C

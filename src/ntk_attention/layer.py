"""The adapters of one attention module: trainable tensors that become prefix states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate.hooks import remove_hook_from_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

from .config import NTKAttentionConfig
from .coordinates import Coordinated
from .exact import LayerPrefix
from .feed_forward import FeedForward, FeedForwardPrefix, FeedForwardRows
from .operation import Block
from .routing import Geometry
from .sharding import spread
from .state import PrefixState, RowStates

# The published start, k = 0, cannot be a logarithm; this k weighs nothing and, like |k| at 0, has no gradient.
LOG_OF_NOTHING = -40.0
MAX_FEATURES = 2**18


def parameter_shapes(config: NTKAttentionConfig, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """The tensors of a `PrefixAdapter`, all of which go into files, by name; they are not made here.

    Raises:
        ValueError: if the feature map makes more features than any state can hold.
    """
    d, d_v = geometry.head_dim, geometry.value_dim
    H, rank, feed_forward_rank = num_states(config, geometry), *ranks_of(config, geometry)
    feature_map = config.make_feature_map()
    r = feature_map.num_features(d)
    if r > MAX_FEATURES:
        raise ValueError(
            f"the feature map {config.feature_map!r} makes more features of head_dim {d} than a state can hold: "
            f"at most {MAX_FEATURES:,} are expected"
        )
    num_positive = int(feature_map.nonnegative(d).sum())
    shapes: dict[str, tuple[int, ...]] = {"log_k": (H, num_positive), "log_scale": (H,)}
    if rank is None:
        shapes["Z"] = (H, r, d_v)
    else:
        shapes |= {"Z_A": (H, r, rank), "Z_B": (H, rank, d_v)}
    if num_positive < r:
        shapes["k_signed"] = (H, r - num_positive)
    if feed_forward_rank is not None:
        D = geometry.feed_forward
        shapes |= {"feed_forward.Z_A": (D, feed_forward_rank), "feed_forward.Z_B": (feed_forward_rank, D)}
    return shapes | {f"feature_map.{name}": shape for name, shape in feature_map.stored_shapes(d).items()}


def num_states(config: NTKAttentionConfig, geometry: Geometry) -> int:
    return geometry.num_heads if config.state_heads == "query" else geometry.num_kv_heads


def ranks_of(config: NTKAttentionConfig, geometry: Geometry) -> tuple[int | None, int | None]:
    """Of Z and of the prefix of the feed-forward block; None for a full Z, and for no such prefix."""
    numbers = num_states(config, geometry) * geometry.head_dim * geometry.value_dim
    return config.rank_for(geometry.head_dim), config.feed_forward_rank_for(numbers, geometry.feed_forward)


def settle_ranks(config: NTKAttentionConfig, geometries: Iterable[Geometry]) -> None:
    """Put numbers in place of "auto" where one fits all layers: a file must not depend on what it means later."""
    geometries = list(geometries)
    if config.rank == "auto" and not any(geometry.feed_forward for geometry in geometries):
        config.rank = None
    ranks, feed_forward_ranks = (set(x) for x in zip(*(ranks_of(config, g) for g in geometries), strict=True))
    if len(ranks) == 1:
        config.rank = ranks.pop()
    feed_forward_ranks.discard(None)
    if len(feed_forward_ranks) < 2:
        config.feed_forward_rank = feed_forward_ranks.pop() if feed_forward_ranks else None


class PrefixAdapter(Coordinated):
    """The trainable form of one `PrefixState`, and of the prefix of the feed-forward block beside it.

    Trainable are Z [H, r, d_v] (or its factors Z_A [H, r, rank] and Z_B [H, rank, d_v]) and log_k, the logarithm of
    the entries of k that belong to nonnegative features: the normaliser is positive by construction. Two tensors do
    not train: `log_scale`, b, [H], which calibration sets, and `k_signed`, the entries of k of features of both signs
    (`taylor` has some), which are zero except in a state that was made of a given prefix. `feed_forward` is None where
    there is no such block or the config wants none.

    Calibration (`calibration.py`) also sets coordinates, see `Coordinated`: Z = C Z', log k = unit kappa.

    In a tensor-parallel model (`shard`) the parameters are spread by head over the processes of a mesh. State dicts
    hold the whole, and loading one takes each process's part; other methods deal in the heads of this process.
    """

    scaled = "log_k"

    def __init__(self, config: NTKAttentionConfig, geometry: Geometry):
        super().__init__()
        shapes = parameter_shapes(config, geometry)
        self.feature_map = config.make_feature_map().bind(geometry.head_dim)
        if "Z" in shapes:
            self.Z = nn.Parameter(torch.empty(shapes["Z"]))
        else:
            self.Z_A = nn.Parameter(torch.empty(shapes["Z_A"]))
            self.Z_B = nn.Parameter(torch.empty(shapes["Z_B"]))
        self.log_k = nn.Parameter(torch.empty(shapes["log_k"]))
        self.leading = "Z" if "Z" in shapes else "Z_A"  # carries the features
        nonnegative = self.feature_map.nonnegative(geometry.head_dim)
        self.normaliser_features = None if nonnegative.all() else nonnegative.nonzero().squeeze(1)
        self.k_signed: nn.Parameter | None
        self.register_parameter("k_signed", None)
        if "k_signed" in shapes:
            self.signed_features = (~nonnegative).nonzero().squeeze(1)
            self.k_signed = nn.Parameter(torch.empty(shapes["k_signed"]), requires_grad=False)
        self.log_scale = nn.Parameter(torch.empty(shapes["log_scale"]), requires_grad=False)
        self.feed_forward: FeedForwardPrefix | None = None
        if "feed_forward.Z_A" in shapes:
            self.feed_forward = FeedForwardPrefix(*shapes["feed_forward.Z_A"])
        self._places: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.reset_parameters(config.init_weights)

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where log_k and k_signed stand in k; kept on each device, since a recorded graph cannot copy from the CPU."""
        if device not in self._places:
            assert self.normaliser_features is not None
            self._places[device] = self.normaliser_features.to(device), self.signed_features.to(device)
        return self._places[device]

    def shard(self, mesh: DeviceMesh) -> None:
        """Keep a part of the heads."""
        super().shard(mesh)
        if self.feed_forward is not None:
            self.feed_forward.shard(mesh)

    def part_of(self, x: Tensor) -> Tensor:
        """The heads of this process of a whole tensor [H, ...], which is on every process."""
        return x if self.mesh is None else spread(x, self.mesh).to_local()

    @property
    def num_heads(self) -> int:
        """Heads of the state that this process holds."""
        return len(self.part("log_k"))

    def reset_parameters(self, init_weights: bool | str) -> None:
        if self.log_k.is_meta:
            return
        if self.feed_forward is not None:
            self.feed_forward.reset_parameters(init_weights is False)
        r = getattr(self, self.leading).shape[1]
        with torch.no_grad():
            self.log_scale.zero_()
            if self.k_signed is not None:
                self.k_signed.zero_()
            if init_weights is False:
                self.log_k.normal_(-math.log(r), 0.5)
                for name, parameter in self.named_parameters(recurse=False):
                    if name in ("Z", "Z_A", "Z_B"):
                        parameter.normal_(0.0, 1.0)
                return
            # phi(q).k is about 1 where phi is about 1: the weight of one token whose logit is 0, and its value is 0.
            self.log_k.fill_(LOG_OF_NOTHING if init_weights == "published" else -math.log(self.log_k.shape[1]))
            if self.leading == "Z":
                self.Z.zero_()
            else:
                self.Z_A.normal_(0.0, r**-0.5)
                self.Z_B.zero_()

    def plain_Z(self) -> Tensor:  # noqa: N802
        """Z [H, r, d_v] in plain coordinates."""
        Z = self.plain_leading()
        return Z if self.leading == "Z" else Z @ self.part("Z_B")

    def state(self) -> PrefixState:
        """The state as it stands, differentiable with respect to the parameters."""
        k = torch.exp(self.plain_scaled())
        if self.normaliser_features is not None and self.k_signed is not None:
            r = getattr(self, self.leading).shape[1]
            positive, signed = self.places(k.device)
            k = k.new_zeros(len(k), r).index_copy(1, positive, k)
            k = k.index_copy(1, signed, self.part("k_signed").to(k.dtype))
        return PrefixState.trusted(self.plain_Z(), k, self.part("log_scale"), self.feature_map)

    @torch.no_grad()
    def load_state(self, state: PrefixState) -> None:
        """Become a given state, with nothing for the feed-forward block; factors of Z become its best approximation
        of their rank.

        Raises:
            ValueError: if heads, r, d_v or the feature map are others.
        """
        own = self.feature_map
        if (state.feature_map.name, state.feature_map.options) != (own.name, own.options):
            raise ValueError(f"the adapter has the feature map {own!r}, the state {state.feature_map!r}")
        Z, k = state.Z, state.k
        if own.constant and not state.feature_map.constant:  # a feature that weighs nothing
            Z, k = nn.functional.pad(Z, (0, 0, 0, 1)), nn.functional.pad(k, (0, 1))
        d_v = self.Z.shape[2] if self.leading == "Z" else self.Z_B.shape[2]
        expected = (self.num_heads, getattr(self, self.leading).shape[1], d_v)
        if tuple(Z.shape) != expected:
            raise ValueError(f"the adapter needs Z [H, r, d_v] = {list(expected)}, the state has {list(Z.shape)}")
        self.set_coordinates(None, 1.0)
        if self.feed_forward is not None:
            self.feed_forward.part("Z_B").zero_()
        leading = self.part(self.leading)
        if self.leading == "Z":
            leading.copy_(Z)
        else:
            U, S, V = torch.linalg.svd(Z.double(), full_matrices=False)
            rank = leading.shape[2]
            root = S[:, :rank].sqrt()
            leading.zero_()[..., : root.shape[1]] = (U[..., :rank] * root[:, None]).to(leading)
            self.part("Z_B").zero_()[:, : root.shape[1]] = (root[..., None] * V[:, :rank]).to(leading)
        positive = k if self.normaliser_features is None else k[:, self.normaliser_features.to(k.device)]
        self.part("log_k").copy_(torch.log(positive.clamp_min(math.exp(LOG_OF_NOTHING))))
        if self.k_signed is not None:
            self.part("k_signed").copy_(k[:, self.signed_features.to(k.device)])
        self.part("log_scale").copy_(state.log_scale)

    def freeze_constants(self) -> None:
        """Only Z (or its factors), log_k and the factors for the feed-forward block ever train."""
        self.log_scale.requires_grad_(False)
        if self.k_signed is not None:
            self.k_signed.requires_grad_(False)
        self.feature_map.requires_grad_(False)


class NTKAttentionLayer(nn.ModuleDict, BaseTunerLayer):
    """The adapters of one attention module and its feed-forward block, by name; hangs on the attention as a child."""

    adapter_layer_names = ("adapters",)

    def __init__(self, attention: nn.Module, geometry: Geometry, mesh: DeviceMesh | None = None):
        super().__init__()
        self._attention = (attention,)  # in a tuple, since a child must not register its parent
        self.geometry = geometry
        self.mesh = mesh  # of processes that hold a part of the heads each
        self.rows: RowStates | None = None  # of a mixed batch, while it lasts
        self.feed_forward_rows: FeedForwardRows | None = None  # likewise
        self.block: FeedForward | None = None
        self.feed_forward_input: Tensor | None = None  # while the block runs
        self._hooks: list[RemovableHandle] = []
        # A function put here sees every call: the query, the block of the real tokens, the block of the prefix (None
        # while the adapters rest) and the factor that makes phi's input of the query.
        self.observer: Callable[[Tensor, Block, Block | None, float], None] | None = None
        self.exact: LayerPrefix | None = None  # tokens of a prefix that are all there, see `exact_prefix`

    @property
    def adapters(self) -> nn.ModuleDict:
        return self

    def __getitem__(self, name: str) -> PrefixAdapter:
        return cast(PrefixAdapter, super().__getitem__(name))

    def get_base_layer(self) -> nn.Module:
        return self._attention[0]

    def add_adapter(self, name: str, config: NTKAttentionConfig, block: FeedForward | None = None) -> None:
        """A new adapter, which looks after a feed-forward block as well."""
        width = 0 if block is None else block.width
        adapter = PrefixAdapter(config, replace(self.geometry, feed_forward=width))
        device = self.device()
        if device is not None and not adapter.log_k.is_meta:
            adapter.to(device)
        if self.mesh is not None:
            adapter.shard(self.mesh)
        self[name] = adapter
        if block is not None and not self._hooks:
            self.hook(block)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def hook(self, block: FeedForward) -> None:
        """Add to the block's output from here on. Where one module is the block, no state is kept between the hooks,
        which torch.compile could not put into one graph with activation checkpointing."""
        self.block = block
        if block.first is block.last:
            self._hooks = [block.last.register_forward_hook(self.after_block, with_kwargs=True)]
            return
        self._hooks = [
            block.first.register_forward_pre_hook(self.before_first, with_kwargs=True),
            block.last.register_forward_hook(self.after_last),
        ]

    def before_first(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.feed_forward_input = input_of(args, kwargs)

    def after_last(self, module: nn.Module, args: tuple, output: Any) -> Any:
        x, self.feed_forward_input = self.feed_forward_input, None
        assert x is not None
        return self.add_to_block(x, output)

    def after_block(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return self.add_to_block(input_of(args, kwargs), output)

    def add_to_block(self, x: Tensor, output: Any) -> Any:
        """The output of the block, with what its prefixes add; experts may return more than a tensor."""
        out = output[0] if isinstance(output, tuple) else output
        for prefix in self.feed_forward_prefixes():
            out = prefix(x.to(out.device), out)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    def feed_forward_prefixes(self) -> list[Callable[[Tensor, Tensor], Tensor]]:
        if self.disable_adapters:
            return []
        if self.rows is not None:
            return [] if self.feed_forward_rows is None else [self.feed_forward_rows]
        prefixes = [adapter.feed_forward for adapter in self.in_memory(self.active_names())]
        return [prefix for prefix in prefixes if prefix is not None]

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        self._freeze_constants()

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> None:
        super().set_requires_grad(*args, **kwargs)
        self._freeze_constants()

    def _freeze_constants(self) -> None:
        for name in self.keys():
            self[name].freeze_constants()

    def has_active_state(self) -> bool:
        return not self.disable_adapters and (self.rows is not None or bool(self.active_names()))

    def active_names(self) -> list[str]:
        """Active adapters that this layer has."""
        return [name for name in cast(list[str], self.active_adapters) if name in self]

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Without any adapter, and without the changes to requires_grad that PEFT makes when it disables adapters."""
        before = bool(self.disable_adapters)
        self._disable_adapters = True
        try:
            yield
        finally:
            self._disable_adapters = before

    def states(self, batch_size: int) -> Sequence[PrefixState | RowStates]:
        """The prefixes of all active adapters, one after another; or, in a mixed batch, the prefix of every row."""
        if self.rows is None:
            return [adapter.state() for adapter in self.in_memory(self.active_names())]
        if len(self.rows.index) != batch_size:
            raise ValueError(
                f"adapter_names has {len(self.rows.index)} names for a batch of {batch_size}: expected as many"
            )
        return [self.rows]

    def stack(self, names: Sequence[str]) -> list[PrefixState]:
        """The states of these adapters, without weight for those that this layer lacks; none if it lacks all."""
        here = [name for name in names if name in self]
        own = {name: adapter.state() for name, adapter in zip(here, self.in_memory(here), strict=True)}
        if not own:
            return []
        first = next(iter(own.values()))
        Z, k, b = (torch.zeros_like(x) for x in (first.Z, first.k, first.log_scale))
        nothing = PrefixState.trusted(Z, k, b, first.feature_map)
        return [own.get(name, nothing) for name in names]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self or any(p.is_meta for p in self[adapter_name].parameters()):
            return
        device = device or self.device()
        if device is not None:
            self[adapter_name].to(device)

    def device(self) -> torch.device | None:
        """Where the base layer runs: with offloading its weights are elsewhere between calls."""
        for module in self.get_base_layer().modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
        return next((p.device for p in self.get_base_layer().parameters() if not p.is_meta), None)

    def in_memory(self, names: Sequence[str]) -> list[PrefixAdapter]:
        """These adapters, taken back from accelerate's offloading: it brings weights only for a module's own forward.

        Raises:
            ValueError: if their values are gone: PEFT, when it loads an adapter, keeps on a disk those of LoRA only.
        """
        adapters = [self[name] for name in names]
        for name, adapter in zip(names, adapters, strict=True):
            if hasattr(adapter, "_hf_hook"):
                try:
                    remove_hook_from_module(adapter, recurse=True)
                except ValueError as error:
                    raise ValueError(
                        f"the adapter {name!r} was offloaded to a disk without its values: expected get_peft_model and "
                        "set_peft_model_state_dict on a base model that is partly on a disk, not from_pretrained"
                    ) from error
                self._move_adapter_to_device_of_base_layer(name)
        return adapters

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Also of adapters that rest, and are offloaded."""
        self.in_memory(list(self.keys()))
        return super().state_dict(*args, **kwargs)


@contextmanager
def exact_prefix(
    layers: Mapping[str, NTKAttentionLayer], prefix: Mapping[str, LayerPrefix], *, resting: Iterable[str] = ()
) -> Iterator[None]:
    """Let layers attend to real prefix tokens, beside the states of their adapters.

    Queries see the whole prefix, whatever their position: positions of the text count from 0, those of the prefix lie
    before it.

    Args:
        layers: of an adapted model, by name.
        prefix: for some or all of them.
        resting: names of layers whose adapters rest meanwhile.

    Raises:
        ValueError: if the model is tensor-parallel.
    """
    if any(layer.mesh is not None for layer in layers.values()):
        raise ValueError("prefixes are converted on a model with all heads in one process: load it with tp_size=1")
    before = {name: bool(layer.disable_adapters) for name, layer in layers.items()}
    try:
        for name, tokens in prefix.items():
            layers[name].exact = tokens
        for name in resting:
            layers[name]._disable_adapters = True
        yield
    finally:
        for name, layer in layers.items():
            layer.exact = None
            layer._disable_adapters = before[name]


def input_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states [..., D] that a block was called with."""
    return args[0] if args else next(iter(kwargs.values()))

"""The adapters of one attention module: trainable tensors that become prefix states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate.hooks import remove_hook_from_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from .calls import CALLS
from .config import NTKAttentionConfig
from .coordinates import Coordinated
from .feed_forward import FeedForward, FeedForwardPrefix
from .geometry import Geometry
from .sharding import is_partitioned, spread
from .state import PrefixState, RowStates

# The published start, k = 0, cannot be a logarithm. This k weighs nothing beside logits that are not far below -30, and
# like |k| at 0 it has no gradient. With one far smaller training overflows.
LOG_OF_NOTHING = -40.0
BASE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
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
        config.settle(rank=None)
    ranks, feed_forward_ranks = (set(x) for x in zip(*(ranks_of(config, g) for g in geometries), strict=True))
    if len(ranks) == 1:
        config.settle(rank=ranks.pop())
    feed_forward_ranks.discard(None)
    if len(feed_forward_ranks) < 2:
        config.settle(feed_forward_rank=feed_forward_ranks.pop() if feed_forward_ranks else None)


class PrefixAdapter(Coordinated):
    """The trainable form of one `PrefixState`, and of the prefix of the feed-forward block beside it.

    The parameters are Z [H, r, d_v] (or its factors Z_A [H, r, rank] and Z_B [H, rank, d_v]) and log_k, the logarithm
    of the entries of k that belong to nonnegative features: the normaliser is positive by construction. What does not
    train are buffers: `log_scale`, b, [H], which calibration sets, and `k_signed`, the entries of k of features of both
    signs (`taylor` has some), which are zero except in a state that was made of a given prefix. `feed_forward` is None
    where there is no such block or the config wants none.

    Calibration (`calibration.py`) also sets coordinates, see `Coordinated`: Z = C Z', log k = unit kappa.

    In a tensor-parallel model (`shard`) the parameters are spread by head over the processes of a mesh. State dicts
    hold the whole, and loading one takes each process's part; other methods deal in the heads of this process.
    """

    scaled = "log_k"
    constants = ("log_scale", "k_signed")
    log_scale: Tensor
    k_signed: Tensor | None

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
        self.register_buffer("k_signed", None)
        if "k_signed" in shapes:
            self.signed_features = (~nonnegative).nonzero().squeeze(1)
            self.k_signed = torch.zeros(shapes["k_signed"])
        self.register_buffer("log_scale", torch.zeros(shapes["log_scale"]))
        # Those of one kind have the same b and coordinates, if one of them trains: see `NTKAttentionLayer.lead`.
        self.kind = config.kind()
        self.trains = not config.inference_mode
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

    @torch.no_grad()
    def follow(self, other: Coordinated) -> None:
        """Take over b and the coordinates of another adapter of the same config; the function stays as it is."""
        assert isinstance(other, PrefixAdapter)
        shift = self.part("log_scale") - other.part("log_scale").to(self.part("log_scale"))
        self.part("log_scale").copy_(other.part("log_scale"))
        super().follow(other)
        if self.feed_forward is not None and other.feed_forward is not None:
            self.feed_forward.follow(other.feed_forward)
        if not self.log_k.is_meta and shift.any():
            leading, log_k = self.plain_leading(), self.plain_scaled()
            self.set_plain(leading * shift.exp()[:, None, None].to(leading), log_k + shift[:, None].to(log_k))

    @torch.no_grad()
    def become_twin(self, other: PrefixAdapter) -> None:
        """Take over all that does not train from another adapter of the same config.

        From then on equal parameters are equal functions: trainers copy the parameters of an adapter into a second one
        and compare with it later.
        """
        if self.k_signed is not None:
            self.part("k_signed").copy_(other.part("k_signed"))
        for own, given in zip(self.feature_map.buffers(), other.feature_map.buffers(), strict=True):
            own.copy_(given)
        self.follow(other)

    def is_plain(self) -> bool:
        return all(part.coordinates is None for part in self.modules() if isinstance(part, Coordinated))

    def part_of(self, x: Tensor) -> Tensor:
        """The heads of this process of a whole tensor [H, ...], which is on every process."""
        return x if self.mesh is None else spread(x, self.mesh).to_local()

    def saved_tensors(self) -> dict[str, Tensor]:
        """Parameters and constants as they are, by the names that files have for them."""
        buffers = {name: x for name, x in self.named_buffers() if not name.endswith("coordinates")}
        return {**dict(self.named_parameters()), **buffers}

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


class NTKAttentionLayer(nn.ModuleDict, BaseTunerLayer):
    """The adapters of one attention module and its feed-forward block, by name; hangs on the attention as a child."""

    adapter_layer_names = ("adapters",)

    def __init__(
        self, attention: nn.Module, geometry: Geometry, mesh: DeviceMesh | None = None, *, encodes: bool = False
    ):
        super().__init__()
        self.encodes = encodes  # whether it is of an encoder that writes nothing
        self._attention = (attention,)  # in a tuple, since a child must not register its parent
        self.geometry = geometry
        self.mesh = mesh  # of processes that hold a part of the heads each
        self.block: FeedForward | None = None
        self._hooks: list[RemovableHandle] = []
        self.register_load_state_dict_post_hook(share_loaded)
        # Set by `routing.attach`: the module's own function for "eager", and arguments that are refused
        self.eager: Callable[..., Any] | None = None
        self.refused_arguments: dict[str, dict[str, str]] = {}

    @property
    def rows(self) -> RowStates | None:
        """The prefixes of the rows of the mixed batch that this thread is in; None outside of one."""
        return None if CALLS.mixed is None else CALLS.mixed.rows.get(self)

    @property
    def adapters(self) -> nn.ModuleDict:
        return self

    def __getitem__(self, name: str) -> PrefixAdapter:
        return cast(PrefixAdapter, super().__getitem__(name))

    def get_base_layer(self) -> nn.Module:
        return self._attention[0]

    def add_adapter(self, name: str, config: NTKAttentionConfig, block: FeedForward | None = None) -> None:
        """A new adapter, which looks after a feed-forward block as well.

        It takes over what does not train from another one of its kind: one that trains, or else the active one. Where
        none trains only if that leaves it in plain coordinates, in which a file is loaded to the last bit.
        """
        width = 0 if block is None else block.width
        adapter = PrefixAdapter(config, replace(self.geometry, feed_forward=width))
        device = self.device()
        if device is not None and not adapter.log_k.is_meta:
            adapter.to(device)
        if self.mesh is not None:
            adapter.shard(self.mesh)
        others = [*self.active_names(), *self.keys()]
        alike = sorted((x for x in others if self[x].kind == adapter.kind), key=lambda x: not self[x].trains)
        self[name] = adapter
        if alike:
            twin = self.in_memory(alike[:1])[0]
            if adapter.trains or twin.trains or twin.is_plain():
                adapter.become_twin(twin)
            if not adapter.log_k.is_meta:  # else after it was loaded
                self.lead(name)
        if block is not None and not self._hooks:
            self.hook(block)
        BaseTunerLayer.set_adapter(self, self.active_adapters, inference_mode=config.inference_mode)

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
            block.layer.register_forward_hook(self.after_layer, always_call=True),
        ]

    def before_first(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        CALLS.inputs[self] = input_of(args, kwargs)

    def after_layer(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Also where the layer failed before the end of the block."""
        CALLS.inputs.pop(self, None)

    def after_last(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return self.add_to_block(CALLS.inputs.pop(self), output)

    def after_block(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return self.add_to_block(input_of(args, kwargs), output)

    def add_to_block(self, x: Tensor, output: Any) -> Any:
        """The output of the block, with what its prefixes add; experts may return more than a tensor."""
        out = output[0] if isinstance(output, tuple) else output
        for prefix in self.feed_forward_prefixes():
            out = prefix(x.to(out.device), out)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    def feed_forward_prefixes(self) -> list[Callable[[Tensor, Tensor], Tensor]]:
        if self.rests():
            return []
        if CALLS.mixed is not None:
            rows = CALLS.mixed.feed_forward_rows.get(self)
            return [] if rows is None else [rows]
        prefixes = [adapter.feed_forward for adapter in self.in_memory(self.active_names())]
        return [prefix for prefix in prefixes if prefix is not None]

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def rests(self) -> bool:
        return bool(self.disable_adapters) or self in CALLS.resting

    def active(self) -> Sequence[PrefixAdapter | RowStates]:
        """What acts in this call: the active adapters, or the rows of the mixed batch; none where adapters rest."""
        if self.rests():
            return []
        if CALLS.mixed is None:
            return self.in_memory(self.active_names())
        rows = CALLS.mixed.rows.get(self)
        return [] if rows is None else [rows]

    def active_names(self) -> list[str]:
        """Active adapters that this layer has."""
        return [name for name in cast(list[str], self.active_adapters) if name in self]

    def states(self, active: Sequence[PrefixAdapter | RowStates], batch_size: int) -> list[PrefixState | RowStates]:
        """The prefixes of what `active` gave, one after another; in a mixed batch the one of every row."""
        states: list[PrefixState | RowStates] = []
        for part in active:
            if isinstance(part, PrefixAdapter):
                states.append(part.state())
            elif CALLS.mixed is not None:
                states.append(CALLS.mixed.of_batch(part, batch_size, type(self.get_base_layer()).__name__))
        return states

    def load_state(self, name: str, state: PrefixState) -> None:
        """Let an adapter become a given state, see `PrefixAdapter.load_state`."""
        self[name].load_state(state)
        self.lead(name)

    def lead(self, name: str) -> None:
        """After b, coordinates or tensors of an adapter were set: let adapters of its kind have the same b and
        coordinates, each with the function that it has.

        Equal parameters are equal functions then. One that trains gives its own to the others; one that does not takes
        those of one that trains. Where none trains nothing changes.
        """
        own = self[name]
        others = [self[key] for key in self.keys() if key != name and self[key].kind == own.kind]
        if own.trains:
            for other in others:
                other.follow(own)
        elif leaders := [other for other in others if other.trains]:
            own.follow(leaders[0])

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

    def cast(self, name: str) -> None:
        """Give an adapter the dtype of the base layer."""
        own = set(self.parameters())
        dtypes = (p.dtype for p in self.get_base_layer().parameters() if p not in own)
        dtype = next((dtype for dtype in dtypes if dtype in BASE_DTYPES), None)
        if name in self and dtype is not None:
            self[name].to(dtype)

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
        # Not self[name]: another thread may have deleted one since its name was read.
        found = {name: cast(PrefixAdapter, self._modules[name]) for name in names if name in self._modules}
        for name, adapter in found.items():
            if hasattr(adapter, "_hf_hook"):
                try:
                    remove_hook_from_module(adapter, recurse=True)
                except ValueError as error:
                    raise ValueError(
                        f"the adapter {name!r} was offloaded to a disk without its values: expected get_peft_model and "
                        "set_peft_model_state_dict on a base model that is partly on a disk, not from_pretrained"
                    ) from error
                self._move_adapter_to_device_of_base_layer(name)
        return list(found.values())

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Also of adapters that rest, and are offloaded."""
        self.in_memory(list(self.keys()))
        return super().state_dict(*args, **kwargs)


def share_loaded(layer: nn.Module, *_: Any) -> None:
    """After a state dict was loaded into a layer, see `NTKAttentionLayer.lead`."""
    assert isinstance(layer, NTKAttentionLayer)
    for name in list(layer.keys()):
        parts = [part for part in layer[name].modules() if isinstance(part, Coordinated) and part.is_loaded]
        for part in parts:
            part.is_loaded = False
        log_k = layer[name].log_k
        is_cut = is_partitioned(log_k) or (isinstance(log_k, DTensor) and layer.mesh is None)  # ZeRO-3 and FSDP
        if parts and not is_cut:
            layer.lead(name)


def input_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states [..., D] that a block was called with."""
    return args[0] if args else next(iter(kwargs.values()))

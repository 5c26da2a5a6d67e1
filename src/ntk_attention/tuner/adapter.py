"""The trainable form of one prefix state: its tensors, how Z is held, and what calibration sets of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..ops.state import PrefixState
from .config import NTKAttentionConfig
from .coordinates import Coordinated
from .distributed import spread
from .feed_forward import FeedForwardPrefix, parts_by_name, parts_of_sizes
from .geometry import Geometry

# The published start, k = 0, cannot be a logarithm. This k weighs nothing beside logits that are not far below -30, and
# like |k| at 0 it has no gradient. With one far smaller training overflows.
LOG_OF_NOTHING = -40.0
MAX_FEATURES = 2**18


@dataclass(frozen=True)
class ZForm:
    """How an adapter holds Z [H, r, d_v] of its states: in full, or as the product of Z_A [H, r, rank] and
    Z_B [H, rank, d_v].

    Args:
        num_features: r.
        value_dim: d_v.
        rank: of the product; None for Z in full.
    """

    num_features: int
    value_dim: int
    rank: int | None

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that hold Z; the first carries the features."""
        return ("Z",) if self.rank is None else ("Z_A", "Z_B")

    def shapes(self, num_heads: int) -> dict[str, tuple[int, ...]]:
        """Of the parameters that hold Z of so many heads, by name."""
        sizes = (self.num_features, *(() if self.rank is None else (self.rank,)), self.value_dim)
        return {name: (num_heads, *sizes[i : i + 2]) for i, name in enumerate(self.names)}

    def split(self, Z: Tensor) -> dict[str, Tensor]:
        """A given Z [H, r, d_v] as these parameters, by name; a product is its best approximation of that rank."""
        if self.rank is None:
            return {"Z": Z}
        U, S, V = torch.linalg.svd(Z.double(), full_matrices=False)
        root = S[:, : self.rank].sqrt()  # half of each singular value on either side
        missing = self.rank - root.shape[1]
        Z_A, Z_B = U[..., : self.rank] * root[:, None], root[..., None] * V[:, : self.rank]
        return {"Z_A": nn.functional.pad(Z_A, (0, missing)), "Z_B": nn.functional.pad(Z_B, (0, 0, 0, missing))}


def z_form(config: NTKAttentionConfig, geometry: Geometry) -> ZForm:
    """How the adapters of a config hold Z on attention modules of these sizes.

    Raises:
        ValueError: if the feature map makes more features than any state can hold.
    """
    r = config.make_feature_map().num_features(geometry.head_dim)
    if r > MAX_FEATURES:
        raise ValueError(
            f"the feature map {config.feature_map!r} makes more features of head_dim {geometry.head_dim} than a state "
            f"can hold: at most {MAX_FEATURES:,} are expected"
        )
    return ZForm(r, geometry.value_dim, ranks_of(config, geometry)[0])


def parameter_shapes(config: NTKAttentionConfig, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """The tensors of a `PrefixAdapter`, all of which go into files, by name; they are not made here.

    Raises:
        ValueError: if the feature map makes more features than any state can hold.
    """
    d, H = geometry.head_dim, num_states(config, geometry)
    form, feature_map = z_form(config, geometry), config.make_feature_map()
    r, num_positive = form.num_features, int(feature_map.nonnegative(d).sum())
    shapes: dict[str, tuple[int, ...]] = {"log_k": (H, num_positive), "log_scale": (H,), **form.shapes(H)}
    if num_positive < r:
        shapes["k_signed"] = (H, r - num_positive)
    feed_forward_rank = ranks_of(config, geometry)[1]
    if feed_forward_rank is not None:
        for part in geometry.feed_forward:
            place = ".".join(["feed_forward", *([part.name] if part.name else [])])
            shapes[f"{place}.Z_A"] = (part.in_features, feed_forward_rank)
            shapes[f"{place}.Z_B"] = (feed_forward_rank, part.out_features)
    return shapes | {f"feature_map.{name}": shape for name, shape in feature_map.stored_shapes(d).items()}


def num_states(config: NTKAttentionConfig, geometry: Geometry) -> int:
    """H, the heads that have a state of their own."""
    return geometry.num_heads if config.state_heads == "query" else geometry.num_kv_heads


def ranks_of(config: NTKAttentionConfig, geometry: Geometry) -> tuple[int | None, int | None]:
    """Of Z and of the prefix of the feed-forward block; None for a full Z, and for no such prefix."""
    return config.ranks_for(geometry, num_states(config, geometry))


def settled_ranks(config: NTKAttentionConfig, geometries: Iterable[Geometry]) -> dict[str, int | None]:
    """The config's `rank` and `feed_forward_rank` with numbers in place of "auto": those of the commonest sizes of a
    module and its block, for all modules. A file must not depend on what "auto" means later.
    """
    geometries = list(geometries)
    with_block = [geometry for geometry in geometries if geometry.feed_forward]
    if config.rank == "auto" and not with_block:
        config = replace(config, rank=None)
    rank, in_block = ranks_of(config, Counter(with_block or geometries).most_common(1)[0][0])
    return {"rank": rank, "feed_forward_rank": in_block}


class PrefixAdapter(Coordinated):
    """The trainable form of one `PrefixState` (Algorithm 2 of the paper), and of the prefix of the feed-forward block
    beside it.

    The parameters are Z [H, r, d_v] (or its factors Z_A [H, r, rank] and Z_B [H, rank, d_v]) and log_k, the logarithm
    of the entries of k that belong to nonnegative features: the normaliser is positive by construction. What does not
    train are buffers: `log_scale`, b, [H], which calibration sets, and `k_signed`, the entries of k of features of both
    signs (`taylor` has some), which are zero except in a state that was made of a given prefix. `feed_forward` is None
    where there is no such block or the config wants none.

    Calibration (the room beside this one) also sets coordinates, see `Coordinated`: Z = C Z', log k = unit kappa.

    In a tensor-parallel model (`shard`) the parameters are spread by head over the processes of a mesh. State dicts
    hold the whole, and loading one takes each process's part; other methods deal in the heads of this process.

    Args:
        config: whose feature map, ranks and kind of state heads it has.
        geometry: of the attention module, with the parts of its feed-forward block.

    Raises:
        ValueError: if the feature map makes more features than any state can hold.
    """

    scaled_name = "log_k"
    constants = ("log_scale", "k_signed")
    Z: Tensor  # where it is held in full
    Z_A: Tensor  # where it is a product
    Z_B: Tensor
    log_k: Tensor
    log_scale: Tensor
    k_signed: Tensor | None

    def __init__(self, config: NTKAttentionConfig, geometry: Geometry):
        super().__init__()
        self.form = z_form(config, geometry)
        self.leading_name = self.form.names[0]
        shapes = parameter_shapes(config, geometry)
        self.feature_map = config.make_feature_map().bind(geometry.head_dim)
        for name in (*self.form.names, "log_k"):
            setattr(self, name, nn.Parameter(torch.empty(shapes[name])))
        nonnegative = self.feature_map.nonnegative(geometry.head_dim)
        self.normaliser_features = None if nonnegative.all() else nonnegative.nonzero().squeeze(1)
        self.register_buffer("k_signed", None)
        if "k_signed" in shapes:
            self.signed_features = (~nonnegative).nonzero().squeeze(1)
            self.k_signed = torch.zeros(shapes["k_signed"])
        self.register_buffer("log_scale", torch.zeros(shapes["log_scale"]))
        # Those of one kind have the same b and coordinates, if one of them trains: see `NTKAttentionLayer.lead`.
        self.kind = config.kind()
        self.positions = config.positions  # "free" or "rotary"
        self.trains = not config.inference_mode
        rank = ranks_of(config, geometry)[1]
        self.feed_forward: nn.Module | None = None if rank is None else parts_of_sizes(geometry.feed_forward, rank)
        self._places: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.reset_parameters(config.init_weights)

    @property
    def parts(self) -> dict[str, FeedForwardPrefix]:
        """Of the prefix of the feed-forward block, by name; "" is that of a block as a whole."""
        return {} if self.feed_forward is None else parts_by_name(self.feed_forward)

    def part_of_block(self, name: str) -> FeedForwardPrefix | None:
        """One of `parts`, for every call of its layer: no dictionary is made."""
        block = self.feed_forward
        if isinstance(block, nn.ModuleDict):
            return cast("FeedForwardPrefix | None", block._modules.get(name))
        return None if name else cast("FeedForwardPrefix | None", block)

    @property
    def num_features(self) -> int:
        """r, the features of its map, the constant one among them."""
        return self.form.num_features

    @property
    def value_dim(self) -> int:
        """d_v."""
        return self.form.value_dim

    @property
    def rank(self) -> int | None:
        """Of Z; None where it is held in full."""
        return self.form.rank

    @property
    def is_factored(self) -> bool:
        """Whether Z is the product of Z_A and Z_B."""
        return self.form.rank is not None

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where log_k and k_signed stand in k; kept on each device, since a recorded graph cannot copy from the CPU."""
        if device not in self._places:
            assert self.normaliser_features is not None
            self._places[device] = self.normaliser_features.to(device), self.signed_features.to(device)
        return self._places[device]

    def shard(self, mesh: DeviceMesh) -> None:
        """Keep a part of the heads."""
        super().shard(mesh)
        for part in self.parts.values():
            part.shard(mesh)

    @torch.no_grad()
    def follow(self, other: Coordinated) -> None:
        """Take over b and the coordinates of another adapter of the same config; the function stays as it is."""
        assert isinstance(other, PrefixAdapter)
        shift = self.part("log_scale") - other.part("log_scale").to(self.part("log_scale"))
        self.part("log_scale").copy_(other.part("log_scale"))
        super().follow(other)
        for name, part in self.parts.items():
            part.follow(other.parts[name])
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
        """Whether the parameters are the plain Z and log k."""
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
        """The start that `init_weights` of the config asks for."""
        if self.log_k.is_meta:
            return
        for part in self.parts.values():
            part.reset_parameters(init_weights is False)
        r = self.num_features
        with torch.no_grad():
            if init_weights is False:
                self.log_k.normal_(-math.log(r), 0.5)
                for name in self.form.names:
                    getattr(self, name).normal_(0.0, 1.0)
                return
            # phi(q).k is about 1 where phi is about 1: the weight of one token whose logit is 0, and its value is 0.
            self.log_k.fill_(LOG_OF_NOTHING if init_weights == "published" else -math.log(self.log_k.shape[1]))
            if self.is_factored:
                self.Z_A.normal_(0.0, r**-0.5)
                self.Z_B.zero_()
            else:
                self.Z.zero_()

    def plain_Z(self) -> Tensor:  # noqa: N802
        """Z [H, r, d_v] in plain coordinates."""
        leading = self.plain_leading()
        return leading @ self.part("Z_B") if self.is_factored else leading

    def state(self) -> PrefixState:
        """The state as it stands, differentiable with respect to the parameters."""
        return self.kept("state", self._made_state)

    def _made_state(self) -> PrefixState:
        k = torch.exp(self.plain_scaled())
        if self.normaliser_features is not None and self.k_signed is not None:
            positive, signed = self.places(k.device)
            k = k.new_zeros(len(k), self.num_features).index_copy(1, positive, k)
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
        expected = (self.num_heads, self.num_features, self.value_dim)
        if tuple(Z.shape) != expected:
            raise ValueError(f"the adapter needs Z [H, r, d_v] = {list(expected)}, the state has {list(Z.shape)}")
        self.set_coordinates(None, 1.0)
        for part in self.parts.values():
            part.part("Z_B").zero_()
        for name, factor in self.form.split(Z).items():
            self.part(name).copy_(factor)
        positive = k if self.normaliser_features is None else k[:, self.normaliser_features.to(k.device)]
        self.part("log_k").copy_(torch.log(positive.clamp_min(math.exp(LOG_OF_NOTHING))))
        if self.k_signed is not None:
            self.part("k_signed").copy_(k[:, self.signed_features.to(k.device)])
        self.part("log_scale").copy_(state.log_scale)
